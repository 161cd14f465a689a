"""Which regions of a mirror are being written to, so that it is known after a crash.

See rule 8 of `nbdlink.storage.mirror.storage`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from nbdlink.storage.mirror.membership import Membership


class Intent:
    """The intent bitmap, in memory and in the record.

    Attributes:
        regions: those that are recorded; changed under the membership's lock.
    """

    def __init__(self, membership: Membership) -> None:
        """Begin with what is recorded."""
        self.regions = membership.copies.regions
        self._membership = membership
        # All changed under the membership's lock.
        self._wanted: set[int] = set()
        self._busy: dict[int, int] = {}
        self._touched: dict[int, float] = {}

    @contextmanager
    def writing(self, regions: Collection[int]) -> Iterator[None]:
        """Have regions in the bitmap, durably, and keep them there meanwhile.

        Raises:
            OSError: they cannot be recorded.
        """
        self.begin(regions)
        try:
            yield
        finally:
            self.end(regions)

    def begin(self, regions: Collection[int]) -> None:
        """Have regions in the bitmap, durably, and keep them there until `end`.

        Raises:
            OSError: they cannot be recorded; it has ended then.
        """
        with self._membership.lock:
            for each in regions:
                self._busy[each] = self._busy.get(each, 0) + 1
            missing = [each for each in regions if each not in self.regions]
            self._wanted.update(missing)
        try:
            if missing:
                self._record(missing)
        except BaseException:
            self.end(regions)
            raise

    def end(self, regions: Collection[int]) -> None:
        """Note that what had `begin` has ended."""
        now = time.monotonic()
        with self._membership.lock:
            for each in regions:
                self._busy[each] -= 1
                if not self._busy[each]:
                    del self._busy[each]
                self._touched[each] = now

    def _record(self, missing: Collection[int]) -> None:
        with self._membership.recording:
            with self._membership.lock:
                if self.regions.issuperset(missing):
                    return  # somebody has done it for us
                wanted = self.regions | self._wanted
            self._membership.record_regions(wanted, durably=True)
            with self._membership.lock:
                self.regions = wanted
                self._wanted -= wanted

    def clean(self, idle: float, flush: Callable[[set[int]], None]) -> None:
        """Take out the regions that were not written to for `idle` seconds.

        Args:
            idle: seconds.
            flush: makes what lies in them durable in all members.

        Raises:
            OSError: that failed.
        """
        membership = self._membership
        before = time.monotonic() - idle
        with membership.lock:
            quiet = self._quiet(before)
        if not quiet:
            return
        flush(quiet)
        with membership.recording:
            with membership.lock:
                # Whoever has begun since waits for us, or has ended after `before`.
                quiet &= self._quiet(before)
                self.regions = self.regions - quiet
                for each in quiet:
                    self._touched.pop(each, None)
                left = self.regions | self._wanted
            membership.record_regions(left, durably=False)

    def _quiet(self, before: float) -> set[int]:
        if any(each.behind for each in self._membership.members if each.is_good):
            return set()
        return {
            each
            for each in self.regions
            if each not in self._busy and self._touched.get(each, 0.0) <= before
        }
