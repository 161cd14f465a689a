"""Reading and writing without the page cache (O_DIRECT), for requests of any alignment.

The kernel then takes whole blocks only, from memory that is aligned as well. So every request
goes through a buffer of its own thread. Where a write begins or ends within a block, the rest of
that block is read first and written back. Meanwhile nobody else may write to the block: what it
had been given in between would be undone. Who writes whole blocks shares them with others who do
(`RangeLock`).

A file need not end with a whole block. What is behind the last one is written through the page
cache by a second descriptor; the kernel keeps the two in step, as long as nobody writes to the
same page without the cache at the very moment (mm/filemap.c, `generic_file_direct_write`). So
what is held are pages, or blocks if these are larger.

All that holds for one process, for all that it has of a file together: parts of it that are served
by themselves may begin and end within one block.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import threading
import weakref
from contextlib import AbstractContextManager
from typing import Final

from nbdlink.storage.ranges import RangeLock

_BUFFER: Final = 1 << 20
"""Bytes that go through a thread's buffer at a time."""
_BLOCKS: Final = (512, 1024, 2048, 4096, 16384, 65536)
"""Alignments that are tried, where nothing tells which it is."""

_ranges: Final[weakref.WeakValueDictionary[tuple[int, int], RangeLock]] = (
    weakref.WeakValueDictionary()
)
_ranges_lock: Final = threading.Lock()


def _ranges_of(fd: int) -> RangeLock:
    """Give what keeps order among all who have the same file, or block device, open here."""
    status = os.fstat(fd)
    is_device = stat.S_ISBLK(status.st_mode)
    key = (status.st_rdev, 0) if is_device else (status.st_dev, status.st_ino)
    with _ranges_lock:
        return _ranges.setdefault(key, RangeLock())


class AlignedFile:
    """An open file, or block device, that takes whole blocks only.

    Attributes:
        name: for messages.
        block: bytes that positions, lengths and memory are multiples of.
    """

    def __init__(self, name: str, fd: int, block: int, *, grows: bool, read_only: bool) -> None:
        """Use an open file, which stays the caller's.

        Args:
            name: for messages.
            fd: the file, opened with O_DIRECT.
            block: see the attribute.
            grows: whether it can end within a block, as files do, and devices do not.
            read_only: whether nothing will be written.
        """
        self.name = name
        self.block = block
        self._fd = fd
        self._grows = grows
        self._unit = max(block, mmap.PAGESIZE)
        self._ranges = _ranges_of(fd)
        self._buffers = threading.local()
        self._cached_fd = -1
        if grows and not read_only:
            # The same file, however it is called by now.
            self._cached_fd = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)

    def _buffer(self) -> memoryview:
        """Give this thread's buffer, which is aligned to a page and longer than any piece."""
        try:
            buffer: memoryview = self._buffers.memory
        except AttributeError:
            buffer = memoryview(mmap.mmap(-1, _BUFFER + 2 * _BLOCKS[-1]))
            self._buffers.memory = buffer
        return buffer

    def down(self, position: int) -> int:
        """Give the beginning of a block."""
        return position // self.block * self.block

    def up(self, position: int) -> int:
        """Give the beginning of the next block, or the position itself if it is one."""
        return -(-position // self.block) * self.block

    def hold(
        self, position: int, length: int, *, exclusive: bool = False
    ) -> AbstractContextManager[None]:
        """Keep others from changing a range; without `exclusive` they may as long as they do, too.

        Whoever holds a range must not write by this object.
        """
        return self._ranges.hold(
            position // self._unit, (position + length - 1) // self._unit, exclusive=exclusive
        )

    def read(self, buffer: memoryview, position: int) -> int:
        """Fill `buffer`; give how many bytes there were, fewer only at the end of the file."""
        bounce, total = self._buffer(), 0
        while buffer:
            begin = self.down(position)
            front = position - begin
            wanted = min(len(buffer), _BUFFER - front)
            end = self.up(position + wanted)
            found = self._read_blocks(bounce, begin, end) - front
            count = max(0, min(wanted, found))
            buffer[:count] = bounce[front : front + count]
            total += count
            if count < wanted:
                break
            buffer, position = buffer[count:], position + count
        return total

    def _read_blocks(self, bounce: memoryview, begin: int, end: int) -> int:
        """Read whole blocks; give how many bytes there were, fewer only at the end of the file."""
        done = 0
        while done < end - begin:
            count = os.preadv(self._fd, (bounce[done : end - begin],), begin + done)
            done += count
            if not count or done % self.block:
                break
        return done

    def write(self, buffer: memoryview, position: int, flags: int = 0) -> None:
        """Write the whole of `buffer`; a file grows if it must.

        Args:
            buffer: what to write.
            position: where.
            flags: those of pwritev2.
        """
        if not len(buffer):
            return
        end = position + len(buffer)
        aligned = not (position | end) % self.block
        with self.hold(position, len(buffer), exclusive=not aligned):
            whole = self._whole_blocks(end)
            if position < whole:
                count = min(end, whole) - position
                self._write_blocks(buffer[:count], position, flags)
                buffer, position = buffer[count:], position + count
            while buffer:
                count = os.pwritev(self._cached_fd, (buffer,), position, flags)
                if not count:
                    raise OSError(errno.EIO, f"{self.name} takes no more bytes")
                buffer, position = buffer[count:], position + count

    def _whole_blocks(self, end: int) -> int:
        """Give how far whole blocks may be written, for a write that goes on to `end`."""
        if not self._grows or not end % self.block:
            return end
        size = os.fstat(self._fd).st_size
        return self.up(end) if self.up(end) <= size else self.down(end)

    def _write_blocks(self, buffer: memoryview, position: int, flags: int) -> None:
        """Write what lies in whole blocks; the range is held."""
        bounce = self._buffer()
        while buffer:
            begin = self.down(position)
            front = position - begin
            count = min(len(buffer), _BUFFER - front)
            stop = front + count
            length = self.up(stop)
            if front:
                self._fetch(bounce, begin)
            if stop < length and (not front or length > self.block):
                back = length - self.block
                self._fetch(bounce[back:], begin + back)
            bounce[front:stop] = buffer[:count]
            done = 0
            while done < length:
                written = os.pwritev(self._fd, (bounce[done:length],), begin + done, flags)
                if not written or written % self.block:
                    raise OSError(errno.EIO, f"{self.name} takes no more bytes")
                done += written
            buffer, position = buffer[count:], position + count

    def _fetch(self, bounce: memoryview, begin: int) -> None:
        """Read one block; what is behind the end of the file is zeroes."""
        found = self._read_blocks(bounce, begin, begin + self.block)
        bounce[found : self.block] = bytes(self.block - found)

    def close(self) -> None:
        """Close what has been opened here."""
        fd, self._cached_fd = self._cached_fd, -1
        if fd >= 0:
            os.close(fd)


def block_size(fd: int) -> int:
    """Find out how reads of a file that was opened with O_DIRECT have to be aligned.

    Raises:
        OSError: EINVAL if no alignment does.
    """
    with mmap.mmap(-1, _BLOCKS[-1]) as memory, memoryview(memory) as view:
        for size in _BLOCKS:
            try:
                with view[:size] as part:
                    os.preadv(fd, (part,), 0)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            else:
                return size
    raise OSError(errno.EINVAL, "its file system takes no reads without the page cache")
