"""Storages that lie on another one and change what it does in one respect."""

from __future__ import annotations

from collections.abc import Iterator

from nbdlink.protocol.chunks import Extent
from nbdlink.storage.base import PlainFile, Storage


class Layer(Storage):
    """A storage that does all as the one below does; subclasses change what they are about.

    Attributes:
        below: the storage that it lies on. It is closed together with the layer.
    """

    def __init__(self, below: Storage) -> None:
        self.below = below
        self.name = below.name
        self.size = below.size
        self.read_only = below.read_only
        self.minimum_block = below.minimum_block
        self.preferred_block = below.preferred_block
        self.maximum_payload = below.maximum_payload
        self.can_trim = below.can_trim
        self.can_zero = below.can_zero
        self.can_fast_zero = below.can_fast_zero
        self.can_cache = below.can_cache
        self.can_multi_conn = below.can_multi_conn
        self.is_rotational = below.is_rotational
        self.waits = below.waits
        self.may_fork = below.may_fork
        self.contexts = below.contexts

    @property
    def is_sparse(self) -> bool:
        """Whether there may be holes; it changes as they are made."""
        return self.below.is_sparse

    @is_sparse.setter
    def is_sparse(self, value: bool) -> None:
        self.below.is_sparse = value

    @property
    def plain_file(self) -> PlainFile | None:
        """The file that the storage below is."""
        return self.below.plain_file

    @property
    def signature(self) -> str | None:
        """That of the storage below."""
        return self.below.signature

    def notice_growth(self) -> None:
        """Look whether the storage below has grown."""
        self.below.notice_growth()
        self.size = self.below.size

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Read from below."""
        self.below.read_into(buffer, offset)

    def write(self, buffer: memoryview, offset: int, fua: bool) -> None:
        """Write below."""
        self.below.write(buffer, offset, fua)

    def zero(self, offset: int, length: int, *, may_trim: bool, fast: bool, fua: bool) -> None:
        """Zero below."""
        self.below.zero(offset, length, may_trim=may_trim, fast=fast, fua=fua)

    def trim(self, offset: int, length: int, fua: bool) -> None:
        """Trim below."""
        self.below.trim(offset, length, fua)

    def cache(self, offset: int, length: int) -> None:
        """Have it read ahead below."""
        self.below.cache(offset, length)

    def extents(self, context: str, offset: int, length: int) -> Iterator[Extent]:
        """Tell what the storage below tells."""
        return self.below.extents(context, offset, length)

    def flush(self) -> None:
        """Flush below."""
        self.below.flush()

    def close(self) -> None:
        """Close the storage below."""
        self.below.close()

    def disown(self) -> None:
        """Have the storage below let go of its files."""
        self.below.disown()
