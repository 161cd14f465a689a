"""What a disk would hold if the power failed: a storage that writes down what it is told.

A disk may lose whatever was written after the last flush began, or any part of it, and nothing
else. So from the record of one run follows what it could hold at any moment, and what must not be
missing: the promises that somebody noted down when a flush, or a write with FUA, had returned.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

from nbdlink.storage.base import Storage
from nbdlink.storage.layer import Layer


class Write(NamedTuple):
    """A write that is done; with `fua` it is durable."""

    offset: int
    data: bytes
    fua: bool


class Flush(NamedTuple):
    """A flush that is done, and how long the log was when it began."""

    begin: int


class Promise(NamedTuple):
    """What must be there from now on."""

    what: dict[object, object]


class Recording(Layer):
    """A storage that keeps a log.

    Attributes:
        log: in the order in which things were done.
    """

    def __init__(self, below: Storage) -> None:
        super().__init__(below)
        self.may_fork = self.can_trim = self.can_fast_zero = False
        self.waits = True
        self.log: list[Write | Flush | Promise] = []
        self._lock = threading.Lock()

    plain_file = None
    zero = Storage.zero  # by writing

    def write(self, buffer: memoryview, offset: int, fua: bool) -> None:
        data = bytes(buffer)
        self.below.write(buffer, offset, False)
        with self._lock:
            self.log.append(Write(offset, data, fua))

    def flush(self) -> None:
        with self._lock:
            begin = len(self.log)
        with self._lock:
            self.log.append(Flush(begin))

    def promise(self, what: dict[object, object]) -> None:
        """Note that something must be there from now on."""
        with self._lock:
            self.log.append(Promise(what))


def cut(base, log, at, dice=None):
    """Give what a disk holds after a cut, and what it must hold.

    Args:
        base: what was durable at the beginning.
        log: of a `Recording`.
        at: how many of its entries come before the cut.
        dice: says what is lost of what may be lost; None for nothing, as when only the server
            is killed.
    """
    image, promised = bytearray(base), {}
    before = log[:at]
    durable = max((entry.begin for entry in before if isinstance(entry, Flush)), default=0)
    share = 1 if dice is None else dice.choice((0, 0.5, 0.95))
    for number, entry in enumerate(before):
        if isinstance(entry, Promise):
            promised |= entry.what
        elif isinstance(entry, Write):
            kept = number < durable or entry.fua or share == 1 or dice.random() < share
            if kept:
                image[entry.offset : entry.offset + len(entry.data)] = entry.data
    return image, promised
