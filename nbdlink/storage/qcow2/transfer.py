"""The long ways of reading and writing: run by run, whatever the runs are made of."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from nbdlink.storage.base import Storage
from nbdlink.storage.qcow2.allocation import Allocation, Writer
from nbdlink.storage.qcow2.image import Image
from nbdlink.storage.qcow2.tables import Kind, Run

ZEROES: Final = memoryview(bytes(1 << 20))
"""What zeroes are written from, and copied from."""


class Reader:
    """Reads an image and what lies behind it. The caller cares for `writeback.Epochs`."""

    def __init__(self, image: Image, backing: Storage | None) -> None:
        self._image = image
        self._backing = backing

    def read(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer`.

        Raises:
            OSError: it cannot be read, or the image is damaged.
        """
        image = self._image
        done, length = 0, len(buffer)
        while done < length:
            run = image.run_at(offset, length - done)
            part = buffer[done : done + run.length]
            if run.kind is Kind.DATA:
                image.data.read_at(part, run.position)
            elif run.kind is Kind.COMPRESSED:
                within = offset & image.geometry.cluster_mask
                part[:] = image.unpack(run.position)[within : within + run.length]
            else:
                behind = 0
                if run.kind is Kind.UNALLOCATED and self._backing is not None:
                    behind = max(0, min(run.length, self._backing.size - offset))
                    if behind:
                        self._backing.read_into(part[:behind], offset)
                fill_zeroes(part[behind:])
            done += run.length
            offset += run.length


def read_ahead(image: Image, backing: Storage | None, offset: int, length: int) -> None:
    """Have the kernel read what a range is made of, without waiting for it.

    Raises:
        OSError: it was refused, or the image is damaged.
    """
    while length:
        run = image.run_at(offset, length)
        if run.kind is Kind.DATA and image.data.fd is not None:
            os.posix_fadvise(image.data.fd, run.position, run.length, os.POSIX_FADV_WILLNEED)
        elif run.kind is Kind.UNALLOCATED and backing is not None and offset < backing.size:
            backing.cache(offset, min(run.length, backing.size - offset))
        offset += run.length
        length -= run.length


def fill_zeroes(buffer: memoryview) -> None:
    """Have all of `buffer` be zeroes."""
    at, length = 0, len(buffer)
    while at < length:
        count = min(length - at, len(ZEROES))
        buffer[at : at + count] = ZEROES[:count]
        at += count


def write_parts(
    reader: Reader,
    writer: Writer,
    buffer: memoryview,
    offset: int,
    prepare: Callable[[int, int], Run | Allocation | None],
) -> bool:
    """Write `buffer`, to clusters that are there or to new ones, see `allocation`.

    Args:
        reader: tells what is around it in its clusters.
        writer: links new clusters.
        buffer: what to write.
        offset: where the guest sees it.
        prepare: `Writer.prepare`, or `Writer.prepare_at_once`.

    Returns:
        False if there was no place to be had at once; a part of it may have been written.

    Raises:
        OSError: the rest of it was not written.
    """
    data = writer.image.data
    done, length = 0, len(buffer)
    while done < length:
        place = prepare(offset, length - done)
        if place is None:
            return False
        if isinstance(place, Run):
            count = place.length
            data.write_at(buffer[done : done + count], place.position)
        else:
            count = place.consumed
            try:
                part = buffer[done : done + count]
                before, after = offset - place.start, place.end - offset - count
                if before or after:
                    size = writer.image.size
                    part = _with_surroundings(reader, part, offset, before, after, size)
                data.write_at(part, place.position)
                writer.link(place)
            except BaseException:
                writer.give_up(place)
                raise
        done += count
        offset += count
    return True


def _with_surroundings(
    reader: Reader, part: memoryview, offset: int, before: int, after: int, size: int
) -> memoryview:
    """Give bytes together with what the guest sees before and after them."""
    whole = memoryview(bytearray(before + len(part) + after))
    whole[before : before + len(part)] = part
    if before:
        reader.read(whole[:before], offset - before)
    end = offset + len(part)
    readable = min(after, size - end)  # behind the end of the disk there are zeroes
    if readable > 0:
        reader.read(whole[before + len(part) :][:readable], end)
    return whole
