"""What tells a file from another one that lies under the same name later.

It has to stay the same whatever restarts, and to change when somebody puts another file in the
file's place. Of what a file system says of a file:

  * The inode's number alone is given to another file once the first is gone; with the
    generation (FS_IOC_GETVERSION: ext4, XFS, Btrfs, F2FS) it is not. Where there is no
    generation the number may be made up anew with each mount (FAT, overlays), so it counts only
    together with that.
  * The time of birth (statx(2)) is never set again; most file systems have it.
  * The device's number changes with the order in which disks are found, the change time (ctime)
    with every write, and the modification time can be set: none of them is of use.

Device nodes are no files in this sense: what stands behind /dev/sdb next time nobody knows.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
from typing import Final

_GETVERSION: Final = 0x80007601 | struct.calcsize("l") << 16
"""FS_IOC_GETVERSION of include/uapi/linux/fs.h: _IOR('v', 1, long), which fills in an int."""

# statx(2), include/uapi/linux/stat.h.
_AT_EMPTY_PATH: Final = 0x1000
_STATX_BTIME: Final = 0x800
_STATX_SIZE: Final = 256
_MASK: Final = struct.Struct("I")  # at 0: which of the fields are filled in
_BTIME: Final = struct.Struct("qI")  # seconds and nanoseconds
_BTIME_AT: Final = 80


def fingerprint(fd: int, start: int) -> str | None:
    """Give a short word for an open regular file, or None if its file system knows too little.

    Args:
        fd: the file.
        start: bytes at its front that are not served: another window has other data.
    """
    traits = []
    if (generation := _generation(fd)) is not None:
        traits.append(f"inode {os.fstat(fd).st_ino} {generation}")
    if (birth := _birth(fd)) is not None:
        traits.append(f"birth {birth[0]} {birth[1]}")
    if not traits:
        return None
    if start:
        traits.append(f"start {start}")
    # Hashed, as how the server's disks are laid out is no business of its clients.
    return hashlib.blake2b("\n".join(traits).encode(), digest_size=16).hexdigest()


def _generation(fd: int) -> int | None:
    answer = bytearray(8)
    try:
        fcntl.ioctl(fd, _GETVERSION, answer)
    except OSError:
        return None
    generation: int = struct.unpack_from("I", answer)[0]
    return generation


def _birth(fd: int) -> tuple[int, int] | None:
    import ctypes

    answer = ctypes.create_string_buffer(_STATX_SIZE)
    statx = getattr(ctypes.CDLL(None), "statx", None)  # a C library may be without it
    if statx is None or statx(fd, b"", _AT_EMPTY_PATH, _STATX_BTIME, answer) != 0:
        return None
    if not _MASK.unpack_from(answer)[0] & _STATX_BTIME:
        return None
    seconds, nanoseconds = _BTIME.unpack_from(answer, _BTIME_AT)
    return (seconds, nanoseconds) if (seconds, nanoseconds) != (0, 0) else None
