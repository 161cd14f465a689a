"""Persistent dirty bitmaps: reading them, and keeping them true while the image is written to.

An enabled bitmap (flag `auto`) has to know of every write by anybody. So when an image is
opened for writing, its enabled bitmaps are marked in use on disk before the first write. Bits
are set in memory only, and written when the image is closed; then the mark goes. A bitmap that
was in use when the power went stays marked, and everybody knows that it cannot be trusted.
Disabled bitmaps do not change and are left alone.

Closing writes in this order, with a flush behind each: the bitmap's clusters (of which the new
ones are counted first), the entries of the bitmap table that name the new ones, the flags.

A bitmap in memory is a list with an item for each entry of the bitmap table: `False` for a
cluster of zeroes, `True` for ones, or the bytes themselves, which are read when they are needed.
"""

from __future__ import annotations

import errno
import re
import struct
import threading
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from nbdlink.errors import StorageError
from nbdlink.protocol.chunks import Extent
from nbdlink.storage.imagefile import ImageFile
from nbdlink.storage.qcow2.header import Header, check_area
from nbdlink.storage.qcow2.tables import OFFSET, words_of

_ENTRY: Final = struct.Struct(">QIIBBHI")
_FLAGS_AT: Final = 12
_IN_USE: Final = 1 << 0
_AUTO: Final = 1 << 1
_EXTRA_DATA_COMPATIBLE: Final = 1 << 2
_DIRTY_TRACKING: Final = 1
_MAX_NAME: Final = 1023
_MAX_SIZE: Final = 512 << 20
"""Bytes of the largest bitmap; QEMU's limit."""
_MAX_TABLES: Final = 64 << 20
"""Bytes of all bitmap tables that are kept in memory: eight of the largest ones. A sparse file may
have thousands, and take up nothing."""

DIRTY: Final = 1
"""The flag of `qemu:dirty-bitmap` extents (docs/interop/nbd.rst in QEMU's sources)."""

_NOT_ZEROES: Final = re.compile(rb"[^\x00]")
_NOT_ONES: Final = re.compile(rb"[^\xff]")


@dataclass(slots=True)
class Bitmap:
    """One dirty bitmap.

    Attributes:
        name: unique in the image.
        flags: as on disk.
        granularity_bits: log2 of the bytes that a bit stands for.
        table_offset: where the bitmap table is.
        table_size: entries of it.
        flags_at: where in the file `flags` are.
        is_known: whether this driver may use it: no extra data that it would have to know.
        table: offsets of the clusters on disk, or 0 or 1.
        chunks: see above; None for what was not read yet.
        changed: numbers of the chunks that are not on disk as they are here.
        lock: for setting bits and reading chunks.
    """

    name: str
    flags: int
    granularity_bits: int
    table_offset: int
    table_size: int
    flags_at: int
    is_known: bool
    table: array[int] = field(default_factory=lambda: array("Q"))
    chunks: list[bytearray | bool | None] = field(default_factory=list)
    changed: set[int] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def is_consistent(self) -> bool:
        """Whether what is on disk can be trusted."""
        return self.is_known and not self.flags & _IN_USE

    @property
    def is_enabled(self) -> bool:
        """Whether it follows writes."""
        return bool(self.flags & _AUTO)


class Bitmaps:
    """The bitmaps of an open image.

    Attributes:
        consistent: by name, those that can be told of.
        all: all that are in the directory.
    """

    def __init__(self, file: ImageFile, header: Header, size: int, *, wanted: bool = True) -> None:
        """Read the directory and the bitmap tables.

        Args:
            file: the image.
            header: of the image.
            size: bytes of the virtual disk.
            wanted: whether to look at all; if not, there are none.

        Raises:
            StorageError: they are damaged.
        """
        self._file = file
        self._cluster = header.cluster_size
        self._size = size
        self.all: list[Bitmap] = []
        self.consistent: dict[str, Bitmap] = {}
        self._tracked: list[Bitmap] = []
        extension = header.bitmaps
        if extension is None or not wanted:
            return
        if not extension.size:
            raise StorageError(f"{file.name}: the bitmap directory is damaged")
        buffer = bytearray(extension.size)
        file.read_at(memoryview(buffer), extension.offset)
        data = bytes(buffer)
        position = tables = kept = 0
        for number in range(extension.count):
            bitmap, length = self._parse(data, position, number + 1)
            bitmap.flags_at += extension.offset
            position += length
            self.all.append(bitmap)
            # Each has its own table, so that all together are no longer than the file.
            tables += 8 * bitmap.table_size
            if tables > file.size:
                raise StorageError(f"{file.name}: the bitmap tables overlap")
            kept += 8 * len(bitmap.table)
            if kept > _MAX_TABLES:
                raise StorageError(
                    f"{file.name}: its bitmaps are too large to be kept in memory",
                    hint="remove some: qemu-img bitmap --remove",
                )
        if len({bitmap.name for bitmap in self.all}) < len(self.all) or position != len(data):
            raise StorageError(f"{file.name}: the bitmap directory is damaged")
        self.consistent = {b.name: b for b in self.all if b.is_consistent}

    def _parse(self, data: bytes, position: int, number: int) -> tuple[Bitmap, int]:
        refusal = StorageError(f"{self._file.name}: bitmap {number} is damaged")
        if position + _ENTRY.size > len(data):
            raise refusal
        offset, entries, flags, kind, bits, name_size, extra = _ENTRY.unpack_from(data, position)
        end = position + _ENTRY.size + extra + name_size
        if end > len(data) or not 0 < name_size <= _MAX_NAME or kind != _DIRTY_TRACKING:
            raise refusal
        if flags >> 3 or not 9 <= bits <= 31:
            raise refusal
        name = data[end - name_size : end].decode(errors="replace")
        needed = -(-self._size // (1 << bits))
        chunks = -(-needed // (8 * self._cluster))
        bitmap = Bitmap(
            name=name,
            flags=flags,
            granularity_bits=bits,
            table_offset=offset,
            table_size=entries,
            flags_at=position + _FLAGS_AT,
            is_known=not extra or bool(flags & _EXTRA_DATA_COMPATIBLE),
        )
        clusters = -(-self._file.size // self._cluster)
        what = f"table of bitmap {name!r}"
        limit = _MAX_SIZE // self._cluster * 8
        check_area(self._file.name, what, offset, entries * 8, limit, self._cluster, clusters)
        if bitmap.is_consistent:
            if entries != chunks:
                raise refusal
            table = bytearray(entries * 8)
            if entries:
                self._file.read_at(memoryview(table), offset)
            bitmap.table = words_of(table)
            for entry in bitmap.table:
                host = entry & OFFSET
                if host % self._cluster or host >= clusters * self._cluster:
                    raise refusal
            bitmap.chunks = [None if e & OFFSET else bool(e) for e in bitmap.table]
        return bitmap, -(-(end - position) // 8) * 8

    # Reading.

    def _chunk(self, bitmap: Bitmap, number: int) -> bytearray | bool:
        chunk = bitmap.chunks[number]
        if chunk is None:
            with bitmap.lock:
                chunk = bitmap.chunks[number]
                if chunk is None:
                    chunk = bytearray(self._cluster)
                    self._file.read_at(memoryview(chunk), bitmap.table[number] & OFFSET)
                    bitmap.chunks[number] = chunk
        return chunk

    def extents(self, name: str, offset: int, length: int) -> Iterator[Extent]:
        """Tell which parts of a range are dirty.

        Raises:
            OSError: ENOENT, there is no such bitmap; or it cannot be read.
        """
        bitmap = self.consistent.get(name)
        if bitmap is None:
            raise OSError(errno.ENOENT, f"{self._file.name} has no bitmap {name!r} to tell of")
        bits = bitmap.granularity_bits
        per_chunk = 8 * self._cluster
        end = offset + length
        while offset < end:
            number, bit = divmod(offset >> bits, per_chunk)
            chunk = self._chunk(bitmap, number)
            if isinstance(chunk, bool):
                flag, until = chunk, per_chunk
            else:
                flag, until = _run(chunk, bit)
            limit = min(end, number * per_chunk + until << bits)
            yield Extent(limit - offset, DIRTY if flag else 0)
            offset = limit

    # Writing.

    def begin_tracking(self) -> None:
        """Mark the enabled bitmaps as in use, durably, and follow writes from now on."""
        for bitmap in self.all:
            if bitmap.is_enabled and not bitmap.flags & _IN_USE:
                bitmap.flags |= _IN_USE
                self._write_flags(bitmap)
                if bitmap.is_known:
                    self._tracked.append(bitmap)
        if self.all:
            self._file.flush()

    def _write_flags(self, bitmap: Bitmap) -> None:
        self._file.write_at(bitmap.flags.to_bytes(4, "big"), bitmap.flags_at)

    @property
    def is_tracking(self) -> bool:
        """Whether writes have to be told."""
        return bool(self._tracked)

    def mark(self, offset: int, length: int) -> None:
        """Note that a range is being written to."""
        for bitmap in self._tracked:
            low = offset >> bitmap.granularity_bits
            high = offset + length - 1 >> bitmap.granularity_bits
            per_chunk = 8 * self._cluster
            while low <= high:
                number, first = divmod(low, per_chunk)
                last = min(high - number * per_chunk, per_chunk - 1)
                self._set(bitmap, number, first, last)
                low += last - first + 1

    def _set(self, bitmap: Bitmap, number: int, first: int, last: int) -> None:
        chunk = self._chunk(bitmap, number)
        if chunk is True:
            return
        # Mostly it is set already. Bits are never cleared, so this needs no lock.
        if first == last and chunk and chunk[first >> 3] >> (first & 7) & 1:
            return
        with bitmap.lock:
            if chunk is False:  # and perhaps another thread has seen that too
                now = bitmap.chunks[number]
                chunk = now if isinstance(now, bytearray) else bytearray(self._cluster)
                bitmap.chunks[number] = chunk
            assert isinstance(chunk, bytearray)
            bitmap.changed.add(number)
            low, high = first >> 3, last >> 3
            head, tail = 0xFF << (first & 7) & 0xFF, 0xFF >> 7 - (last & 7)
            if low == high:
                chunk[low] |= head & tail
            else:
                chunk[low] |= head
                chunk[high] |= tail
                chunk[low + 1 : high] = b"\xff" * (high - low - 1)

    def store(self, allocate: Callable[[], int], sync: Callable[[], None]) -> None:
        """Write the bitmaps that have followed writes, and take the mark away.

        Args:
            allocate: gives the offset of a new cluster.
            sync: makes refcounts durable, and everything that was written.

        Raises:
            OSError: they stay marked as in use.
        """
        entries: list[tuple[Bitmap, int]] = []
        for bitmap in self._tracked:
            for number in sorted(bitmap.changed):
                chunk = bitmap.chunks[number]
                assert isinstance(chunk, bytearray)
                offset = bitmap.table[number] & OFFSET
                if not offset:
                    offset = bitmap.table[number] = allocate()
                    entries.append((bitmap, number))
                self._file.write_at(bytes(chunk), offset)
        sync()
        for bitmap, number in entries:
            at = bitmap.table_offset + 8 * number
            self._file.write_at(bitmap.table[number].to_bytes(8, "big"), at)
        if entries:
            self._file.flush()
        for bitmap in self._tracked:
            bitmap.changed.clear()
            bitmap.flags &= ~_IN_USE
            self._write_flags(bitmap)
        if self._tracked:
            self._file.flush()
        self._tracked = []


def _run(chunk: bytearray, bit: int) -> tuple[bool, int]:
    """Tell whether a bit is set, and the number of the next one that is otherwise."""
    value = chunk[bit >> 3] >> (bit & 7) & 1
    until = bit + 1
    while until & 7:
        if chunk[until >> 3] >> (until & 7) & 1 != value:
            return bool(value), until
        until += 1
    found = (_NOT_ONES if value else _NOT_ZEROES).search(chunk, until >> 3)
    if not found:
        return bool(value), 8 * len(chunk)
    until = found.start() * 8
    while chunk[until >> 3] >> (until & 7) & 1 == value:
        until += 1
    return bool(value), until
