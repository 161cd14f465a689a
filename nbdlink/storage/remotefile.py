"""An image within an export of another server: what a format needs, done by requests.

An export cannot grow, as a block device cannot; an image that needs more has no room (ENOSPC).
Where requests have to be aligned, a write that is not reads the rest of its blocks and writes it
back, while nobody else writes there.

No lock keeps others from the image: whoever else is let in by that server must not change it.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

from nbdlink.protocol.constants import ALLOCATION_CONTEXT, AllocationFlag
from nbdlink.storage.imagefile import ImageFile
from nbdlink.storage.ranges import RangeLock
from nbdlink.storage.remote import RemoteStorage


class RemoteFile(ImageFile):
    """An export that an image lies in."""

    def __init__(self, storage: RemoteStorage, *, flushes: bool = True) -> None:
        """Take over a storage.

        Args:
            storage: the export.
            flushes: whether anything is made durable.
        """
        self.name = storage.name
        self.read_only = storage.read_only
        self._storage = storage
        self._flushes = flushes
        self._block = storage.minimum_block
        self._size = storage.size // self._block * self._block
        self._ranges = RangeLock()

    @property
    def size(self) -> int:
        """The export's size, as far as whole blocks go."""
        return self._size

    def _whole(self, position: int, end: int) -> tuple[int, int]:
        """Give the range of blocks that a range touches."""
        block = self._block
        return position // block * block, -(-end // block) * block

    def _hold(self, position: int, end: int, *, exclusive: bool) -> AbstractContextManager[None]:
        if self._block == 1 or position >= end:
            return nullcontext()
        last = (end - 1) // self._block
        return self._ranges.hold(position // self._block, last, exclusive=exclusive)

    def _check_room(self, end: int) -> None:
        if end > self._size:
            raise OSError(errno.ENOSPC, f"{self.name} cannot grow, and the image has to")

    def read_at(self, buffer: memoryview, position: int) -> None:
        """Fill `buffer`, with zeroes behind the end."""
        there = max(0, min(len(buffer), self._size - position))
        buffer[there:] = bytes(len(buffer) - there)
        if not there:
            return
        begin, end = self._whole(position, position + there)
        if (begin, end) == (position, position + there):
            self._storage.read_into(buffer[:there], position)
            return
        blocks = memoryview(bytearray(end - begin))
        self._storage.read_into(blocks, begin)
        buffer[:there] = blocks[position - begin : position - begin + there]

    def write_at(self, buffer: memoryview | bytes, position: int) -> None:
        """Write `buffer`; ENOSPC behind the end."""
        data = memoryview(buffer).cast("B")
        if not len(data):
            return
        stop = position + len(data)
        self._check_room(stop)
        begin, end = self._whole(position, stop)
        is_whole = (begin, end) == (position, stop)
        with self._hold(position, stop, exclusive=not is_whole):
            if not is_whole:
                blocks = memoryview(bytearray(end - begin))
                self._storage.read_into(blocks, begin)
                blocks[position - begin : stop - begin] = data
                data = blocks
            self._storage.write(data, begin, False)

    def flush(self) -> None:
        """Have the server flush."""
        if self._flushes:
            self._storage.flush()

    def truncate(self, size: int) -> None:
        """Do nothing: an export keeps its size."""

    def zero_at(self, position: int, length: int, *, may_trim: bool) -> bool:
        """Have the server zero whole blocks, if it can without being sent them."""
        stop = position + length
        if not self._storage.has_zeroes or (position, stop) != self._whole(position, stop):
            return False
        self._check_room(stop)
        with self._hold(position, stop, exclusive=False):
            self._storage.zero(position, length, may_trim=may_trim, fast=False, fua=False)
        return True

    def discard_at(self, position: int, length: int) -> None:
        """Pass the hint on, for the blocks that lie within."""
        block = self._block
        begin = -(-position // block) * block
        end = min(position + length, self._size) // block * block
        if begin < end:
            with self._hold(begin, end, exclusive=False):
                self._storage.trim(begin, end - begin, False)

    def extents(self, position: int, length: int) -> Iterator[tuple[int, bool]]:
        """Ask the server; what it says to be zeroes counts as a hole."""
        there = max(0, min(length, self._size - position))
        begin, end = self._whole(position, position + there)
        for count, flags in self._storage.extents(ALLOCATION_CONTEXT, begin, end - begin):
            stop = min(begin + count, position + there)
            if stop > position:
                yield stop - position, not flags & AllocationFlag.ZERO
                length -= stop - position
                position = stop
            begin += count
        if length:
            yield length, False

    def close(self) -> None:
        """Take leave of the server."""
        self._storage.close()

    def disown(self) -> None:
        """Say nothing to the server."""
        self._storage.disown()
