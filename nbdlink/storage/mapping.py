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
from typing import Final

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
        # The interpreter lock makes each step whole. If two threads map the same window, one
        # mapping is dropped with its last view.
        while len(self._windows) >= _WINDOWS:
            self._windows.pop(next(iter(self._windows)), None)
        window = self._windows[number] = memoryview(mapped)
        return window

    def close(self) -> None:
        """Give the windows back; views that are still lent out keep theirs."""
        self._windows.clear()
