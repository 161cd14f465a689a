"""Giving members what they lack, while the mirror is in use.

One thread for a mirror. It takes a member that is behind, region by region, and in a region a
piece at a time. While a piece is compared and copied nothing is written to it (`Mirror.hold`), so
the copy never overwrites anything newer; before and after, writes go to the member as to others.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import TYPE_CHECKING, Final

from nbdlink.protocol.constants import ALLOCATION_CONTEXT, AllocationFlag
from nbdlink.storage.base import Storage
from nbdlink.storage.mirror.members import Member, words
from nbdlink.storage.zeroes import is_zero

if TYPE_CHECKING:
    from nbdlink.storage.mirror.storage import Mirror

_log = logging.getLogger("nbdlink.mirror")

_PIECE: Final = 1 << 20
_ZERO: Final = int(AllocationFlag.ZERO)


class Rebuilder:
    """The thread that makes members complete."""

    def __init__(self, mirror: Mirror) -> None:
        """Prepare; `start` begins."""
        self._mirror = mirror
        self._thread = threading.Thread(target=self._work, name="nbd-rebuild", daemon=True)
        self._theirs = memoryview(bytearray(_PIECE))
        self._ours = memoryview(bytearray(_PIECE))

    def start(self) -> None:
        """Begin with what there is to be done, and wait for more."""
        self._thread.start()

    def join(self) -> None:
        """Wait for the end, which comes once the mirror is closing."""
        self._thread.join()

    def _work(self) -> None:
        mirror = self._mirror
        while True:
            with mirror.lock:
                mirror.lock.wait_for(lambda: mirror.is_closing or self._next())
                if mirror.is_closing:
                    return
                member = self._next()
                assert member is not None
                region = member.copying = min(member.behind, default=None)
                member.spoiled = False
                member.users += 1
            try:
                mirror.membership.settle()  # that it is rebuilt, before it is
                if region is None:
                    self._finish(member)
                else:
                    self._give(member, region)
            except Exception as error:
                _log.error("%s cannot be rebuilt: %s", member.name, words(error))
                self._give_up(member, f"it could not be rebuilt: {words(error)}")
            finally:
                with mirror.lock:
                    member.copying = None
                    mirror.membership.leave((member,))

    def _next(self) -> Member | None:
        return next((each for each in self._mirror.members if each.is_to_be_given), None)

    def _give(self, member: Member, region: int) -> None:
        mirror = self._mirror
        begin = region * mirror.region
        end = min(begin + mirror.region, mirror.size)
        with mirror.hold(begin, end - begin):
            done = not member.entry.doubted and self._are_both_empty(member, begin, end - begin)
        while not done and begin < end:
            if mirror.is_closing or not member.takes_writes:
                return
            count = min(_PIECE, end - begin)
            with mirror.hold(begin, count):
                if not self._copy(member, begin, count):
                    return
            begin += count
        with mirror.lock:
            if not member.spoiled:
                member.behind.discard(region)
            mirror.lock.notify_all()

    def _copy(self, member: Member, offset: int, length: int) -> bool:
        """Make a range equal; tell whether that went well."""
        mirror, storage = self._mirror, member.storage
        assert storage is not None
        theirs, ours = self._theirs[:length], self._ours[:length]
        try:
            failed = mirror.read_but({member}, theirs, offset)
        except OSError as error:
            self._give_up(member, f"what it lacks cannot be read: {words(error)}")
            return False
        mirror.drop_failed(failed)
        if not member.entry.doubted:
            with contextlib.suppress(OSError):  # then it is written, which tells more
                storage.read_into(ours, offset)
                if _same(ours, theirs):
                    return True
        try:
            if is_zero(theirs):
                storage.zero(offset, length, may_trim=True, fast=False, fua=False)
            else:
                storage.write(theirs, offset, False)
        except OSError as error:
            self._drop(member, f"writing failed: {words(error)}")
            return False
        return True

    def _are_both_empty(self, member: Member, offset: int, length: int) -> bool:
        """Tell whether a range is known to be zeroes in both, without reading it."""
        with self._mirror.using({member}, offset, length) as source:
            return all(
                each is not None and _is_empty(each, offset, length)
                for each in (source, member.storage)
            )

    def _finish(self, member: Member) -> None:
        """Have it flushed, and recorded as good."""
        assert member.storage is not None
        try:
            member.storage.flush()
        except OSError as error:
            self._drop(member, f"flushing failed: {words(error)}")
            return
        try:
            self._mirror.membership.promote(member)
        except OSError as error:
            self._drop(member, f"it cannot be recorded as good: {words(error)}")

    def _drop(self, member: Member, reason: str) -> None:
        mirror = self._mirror
        with mirror.lock:
            last = not any(each.is_complete for each in mirror.members if each is not member)
            if not last:
                mirror.membership.drop(member, reason)
        if last:
            self._give_up(member, reason)
            return
        with contextlib.suppress(OSError):  # told in the log; whoever writes is told again
            mirror.membership.settle()

    def _give_up(self, member: Member, reason: str) -> None:
        """Leave a member as it is: one that is good stays so, and is behind."""
        mirror = self._mirror
        with mirror.lock:
            if member.is_good:
                member.stuck = True
                _log.error("%s cannot be made equal: %s", member.name, reason)
            else:
                mirror.membership.drop(member, reason)
            mirror.lock.notify_all()
        with contextlib.suppress(OSError):
            mirror.membership.settle()


def _same(one: memoryview, other: memoryview) -> bool:
    # bytes compare by memcmp, memoryviews item by item.
    return one.tobytes() == other.tobytes()


def _is_empty(storage: Storage, offset: int, length: int) -> bool:
    try:
        extents = storage.extents(ALLOCATION_CONTEXT, offset, length)
        return all(extent.flags & _ZERO for extent in extents)
    except OSError:  # reading it will tell more
        return False
