"""The transmission loop: one blocking thread for each connection.

How it works. One `recv_into` takes whatever has arrived; every complete request in the inbox
is served in order; the replies are laid end to end in the outbox and leave in one `sendall`.
A client with sixteen requests in flight so costs two network system calls for sixteen
requests. Reads go from the storage straight into the outbox, behind the 16 bytes reserved for
their header, and writes from the inbox straight into the storage: no payload is copied here.

The limits that keep memory bounded, however the client behaves:

  * A write of more than `_WHOLE` bytes is not waited for in the inbox. Its payload is received
    exactly and stored in pieces of `_CHUNK`.
  * A read of more than `_CHUNK` bytes is sent in pieces. The first is read before the header
    goes out, so that most failures can still be told; a later one ends the connection, since a
    simple reply cannot say it any more.
  * Once `_OUTBOX` bytes of replies wait, they are sent before more requests are served. A
    client that does not take its replies holds up itself only.

Buffers are anonymous mappings: page aligned, and no memory before they are touched, so idle
connections cost next to nothing. Payloads begin at addresses aligned to 32 bytes at least;
the kernel's copies from odd addresses take 5 to 10 % longer.

Before a request that may take long (flush, zeroes, a large payload) the finished replies are
sent. Requests on one connection are otherwise served one after the other: they may be
reordered by the protocol's leave, but need not.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import socket
from typing import Final

from nbdlink.errors import RemoteProtocolError, StorageError
from nbdlink.protocol.constants import (
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    Command,
    CommandFlag,
    Error,
    command_name,
)
from nbdlink.protocol.transmission import REQUEST, SIMPLE_REPLY
from nbdlink.server.negotiate import NegotiatedSession
from nbdlink.server.sessions import Session

_log = logging.getLogger("nbdlink.server")

# Plain numbers: comparing with a member of an enum takes three times as long.
_READ: Final = int(Command.READ)
_WRITE: Final = int(Command.WRITE)
_DISCONNECT: Final = int(Command.DISC)
_FUA: Final = int(CommandFlag.FUA)

_HEADER: Final = REQUEST.size
_REPLY: Final = SIMPLE_REPLY.size

_INBOX: Final = 1 << 20
"""Bytes that one receive takes at most."""
_WHOLE: Final = 128 * 1024
"""Bytes of the longest write that is received together with its neighbours."""
_CHUNK: Final = 1 << 20
"""Bytes that longer payloads are handled in; not less than `_INBOX`."""
_OUTBOX: Final = 256 * 1024
"""Bytes of replies that are sent before another request is looked at."""

_PAGE: Final = mmap.PAGESIZE
_INBOX_START: Final = 2048 - _HEADER
_OUTBOX_START: Final = _PAGE - _REPLY

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


def _buffer(size: int) -> memoryview:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return memoryview(mmap.mmap(-1, -(-size // _PAGE) * _PAGE, flags))


class _HungUpError(Exception):
    """The client went away in the middle of a request."""


class Transmission:
    """One client's requests, from the end of the handshake to the end of the connection."""

    def __init__(self, session: Session, negotiated: NegotiatedSession) -> None:
        """Take over a connection whose handshake is done."""
        self._session = session
        self._sock = session.sock
        self._export = negotiated.export
        self._storage = negotiated.export.storage
        self._rules = negotiated.rules
        self._trailing = negotiated.trailing
        # As long as the longest chunk, wherever in the first part a payload may begin.
        self._inbox = _buffer(_INBOX_START + _INBOX + _CHUNK)[_INBOX_START:]
        self._outbox = _buffer(_OUTBOX_START + _OUTBOX + _REPLY + _CHUNK)[_OUTBOX_START:]
        self._complained = False
        rules = negotiated.rules
        # The highest command that may skip the full check: writes need it on a read-only export.
        plain = _READ if self._export.is_read_only else _WRITE
        self._limits = rules.size, rules.maximum_payload, rules.minimum_block - 1, plain

    def run(self) -> str:
        """Serve until the client leaves; give the words for how it left.

        Raises:
            RemoteProtocolError: the client broke the protocol; hang up.
            StorageError: the storage failed in the middle of a reply; hang up.
            OSError: the connection broke.
        """
        try:
            return self._serve()
        except _HungUpError:
            return "hung up in the middle of a request"

    def _serve(self) -> str:
        session, sock, inbox = self._session, self._sock, self._inbox
        start, end = 0, len(self._trailing)
        inbox[:end] = self._trailing
        self._trailing = b""
        while True:
            start, end = self._serve_inbox(start, end)
            if end < 0:
                return "disconnected"
            if start == end:
                session.idle = True
                if session.ending:
                    session.hear_no_more()
                start, end = 0, sock.recv_into(inbox[:_INBOX])
                session.idle = False
                if not end:
                    return "hung up"
            else:
                # A piece of a request is left over: to the front, where there is room for the
                # rest, and where its payload will be aligned.
                if start:
                    inbox[: end - start] = inbox[start:end]
                    start, end = 0, end - start
                count = sock.recv_into(inbox[end:_INBOX])
                if not count:
                    raise _HungUpError
                end += count

    def _serve_inbox(self, start: int, end: int) -> tuple[int, int]:
        """Serve every complete request in `inbox[start:end]`, and send the replies.

        Returns:
            Where the rest of the inbox begins and ends; the end is -1 once the client has
            asked to disconnect.
        """
        # Local names, and no object made for a request: at 100 000 requests a second an
        # attribute that is looked up for each costs 0.3 % of a core, an enum operation 5 %.
        inbox, outbox = self._inbox, self._outbox
        size, longest, misaligned, plain = self._limits
        read_into, write = self._storage.read_into, self._storage.write
        unpack, pack = REQUEST.unpack_from, SIMPLE_REPLY.pack_into
        position = 0  # bytes of replies in the outbox
        requests = errors = bytes_read = bytes_written = 0
        try:
            while end - start >= _HEADER:
                magic, flags, command, cookie, offset, length = unpack(inbox, start)
                if magic != REQUEST_MAGIC:
                    self._send(position)
                    raise RemoteProtocolError(f"a request begins with the magic {magic:#010x}")
                # What is plainly all right needs no closer look, which takes ten times as long.
                if (
                    command > plain
                    or flags
                    or offset + length > size
                    or length > longest
                    or (offset | length) & misaligned
                ):
                    error = self._rules.check(command, flags, offset, length)
                else:
                    error = 0

                if command == _READ:
                    start += _HEADER
                    if not error and length > _CHUNK:
                        position = self._send(position)
                        error = self._read_long(cookie, offset, length)
                        if not error:
                            requests += 1
                            bytes_read += length
                            continue
                    elif not error:
                        body = position + _REPLY
                        try:
                            read_into(outbox[body : body + length], offset)
                        except OSError as failure:
                            error = self._failed(failure, command, offset, length)
                        else:
                            pack(outbox, position, SIMPLE_REPLY_MAGIC, 0, cookie)
                            position = body + length
                            requests += 1
                            bytes_read += length
                            if position >= _OUTBOX:
                                position = self._send(position)
                            continue
                elif command == _WRITE:
                    payload = start + _HEADER
                    after = payload + length
                    if after > end:
                        if not error and length <= _WHOLE:
                            break  # the rest will come
                        position = self._send(position)
                        error = self._write_long(
                            cookie, offset, length, flags & _FUA != 0, error, payload, end
                        )
                        start = end = 0
                    else:
                        start = after
                        if not error:
                            try:
                                write(inbox[payload:after], offset, flags & _FUA != 0)
                            except OSError as failure:
                                error = self._failed(failure, command, offset, length)
                    if not error:
                        bytes_written += length
                elif command == _DISCONNECT:
                    self._send(position)
                    return 0, -1
                else:
                    start += _HEADER
                    if not error:
                        position = self._send(position)
                        error = self._perform(command, flags, offset, length)

                requests += 1
                if error:
                    errors += 1
                pack(outbox, position, SIMPLE_REPLY_MAGIC, error, cookie)
                position += _REPLY
                if position >= _OUTBOX:
                    position = self._send(position)
            self._send(position)
            return start, end
        finally:
            session = self._session
            session.requests += requests
            session.errors += errors
            session.bytes_read += bytes_read
            session.bytes_written += bytes_written

    def _send(self, position: int) -> int:
        """Send the first `position` bytes of the outbox; give 0, the new position."""
        if position:
            self._sock.sendall(self._outbox[:position])
        return 0

    def _read_long(self, cookie: int, offset: int, length: int) -> int:
        """Send the reply to a read that is longer than a chunk; give an error if none was sent."""
        outbox, read_into = self._outbox, self._storage.read_into
        end = offset + length
        count = _CHUNK
        try:
            read_into(outbox[_REPLY : _REPLY + count], offset)
        except OSError as failure:
            return self._failed(failure, Command.READ, offset, length)
        SIMPLE_REPLY.pack_into(outbox, 0, SIMPLE_REPLY_MAGIC, 0, cookie)
        self._sock.sendall(outbox[: _REPLY + count])
        while (offset := offset + count) < end:
            count = min(_CHUNK, end - offset)
            piece = outbox[_REPLY : _REPLY + count]
            try:
                read_into(piece, offset)
            except OSError as failure:
                raise StorageError(
                    f"export {self._export.name!r}: reading {count} bytes at {offset} failed in "
                    f"the middle of a reply: {_words(failure)}"
                ) from None
            self._sock.sendall(piece)
        return 0

    def _write_long(
        self, cookie: int, offset: int, length: int, fua: bool, error: int, payload: int, end: int
    ) -> int:
        """Take a payload that is not in the inbox as a whole, storing it unless `error`.

        Args:
            cookie: the request's.
            offset: where to write.
            length: bytes of payload.
            fua: whether it must be durable.
            error: why the request is refused, or 0. Its payload has to be read nevertheless.
            payload: where in the inbox it begins.
            end: where in the inbox the received bytes end; they all belong to the payload.

        Returns:
            The error for the reply. The inbox is empty then.

        Raises:
            RemoteProtocolError: far more is announced than may be sent; the error is out.
        """
        if error and length > 2 * self._rules.maximum_payload:
            self._sock.sendall(SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie))
            raise RemoteProtocolError(f"a write announces {length} bytes of payload")
        inbox, recv_into = self._inbox, self._sock.recv_into
        left = length
        while left:
            count = min(left, _CHUNK)
            stop = payload + count
            while end < stop:
                got = recv_into(inbox[end:stop], 0, socket.MSG_WAITALL)
                if not got:
                    raise _HungUpError
                end += got
            if not error:
                try:
                    self._storage.write(inbox[payload:stop], offset, fua)
                except OSError as failure:
                    error = self._failed(failure, Command.WRITE, offset, count)
            offset += count
            left -= count
            end = payload
        return error

    def _perform(self, command: int, flags: int, offset: int, length: int) -> int:
        """Do a request that has no payload either way; give the error for its reply."""
        storage = self._storage
        fua = flags & CommandFlag.FUA != 0
        fast = flags & CommandFlag.FAST_ZERO != 0
        try:
            match command:
                case Command.FLUSH:
                    storage.flush()
                case Command.TRIM:
                    storage.trim(offset, length, fua)
                case Command.WRITE_ZEROES:
                    may_trim = not flags & CommandFlag.NO_HOLE
                    storage.zero(offset, length, may_trim=may_trim, fast=fast, fua=fua)
                case Command.CACHE:
                    storage.cache(offset, length)
                case _:
                    return Error.EINVAL
        except OSError as failure:
            if fast and failure.errno == errno.ENOTSUP:
                return Error.ENOTSUP  # an answer, not a failure
            return self._failed(failure, command, offset, length)
        return 0

    def _failed(self, failure: OSError, command: int, offset: int, length: int) -> int:
        """Say in the log that the storage failed; give the error for the reply."""
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
        error = told_error(failure)
        # Only a fast zero may be told that something is not supported.
        return Error.EIO if error == Error.ENOTSUP else error


def _words(failure: OSError) -> str:
    return failure.strerror or os.strerror(failure.errno or errno.EIO)
