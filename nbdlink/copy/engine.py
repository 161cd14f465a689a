"""The copying: lanes, each a thread with many requests in flight.

How it works: a `Supply` cuts the source into segments, of data or of zeroes, and hands them out
in order. Every lane takes segments as long as it has buffers, begins to read them, writes what
has come, and waits for whichever of its oldest read and its oldest write is done first. So
reads and writes overlap, on the same thread, and a buffer is used again once the write from it
was acknowledged: nothing counts as copied before.

Memory: lanes * requests * request size, which is 4 MiB a lane unless told otherwise.
"""

from __future__ import annotations

import abc
import mmap
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from nbdlink.client.pipeline import Pending, wait_for_any
from nbdlink.copy.ends import DestinationLane, SourceLane
from nbdlink.copy.zeroes import runs
from nbdlink.protocol.chunks import Extent
from nbdlink.protocol.constants import AllocationFlag

DEFAULT_REQUESTS: Final = 8
DEFAULT_REQUEST_SIZE: Final = 512 * 1024
DEFAULT_SPARSE: Final = 4096

_ZERO_AT_A_TIME: Final = 128 * 1024 * 1024
"""Bytes of zeroes in one request: few requests, and still progress to be seen."""

_TICK: Final = 0.1
"""Seconds between two looks at the progress."""

_GRACE: Final = 1.0
"""Seconds that a thread has to end when another one has failed."""

Progress = Callable[[int], None]
"""Is told how many bytes of the source are dealt with."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """How to copy.

    Attributes:
        requests: in flight on each lane.
        request_size: bytes of data in each, at most.
        sparse: bytes of zeroes in a row that are not copied as data; 0 is never.
        allocate: whether holes of the source become data of the destination.
    """

    requests: int = DEFAULT_REQUESTS
    request_size: int = DEFAULT_REQUEST_SIZE
    sparse: int = DEFAULT_SPARSE
    allocate: bool = False


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of the source; `zero` says that it reads as zeroes."""

    offset: int
    length: int
    zero: bool


class Supply:
    """Hands out a source's segments in order, to any thread that asks.

    Attributes:
        end: bytes in a stream, once it has ended; else None.
        failure: what was reported first, or None.
    """

    def __init__(self, segments: Iterator[Segment]) -> None:
        self.end: int | None = None
        self.failure: BaseException | None = None
        self._segments = segments
        self._lock = threading.Lock()
        self._stopped = False

    def take(self) -> Segment | None:
        """Give the next segment, or None if there are no more."""
        with self._lock:
            return None if self._stopped else next(self._segments, None)

    def stop(self, failure: BaseException | None = None) -> None:
        """Give no more, because the source has ended or something failed."""
        # Not under the lock: whoever holds it may be waiting for a server's answer.
        self.failure = self.failure or failure
        self._stopped = True


def segments(
    extents: Iterator[Extent], size: int, *, alignment: int, length: int
) -> Iterator[Segment]:
    """Cut a source into segments.

    Args:
        extents: what is data in it and what is zeroes.
        size: bytes in it; what the extents leave out is data.
        alignment: of the edges between zeroes and data, so that both ends can take them.
        length: bytes of data in a segment, at most.
    """
    at = begin = 0  # data begins there that was not given out yet
    for extent in extents:
        end = at + extent.length
        if extent.flags & AllocationFlag.ZERO:
            # Zeroes become data at their edges, if it must be: never the other way.
            first = -(-at // alignment) * alignment
            last = end if end == size else end // alignment * alignment
            if first < last:
                yield from _cut(begin, first, length, False)
                yield from _cut(first, last, _ZERO_AT_A_TIME, True)
                begin = last
        at = end
    yield from _cut(begin, size, length, False)


def stream_segments(length: int) -> Iterator[Segment]:
    """Cut a stream, which ends when it ends."""
    at = 0
    while True:
        yield Segment(at, length, False)
        at += length


def _cut(begin: int, end: int, length: int, zero: bool) -> Iterator[Segment]:
    while begin < end:
        # Every segment but the first ends at a multiple of the length.
        part = min(length - begin % length, end - begin)
        yield Segment(begin, part, zero)
        begin += part


def buffers(count: int, size: int) -> list[memoryview]:
    """Give buffers that begin at a page, which makes the kernel's copies faster.

    They take up memory when they are first used.
    """
    memory = memoryview(mmap.mmap(-1, count * size))
    return [memory[at : at + size] for at in range(0, len(memory), size)]


class _Job:
    """A segment on its way, and its buffer."""

    __slots__ = ("buffer", "length", "offset", "reading", "view", "writing")

    def __init__(self, segment: Segment, buffer: memoryview | None) -> None:
        self.offset = segment.offset
        self.length = segment.length
        self.buffer = buffer
        self.view = None if buffer is None else buffer[: segment.length]
        self.reading: Pending | None = None
        self.writing: deque[Pending] = deque()


class Lane(abc.ABC):
    """One thread's part of the work on what a supply hands out.

    Attributes:
        done: bytes of the source that are dealt with.
        data: those of them that were data.
    """

    def __init__(self, supply: Supply) -> None:
        self.done = 0
        self.data = 0
        self._supply = supply

    def run(self) -> None:
        """Work until there is nothing left to take; a failure is told to the supply."""
        try:
            self._work()
        except BaseException as error:
            self._supply.stop(error)

    @abc.abstractmethod
    def _work(self) -> None:
        """Take segments and deal with them until there are no more."""

    def close(self) -> None:  # noqa: B027
        """Make the lane end soon, whatever it waits for. Between files nothing is waited for."""


class CopyLane(Lane):
    """Copies segments from a source to a destination."""

    def __init__(
        self, supply: Supply, source: SourceLane, destination: DestinationLane, tuning: Tuning
    ) -> None:
        super().__init__(supply)
        self._source = source
        self._destination = destination
        self._sparse = 0 if tuning.allocate else tuning.sparse
        self._requests = tuning.requests
        self._free = buffers(tuning.requests, tuning.request_size)
        self._reading: deque[_Job] = deque()
        self._writing: deque[_Job] = deque()

    def _work(self) -> None:
        while True:
            self._begin()
            heads = [queue[0] for queue in (self._reading, self._writing) if queue]
            if not heads:
                return
            waiting = [job.reading or job.writing[0] for job in heads]
            if len(waiting) == 1:
                waiting[0].wait()
            else:
                wait_for_any(*waiting)
            while self._reading and self._is_read(self._reading[0]):
                self._write(self._reading.popleft())
            while self._writing and self._is_written(self._writing[0]):
                self._finish(self._writing.popleft())

    def _begin(self) -> None:
        """Take segments as long as there are buffers for them."""
        while self._free and len(self._reading) + len(self._writing) < self._requests:
            segment = self._supply.take()
            if segment is None:
                return
            job = _Job(segment, None if segment.zero else self._free.pop())
            if job.view is not None:
                there = self._source.read(job.view, job.offset)
                if isinstance(there, Pending):
                    job.reading = there
                elif there < job.length:
                    self._end_of_stream(job, there)
            # In order, as streams want it: zeroes do not overtake data.
            if self._reading or job.reading:
                self._reading.append(job)
            else:
                self._write(job)

    def _end_of_stream(self, job: _Job, there: int) -> None:
        self._supply.stop()
        self._supply.end = job.offset + there
        assert job.view is not None
        job.length, job.view = there, job.view[:there]

    def _is_read(self, job: _Job) -> bool:
        if job.reading is None:
            return True
        if not job.reading.done:
            return False
        job.reading.wait()  # reports its failure
        job.reading = None
        return True

    def _is_written(self, job: _Job) -> bool:
        while job.writing and job.writing[0].done:
            job.writing.popleft().wait()
        return not job.writing

    def _write(self, job: _Job) -> None:
        destination = self._destination
        if job.view is None:
            job.writing.extend(destination.zero(job.offset, job.length))
        else:
            for begin, end, zero in runs(job.view, self._sparse):
                if zero:
                    job.writing.extend(destination.zero(job.offset + begin, end - begin))
                else:
                    self.data += end - begin
                    pending = destination.write(job.view[begin:end], job.offset + begin)
                    if pending is not None:
                        job.writing.append(pending)
        if job.writing:
            self._writing.append(job)
        else:
            self._finish(job)

    def _finish(self, job: _Job) -> None:
        self.done += job.length
        if job.buffer is not None:
            self._free.append(job.buffer)

    def close(self) -> None:
        """Close the connections, which ends every wait for them."""
        self._source.leave()
        self._destination.leave()


def run_lanes(lanes: Sequence[Lane], supply: Supply, progress: Progress | None = None) -> None:
    """Run every lane in a thread until all is done.

    Args:
        lanes: what to run.
        supply: what they take their work from.
        progress: is told every now and then, and at the end, how far they are.

    Raises:
        Exception: what a lane failed with first. All of them have ended by then, unless one
            hangs in a system call.
    """
    # A thread that sleeps in a pipe nobody writes to cannot be woken: it may not keep the
    # program from ending.
    threads = [threading.Thread(target=lane.run, daemon=True) for lane in lanes]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive() and not supply.failure:
                thread.join(_TICK)
                if progress:
                    progress(sum(lane.done for lane in lanes))
        if supply.failure:
            raise supply.failure
    except BaseException as error:
        supply.stop(error)
        for lane in lanes:
            lane.close()
        for thread in threads:
            thread.join(_GRACE)
        raise
