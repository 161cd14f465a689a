"""Storages that are no plain file and yet answer at once, in the engine's own terms.

The engine's loop knows two system calls, for plain files. What a storage does without waiting
(`AtOnce`) is given to it in their shape, so that there is one loop, and a plain file pays nothing
for it. What cannot be done at once looks like a call that fell short, and goes to a worker.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nbdlink.storage.base import AtOnce

Read = Callable[[int, Sequence[memoryview], int, int], int]
"""As `os.preadv`."""
Write = Callable[[int, memoryview, int], int]
"""As `os.pwrite`."""


def as_system_calls(at_once: AtOnce) -> tuple[Read, Write]:
    """Give reading and writing with the arguments of `os.preadv` and `os.pwrite`.

    The file is ignored, and so are flags; positions are offsets in the storage. Both give the
    bytes of the request, or -1.
    """
    read, write = at_once.read, at_once.write

    def preadv(_file: int, buffers: Sequence[memoryview], offset: int, _flags: int) -> int:
        buffer = buffers[0]
        return len(buffer) if read(buffer, offset) else -1

    def pwrite(_file: int, buffer: memoryview, offset: int) -> int:
        return len(buffer) if write is not None and write(buffer, offset) else -1

    return preadv, pwrite
