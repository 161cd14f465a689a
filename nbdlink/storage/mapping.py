"""A file's pages, lent to the kernel: memory from which sockets are fed without a copy.

What `sendmsg` is given here it reads out of the page cache itself. If the page cannot be read,
because the disk fails or the file has been truncated, the system call fails with EFAULT or
sends less; Python code that touched such a byte would be killed by SIGBUS instead. So the views
are for system calls only, and never to be looked into.

The file is mapped in windows, and only the windows used last stay mapped. One mapping of all
of it would collect page tables for whatever was ever read: 2 GiB of them for a terabyte.
"""

from __future__ import annotations

import mmap
import struct
import threading
from typing import Final

_IN_MEMORY: Final = frozenset({0x01021994, 0x858458F6})
"""File systems that are nothing but page cache: tmpfs and ramfs (include/uapi/linux/magic.h)."""

_WINDOW: Final = 1 << 30
"""Bytes in a window; its page tables take 2 MiB at most."""
_WINDOWS: Final = 16
"""Windows that stay mapped."""


class FileMapping:
    """A range of an open file as memory. Safe to use from every thread."""

    def __init__(self, fd: int, start: int, size: int) -> None:
        """Prepare to map `size` bytes from `start` on; nothing is mapped yet."""
        self._fd = fd
        self._start = start
        self._end = start + size
        self._windows: dict[int, memoryview] = {}
        self._changing = threading.Lock()

    def view(self, offset: int, length: int) -> memoryview | None:
        """Lend the bytes of a range to a system call.

        Args:
            offset: bytes from the start of the range that is mapped.
            length: bytes.

        Returns:
            A read-only view, or None where two windows meet or nothing can be mapped.
        """
        position = self._start + offset
        number, inside = divmod(position, _WINDOW)
        if inside + length > _WINDOW:
            return None
        window = self._windows.get(number)
        if window is None:
            window = self._map(number)
            if window is None:
                return None
        return window[inside : inside + length]

    def _map(self, number: int) -> memoryview | None:
        begin = number * _WINDOW
        try:
            mapped = mmap.mmap(
                self._fd,
                min(_WINDOW, self._end - begin),
                flags=mmap.MAP_SHARED,
                prot=mmap.PROT_READ,
                offset=begin,
            )
        except (OSError, ValueError):  # no memory for it, or the file is shorter by now
            return None
        # If two threads map the same window, one mapping is dropped with its last view.
        with self._changing:
            while len(self._windows) >= _WINDOWS:
                del self._windows[next(iter(self._windows))]
            window = self._windows[number] = memoryview(mapped)
        return window

    def close(self) -> None:
        """Give the windows back; views that are still lent out keep theirs."""
        self._windows.clear()


def is_in_memory(fd: int) -> bool:
    """Tell whether an open file lies on a file system that has no disk behind it."""
    # Python's statvfs leaves the type out. It is the first number of struct statfs, which is
    # smaller than this buffer on every architecture.
    import ctypes

    answer = ctypes.create_string_buffer(512)
    if ctypes.CDLL(None).fstatfs(fd, answer) != 0:
        return False
    return struct.unpack_from("l", answer.raw)[0] in _IN_MEMORY
