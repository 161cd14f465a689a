"""A temporary overlay: writes go to a file without a name, and are gone with it.

How it works. The file is as long as the storage below and sparse; a byte for each block of 4 KiB
tells where the block is: below, in the file, or nowhere as it is all zeroes. These bytes are an
anonymous mapping, which takes memory where something was written only. Whoever changes a block
holds it (`RangeLock`), since a block that is written in part is filled up from below first; what
two neighbours write at once would get lost otherwise. The block's byte is set when all of it is
in the file, so readers hold nothing: they find the block as it was before, or as it is after.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from typing import Final

from nbdlink.errors import StorageError
from nbdlink.protocol.chunks import Extent
from nbdlink.protocol.constants import (
    ALLOCATION_CONTEXT,
    BITMAP_CONTEXT,
    DEPTH_CONTEXT,
    AllocationFlag,
)
from nbdlink.storage.base import PlainFile, Storage
from nbdlink.storage.fallocate import PUNCH_HOLE, UNSUPPORTED, fallocate
from nbdlink.storage.layer import Layer
from nbdlink.storage.ranges import RangeLock

BLOCK: Final = 4096
_BELOW, _HERE, _ZERO = 0, 1, 2  # where a block is
_RUN: Final = {kind: re.compile(b"%c+" % kind) for kind in (_BELOW, _HERE, _ZERO)}
_HOLE: Final = int(AllocationFlag.HOLE | AllocationFlag.ZERO)
_NORESERVE: Final = 0x4000  # MAP_NORESERVE, which Python 3.11 has no name for
_DEFAULT_FOLDER: Final = "/var/tmp"


class Overlay(Layer):
    """A storage that may be written to, and is as before when it is closed."""

    can_fast_zero = True

    def __init__(self, below: Storage) -> None:
        """Lay an empty overlay on a storage, which is only read from then on.

        Raises:
            StorageError: no temporary file can be made, or none as large.
        """
        super().__init__(below)
        self.read_only = False
        self.can_trim = self.can_zero = self.can_fast_zero = True
        # What was written is known to this process only.
        self.may_fork = False
        self.waits = True
        bitmaps = (name for name in below.contexts if name.startswith(BITMAP_CONTEXT))
        self.contexts = (ALLOCATION_CONTEXT, DEPTH_CONTEXT, *bitmaps)
        self._signature = f"auto:{secrets.token_hex(16)}"
        self._fd = _unnamed_file(below.size)
        blocks = -(-below.size // BLOCK)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
        try:
            self._where = mmap.mmap(-1, max(1, blocks), flags)
        except (OSError, ValueError, OverflowError):
            os.close(self._fd)
            raise StorageError(f"{below.name} is too large for a temporary overlay") from None
        self._ranges = RangeLock()
        self._can_punch = True

    @property
    def is_sparse(self) -> bool:
        """True: blocks of zeroes are nowhere."""
        return True

    @is_sparse.setter
    def is_sparse(self, value: bool) -> None:
        return

    @property
    def plain_file(self) -> PlainFile | None:
        """None: there are two files."""
        return None

    @property
    def signature(self) -> str | None:
        """A new one each time, as what is written is not there the next time."""
        return self._signature

    def notice_growth(self) -> None:
        """Stay as large as it was at the beginning."""

    # Where the blocks are.

    def _runs(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Divide a range into runs of blocks that are in the same place.

        Yields:
            Where each run begins and ends, and where its blocks are.
        """
        end = offset + length
        last = (end - 1) // BLOCK
        while offset < end:
            first = offset // BLOCK
            kind = self._where[first]
            found = _RUN[kind].match(self._where, first, last + 1)
            # It may have changed since the look before.
            stop = min(found.end() * BLOCK if found else (first + 1) * BLOCK, end)
            yield offset, stop, kind
            offset = stop

    def extents(self, context: str, offset: int, length: int) -> Iterator[Extent]:
        """Tell what is here from what is below, whose depth is one more."""
        if context.startswith(BITMAP_CONTEXT):
            yield from self.below.extents(context, offset, length)
            return
        for begin, end, kind in self._runs(offset, length):
            if context == DEPTH_CONTEXT and kind != _BELOW:
                yield Extent(end - begin, 1)
            elif kind == _HERE:
                yield Extent(end - begin, 0)
            elif kind == _ZERO:
                yield Extent(end - begin, _HOLE)
            elif context in self.below.contexts:
                for extent in self.below.extents(context, begin, end - begin):
                    deeper = context == DEPTH_CONTEXT and extent.flags
                    yield Extent(extent.length, extent.flags + 1 if deeper else extent.flags)
            else:
                yield Extent(end - begin, 2 if context == DEPTH_CONTEXT else 0)

    # Reading and writing.

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Read each run of blocks from where it is."""
        for begin, end, kind in self._runs(offset, len(buffer)):
            part = buffer[begin - offset : end - offset]
            if kind == _HERE:
                self._read_here(part, begin)
            elif kind == _ZERO:
                part[:] = bytes(len(part))
            else:
                self.below.read_into(part, begin)

    def _read_here(self, buffer: memoryview, offset: int) -> None:
        while buffer:
            count = os.preadv(self._fd, (buffer,), offset)
            if not count:
                raise OSError(errno.EIO, "the temporary file has become shorter")
            buffer, offset = buffer[count:], offset + count

    def write(self, buffer: memoryview, offset: int, fua: bool) -> None:
        """Write to the temporary file. Nothing of it ever is durable."""
        if not len(buffer):
            return
        end = offset + len(buffer)
        first, last = offset // BLOCK, (end - 1) // BLOCK
        with self._ranges.hold(first, last, exclusive=True):
            self._fill(first, offset, end)
            if last != first:
                self._fill(last, offset, end)
            self._write_here(buffer, offset)
            self._where[first : last + 1] = b"%c" % _HERE * (last + 1 - first)

    def _fill(self, block: int, offset: int, end: int) -> None:
        """Bring a block into the file, unless it is there or all of it is to be written."""
        begin = block * BLOCK
        stop = min(begin + BLOCK, self.size)
        if self._where[block] == _HERE or (offset <= begin and stop <= end):
            return
        content = bytearray(stop - begin)
        if self._where[block] == _BELOW:
            self.below.read_into(memoryview(content), begin)
        self._write_here(memoryview(content), begin)

    def _write_here(self, buffer: memoryview, offset: int) -> None:
        while buffer:
            count = os.pwritev(self._fd, (buffer,), offset)
            if not count:
                raise OSError(errno.EIO, "the temporary file takes no more bytes")
            buffer, offset = buffer[count:], offset + count

    def zero(self, offset: int, length: int, *, may_trim: bool, fast: bool, fua: bool) -> None:
        """Note whole blocks as zeroes, and give their space back; write the rest."""
        if not length:
            return
        end = offset + length
        first = -(-offset // BLOCK)
        stop = end // BLOCK if end < self.size else -(-end // BLOCK)
        if first >= stop:
            self.write(memoryview(bytes(length)), offset, False)
            return
        with self._ranges.hold(first, stop - 1, exclusive=True):
            # In pieces, as a range may have any length.
            for piece in range(first, stop, 1 << 20):
                count = min(stop - piece, 1 << 20)
                self._where[piece : piece + count] = b"%c" % _ZERO * count
            self._punch(first * BLOCK, (stop - first) * BLOCK)
        if offset < first * BLOCK:
            self.write(memoryview(bytes(first * BLOCK - offset)), offset, False)
        if stop * BLOCK < end:
            self.write(memoryview(bytes(end - stop * BLOCK)), stop * BLOCK, False)

    def _punch(self, offset: int, length: int) -> None:
        if self._can_punch:
            try:
                fallocate(self._fd, PUNCH_HOLE, offset, length)
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
                self._can_punch = False

    def trim(self, offset: int, length: int, fua: bool) -> None:
        """Make whole blocks zeroes."""
        first, stop = -(-offset // BLOCK), (offset + length) // BLOCK
        if first < stop:
            begin = first * BLOCK
            self.zero(begin, stop * BLOCK - begin, may_trim=True, fast=False, fua=False)

    def flush(self) -> None:
        """Do nothing: what is thrown away need not be durable."""

    def close(self) -> None:
        """Throw away what was written, and close the storage below."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        self.below.close()

    def disown(self) -> None:
        """Let go of the temporary file, too."""
        os.close(self._fd)
        super().disown()


def _unnamed_file(size: int) -> int:
    """Make a file of that size without a name, where temporary files are to be large."""
    folder = os.environ.get("TMPDIR") or _DEFAULT_FOLDER
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        try:
            fd = os.open(folder, flags | os.O_TMPFILE, 0o600)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                raise
            fd, path = tempfile.mkstemp(prefix="nbdlink-", dir=folder)
            os.unlink(path)  # noqa: PTH108 - it is a descriptor's name
        try:
            os.ftruncate(fd, size)
        except BaseException:
            os.close(fd)
            raise
    except OSError as error:
        words = (error.strerror or str(error)).lower()
        raise StorageError(
            f"no temporary file for what is written can be made in {folder}: {words}",
            hint="say another directory: TMPDIR=/var/tmp",
        ) from None
    return fd
