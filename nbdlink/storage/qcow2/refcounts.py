"""Which host clusters are in use: the refcount table, its blocks, and finding free clusters.

All methods are called with the metadata lock held. Those of which it is said give it back while
the disk works. What changes is kept in memory and written by `writeback`, but for two things that
are rare and have to be on disk in a certain order before they can be used; both are done at once,
and who needs them waits:

- A new refcount block is written and made durable before the refcount table points to it, and
  it counts itself: it is the first cluster of the range that it describes. A range without a
  block has no cluster in use, so that place is free.
- A new refcount table, and the blocks that count it, are made durable before the header points
  to it, which happens in one sector.

A refcount that is too high wastes space; one that is too low loses data. So raising one may be
written at any time, and lowering one is only done here after what referred to the cluster has
gone from the disk (`writeback`).
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Callable
from typing import Final, NamedTuple

from nbdlink.errors import StorageError
from nbdlink.storage.qcow2.counts import Counts, counts_of
from nbdlink.storage.qcow2.header import MAX_REFCOUNT_TABLE_SIZE
from nbdlink.storage.qcow2.image import Image, unlocked
from nbdlink.storage.qcow2.tables import MAX_OFFSET, OFFSET, bytes_of, words_of

_KEPT: Final = 4 << 20
"""Bytes of refcount blocks that are kept in memory."""


class NotAtHandError(Exception):
    """What is needed is not in memory, or not there; `Refcounts.fetch` gets what it can."""


class RefcountBlock:
    """A refcount block in memory.

    Attributes:
        index: of its entry in the refcount table.
        offset: where it is in the file.
        counts: of its clusters.
        low: the first count that is not on disk as it is here.
        high: behind the last one; 0 if all are.
        writing: whether it is on its way to the disk.
    """

    __slots__ = ("counts", "high", "index", "low", "offset", "writing")

    def __init__(self, index: int, offset: int, counts: Counts) -> None:
        self.index = index
        self.offset = offset
        self.counts = counts
        self.low = self.high = 0
        self.writing = False


class Area(NamedTuple):
    """Host clusters that follow each other.

    Attributes:
        first: number of the first cluster.
        clusters: how many.
        virgin: whether nothing was ever written there, so that they read as zeroes.
    """

    first: int
    clusters: int
    virgin: bool


class Refcounts:
    """The refcounts of an image that is open for writing.

    Attributes:
        metadata: numbers of the clusters that hold metadata. Nothing else is written there.
        changed: blocks that are not on disk as they are here, by index.
        end: behind the last cluster that the file has, or that was ever given out.
        give_back: takes the first number and the count of clusters that are not needed any
            more as soon as the disk says so.
    """

    def __init__(
        self, image: Image, metadata: set[int], give_back: Callable[[int, int], None]
    ) -> None:
        """Read the refcount table.

        Args:
            image: the image.
            metadata: clusters of metadata, but for refcount blocks.
            give_back: see above.

        Raises:
            StorageError: the refcount table is damaged.
        """
        self._image = image
        self._lock = image.lock
        self._file = image.file
        header = image.header
        self._order = header.refcount_order
        self._cluster = header.cluster_size
        self.per_block = self._cluster * 8 >> self._order
        self.end = -(-image.file.size // self._cluster)
        data = bytearray(header.refcount_table_clusters * self._cluster)
        image.file.read_at(memoryview(data), header.refcount_table_offset)
        self._table = words_of(data)
        self.metadata = metadata
        self.give_back = give_back
        for index, entry in enumerate(self._table):
            if not entry:
                continue
            offset = entry & OFFSET
            if offset % self._cluster or not 0 < offset < self.end * self._cluster:
                raise StorageError(
                    f"{image.name}: refcount block {index} is said to be at {entry:#x}",
                    hint="repair it: qemu-img check -r all",
                )
            metadata.add(offset // self._cluster)
        self._blocks: dict[int, RefcountBlock] = {}
        self.changed: dict[int, RefcountBlock] = {}
        self._most_blocks = max(4, _KEPT // self._cluster)
        self._hint = 0  # no cluster before is free
        self._loading: set[int] = set()
        self._growing = False

    # Blocks.

    @property
    def is_crowded(self) -> bool:
        """Whether many blocks in memory have changes that are not on disk."""
        return len(self.changed) > self._most_blocks // 2

    def _block(self, index: int) -> RefcountBlock | None:
        """Give a block; the lock is given back while it is read."""
        while True:
            block = self._blocks.get(index)
            if block is not None:
                return block
            if index >= len(self._table) or not self._table[index]:
                return None
            if index not in self._loading:
                break
            self._lock.wait()
        self._loading.add(index)
        try:
            data = bytearray(self._cluster)
            offset = self._table[index] & OFFSET
            with unlocked(self._lock):
                self._file.read_at(memoryview(data), offset)
            block = RefcountBlock(index, offset, counts_of(data, self._order))
            self._keep(block)
        finally:
            self._loading.remove(index)
            self._lock.notify_all()
        return block

    def _keep(self, block: RefcountBlock) -> None:
        if len(self._blocks) >= self._most_blocks:
            idle = [old for old in self._blocks.values() if not old.writing]
            old = next((one for one in idle if not one.high), next(iter(idle), None))
            if old is not None:
                if old.index in self.changed:
                    # Too high at worst, and that may be written whenever it suits. It goes to
                    # the page cache, and only if all blocks have changes (`is_crowded`). If it
                    # cannot be, the block stays.
                    self._file.write_at(*self.changes(old))
                    del self.changed[old.index]
                del self._blocks[old.index]
        self._blocks[block.index] = block

    def mark(self, block: RefcountBlock, low: int, high: int) -> None:
        """Note that a block's counts from `low` to before `high` have changed."""
        if block.high:
            block.low = min(block.low, low)
            block.high = max(block.high, high)
        else:
            block.low, block.high = low, high
            self.changed[block.index] = block

    def changes(self, block: RefcountBlock) -> tuple[bytes, int]:
        """Give the sectors of a block that have changed, and where in the file they belong."""
        begin = (block.low << self._order) // 8 // 512 * 512
        end = -(-(block.high << self._order) // 4096) * 512
        return block.counts.pack()[begin:end], block.offset + begin

    def count(self, cluster: int) -> int:
        """Give the refcount of a cluster; the lock may be given back."""
        block = self._block(cluster // self.per_block)
        return 0 if block is None else block.counts[cluster % self.per_block]

    def lower(self, cluster: int) -> None:
        """Lower a cluster's refcount by one. Nothing on disk refers to it any more.

        The lock may be given back before.

        Raises:
            OSError: EIO, it is 0 already: the image is damaged.
        """
        block = self._block(cluster // self.per_block)
        within = cluster % self.per_block
        count = block.counts[within] if block else 0
        if block is None or not count:
            raise self._image.found_damage(f"host cluster {cluster} was used with a refcount of 0")
        block.counts[within] = count - 1
        self.mark(block, within, within + 1)
        if count == 1:
            self.metadata.discard(cluster)
            self._hint = min(self._hint, cluster)

    def allocate(self, wanted: int, *, for_metadata: bool = False) -> Area:
        """Find free clusters that follow each other, and set their refcounts to 1.

        Args:
            wanted: clusters; there may be fewer, but at least one.
            for_metadata: whether they will hold metadata.

        Raises:
            NotAtHandError: call `fetch`, and then again; nothing has changed.
            OSError: ENOSPC, the format can have no more; EIO, the image is damaged.
        """
        self._image.check_damage()
        while True:
            index, within = divmod(self._hint, self.per_block)
            block = self._blocks.get(index)
            if block is None:
                raise NotAtHandError
            within = block.counts.find_free(within)
            if within < 0:
                self._hint = (index + 1) * self.per_block
                continue
            count = 1
            limit = min(wanted, self.per_block - within)
            while count < limit and not block.counts[within + count]:
                count += 1
            break
        first = index * self.per_block + within
        if (first + count) * self._cluster > MAX_OFFSET:
            raise OSError(errno.ENOSPC, f"{self._image.name} has reached the format's limit")
        for number in range(first, first + count):
            if number in self.metadata:
                raise self._image.found_damage(
                    f"host cluster {number} holds metadata and has a refcount of 0"
                )
        for number in range(within, within + count):
            block.counts[number] = 1
        self.mark(block, within, within + count)
        virgin = first >= self.end
        self.end = max(self.end, first + count)
        self._hint = first + count
        if for_metadata:
            self.metadata.update(range(first, first + count))
        return Area(first, count, virgin)

    def unallocate(self, first: int, count: int) -> None:
        """Take back clusters that were allocated and that nothing has ever referred to."""
        for cluster in range(first, first + count):
            self.lower(cluster)

    def fetch(self) -> None:
        """Read or make what `allocate` misses. The lock is given back meanwhile.

        Raises:
            OSError: ENOSPC, the format can have no more; EIO, the image is damaged; or the
                disk refuses.
        """
        if self._growing:
            self._lock.wait()
            return
        index = self._hint // self.per_block
        if index < len(self._table) and self._table[index]:
            self._block(index)
            return
        self._growing = True
        try:
            if index >= len(self._table):
                self._grow(index)
            else:
                self._new_block(index)
        finally:
            self._growing = False
            self._lock.notify_all()

    # Growing. One thread at a time does it.

    def _new_block(self, index: int) -> None:
        """Make the block of a range that has none."""
        first = index * self.per_block
        if first in self.metadata or (first + 1) * self._cluster > MAX_OFFSET:
            raise self._image.found_damage(f"metadata at host cluster {first} has no refcounts")
        block = RefcountBlock(
            index, first * self._cluster, counts_of(bytes(self._cluster), self._order)
        )
        block.counts[0] = 1
        at = self._image.header.refcount_table_offset + 8 * index
        with unlocked(self._lock):
            self._file.write_at(block.counts.pack(), block.offset)
            self._file.flush()
            self._file.write_at(block.offset.to_bytes(8, "big"), at)
        self._table[index] = block.offset
        self.metadata.add(first)
        self.end = max(self.end, first + 1)
        self._keep(block)

    def _grow(self, needed: int) -> None:
        """Make a longer refcount table, in the first clusters that the old one cannot count.

        Args:
            needed: an index that the new table must have.
        """
        old_length = len(self._table)
        per_cluster = self._cluster // 8
        blocks = clusters = 1
        while True:  # until the blocks count themselves and the table
            length = max(needed + 1, old_length + blocks) * 3 // 2
            clusters = -(-length // per_cluster)
            required = -(-(blocks + clusters) // self.per_block)
            if required <= blocks:
                break
            blocks = required
        if clusters * self._cluster > MAX_REFCOUNT_TABLE_SIZE:
            raise OSError(errno.ENOSPC, f"{self._image.name}: its refcount table is at its limit")
        first = old_length * self.per_block
        total = blocks + clusters
        if self.metadata.intersection(range(first, first + total)):
            raise self._image.found_damage(f"metadata at host cluster {first} has no refcounts")
        table = array("Q", bytes(clusters * self._cluster))
        table[:old_length] = self._table
        new = []
        for number in range(blocks):
            counts = counts_of(bytes(self._cluster), self._order)
            begin = number * self.per_block
            for within in range(max(0, min(total - begin, self.per_block))):
                counts[within] = 1
            block = RefcountBlock(old_length + number, (first + number) * self._cluster, counts)
            table[block.index] = block.offset
            new.append(block)
        offset = (first + blocks) * self._cluster
        with unlocked(self._lock):
            for block in new:
                self._file.write_at(block.counts.pack(), block.offset)
            self._file.write_at(bytes_of(table), offset)
            self._file.flush()
        old = self._image.header
        _, at, patch = old.with_refcount_table(offset, clusters)
        written = False
        try:
            with unlocked(self._lock):
                self._file.write_at(patch, at)
                written = True
                self._file.flush()
        except OSError as error:
            # Where there was no room nothing was written. Otherwise nobody knows which table the
            # header names now, so neither may be changed.
            if written or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                self._image.damage = "its header may name another refcount table; open it again"
            raise
        self._image.header = self._image.header.with_refcount_table(offset, clusters)[0]
        self._table = table
        self.metadata.update(range(first, first + total))
        self.end = max(self.end, first + total)
        for block in new:
            self._keep(block)
        self.give_back(old.refcount_table_offset // self._cluster, old.refcount_table_clusters)


def has_more_clusters_than_blocks(image: Image) -> bool:
    """Tell whether an image uses more clusters than the file system gave its file blocks.

    That is what `preallocation=metadata` leaves. QEMU finds it out in the same way.
    """
    header = image.header
    real = image.file.allocated // header.cluster_size
    enough = max(real * 10 // 9, real + 2)
    clusters = -(-image.file.size // header.cluster_size)
    if clusters < enough:
        return False
    per_block = header.cluster_size * 8 >> header.refcount_order
    table = bytearray(header.refcount_table_clusters << header.cluster_bits)
    image.file.read_at(memoryview(table), header.refcount_table_offset)
    used = 0
    for index, entry in enumerate(words_of(table)):
        left = clusters - index * per_block
        if left <= 0 or used >= enough:
            break
        offset = entry & OFFSET
        if offset and not offset % header.cluster_size:
            data = bytearray(header.cluster_size)
            image.file.read_at(memoryview(data), offset)
            used += counts_of(data, header.refcount_order).used(left)
    return used >= enough
