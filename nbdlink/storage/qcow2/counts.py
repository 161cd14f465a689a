"""Refcount blocks in memory: pure, no I/O (Host cluster management).

All widths look the same to the caller. Counts of 8 bits and more are an array in the machine's
byte order; narrower ones stay packed as they are on disk, the first count in the lowest bits.
"""

from __future__ import annotations

import re
import sys
from array import array
from typing import Final, Protocol

_TYPES: Final = {3: "B", 4: "H", 5: "I", 6: "Q"}
_SWAP: Final = sys.byteorder == "little"


class Counts(Protocol):
    """The counts of a block."""

    def __getitem__(self, index: int) -> int:
        """Give a count."""

    def __setitem__(self, index: int, count: int) -> None:
        """Set a count."""

    def find_free(self, start: int) -> int:
        """Give the first index from `start` on whose count is 0, or -1."""

    def used(self, limit: int) -> int:
        """Tell how many of the first `limit` counts are not 0."""

    def pack(self) -> bytes:
        """Give the block as it is on disk."""


class _Wide:
    __slots__ = ("_counts",)

    def __init__(self, data: bytes, order: int) -> None:
        self._counts = array(_TYPES[order], data)
        if _SWAP:
            self._counts.byteswap()

    def __getitem__(self, index: int) -> int:
        return self._counts[index]

    def __setitem__(self, index: int, count: int) -> None:
        self._counts[index] = count

    def find_free(self, start: int) -> int:
        try:
            return self._counts.index(0, start)
        except ValueError:
            return -1

    def used(self, limit: int) -> int:
        counts = self._counts[:limit]
        return len(counts) - counts.count(0)

    def pack(self) -> bytes:
        counts = self._counts[:]
        if _SWAP:
            counts.byteswap()
        return counts.tobytes()


def _with_a_zero(bits: int) -> re.Pattern[bytes]:
    """Give a pattern for the bytes that have a count of 0 in them."""
    mask = (1 << bits) - 1
    found = [b for b in range(256) if not all(b >> shift & mask for shift in range(0, 8, bits))]
    return re.compile(b"[" + b"".join(re.escape(bytes([b])) for b in found) + b"]")


def _in_use(bits: int) -> bytes:
    """Give, for every byte, how many counts in it are not 0."""
    mask = (1 << bits) - 1
    return bytes(sum(1 for s in range(0, 8, bits) if b >> s & mask) for b in range(256))


_IN_USE: Final = {bits: _in_use(bits) for bits in (1, 2, 4)}
_ZERO_INSIDE: Final = {bits: _with_a_zero(bits) for bits in (1, 2, 4)}


class _Narrow:
    __slots__ = ("_bits", "_each", "_mask", "_packed")

    def __init__(self, data: bytes, order: int) -> None:
        self._packed = bytearray(data)
        self._bits = 1 << order
        self._each = 8 >> order
        self._mask = (1 << self._bits) - 1

    def __getitem__(self, index: int) -> int:
        at, within = divmod(index, self._each)
        return self._packed[at] >> within * self._bits & self._mask

    def __setitem__(self, index: int, count: int) -> None:
        if not 0 <= count <= self._mask:
            raise OverflowError(f"a refcount of {count}")
        at, within = divmod(index, self._each)
        shift = within * self._bits
        self._packed[at] = self._packed[at] & ~(self._mask << shift) | count << shift

    def find_free(self, start: int) -> int:
        total = len(self._packed) * self._each
        # The rest of the byte that `start` is in, then whole bytes.
        while start < total and start % self._each:
            if not self[start]:
                return start
            start += 1
        found = _ZERO_INSIDE[self._bits].search(self._packed, start // self._each)
        if not found:
            return -1
        index = found.start() * self._each
        while self[index]:
            index += 1
        return index

    def used(self, limit: int) -> int:
        whole, rest = divmod(min(limit, len(self._packed) * self._each), self._each)
        found = sum(self._packed[:whole].translate(_IN_USE[self._bits]))
        return found + sum(1 for i in range(rest) if self[whole * self._each + i])

    def pack(self) -> bytes:
        return bytes(self._packed)


def counts_of(data: bytes | bytearray, order: int) -> Counts:
    """Give the counts of a block of 2^`order` bits each, read from disk."""
    data = bytes(data)
    return _Wide(data, order) if order >= 3 else _Narrow(data, order)
