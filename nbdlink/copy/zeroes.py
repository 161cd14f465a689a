"""Blocks of zeroes in data: found at the speed of memcmp, without a loop over bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from nbdlink.storage.zeroes import is_zero

ZEROES: Final = memoryview(bytes(1 << 20))
"""Zeroes to write where a destination cannot make them by itself."""


def runs(view: memoryview, block: int) -> Iterator[tuple[int, int, bool]]:
    """Cut data into runs of zeroes and of data.

    Args:
        view: the data.
        block: how many zeroes in a row count, and where: at multiples of this; 0 is never.

    Yields:
        Where each run begins and ends, and whether it is zeroes.
    """
    length = len(view)
    # A block of zeroes begins with one: that leaves few blocks of real data to look at.
    firsts = view[::block].tobytes() if block else b""
    at = firsts.find(0)
    if at == 0 and is_zero(view):
        yield 0, length, True
        return
    begin = 0
    while at >= 0:
        start = end = at * block
        while end < length and not firsts[end // block] and is_zero(view[end : end + block]):
            end = min(end + block, length)
        if end > start:
            if start > begin:
                yield begin, start, False
            yield start, end, True
            begin = end
        # Up: the end may lie within a block, which must not be told twice.
        at = firsts.find(0, max(at + 1, -(-end // block)))
    if begin < length:
        yield begin, length, False
