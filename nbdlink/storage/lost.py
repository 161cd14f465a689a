"""What has to be remembered of a flush that failed.

The kernel tells a failed write-back once for each open file and then counts the pages as clean
(Documentation/filesystems/vfs.rst, "Handling errors during writeback"). Whoever is told must not
be the only one: from then on every flush fails, until somebody has looked and opens the file
again.
"""

from __future__ import annotations

import errno
import mmap
from typing import Final

_NO_LOSS: Final = frozenset(
    {
        errno.EAGAIN,
        errno.EBADF,
        errno.EFAULT,
        errno.EFBIG,
        errno.EINTR,
        errno.EINVAL,
        errno.ENOMEM,
        errno.ENOSYS,
        errno.EOPNOTSUPP,
        errno.EPERM,
        errno.ESHUTDOWN,
    }
)
"""What is refused before anything is written, or is tried again by the kernel.

Anything else may be a failed write-back. File systems pass on what the disk said: ENODATA of a
medium, ETIMEDOUT, EREMOTEIO, ENOLINK of a path to it (`blk_errors` in block/blk-core.c), and those
on a network or in userspace what a server said.
"""


class LostWrites:
    """Whether writes of a storage that were answered have been lost."""

    def __init__(self, name: str, memory: mmap.mmap | None = None) -> None:
        """Begin with nothing lost.

        Args:
            name: of the storage, for messages.
            memory: whose first byte is for this; shared memory for what processes share.
        """
        self._name = name
        self._memory: mmap.mmap | bytearray = bytearray(1) if memory is None else memory

    def check(self) -> None:
        """Refuse to call anything durable once something was lost.

        Raises:
            OSError: something was, with the errno of then.
        """
        if number := self._memory[0]:
            raise OSError(number, f"{self._name}: earlier writes were lost")

    def note(self, error: OSError) -> None:
        """Take an error of something that should have made writes durable."""
        if error.errno not in _NO_LOSS:
            self._memory[0] = error.errno or errno.EIO
