"""Everything in an image that refers to host clusters, and refcounts made anew from that.

It is needed where refcounts cannot be trusted: an image with the dirty bit (Header, Lazy
refcounts) was not closed, and must not be written to before they are right again. The dirty bit
stays until all is on disk, so it may be cut off at any moment and done again.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from typing import Final

from nbdlink.errors import StorageError
from nbdlink.storage.qcow2.bitmaps import Bitmaps
from nbdlink.storage.qcow2.counts import counts_of
from nbdlink.storage.qcow2.header import MAX_REFCOUNT_TABLE_SIZE, Incompatible
from nbdlink.storage.qcow2.image import Image
from nbdlink.storage.qcow2.tables import (
    COMPRESSED,
    COPIED,
    OFFSET,
    bytes_of,
    words_of,
)

_MAX_COUNTS: Final = 1 << 30
"""Bytes of counts in memory: enough for 8 TiB of clusters of 64 KiB."""

_REPAIR: Final = "look at it with qemu-img check; qemu-img check -r all may repair it"


class References:
    """Counts how often each host cluster of an image is referred to.

    A damaged image costs no more than a good one: tables are read once, however often they are
    named, and the counts are given up on when they need too much memory.

    Attributes:
        table: the refcount table.
        per_block: clusters that a refcount block counts.
    """

    def __init__(self, image: Image) -> None:
        """Walk through the whole image.

        Raises:
            StorageError: something refers to where nothing can be, or there is too much of it.
        """
        self._image = image
        header = image.header
        self._bits = header.cluster_bits
        self._clusters = -(-image.file.size // header.cluster_size)
        self.per_block = header.cluster_size * 8 >> header.refcount_order
        # Counts by pages, as the clusters of a sparse file may be far from each other.
        self._per_page = min(512, self.per_block)
        self._pages: dict[int, array[int]] = {}
        self.add("header", 0, header.cluster_size)
        self._tables()
        self.add("snapshot table", header.snapshots_offset, image.snapshot_table_length)
        self._refcounts()
        self._bitmaps()

    @property
    def blocks(self) -> set[int]:
        """The indexes of the refcount blocks that are needed."""
        return {page * self._per_page // self.per_block for page in self._pages}

    def counts(self, block: int) -> Iterator[tuple[int, int]]:
        """Give the counts of a refcount block that are not 0: where in the block, and count."""
        first = block * self.per_block // self._per_page
        for page in range(first, first + self.per_block // self._per_page):
            start = page * self._per_page - block * self.per_block
            for number, count in enumerate(self._pages.get(page, ())):
                if count:
                    yield start + number, count

    def count(self, cluster: int) -> int:
        """Give the references to a cluster."""
        page, within = divmod(cluster, self._per_page)
        return self._pages[page][within] if page in self._pages else 0

    def change(self, cluster: int, by: int) -> None:
        """Count references to a cluster."""
        page, within = divmod(cluster, self._per_page)
        counts = self._pages.get(page)
        if counts is None:
            if (len(self._pages) + 1) * self._per_page * 8 > _MAX_COUNTS:
                raise StorageError(
                    f"{self._image.name}: making its refcounts anew takes more than "
                    f"{_MAX_COUNTS >> 20} MiB of memory",
                    hint=_REPAIR,
                )
            counts = self._pages[page] = array("Q", bytes(8 * self._per_page))
        counts[within] += by

    def add(self, what: str, offset: int, length: int, times: int = 1) -> None:
        """Count references to all clusters of an area.

        Raises:
            StorageError: it is not inside of the file.
        """
        if not length:
            return
        last = offset + length - 1 >> self._bits
        if last >= self._clusters:
            raise StorageError(
                f"{self._image.name}: {what} at {offset:#x} is behind the end of the file",
                hint=_REPAIR,
            )
        for cluster in range(offset >> self._bits, last + 1):
            self.change(cluster, times)

    def _words(self, offset: int, count: int) -> array[int]:
        data = bytearray(count * 8)
        if count:  # where nothing is, the offset may be any number
            self._image.file.read_at(memoryview(data), offset)
        return words_of(data)

    def _aligned(self, what: str, offset: int) -> None:
        if offset & self._image.geometry.cluster_mask:
            raise StorageError(
                f"{self._image.name}: {what} at {offset:#x} does not begin at a cluster",
                hint=_REPAIR,
            )

    def _tables(self) -> None:
        image = self._image
        geometry = image.geometry
        l2: Counter[int] = Counter()
        l1 = [(image.header.l1_offset, image.header.l1_size)]
        l1 += [(snapshot.l1_offset, snapshot.l1_size) for snapshot in image.snapshots]
        for offset, size in l1:
            self.add("an L1 table", offset, size * 8)
            l2.update(entry & OFFSET for entry in self._words(offset, size) if entry & OFFSET)
        step = 2 if geometry.extended else 1
        external = image.data is not image.file
        for offset, times in l2.items():
            self._aligned("an L2 table", offset)
            self.add("an L2 table", offset, geometry.cluster_size, times)
            for word in self._words(offset, geometry.cluster_size // 8)[::step]:
                if word & COMPRESSED:
                    position, length = geometry.compressed_area(word)
                    # The last sectors may be behind the end; the first cluster may not.
                    end = max(position + 1, self._clusters << self._bits)
                    self.add("a compressed cluster", position, min(length, end - position), times)
                elif word & OFFSET and not external:
                    self._aligned("a cluster", word & OFFSET)
                    self.add("a cluster", word & OFFSET, geometry.cluster_size, times)

    def _refcounts(self) -> None:
        header = self._image.header
        length = header.refcount_table_clusters * header.cluster_size
        self.add("refcount table", header.refcount_table_offset, length)
        self.table = self._words(header.refcount_table_offset, length // 8)
        seen = set()
        for entry in self.table:
            if entry:
                self._aligned("a refcount block", entry & OFFSET)
                if not entry & OFFSET or entry in seen:
                    raise StorageError(
                        f"{self._image.name}: the refcount table is damaged", hint=_REPAIR
                    )
                seen.add(entry)
                self.add("a refcount block", entry & OFFSET, header.cluster_size)

    def _bitmaps(self) -> None:
        image = self._image
        header = image.header
        if header.bitmaps is None:
            return
        self.add("bitmap directory", header.bitmaps.offset, header.bitmaps.size)
        for bitmap in Bitmaps(image.file, header, image.size).all:
            self.add("a bitmap table", bitmap.table_offset, bitmap.table_size * 8)
            for entry in self._words(bitmap.table_offset, bitmap.table_size):
                if entry & OFFSET:
                    self._aligned("a bitmap's cluster", entry & OFFSET)
                    self.add("a bitmap's cluster", entry & OFFSET, header.cluster_size)


def rebuild(image: Image) -> None:
    """Write an image's refcounts anew, set its COPIED flags, and clear the dirty bit.

    Raises:
        StorageError: the image is damaged in other ways.
        OSError: it cannot be read or written.
    """
    references = References(image)
    header = image.header
    table = references.table
    bits = header.cluster_bits
    offset, clusters = header.refcount_table_offset, header.refcount_table_clusters
    # Blocks that are missing, and a longer table if need be, go behind everything.
    end = -(-image.file.size // header.cluster_size)
    while missing := [k for k in references.blocks if k >= len(table) or not table[k]]:
        if max(missing) < len(table):
            for index in missing:
                table[index] = end << bits
                references.change(end, 1)
                end += 1
            continue
        for cluster in range(offset >> bits, (offset >> bits) + clusters):
            references.change(cluster, -1)
        clusters = (max(missing) + 1) * 8 // header.cluster_size + 1
        offset = end << bits
        if clusters * header.cluster_size > MAX_REFCOUNT_TABLE_SIZE:
            raise StorageError(f"{image.name}: its refcount table is at its limit")
        table.extend(array("Q", bytes(clusters * header.cluster_size - 8 * len(table))))
        for cluster in range(end, end + clusters):
            references.change(cluster, 1)
        end += clusters
    _write_blocks(image, references, table)
    image.file.write_at(bytes_of(table), offset)
    _set_copied(image, references)
    image.file.flush()
    if offset != header.refcount_table_offset:
        header, at, patch = header.with_refcount_table(offset, clusters)
        image.file.write_at(patch, at)
        image.file.flush()
    if header.is_dirty:
        header, at, patch = header.with_features(
            incompatible=header.incompatible & ~Incompatible.DIRTY
        )
        image.file.write_at(patch, at)
        image.file.flush()
    image.header = header


def _write_blocks(image: Image, references: References, table: array[int]) -> None:
    header = image.header
    most = (1 << (1 << header.refcount_order)) - 1
    for index, entry in enumerate(table):
        if not entry:
            continue
        block = counts_of(bytes(header.cluster_size), header.refcount_order)
        for within, count in references.counts(index):
            if count > most:
                raise StorageError(
                    f"{image.name}: a cluster has {count} references, more than fit", hint=_REPAIR
                )
            block[within] = count
        image.file.write_at(block.pack(), entry & OFFSET)


def _set_copied(image: Image, references: References) -> None:
    """Have the COPIED flags of the active tables agree with the refcounts."""
    geometry = image.geometry
    bits = geometry.cluster_bits
    step = 2 if geometry.extended else 1
    external = image.data is not image.file
    for index, entry in enumerate(image.l1):
        offset = entry & OFFSET
        if not offset:
            continue
        right = offset | (COPIED if references.count(offset >> bits) == 1 else 0)
        if right != entry:
            image.l1[index] = right
            at = image.header.l1_offset + 8 * index
            image.file.write_at(right.to_bytes(8, "big"), at)
        data = bytearray(geometry.cluster_size)
        image.file.read_at(memoryview(data), offset)
        words = words_of(data)
        changed = False
        for number in range(0, len(words), step):
            word = words[number]
            if word & COMPRESSED or not word & OFFSET or external:
                continue
            copied = references.count((word & OFFSET) >> bits) == 1
            if bool(word & COPIED) != copied:
                words[number] = word ^ COPIED
                changed = True
        if changed:
            image.file.write_at(bytes_of(words), offset)
