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

_SIGNS: Final = frozenset({errno.EIO, errno.ENOSPC, errno.EDQUOT})
"""How a failed write-back shows."""


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
        if error.errno in _SIGNS:
            self._memory[0] = error.errno
