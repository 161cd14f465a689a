"""What has to be remembered of a flush that failed.

The kernel tells a failed write-back once for each open file and then counts the pages as clean
(Documentation/filesystems/vfs.rst, "Handling errors during writeback"). Whoever is told must not
be the only one: from then on every flush fails, until somebody has looked and opens the file
again.

Who is told cannot say so at the same moment: its thread may wait for the interpreter for
milliseconds, in which a neighbour's flush of the same open file succeeds, and would acknowledge
what is lost. So each process has a witness, the file opened once more, which the kernel tells on
its own account. After every flush that has succeeded the witness is asked, by one thread at a
time, and what it says is noted before the next one's turn.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import mmap
import os
import threading
import weakref
from collections.abc import Callable
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


_WAIT_BEFORE: Final = 1
"""SYNC_FILE_RANGE_WAIT_BEFORE: to wait for what is being written, and to be told what failed."""
_BEHIND: Final = 1 << 62
"""Where no file has pages, so that there is nothing to wait for."""


class LostWrites:
    """Whether writes of a storage that were answered have been lost."""

    def __init__(
        self, name: str, memory: mmap.mmap | None = None, *, witness: Witness | None = None
    ) -> None:
        """Begin with nothing lost.

        Args:
            name: of the storage, for messages.
            memory: whose first byte is for this; shared memory for what processes share.
            witness: of the file, which is closed with this; None if there is no file.
        """
        self._name = name
        self._memory: mmap.mmap | bytearray = bytearray(1) if memory is None else memory
        self._witness = witness

    def check(self) -> None:
        """Refuse to call anything durable once something was lost.

        Raises:
            OSError: something was, with the errno of then.
        """
        if number := self._memory[0]:
            raise OSError(number, f"{self._name}: earlier writes were lost")

    def certify(self) -> None:
        """Refuse as `check` does, behind a call that has made writes durable, or says so."""
        if self._witness is not None:
            self._witness.ask(self.note)
        self.check()

    def note(self, error: OSError) -> None:
        """Take an error of something that should have made writes durable."""
        if error.errno not in _NO_LOSS:
            number = error.errno or errno.EIO
            # NFS lets numbers of the kernel's own slip out, which are above 511.
            self._memory[0] = number if number < 256 else errno.EIO

    def close(self) -> None:
        """Close the witness."""
        if self._witness is not None:
            self._witness.close()


class Witness:
    """A file that was opened once more, to be told of failed write-back. Made by `of`."""

    def __init__(self, file: int, fd: int) -> None:
        """Take over `fd`, which is another opening of `file`; see `of`."""
        self._file = file
        self._fd = fd
        self._lock = threading.Lock()
        _witnesses.add(self)

    @classmethod
    def of(cls, file: int) -> Witness | None:
        """Open a file once more; None if that cannot be, and then its flushes are all there is.

        Nothing may have been written to the file yet.
        """
        fd = -1 if _sync_file_range() is None else _reopened(file)
        return None if fd < 0 else cls(file, fd)

    def ask(self, note: Callable[[OSError], None]) -> None:
        """Have `note` called if a write-back has failed since the last time; in any thread."""
        call = _sync_file_range()
        assert call is not None
        with self._lock:
            if self._fd >= 0 and (number := call(self._fd)):
                note(OSError(number, os.strerror(number)))

    def reopen(self) -> None:
        """Have an opening of its own in a process that was forked off."""
        self._lock = threading.Lock()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = _reopened(self._file)

    def __del__(self) -> None:
        """Close it, if whoever wanted it has failed to open what it is for."""
        self.close()

    def close(self) -> None:
        """Close it."""
        with self._lock:
            fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


_witnesses: Final[weakref.WeakSet[Witness]] = weakref.WeakSet()


def _reopen_all() -> None:
    for witness in _witnesses:
        witness.reopen()


os.register_at_fork(after_in_child=_reopen_all)


def _reopened(file: int) -> int:
    with contextlib.suppress(OSError):
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
        return os.open(f"/proc/self/fd/{file}", flags)
    return -1


@functools.cache
def _sync_file_range() -> Callable[[int], int] | None:
    """Give what asks the kernel about an open file: for an errno, or 0. It waits for nothing.

    None if the C library has no such call.
    """
    # Looked up at first use: ctypes takes longer to import than a short command may last.
    import ctypes

    # The interpreter's lock is kept: to give it away and get it back may take milliseconds.
    call = getattr(ctypes.PyDLL(None, use_errno=True), "sync_file_range", None)
    if call is None:
        return None
    call.argtypes = ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint

    def ask(fd: int) -> int:
        return ctypes.get_errno() if call(fd, _BEHIND, 1, _WAIT_BEFORE) else 0

    return ask
