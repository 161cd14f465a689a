"""Is it all zeroes? Found out at the speed of memcmp, without a loop over bytes."""

from __future__ import annotations

import functools
from typing import Final

_PIECE: Final = 1 << 20


def is_zero(view: memoryview) -> bool:
    """Tell whether all bytes are zero."""
    for at in range(0, len(view), _PIECE):
        part = view[at : at + _PIECE]
        if part[0] or _zeroes(len(part)) != part:
            return False
    return True


@functools.lru_cache(maxsize=64)
def _zeroes(length: int) -> bytearray:
    # A bytearray compares itself with any buffer by memcmp; a memoryview goes byte by byte.
    return bytearray(length)
