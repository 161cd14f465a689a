"""A file or a block device, served byte by byte as it is.

All connections share one open file, so they share the kernel's page cache too: what one has
written the others read, and one fdatasync covers them all. That is why `can_multi_conn` holds.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Final, Self

from nbdlink.errors import StorageError
from nbdlink.protocol.chunks import Extent
from nbdlink.protocol.constants import (
    ALLOCATION_CONTEXT,
    DEPTH_CONTEXT,
    MAX_EXPORT_SIZE,
    AllocationFlag,
)
from nbdlink.storage import blockdev
from nbdlink.storage.base import AtOnce, PlainFile, Storage
from nbdlink.storage.fallocate import (
    ALLOCATE,
    PUNCH_HOLE,
    UNSUPPORTED,
    ZERO_RANGE,
    attempt,
)
from nbdlink.storage.fingerprint import fingerprint
from nbdlink.storage.holes import data_and_holes
from nbdlink.storage.locks import Use, lock
from nbdlink.storage.lost import LostWrites, Witness
from nbdlink.storage.mapping import FileMapping, is_in_memory
from nbdlink.storage.window import bounds

_HOLE: Final = int(AllocationFlag.HOLE | AllocationFlag.ZERO)
_ZEROES: Final = memoryview(bytes(1 << 20))
_SPARSE = 1  # where it is in the shared page, behind what `LostWrites` has
_KINDS: Final = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
)


class RawStorage(Storage):
    """A regular file or block device, or a window of one. Made by `open`.

    Attributes:
        path: as it was given.
        start: bytes of the file before the window.
    """

    can_fast_zero = True
    can_cache = True
    may_fork = True
    contexts = (ALLOCATION_CONTEXT, DEPTH_CONTEXT)
    open_flags: ClassVar[int] = 0
    """What the file is opened with beside the usual."""

    def __init__(
        self,
        path: Path,
        fd: int,
        *,
        start: int,
        size: int,
        read_only: bool,
        device: bool,
        may_grow: bool = False,
    ) -> None:
        """Take over an open file; see `open`.

        Args:
            path: where it was found.
            fd: the file.
            start: bytes of it to leave out at the front.
            size: bytes to serve.
            read_only: whether it was opened for reading only.
            device: whether it is a block device.
            may_grow: whether all is to be served that it will ever have behind `start`.
        """
        self.path = path
        self.name = str(path)
        self.start = start
        self.size = size
        self.read_only = read_only
        self._fd = fd
        self._device = device
        self._may_grow = may_grow
        self._growing = threading.Lock()
        self._align = 1
        self._signature: str | None = None
        if not device and (mark := fingerprint(fd, start)):
            self._signature = f"auto:{mark}"
        # Shared by all processes that are forked from here: what must be known to each.
        self._shared = mmap.mmap(-1, mmap.PAGESIZE)
        self._unsupported: set[int] = set()
        self._dsync = os.RWF_DSYNC
        self._mapping = FileMapping(fd, start, size)
        self._in_memory = not device and is_in_memory(fd)
        status = os.fstat(fd)
        disk = status.st_rdev if device else status.st_dev
        self.is_rotational = blockdev.queue_setting(disk, "rotational") != 0
        if device:
            self._align, physical = blockdev.sector_sizes(fd)
            self.preferred_block = max(self.preferred_block, physical)
            self.can_trim = blockdev.queue_setting(disk, "discard_max_bytes") != 0
        elif not read_only:
            # A hole behind the end changes nothing, and tells whether holes can be made.
            # Behind the end of the largest possible file there is nothing to try it on (EFBIG).
            with contextlib.suppress(OSError):
                self.can_trim = self._try(PUNCH_HOLE, status.st_size, 1)
        # Block devices cannot tell where they have holes. The trial above made none.
        self.is_sparse = not device and status.st_blocks * 512 < status.st_size
        witness = None if read_only else Witness.of(fd)  # last: it would stay open on a failure
        self._lost = LostWrites(self.name, self._shared, witness=witness)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        offset: int = 0,
        size: int | None = None,
        read_only: bool = False,
        locking: bool = True,
    ) -> Self:
        """Open what is to be served.

        Args:
            path: of a regular file or block device.
            offset: bytes to leave out at the front.
            size: bytes to serve, or None for all that follow `offset`, now and once it grows.
            read_only: whether to open it for reading only.
            locking: whether to tell QEMU's programs that it is in use, and heed what they tell.

        Raises:
            StorageError: it cannot be opened, is something else, is too short, or is in use.
        """
        path = Path(path)
        try:
            _check_kind(path, path.stat().st_mode)
            # Not blocking, because it might have become a FIFO since; for files and block
            # devices that means nothing.
            mode = os.O_RDONLY if read_only else os.O_RDWR
            fd = os.open(path, mode | os.O_CLOEXEC | os.O_NONBLOCK | cls.open_flags)
        except OSError as error:
            raise cls.open_error(path, error, read_only=read_only) from None
        try:
            if locking:
                lock(fd, path, Use.RAW_READ if read_only else Use.RAW_WRITE)
            return cls._of(path, fd, offset, size, read_only=read_only)
        except OSError as error:
            os.close(fd)
            raise StorageError(f"{path}: {(error.strerror or str(error)).lower()}") from None
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def open_error(cls, path: Path, error: OSError, *, read_only: bool) -> StorageError:
        """Say why a file cannot be opened."""
        return _open_error(path, error, read_only=read_only)

    @classmethod
    def _of(cls, path: Path, fd: int, offset: int, size: int | None, *, read_only: bool) -> Self:
        os.set_blocking(fd, True)
        status = os.fstat(fd)
        _check_kind(path, status.st_mode)
        device = stat.S_ISBLK(status.st_mode)
        if device and not read_only and blockdev.is_read_only(fd):
            raise StorageError(
                f"{path}: the device is read-only", hint="serve it with -r (--read-only)"
            )
        whole = blockdev.size(fd) if device else status.st_size
        sector = blockdev.sector_sizes(fd)[0] if device else 1
        return cls(
            path,
            fd,
            start=offset,
            size=bounds(str(path), whole, offset, size, sector),
            read_only=read_only,
            device=device,
            may_grow=size is None,
        )

    @property
    def signature(self) -> str | None:
        """A word for the file; none for devices."""
        return self._signature

    # Growth.

    def notice_growth(self) -> None:
        """Look at the file's size.

        The range gets a new `FileMapping`: who goes on with the old one finds in it all that
        the old size covers.
        """
        if not self._may_grow:
            return
        try:
            if self._device:
                # Whoever is in the middle of reading or writing gives positions.
                whole, has_holes = blockdev.size(self._fd), False
            else:
                status = os.fstat(self._fd)
                whole, has_holes = status.st_size, status.st_blocks * 512 < status.st_size
        except OSError:  # the device has gone: requests will tell
            return
        if whole - self.start <= self.size:
            return
        with self._growing:
            granule = self._align if self._device else 1
            size = min(whole - self.start, MAX_EXPORT_SIZE) // granule * granule
            if size > self.size:
                self.is_sparse = self.is_sparse or has_holes
                self._mapping = FileMapping(self._fd, self.start, size)
                self.size = size

    # Reading and writing.

    @property
    def is_sparse(self) -> bool:
        """Whether there may be holes."""
        return self._shared[_SPARSE] != 0

    @is_sparse.setter
    def is_sparse(self, value: bool) -> None:
        self._shared[_SPARSE] = value

    @property
    def plain_file(self) -> PlainFile | None:
        """The file itself."""
        return PlainFile(self._fd, self.start, self._in_memory, self._mapping)

    @property
    def at_once(self) -> AtOnce | None:
        """Reads, for images that lie on this one."""
        if self.plain_file is None:
            return None
        return AtOnce(self._read_now, None, self._in_memory, self._mapping.nowait != 0)

    def _read_now(self, buffer: memoryview, offset: int) -> bool:
        try:
            flags = self._mapping.nowait
            return os.preadv(self._fd, (buffer,), self.start + offset, flags) == len(buffer)
        except OSError:
            return False

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer`; EIO where the file has been truncated below the export's size."""
        position = self.start + offset
        count = os.preadv(self._fd, (buffer,), position)
        missing = len(buffer) - count
        while missing:
            if not count:
                raise OSError(errno.EIO, f"{self.name} has become shorter than its export")
            position += count
            count = os.preadv(self._fd, (buffer[-missing:],), position)
            missing -= count

    def head(self, length: int) -> bytes:
        """Read the file's first bytes, be they served or not, as many as there are."""
        return os.pread(self._fd, length, 0)

    def write(self, buffer: memoryview, offset: int, fua: bool) -> None:
        """Write `buffer`."""
        if fua:
            self._write_through(buffer, self.start + offset)
        else:
            self._write(buffer, self.start + offset, 0)

    def _write(self, buffer: memoryview, position: int, flags: int) -> None:
        count = os.pwritev(self._fd, (buffer,), position, flags)
        missing = len(buffer) - count
        while missing:
            if not count:
                raise OSError(errno.EIO, f"{self.name} takes no more bytes")
            position += count
            count = os.pwritev(self._fd, (buffer[-missing:],), position, flags)
            missing -= count

    def _write_through(self, buffer: memoryview, position: int) -> None:
        if not self._dsync:
            self._write(buffer, position, 0)
            self._sync()
            return
        self._lost.check()
        try:
            self._write(buffer, position, self._dsync)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                self._dsync = 0  # this file system does not know RWF_DSYNC
                self._write_through(buffer, position)
                return
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                # Most likely there was no room, and nothing has been lost. A plain write says
                # the same again; if it does not, it was the write-back that failed.
                self._write(buffer, position, 0)
            self._lost.note(error)
            raise
        self._lost.certify()

    # Zeroes and holes.

    def zero(self, offset: int, length: int, *, may_trim: bool, fast: bool, fua: bool) -> None:
        """Zero a range, as a hole or without writing where that is possible."""
        if length:
            begin = self.start + offset
            end = begin + length
            # Devices zero whole sectors; the edges, less than two sectors, are written. They
            # come last: if the whole is too slow for `fast`, nothing may have changed.
            inner = -(-begin // self._align) * self._align
            outer = end // self._align * self._align
            if inner < outer:
                if not self._zero_range(inner, outer - inner, may_trim=may_trim, fast=fast):
                    if fast:
                        raise OSError(errno.ENOTSUP, f"{self.name}: no fast way to write zeroes")
                    self._write_zeroes(inner, outer)
                self._write_zeroes(begin, inner)
                self._write_zeroes(outer, end)
            else:
                self._write_zeroes(begin, end)
        if fua:
            self._sync()

    def _zero_range(self, position: int, length: int, *, may_trim: bool, fast: bool) -> bool:
        """Have the kernel zero a range; False if it has no way that is good enough."""
        if may_trim and self._try(PUNCH_HOLE, position, length):
            return True
        if self._device:
            # The kernel writes the zeroes itself if the device cannot.
            return not fast and self._try(ZERO_RANGE, position, length)
        if self._try(ZERO_RANGE, position, length):
            return True
        # tmpfs has holes and allocation, but not the two in one.
        return self._try(PUNCH_HOLE, position, length) and self._try(ALLOCATE, position, length)

    def _try(self, mode: int, position: int, length: int) -> bool:
        """Do a fallocate; False, from then on without asking, if the kernel does not know it."""
        if mode == PUNCH_HOLE and mode not in self._unsupported:
            self.is_sparse = not self._device  # whoever reads afterwards looks for the hole
        return attempt(self._fd, mode, position, length, self._unsupported)

    def _write_zeroes(self, position: int, end: int) -> None:
        while position < end:
            count = min(end - position, len(_ZEROES))
            self._write(_ZEROES[:count], position, 0)
            position += count

    def trim(self, offset: int, length: int, fua: bool) -> None:
        """Punch a hole, or discard on a device."""
        begin = self.start + offset
        inner = -(-begin // self._align) * self._align
        outer = (begin + length) // self._align * self._align
        if self.can_trim and inner < outer:
            if not self._device:
                self.can_trim = self._try(PUNCH_HOLE, inner, outer - inner)
            else:
                try:
                    blockdev.discard(self._fd, inner, outer - inner)
                except OSError as error:
                    if error.errno not in UNSUPPORTED:
                        raise
                    self.can_trim = False
        if fua:
            self._sync()

    def cache(self, offset: int, length: int) -> None:
        """Have the kernel read ahead; it takes as much as the disk's read-ahead allows."""
        if length:  # to the kernel 0 means "to the end"
            os.posix_fadvise(self._fd, self.start + offset, length, os.POSIX_FADV_WILLNEED)

    # Allocation.

    def extents(self, context: str, offset: int, length: int) -> Iterator[Extent]:
        """Tell data from holes as the file system does; on devices all is data."""
        if context == DEPTH_CONTEXT:
            yield Extent(length, 1)  # all of it comes from here, as with QEMU
            return
        if self._device:
            yield Extent(length, 0)
            return
        position = self.start + offset
        end = position + length
        try:
            for count, is_data in data_and_holes(self._fd, position, end):
                position += count
                if not is_data and position == end and os.fstat(self._fd).st_size < end:
                    raise OSError(errno.EIO, f"{self.name} has become shorter than its export")
                yield Extent(count, 0 if is_data else _HOLE)
        except OSError as error:
            if error.errno not in UNSUPPORTED and error.errno != errno.EINVAL:
                raise
            yield Extent(end - position, 0)  # this file system cannot tell

    # Durability.

    def flush(self) -> None:
        """Make all writes durable."""
        if not self.read_only:
            self._sync()

    def _sync(self) -> None:
        self._lost.check()
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            self._lost.note(error)
            raise
        # All connections share the open file, and processes too: a neighbour's flush may have
        # been told what belongs to both.
        self._lost.certify()

    def close(self) -> None:
        """Close the file."""
        self._mapping.close()
        self._lost.close()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def disown(self) -> None:
        """Close the file, which is all that there is."""
        self.close()


def _check_kind(path: Path, mode: int) -> None:
    for test, kind in _KINDS:
        if test(mode):
            raise StorageError(
                f"{path} is {kind}", hint="name a regular file or a block device to serve"
            )


def _open_error(path: Path, error: OSError, *, read_only: bool) -> StorageError:
    reason = (error.strerror or str(error)).lower()
    hint = None
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            hint = f"check the path, or create it: truncate -s 1G {path}"
        case errno.EACCES | errno.EPERM | errno.EROFS | errno.ETXTBSY if (
            not read_only and os.access(path, os.R_OK)
        ):
            return StorageError(
                f"{path} cannot be written: {reason}", hint="serve it with -r (--read-only)"
            )
        case errno.EACCES | errno.EPERM:
            hint = "give the server's user the right to read it, or run it as root"
        case errno.ENXIO | errno.ENOMEDIUM:
            hint = "is the device there, and a medium in it?"
    return StorageError(f"{path} cannot be opened: {reason}", hint=hint)
