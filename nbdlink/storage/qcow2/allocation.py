"""Where a write goes: into clusters that are there, or into new ones that are linked afterwards.

A write that needs new clusters is done in three steps. `Writer.prepare` takes host clusters and
notes the guest clusters as in flight, with the metadata lock held. The caller writes the data
without any lock. `Writer.link` puts the new clusters into the L2 table, with the lock again.
Until then everybody reads the old content; a second write to the same guest clusters waits for
the first to be linked, as it may have to copy what the first has written.

Of a guest cluster that is written in part the rest is read as any reader would read it, and the
whole is written in one go. That is left out where both the rest is known to be zeroes and the
new host cluster was never written to, so that it reads as zeroes by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeVar

from nbdlink.storage.qcow2.image import Image, L2Table, unlocked
from nbdlink.storage.qcow2.refcounts import Area, NotAtHandError, Refcounts
from nbdlink.storage.qcow2.tables import (
    ALL_ALLOCATED,
    COPIED,
    Kind,
    Run,
    bytes_of,
    subcluster_bits,
    words_of,
)
from nbdlink.storage.qcow2.writeback import WriteBack

T = TypeVar("T")

_PATIENCE: Final = 0.002
"""Seconds that a request that must not wait gives to whoever has the metadata lock: mostly it is
free again in microseconds, but not if many tables are copied, or many clusters cleared."""


class NoTableError(NotAtHandError):
    """An L2 table has to be made; `Writer.at_hand` does it."""


@dataclass(slots=True)
class Allocation:
    """A write to new clusters, between `Writer.prepare` and `Writer.link`.

    Attributes:
        first: the first guest cluster.
        count: guest clusters.
        start: guest offset from where on the clusters are to be written.
        end: guest offset where that ends; it may lie behind the end of the disk.
        consumed: bytes of the request that this takes care of.
        position: where `start` is in the data file.
        words: what the L2 table's words are to become, from the one of `first` on.
        freed: host clusters that nothing refers to any more once it is linked.
        area: host clusters that were allocated, or None if those are used that were there.
    """

    first: int
    count: int
    start: int
    end: int
    consumed: int
    position: int
    words: list[int]
    freed: list[tuple[int, int]] = field(default_factory=list)
    area: Area | None = None


class Writer:
    """Changes what guest clusters are made of.

    Attributes:
        image: the image.
        refcounts: its refcounts.
        writeback: brings changes to the disk.
        in_flight: guest clusters that are being written to new places.
    """

    def __init__(
        self, image: Image, refcounts: Refcounts, writeback: WriteBack, backing_size: int
    ) -> None:
        """Prepare to write.

        Args:
            image: the image.
            refcounts: its refcounts.
            writeback: brings changes to the disk.
            backing_size: bytes of the disk behind the image; 0 if there is none.
        """
        self.image = image
        self.refcounts = refcounts
        self.writeback = writeback
        self.backing_size = backing_size
        self.in_flight: set[int] = set()
        self._waiting = 0  # threads that wait for one of them
        self._making: set[int] = set()  # L2 tables, by L1 index
        self._external = image.data is not image.file

    # Tables.

    def writable_table(self, index: int) -> L2Table:
        """Give an L2 table that only the active L1 table refers to. With the lock held.

        Raises:
            NoTableError: it has to be made first, see `at_hand`.
            NotAtHandError: the disk has to be asked first.
        """
        image = self.image
        if not image.is_at_hand(index):
            raise NotAtHandError
        table = image.tables.get(index)
        if table is None or not image.l1[index] & COPIED:
            raise NoTableError
        return table

    def _make_table(self, index: int) -> None:
        """Make an L2 table that is at hand a writable one, in a new place, or wait for who does.

        It is written at once, and not only with the next flush: if there is no room for it, one
        request fails, and not every flush from then on, of whatever else was written. With the
        lock held, which is given back meanwhile.

        Raises:
            NotAtHandError: refcounts have to be fetched first.
            OSError: there is no room for it; the image is damaged; or the disk refuses.
        """
        image, bits = self.image, self.image.geometry.cluster_bits
        if index in self._making:
            image.lock.wait()
            return
        area = self.refcounts.allocate(1, for_metadata=True)
        offset = area.first << bits
        table = image.tables.get(index)
        data = bytes_of(table.words) if table else bytes(image.geometry.cluster_size)
        self._making.add(index)
        try:
            with unlocked(image.lock):
                image.file.write_at(data, offset)
            # Nobody has changed it, but it may have been thrown out.
            table = image.load(index)
        except BaseException:
            self.refcounts.unallocate(area.first, 1)
            raise
        finally:
            self._making.remove(index)
            image.lock.notify_all()
        if table is None:
            table = L2Table(index, offset, words_of(data))
            image.keep(table)
        else:
            # A snapshot has it too. The clusters in it were counted for both when it was made.
            self.writeback.give_back(table.offset >> bits, 1)
            table.offset = offset
        table.fresh = True
        image.mark(table, 0, len(table.words))
        image.l1[index] = offset | COPIED
        self.writeback.changed_l1.add(index)

    def host_clusters(self, entry: int) -> tuple[int, int] | None:
        """Give the host clusters that an L2 entry counts for, first and count, or None."""
        geometry = self.image.geometry
        bits = geometry.cluster_bits
        kind, position = (
            self.image.extended_entry(entry, 0)[:2]
            if geometry.extended
            else self.image.standard_entry(entry)
        )
        if kind is Kind.COMPRESSED:
            offset, length = geometry.compressed_area(entry)
            first = offset >> bits
            return first, (offset + length - 1 >> bits) - first + 1
        return (position >> bits, 1) if position and not self._external else None

    def at_hand(self, first: int, last: int, change: Callable[[], T]) -> T:
        """Change guest clusters of one L2 table once none of them is in flight.

        With the lock held, which is given back while others are waited for, or the disk.

        Args:
            first: the first guest cluster.
            last: the last one.
            change: does it, without giving the lock back. As long as it raises `NotAtHandError`
                it is called again, and must begin anew.

        Raises:
            OSError: the disk refuses, or the image is damaged; or as `change`.
        """
        image = self.image
        number = first >> image.geometry.l2_bits
        while True:
            image.check_damage()
            if any(first <= index <= last for index in self.in_flight):
                self._waiting += 1
                try:
                    image.lock.wait()
                finally:
                    self._waiting -= 1
            elif not image.is_at_hand(number):
                image.load(number)
            else:
                try:
                    try:
                        return change()
                    except NoTableError:
                        self._make_table(number)
                except NotAtHandError:
                    self.refcounts.fetch()

    def reads_as_zeroes(self, kind: Kind, offset: int) -> bool:
        """Tell whether a range of a kind that begins at `offset` reads as zeroes."""
        return kind is Kind.ZERO or (kind is Kind.UNALLOCATED and offset >= self.backing_size)

    def check_target(self, position: int, length: int) -> None:
        """See that guest data may be written to a place in the file. With the lock held.

        Raises:
            OSError: EIO, there is metadata, or nothing: the image is damaged.
        """
        if self._external:
            return
        bits = self.image.geometry.cluster_bits
        last = position + length - 1 >> bits
        if last >= self.refcounts.end:
            raise self.image.found_damage(f"an L2 entry names {position:#x} behind the file's end")
        if not self.refcounts.metadata.isdisjoint(range(position >> bits, last + 1)):
            raise self.image.found_damage(f"an L2 entry names {position:#x}, which is metadata")

    # Writing.

    def prepare(self, offset: int, length: int) -> Run | Allocation:
        """Find a place for the beginning of a write.

        Returns:
            A `Run` of clusters that can be written as they are, or an `Allocation`.

        Raises:
            OSError: there is no room; the image is damaged; or the disk refuses.
        """
        index = offset >> self.image.geometry.cluster_bits
        with self.image.lock:
            return self.at_hand(index, index, lambda: self._prepare(offset, length))

    def _prepare(self, offset: int, length: int) -> Run | Allocation:
        geometry = self.image.geometry
        table = self.writable_table(offset >> geometry.cluster_bits + geometry.l2_bits)
        if geometry.extended:
            return self._prepare_extended(table, offset, length)
        return self._prepare_standard(table, offset, length)

    def prepare_at_once(self, offset: int, length: int) -> Run | Allocation | None:
        """Do what `prepare` does, or give None if that might have to wait.

        It would have to for a lock for longer than a moment, for another write, for the disk, or
        for what lies around the range and has to be copied with it.

        Raises:
            OSError: as `prepare`.
        """
        image, geometry = self.image, self.image.geometry
        index = offset >> geometry.cluster_bits
        number = index >> geometry.l2_bits
        if geometry.extended or not image.lock.acquire(timeout=_PATIENCE):
            return None
        try:
            if not image.l1[number] and number not in self._making:
                self._make_table(number)
            if index in self.in_flight or image.damage is not None:
                return None
            table = self.writable_table(number)
            begin = index << geometry.cluster_bits
            if (
                not table.words[index & geometry.l2_mask]
                and begin >= self.backing_size
                and offset + length <= begin + geometry.cluster_size
                and not self._external
            ):
                return self._prepare_one(index, offset, length)
            if not self._stands_alone(table, offset, length):
                return None
            return self._prepare_standard(table, offset, length)
        except NotAtHandError:
            return None
        finally:
            image.lock.release()

    def _prepare_one(self, index: int, offset: int, length: int) -> Allocation:
        """Do what `_prepare_standard` does for a range within a cluster of which nothing is there.

        That is what growing disks are made of, and most of it would be looked at for nothing.
        """
        bits = self.image.geometry.cluster_bits
        area = self.refcounts.allocate(1)
        position = area.first << bits
        begin, start, end = index << bits, offset, offset + length
        if not area.virgin:
            start, end = begin, index + 1 << bits
        self.in_flight.add(index)
        return Allocation(
            first=index,
            count=1,
            start=start,
            end=end,
            consumed=length,
            position=position + start - begin,
            words=[position | COPIED],
            area=area,
        )

    def _stands_alone(self, table: L2Table, offset: int, length: int) -> bool:
        """Tell whether new clusters for a range need nothing of what is around it but zeroes."""
        geometry = self.image.geometry
        end = min(offset + length, (offset // geometry.covered + 1) * geometry.covered)
        for place in (offset, end):
            if place & geometry.cluster_mask:
                index = place >> geometry.cluster_bits
                entry = table.words[index & geometry.l2_mask]
                kind, _ = self.image.standard_entry(entry)
                own = kind is Kind.DATA and entry & COPIED
                if not own and not self.reads_as_zeroes(kind, index << geometry.cluster_bits):
                    return False
        return True

    def _prepare_standard(self, table: L2Table, offset: int, length: int) -> Run | Allocation:
        image, geometry = self.image, self.image.geometry
        bits, size = geometry.cluster_bits, geometry.cluster_size
        index = offset >> bits
        at = index & geometry.l2_mask
        words = table.words
        entry = words[at]
        kind, host = image.standard_entry(entry)
        within = offset & geometry.cluster_mask
        last = min(offset + length - 1 >> bits, (index | geometry.l2_mask))
        count = 1
        if kind is Kind.DATA and entry & COPIED:
            image.check_place(host, index << bits)
            while index + count <= last and words[at + count] == entry + count * size:
                count += 1
            run = min(length, count * size - within)
            self.check_target(host + within, run)
            return Run(Kind.DATA, host + within, run)
        freed = []
        area = None
        if kind is Kind.ZERO and host and entry & COPIED:
            position = host  # its space was kept
            image.check_place(host, index << bits)
            self.check_target(host, size)
        else:
            while index + count <= last and self._needs_cluster(words[at + count], index + count):
                count += 1
            if self._external:
                position = index << bits
            else:
                area = self.refcounts.allocate(count)
                count, position = area.clusters, area.first << bits
            for word in words[at : at + count]:
                if word and (clusters := self.host_clusters(word)):
                    freed.append(clusters)
        end = min(offset + length, index + count << bits)
        allocation = Allocation(
            first=index,
            count=count,
            start=offset,
            end=end,
            consumed=end - offset,
            position=position + within,
            words=[position + number * size | COPIED for number in range(count)],
            freed=freed,
            area=area,
        )
        virgin = area is not None and area.virgin
        if within and not (virgin and self.reads_as_zeroes(kind, index << bits)):
            allocation.start, allocation.position = index << bits, position
        if end & geometry.cluster_mask:
            tail, _ = image.standard_entry(words[at + count - 1])
            if not (virgin and self.reads_as_zeroes(tail, index + count - 1 << bits)):
                allocation.end = index + count << bits
        if count == 1:
            self.in_flight.add(index)
        else:
            self.in_flight.update(range(index, index + count))
        return allocation

    def _needs_cluster(self, entry: int, index: int) -> bool:
        if index in self.in_flight:
            return False
        kind, host = self.image.standard_entry(entry)
        return not (entry & COPIED and (kind is Kind.DATA or host))

    def _prepare_extended(self, table: L2Table, offset: int, length: int) -> Run | Allocation:
        image, geometry = self.image, self.image.geometry
        bits, size, granule = geometry.cluster_bits, geometry.cluster_size, geometry.granule
        index = offset >> bits
        at = 2 * (index & geometry.l2_mask)
        entry = table.words[at]
        kind, host, bitmap = image.extended_entry(entry, table.words[at + 1])
        begin = index << bits
        end = min(offset + length, begin + size)
        low, high = (offset - begin) // granule, (end - 1 - begin) // granule
        touched = subcluster_bits(low, high)
        if kind is Kind.DATA and entry & COPIED:
            image.check_place(host, begin)
            self.check_target(host, size)
            if bitmap & touched == touched:
                return Run(Kind.DATA, host + offset - begin, end - offset)
        allocation = Allocation(
            first=index,
            count=1,
            start=offset,
            end=end,
            consumed=end - offset,
            position=host,
            words=[0, (bitmap | touched) & ~(touched << 32)],
        )
        has_data = kind is Kind.COMPRESSED or bool(bitmap & ALL_ALLOCATED)
        if kind is Kind.DATA and entry & COPIED:
            # Subclusters that are there need not be copied: they are where they should be.
            if not bitmap >> low & 1:
                allocation.start = begin + low * granule
            if not bitmap >> high & 1:
                allocation.end = begin + (high + 1) * granule
        else:
            if self._external:
                allocation.position = begin
            else:
                allocation.area = self.refcounts.allocate(1)
                allocation.position = allocation.area.first << bits
            if clusters := self.host_clusters(entry):
                allocation.freed.append(clusters)
            if has_data:
                allocation.start, allocation.end = begin, begin + size
                allocation.words[1] = ALL_ALLOCATED
            elif not (
                allocation.area
                and allocation.area.virgin
                and (not self.backing_size or begin >= self.backing_size)
            ):
                allocation.start = begin + low * granule
                allocation.end = begin + (high + 1) * granule
        allocation.words[0] = allocation.position | COPIED
        allocation.position += allocation.start - begin
        self.in_flight.add(index)
        return allocation

    def link(self, allocation: Allocation) -> None:
        """Make the guest see what was written to new clusters.

        Raises:
            OSError: the L2 table cannot be read again; nothing has changed.
        """
        image, geometry = self.image, self.image.geometry
        with image.lock:
            table = image.load(allocation.first >> geometry.l2_bits)
            assert table is not None  # whoever changes it keeps what is in flight
            at = allocation.first & geometry.l2_mask
            if geometry.extended:
                at *= 2
            for number, word in enumerate(allocation.words):
                table.words[at + number] = word
            image.mark(table, at, at + len(allocation.words))
            for first, count in allocation.freed:
                self.writeback.give_back(first, count)
            self._landed(allocation)

    def give_up(self, allocation: Allocation) -> None:
        """Take back an allocation that could not be written."""
        with self.image.lock:
            self._landed(allocation)
            if allocation.area:
                self.refcounts.unallocate(allocation.area.first, allocation.area.clusters)

    def _landed(self, allocation: Allocation) -> None:
        if allocation.count == 1:
            self.in_flight.discard(allocation.first)
        else:
            self.in_flight.difference_update(
                range(allocation.first, allocation.first + allocation.count)
            )
        if self._waiting:
            self.image.lock.notify_all()
