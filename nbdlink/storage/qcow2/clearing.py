"""Zeroes and holes: guest clusters that give up their data without being written.

Version 3 can say of a cluster (or subcluster) that it reads as zeroes, whatever the backing file
has there. Its space is given back if that is allowed, and stays its own otherwise. Version 2
can only take a cluster away, and where there is a backing file that would bring its old content
back: there nothing is done, and `zero` has to write.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Final

from nbdlink.storage.qcow2.allocation import Writer
from nbdlink.storage.qcow2.image import L2Table
from nbdlink.storage.qcow2.tables import (
    ALL_ALLOCATED,
    ALL_ZERO,
    COPIED,
    ZERO,
    Kind,
    subcluster_bits,
)

_AT_ONCE: Final = 16384
"""Clusters that are cleared without letting others have the metadata lock."""


def can_clear(writer: Writer, *, may_trim: bool) -> bool:
    """Tell whether `clear` makes clusters read as zeroes."""
    return writer.image.header.version >= 3 or (may_trim and not writer.backing_size)


def clear(writer: Writer, offset: int, end: int, *, may_trim: bool) -> list[tuple[int, int]]:
    """Have guest clusters, or subclusters, read as zeroes; see `can_clear`.

    Args:
        writer: of the image.
        offset: where to begin, a multiple of the granule.
        end: where to end, a multiple of the granule or not less than the disk's size.
        may_trim: whether their space may be given back.

    Returns:
        Ranges, begin and end, that this was impossible for: parts of compressed clusters.

    Raises:
        OSError: there is no room for an L2 table; the image is damaged; or the disk refuses.
    """
    geometry = writer.image.geometry
    left: list[tuple[int, int]] = []
    while offset < end:
        if writer.writeback.is_crowded:  # a range may be as long as the disk
            writer.writeback.sync()
        index = offset >> geometry.cluster_bits
        last = min(end - 1 >> geometry.cluster_bits, index | geometry.l2_mask, index + _AT_ONCE)
        limit = min(end, last + 1 << geometry.cluster_bits)
        emptied: set[int] = set()
        change = functools.partial(_clear_part, writer, offset, limit, emptied, may_trim=may_trim)
        with writer.image.lock:
            left += writer.at_hand(index, last, change)
            writer.in_flight |= emptied
        if emptied:
            _discard(writer, emptied)
        offset = limit
    return left


def _discard(writer: Writer, clusters: set[int]) -> None:
    """Give the space of guest clusters in an external data file back.

    There the place stays the guest cluster's own. Were the power cut now, it would read as zeroes
    already, which it may. Until this is done nobody else writes there: they are in flight.
    """
    image = writer.image
    size = image.geometry.cluster_size
    try:
        for index in sorted(clusters):
            with contextlib.suppress(OSError):  # the space stays, and nothing is lost
                image.data.discard_at(index * size, size)
    finally:
        with image.lock:
            writer.in_flight -= clusters
            image.lock.notify_all()


def _clear_part(
    writer: Writer, offset: int, end: int, emptied: set[int], *, may_trim: bool
) -> list[tuple[int, int]]:
    """Do what `clear` does, in one table, with the lock held.

    Guest clusters whose place in an external data file is not needed any more go to `emptied`.
    """
    image = writer.image
    number = offset >> image.geometry.cluster_bits + image.geometry.l2_bits
    if not image.l1[number] and offset >= writer.backing_size:
        return []
    table = writer.writable_table(number)
    if image.geometry.extended:
        return _clear_extended(writer, table, offset, end, emptied, may_trim=may_trim)
    _clear_standard(writer, table, offset, end, emptied, may_trim=may_trim)
    return []


def _clear_standard(
    writer: Writer, table: L2Table, offset: int, end: int, emptied: set[int], *, may_trim: bool
) -> None:
    image, geometry = writer.image, writer.image.geometry
    index, last = offset >> geometry.cluster_bits, end - 1 >> geometry.cluster_bits
    plain = ZERO if image.header.version >= 3 else 0
    words = table.words
    start = index & geometry.l2_mask
    for at in range(start, start + last - index + 1):
        entry = words[at]
        kind, host = image.standard_entry(entry)
        offset = index + at - start << geometry.cluster_bits
        if kind is Kind.UNALLOCATED and offset >= writer.backing_size:
            continue
        if kind is Kind.ZERO and not (host and may_trim):
            continue
        if kind is Kind.DATA and entry & COPIED and not may_trim:
            words[at] = entry | ZERO
        else:
            words[at] = plain
            _give_back(writer, entry, index + at - start, emptied)
        image.mark(table, at, at + 1)


def _clear_extended(
    writer: Writer, table: L2Table, offset: int, end: int, emptied: set[int], *, may_trim: bool
) -> list[tuple[int, int]]:
    image, geometry = writer.image, writer.image.geometry
    size, granule = geometry.cluster_size, geometry.granule
    left = []
    while offset < end:
        begin = offset & ~geometry.cluster_mask
        limit = min(end, begin + size)
        at = 2 * (offset >> geometry.cluster_bits & geometry.l2_mask)
        entry = table.words[at]
        kind, host, bitmap = image.extended_entry(entry, table.words[at + 1])
        low, high = (offset - begin) // granule, (limit - 1 - begin) // granule
        if limit >= image.size:
            high = 31  # nobody sees what is behind the end
        bits = subcluster_bits(low, high)
        whole = bits == ALL_ALLOCATED
        new = (bitmap & ~bits) | bits << 32
        if kind is Kind.COMPRESSED and not whole:
            left.append((offset, limit))
        elif kind is Kind.UNALLOCATED and not bitmap and offset >= writer.backing_size:
            pass
        else:
            if whole:
                new = ALL_ZERO
            if kind is Kind.COMPRESSED or (whole and host and (may_trim or not entry & COPIED)):
                table.words[at] = 0
                _give_back(writer, entry, begin >> geometry.cluster_bits, emptied)
            table.words[at + 1] = new
            image.mark(table, at, at + 2)
        offset = limit
    return left


def _give_back(writer: Writer, entry: int, index: int, emptied: set[int]) -> None:
    image = writer.image
    if clusters := writer.host_clusters(entry):
        writer.writeback.give_back(*clusters)
    elif image.data is not image.file and writer.writeback.discard:
        emptied.add(index)
