"""A storage of which every good member has all.

The rules, by which nothing that was acknowledged is ever lost, and no old data ever read:

 1. Each member is *good*, *stale* or *rebuilding*, and the record says which
    (`nbdlink.storage.mirror.record`). Only good members are read.
 2. A write, a zero and a flush go to all good members, and to those that are rebuilding. It is
    acknowledged when all of them have done it, or have been dropped.
 3. A good member that fails is dropped, which means that it becomes stale: at once in memory, so
    that it is not read any more, and then durably in the copies of the record that belong to all
    members that are still good. Nothing is acknowledged between the two. If it cannot be
    recorded, whatever waits for it fails, and so does what comes later, until it is recorded.
 4. A member whose copy of the record cannot be written is dropped for that.
 5. The last member is never dropped. It alone has the newest data, so its failures are told to
    the client, and it stays good. "The last" is the last that is complete, see 8. When all fail
    the same request nobody is dropped either, but their contents may differ from then on: the
    first one counts, and the others are given again what lies in the regions of the request.
 6. A read that fails is done by another member. If that succeeds the first one is dropped, under
    rule 5. A read waits for that to be recorded, but does not fail if it cannot be.
 7. Writes that overlap are done one after the other. Otherwise two members might do them in
    different orders, and have different data ever after.
 8. Before anything is written to a region, the region is in the intent bitmap of every copy,
    durably. It is taken out after a flush of all members, with nothing written to it since and
    nothing under way. After a crash, members may differ in these regions and in no other. One
    good member counts then, the first in the order of the record; in these regions only it is
    read, and the others are *behind* until they have been given what it has there. (A write that
    was acknowledged and made durable is in all of them; of others either outcome is right, but
    it must not change from read to read.) A member that is behind is not complete.
 9. To trim is to zero, if all members can do that fast, or nothing: members that make different
    things of a trim would differ.
10. A member that is rebuilt is given region by region what good members have, a piece at a time
    during which nothing is written to that piece. What is written meanwhile goes to it as well.
    When all is done it is flushed, then recorded as good, and read only after that.
11. If the server ends before, a new one begins the rebuild again; what is the same already is not
    written again. But to a member that has failed all is written: pages whose write-back failed
    count as clean, so that what is read from them may be right without being on the disk.
12. A member that comes back is stale as long as the record says so, whatever it looks like.
13. Once all members that are written to have grown, the mirror grows. What they have there may
    differ: so the regions are put into the bitmap first, as if they were being written to, then
    the new size is recorded, and then it counts, for everybody at once. Of what is new the first
    complete member's content counts, as it does under rule 8, and the others are given that.
    After a crash in between, the record has the old size or the new one with these regions.

What happens at the start, when some members are missing or say different things, is in
`nbdlink.storage.mirror.opening`.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Final

from nbdlink.protocol.chunks import Extent
from nbdlink.protocol.constants import ALLOCATION_CONTEXT, DEPTH_CONTEXT
from nbdlink.storage.base import Storage
from nbdlink.storage.composite.together import Threads, one_by_one
from nbdlink.storage.mirror.admission import Admission
from nbdlink.storage.mirror.copies import Copies
from nbdlink.storage.mirror.growth import Growth
from nbdlink.storage.mirror.intent import Intent
from nbdlink.storage.mirror.members import Member, choose, words
from nbdlink.storage.mirror.membership import Membership, as_os_error
from nbdlink.storage.mirror.rebuild import Rebuilder
from nbdlink.storage.ranges import RangeLock
from nbdlink.uri import is_uri

_log = logging.getLogger("nbdlink.mirror")

_LONG: Final = 256 << 10
"""Bytes from which on it pays to have another thread write them."""
IDLE: Final = 5.0
"""Seconds without a write after which a region is flushed and taken out of the bitmap."""


class Mirror(Storage):
    """Storages with the same data. Made by `nbdlink.storage.mirror.opening.open_mirror`.

    Attributes:
        mirror: its number.
        region: bytes in a region.
        least: bytes that a member has to have: its size, or what it is growing to.
        membership: its members, and what is recorded of them.
    """

    can_trim = True

    def __init__(
        self,
        members: Sequence[Member],
        copies: Copies,
        *,
        read_only: bool,
        another: Callable[[str], Storage],
        may_grow: bool = True,
        idle: float = IDLE,
    ) -> None:
        """Take over open members and the copies of their record; at least one is good.

        Args:
            members: all that the record names.
            copies: of the record.
            read_only: whether nothing may be written, the record included.
            another: opens a storage that is to become a member, by its address.
            may_grow: whether it is to become as large as its members do.
            idle: see `IDLE`.
        """
        state = copies.state
        self.mirror = state.mirror
        self.size = self.least = state.size
        self.region = state.region
        self.read_only = read_only
        self.name = "mirror of " + ", ".join(each.name for each in members)
        self.membership = Membership(members, copies, self.name)
        self._intent = Intent(self.membership)
        storages = [each.storage for each in members if each.storage]
        self.minimum_block = max(each.minimum_block for each in storages)
        self.preferred_block = max(each.preferred_block for each in storages)
        self.maximum_payload = min(each.maximum_payload for each in storages)
        self.can_cache = any(each.can_cache for each in storages)
        self.can_multi_conn = all(each.can_multi_conn for each in storages)
        self.is_rotational = all(each.is_rotational for each in storages)
        self.contexts = tuple(
            context
            for context in (ALLOCATION_CONTEXT, DEPTH_CONTEXT)
            if all(context in each.contexts for each in storages)
        )
        self._idle = idle
        self._may_grow = may_grow and not read_only
        self._growth = Growth(self, self._intent)
        self._ranges = RangeLock()
        self._threads = Threads("nbd-mirror")
        self._admission = Admission(self, another)
        self._closing = False
        self._find_differences()
        self._rebuilder = Rebuilder(self)
        self._cleaner = threading.Thread(target=self._clean_now_and_then, daemon=True)
        if not read_only:
            self._rebuilder.start()
            self._cleaner.start()

    def _find_differences(self) -> None:
        """Note which members have to be given what at the start; see rules 8 and 11."""
        # Others were about to be added by growing.
        dirty = self._intent.regions.intersection(self.all_regions())
        first = next(each for each in self.members if each.is_good)
        for each in self.members:
            if each.is_good and each is not first:
                each.fall_behind(dirty)
            elif each.takes_writes and not each.is_good:
                each.fall_behind(self.all_regions())
        if any(each.behind for each in self.members if each.is_good):
            _log.warning(
                "%s was not stopped properly: %d regions of %d bytes are made equal again",
                self.name,
                len(dirty),
                self.region,
            )

    @property
    def members(self) -> list[Member]:
        """The members; look at them with the lock."""
        return self.membership.members

    @property
    def lock(self) -> threading.Condition:
        """What guards them."""
        return self.membership.lock

    def all_regions(self) -> range:
        """Give the numbers of all regions."""
        return range(-(-self.size // self.region))

    def _regions(self, offset: int, length: int) -> range:
        return range(offset // self.region, (offset + length - 1) // self.region + 1)

    @property
    def is_sparse(self) -> bool:
        """Whether a good member may have holes."""
        return any(each.storage.is_sparse for each in self.members if each.storage)

    @is_sparse.setter
    def is_sparse(self, value: bool) -> None:
        raise AttributeError("a mirror is as sparse as its members")

    @property
    def signature(self) -> str | None:
        """The mirror's number: it is the same data, whichever members there are."""
        return f"auto:mirror-{self.mirror}"

    # Growing.

    def notice_growth(self) -> None:
        """Grow if all members have that are written to; see rule 13."""
        if self._may_grow:
            self._growth.notice()

    # Reading.

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Read from a good member; from another one if that fails."""
        if not len(buffer):
            return
        failed = self.read_but((), buffer, offset)
        self.drop_failed(failed)

    def read_but(
        self, but: Collection[Member], buffer: memoryview, offset: int
    ) -> dict[Member, Exception]:
        """Read from a good member that is not one of `but`; give those that failed to.

        Raises:
            OSError: all failed, or there is none.
        """
        regions = self._regions(offset, len(buffer))
        failed: dict[Member, Exception] = {}
        while True:
            with self.lock:
                member = choose(self.members, {*but, *failed}, regions, offset)
                if member is None:
                    break
                storage = member.storage
                member.in_flight += 1
                member.users += 1
            assert storage is not None
            try:
                storage.read_into(buffer, offset)
            except Exception as error:
                failed[member] = error
            else:
                return failed
            finally:
                with self.lock:
                    member.in_flight -= 1
                    self.membership.leave((member,))
        if failed:
            raise as_os_error(next(iter(failed.values())))
        raise OSError(errno.EIO, f"{self.name}: no other good member has it")

    @contextlib.contextmanager
    def using(
        self, but: Collection[Member], offset: int, length: int, at: int | None = None
    ) -> Iterator[Storage | None]:
        """Give a good member that has a range, and keep it open meanwhile; None if there is none.

        Args:
            but: members that are not to be asked.
            offset: where the range begins.
            length: its bytes, at least one.
            at: the place that the member is chosen by; None for `offset`.
        """
        with self.lock:
            regions = self._regions(offset, length)
            member = choose(self.members, but, regions, offset if at is None else at)
            if member:
                member.users += 1
        try:
            yield member.storage if member else None
        finally:
            if member:
                with self.lock:
                    self.membership.leave((member,))

    def drop_failed(self, failed: dict[Member, Exception]) -> None:
        """Drop members that could not read what others could; see rule 6."""
        if not failed:
            return
        with self.lock:
            for member, error in failed.items():
                if any(each.is_complete for each in self.members if each not in failed):
                    self.membership.drop(member, f"reading failed: {words(error)}")
        with contextlib.suppress(OSError):  # told in the log; whoever writes is told again
            self.membership.settle()

    def cache(self, offset: int, length: int) -> None:
        """Have the member read ahead that will be read."""
        if not length:
            return
        with self.using((), offset, length) as storage:
            if storage:
                storage.cache(offset, length)

    def extents(self, context: str, offset: int, length: int) -> Iterator[Extent]:
        """Tell what a good member tells; if it fails, the rest is data."""
        if not length:
            return
        done = 0
        with self.using((), offset, length, at=0) as storage:
            try:
                for extent in storage.extents(context, offset, length) if storage else ():
                    yield extent
                    done += extent.length
            except OSError as error:
                _log.warning("%s: what is allocated cannot be told: %s", self.name, error)
        if done < length:
            yield Extent(length - done, 1 if context == DEPTH_CONTEXT else 0)

    # Writing.

    def write(self, buffer: memoryview, offset: int, fua: bool) -> None:
        """Write to all members."""
        long = fua or len(buffer) >= _LONG
        self._change(
            offset, len(buffer), fua, long, lambda storage: storage.write(buffer, offset, fua)
        )

    def zero(self, offset: int, length: int, *, may_trim: bool, fast: bool, fua: bool) -> None:
        """Zero in all members; never `fast`, as only some might be able to."""
        if fast:
            raise OSError(errno.ENOTSUP, "zeroes are not known to be fast in all members")
        self._change(
            offset,
            length,
            fua,
            True,
            lambda storage: storage.zero(offset, length, may_trim=may_trim, fast=False, fua=fua),
        )

    def trim(self, offset: int, length: int, fua: bool) -> None:
        """Zero in all members if all can do it fast; see rule 9."""
        with self.lock:
            fast = all(
                each.storage.can_fast_zero and each.storage.can_trim
                for each in self.members
                if each.storage and each.takes_writes
            )
        if fast:
            self.zero(offset, length, may_trim=True, fast=False, fua=fua)
        elif fua:
            self.flush()

    def _change(
        self, offset: int, length: int, fua: bool, long: bool, do: Callable[[Storage], None]
    ) -> None:
        if not length:
            if fua:
                self.flush()
            return
        regions = self._regions(offset, length)
        with self.hold(offset, length), self._intent.writing(regions):
            self._everywhere(do, regions, "writing", long=long)

    def hold(self, offset: int, length: int) -> contextlib.AbstractContextManager[None]:
        """Keep a range from being written to."""
        return self._ranges.hold(offset, offset + length - 1, exclusive=True)

    def flush(self) -> None:
        """Flush all members."""
        self._flush(self._intent.regions)

    def _flush(self, regions: Collection[int]) -> None:
        self._everywhere(lambda storage: storage.flush(), regions, "flushing", long=True)

    def _everywhere(
        self, do: Callable[[Storage], None], regions: Collection[int], what: str, *, long: bool
    ) -> None:
        """Do something to all members that take writes, and judge by what has become of it.

        Raises:
            OSError: no complete member has done it, or a loss could not be recorded.
        """
        members = self.membership.enter()
        storages = [each.storage for each in members if each.storage]
        jobs = [functools.partial(do, storage) for storage in storages]
        # Files in the page cache answer faster than a thread wakes up.
        quick = not long and not any(is_uri(each.name) for each in members)
        try:
            failures = one_by_one(jobs) if quick else self._threads.all(jobs)
        finally:
            with self.lock:
                self.membership.leave(members)
        failed = {
            member: failure for member, failure in zip(members, failures, strict=True) if failure
        }
        if failed:
            self.membership.judge(members, failed, regions, what)
        self.membership.settle()

    def _clean_now_and_then(self) -> None:
        while True:
            with self.lock:
                self.lock.wait_for(lambda: self._closing, self._idle)
                if self._closing:
                    return
            try:
                self.clean(self._idle)
            except OSError as error:
                _log.warning("%s: cannot be made durable: %s", self.name, words(error))

    def clean(self, idle: float = 0.0) -> None:
        """Take out of the bitmap the regions that were not written to for `idle` seconds.

        Raises:
            OSError: they cannot be made durable.
        """
        self._intent.clean(idle, self._flush)

    # For `nbdlink mirror` and metrics.

    def status(self) -> dict[str, Any]:
        """Tell how it is, in what JSON can carry; the keys are in nbdlink-mirror(8)."""
        with self.lock:
            total = len(self.all_regions())
            members = []
            for each in self.members:
                found: dict[str, Any] = {
                    "address": each.name,
                    "state": each.entry.state,
                    "since": each.entry.since,
                    "reason": each.entry.reason,
                    "behind": min(len(each.behind) * self.region, self.size),
                }
                if each.takes_writes:
                    found["progress"] = round(1 - len(each.behind) / total, 4)
                members.append(found)
        return {
            "mirror": self.mirror,
            "size": self.size,
            "generation": self.membership.copies.state.generation,
            "health": health(members),
            "members": members,
        }

    def rebuild(self, address: str) -> None:
        """Begin to make a stale member good; see `Admission.rebuild`."""
        self._admission.rebuild(address)

    def replace(self, address: str, other: str) -> None:
        """Put another member in the place of one; see `Admission.replace`."""
        self._admission.replace(address, other)

    def wait_until_built(self, told: Callable[[dict[str, Any]], None], seconds: float) -> None:
        """Wait until nothing is being rebuilt; `told` is given the status every so often."""
        while True:
            with self.lock:
                if not any(each.is_to_be_given for each in self.members):
                    return
                self.lock.wait(seconds)
            told(self.status())

    # The end.

    def close(self) -> None:
        """Stop rebuilding, take what is durable out of the bitmap, and close all members."""
        with self.lock:
            if self._closing:
                return
            self._closing = True
            self.lock.notify_all()
        if not self.read_only:
            self._rebuilder.join()
            self._cleaner.join()
        jobs = [each.storage.close for each in self.members if each.storage]
        failures: list[Exception | None] = []
        try:
            if not self.read_only:
                self.clean()
        except OSError as error:
            failures.append(error)
        failures += self._threads.all(jobs)
        self._threads.close()
        self.membership.copies.close()
        for failure in failures:
            if failure is not None:
                raise failure

    def disown(self) -> None:
        """Let go of all members and copies of the record, as they are."""
        for each in self.members:
            if each.storage:
                each.storage.disown()
        self.membership.copies.close()

    @property
    def is_closing(self) -> bool:
        """Whether it is to end."""
        return self._closing


def health(members: Sequence[dict[str, Any]]) -> str:
    """Give a word for all: "good", "resyncing", "rebuilding" or "degraded"."""
    states = [each["state"] for each in members]
    if "rebuilding" in states:
        return "rebuilding"
    if "stale" in states:
        return "degraded"
    return "resyncing" if any(each.get("behind") for each in members) else "good"
