"""What a block device says of itself, and how to discard on it.

Numbers are from `include/uapi/linux/fs.h`; those with a size in them differ only on
architectures that Debian does not have in 64 bits (alpha, mips, powerpc, sparc encode ioctls
otherwise), where BLKGETSIZE64 is avoided by seeking.
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path
from typing import Final

_BLKROGET: Final = 0x125E
_BLKSSZGET: Final = 0x1268
_BLKDISCARD: Final = 0x1277
_BLKPBSZGET: Final = 0x127B


def _ask(fd: int, request: int) -> int:
    return int(struct.unpack("I", fcntl.ioctl(fd, request, bytes(4)))[0])


def size(fd: int) -> int:
    """Give the device's size in bytes."""
    return os.lseek(fd, 0, os.SEEK_END)


def is_read_only(fd: int) -> bool:
    """Tell whether the device refuses writes, whatever its node's mode says."""
    return _ask(fd, _BLKROGET) != 0


def sector_sizes(fd: int) -> tuple[int, int]:
    """Give logical and physical sector size in bytes."""
    return _ask(fd, _BLKSSZGET), _ask(fd, _BLKPBSZGET)


def discard(fd: int, offset: int, length: int) -> None:
    """Tell the device that a range, aligned to logical sectors, is not needed any more.

    Raises:
        OSError: EOPNOTSUPP if the device cannot.
    """
    fcntl.ioctl(fd, _BLKDISCARD, struct.pack("QQ", offset, length))


def queue_setting(device: int, name: str) -> int:
    """Read a number from the request queue of the disk behind a device number.

    Gives 0 where there is none: tmpfs and network file systems have no disk, a partition's
    queue is its disk's.
    """
    where = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    for queue in (where / "queue", where / ".." / "queue"):
        try:
            return int((queue / name).read_text())
        except (OSError, ValueError):
            continue
    return 0
