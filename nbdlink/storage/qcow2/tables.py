"""L1 and L2 tables: pure, no I/O.

A table is kept as `array("Q")` in the machine's byte order, one word for a standard entry and
two for an extended one. A word is replaced as a whole, so who reads one without a lock sees the
old or the new.
"""

from __future__ import annotations

import enum
import sys
from array import array
from typing import Final, NamedTuple

from nbdlink.storage.qcow2.header import Header

COPIED: Final = 1 << 63
COMPRESSED: Final = 1 << 62
ZERO: Final = 1
OFFSET: Final = 0x00FF_FFFF_FFFF_FE00
"""The bits of L1, L2 and bitmap table entries that are an offset in the file."""
MAX_OFFSET: Final = 1 << 56

SUBCLUSTERS: Final = 32
ALL_ALLOCATED: Final = (1 << 32) - 1
ALL_ZERO: Final = ALL_ALLOCATED << 32

_SWAP: Final = sys.byteorder == "little"


def words_of(data: bytes | bytearray | memoryview) -> array[int]:
    """Give big-endian 64-bit words as numbers."""
    words = array("Q", bytes(data))
    if _SWAP:
        words.byteswap()
    return words


def bytes_of(words: array[int]) -> bytes:
    """Give numbers as big-endian 64-bit words."""
    if _SWAP:
        words = words[:]
        words.byteswap()
    return words.tobytes()


class Kind(enum.Enum):
    """What a guest cluster, or a part of one, is made of."""

    DATA = "data"
    ZERO = "zero"
    UNALLOCATED = "unallocated"
    COMPRESSED = "compressed"


class Run(NamedTuple):
    """Guest bytes of one kind.

    Attributes:
        kind: what they are.
        position: of `DATA` in the file; the L2 entry of `COMPRESSED`; else 0.
        length: bytes.
    """

    kind: Kind
    position: int
    length: int


class Geometry:
    """Sizes that follow from the header.

    Attributes:
        cluster_bits: log2 of `cluster_size`.
        cluster_size: bytes of a cluster, host's and guest's.
        cluster_mask: `cluster_size - 1`.
        extended: whether L2 entries are extended.
        l2_bits: log2 of the entries of an L2 table.
        l2_entries: entries of an L2 table.
        l2_mask: `l2_entries - 1`.
        covered: guest bytes of an L2 table.
        granule: bytes that are allocated as one: a subcluster or a cluster.
        offset_mask: the bits of an entry that are the offset of a cluster.
        not_plain: bits that a standard entry with plain data has not.
        has_zero_flag: whether standard entries may say that a cluster reads as zeroes.
        compressed_shift: where in a compressed descriptor the number of sectors is.
    """

    __slots__ = (
        "cluster_bits",
        "cluster_mask",
        "cluster_size",
        "compressed_shift",
        "covered",
        "extended",
        "granule",
        "has_zero_flag",
        "l2_bits",
        "l2_entries",
        "l2_mask",
        "not_plain",
        "offset_mask",
    )

    def __init__(self, header: Header) -> None:
        self.cluster_bits = header.cluster_bits
        self.cluster_size = 1 << self.cluster_bits
        self.cluster_mask = self.cluster_size - 1
        self.extended = header.extended_l2
        self.l2_bits = self.cluster_bits - (4 if self.extended else 3)
        self.l2_entries = 1 << self.l2_bits
        self.l2_mask = self.l2_entries - 1
        self.covered = self.l2_entries * self.cluster_size
        self.granule = self.cluster_size // SUBCLUSTERS if self.extended else self.cluster_size
        self.offset_mask = OFFSET & ~self.cluster_mask
        self.not_plain = (1 << 64) - 1 & ~(COPIED | self.offset_mask)
        self.has_zero_flag = header.version >= 3 and not self.extended
        self.compressed_shift = 62 - (self.cluster_bits - 8)

    def compressed_area(self, entry: int) -> tuple[int, int]:
        """Give offset and length of compressed data in the file (Compressed Clusters Descriptor).

        The last sector may hold the beginning of something else.
        """
        shift = self.compressed_shift
        offset = entry & (1 << shift) - 1
        sectors = (entry >> shift & (1 << 62 - shift) - 1) + 1
        return offset, sectors * 512 - offset % 512


def subcluster_kind(bitmap: int, number: int) -> Kind:
    """Tell what a subcluster of a cluster that is not compressed is."""
    if bitmap >> number & 1:
        return Kind.DATA
    return Kind.ZERO if bitmap >> 32 + number & 1 else Kind.UNALLOCATED


def subcluster_bits(first: int, last: int) -> int:
    """Give the allocation bits of the subclusters `first` to `last`, both included."""
    return (1 << last + 1) - (1 << first)


def is_sane_bitmap(bitmap: int) -> bool:
    """Tell whether no subcluster is said to be both allocated and zero."""
    return not bitmap & bitmap >> 32 & ALL_ALLOCATED
