"""The members of a running mirror: in which state each is, and which may be read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Final

from nbdlink.storage.base import Storage
from nbdlink.storage.mirror.record import Entry
from nbdlink.uri import is_uri

Opener = Callable[[], Storage]

_STRIPE: Final = 22
"""Reads of the same 4 MiB go to the same member if there is nothing else to choose by, so that
each of them reads ahead."""


class Member:
    """One member. Its fields belong to the mirror's lock.

    Attributes:
        entry: what is to be recorded of it; what is recorded may be behind that for a moment.
        opener: opens its storage, or None if it was not named on the command line.
        storage: what it is, or None if it is not open.
        behind: the regions that it has to be given: all while it is rebuilt, or those in which
            good members may differ after a crash.
        in_flight: reads that it is doing.
        users: requests of any kind that it is doing.
        copying: the region that it is being given, or None.
        spoiled: whether that has to be done again.
        stuck: whether what it is behind with cannot be read anywhere else.
    """

    def __init__(self, entry: Entry, opener: Opener | None, storage: Storage | None) -> None:
        """Begin with nothing to be done."""
        self.entry = entry
        self.opener = opener
        self.storage = storage
        self.behind: set[int] = set()
        self.in_flight = 0
        self.users = 0
        self.copying: int | None = None
        self.spoiled = False
        self.stuck = False

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return self.entry.address

    @property
    def is_good(self) -> bool:
        """Whether it has all that was acknowledged."""
        return self.entry.state == "good" and self.storage is not None

    @property
    def is_complete(self) -> bool:
        """Whether it is good and has nothing to be given."""
        return self.is_good and not self.behind

    @property
    def takes_writes(self) -> bool:
        """Whether it is written to: whether it is good, or being made so."""
        return self.storage is not None and self.entry.state != "stale"

    @property
    def is_to_be_given(self) -> bool:
        """Whether there is something to be given to it, or only to be recorded as good."""
        return self.takes_writes and not self.stuck and (bool(self.behind) or not self.is_good)

    def fall_behind(self, regions: Iterable[int]) -> None:
        """Note that it has to be given these regions."""
        regions = set(regions)
        self.behind |= regions
        self.stuck = False
        if self.copying in regions:
            self.spoiled = True


def choose(
    members: Iterable[Member], but: Collection[Member], regions: Collection[int], offset: int
) -> Member | None:
    """Choose the member that a range is read from, or None if there is none left.

    The one that does the least at the moment; of several one of this machine, and among these by
    the place.

    Args:
        members: all of them.
        but: those that are not to be asked.
        regions: those of the range.
        offset: where it begins, in bytes.
    """
    good = [
        each
        for each in members
        if each.is_good and each not in but and (not each.behind or each.behind.isdisjoint(regions))
    ]
    if not good:
        return None
    least = min((each.in_flight, is_uri(each.name)) for each in good)
    best = [each for each in good if (each.in_flight, is_uri(each.name)) == least]
    return best[(offset >> _STRIPE) % len(best)]


def words(error: Exception) -> str:
    """Give what went wrong, for a message."""
    if isinstance(error, OSError):
        return (error.strerror or str(error)).lower()
    return f"{type(error).__name__}: {error}"
