"""Writes that are acknowledged before they are done, in bounded memory.

How it works. A write is copied, queued and acknowledged. A few threads do what is queued. Two
requests of which any byte is the same are done in the order in which they came: each waits for
those before it that it overlaps, and for nothing else. Zeroes, trims, writes with FUA and writes
that are longer than the memory are queued as well, to keep that order, but are done by whoever
asked for them, and acknowledged when they are done. A write over the very range of one that is
still queued, with nothing in between that overlaps, takes its place.

Reads are answered from below, with what is queued laid on top.

FLUSH, and everything with FUA, waits until all is done that was acknowledged before, on
whichever connection, and then makes durable what it is meant for. If a queued write fails, its
data is lost though the client was told that it was written. Therefore from then on, as with the
page cache (`RawStorage`), every flush and everything with FUA fails, until somebody has looked
and started the server again; and nothing is acknowledged early any more.

Reads of what is queued see what the client wrote; the failed write's data they see no more.

All that is known to one process only.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Final

from nbdlink.protocol.chunks import Extent
from nbdlink.storage.base import PlainFile, Storage
from nbdlink.storage.layer import Layer

_log = logging.getLogger("nbdlink.storage")

DEFAULT_MEMORY: Final = 32 << 20
"""Bytes that are held for writes, if nobody says how many."""
LEAST_MEMORY: Final = 1 << 20
_WORKERS: Final = 4
"""Threads that write."""
_SMALLEST: Final = 4096
"""Bytes that a write counts for at least, so that many tiny ones do not make the queue long."""
_BUCKET: Final = 18
"""Requests are looked up by pieces of so many bits: 256 KiB."""
_WIDE: Final = 64
"""A request in more buckets than that is looked at for each other one instead."""


class _Request:
    """One request that changes a range.

    Attributes:
        begin, end: the range.
        data: what to write; None if whoever asked for it does it.
        cost: bytes that it counts for in memory.
        waits: how many earlier requests it still has to wait for.
        followers: those that wait for it.
        begun: whether it is being done.
    """

    __slots__ = ("begin", "begun", "cost", "data", "end", "followers", "number", "waits")

    def __init__(self, number: int, begin: int, end: int, data: bytes | None, cost: int) -> None:
        self.number = number
        self.begin = begin
        self.end = end
        self.data = data
        self.cost = cost
        self.waits = 0
        self.followers: list[_Request] = []
        self.begun = False


class WriteBehind(Layer):
    """A storage whose writes are acknowledged early."""

    def __init__(self, below: Storage, memory: int = DEFAULT_MEMORY) -> None:
        """Lay it on a storage.

        Args:
            below: the storage.
            memory: bytes of data that may be acknowledged and not yet written. Who writes more
                waits, each in turn.
        """
        super().__init__(below)
        self.may_fork = False
        self.waits = True
        self._memory = memory
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)  # something was done
        self._work = threading.Condition(self._lock)  # something may be done
        self._number = 0
        self._held = 0
        self._turns: deque[object] = deque()  # who waits for memory
        self._late: OrderedDict[int, _Request] = OrderedDict()  # acknowledged, and not done
        self._ready: deque[_Request] = deque()  # of these: waiting for a thread only
        self._wide: dict[int, _Request] = {}
        self._buckets: dict[int, dict[int, _Request]] = {}  # by number, hence in order
        self._threads: list[threading.Thread] = []
        self._lost = 0  # errno of the first late write that failed
        self._closing = False

    @property
    def plain_file(self) -> PlainFile | None:
        """None: what is in the file need not be the newest."""
        return None

    # The queue. All of it is for those who hold the lock.

    def _places(self, begin: int, end: int) -> range:
        return range(begin >> _BUCKET, ((end - 1) >> _BUCKET) + 1)

    def _overlapping(self, begin: int, end: int) -> list[_Request]:
        """Give what is not done and touches a range, oldest first."""
        found = {
            number: request
            for number, request in self._wide.items()
            if request.begin < end and begin < request.end
        }
        places = self._places(begin, end)
        buckets = (
            self._buckets.values()
            if len(places) > len(self._buckets)
            else (self._buckets[place] for place in places if place in self._buckets)
        )
        for bucket in buckets:
            for number, request in bucket.items():
                if request.begin < end and begin < request.end:
                    found[number] = request
        return [found[number] for number in sorted(found)]

    def _enter(self, begin: int, end: int, data: bytes | None, cost: int) -> _Request:
        """Queue a request behind those that it overlaps."""
        self._number += 1
        request = _Request(self._number, begin, end, data, cost)
        for earlier in self._overlapping(begin, end):
            earlier.followers.append(request)
            request.waits += 1
        places = self._places(begin, end)
        if len(places) > _WIDE:
            self._wide[request.number] = request
        else:
            for place in places:
                self._buckets.setdefault(place, {})[request.number] = request
        return request

    def _finish(self, request: _Request) -> None:
        """Take note that a request is done, or has failed."""
        if self._wide.pop(request.number, None) is None:
            for place in self._places(request.begin, request.end):
                bucket = self._buckets[place]
                del bucket[request.number]
                if not bucket:
                    del self._buckets[place]
        for follower in request.followers:
            follower.waits -= 1
            if not follower.waits and follower.data is not None:
                self._ready.append(follower)
                self._work.notify()
        self._late.pop(request.number, None)
        self._held -= request.cost
        self._changed.notify_all()

    def _oldest(self) -> int:
        """Give the number of the oldest write that was acknowledged and is not done."""
        return next(iter(self._late), self._number + 1)

    def _wait_for_late(self) -> None:
        """Wait until all is done that has been acknowledged by now.

        Raises:
            OSError: some of it, or of what was acknowledged before, has been lost.
        """
        last = self._number
        self._changed.wait_for(lambda: self._oldest() > last)
        self._check_lost()

    def _check_lost(self) -> None:
        if self._lost:
            raise OSError(self._lost, f"{self.name}: earlier writes were lost")

    def _take_memory(self, cost: int) -> None:
        """Wait until there is memory, each in turn."""
        if self._turns or self._held + cost > self._memory:
            turn = object()
            self._turns.append(turn)
            self._changed.wait_for(
                lambda: self._turns[0] is turn and self._held + cost <= self._memory
            )
            self._turns.popleft()
            self._changed.notify_all()
        self._held += cost

    # Writing.

    def write(self, buffer: memoryview, offset: int, fua: bool) -> None:
        """Take the data and write it later; at once with FUA, or if writes have been lost."""
        length = len(buffer)
        cost = max(length, _SMALLEST)
        if fua or not length or cost > self._memory or self._lost or not self._has_threads():
            self._do(offset, length, fua, lambda: self.below.write(buffer, offset, fua))
            return
        data = bytes(buffer)
        with self._lock:
            self._take_memory(cost)
            if self._replace(offset, data):
                self._held -= cost
                self._changed.notify_all()
                return
            request = self._enter(offset, offset + length, data, cost)
            self._late[request.number] = request
            if not request.waits:
                self._ready.append(request)
                self._work.notify()

    def _replace(self, offset: int, data: bytes) -> bool:
        """Put data in the place of a queued write to the same range, if that is the newest there.

        Who has begun to wait for that one before waits for the new data too, which is harmless.
        """
        earlier = self._overlapping(offset, offset + len(data))
        if not earlier:
            return False
        newest = earlier[-1]
        if newest.begun or newest.data is None:
            return False
        if (newest.begin, newest.end) != (offset, offset + len(data)):
            return False
        newest.data = data
        return True

    def _do(self, offset: int, length: int, fua: bool, act: Callable[[], None]) -> None:
        """Do a request in this thread, after all that it overlaps; with FUA, after all."""
        if fua:
            # Before the range is kept: what comes later and overlaps waits for this one.
            with self._lock:
                self._wait_for_late()
        with self._exclusion(offset, length):
            act()
        if fua:
            with self._lock:
                self._check_lost()

    @contextlib.contextmanager
    def _exclusion(self, offset: int, length: int) -> Iterator[None]:
        """Keep a range for this thread, once all that is queued for it is done."""
        if not length:
            yield
            return
        with self._lock:
            request = self._enter(offset, offset + length, None, 0)
            self._changed.wait_for(lambda: not request.waits)
        try:
            yield
        finally:
            with self._lock:
                self._finish(request)

    def zero(self, offset: int, length: int, *, may_trim: bool, fast: bool, fua: bool) -> None:
        """Zero, behind what is queued for the range."""

        def act() -> None:
            self.below.zero(offset, length, may_trim=may_trim, fast=fast, fua=fua)

        self._do(offset, length, fua, act)

    def trim(self, offset: int, length: int, fua: bool) -> None:
        """Trim, behind what is queued for the range."""
        self._do(offset, length, fua, lambda: self.below.trim(offset, length, fua))

    # The threads.

    def _has_threads(self) -> bool:
        """Tell whether there is anybody to write later; begin with the first write."""
        if self._threads:
            return True
        with self._lock, contextlib.suppress(RuntimeError):  # the system has no more
            while len(self._threads) < _WORKERS:
                thread = threading.Thread(
                    target=self._write_late, name="nbd-write-behind", daemon=True
                )
                thread.start()
                self._threads.append(thread)
        return bool(self._threads)

    def _write_late(self) -> None:
        while True:
            with self._lock:
                self._work.wait_for(lambda: self._ready or self._closing)
                if not self._ready:
                    return
                request = self._ready.popleft()
                request.begun = True
                data = request.data
            assert data is not None
            lost = 0
            try:
                self.below.write(memoryview(data), request.begin, False)
            except OSError as error:
                lost = error.errno or errno.EIO
                words = error.strerror or str(error)
            except Exception as error:  # a storage's bug must not leave everybody waiting
                lost, words = errno.EIO, f"unexpected {type(error).__name__}: {error}"
            if lost:
                _log.error(
                    "%s: %d bytes at %d that were acknowledged could not be written: %s; "
                    "flushes will fail from now on",
                    self.name,
                    len(data),
                    request.begin,
                    words,
                )
            with self._lock:
                self._lost = self._lost or lost
                self._finish(request)

    # Reading.

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Read from below, and lay on top what is queued."""
        end = offset + len(buffer)
        with self._lock:
            queued = [
                (request.begin, request.data)
                for request in self._overlapping(offset, end)
                if request.data is not None
            ]
        # Looked at before reading: what is done meanwhile is then read twice, and never missed.
        if not any(begin <= offset and end <= begin + len(data) for begin, data in queued):
            self.below.read_into(buffer, offset)
        for begin, data in queued:
            first, last = max(begin, offset), min(begin + len(data), end)
            buffer[first - offset : last - offset] = data[first - begin : last - begin]

    def extents(self, context: str, offset: int, length: int) -> Iterator[Extent]:
        """Tell what the storage below tells once what is queued for the range is written."""
        with self._exclusion(offset, length):
            pass
        yield from self.below.extents(context, offset, length)

    # Durability.

    def flush(self) -> None:
        """Make durable whatever has been acknowledged before."""
        with self._lock:
            self._wait_for_late()
        self.below.flush()
        with self._lock:
            self._check_lost()

    def close(self) -> None:
        """Write what is left, and close the storage below."""
        with self._lock:
            self._changed.wait_for(lambda: not self._late)
            self._closing = True
            self._work.notify_all()
        for thread in self._threads:
            thread.join()
        self.below.close()
        self._check_lost()
