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
    written again.
12. A member that comes back is stale as long as the record says so, whatever it looks like.

What happens at the start, when some members are missing or say different things, is in
`nbdlink.storage.mirror.opening`.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

from nbdlink.errors import NBDError, StorageError
from nbdlink.protocol.chunks import Extent
from nbdlink.protocol.constants import ALLOCATION_CONTEXT, DEPTH_CONTEXT
from nbdlink.storage.base import Storage
from nbdlink.storage.composite.together import Threads, one_by_one
from nbdlink.storage.mirror.copies import Copies
from nbdlink.storage.mirror.members import Member, choose, words
from nbdlink.storage.mirror.places import device_identity, is_remote, owner
from nbdlink.storage.mirror.rebuild import Rebuilder
from nbdlink.storage.mirror.record import Entry
from nbdlink.storage.ranges import RangeLock

_log = logging.getLogger("nbdlink.mirror")

_LONG: Final = 256 << 10
"""Bytes from which on it pays to have another thread write them."""
_PATIENCE: Final = 20.0
"""Seconds that the last requests of a member that was dropped have to come back."""
IDLE: Final = 5.0
"""Seconds without a write after which a region is flushed and taken out of the bitmap."""


class Mirror(Storage):
    """Storages with the same data. Made by `nbdlink.storage.mirror.opening.open_mirror`.

    It keeps the size that it was made with.
    """

    can_trim = True

    def __init__(
        self, members: Sequence[Member], copies: Copies, *, read_only: bool, idle: float = IDLE
    ) -> None:
        """Take over open members and the copies of their record; at least one is good.

        Args:
            members: all that the record names.
            copies: of the record.
            read_only: whether nothing may be written, the record included.
            idle: see `IDLE`.
        """
        self._members = list(members)
        self._copies = copies
        state = copies.state
        self.mirror = state.mirror
        self.size = state.size
        self.region = state.region
        self.read_only = read_only
        self.name = "mirror of " + ", ".join(each.name for each in members)
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
        self._ranges = RangeLock()
        self._threads = Threads("nbd-mirror")
        # Whoever writes the record holds this one first; nobody waits for anything with `lock`.
        self._recording = threading.Lock()
        self.lock = threading.Condition(threading.Lock())
        # Changed under `lock`.
        self._version = self._recorded = 0
        self._dirty = copies.regions
        self._wanted: set[int] = set()
        self._busy: dict[int, int] = {}
        self._touched: dict[int, float] = {}
        self._closing = False
        first = next(each for each in self._members if each.is_good)
        for each in self._members:
            if each.is_good and each is not first:
                each.fall_behind(self._dirty)
            elif each.takes_writes and not each.is_good:
                each.fall_behind(self.all_regions())
        if self._dirty and first is not None:
            _log.warning(
                "%s was not stopped properly: %d regions of %d bytes are made equal again",
                self.name,
                len(self._dirty),
                self.region,
            )
        self._rebuilder = Rebuilder(self)
        self._cleaner = threading.Thread(target=self._clean_now_and_then, daemon=True)
        if not read_only:
            self._rebuilder.start()
            self._cleaner.start()

    def all_regions(self) -> range:
        """Give the numbers of all regions."""
        return range(-(-self.size // self.region))

    def _regions(self, offset: int, length: int) -> range:
        return range(offset // self.region, (offset + length - 1) // self.region + 1)

    @property
    def is_sparse(self) -> bool:
        """Whether a good member may have holes."""
        return any(each.storage.is_sparse for each in self._members if each.storage)

    @is_sparse.setter
    def is_sparse(self, value: bool) -> None:
        raise AttributeError("a mirror is as sparse as its members")

    @property
    def signature(self) -> str | None:
        """The mirror's number: it is the same data, whichever members there are."""
        return f"auto:mirror-{self.mirror}"

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
                member = choose(self._members, {*but, *failed}, regions, offset)
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
                    self._leave((member,))
        if failed:
            raise _as_os_error(next(iter(failed.values())))
        raise OSError(errno.EIO, f"{self.name}: no other good member has it")

    def drop_failed(self, failed: dict[Member, Exception]) -> None:
        """Drop members that could not read what others could; see rule 6."""
        if not failed:
            return
        with self.lock:
            for member, error in failed.items():
                if any(each.is_complete for each in self._members if each not in failed):
                    self.drop(member, f"reading failed: {words(error)}")
        with contextlib.suppress(OSError):  # told in the log; whoever writes is told again
            self.settle()

    def cache(self, offset: int, length: int) -> None:
        """Have the member read ahead that will be read."""
        if not length:
            return
        with self.lock:
            member = choose(self._members, (), self._regions(offset, length), offset)
        if member and member.storage:
            member.storage.cache(offset, length)

    def extents(self, context: str, offset: int, length: int) -> Iterator[Extent]:
        """Tell what a good member tells; if it fails, the rest is data."""
        if not length:
            return
        with self.lock:
            member = choose(self._members, (), self._regions(offset, length), 0)
        done = 0
        if member and member.storage:
            try:
                for extent in member.storage.extents(context, offset, length):
                    yield extent
                    done += extent.length
            except OSError as error:
                _log.warning("%s: what is allocated cannot be told: %s", member.name, error)
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
                for each in self._members
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
        with self._ranges.hold(offset, offset + length - 1, exclusive=True):
            self._begin(regions)
            try:
                self._everywhere(do, regions, "writing", long=long)
            finally:
                self._end(regions)

    def hold(self, offset: int, length: int) -> contextlib.AbstractContextManager[None]:
        """Keep a range from being written to."""
        return self._ranges.hold(offset, offset + length - 1, exclusive=True)

    def _begin(self, regions: Collection[int]) -> None:
        """Have regions in the bitmap, and keep them there; see rule 8."""
        with self.lock:
            for each in regions:
                self._busy[each] = self._busy.get(each, 0) + 1
            missing = [each for each in regions if each not in self._dirty]
            self._wanted.update(missing)
        if missing:
            try:
                self._mark(missing)
            except BaseException:
                self._end(regions)
                raise

    def _end(self, regions: Collection[int]) -> None:
        now = time.monotonic()
        with self.lock:
            for each in regions:
                self._busy[each] -= 1
                if not self._busy[each]:
                    del self._busy[each]
                self._touched[each] = now

    def _mark(self, missing: Collection[int]) -> None:
        with self._recording:
            with self.lock:
                if self._dirty.issuperset(missing):
                    return  # somebody has done it for us
                wanted = self._dirty | self._wanted
            failed = self._copies.write_regions(wanted, durably=True)
            if failed:
                self._lose_copies(failed)
                self._commit()
            with self.lock:
                self._dirty = wanted
                self._wanted -= wanted

    def flush(self) -> None:
        """Flush all members."""
        with self.lock:
            dirty = set(self._dirty)
        self._everywhere(lambda storage: storage.flush(), dirty, "flushing", long=True)

    def _everywhere(
        self, do: Callable[[Storage], None], regions: Collection[int], what: str, *, long: bool
    ) -> None:
        """Do something to all members that take writes, and judge by what has become of it.

        Raises:
            OSError: no complete member has done it, or a loss could not be recorded.
        """
        with self.lock:
            members = [each for each in self._members if each.takes_writes]
            storages = [each.storage for each in members if each.storage]
            for each in members:
                each.users += 1
        jobs = [functools.partial(do, storage) for storage in storages]
        # Files in the page cache answer faster than a thread wakes up.
        quick = not long and not any(is_remote(each.name) for each in members)
        try:
            failures = one_by_one(jobs) if quick else self._threads.all(jobs)
        finally:
            with self.lock:
                self._leave(members)
        failed = {
            member: failure for member, failure in zip(members, failures, strict=True) if failure
        }
        if failed:
            self._judge(members, failed, regions, what)
        self.settle()

    def _leave(self, members: Iterable[Member]) -> None:
        """Note that a request has ended in these members; the lock is held."""
        for each in members:
            each.users -= 1
            if not each.users and each.entry.state == "stale":
                self.lock.notify_all()  # somebody may want to open it anew

    def _judge(
        self,
        members: Sequence[Member],
        failed: dict[Member, Exception],
        regions: Collection[int],
        what: str,
    ) -> None:
        with self.lock:
            succeeded = [each for each in members if each not in failed]
            is_done = any(each.is_complete for each in succeeded)
            for member, error in failed.items():
                if is_done or not member.is_good:
                    self.drop(member, f"{what} failed: {words(error)}")
            if is_done:
                return
            last = next((each for each in self._members if each.is_complete), None)
            for member in self._members:
                if member is not last and member.takes_writes:
                    member.fall_behind(regions)
            self.lock.notify_all()
            error = next(
                (failed[each] for each in (last, *members) if each in failed),
                OSError(errno.EIO, "the member that did it was dropped"),
            )
        # What was dropped has to be recorded nevertheless.
        self.settle()
        raise _as_os_error(error)

    # Membership.

    def drop(self, member: Member, reason: str) -> None:
        """Make a member stale, in memory; the lock is held, and somebody is to `settle`."""
        if member.entry.state == "stale":
            return
        was = member.entry.state
        member.entry = member.entry.become("stale", reason)
        member.behind = set()
        self._version += 1
        self.lock.notify_all()
        left = sum(each.is_good for each in self._members)
        if was == "good":
            _log.error(
                "%s is dropped from the mirror: %s; %d good %s left",
                member.name,
                reason,
                left,
                "member is" if left == 1 else "members are",
            )
        else:
            _log.error("%s could not be rebuilt: %s", member.name, reason)

    def settle(self) -> None:
        """Have the record say what holds in memory before anything is acknowledged.

        Raises:
            OSError: EIO, it cannot be recorded.
        """
        if self._recorded == self._version:
            return
        with self._recording:
            if self._recorded != self._version:
                self._commit()

    def _commit(self, promoted: Member | None = None) -> None:
        """Record all members as they are, `promoted` as good; the recording lock is held.

        Raises:
            OSError: EIO, no good member's copy could be written.
        """
        if not self._copies.writable:
            with self.lock:
                self._recorded = self._version
            return
        while True:
            with self.lock:
                version = self._version
                entries = [
                    each.entry.become("good")
                    if each is promoted and each.entry.state == "rebuilding"
                    else each.entry
                    for each in self._members
                ]
                regions = set(self._dirty)
            failed = self._copies.write(self._copies.state.changed(entries), regions)
            if failed:
                self._lose_copies(failed, promoted)
            with self.lock:
                if version == self._version:
                    self._recorded = version
                    return

    def _lose_copies(self, failed: set[str], promoted: Member | None = None) -> None:
        """Drop members whose copy was not written; see rule 4.

        Raises:
            OSError: EIO, nobody complete would be left.
        """
        with self.lock:
            losers = [
                each
                for each in self._members
                if owner(each.entry) in failed and (each.is_good or each is promoted)
            ]
            if not any(each.is_complete for each in self._members if each not in losers):
                raise OSError(errno.EIO, f"{self.name}: its record cannot be written")
            for each in losers:
                self.drop(each, "its copy of the record cannot be written")

    # The bitmap.

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
        before = time.monotonic() - idle
        with self.lock:
            if any(each.behind for each in self._members if each.is_good):
                return
            quiet = {each for each in self._dirty if self._is_quiet(each, before)}
        if not quiet:
            return
        self._everywhere(lambda storage: storage.flush(), set(quiet), "flushing", long=True)
        with self._recording:
            with self.lock:
                if any(each.behind for each in self._members if each.is_good):
                    return
                # Whoever has begun since waits for us, or has ended after `before`.
                quiet = {each for each in quiet if self._is_quiet(each, before)}
                self._dirty = self._dirty - quiet
                for each in quiet:
                    self._touched.pop(each, None)
                left = self._dirty | self._wanted
            self._copies.write_regions(left, durably=False)

    def _is_quiet(self, region: int, before: float) -> bool:
        return region not in self._busy and self._touched.get(region, 0.0) <= before

    # For `nbdlink mirror` and metrics.

    def status(self) -> dict[str, Any]:
        """Tell how it is, in what JSON can carry; the keys are in nbdlink-mirror(8)."""
        with self.lock:
            total = len(self.all_regions())
            members = []
            for each in self._members:
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
            "generation": self._copies.state.generation,
            "health": health(members),
            "members": members,
        }

    def rebuild(self, address: str) -> None:
        """Begin to make a stale member good.

        Raises:
            StorageError: it is none, or cannot be opened.
        """
        with self.lock:
            member = next((each for each in self._members if each.name == address), None)
            if member is None:
                raise StorageError(
                    f"{address} is no member of the mirror",
                    hint="`nbdlink mirror status` tells which there are",
                )
            if member.entry.state != "stale":
                return  # it is good, or under way
            opener = member.opener
        if self.read_only:
            raise StorageError("the mirror is served read-only", hint="serve it without -r first")
        if opener is None:
            raise StorageError(
                f"{address} was not named when the server was started",
                hint="start it with all members, or rebuild this one when no server runs",
            )
        self._close(member)
        try:
            storage = opener()
        except NBDError as error:
            raise StorageError(f"{address} cannot be rebuilt: {error}", hint=error.hint) from None
        if (short := check_member(storage, self.size)) is not None:
            storage.close()
            raise StorageError(f"{address} cannot be rebuilt: {short}")
        with self.lock:
            member.storage = storage
            entry = replace(member.entry, identity=identity(address, storage))
            member.entry = entry.become("rebuilding", member.entry.reason)
            member.fall_behind(self.all_regions())
            self._version += 1
            self.lock.notify_all()
        _log.warning("%s is being rebuilt", address)
        try:
            self.settle()
        except OSError as error:
            raise StorageError(f"{address} cannot be rebuilt: {words(error)}") from None

    def promote(self, member: Member) -> None:
        """Make a member good that has been given everything, and flushed; see rule 10.

        Raises:
            OSError: it cannot be recorded.
        """
        with self._recording:
            self._commit(member)
            with self.lock:
                if member.entry.state == "rebuilding":
                    member.entry = member.entry.become("good")
                    _log.warning("%s is rebuilt, and good again", member.name)
                self.lock.notify_all()

    def wait_until_built(self, told: Callable[[dict[str, Any]], None], seconds: float) -> None:
        """Wait until nothing is being rebuilt; `told` is given the status every so often."""
        while True:
            with self.lock:
                if not any(each.is_to_be_given for each in self._members):
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
        jobs = [each.storage.close for each in self._members if each.storage]
        failures: list[Exception | None] = []
        try:
            if not self.read_only:
                self.clean()
        except OSError as error:
            failures.append(error)
        failures += self._threads.all(jobs)
        self._threads.close()
        self._copies.close()
        for failure in failures:
            if failure is not None:
                raise failure

    @property
    def is_closing(self) -> bool:
        """Whether it is to end."""
        return self._closing

    @property
    def members(self) -> list[Member]:
        """The members; look at them with the lock."""
        return self._members

    def _close(self, member: Member) -> None:
        """Close what a stale member was.

        Raises:
            StorageError: a request to it has not come back yet.
        """
        with self.lock:
            if not self.lock.wait_for(lambda: not member.users, _PATIENCE):
                raise StorageError(
                    f"{member.name}: a request that failed here has not come back from it yet",
                    hint="try again when the device or the server answers, or has given up",
                )
            storage, member.storage = member.storage, None
        if storage is not None:
            try:
                storage.close()
            except OSError as error:
                _log.info("%s: closing failed: %s", member.name, words(error))


def health(members: Sequence[dict[str, Any]]) -> str:
    """Give a word for all: "good", "resyncing", "rebuilding" or "degraded"."""
    states = [each["state"] for each in members]
    if "rebuilding" in states:
        return "rebuilding"
    if "stale" in states:
        return "degraded"
    return "resyncing" if any(each.get("behind") for each in members) else "good"


def check_member(storage: Storage, size: int) -> str | None:
    """Tell why a storage cannot be a member, or None if it can."""
    if storage.size < size:
        return f"it has {storage.size} bytes, and the mirror {size}"
    return None


def identity(address: str, storage: Storage) -> str | None:
    """Give what tells a member from another one under its address, or None."""
    return storage.signature or device_identity(address)


def entry_of(address: str, format: str | None, keeps_copy: bool, storage: Storage) -> Entry:
    """Give what is recorded of a new member."""
    return Entry(address, format, identity(address, storage), keeps_copy).become("good")


def _as_os_error(error: Exception) -> OSError:
    if isinstance(error, OSError):
        return error
    return OSError(errno.EIO, words(error))
