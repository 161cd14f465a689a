"""fallocate(2), which Python 3.11 does not offer: holes and zeroes without writing them.

Support differs by file system and by mode, and errno tells: EOPNOTSUPP. Block devices take
PUNCH_HOLE and ZERO_RANGE since Linux 4.9 (block/fops.c, `blkdev_fallocate`), where PUNCH_HOLE
zeroes by the device's own means or not at all, and ZERO_RANGE writes zeroes if it must.
"""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable
from typing import Final

ALLOCATE: Final = 0x00
KEEP_SIZE: Final = 0x01
PUNCH_HOLE: Final = 0x02 | KEEP_SIZE
"""The kernel takes a hole only together with "keep the file's size"."""
ZERO_RANGE: Final = 0x10

UNSUPPORTED: Final = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.ENODEV})
"""How kernels and file systems say that they do not know a mode."""


@functools.cache
def _libc() -> Callable[[int, int, int, int], int]:
    # Looked up at first use: ctypes takes longer to import than a short command may last.
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    # On 32-bit glibc only the 64-bit name takes large offsets; musl has only the plain one.
    function = getattr(libc, "fallocate64", None) or libc.fallocate
    function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    function.restype = ctypes.c_int

    def call(fd: int, mode: int, offset: int, length: int) -> int:
        return 0 if function(fd, mode, offset, length) == 0 else ctypes.get_errno()

    return call


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Change how a range of a file is allocated. Other threads run meanwhile.

    Args:
        fd: an open, writable file or block device.
        mode: one of this module's constants.
        offset: bytes.
        length: bytes, more than 0.

    Raises:
        OSError: the kernel refused; one of `UNSUPPORTED` if it does not know how.
    """
    while code := _libc()(fd, mode, offset, length):
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def attempt(fd: int, mode: int, position: int, length: int, unsupported: set[int]) -> bool:
    """Do it if the file system knows how; tell whether it does.

    Args:
        fd: the file.
        mode: one of the modes above.
        position: bytes from the file's start.
        length: bytes.
        unsupported: modes that are not tried any more; `mode` is added if it is not known.

    Raises:
        OSError: it was tried and failed.
    """
    if mode in unsupported:
        return False
    try:
        fallocate(fd, mode, position, length)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        unsupported.add(mode)
        return False
    return True
