"""The short ways: requests that need no more than tables in memory and the page cache.

They are for whoever must not wait, as the thread that serves a connection. Each of them does all
of a request, or says that it cannot; then `Qcow2Storage` does it in a thread that may wait. So
nothing has to be known here of reasons, and doing a part of a write twice does no harm: it is not
answered yet.

No lock is waited for that is held for long, and nothing is read but by `read_now`.
A write of clusters that are there goes where it belongs, as any other (`Places`). One that takes
new clusters is prepared and linked as any other, if the refcounts for them are in memory and
nothing around it has to be copied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from nbdlink.storage.base import Storage
from nbdlink.storage.qcow2.allocation import Writer
from nbdlink.storage.qcow2.bitmaps import Bitmaps
from nbdlink.storage.qcow2.image import Image, L2Table
from nbdlink.storage.qcow2.refcounts import Refcounts
from nbdlink.storage.qcow2.tables import COPIED, OFFSET, Kind, subcluster_bits
from nbdlink.storage.qcow2.transfer import Reader, fill_zeroes, write_parts
from nbdlink.storage.qcow2.writeback import Epochs

HOLE: Final = 32 * 1024
"""Bytes from which on nothing but zeroes is worth an answer of its own, without data."""


class Places:
    """Where ranges within a cluster are in the data file, as far as that is seen at once.

    The caller has joined the users of the epoch before it asks, see `Epochs`.
    """

    def __init__(self, image: Image, refcounts: Refcounts | None) -> None:
        """Look in the tables of `image`; `refcounts` are there if it is open for writing."""
        geometry = image.geometry
        self._image = image
        self._tables = image.tables
        self._refcounts = refcounts
        self._external = image.data is not image.file
        self._extended = geometry.extended
        self._not_plain = geometry.not_plain
        self._offset_mask = geometry.offset_mask
        self._bits = geometry.cluster_bits
        self._mask = geometry.cluster_mask
        self._table_bits = geometry.cluster_bits + geometry.l2_bits
        self._l2_mask = geometry.l2_mask

    def of(self, offset: int, length: int) -> int:
        """Give where a range can be read, or 0."""
        table = self._tables.get(offset >> self._table_bits)
        within = offset & self._mask
        if table is None or within + length > self._mask + 1:
            return 0
        if self._extended:
            entry = self._extended_entry(table, offset, length)
        else:
            entry = table.words[offset >> self._bits & self._l2_mask]
        position = entry & self._offset_mask
        if not position or entry & self._not_plain:
            return 0
        if self._external and position != offset & ~self._mask:
            return 0  # damaged: the long way finds the words for it
        return position + within

    def to_overwrite(self, offset: int, length: int) -> int:
        """Give where a range can be overwritten, as only the active tables refer to it; or 0."""
        table = self._tables.get(offset >> self._table_bits)
        within = offset & self._mask
        if table is None or within + length > self._mask + 1:
            return 0
        if self._extended:
            entry = self._extended_entry(table, offset, length)
        else:
            entry = table.words[offset >> self._bits & self._l2_mask]
        position = entry & self._offset_mask
        if entry & self._not_plain or not entry & COPIED or not position:
            return 0
        # Where something is wrong, the long way finds the words for it.
        if self._external:
            return position + within if position == offset & ~self._mask else 0
        refcounts = self._refcounts
        assert refcounts is not None
        number = position >> self._bits
        if number in refcounts.metadata or number >= refcounts.end:
            return 0
        return position + within

    def _extended_entry(self, table: L2Table, offset: int, length: int) -> int:
        """Give the L2 entry of a range within a cluster; 0 if that is not allocated as a whole.

        The two words of an extended entry are read without the lock. Whoever links a cluster
        stores the first word first, and it holds all subclusters that the second word says are
        allocated, before and after that is stored too. While a request is under way no cluster
        comes back to where it was (`Epochs`). So if the first word is the same before and after
        the second one was read, the two belong together.
        """
        at = 2 * (offset >> self._bits & self._l2_mask)
        words = table.words
        entry, bitmap = words[at], words[at + 1]
        granule = self._image.geometry.granule
        within = offset & self._mask
        bits = subcluster_bits(within // granule, (within + length - 1) // granule)
        if bitmap & bits != bits or bitmap & bits << 32:
            return 0
        return entry if words[at] == entry else 0


class ShortWays:
    """Reads and writes of an image that wait for nothing."""

    def __init__(
        self,
        image: Image,
        epochs: Epochs,
        places: Places,
        bitmaps: Bitmaps,
        reader: Reader,
        writer: Writer | None,
        backing: Storage | None,
    ) -> None:
        """Do what can be done at once.

        Args:
            image: the image.
            epochs: its users.
            places: where its clusters are.
            bitmaps: its bitmaps; while they are tracked nothing is written here.
            reader: the long way to read; it is not taken where it had to wait.
            writer: for images that are open for writing.
            backing: the storage behind the image, or None.
        """
        self._image = image
        self._data = image.data
        self._epochs = epochs
        self._places = places
        self._bitmaps = bitmaps
        self._reader = reader
        self._writer = writer
        self._backing_size = backing.size if backing else 0
        self._read_backing: Callable[[memoryview, int], bool] | None = None
        if backing is not None and (below := backing.at_once):
            self._read_backing = below.read

    def read(self, buffer: memoryview, offset: int) -> bool:
        """Fill `buffer`, see `AtOnce.read`."""
        users = self._epochs.users
        users.append(None)
        try:
            position = self._places.of(offset, len(buffer))
            if position:
                return self._data.read_now(buffer, position)
            return self._read_runs(buffer, offset)
        except OSError:
            return False
        finally:
            users.pop()

    def _read_runs(self, buffer: memoryview, offset: int) -> bool:
        image = self._image
        geometry = image.geometry
        if geometry.extended:
            return False  # looking at pairs of words takes the lock
        shift = geometry.cluster_bits + geometry.l2_bits
        done, length = 0, len(buffer)
        while done < length:
            count = length - done
            table = image.tables.get(offset >> shift)
            if table is not None:
                kind, position, count = image.standard_run(table, offset, count)
            elif image.l1[offset >> shift] & OFFSET:
                return False
            else:
                kind, position = Kind.UNALLOCATED, 0
                count = min(count, geometry.covered - offset % geometry.covered)
            part = buffer[done : done + count]
            if kind is Kind.DATA:
                if not self._data.read_now(part, position):
                    return False
            elif kind is Kind.COMPRESSED:
                return False
            else:
                behind = 0
                if kind is Kind.UNALLOCATED and offset < self._backing_size:
                    behind = min(count, self._backing_size - offset)
                    if not (self._read_backing and self._read_backing(part[:behind], offset)):
                        return False
                if count - behind >= HOLE:
                    return False
                fill_zeroes(part[behind:])
            done += count
            offset += count
        return True

    def write(self, buffer: memoryview, offset: int) -> bool:
        """Write `buffer`, see `AtOnce.write`."""
        if self._bitmaps.is_tracking or self._image.damage is not None:
            return False
        writer = self._writer
        assert writer is not None
        users = self._epochs.users
        users.append(None)
        try:
            position = self._places.to_overwrite(offset, len(buffer))
            if position:
                self._data.write_at(buffer, position)
                return True
            if writer.writeback.is_crowded:
                return False
            return write_parts(self._reader, writer, buffer, offset, writer.prepare_at_once)
        except OSError:
            return False
        finally:
            users.pop()
