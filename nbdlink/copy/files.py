"""Files, block devices and streams as ends of a copy."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from nbdlink.client.pipeline import Pending
from nbdlink.copy.ends import too_small
from nbdlink.copy.zeroes import ZEROES
from nbdlink.errors import StorageError
from nbdlink.protocol.chunks import Extent
from nbdlink.protocol.constants import DEFAULT_MAXIMUM_PAYLOAD, AllocationFlag
from nbdlink.storage.fallocate import (
    ALLOCATE,
    PUNCH_HOLE,
    UNSUPPORTED,
    ZERO_RANGE,
    fallocate,
)
from nbdlink.storage.locks import Use, lock
from nbdlink.storage.mirror.places import refuse_alone

_HOLE = AllocationFlag.HOLE | AllocationFlag.ZERO


class FileSource:
    """A file or a block device to read. It is its own lane: any thread may read anywhere."""

    lanes: int | None = None
    alignment = 1
    largest = DEFAULT_MAXIMUM_PAYLOAD

    def __init__(self, path: str, fd: int) -> None:
        """Take over `fd`."""
        self.name = path
        self.fd = fd
        # Devices have no size to be told by stat.
        self.bytes = os.lseek(fd, 0, os.SEEK_END)
        self.size: int | None = self.bytes
        self._has_holes = stat.S_ISREG(os.fstat(fd).st_mode)

    def open_lane(self) -> FileSource:
        """Give itself."""
        return self

    def extents(self) -> Iterator[Extent]:
        """Ask the file system where data is; a device is data all over.

        Raises:
            StorageError: the file has become smaller.
        """
        at = 0
        while at < self.bytes:
            data, hole = self._next_data(at)
            if data > at:
                yield Extent(data - at, _HOLE)
            if hole > data:
                yield Extent(hole - data, 0)
            at = hole

    def _next_data(self, at: int) -> tuple[int, int]:
        if not self._has_holes:
            return at, self.bytes
        try:
            data = os.lseek(self.fd, at, os.SEEK_DATA)
            return min(data, self.bytes), min(os.lseek(self.fd, data, os.SEEK_HOLE), self.bytes)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data up to the end, or the end came nearer
                if os.lseek(self.fd, 0, os.SEEK_END) < self.bytes:
                    raise self._shrunk() from None
                return self.bytes, self.bytes
            return at, self.bytes  # the file system cannot tell

    def read(self, view: memoryview, offset: int) -> Pending | int:
        """Read at once."""
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self.fd, [view[done:]], offset + done)
            except OSError as error:
                raise failed(self.name, "read", offset + done, error) from None
            if not count:
                raise self._shrunk()
            done += count
        return done

    def _shrunk(self) -> StorageError:
        # Asked of the file: of several threads the first to notice may read far behind its end.
        end = os.lseek(self.fd, 0, os.SEEK_END)
        return StorageError(
            f"{self.name} ends at {end} now; it had {self.bytes} bytes",
            hint="something else changes it; copy it when that has ended",
        )

    def forget(self) -> None:
        """Have what is read next come from the disk, as far as it is there already."""
        with contextlib.suppress(OSError):
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def leave(self) -> None:
        """Have nothing of a lane to let go."""

    def close(self) -> None:
        """Close the file."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)


class FileDestination:
    """A file or a block device to write."""

    lanes: int | None = None
    alignment = 1
    largest = DEFAULT_MAXIMUM_PAYLOAD

    def __init__(self, path: str, *, allocate: bool) -> None:
        """Open the file, or create it.

        Args:
            path: where it is.
            allocate: whether zeroes written take space.

        Raises:
            StorageError: it cannot be opened.
        """
        self.name = path
        self._allocate = allocate
        self.is_new = not Path(path).exists()
        flags = os.O_WRONLY | os.O_CLOEXEC
        if self.is_new:
            flags |= os.O_CREAT | os.O_EXCL
        else:
            refuse_alone(path)
            if stat.S_ISBLK(Path(path).stat().st_mode):
                flags |= os.O_EXCL  # the kernel refuses what is mounted
        try:
            self.fd = os.open(path, flags, 0o666)
        except OSError as error:
            raise _unopened(
                path, error, f"make its folder first: mkdir -p {Path(path).parent}"
            ) from None
        self.is_regular = stat.S_ISREG(os.fstat(self.fd).st_mode)
        self._lock = -1
        if self.is_regular and not self.is_new:
            try:
                self._keep_guests_away()
            except StorageError:
                self.close()
                raise
        self.size: int | None = None if self.is_new else os.lseek(self.fd, 0, os.SEEK_END)
        self._modes = [PUNCH_HOLE, ZERO_RANGE]
        if allocate:
            self._modes = [ALLOCATE] if self.is_new else [ZERO_RANGE]

    def prepare(self, size: int | None) -> None:
        """Give a new file its size; check that of an old one."""
        if size is None:
            return
        if self.size is None:
            try:
                os.ftruncate(self.fd, size)
            except OSError as error:
                raise failed(self.name, "made", size, error) from None
        elif self.size < size:
            hint = "choose a larger device"
            if self.is_regular:
                hint = f"remove it, or: truncate -s {size} {self.name}"
            raise too_small(self.name, self.size, size, hint)

    def open_lane(self) -> FileDestination:
        """Give itself."""
        return self

    def write(self, view: memoryview, offset: int) -> Pending | None:
        """Write at once."""
        done = 0
        try:
            while done < len(view):
                done += os.pwritev(self.fd, [view[done:]], offset + done)
        except OSError as error:
            raise failed(self.name, "written", offset + done, error) from None
        return None

    def zero(self, offset: int, length: int) -> Sequence[Pending]:
        """Make a hole at once, or write zeroes where that is not possible."""
        if self.is_new and not self._allocate:
            return ()
        # Of what reaches past a device's end the kernel makes a hole as far as there is one, and
        # says that it is done; a write says that there is no room.
        fits = self.is_regular or self.size is None or offset + length <= self.size
        for mode in tuple(self._modes) if fits else ():
            try:
                fallocate(self.fd, mode, offset, length)
            except OSError as error:
                # EINVAL: a device's blocks are larger than the range's edges.
                if error.errno in UNSUPPORTED:
                    if mode in self._modes:
                        self._modes.remove(mode)
                elif error.errno != errno.EINVAL:
                    raise failed(self.name, "written", offset, error) from None
            else:
                return ()
        for at in range(0, length, len(ZEROES)):
            self.write(ZEROES[: min(len(ZEROES), length - at)], offset + at)
        return ()

    def finish(self, size: int, *, flush: bool) -> None:
        """Give a stream's file its size, and bring all to the disk."""
        try:
            status = os.fstat(self.fd)
            # A stream may end in zeroes behind the end of the file, where a hole is nothing.
            if self.is_new or (stat.S_ISREG(status.st_mode) and status.st_size < size):
                os.ftruncate(self.fd, size)
            if flush:
                os.fsync(self.fd)
        except OSError as error:
            raise failed(self.name, "written", size, error) from None

    def leave(self) -> None:
        """Have nothing of a lane to let go."""

    def _keep_guests_away(self) -> None:
        """Say to QEMU, and to servers of images, that the file is being written.

        Raises:
            StorageError: somebody uses it who cannot bear that.
        """
        with contextlib.suppress(OSError):  # who may only write cannot say so
            # The locks take a file that is open for reading.
            self._lock = os.open(self.name, os.O_RDONLY | os.O_CLOEXEC)
            lock(self._lock, self.name, Use.RAW_WRITE)

    def close(self) -> None:
        """Close the file."""
        for fd in (self.fd, self._lock):
            if fd >= 0:
                os.close(fd)
        self.fd = self._lock = -1


class StreamSource:
    """A pipe, a socket or a terminal to read, in order and once."""

    lanes: int | None = 1
    alignment = 1
    largest = DEFAULT_MAXIMUM_PAYLOAD
    size: int | None = None

    def __init__(self, name: str, fd: int) -> None:
        """Use `fd`, and take it over unless it is one of the standard streams."""
        self.name = name
        self._fd = fd

    def open_lane(self) -> StreamSource:
        """Give itself."""
        return self

    def extents(self) -> Iterator[Extent]:
        """Know nothing."""
        return iter(())

    def read(self, view: memoryview, offset: int) -> Pending | int:
        """Read until `view` is full or the stream has ended."""
        done = 0
        try:
            while done < len(view):
                count = os.readv(self._fd, [view[done:]])
                if not count:
                    break
                done += count
        except OSError as error:
            raise failed(self.name, "read", offset + done, error) from None
        return done

    def leave(self) -> None:
        """Have nothing of a lane to let go."""

    def close(self) -> None:
        """Close what was opened here."""
        _close_stream(self._fd)
        self._fd = -1


class StreamDestination:
    """A pipe, a socket or a terminal to write, in order and once."""

    lanes: int | None = 1
    alignment = 1
    largest = DEFAULT_MAXIMUM_PAYLOAD
    size: int | None = None
    is_new = False

    def __init__(self, name: str, fd: int) -> None:
        """Use `fd`, and take it over unless it is one of the standard streams."""
        self.name = name
        self._fd = fd

    def prepare(self, size: int | None) -> None:
        """Take any number of bytes."""

    def open_lane(self) -> StreamDestination:
        """Give itself."""
        return self

    def write(self, view: memoryview, offset: int) -> Pending | None:
        """Write at once."""
        done = 0
        try:
            while done < len(view):
                done += os.write(self._fd, view[done:])
        except OSError as error:
            raise failed(self.name, "written", offset + done, error) from None
        return None

    def zero(self, offset: int, length: int) -> Sequence[Pending]:
        """Write zeroes."""
        for at in range(0, length, len(ZEROES)):
            self.write(ZEROES[: min(len(ZEROES), length - at)], offset + at)
        return ()

    def finish(self, size: int, *, flush: bool) -> None:
        """Have nothing to flush."""

    def leave(self) -> None:
        """Have nothing of a lane to let go."""

    def close(self) -> None:
        """Close what was opened here."""
        _close_stream(self._fd)
        self._fd = -1


def _unopened(path: str, error: OSError, missing: str) -> StorageError:
    """Say that a path cannot be opened; `missing` is the advice if it is not there."""
    advice = {
        errno.ENOENT: missing,
        errno.ENOTDIR: "check the path: a part of it is no folder",
        errno.EBUSY: "it is mounted or in use",
        errno.EACCES: "you may not open it; try as root",
        errno.EPERM: "you may not open it; try as root",
    }
    return StorageError(
        f"{path} cannot be opened: {(error.strerror or str(error)).lower()}",
        hint=advice.get(error.errno or 0),
    )


def open_source(path: str) -> FileSource | StreamSource:
    """Open a path to read; `-` is stdin.

    Raises:
        StorageError: it cannot be opened.
    """
    if path == "-":
        return _source_of("stdin", 0)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        is_path = "/" in path.removeprefix("./")
        missing = "check the path" if is_path else "an export is written as nbd://host/export"
        raise _unopened(path, error, missing) from None
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        os.close(fd)
        raise StorageError(f"{path} is a directory", hint="copy an image, not a folder")
    return _source_of(path, fd)


def _source_of(name: str, fd: int) -> FileSource | StreamSource:
    # stdin may be a file, too: `nbdlink copy - TARGET < disk.img` is as fast as by its name.
    mode = os.fstat(fd).st_mode
    if (stat.S_ISREG(mode) or stat.S_ISBLK(mode)) and os.lseek(fd, 0, os.SEEK_CUR) == 0:
        return FileSource(name, fd if name != "stdin" else os.dup(fd))
    return StreamSource(name, fd)


def open_destination(path: str, *, allocate: bool) -> FileDestination | StreamDestination:
    """Open a path to write, or create a file there; `-` is stdout.

    Raises:
        StorageError: it cannot be opened.
    """
    if path == "-":
        return StreamDestination("stdout", 1)
    try:
        mode = Path(path).stat().st_mode
    except OSError:
        return FileDestination(path, allocate=allocate)
    if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
        return FileDestination(path, allocate=allocate)
    if stat.S_ISDIR(mode):
        raise StorageError(f"{path} is a directory", hint="name a file in it")
    try:
        return StreamDestination(path, os.open(path, os.O_WRONLY | os.O_CLOEXEC))
    except OSError as error:
        raise StorageError(f"{path} cannot be opened: {(error.strerror or '').lower()}") from None


def _close_stream(fd: int) -> None:
    if fd > 2:  # else it belongs to the whole program
        os.close(fd)


def same_file(source: str, destination: str) -> bool:
    """Tell whether two paths lead to the same file or device."""
    try:
        a, b = Path(source).stat(), Path(destination).stat()
    except OSError:
        return False
    if stat.S_ISBLK(a.st_mode) and stat.S_ISBLK(b.st_mode):
        return a.st_rdev == b.st_rdev
    return os.path.samestat(a, b) and not stat.S_ISCHR(a.st_mode)


def failed(name: str, what: str, offset: int, error: OSError) -> StorageError:
    """Say that a file cannot be read or written, where, and why."""
    why = (error.strerror or str(error)).lower()
    hint = "make room there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else None
    return StorageError(f"{name} cannot be {what} at {offset}: {why}", hint=hint)
