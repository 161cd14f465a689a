"""A part of a storage, served as if it were all."""

from __future__ import annotations

from collections.abc import Iterator

from nbdlink.errors import StorageError
from nbdlink.protocol.chunks import Extent
from nbdlink.protocol.constants import MAX_EXPORT_SIZE
from nbdlink.storage.base import PlainFile, Storage
from nbdlink.storage.layer import Layer


class Window(Layer):
    """The bytes of another storage from an offset on.

    It has no fast roads: what lies in a raw file has them by `RawStorage.open(offset=...)`.
    """

    def __init__(self, below: Storage, offset: int, size: int | None) -> None:
        """Show a part of `below`.

        Args:
            below: the storage.
            offset: bytes to leave out at the front.
            size: bytes to show, or None for all that follow, now and once it grows.

        Raises:
            StorageError: that part is not there, or does not begin and end with a block.
        """
        super().__init__(below)
        self._offset = offset
        self._may_grow = size is None
        self.size = bounds(below.name, below.size, offset, size, below.minimum_block)

    @property
    def plain_file(self) -> PlainFile | None:
        """None."""
        return None

    @property
    def signature(self) -> str | None:
        """That of the storage below, and where in it the window is."""
        signature = self.below.signature
        return f"{signature}+{self._offset}" if signature and self._offset else signature

    def notice_growth(self) -> None:
        """Grow with the storage below, if no size was asked for."""
        self.below.notice_growth()
        if self._may_grow:
            self.size = self.below.size - self._offset

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Read from below."""
        self.below.read_into(buffer, self._offset + offset)

    def write(self, buffer: memoryview, offset: int, fua: bool) -> None:
        """Write below."""
        self.below.write(buffer, self._offset + offset, fua)

    def zero(self, offset: int, length: int, *, may_trim: bool, fast: bool, fua: bool) -> None:
        """Zero below."""
        self.below.zero(self._offset + offset, length, may_trim=may_trim, fast=fast, fua=fua)

    def trim(self, offset: int, length: int, fua: bool) -> None:
        """Trim below."""
        self.below.trim(self._offset + offset, length, fua)

    def cache(self, offset: int, length: int) -> None:
        """Have it read ahead below."""
        self.below.cache(self._offset + offset, length)

    def extents(self, context: str, offset: int, length: int) -> Iterator[Extent]:
        """Tell what the storage below tells."""
        return self.below.extents(context, self._offset + offset, length)


def bounds(name: str, whole: int, offset: int, size: int | None, sector: int) -> int:
    """Check a part of a storage, and give its size.

    Args:
        name: of the storage, for messages.
        whole: its bytes.
        offset: where the part begins.
        size: bytes, or None for all that follow `offset`.
        sector: what offset and size have to be multiples of.

    Raises:
        StorageError: what is asked for does not lie inside, or is nothing.
    """
    if not whole:
        raise StorageError(f"{name} is empty", hint=f"give it a size: truncate -s 1G {name}")
    if offset < 0 or (size is not None and size <= 0):
        raise StorageError(f"{name}: offset and size cannot be negative, or the size 0")
    if offset >= whole:
        raise StorageError(
            f"{name}: the offset {offset} lies behind its end",
            hint=f"it has {whole} bytes",
        )
    rest = whole - offset
    if size is not None and size > rest:
        raise StorageError(
            f"{name}: {size} bytes from {offset} reach {size - rest} bytes past its end",
            hint=f"it has {whole} bytes; at most {rest} can be served from there",
        )
    size = rest if size is None else size
    for what, number in (("offset", offset), ("size", size)):
        if number % sector:
            raise StorageError(
                f"{name}: the {what} {number} is not a multiple of the device's sector",
                hint=f"use a multiple of {sector} bytes",
            )
    if size > MAX_EXPORT_SIZE:
        raise StorageError(f"{name}: {size} bytes are more than the protocol can serve")
    return size
