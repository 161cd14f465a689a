"""What the metadata contexts say of an image and its backing chain.

`base:allocation` and `qemu:allocation-depth` are as qemu-nbd tells them (docs/interop/nbd.rst in
QEMU's sources): the depth of a range is the number of the layer that it comes from, 1 for the
image itself, and 0 where no layer knows it. A raw file knows all of its range, and so it does
what is behind its end, where it stands for zeroes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from nbdlink.protocol.chunks import Extent
from nbdlink.protocol.constants import ALLOCATION_CONTEXT, DEPTH_CONTEXT, AllocationFlag
from nbdlink.storage.base import Storage
from nbdlink.storage.qcow2.image import Image
from nbdlink.storage.qcow2.tables import Kind, Run

_HOLE: Final = int(AllocationFlag.HOLE | AllocationFlag.ZERO)
_ZERO: Final = int(AllocationFlag.ZERO)


def runs(image: Image, offset: int, length: int) -> Iterator[Run]:
    """Give the runs of a range, one after another."""
    while length:
        run = image.run_at(offset, length)
        yield run
        offset += run.length
        length -= run.length


def merged(extents: Iterable[Extent]) -> Iterator[Extent]:
    """Join neighbours with the same flags."""
    length, flags = 0, 0
    for extent in extents:
        if length and extent.flags != flags:
            yield Extent(length, flags)
            length = 0
        length += extent.length
        flags = extent.flags
    if length:
        yield Extent(length, flags)


def allocation(
    image: Image, backing: Storage | None, offset: int, length: int, *, look_below: bool
) -> Iterator[Extent]:
    """Tell data, zeroes and holes.

    Args:
        image: the image.
        backing: the storage behind it, or None.
        offset: bytes from the start.
        length: bytes.
        look_below: whether holes of the file count as zeroes too. That finds out what is only
            preallocated, and costs system calls.
    """
    for run in runs(image, offset, length):
        if run.kind is Kind.DATA and look_below:
            for count, is_data in image.data.extents(run.position, run.length):
                yield Extent(count, 0 if is_data else _ZERO)
        elif run.kind in (Kind.DATA, Kind.COMPRESSED):
            yield Extent(run.length, 0)
        else:
            behind = _behind(backing, offset, run)
            if behind and backing:
                yield from backing.extents(ALLOCATION_CONTEXT, offset, behind)
            if behind < run.length:
                yield Extent(run.length - behind, _HOLE)
        offset += run.length


def depth(image: Image, backing: Storage | None, offset: int, length: int) -> Iterator[Extent]:
    """Tell which layer a range comes from."""
    for run in runs(image, offset, length):
        if run.kind is not Kind.UNALLOCATED:
            yield Extent(run.length, 1)
        elif backing is None:
            yield Extent(run.length, 0)
        else:
            behind = _behind(backing, offset, run)
            if behind and DEPTH_CONTEXT in backing.contexts:
                for extent in backing.extents(DEPTH_CONTEXT, offset, behind):
                    yield Extent(extent.length, extent.flags and extent.flags + 1)
            elif behind:
                yield Extent(behind, 2)
            if behind < run.length:
                yield Extent(run.length - behind, 2)
        offset += run.length


def _behind(backing: Storage | None, offset: int, run: Run) -> int:
    """Give how many bytes of a run the backing storage has."""
    if backing is None or run.kind is not Kind.UNALLOCATED:
        return 0
    return max(0, min(run.length, backing.size - offset))
