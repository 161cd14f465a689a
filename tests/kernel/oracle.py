"""A writer that knows what a disk has to contain, whatever happens to its connections.

Several threads write extents of a small area past the page cache, again and again, so that every
block is soon overwritten. A block says its number and that of the write that it comes from. Of a
block there is one request at a time, so it is known exactly what it has to contain as soon as a
write has been acknowledged: that write, until the next one. A write that is lost, or one that
comes back from the dead over a newer one, shows at the next look; and every other request is a
look.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import struct
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from .conftest import PATIENCE, until

BLOCK = 4096
BLOCKS = 96
LONGEST = 8
"""Blocks of one request."""
SIZE = BLOCK * BLOCKS
_STAMP = struct.Struct(">QQ")


def stamped(block: int, write: int) -> bytes:
    """Give what a block contains after a write; 0 for one that never was written."""
    return bytes(BLOCK) if not write else _STAMP.pack(block, write) * (BLOCK // _STAMP.size)


def told(block: int, data: bytes) -> str:
    """Say what a block contains, for people."""
    number, write = _STAMP.unpack_from(data)
    if data == stamped(number, write):
        return f"write {write}" if number == block or not write else f"block {number}"
    return f"a mixture that begins with write {write}"


@dataclass
class _Writer:
    """What one thread has done: requests begun and ended."""

    begun: int = 0
    ended: int = 0


@dataclass
class Oracle:
    """Writes and reads until it is stopped, and knows what is right.

    Attributes:
        path: the device.
        may_fail: whether a request may fail; else the first failure is the end.
        failed: what requests have failed with.
        wrong: what was not as it should be.
        slowest: seconds that the slowest request took.
    """

    path: str
    writers: int = 6
    seed: int = 1
    may_fail: bool = False
    failed: list[OSError] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    slowest: float = 0.0

    def __post_init__(self):
        self._lock = threading.Condition()
        self._busy: set[int] = set()
        # A write that failed may have been carried out, so then there are several answers.
        self._right: list[set[int]] = [{0} for _ in range(BLOCKS)]
        self._writes = 0
        self._stopping = False
        self._states = [_Writer() for _ in range(self.writers)]
        self._threads = [
            threading.Thread(target=self._run, args=(number,), daemon=True)
            for number in range(self.writers)
        ]

    @property
    def requests(self) -> int:
        """How many have ended."""
        return sum(state.ended for state in self._states)

    def start(self):
        for thread in self._threads:
            thread.start()
        return self

    def moves_on(self, requests: int = 10):
        """Wait until every thread has had answers to requests that it began after now."""
        with self._lock:
            goals = [state.begun + requests for state in self._states]
            pairs = list(zip(self._states, goals, strict=True))
            done = self._lock.wait_for(
                lambda: self.trouble() or all(state.ended >= goal for state, goal in pairs),
                PATIENCE,
            )
        assert not self.trouble(), self.trouble()
        assert done, f"requests have been waiting for {PATIENCE:g} s"

    def fails(self):
        """Wait for a request that fails."""
        until(lambda: self.failed or self.wrong)

    def trouble(self) -> str | None:
        """Say what is wrong, if anything is."""
        if self.wrong:
            return "; ".join(self.wrong[:5])
        if self.failed and not self.may_fail:
            return f"a request failed: {self.failed[0]}"
        return None

    def stopping(self):
        """Have the threads end, without waiting for it."""
        self._stopping = True

    def stop(self):
        """End the threads."""
        self.stopping()
        for thread in self._threads:
            thread.join(PATIENCE)
        assert not any(thread.is_alive() for thread in self._threads), "a request does not end"

    def check(self, image: Path):
        """Stop, and compare everything, through the device and in the server's file.

        Args:
            image: what is served.
        """
        self.stop()
        assert not self.trouble(), self.trouble()
        with _opened(self.path) as (fd, buffer):
            os.fsync(fd)
            for block in range(BLOCKS):
                os.preadv(fd, [memoryview(buffer)[:BLOCK]], block * BLOCK)
                self._compare(block, bytes(buffer[:BLOCK]), "device")
        with image.open("rb") as file:
            for block in range(BLOCKS):
                self._compare(block, file.read(BLOCK), "server's file")
        assert not self.wrong, "; ".join(self.wrong[:5])

    def _run(self, number: int):
        state, dice = self._states[number], random.Random(self.seed * 1000 + number)
        with _opened(self.path) as (fd, buffer):
            while not self._stopping and not self.trouble():
                extent = self._take(dice)
                with self._lock:
                    state.begun += 1
                before = time.monotonic()
                try:
                    if dice.random() < 0.02:
                        os.fsync(fd)
                    elif dice.random() < 0.5:
                        self._read(fd, buffer, extent)
                    else:
                        self._write(fd, buffer, extent)
                except OSError as error:
                    with self._lock:
                        self.failed.append(error)
                took = time.monotonic() - before
                with self._lock:
                    self.slowest = max(self.slowest, took)
                    self._busy.difference_update(extent)
                    state.ended += 1
                    self._lock.notify_all()
        with self._lock:
            self._lock.notify_all()

    def _take(self, dice: random.Random) -> range:
        """Choose blocks of which there is no request."""
        with self._lock:
            while True:
                first, count = dice.randrange(BLOCKS), dice.randint(1, LONGEST)
                extent = range(first, min(first + count, BLOCKS))
                if self._busy.isdisjoint(extent):
                    self._busy.update(extent)
                    return extent

    def _read(self, fd, buffer, extent: range):
        size = len(extent) * BLOCK
        count = os.preadv(fd, [memoryview(buffer)[:size]], extent.start * BLOCK)
        assert count == size
        for place, block in enumerate(extent):
            self._compare(block, bytes(buffer[place * BLOCK : (place + 1) * BLOCK]), "device")

    def _write(self, fd, buffer, extent: range):
        with self._lock:
            self._writes += 1
            write = self._writes
        for place, block in enumerate(extent):
            buffer[place * BLOCK : (place + 1) * BLOCK] = stamped(block, write)
        size = len(extent) * BLOCK
        try:
            count = os.pwritev(fd, [memoryview(buffer)[:size]], extent.start * BLOCK)
            assert count == size
        except OSError:
            for block in extent:
                self._right[block].add(write)
            raise
        for block in extent:
            self._right[block] = {write}

    def _compare(self, block: int, data: bytes, where: str):
        right = self._right[block]
        if not any(data == stamped(block, write) for write in right):
            writes = " or ".join(map(str, sorted(right)))
            self.wrong.append(
                f"block {block} of the {where} has {told(block, data)} instead of write {writes}"
            )


@contextlib.contextmanager
def _opened(path: str):
    """Open a device past the page cache; give its descriptor and a buffer for it."""
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    try:
        yield fd, mmap.mmap(-1, BLOCK * LONGEST)
    finally:
        os.close(fd)
