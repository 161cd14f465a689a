"""An open qcow2 image as seen by a reader: L1 and L2 tables, and what a guest offset is made of.

Looking up takes no lock as long as the L2 table is in memory and its entries are standard ones:
a word of a table is read and replaced as a whole. The metadata lock, `Image.lock`, is taken for
extended entries (two words that belong together), to see who loads a table, and by whoever changes
anything. It is given back while the disk is read or written.

Tables stay in memory up to a limit. A table object that a reader still holds after it was
thrown out says what was true when the reader began, which is as good as any answer between its
beginning and its end; that the clusters it names are not used again meanwhile is the business
of `writeback.Epochs`.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from array import array
from collections.abc import Iterator
from typing import Final

from nbdlink.errors import StorageError
from nbdlink.storage.chain import Wanted
from nbdlink.storage.imagefile import ImageFile
from nbdlink.storage.qcow2.compressed import CompressedClusters
from nbdlink.storage.qcow2.header import (
    HEAD_LENGTH,
    Header,
    Incompatible,
    first_cluster,
    parse_header,
)
from nbdlink.storage.qcow2.snapshots import (
    MAX_TABLE,
    Snapshot,
    find_snapshot,
    parse_snapshots,
)
from nbdlink.storage.qcow2.tables import (
    COMPRESSED,
    COPIED,
    OFFSET,
    ZERO,
    Geometry,
    Kind,
    Run,
    is_sane_bitmap,
    subcluster_kind,
    words_of,
)

L2_LIMIT: Final = 32 << 20
"""Bytes of L2 tables that are kept in memory: 256 GiB of disk with clusters of 64 KiB."""


@contextlib.contextmanager
def unlocked(lock: threading.Condition) -> Iterator[None]:
    """Give a lock back for a while that the caller holds."""
    lock.release()
    try:
        yield
    finally:
        lock.acquire()


class L2Table:
    """An L2 table in memory.

    Attributes:
        index: of its L1 entry.
        offset: where it is in the file.
        words: its entries, one or two words each.
        low: the first word that is not on disk yet.
        high: behind the last one; 0 if all are.
        fresh: whether no L1 entry on disk points to it yet.
        writing: whether a part of it is on its way to the disk.
    """

    __slots__ = ("fresh", "high", "index", "low", "offset", "words", "writing")

    def __init__(self, index: int, offset: int, words: array[int]) -> None:
        self.index = index
        self.offset = offset
        self.words = words
        self.low = self.high = 0
        self.fresh = False
        self.writing = False


class Image:
    """An open image. Made by `open`.

    Attributes:
        name: for messages.
        file: with the metadata, and mostly with the data.
        data: with the data.
        header: as it is on disk.
        geometry: sizes that follow from the header.
        size: bytes of the virtual disk.
        l1: the active L1 table, or the one of the snapshot that was opened.
        snapshots: all internal ones.
        snapshot_table_length: bytes of the snapshot table.
        tables: L2 tables in memory, by L1 index.
        changed: those of them that are not on disk as they are here.
        lock: the metadata lock, see above, and what is waited on for allocations in flight.
        damage: what has been found wrong with the image since it was opened, or None.
        compressed: reads compressed clusters; made when it is needed.
        snapshot: the id of the snapshot that was opened, or None for the disk.
    """

    def __init__(
        self,
        file: ImageFile,
        data: ImageFile,
        header: Header,
        snapshots: tuple[list[Snapshot], int],
        l1: array[int],
        size: int,
    ) -> None:
        self.name = file.name
        self.file = file
        self.data = data
        self.header = header
        self.geometry = Geometry(header)
        self.size = size
        self.l1 = l1
        self.snapshots, self.snapshot_table_length = snapshots
        self.tables: dict[int, L2Table] = {}
        self.changed: dict[int, L2Table] = {}
        self.lock = threading.Condition(threading.Lock())
        self.damage: str | None = None
        self.compressed: CompressedClusters | None = None
        self.snapshot: str | None = None
        self._loading: set[int] = set()
        self._most_tables = max(4, L2_LIMIT // self.geometry.cluster_size)

    @classmethod
    def open(cls, file: ImageFile, data: ImageFile | None, snapshot: Wanted | None) -> Image:
        """Read header, snapshot table and L1 table.

        Args:
            file: the image.
            data: the external data file, for images that have one.
            snapshot: the internal snapshot to look at; None for the disk.

        Raises:
            StorageError: it is damaged, or needs what this driver does not know.
        """
        header = read_header(file)
        file_size = file.size
        snapshots: tuple[list[Snapshot], int] = ([], 0)
        if header.snapshot_count:
            length = max(0, min(MAX_TABLE, file_size - header.snapshots_offset))
            # Most tables fit into a page or two.
            for part in (min(length, 1 << 16), length):
                table = _read(file, header.snapshots_offset, part)
                try:
                    snapshots = parse_snapshots(file.name, header, table, file_size)
                    break
                except StorageError:
                    if part == length:
                        raise
        l1_offset, l1_size, size = header.l1_offset, header.l1_size, header.size
        if snapshot is not None:
            found = find_snapshot(file.name, snapshots[0], snapshot)
            l1_offset, l1_size, size = found.l1_offset, found.l1_size, found.disk_size
            if size > l1_size * Geometry(header).covered:
                raise StorageError(f"{file.name}: the L1 table of snapshot {found.id} is too short")
        l1 = words_of(_read(file, l1_offset, l1_size * 8))
        image = cls(file, data or file, header, snapshots, l1, size)
        if snapshot is not None:
            image.snapshot = found.id
        return image

    # What a guest offset is made of.

    def run_at(self, offset: int, length: int) -> Run:
        """Tell what a range begins with: the longest run of one kind that is found at once.

        Raises:
            OSError: EIO, the tables are damaged; or they cannot be read.
        """
        geometry = self.geometry
        index = offset >> geometry.cluster_bits
        table = self.tables.get(index >> geometry.l2_bits)
        if table is None:
            with self.lock:
                table = self.load(index >> geometry.l2_bits)
            if table is None:
                rest = geometry.covered - offset % geometry.covered
                return Run(Kind.UNALLOCATED, 0, min(length, rest))
        if geometry.extended:
            with self.lock:
                return self._extended_run(table, offset, length)
        return self.standard_run(table, offset, length)

    def standard_run(self, table: L2Table, offset: int, length: int) -> Run:
        """Tell what a range begins with by its table of standard entries; it takes no lock.

        Raises:
            OSError: EIO, the table is damaged.
        """
        geometry = self.geometry
        index = offset >> geometry.cluster_bits
        words = table.words
        at = index & geometry.l2_mask
        entry = words[at]
        kind, position = self.standard_entry(entry)
        within = offset & geometry.cluster_mask
        count = geometry.cluster_size - within
        if kind is Kind.DATA:
            self.check_place(position, offset - within)
        if kind is Kind.COMPRESSED:
            return Run(kind, entry, min(count, length))
        entries = geometry.l2_entries
        step = geometry.cluster_size if kind is Kind.DATA else 0
        plain = entry & ~COPIED
        while count < length:
            at += 1
            plain += step
            if at == entries or words[at] & ~COPIED != plain:
                break
            count += geometry.cluster_size
        return Run(kind, position + within if step else 0, min(count, length))

    def standard_entry(self, entry: int) -> tuple[Kind, int]:
        """Tell what a standard L2 entry means, and the host cluster that it names or 0.

        A host cluster is named by `DATA`, and by `ZERO` where space stays allocated.

        Raises:
            OSError: EIO, it cannot be.
        """
        if entry & COMPRESSED:
            return Kind.COMPRESSED, 0
        position = entry & OFFSET
        if position & self.geometry.cluster_mask:
            raise self.found_damage(f"the host cluster {position:#x} does not begin at a cluster")
        if entry & ZERO:
            if not self.geometry.has_zero_flag:
                raise self.found_damage("an L2 entry has a zero flag that version 2 does not know")
            return Kind.ZERO, position
        # Cluster 0 of an external data file can be told from none by the COPIED flag only.
        if position or (entry & COPIED and self.data is not self.file):
            return Kind.DATA, position
        return Kind.UNALLOCATED, 0

    def check_place(self, position: int, offset: int) -> None:
        """See that a guest cluster is where it has to be in an external data file.

        Raises:
            OSError: EIO, it is not (Header, External data file bit).
        """
        if self.data is not self.file and position != offset:
            raise self.found_damage(f"guest cluster {offset:#x} is elsewhere in the data file")

    def _extended_run(self, table: L2Table, offset: int, length: int) -> Run:
        geometry = self.geometry
        at = 2 * (offset >> geometry.cluster_bits & geometry.l2_mask)
        within = offset & geometry.cluster_mask
        kind, position, bitmap = self.extended_entry(table.words[at], table.words[at + 1])
        if kind is Kind.COMPRESSED:
            return Run(kind, table.words[at], min(geometry.cluster_size - within, length))
        number = within // geometry.granule
        kind = subcluster_kind(bitmap, number)
        if kind is Kind.DATA:
            self.check_place(position, offset - within)
        count = geometry.granule - within % geometry.granule
        expected = position
        while count < length:
            number += 1
            if number == 32:
                number = 0
                at += 2
                expected += geometry.cluster_size
                if at == 2 * geometry.l2_entries:
                    break
                following, host, bitmap = self.extended_entry(table.words[at], table.words[at + 1])
                if following is Kind.COMPRESSED or (kind is Kind.DATA and host != expected):
                    break
            if subcluster_kind(bitmap, number) is not kind:
                break
            count += geometry.granule
        return Run(kind, position + within if kind is Kind.DATA else 0, min(count, length))

    def extended_entry(self, entry: int, bitmap: int) -> tuple[Kind, int, int]:
        """Tell what an extended L2 entry means: kind, host cluster or 0, subcluster bitmap.

        The kind is `COMPRESSED`, or `DATA` if there is a host cluster, or else `UNALLOCATED`.

        Raises:
            OSError: EIO, it cannot be.
        """
        if entry & COMPRESSED:
            return Kind.COMPRESSED, 0, 0
        position = entry & OFFSET
        has_cluster = bool(position or (entry & COPIED and self.data is not self.file))
        if (
            position & self.geometry.cluster_mask
            or entry & ZERO
            or not is_sane_bitmap(bitmap)
            or (not has_cluster and bitmap & 0xFFFF_FFFF)
        ):
            raise self.found_damage(f"the extended L2 entry {entry:#018x} {bitmap:#018x}")
        return Kind.DATA if has_cluster else Kind.UNALLOCATED, position, bitmap

    # L2 tables.

    def load(self, index: int) -> L2Table | None:
        """Give an L2 table, from disk if need be; None where there is none. With the lock held.

        The lock is given back while the disk is read, so whatever was seen before may not hold any
        more. The table cannot have changed meanwhile: who would change it has to load it, too.

        Raises:
            OSError: EIO, the L1 entry is damaged; or it cannot be read.
        """
        while True:
            table = self.tables.get(index)
            if table is not None:
                return table
            offset = self.l1[index] & OFFSET
            if not offset:
                return None
            if index not in self._loading:
                break
            self.lock.wait()
        size = self.geometry.cluster_size
        if offset & self.geometry.cluster_mask or offset >= self.file.size:
            raise self.found_damage(f"L1 entry {index} names an L2 table at {offset:#x}")
        self._loading.add(index)
        try:
            with unlocked(self.lock):
                words = words_of(_read(self.file, offset, size))
            table = L2Table(index, offset, words)
            self.keep(table)
        finally:
            self._loading.remove(index)
            self.lock.notify_all()
        return table

    def is_at_hand(self, index: int) -> bool:
        """Tell whether an L2 table needs not be read: it is in memory, or there is none."""
        return index in self.tables or not self.l1[index] & OFFSET

    def keep(self, table: L2Table) -> None:
        """Have a table in memory, and throw out old ones that need not be there."""
        if len(self.tables) >= self._most_tables:
            surplus = len(self.tables) - self._most_tables + 1
            clean = (i for i, t in self.tables.items() if not (t.high or t.fresh or t.writing))
            for index in [i for i, _ in zip(clean, range(surplus), strict=False)]:
                del self.tables[index]
        self.tables[table.index] = table

    def mark(self, table: L2Table, low: int, high: int) -> None:
        """Note that a table's words from `low` to before `high` have changed. With the lock."""
        if table.high:
            table.low = min(table.low, low)
            table.high = max(table.high, high)
        else:
            table.low, table.high = low, high
            self.changed[table.index] = table

    @property
    def is_crowded(self) -> bool:
        """Whether many tables in memory have changes that are not on disk."""
        return len(self.changed) >= self._most_tables // 2

    # Damage.

    def found_damage(self, what: str) -> OSError:
        """Note that the image is damaged; from then on nothing is written to it.

        Version 3 has a bit to tell others.

        Returns:
            The error to raise.
        """
        if self.damage is None:
            self.damage = what
            if not self.file.read_only and self.header.version >= 3:
                self.set_incompatible(Incompatible.CORRUPT)
        return OSError(errno.EIO, f"{self.name} is damaged: {what}")

    def check_damage(self) -> None:
        """Refuse to go on changing an image that was found damaged.

        Raises:
            OSError: EIO.
        """
        if self.damage is not None:
            raise OSError(errno.EIO, f"{self.name} is damaged: {self.damage}")

    def set_incompatible(self, bit: int) -> None:
        """Set an incompatible feature bit on disk."""
        self.header, at, patch = self.header.with_features(
            incompatible=self.header.incompatible | bit
        )
        self.file.write_at(patch, at)

    def unpack(self, entry: int) -> bytes:
        """Give the content of a compressed cluster.

        Raises:
            OSError: EIO, it is damaged; or it cannot be read.
        """
        if self.compressed is None:
            try:
                self.compressed = CompressedClusters(
                    self.file, self.geometry, self.header.compression
                )
            except StorageError as error:
                raise OSError(errno.ENOTSUP, str(error)) from None
        return self.compressed.read(entry)


def read_header(file: ImageFile) -> Header:
    """Read an image's header.

    Raises:
        StorageError: see `parse_header`; or it cannot be read.
    """
    length = first_cluster(file.name, _read(file, 0, HEAD_LENGTH))
    return parse_header(file.name, _read(file, 0, length), file.size)


def _read(file: ImageFile, offset: int, length: int) -> bytes:
    data = bytearray(length)
    if length:  # where nothing is, the offset may be any number
        file.read_at(memoryview(data), offset)
    return bytes(data)
