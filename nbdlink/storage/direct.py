"""Files and block devices without the page cache, see `aligned`: as storages, and for formats."""

from __future__ import annotations

import errno
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, Self

from nbdlink.errors import StorageError
from nbdlink.storage import blockdev
from nbdlink.storage.aligned import AlignedFile, block_size
from nbdlink.storage.imagefile import PosixFile
from nbdlink.storage.raw import RawStorage


class DirectStorage(RawStorage):
    """A regular file or block device that is read and written without the page cache."""

    open_flags: ClassVar[int] = os.O_DIRECT
    can_cache = False
    may_fork = False  # what holds blocks is known to one process

    def __init__(self, path: Path, fd: int, **options: Any) -> None:
        """Take over an open file; see `RawStorage`."""
        self._aligned: AlignedFile | None = None
        super().__init__(path, fd, **options)
        block = self._align if self._device else block_size(fd)
        self._aligned = AlignedFile(
            self.name, fd, block, grows=not self._device, read_only=self.read_only
        )
        self._align = block  # zeroes and holes are made of whole blocks, too
        self.preferred_block = max(self.preferred_block, block)

    @classmethod
    def open_error(cls, path: Path, error: OSError, *, read_only: bool) -> StorageError:
        """Say why a file cannot be opened."""
        if error.errno == errno.EINVAL:
            return _cannot(path)
        return super().open_error(path, error, read_only=read_only)

    @property
    def plain_file(self) -> None:
        """None: nobody else knows how to align requests."""
        return None

    @property
    def _file(self) -> AlignedFile:
        assert self._aligned is not None
        return self._aligned

    def head(self, length: int) -> bytes:
        """Read the file's first bytes."""
        buffer = bytearray(length)
        return bytes(buffer[: self._file.read(memoryview(buffer), 0)])

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer`; EIO where the file has been truncated below the export's size."""
        if self._file.read(buffer, self.start + offset) < len(buffer):
            raise OSError(errno.EIO, f"{self.name} has become shorter than its export")

    def _write(self, buffer: memoryview, position: int, flags: int) -> None:
        self._file.write(buffer, position, flags)

    def _try(self, mode: int, position: int, length: int) -> bool:
        """Do a fallocate, while nobody writes these blocks back."""
        hold = self._aligned.hold(position, length) if self._aligned and length else nullcontext()
        with hold:
            return super()._try(mode, position, length)

    def cache(self, offset: int, length: int) -> None:
        """Do nothing: there is no cache."""

    def close(self) -> None:
        """Close the file."""
        if self._aligned is not None:
            self._aligned.close()
        super().close()


class DirectFile(PosixFile):
    """The file of an image format, read and written without the page cache. Made by `open`."""

    def __init__(self, name: str, fd: int, *, read_only: bool, device: bool) -> None:
        """Take over a file that was opened with O_DIRECT; see `PosixFile`."""
        super().__init__(name, fd, read_only=read_only, device=device)
        block = blockdev.sector_sizes(fd)[0] if device else block_size(fd)
        self._aligned = AlignedFile(name, fd, block, grows=not device, read_only=read_only)
        self._base: PosixFile | None = None  # who has the locks

    @classmethod
    def of(cls, file: PosixFile) -> Self:
        """Go on with a file that is open, and keep it open, but without the page cache.

        Raises:
            StorageError: its file system has no such way.
        """
        flags = os.O_RDONLY if file.read_only else os.O_RDWR
        try:
            fd = os.open(f"/proc/self/fd/{file.fd}", flags | os.O_DIRECT | os.O_CLOEXEC)
            try:
                direct = cls(file.name, fd, read_only=file.read_only, device=file._device)
                direct._base = file
                return direct
            except BaseException:
                os.close(fd)
                raise
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise _cannot(file.name) from None
            raise StorageError(f"{file.name}: {(error.strerror or str(error)).lower()}") from None

    @property
    def fd(self) -> None:  # type: ignore[override]
        """None: nobody else knows how to align requests."""
        return None

    @property
    def nowait(self) -> None:
        """None: a disk has to be waited for."""
        return None

    def read_at(self, buffer: memoryview, position: int) -> None:
        """Fill `buffer`, with zeroes behind the end."""
        count = self._aligned.read(buffer, position)
        if count < len(buffer):
            buffer[count:] = bytes(len(buffer) - count)

    def write_at(self, buffer: memoryview | bytes, position: int) -> None:
        """Write `buffer`."""
        self._aligned.write(memoryview(buffer).cast("B"), position)

    def truncate(self, size: int) -> None:
        """Change a file's size, while nobody writes to its end."""
        with self._aligned.hold(size, 1, exclusive=True):
            super().truncate(size)

    def _try(self, mode: int, position: int, length: int) -> bool:
        """Do a fallocate, while nobody writes these blocks back."""
        with self._aligned.hold(position, max(1, length)):
            return super()._try(mode, position, length)

    def close(self) -> None:
        """Close the file, by both descriptors."""
        self._aligned.close()
        super().close()
        if self._base is not None:
            self._base.close()


class UnsafeFile(PosixFile):
    """The file of an image format that is never made durable. Made by `open`."""

    def flush(self) -> None:
        """Do nothing."""


class UnsafeDirectFile(DirectFile):
    """The same without the page cache."""

    def flush(self) -> None:
        """Do nothing."""


def _cannot(path: str | os.PathLike[str]) -> StorageError:
    return StorageError(
        f"{path}: its file system cannot do without the page cache (O_DIRECT)",
        hint="use --cache writeback or writethrough",
    )
