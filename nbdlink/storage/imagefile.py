"""What an image format asks of the file that it keeps its clusters in.

The methods may be called by many threads at once. Failures are `OSError` with the errno that
the kernel gave; the caller cares for ranges that overlap.
"""

from __future__ import annotations

import abc
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from nbdlink.errors import StorageError
from nbdlink.storage import blockdev
from nbdlink.storage.fallocate import PUNCH_HOLE, ZERO_RANGE, attempt
from nbdlink.storage.holes import data_and_holes
from nbdlink.storage.lost import LostWrites
from nbdlink.storage.mapping import is_in_memory, nowait_flag


class ImageFile(abc.ABC):
    """Bytes that a format reads and writes by position.

    Attributes:
        name: for messages, usually the path.
        read_only: whether no method that writes may be called.
    """

    name: str
    read_only: bool

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """The bytes that the file has at this moment."""

    @property
    def allocated(self) -> int:
        """The bytes that the file takes up on its disk; `size` if that is not known."""
        return self.size

    @property
    def fd(self) -> int | None:
        """An open file for system calls by position, or None if there is none."""
        return None

    @property
    def identity(self) -> tuple[int, int] | None:
        """What tells the file from all others of this machine, or None."""
        return None

    @abc.abstractmethod
    def read_at(self, buffer: memoryview, position: int) -> None:
        """Fill `buffer`. What lies behind the end of the file reads as zeroes.

        Formats need that: an image's last cluster may be there in part only.
        """

    @property
    def nowait(self) -> bool | None:
        """Whether `read_now` never waits; None if it does not read at all."""
        return None

    @property
    def in_memory(self) -> bool:
        """Whether all of the file is in memory for good."""
        return False

    def read_now(self, buffer: memoryview, position: int) -> bool:
        """Fill `buffer` from the page cache.

        Returns:
            False if it is not there as a whole; then `buffer` holds anything.

        Raises:
            OSError: as far as the system tells, it would have to be waited for; or it fails.
        """
        return False

    @abc.abstractmethod
    def write_at(self, buffer: memoryview | bytes, position: int) -> None:
        """Write the whole of `buffer`; the file grows if it must."""

    @abc.abstractmethod
    def flush(self) -> None:
        """Make durable what writes have returned before, in any thread."""

    @abc.abstractmethod
    def truncate(self, size: int) -> None:
        """Make the file that long; what is new reads as zeroes."""

    def zero_at(self, position: int, length: int, *, may_trim: bool) -> bool:
        """Have a range read as zeroes without writing them.

        Returns:
            False if that is impossible here, and nothing has changed.
        """
        return False

    def discard_at(self, position: int, length: int) -> None:  # noqa: B027 - a hint
        """Take the hint that a range is not needed any more."""

    def extents(self, position: int, length: int) -> Iterator[tuple[int, bool]]:
        """Tell data from holes: pairs of bytes and whether they are data, without gaps.

        What lies behind the end is a hole.
        """
        yield length, True

    @abc.abstractmethod
    def close(self) -> None:
        """Give the file back, without flushing. May be called twice."""

    def disown(self) -> None:
        """Do as `Storage.disown`."""
        self.close()


class PosixFile(ImageFile):
    """A regular file or a block device through the page cache. Made by `open`."""

    def __init__(self, name: str, fd: int, *, read_only: bool, device: bool) -> None:
        """Take over an open file.

        Args:
            name: for messages.
            fd: the file.
            read_only: whether it was opened for reading only.
            device: whether it is a block device, which cannot grow.
        """
        self.name = name
        self.read_only = read_only
        self._fd = fd
        self._device = device
        self._lost = LostWrites(name)
        self._unsupported: set[int] = set()
        self._nowait = nowait_flag(fd)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, read_only: bool) -> Self:
        """Open a file that is there.

        Raises:
            StorageError: it cannot be opened, or is neither a file nor a block device.
        """
        path = Path(path)
        try:
            kind = path.stat().st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
                raise StorageError(f"{path} is neither a regular file nor a block device")
            mode = os.O_RDONLY if read_only else os.O_RDWR
            fd = os.open(path, mode | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise StorageError(
                f"{path} cannot be opened: {(error.strerror or str(error)).lower()}",
                hint=_hint(error, path, read_only=read_only),
            ) from None
        os.set_blocking(fd, True)
        device = stat.S_ISBLK(os.fstat(fd).st_mode)
        return cls(str(path), fd, read_only=read_only, device=device)

    @property
    def size(self) -> int:
        """The file's or device's size."""
        return blockdev.size(self._fd) if self._device else os.fstat(self._fd).st_size

    @property
    def allocated(self) -> int:
        """The blocks that the file system has for the file; all of a device."""
        return self.size if self._device else os.fstat(self._fd).st_blocks * 512

    @property
    def fd(self) -> int:
        """The file."""
        return self._fd

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode."""
        status = os.fstat(self._fd)
        return status.st_dev, status.st_ino

    def read_at(self, buffer: memoryview, position: int) -> None:
        """Fill `buffer`, with zeroes behind the end."""
        count = os.preadv(self._fd, (buffer,), position)
        missing = len(buffer) - count
        while missing:
            if not count:
                buffer[-missing:] = bytes(missing)
                return
            position += count
            count = os.preadv(self._fd, (buffer[-missing:],), position)
            missing -= count

    @property
    def nowait(self) -> bool | None:
        """Whether the file system knows such reads."""
        return self._nowait != 0

    @property
    def in_memory(self) -> bool:
        """Whether it lies on a file system without a disk."""
        return not self._device and is_in_memory(self._fd)

    def read_now(self, buffer: memoryview, position: int) -> bool:
        """Fill `buffer`; what lies behind the end is not there."""
        return os.preadv(self._fd, (buffer,), position, self._nowait) == len(buffer)

    def write_at(self, buffer: memoryview | bytes, position: int) -> None:
        """Write `buffer`."""
        count = os.pwritev(self._fd, (buffer,), position)
        missing = len(buffer) - count
        if not missing:
            return
        rest = memoryview(buffer)
        while missing:
            if not count:
                raise OSError(errno.EIO, f"{self.name} takes no more bytes")
            position += count
            count = os.pwritev(self._fd, (rest[-missing:],), position)
            missing -= count

    def flush(self) -> None:
        """Call fdatasync; it fails for ever once data may have been lost."""
        self._lost.check()
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            self._lost.note(error)
            raise
        self._lost.check()  # a neighbour's flush may have been told what belongs to both

    def truncate(self, size: int) -> None:
        """Change a file's size; a device keeps its own."""
        if not self._device:
            os.ftruncate(self._fd, size)

    def zero_at(self, position: int, length: int, *, may_trim: bool) -> bool:
        """Punch a hole if that is allowed, else zero what stays allocated."""
        if self._device or not length:
            return not length
        if position + length > self.size:
            # Not by ftruncate: it would cut off what another thread has written meanwhile.
            self.write_at(b"\0", position + length - 1)
        if may_trim and self._try(PUNCH_HOLE, position, length):
            return True
        return self._try(ZERO_RANGE, position, length)

    def discard_at(self, position: int, length: int) -> None:
        """Punch a hole; devices keep their blocks."""
        if not self._device and length:
            self._try(PUNCH_HOLE, position, length)

    def _try(self, mode: int, position: int, length: int) -> bool:
        """Do a fallocate; False, from then on without asking, if the kernel does not know it."""
        return attempt(self._fd, mode, position, length, self._unsupported)

    def extents(self, position: int, length: int) -> Iterator[tuple[int, bool]]:
        """Ask the file system; devices, and those that cannot tell, have data everywhere."""
        end = position + length
        try:
            for count, is_data in data_and_holes(self._fd, position, end):
                position += count
                yield count, is_data
        except OSError:
            yield end - position, True

    def close(self) -> None:
        """Close the file."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _hint(error: OSError, path: Path, *, read_only: bool) -> str | None:
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return "check the path"
        case errno.EACCES | errno.EPERM | errno.EROFS | errno.ETXTBSY if (
            not read_only and os.access(path, os.R_OK)
        ):
            return "serve it with -r (--read-only)"
        case errno.EACCES | errno.EPERM:
            return "give the server's user the right to read it, or run it as root"
    return None
