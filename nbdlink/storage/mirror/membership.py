"""Who belongs to a mirror, in memory and in the record, and how one is changed after the other."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from nbdlink.storage.mirror.copies import Copies
from nbdlink.storage.mirror.members import Member, words
from nbdlink.storage.mirror.places import owner
from nbdlink.storage.mirror.record import Entry

_log = logging.getLogger("nbdlink.mirror")


class Membership:
    """The members of a mirror and the copies of its record.

    A change is made in memory under `lock`, where it counts at once, and recorded by `settle`.
    Whatever depends on it is not acknowledged before.

    Attributes:
        members: in the order of the record.
        lock: guards all that is in memory of the mirror; nobody waits for anything with it but
            for a change of that.
        recording: held by who writes the record; to be taken before `lock`.
    """

    def __init__(self, members: Sequence[Member], copies: Copies, name: str) -> None:
        """Take over members and copies, which agree."""
        self.members = list(members)
        self.copies = copies
        self.lock = threading.Condition(threading.Lock())
        self.recording = threading.Lock()
        self._name = name
        self._regions = copies.regions
        self._size = copies.state.size
        self._version = self._recorded = 0

    def enter(self) -> list[Member]:
        """Give the members that take writes, each of which has a user more."""
        with self.lock:
            members = [each for each in self.members if each.takes_writes]
            for each in members:
                each.users += 1
        return members

    def leave(self, members: Iterable[Member]) -> None:
        """Note that a request has ended in these members; the lock is held."""
        for each in members:
            each.users -= 1
            if not each.users and each.entry.state == "stale":
                self.lock.notify_all()  # somebody may want to open it anew

    def judge(
        self,
        members: Sequence[Member],
        failed: dict[Member, Exception],
        regions: Collection[int],
        what: str,
    ) -> None:
        """Drop who failed, if somebody complete has done it; see rules 3 and 5.

        Args:
            members: who was asked.
            failed: who failed, and how.
            regions: where their contents may differ now.
            what: they were asked to do, for messages.

        Raises:
            OSError: nobody complete has done it.
        """
        with self.lock:
            succeeded = [each for each in members if each not in failed]
            is_done = any(each.is_complete for each in succeeded)
            for member, error in failed.items():
                if is_done or not member.is_good:
                    self.drop(member, f"{what} failed: {words(error)}")
            if is_done:
                return
            last = next((each for each in self.members if each.is_complete), None)
            for member in self.members:
                if member is not last and member.takes_writes:
                    member.fall_behind(regions)
            self.lock.notify_all()
            error = next(
                (failed[each] for each in (last, *members) if each in failed),
                OSError(errno.EIO, "the member that did it was dropped"),
            )
        # What was dropped has to be recorded nevertheless.
        self.settle()
        raise as_os_error(error)

    def drop(self, member: Member, reason: str) -> None:
        """Make a member stale, in memory; the lock is held, and somebody is to `settle`."""
        if member.entry.state == "stale":
            return
        was = member.entry.state
        member.entry = replace(member.entry.become("stale", reason), doubted=True)
        member.behind = set()
        self._version += 1
        self.lock.notify_all()
        left = sum(each.is_good for each in self.members)
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
        with self.recording:
            if self._recorded != self._version:
                self._commit()

    def _commit(self, promoted: Member | None = None) -> None:
        """Record all members as they are, `promoted` as good; the recording lock is held.

        Raises:
            OSError: EIO, no good member's copy could be written.
        """
        if not self.copies.writable:
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
                    for each in self.members
                ]
            failed = self.copies.write(
                self.copies.state.changed(entries, self._size), self._regions
            )
            if failed:
                self._lose_copies(failed, promoted)
            with self.lock:
                if version == self._version:
                    self._recorded = version
                    return

    def _lose_copies(self, failed: set[str], promoted: Member | None = None) -> bool:
        """Drop members whose copy was not written; tell whether there are any. See rule 4.

        Raises:
            OSError: EIO, nobody complete would be left.
        """
        with self.lock:
            losers = [
                each
                for each in self.members
                if owner(each.entry) in failed and (each.is_good or each is promoted)
            ]
            if not any(each.is_complete for each in self.members if each not in losers):
                raise OSError(errno.EIO, f"{self._name}: its record cannot be written")
            for each in losers:
                self.drop(each, "its copy of the record cannot be written")
        return bool(losers)

    def promote(self, member: Member) -> None:
        """Make a member good that has been given everything, and flushed; see rule 10.

        It is not if a write has failed everywhere meanwhile, so that it lacks something again.

        Raises:
            OSError: it cannot be recorded.
        """
        with self.recording:
            with self.lock:
                if member.behind:
                    return
            self._commit(member)
            with self.lock:
                if member.entry.state == "rebuilding":
                    member.entry = member.entry.become("good")
                    _log.warning("%s has everything now, and is good", member.name)
                self.lock.notify_all()

    def change(self, member: Member, entry: Entry) -> None:
        """Change what is to be recorded of a member; the lock is held, and somebody `settle`s."""
        member.entry = entry
        self._version += 1
        self.lock.notify_all()

    def record_size(self, size: int) -> None:
        """Record that the mirror has grown.

        Raises:
            OSError: EIO, no complete member's copy could be written; others may tell of it.
        """
        with self.recording:
            before, self._size = self._size, size
            try:
                self._commit()
            except OSError:
                self._size = before
                raise

    def record_regions(self, regions: set[int], *, durably: bool) -> None:
        """Record the intent bitmap; the recording lock is held.

        Raises:
            OSError: EIO, no good member's copy could be written, or a loss not be recorded.
        """
        self._regions = regions
        failed = self.copies.write_regions(regions, durably=durably)
        if failed and durably and self._lose_copies(failed):
            self._commit()


def as_os_error(error: Exception) -> OSError:
    """Give what a client can be told of a failure."""
    if isinstance(error, OSError):
        return error
    return OSError(errno.EIO, words(error))
