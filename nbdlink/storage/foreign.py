"""Images of other hypervisors, to be read: VMDK, VDI, VHD (vpc) and VHDX.

`dissect.hypervisor` knows the formats. It is made for looking into images that may be broken, so
whatever it raises counts as an image that cannot be read. Its streams have a position, and
parsers behind them have one, too: one thread reads at a time.

Images that are based on others are refused: the library looks for the others by names in the
image, and whoever made the image must not choose which files of this machine are served.
"""

from __future__ import annotations

import errno
import io
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final

from nbdlink.errors import StorageError
from nbdlink.protocol.chunks import Extent
from nbdlink.protocol.constants import ALLOCATION_CONTEXT, DEPTH_CONTEXT, MAX_EXPORT_SIZE
from nbdlink.storage.base import Storage
from nbdlink.storage.extras import installation
from nbdlink.storage.probe import SECTOR, format_of

_TITLES: Final = {"vmdk": "VMDK", "vdi": "VDI", "vpc": "VHD (vpc)", "vhdx": "VHDX"}
FORMATS: Final = tuple(_TITLES)
"""The formats, by QEMU's names."""

_VDI_DIFFERENCING: Final = 4
_VHD_DIFFERENCING: Final = 4
_PIECE: Final = 1 << 20
_LONGEST_BLOCK: Final = 1 << 20
"""Bytes in a block of a VDI image."""


class ForeignStorage(Storage):
    """An image in one of `FORMATS`, for reading. Made by `open`."""

    read_only = True
    contexts = (ALLOCATION_CONTEXT, DEPTH_CONTEXT)

    def __init__(self, name: str, stream: Any, files: list[Any], block: int) -> None:
        """Serve what a stream of `dissect.hypervisor` reads.

        Args:
            name: for messages.
            stream: it has a size, and can seek and read.
            files: to be closed at the end.
            block: bytes that may be read at once, from a multiple of it on.
        """
        self.name = name
        self.size = int(stream.size)
        self._stream = stream
        self._files = files
        self._block = block
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: str, kind: str) -> ForeignStorage:
        """Open an image.

        Args:
            path: of the image.
            kind: one of `FORMATS`.

        Raises:
            StorageError: the library is not installed, or the image cannot be read.
        """
        try:
            file = Path(path).open("rb")  # noqa: SIM115 - the storage closes it
        except OSError as error:
            words = (error.strerror or str(error)).lower()
            raise StorageError(f"{path} cannot be opened: {words}", hint="check the path") from None
        try:
            # A VHD of fixed size has its sign at the end only.
            if kind != "vpc" and format_of(os.pread(file.fileno(), SECTOR, 0)) != kind:
                raise ValueError("it does not begin as one")
            image = _opener(kind)(file)
            if image.block <= 0:
                raise ValueError("its blocks have no size")
            storage = cls(path, image.stream, [file, *image.files], image.block)
        except ImportError:
            file.close()
            raise StorageError(
                f"{path}: reading {_TITLES[kind]} images takes the package dissect.hypervisor",
                hint=installation("nbdlink[images]"),
            ) from None
        except Exception as error:
            file.close()
            raise StorageError(
                f"{path} cannot be read as a {_TITLES[kind]} image: {_words(error)}"
            ) from None
        if image.is_dirty:
            storage.close()
            raise StorageError(
                f"{path} was not closed properly, and its log would have to be replayed",
                hint=f"qemu-img check -r all {path} does it",
            )
        if image.is_based:
            storage.close()
            raise StorageError(
                f"{path} is based on another image, which cannot be followed in {_TITLES[kind]}",
                hint=f"make one image of them: qemu-img convert -O qcow2 {path} whole.qcow2",
            )
        if not 0 < storage.size <= MAX_EXPORT_SIZE:
            storage.close()
            raise StorageError(f"{path}: a {_TITLES[kind]} image of {storage.size} bytes")
        return storage

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Read; EIO for whatever the library does not understand."""
        # The library (3.21) reads what lies in several blocks of a VDI or VHDX image as if these
        # were neighbours in the file. Asked for a part of one block it does well.
        while buffer:
            count = min(len(buffer), self._block - offset % self._block)
            try:
                with self._lock:
                    self._stream.seek(offset)
                    data = self._stream.read(count)
            except Exception as error:
                raise OSError(errno.EIO, f"{self.name}: {_words(error)}") from None
            if len(data) < count:
                raise OSError(errno.EIO, f"{self.name} ends too early")
            buffer[:count] = data
            buffer, offset = buffer[count:], offset + count

    def extents(self, context: str, offset: int, length: int) -> Iterator[Extent]:
        """Tell of data only: what the image has no block for is not asked."""
        yield Extent(length, 1 if context == DEPTH_CONTEXT else 0)

    def write(self, buffer: memoryview, offset: int, fua: bool) -> None:
        """Never called, as nothing can be written."""
        raise OSError(errno.EROFS, f"{self.name} can only be read")

    def flush(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Close the image."""
        for file in self._files:
            file.close()

    def disown(self) -> None:
        """Close the image, of which nothing is ever written."""
        self.close()


class _Padded(io.RawIOBase):
    """A file behind whose end there are zeroes, for as far as one block of an image may reach.

    QEMU leaves out what is zero at the end of the last one.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        self._position = 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go somewhere."""
        if whence == io.SEEK_END:
            offset += self._size
        elif whence == io.SEEK_CUR:
            offset += self._position
        self._position = max(0, offset)
        return self._position

    def tell(self) -> int:
        """Give the position."""
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """Read, with zeroes at the end."""
        left = max(0, self._size + _LONGEST_BLOCK - self._position)
        size = left if size is None or size < 0 else min(size, left)
        data = os.pread(self._file.fileno(), size, self._position)
        if self._position + len(data) >= self._size:  # else it has become shorter
            data = data.ljust(size, b"\0")
        self._position += len(data)
        return data


@dataclass(frozen=True)
class _Image:
    """What the library has opened.

    Attributes:
        stream: its bytes.
        files: that it has opened by itself.
        block: see `ForeignStorage`.
        is_based: whether other images belong to it.
        is_dirty: whether there is a log to replay.
    """

    stream: Any
    files: list[Any] = field(default_factory=list)
    block: int = _PIECE
    is_based: bool = False
    is_dirty: bool = False


def _opener(kind: str) -> Callable[[BinaryIO], _Image]:
    """Give what opens an image of a kind.

    Raises:
        ImportError: the library is not there. It is imported for those only who need it.
    """
    if kind == "vmdk":
        from dissect.hypervisor.disk.vmdk import VMDK

        def open_vmdk(file: BinaryIO) -> _Image:
            disk = VMDK(file)
            bases = [each.parent for each in (disk, *disk.disks) if getattr(each, "parent", None)]
            parts = [part for base in bases for part in base.disks] + disk.disks
            return _Image(disk, [part.fh for part in parts], is_based=bool(bases))

        return open_vmdk
    if kind == "vdi":
        from dissect.hypervisor.disk.vdi import VDI

        def open_vdi(file: BinaryIO) -> _Image:
            disk = VDI(_Padded(file))
            based = int(disk.type) == _VDI_DIFFERENCING
            return _Image(disk.open(), block=disk.block_size, is_based=based)

        return open_vdi
    if kind == "vpc":
        from dissect.hypervisor.disk.vhd import VHD

        def open_vhd(file: BinaryIO) -> _Image:
            disk = VHD(file)
            return _Image(disk, is_based=int(disk.disk.footer.disk_type) == _VHD_DIFFERENCING)

        return open_vhd
    from dissect.hypervisor.disk.vhdx import VHDX

    def open_vhdx(file: BinaryIO) -> _Image:
        disk = VHDX(file)
        dirty = any(disk.header.log_guid)
        return _Image(disk, block=disk.block_size, is_based=disk.has_parent, is_dirty=dirty)

    return open_vhdx


def _words(error: Exception) -> str:
    words = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return words.rstrip(": ").replace("\n", " ")
