"""Who else uses an image: the locks of QEMU, taken and respected.

QEMU (block/file-posix.c) locks single bytes of an image with open file description locks, which
belong to the open file, not to the process: they live through fork and end with the last
descriptor. Byte 100 + n is locked by everybody who uses permission n, byte 200 + n by everybody
who does not share permission n with others. All locks are shared ones, so they never stand in
each other's way; a conflict is found by asking who has the counterpart. Both are taken first and
looked for afterwards, so that of two that come at once at least one sees the other.

What is used and shared is what qemu-nbd uses and shares. A raw image may be written by several,
as nothing but its bytes is shared: two of our servers, for as long as a device moves from one to
the other, or qemu-nbd. A guest does not share writing, so it keeps us out, and we it. An image
of a format is changed by one program only, and not read by others meanwhile, as its tables are
kept in memory. Not to share resizing is left out for raw images, which may grow here.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import fcntl
import os
import struct
from pathlib import Path
from typing import Final

from nbdlink.errors import StorageError

_USED: Final = 100
_NOT_SHARED: Final = 200

# fcntl(2); Python 3.11 has names for the last two only.
_GETLK: Final = getattr(fcntl, "F_OFD_GETLK", 36)
_SETLK: Final = getattr(fcntl, "F_OFD_SETLK", 37)
_FLOCK: Final = struct.Struct("hhqqi4x")  # struct flock with 64-bit offsets

_CANNOT: Final = frozenset(
    {errno.EINVAL, errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF}
)
"""How file systems and kernels say that they have no such locks. QEMU goes on without, too."""


class Permission(enum.IntFlag):
    """What one can do to an image, by QEMU's bits (include/block/block-common.h)."""

    CONSISTENT_READ = 1
    WRITE = 2
    WRITE_UNCHANGED = 4
    RESIZE = 8


_WORDS: Final = {
    Permission.CONSISTENT_READ: "reads",
    Permission.WRITE: "writes",
    Permission.WRITE_UNCHANGED: "writes",
    Permission.RESIZE: "resizes",
}


class Use(enum.Enum):
    """How an image is used: the permissions that are needed, and those that others may not have."""

    RAW_READ = (Permission.CONSISTENT_READ, Permission(0))
    RAW_WRITE = (Permission.CONSISTENT_READ | Permission.WRITE, Permission(0))
    FORMAT_READ = (Permission.CONSISTENT_READ, Permission.WRITE | Permission.RESIZE)
    FORMAT_WRITE = (
        Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE,
        Permission.WRITE | Permission.RESIZE,
    )


def lock(fd: int, path: str | os.PathLike[str], use: Use) -> None:
    """Say to others how an open file is used, until its last descriptor is closed.

    Where the file system knows no such locks nothing happens.

    Raises:
        StorageError: somebody uses it in a way that does not go with that.
    """
    needed, kept = use.value
    try:
        for permission in Permission:
            if permission in needed:
                _set(fd, _USED, permission)
            if permission in kept:
                _set(fd, _NOT_SHARED, permission)
        for permission in Permission:
            if permission in kept and _is_locked(fd, _USED, permission):
                raise _in_use(fd, path, f"{_WORDS[permission]} it")
            if permission in needed and _is_locked(fd, _NOT_SHARED, permission):
                words = {Permission.RESIZE: "does not let others resize it"}.get(
                    permission, "does not share it"
                )
                if permission is Permission.WRITE:
                    words = "does not let others write to it"
                raise _in_use(fd, path, words)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            # Not QEMU: its locks never stand in the way of each other.
            raise _in_use(fd, path, "has locked all of it") from None
        if error.errno not in _CANNOT:
            words = (error.strerror or str(error)).lower()
            raise StorageError(f"{path} cannot be locked: {words}") from None


def _place(base: int, permission: Permission) -> int:
    return base + permission.bit_length() - 1


def _set(fd: int, base: int, permission: Permission) -> None:
    place = _place(base, permission)
    fcntl.fcntl(fd, _SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, place, 1, 0))


def _is_locked(fd: int, base: int, permission: Permission) -> bool:
    place = _place(base, permission)
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, place, 1, 0)
    kind, *_ = _FLOCK.unpack(fcntl.fcntl(fd, _GETLK, asked))
    return bool(kind != fcntl.F_UNLCK)


def _in_use(fd: int, path: str | os.PathLike[str], does: str) -> StorageError:
    who = _holders(fd)
    named = f"{who}, which" if who else "another process, which"
    return StorageError(
        f"{path} is in use by {named} {does}: is a guest running?",
        hint="end it first; an image that is in use can be changed by nobody else",
    )


def _holders(fd: int) -> str:
    """Name the processes that hold such locks on the file, as far as we may know."""
    status = os.fstat(fd)
    inode = f":{status.st_ino} "
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        # This process may have it open a second time, for another export.
        mine = str(fd) if process.name == str(os.getpid()) else ""
        with contextlib.suppress(OSError):  # it has gone, or is not ours
            if _locks(process, status, inode, mine):
                name = (process / "comm").read_text().strip()
                found.append(f"{name} (process {process.name})")
    return " and ".join(sorted(found)[:3])


def _locks(process: Path, status: os.stat_result, inode: str, but: str) -> bool:
    for descriptor in (process / "fd").iterdir():
        if descriptor.name == but:
            continue
        with contextlib.suppress(OSError):
            if not os.path.samestat(descriptor.stat(), status):
                continue
            told = (process / "fdinfo" / descriptor.name).read_text()
            if any("OFDLCK" in line and inode in line for line in told.splitlines()):
                return True
    return False
