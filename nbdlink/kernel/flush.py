"""Writing back what is unwritten, within a deadline, while keeping others off the device.

A flush to a silent server sleeps where no signal reaches it, and would not let the calling
process end. So a process of its own does it, that belongs to nobody: if it is late, it is left
behind and ends when its flush does. It opens the device exclusively, and keeps it so until it
is let go: as long as it does, nobody mounts the device or stacks another upon it.

This file is also that program, run by path as `python -I -S flush.py DEVICE [FLUSHED ...]`: at its
top it imports nothing but the standard library, and little of that. It tells the errno on stdout
and ends when its stdin does.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import sys

# For the type checker only: as a program this file must start without delay.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_BLKFLSBUF = 0x1261


class Guard:
    """A device that is flushed and kept from others; used in a `with` statement."""

    def __init__(
        self, path: str, seconds: float, progress: Callable[[], int], flushed: Sequence[str]
    ) -> None:
        """Claim the device at `path`, and flush.

        Args:
            path: the device.
            seconds: how long nothing may happen. A flush that writes goes on for as long as
                it takes: gigabytes may be waiting for a slow server.
            progress: gives a number that changes when something has been written.
            flushed: what to write back: each partition has a page cache of its own beside the
                whole device's. One that is gone by then has nothing unwritten.

        Raises:
            TimeoutError: nothing has been written for `seconds`.
            OSError: EBUSY if somebody has claimed the device, or what the flush gave.
        """
        import subprocess

        with subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, path, *flushed],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as starter:  # which ends at once; the `with` waits for it
            assert starter.stdin is not None
            assert starter.stdout is not None
            self._hold = os.dup(starter.stdin.fileno())
            os.set_inheritable(self._hold, False)
            answer = os.dup(starter.stdout.fileno())
        try:
            before = progress()
            # Not select.select, which takes no descriptor above 1023.
            poll = select.poll()
            poll.register(answer, select.POLLIN)
            while not poll.poll(seconds * 1000):
                now = progress()
                if now == before:
                    raise TimeoutError
                before = now
            number = int(os.read(answer, 32) or errno.EIO)
            if number:
                raise OSError(number, os.strerror(number))
        except BaseException:
            os.close(self._hold)
            raise
        finally:
            os.close(answer)

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._hold)


def _main(path: str, flushed: list[str]) -> None:
    if os.fork():
        return
    # Nobody's child and in nobody's session: who waits for those would wait for the flush.
    os.setsid()
    try:
        # Claims fail at once; the open itself waits while somebody reads the partition table.
        os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
        for each in flushed:
            _flush(each)
        number = 0
    except OSError as error:
        number = error.errno or errno.EIO
    os.write(1, b"%d\n" % number)
    os.close(1)
    if not number:
        os.read(0, 1)


def _flush(path: str) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
            return
        raise
    os.fsync(fd)
    fcntl.ioctl(fd, _BLKFLSBUF)
    os.close(fd)


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2:])
    os._exit(0)
