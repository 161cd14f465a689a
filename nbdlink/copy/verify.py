"""Comparing two ends, byte by byte."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from nbdlink.client.pipeline import Pending
from nbdlink.copy.ends import SourceLane
from nbdlink.copy.engine import Lane, Segment, Supply, Tuning
from nbdlink.errors import StorageError
from nbdlink.protocol.chunks import Extent


class CompareLane(Lane):
    """Reads segments from both ends and compares them.

    Attributes:
        difference: the first offset, of those that this lane has seen, where they differ.
    """

    def __init__(self, supply: Supply, left: SourceLane, right: SourceLane, tuning: Tuning) -> None:
        super().__init__(supply)
        self.difference: int | None = None
        self._ends = (left, right)
        self._size = tuning.request_size
        self._most = max(1, tuning.requests // 2)

    def _work(self) -> None:
        # Bytearrays, which compare themselves by memcmp.
        free = [(bytearray(self._size), bytearray(self._size)) for _ in range(self._most)]
        under_way: deque[_Comparison] = deque()
        while True:
            while free and (segment := self._supply.take()):
                if segment.zero:
                    self.done += segment.length
                    continue
                under_way.append(_Comparison(segment, free.pop(), self._ends))
            if not under_way:
                return
            comparison = under_way.popleft()
            different = comparison.difference()
            if different is not None:
                # Segments come in order: what others have at hand may differ earlier.
                self._supply.stop()
                if self.difference is None or different < self.difference:
                    self.difference = different
            self.done += comparison.length
            self.data += comparison.length
            free.append(comparison.buffers)

    def close(self) -> None:
        """Close the connections, which ends every wait for them."""
        for end in self._ends:
            end.leave()


class _Comparison:
    """A segment that is being read from both ends."""

    def __init__(
        self,
        segment: Segment,
        buffers: tuple[bytearray, bytearray],
        ends: tuple[SourceLane, SourceLane],
    ) -> None:
        self.buffers = buffers
        self.length = segment.length
        self._offset = segment.offset
        if len(buffers[0]) != self.length:
            self.buffers = (bytearray(self.length), bytearray(self.length))
        self._reads = [
            end.read(memoryview(buffer), segment.offset)
            for end, buffer in zip(ends, self.buffers, strict=True)
        ]

    def difference(self) -> int | None:
        """Wait for the data; give the offset of the first byte that differs, or None."""
        for read in self._reads:
            if isinstance(read, Pending):
                read.wait()
        left, right = self.buffers
        if left == right:
            return None
        low, high = 0, self.length  # left[:low] is equal, left[:high] is not
        while high - low > 1:
            middle = (low + high) // 2
            if left[low:middle] == right[low:middle]:
                low = middle
            else:
                high = middle
        return self._offset + low


def both(left: Iterator[Extent], right: Iterator[Extent]) -> Iterator[Extent]:
    """Join the extents of two ends, up to the end of the shorter: what both say of a range."""
    a, b = next(left, None), next(right, None)
    while a and b:
        length = min(a.length, b.length)
        yield Extent(length, a.flags & b.flags)
        a = Extent(a.length - length, a.flags) if a.length > length else next(left, None)
        b = Extent(b.length - length, b.flags) if b.length > length else next(right, None)


def report(lanes: list[CompareLane], source: str, destination: str) -> None:
    """Say where the ends differ, if they do.

    Raises:
        StorageError: they differ.
    """
    found = [lane.difference for lane in lanes if lane.difference is not None]
    if found:
        raise StorageError(
            f"{destination} differs from {source} at offset {min(found)}",
            hint="copy again; if it differs again, one of the storages does not keep its data",
        )
