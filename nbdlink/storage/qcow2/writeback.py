"""When what reaches the disk, and when a host cluster may be used again.

Theory of operation
===================

Whatever is cut off at whatever write, the image on disk must be sound: every cluster that
something refers to has a refcount that is high enough, every table that is referred to holds
what it should, and no guest cluster shows what was never written to it. Between two flushes the
disk may do writes in any order, and leave some out. So, rules:

1. A refcount is raised on disk before anything on disk refers to the cluster.
2. A new L2 table, and data in a newly allocated cluster, are on disk before anything there
   refers to them. So what a cluster held earlier is never seen through its new place.
3. A reference is gone from the disk before the refcount is lowered in memory; only then can
   the cluster be given to somebody else, or its space back to the file system.
4. A cluster is not given to somebody else while a request that may have found it under its
   old place is still under way, see `Epochs`.

Nothing is written for a change of metadata alone, but for new L2 tables, once, so that there is
room for them later. The tables in memory collect changes until somebody asks for a flush, or too
many have come together; then `WriteBack.sync` takes a copy of all of them at one moment and writes
it in two steps, with one flush behind each:

    refcount blocks, new L2 tables (nothing refers to them)      and guest data long written
    -- flush --
    changed parts of old L2 tables, L1 entries
    -- flush --
    then refcounts of what is no longer referred to are lowered in memory, for the next time.

An entry is only put into an L2 table in memory after its data was written and its refcount
raised, both under or before the same lock, so a copy made at one moment has no entry without
them. A flush without changed tables is one flush of the file.

The copy is made under the metadata lock, and the lock is given back before anything is written.
One thread at a time writes back; those that wait meanwhile share the next turn.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from typing import NamedTuple

from nbdlink.storage.qcow2.image import Image, L2Table
from nbdlink.storage.qcow2.refcounts import RefcountBlock, Refcounts
from nbdlink.storage.qcow2.tables import bytes_of


class Epochs:
    """Tells when the requests are over that were under way at some moment.

    A request does `users = epochs.users`, `users.append(None)`, then looks clusters up and uses
    them, and at last does `users.pop()`. That needs no lock: both are one step to the
    interpreter. Who has taken a cluster out of all tables calls `turn` and keeps what it gives:
    when that list is empty, and all earlier ones are, nobody uses the cluster any more. Who took
    the old list and appends to it late looks up late too, and does not find the cluster.
    """

    __slots__ = ("users",)

    def __init__(self) -> None:
        self.users: list[None] = []

    def turn(self) -> list[None]:
        """Begin a new epoch; give the list of the last one."""
        old, self.users = self.users, []
        return old


class _Freed(NamedTuple):
    """Clusters without a reference on disk, and the requests that may still use them."""

    users: list[None]
    areas: list[tuple[int, int]]


class _Copy(NamedTuple):
    """What one turn of writing back has to write: what has changed where, as bytes."""

    blocks: list[tuple[RefcountBlock, int, int, bytes, int]]
    fresh: list[tuple[L2Table, bytes]]
    changed: list[tuple[L2Table, int, int, bytes]]
    l1: dict[int, int]
    freed: list[tuple[int, int]]
    users: list[None]


class WriteBack:
    """Writes back an image's tables.

    Attributes:
        changed_l1: indexes of L1 entries that are not on disk yet.
        discard: whether the space of freed clusters is given back to the file system.
    """

    def __init__(self, image: Image, epochs: Epochs, *, discard: bool) -> None:
        self._image = image
        self._epochs = epochs
        self._turn = threading.Lock()
        self._begun = self._done = 0
        self._unreferenced: list[tuple[int, int]] = []
        self._waiting: deque[_Freed] = deque()
        self.changed_l1: set[int] = set()
        self.discard = discard
        self.refcounts: Refcounts | None = None

    def give_back(self, first: int, count: int) -> None:
        """Take host clusters that no table in memory refers to. With the metadata lock held."""
        self._unreferenced.append((first, count))

    @property
    def is_crowded(self) -> bool:
        """Whether it is time to write back, though nobody has asked for it."""
        return (
            len(self._unreferenced) > 4096
            or self._image.is_crowded
            or (self.refcounts is not None and self.refcounts.is_crowded)
        )

    def sync(self) -> None:
        """Make durable what has been written and changed until now.

        Raises:
            OSError: some of it may not be; the tables in memory still have it.
        """
        begun = self._begun
        with self._turn:
            if self._done > begun:
                return  # somebody's turn began after we came, and has succeeded
            self._begun += 1
            number = self._begun
            self._sync()
            self._done = number

    def _sync(self) -> None:
        image = self._image
        image.check_damage()
        with image.lock:
            copy = self._copy()
        settled = False
        try:
            for *_, data, at in copy.blocks:
                image.file.write_at(data, at)
            for table, data in copy.fresh:
                image.file.write_at(data, table.offset)
            if image.data is not image.file:
                image.data.flush()
            image.file.flush()
            with image.lock:
                for table, _ in copy.fresh:
                    table.fresh = False
            if copy.changed or copy.l1:
                for table, low, _, data in copy.changed:
                    image.file.write_at(data, table.offset + 8 * low)
                for index, entry in copy.l1.items():
                    at = image.header.l1_offset + 8 * index
                    image.file.write_at(entry.to_bytes(8, "big"), at)
                image.file.flush()
            settled = True
        finally:
            with image.lock:
                self._settle(copy, settled)
        self.reclaim()

    def _copy(self) -> _Copy:
        """Take everything that is to be written, as it is now."""
        image = self._image
        blocks = []
        if self.refcounts is not None:
            for block in self.refcounts.changed.values():
                blocks.append((block, block.low, block.high, *self.refcounts.changes(block)))
                block.low = block.high = 0
                block.writing = True
            self.refcounts.changed.clear()
        fresh, changed = [], []
        for table in image.changed.values():
            low, high = table.low, table.high
            if table.fresh:
                fresh.append((table, bytes_of(table.words)))
            else:
                changed.append((table, low, high, bytes_of(table.words[low:high])))
            table.low = table.high = 0
            table.writing = True
        image.changed.clear()
        l1 = {index: image.l1[index] for index in self.changed_l1}
        self.changed_l1 = set()
        freed, self._unreferenced = self._unreferenced, []
        users = self._epochs.turn() if freed else []
        return _Copy(blocks, fresh, changed, l1, freed, users)

    def _settle(self, copy: _Copy, settled: bool) -> None:
        """Note what is on disk now; what may not be counts as changed again."""
        for block, low, high, *_ in copy.blocks:
            block.writing = False
            if not settled and self.refcounts is not None:
                self.refcounts.mark(block, low, high)
        for table, _ in copy.fresh:
            table.writing = False
            if not settled:
                self._image.mark(table, 0, len(table.words))
        for table, low, high, _ in copy.changed:
            table.writing = False
            if not settled:
                self._image.mark(table, low, high)
        if settled:
            if copy.freed:
                self._waiting.append(_Freed(copy.users, copy.freed))
        else:
            self.changed_l1 |= set(copy.l1)
            if copy.freed:
                # They keep their epoch: whoever used them then may use them still.
                self._unreferenced = copy.freed + self._unreferenced
                self._waiting.append(_Freed(copy.users, []))

    def reclaim(self) -> None:
        """Lower the refcounts of clusters that nobody uses any more. Within a turn."""
        refcounts = self.refcounts
        if refcounts is None:
            return
        while self._waiting and not self._waiting[0].users:
            areas = self._waiting.popleft().areas
            free: list[int] = []
            with self._image.lock:
                for first, count in areas:
                    for cluster in range(first, first + count):
                        if self.discard and refcounts.count(cluster) == 1:
                            free.append(cluster)
                        else:
                            refcounts.lower(cluster)
            # Their refcount is still 1, so nobody else has them.
            bits = self._image.geometry.cluster_bits
            for first, count in _joined(free):
                with contextlib.suppress(OSError):  # the space stays, and nothing is lost
                    self._image.file.discard_at(first << bits, count << bits)
            with self._image.lock:
                for cluster in free:
                    refcounts.lower(cluster)


def _joined(clusters: list[int]) -> list[tuple[int, int]]:
    """Give runs of numbers that follow each other: first and count."""
    found: list[tuple[int, int]] = []
    for cluster in sorted(clusters):
        if found and sum(found[-1]) == cluster:
            found[-1] = found[-1][0], found[-1][1] + 1
        else:
            found.append((cluster, 1))
    return found
