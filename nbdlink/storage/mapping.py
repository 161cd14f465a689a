"""A file's pages, lent to the kernel: memory from which sockets are fed without a copy.

What `sendmsg` is given here it reads out of the page cache itself. If the page cannot be read,
because the disk fails or the file has been truncated, the system call fails with EFAULT or
sends less; Python code that touched such a byte would be killed by SIGBUS instead. So the views
are for system calls only, and never to be looked into.

A page that is not in the page cache would have to be waited for in the middle of a send. Whether
it is there is asked with a read of one byte that does not wait, and remembered for half a minute
(`seen`): that read costs half of what sending four kilobytes does.

Two more things a reader of this code should know. The page tables of what has been read stay,
8 bytes for 4096, until the window is unmapped; so only so much is mapped at a time. A stream of
reads takes its windows along; reads all over a larger file find many of them unmapped, and are
copied, as mapping anew for each would cost more. And a read fault in a hole of a tmpfs file
allocates a page, which no read would do; so the server lends no holes there.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
import time
from typing import Final, NamedTuple

PAGE: Final = mmap.PAGESIZE
"""Bytes; `FileMapping.seen` has one entry for each so many."""

_WINDOW: Final = 4 << 30
"""Bytes that are mapped at once."""
_WINDOWS: Final = 16
"""Windows of a file; their page tables can grow to 128 MiB, if 64 GiB were read."""
_TURN: Final = 1.0
"""Seconds that pass before another window makes room for a new one."""
_SEEN: Final = 1 << 30
"""Pages of the largest file of which is remembered what was seen (4 TiB)."""
_NORESERVE: Final = 0x4000  # MAP_NORESERVE, which Python 3.11 has no name for

_IN_MEMORY: Final = frozenset({0x01021994, 0x858458F6})
"""File systems that are nothing but page cache: tmpfs and ramfs (include/uapi/linux/magic.h)."""


class Window(NamedTuple):
    """A part of the storage as memory.

    Attributes:
        pages: the bytes, for system calls only.
        first: offset in the storage of the first one.
        last: offset of the first byte behind.
    """

    pages: memoryview
    first: int
    last: int


NO_WINDOW: Final = Window(memoryview(b""), 0, 0)


class FileMapping:
    """A range of an open file as memory. Safe to use from every thread.

    Attributes:
        nowait: the flag of reads that do not wait (RWF_NOWAIT), or 0 if the file system does
            not know it.
        seen: when a page of the file was last found in the page cache, as a `tick`; or None.
            It is indexed by the page's number in the file, not in the range.
    """

    def __init__(self, fd: int, start: int, size: int) -> None:
        """Prepare to map `size` bytes from `start` on; nothing is mapped yet."""
        self._fd = fd
        self._start = start
        self._end = start + size
        self.nowait = nowait_flag(fd)
        self._windows: dict[int, Window] = {}
        self._lock = threading.Lock()
        self._next_turn = 0.0
        self._probe = (bytearray(1),)  # what is read into it nobody looks at
        pages = self._end // PAGE + 1
        self.seen: mmap.mmap | None = None
        if pages <= _SEEN:
            # Takes memory only where something has been seen.
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
            self.seen = mmap.mmap(-1, pages, flags)

    def window(self, offset: int) -> Window:
        """Give the window that an offset of the range lies in, or `NO_WINDOW` if there is none.

        It may be used until `close`.
        """
        number = (self._start + offset) // _WINDOW
        return self._windows.get(number) or self._open(number)

    def _open(self, number: int) -> Window:
        with self._lock:
            if len(self._windows) >= _WINDOWS:
                now = time.monotonic()
                if now < self._next_turn:
                    return NO_WINDOW
                self._next_turn = now + _TURN
                del self._windows[next(iter(self._windows))]  # the oldest
            window = self._map(number)
            if window is not NO_WINDOW:
                self._windows[number] = window
            return window

    def _map(self, number: int) -> Window:
        begin = number * _WINDOW
        end = min(begin + _WINDOW, self._end)
        try:
            flags, prot = mmap.MAP_SHARED, mmap.PROT_READ
            mapped = mmap.mmap(self._fd, end - begin, flags=flags, prot=prot, offset=begin)
        except (OSError, ValueError):  # no memory for it, or the file is shorter by now
            return NO_WINDOW
        before = max(0, self._start - begin)  # what lies in front of the range
        pages = memoryview(mapped)[before:]
        return Window(pages, begin + before - self._start, end - self._start)

    def is_cached(self, offset: int, length: int, tick: int) -> bool:
        """Tell whether a range is in the page cache, as far as its ends tell.

        As the kernel reads ahead, what lies between is there as a rule. Without `nowait` this
        waits for the disk, and is true then.

        Args:
            offset: bytes from the start of the range.
            length: bytes, more than 0.
            tick: the present time for `seen`.
        """
        position = self._start + offset
        front, back = position // PAGE, (position + length - 1) // PAGE
        seen = self.seen
        if seen is not None and seen[front] == tick == seen[back]:
            return True
        try:
            for page in (front, back) if front != back else (front,):
                if not os.preadv(self._fd, self._probe, page * PAGE, self.nowait):
                    return False
        except OSError:
            return False
        if seen is not None:
            seen[front] = seen[back] = tick
        return True

    def close(self) -> None:
        """Give the windows back; views that are still lent out keep theirs."""
        self._windows.clear()


def nowait_flag(fd: int) -> int:
    """Give the flag of reads of a file that do not wait, or 0 if its file system has none."""
    try:
        os.preadv(fd, (bytearray(1),), 0, os.RWF_NOWAIT)
    except BlockingIOError:
        pass
    except OSError:
        return 0
    return os.RWF_NOWAIT


def is_in_memory(fd: int) -> bool:
    """Tell whether an open file lies on a file system that has no disk behind it."""
    # Python's statvfs leaves the type out. It is the first number of struct statfs, which is
    # smaller than this buffer on every architecture.
    import ctypes

    answer = ctypes.create_string_buffer(512)
    if ctypes.CDLL(None).fstatfs(fd, answer) != 0:
        return False
    return struct.unpack_from("l", answer.raw)[0] in _IN_MEMORY
