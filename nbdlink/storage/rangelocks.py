"""Requests that overlap, one after the other: many readers of a range, or one writer.

Without it they have no order among each other while they are under way, as on a disk: of two
writes to the same range at the same time some bytes may be the one's and some the other's.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

from nbdlink.storage.base import PlainFile, Storage
from nbdlink.storage.layer import Layer
from nbdlink.storage.ranges import RangeLock


class LockedRanges(Layer):
    """A storage that does requests one after the other where they overlap.

    Only in one process: all requests have to pass here.
    """

    def __init__(self, below: Storage) -> None:
        """Lay it on a storage."""
        super().__init__(below)
        self.may_fork = False
        self.waits = True  # for others, and no connection's thread may
        self._ranges = RangeLock()

    @property
    def plain_file(self) -> PlainFile | None:
        """None: nobody may pass the locks by."""
        return None

    def _hold(self, offset: int, length: int, *, exclusive: bool) -> AbstractContextManager[None]:
        if not length:
            return contextlib.nullcontext()
        return self._ranges.hold(offset, offset + length - 1, exclusive=exclusive)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Read while nobody changes the range."""
        with self._hold(offset, len(buffer), exclusive=False):
            self.below.read_into(buffer, offset)

    def write(self, buffer: memoryview, offset: int, fua: bool) -> None:
        """Write while nobody uses the range."""
        with self._hold(offset, len(buffer), exclusive=True):
            self.below.write(buffer, offset, fua)

    def zero(self, offset: int, length: int, *, may_trim: bool, fast: bool, fua: bool) -> None:
        """Zero while nobody uses the range."""
        with self._hold(offset, length, exclusive=True):
            self.below.zero(offset, length, may_trim=may_trim, fast=fast, fua=fua)

    def trim(self, offset: int, length: int, fua: bool) -> None:
        """Trim while nobody uses the range."""
        with self._hold(offset, length, exclusive=True):
            self.below.trim(offset, length, fua)
