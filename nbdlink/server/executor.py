"""One request at a time, from the storage to the reply: for whichever thread has the time.

The engine's loop answers itself what the page cache can answer at once. Everything else comes
here: reads from a cold disk, flushes, zeroes, block status, whatever has an error to tell.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Collection, Iterator, Mapping
from itertools import islice
from typing import Final

from nbdlink.errors import StorageError
from nbdlink.protocol.chunks import BlockStatus, Extent
from nbdlink.protocol.constants import (
    ALLOCATION_CONTEXT,
    AllocationFlag,
    Command,
    CommandFlag,
    Error,
    HeaderStyle,
    command_name,
)
from nbdlink.server.export import Export
from nbdlink.server.outlet import Outlet
from nbdlink.server.replies import ReplyFormat
from nbdlink.server.sessions import Session

_log = logging.getLogger("nbdlink.server")

PIECE: Final = 1 << 20
"""Bytes that long payloads are handled in."""
_MOST_SEGMENTS: Final = 64
"""Data and holes that one read is looked through for; what follows counts as data."""
_MOST_EXTENTS: Final = 1 << 16
"""Extents in a block status; clients ask on where it ends."""
_LONGEST_EXTENT: Final = 1 << 31
"""Bytes in an extent where lengths have 32 bits; a multiple of any block size."""

_ZERO: Final = int(AllocationFlag.ZERO)
_DF: Final = int(CommandFlag.DF)
_FUA: Final = int(CommandFlag.FUA)

# Those of whose failure a chunk may say where it happened (ERROR_OFFSET).
_HAS_PLACE: Final = frozenset(
    {Command.READ, Command.WRITE, Command.TRIM, Command.CACHE, Command.WRITE_ZEROES}
)

# What a client is told for each errno; everything else is EIO (specification, "Error values").
_TOLD: Final = {
    errno.EPERM: Error.EPERM,
    errno.EACCES: Error.EPERM,
    errno.EROFS: Error.EPERM,
    errno.ENOMEM: Error.ENOMEM,
    errno.EINVAL: Error.EINVAL,
    errno.ENOSPC: Error.ENOSPC,
    errno.EDQUOT: Error.ENOSPC,
    errno.EFBIG: Error.ENOSPC,
    errno.EOVERFLOW: Error.EOVERFLOW,
    errno.ENOTSUP: Error.ENOTSUP,
    errno.ESHUTDOWN: Error.ESHUTDOWN,
}


def told_error(failure: OSError) -> int:
    """Give the protocol's error value for a storage's failure."""
    return _TOLD.get(failure.errno or errno.EIO, Error.EIO)


class Executor:
    """Does requests that have been checked, and sends their replies. Safe in any thread."""

    def __init__(
        self,
        export: Export,
        contexts: Mapping[int, str],
        form: ReplyFormat,
        outlet: Outlet,
        session: Session,
    ) -> None:
        """Serve one connection.

        Args:
            export: what the client chose.
            contexts: the metadata contexts it selected, by id.
            form: how its replies look.
            outlet: where they go.
            session: whose counters are to be kept.
        """
        self._export = export
        self._storage = export.storage
        self._contexts = contexts
        self._form = form
        self._outlet = outlet
        self._session = session
        self._complained = False

    def perform(
        self,
        command: int,
        flags: int,
        cookie: int,
        offset: int,
        length: int,
        data: memoryview | None = None,
        only: Collection[int] | None = None,
        frugal: bool = False,
    ) -> None:
        """Do one request and send its reply.

        Args:
            command: its type.
            flags: its flags, without PAYLOAD_LEN.
            cookie: what the reply carries.
            offset: bytes.
            length: bytes.
            data: a write's payload.
            only: the metadata contexts that BLOCK_STATUS asks about, or None for all.
            frugal: whether there is no memory for all of a long read.

        Raises:
            StorageError: it failed when the reply was half sent; the connection is lost.
            OSError: the connection broke.
        """
        if command == Command.READ:
            self._read(cookie, offset, length, dont_fragment=flags & _DF != 0, frugal=frugal)
            return
        try:
            if command == Command.BLOCK_STATUS:
                one = flags & CommandFlag.REQ_ONE != 0
                reply = self._block_status(cookie, offset, length, one, only)
            else:
                self._change(command, flags, offset, length, data)
                reply = self._form.success(cookie, offset)
        except OSError as failure:
            if failure.errno == errno.ENOTSUP and flags & CommandFlag.FAST_ZERO:
                self.refuse(Error.ENOTSUP, cookie, offset)  # an answer, not a failure
            else:
                self.fail(failure, command, cookie, offset, length)
        else:
            if command == Command.WRITE:
                self._session.count(bytes_written=length)
            self._outlet.send_shared(reply)

    def _change(
        self, command: int, flags: int, offset: int, length: int, data: memoryview | None
    ) -> None:
        storage = self._storage
        fua = flags & _FUA != 0
        match command:
            case Command.WRITE:
                assert data is not None
                storage.write(data, offset, fua)
            case Command.FLUSH:
                storage.flush()
            case Command.TRIM:
                storage.trim(offset, length, fua)
            case Command.WRITE_ZEROES:
                may_trim = not flags & CommandFlag.NO_HOLE
                fast = flags & CommandFlag.FAST_ZERO != 0
                storage.zero(offset, length, may_trim=may_trim, fast=fast, fua=fua)
            case Command.CACHE:
                storage.cache(offset, length)
            case _:
                raise OSError(errno.EINVAL, "unknown command")

    # Reading.

    def _read(
        self, cookie: int, offset: int, length: int, *, dont_fragment: bool, frugal: bool
    ) -> None:
        if self._form.chunked and not dont_fragment:
            self._read_in_chunks(cookie, offset, length)
        else:
            self._read_whole(cookie, offset, length, min(length, PIECE) if frugal else length)

    def _read_in_chunks(self, cookie: int, offset: int, length: int) -> None:
        """Send a reply of several chunks, so that a failure can be told wherever it happens."""
        form, outlet = self._form, self._outlet
        head, end = form.data.size, offset + length
        buffer = memoryview(bytearray(head + min(length, PIECE)))
        try:
            segments = self.segments(offset, length)
        except OSError as failure:
            self.fail(failure, Command.READ, cookie, offset, length)
            return
        for at, count, is_hole in segments:
            done = at + count == end
            if is_hole:
                outlet.send_shared(form.hole(cookie, offset, at, count, done=done))
                continue
            reply = buffer[: head + count]
            try:
                self._storage.read_into(reply[head:], at)
            except OSError as failure:
                self.fail(failure, Command.READ, cookie, offset, length, at=at)
                return
            reply[:head] = form.data_header(cookie, offset, count, at=at, done=done)
            self._session.count(bytes_read=count)
            outlet.send_shared(reply)

    def _read_whole(self, cookie: int, offset: int, length: int, first: int) -> None:
        """Send a reply with one header, of which only `first` bytes are held in memory.

        They are read before the header goes out, so that most failures can still be told; a
        later one ends the connection, as nothing can say it any more.
        """
        head = self._form.data.size
        buffer = memoryview(bytearray(head + first))
        try:
            self._storage.read_into(buffer[head:], offset)
        except OSError as failure:
            self.fail(failure, Command.READ, cookie, offset, length)
            return
        buffer[:head] = self._form.data_header(cookie, offset, length)
        self._session.count(bytes_read=length)
        with self._outlet.lock:
            self._outlet.send_locked(buffer)
            if first < length:
                self.finish_read(offset + first, length - first)

    def finish_read(self, offset: int, length: int) -> None:
        """Send the rest of a read's data, behind a header that is out; the lock is held.

        Raises:
            StorageError: it cannot be read.
        """
        try:
            self._send_rest(offset, length)
        except BaseException:
            # Before the lock goes to somebody whose reply the client would take for the rest.
            self._session.cut()
            raise

    def _send_rest(self, offset: int, length: int) -> None:
        end = offset + length
        buffer = memoryview(bytearray(min(length, PIECE)))
        while offset < end:
            count = min(PIECE, end - offset)
            try:
                self._storage.read_into(buffer[:count], offset)
            except OSError as failure:
                raise StorageError(
                    f"export {self._export.name!r}: reading {count} bytes at {offset} failed in "
                    f"the middle of a reply: {_words(failure)}"
                ) from None
            self._outlet.send_locked(buffer[:count])
            offset += count

    def segments(self, offset: int, length: int) -> list[tuple[int, int, bool]]:
        """Divide a read into pieces: (offset, length, whether it is a hole) of each."""
        extents: Iterator[Extent] = iter((Extent(length, 0),))
        if self._storage.is_sparse:
            extents = islice(
                self._storage.extents(ALLOCATION_CONTEXT, offset, length), _MOST_SEGMENTS
            )
        pieces: list[tuple[int, int, bool]] = []
        at, end = offset, offset + length
        for extent in extents:
            stop = min(at + extent.length, end)
            if extent.flags & _ZERO:
                pieces.append((at, stop - at, True))
                at = stop
            while at < stop:
                count = min(PIECE, stop - at)
                pieces.append((at, count, False))
                at += count
        while at < end:  # more than were looked for
            count = min(PIECE, end - at)
            pieces.append((at, count, False))
            at += count
        return pieces

    # Block status.

    def _block_status(
        self, cookie: int, offset: int, length: int, one: bool, only: Collection[int] | None
    ) -> bytes:
        statuses = []
        for number, context in self._contexts.items():
            if only is not None and number not in only:
                continue
            found = self._storage.extents(context, offset, length)
            longest = length if self._form.style == HeaderStyle.EXTENDED else _LONGEST_EXTENT
            extents = _merged(found, 1 if one else _MOST_EXTENTS, longest)
            statuses.append(BlockStatus(number, extents))
        return self._form.status(cookie, offset, statuses)

    # Failing.

    def fail(
        self,
        failure: OSError,
        command: int,
        cookie: int,
        offset: int,
        length: int,
        at: int | None = None,
    ) -> None:
        """Say in the log that the storage failed, and send the error.

        Args:
            failure: what the storage raised.
            command: the request's type.
            cookie: the request's.
            offset: the request's.
            length: the request's.
            at: where it failed, if that is known better than by the request.
        """
        error = told_error(failure)
        if error == Error.ENOTSUP:
            error = Error.EIO  # only a fast zero may be told that something is not supported
        # One line a connection is a warning; a dying disk need not fill the log with more.
        level = logging.DEBUG if self._complained else logging.WARNING
        self._complained = True
        _log.log(
            level,
            "export %r: %s of %d bytes at %d failed: %s",
            self._export.name,
            command_name(command),
            length,
            offset,
            _words(failure),
        )
        if command in _HAS_PLACE:
            at = offset if at is None else at
        self.refuse(error, cookie, offset, at)

    def refuse(self, error: int, cookie: int, offset: int, at: int | None = None) -> None:
        """Send an error; `at` is where it went wrong, if a place did."""
        self._session.count(errors=1)
        self._outlet.send_shared(self._form.failure(cookie, offset, error, at=at))


def _merged(found: Iterator[Extent], most: int, longest: int) -> tuple[Extent, ...]:
    """Take up to `most` extents, neighbours of the same flags made one; cut at `longest` bytes."""
    merged: list[Extent] = []
    length, flags = next(found)
    for extent in found:
        if extent.flags == flags and length + extent.length <= longest:
            length += extent.length
            continue
        merged.append(Extent(length, flags))
        length, flags = extent
        if len(merged) == most or merged[-1].length > longest:
            length = 0
            break
    if length:
        merged.append(Extent(length, flags))
    if merged[-1].length > longest:
        # Clients ask on from there.
        merged[-1] = Extent(longest, merged[-1].flags)
    return tuple(merged)


def _words(failure: OSError) -> str:
    return failure.strerror or os.strerror(failure.errno or errno.EIO)
