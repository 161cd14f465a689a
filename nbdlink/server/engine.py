"""The transmission loop: one blocking thread for each connection, and workers for what is slow.

How it works. One `recv_into` takes whatever has arrived; every complete request in the inbox is
looked at; the replies leave together in one system call. A client with sixteen requests in
flight so costs two network system calls for sixteen requests. Reads are sent from the file's
own pages, and writes go from the inbox straight into the file: no payload is copied here.

The ways of a request, fastest first:

  * Reads of what is in the page cache: header and pages are put on a list, which is sent as a
    whole (`Lending`; whether a page is there, `FileMapping` knows or asks).
  * Reads of pages that cannot be lent: read into the outbox without waiting (`RWF_NOWAIT`).
  * Writes that fit into the inbox: one system call each. Longer ones are received exactly, or
    moved by the kernel: `Intake`.
  * Everything else, and all requests to storages that are no plain file: the `Executor`, in a
    worker thread. So a cold read, a flush or a slow disk never holds the queue up. Replies then
    come in another order than the requests, which the protocol allows.

The limits that keep memory bounded, however the client behaves:

  * A write of more than `_WHOLE` bytes is not waited for in the inbox. Its payload is received
    exactly and stored in pieces of `PIECE`.
  * Once `_OUTBOX` bytes of replies wait, they are sent before more requests are served. A
    client that does not take its replies holds up itself only.
  * What waits for workers is taken out of a `Budget` that all connections share.

Buffers are anonymous mappings: page aligned, and no memory before they are touched. A
connection that has been idle for a second gives back what it has touched.
"""

from __future__ import annotations

import mmap
import os
import socket
import stat
import struct
import threading
from collections.abc import Callable
from resource import RUSAGE_THREAD, getrusage
from time import monotonic
from typing import Any, Final

from nbdlink.errors import RemoteProtocolError
from nbdlink.protocol.chunks import parse_status_filter
from nbdlink.protocol.constants import (
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST_MAGIC,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Command,
    CommandFlag,
    Error,
    HeaderStyle,
    ReplyFlag,
    ReplyType,
)
from nbdlink.protocol.transmission import EXTENDED_REQUEST, REQUEST
from nbdlink.server.executor import PIECE, Executor
from nbdlink.server.intake import INBOX, SPLICE, HungUpError, Intake, StoringFailedError, buffer
from nbdlink.server.lending import LONG, Lending, Read
from nbdlink.server.negotiate import NegotiatedSession
from nbdlink.server.outlet import Outlet, Part
from nbdlink.server.pace import Pace, set_policy
from nbdlink.server.replies import ReplyFormat
from nbdlink.server.sessions import Session
from nbdlink.server.workers import Workers
from nbdlink.storage.mapping import NO_WINDOW, PAGE

# Plain numbers: comparing with a member of an enum takes three times as long.
_READ: Final = int(Command.READ)
_WRITE: Final = int(Command.WRITE)
_DISCONNECT: Final = int(Command.DISC)
_FLUSH: Final = int(Command.FLUSH)
_BLOCK_STATUS: Final = int(Command.BLOCK_STATUS)
_FUA: Final = int(CommandFlag.FUA)
_DF: Final = int(CommandFlag.DF)
_PAYLOAD: Final = int(CommandFlag.PAYLOAD_LEN)
_EINVAL: Final = int(Error.EINVAL)

# The loop's view of headers: magic, flags and type are one number, so that a single comparison
# tells a plain read or write, and replies have half as many numbers to pack. That is worth a
# tenth of the interpreter's share.
_REQUEST_WORDS: Final = struct.Struct(">QQQI").unpack_from
_EXTENDED_REQUEST_WORDS: Final = struct.Struct(">QQQQ").unpack_from
_SIMPLE_WORDS: Final = struct.Struct(">QQ")
_STRUCTURED_DATA_WORDS: Final = struct.Struct(">QQIQ")
_EXTENDED_DATA_WORDS: Final = struct.Struct(">QQQQQ")
_EXTENDED_WORDS: Final = struct.Struct(">QQQQ")

_SIMPLE_OK: Final = SIMPLE_REPLY_MAGIC << 32
_STRUCTURED_DATA: Final = (
    STRUCTURED_REPLY_MAGIC << 32 | ReplyFlag.DONE << 16 | ReplyType.OFFSET_DATA
)
_EXTENDED_DATA: Final = EXTENDED_REPLY_MAGIC << 32 | ReplyFlag.DONE << 16 | ReplyType.OFFSET_DATA
_EXTENDED_OK: Final = EXTENDED_REPLY_MAGIC << 32 | ReplyFlag.DONE << 16 | ReplyType.NONE

_WHOLE: Final = 128 * 1024
"""Bytes of the longest write that is received together with its neighbours."""
_OUTBOX: Final = 256 * 1024
"""Bytes of replies that are sent before another request is looked at."""
_MOST_PARTS: Final = 512
"""Buffers that one system call sends; the kernel's limit is 1024."""
_PAGE_SHIFT: Final = PAGE.bit_length() - 1
_SLOW: Final = 0.01
"""Seconds for one inbox of requests, from which on the storage is taken to be slow."""
_PENALTY: Final = 16
"""Inboxes that are left to the workers, after a slow one, before the storage has another try."""
_PATIENCE: Final = 4096
"""The same at most; it doubles as long as the storage stays slow."""
_IDLE: Final = 1
"""Seconds without a request after which buffers are given back."""


class Transmission:
    """One client's requests, from the end of the handshake to the end of the connection."""

    def __init__(self, session: Session, negotiated: NegotiatedSession) -> None:
        """Take over a connection whose handshake is done."""
        export = negotiated.export
        self._session = session
        self._export = export
        self._storage = export.storage
        self._rules = negotiated.rules
        self._contexts = negotiated.contexts
        self._trailing = negotiated.trailing
        self._is_unix = session.sock.family == socket.AF_UNIX
        self._form = form = ReplyFormat(negotiated.style)
        self._request = EXTENDED_REQUEST if form.style == HeaderStyle.EXTENDED else REQUEST
        self._intake = Intake(session.sock, self._request.size)
        self._workers = workers = Workers(f"{threading.current_thread().name}-worker")
        self._outlet = outlet = Outlet(session.sock, workers)
        self._executor = Executor(export, negotiated.contexts, form, outlet, session)
        plain = self._storage.plain_file
        self._lending = plain and Lending(
            self._storage, plain, form, outlet, workers, self._executor
        )
        self._nowait = _nowait_flag(plain.fd) if plain else 0
        # Data is page aligned behind the first header.
        head = form.data.size
        self._outbox_memory, self._outbox = buffer(_OUTBOX + LONG + head, mmap.PAGESIZE - head)
        self._failure: Exception | None = None
        self._last: int | None = None  # bytes still to be heard once the session is ending

    def run(self) -> str:
        """Serve until the client leaves; give the words for how it left.

        Raises:
            RemoteProtocolError: the client broke the protocol; hang up.
            StorageError: the storage failed in the middle of a reply; hang up.
            OSError: the connection broke.
        """
        workers = self._workers
        lost: OSError | None = None
        try:
            how = self._serve()
        except HungUpError:
            how = "hung up in the middle of a request"
        except OSError as error:
            # A worker may have cut the connection, and then this is only how it shows.
            how, lost = "", error
        except BaseException:
            if workers.pending:
                self._session.cut()  # so that none waits for a client that does not read
            raise
        finally:
            # Nothing may reach the storage any more once the session counts as gone.
            workers.join()
            self._intake.close()
        if failure := self._failure or lost:
            raise failure
        return how

    def _serve(self) -> str:
        # All in one function, with local names, and no object made for a request: at 100 000
        # requests a second an attribute that is looked up for each costs 0.3 % of a core, a
        # call 1 %, an enum operation 5 %.
        session, intake, workers = self._session, self._intake, self._workers
        sock, inbox, outbox = session.sock, intake.inbox, self._outbox
        recv_into, send, sendmsg = sock.recv_into, sock.send, sock.sendmsg
        preadv, pwrite = os.preadv, os.pwrite
        pack_simple, pack_simple_into = _SIMPLE_WORDS.pack, _SIMPLE_WORDS.pack_into
        pack_data = _STRUCTURED_DATA_WORDS.pack
        header, data_header = self._request.size, self._form.data.size
        simple = self._form.style == HeaderStyle.SIMPLE
        extended = self._form.style == HeaderStyle.EXTENDED
        unpack = _EXTENDED_REQUEST_WORDS if extended else _REQUEST_WORDS
        magic = EXTENDED_REQUEST_MAGIC if extended else REQUEST_MAGIC
        a_read = magic << 32 | _READ
        a_write = magic << 32 | (_PAYLOAD << 16 if extended else 0) | _WRITE
        size, misaligned = self._rules.size, self._rules.minimum_block - 1
        # Only a plain file has the fast ways: up to how many bytes.
        file, base, in_memory, nowait = -1, 0, True, self._nowait
        short = long = 0
        whole = -1
        parts: list[Part] = []
        reads: list[Read | tuple[int, int, int]] = []
        pages, first, last = NO_WINDOW
        seen = None
        if plain := self._storage.plain_file:
            assert self._lending
            file, base, in_memory, mapping = plain
            short, long = LONG, self._rules.maximum_payload
            whole = -1 if self._export.is_read_only else _WHOLE
            parts, reads = self._lending.parts, self._lending.reads
            seen = None if in_memory else mapping.seen
        quickly = short, long, whole
        lends = False  # whether short reads are sent from the file's pages
        inboxes = 0
        pace = Pace(monotonic())
        patience, penalty = 0, _PENALTY  # inboxes left to the workers, and how many next time
        waited = trust = 0  # how often the thread has slept, inboxes that went well since
        armed = False  # whether a receive gives up after _IDLE seconds
        requests = bytes_read = bytes_written = 0
        start, end = 0, len(self._trailing)
        inbox[:end] = self._trailing
        self._trailing = b""
        try:
            while True:
                # Timed where a slow request would hold others up. Writing blocks if too much
                # waits to be written back, and reading where the file system cannot tell
                # whether it will.
                began = 0.0
                if not in_memory and (end > 8192 or (end > header and not nowait)):
                    began = monotonic()
                    waited = getrusage(RUSAGE_THREAD).ru_nvcsw
                if not inboxes & 63:
                    now = monotonic()
                    tick = int(now) >> 5 & 127 | 128  # lasts 32 seconds, and is never 0
                    lends = short > 0 and self._can_lend()
                    if pace.look(now, requests, inboxes):
                        set_policy(batch=pace.batch)
                inboxes += 1
                position = 0  # bytes of replies in the outbox
                lent = 0  # bytes of replies that are sent from the file
                longest = 0  # bytes of the last long write
                while end - start >= header:
                    kind, cookie, offset, length = unpack(inbox, start)
                    if (
                        kind == a_read
                        and 0 < length < short
                        and offset + length <= size
                        and not (misaligned and (offset | length) & misaligned)
                    ):
                        if (
                            lends
                            and first <= offset
                            and offset + length <= last
                            and (
                                seen is None
                                or (
                                    seen[base + offset >> _PAGE_SHIFT] == tick
                                    and seen[base + offset + length - 1 >> _PAGE_SHIFT] == tick
                                )
                            )
                        ):
                            # No call for what differs: it would cost more than the packing.
                            if simple:
                                opening = pack_simple(_SIMPLE_OK, cookie)
                            elif extended:
                                opening = _EXTENDED_DATA_WORDS.pack(
                                    _EXTENDED_DATA, cookie, offset, length + 8, offset
                                )
                            else:
                                opening = pack_data(_STRUCTURED_DATA, cookie, length + 8, offset)
                            parts.append(opening)
                            parts.append(pages[offset - first : offset - first + length])
                            reads.append((cookie, offset, length))
                            lent += data_header + length
                            start += header
                            requests += 1
                            bytes_read += length
                            if lent >= _OUTBOX or len(parts) > _MOST_PARTS:
                                position = lent = self._send_all(position, lent)
                                began = 0.0
                            continue
                        if lends:
                            if not first <= offset < last:
                                pages, first, last = mapping.window(offset)
                            if offset < first or offset + length > last:
                                pass  # not mapped: copied
                            elif seen is None or mapping.is_cached(offset, length, nowait, tick):
                                continue  # once more
                            else:
                                start += header
                                requests += 1
                                self._dispatch(_READ, 0, cookie, offset, length)
                                continue

                        body = position + data_header
                        after = body + length
                        try:
                            count = preadv(file, (outbox[body:after],), base + offset, nowait)
                        except OSError:
                            count = -1
                        start += header
                        requests += 1
                        if count != length:
                            # Not in the page cache; or it fails, and the storage knows why.
                            self._dispatch(_READ, 0, cookie, offset, length)
                            continue
                        outbox[position:body] = self._form.data_header(cookie, offset, length)
                        position = after
                        bytes_read += length

                    elif (
                        kind == a_write
                        and length <= whole
                        and offset + length <= size
                        and not (misaligned and (offset | length) & misaligned)
                    ):
                        payload = start + header
                        after = payload + length
                        if after > end:
                            if start or position or lent or session.ending:
                                break  # the rest will come
                            # Most clients send the payload after the header, in a call of its
                            # own. To wait for it here saves a round through all below.
                            end += intake.receive(inbox[end:INBOX])
                            continue
                        start = after
                        requests += 1
                        try:
                            count = pwrite(file, inbox[payload:after], base + offset)
                        except OSError:
                            count = -1
                        if count != length:
                            # Once more, by the storage, which knows what to say.
                            position = lent = self._send_all(position, lent)
                            data = inbox[payload:after]
                            self._executor.perform(_WRITE, 0, cookie, offset, length, data)
                            continue
                        if extended:
                            _EXTENDED_WORDS.pack_into(
                                outbox, position, _EXTENDED_OK, cookie, offset, 0
                            )
                            position += 32
                        else:
                            pack_simple_into(outbox, position, _SIMPLE_OK, cookie)
                            position += 16
                        bytes_written += length

                    elif (
                        kind == a_read
                        and LONG <= length <= long
                        and offset + length <= size
                        and not (misaligned and (offset | length) & misaligned)
                    ):
                        start += header
                        requests += 1
                        assert self._lending
                        queued = self._lending.answer(cookie, offset, length, nowait, tick)
                        if queued < 0:
                            self._dispatch(_READ, 0, cookie, offset, length)
                        elif queued:
                            lent += queued
                            bytes_read += length
                            if lent >= _OUTBOX:
                                position = lent = self._send_all(position, lent)
                                began = 0.0

                    else:
                        # A step aside, for whatever is rare or wrong.
                        position = lent = self._send_all(position, lent)
                        if kind >> 32 != magic:
                            raise RemoteProtocolError(
                                f"a request begins with the magic {kind >> 32:#010x}"
                            )
                        command = kind & 0xFFFF
                        if command == _DISCONNECT:
                            return "disconnected"
                        taken = self._take(start, end, inline=patience == 0)
                        if taken is None:
                            break  # the rest will come
                        start, end = taken
                        requests += 1
                        if command == _WRITE:
                            longest = length
                        continue

                    if (
                        began
                        and monotonic() - began > _SLOW
                        and getrusage(RUSAGE_THREAD).ru_nvcsw > waited
                        and short
                    ):
                        # It has waited, and not only for a busy processor. Leave the storage to
                        # the workers, for longer each time.
                        patience, penalty = penalty, min(2 * penalty, _PATIENCE)
                        began = 0.0  # once for each inbox
                        whole = -1
                        if not nowait:
                            short = long = 0
                    if position >= _OUTBOX:
                        position = lent = self._send_all(position, lent)
                        began = 0.0  # sending may take as long as the client likes

                if patience:
                    patience -= 1
                    if not patience:
                        short, long, whole = quickly
                    trust = 0
                elif penalty > _PENALTY and (trust := trust + 1) > penalty:
                    penalty = _PENALTY

                if workers.pending or (lent and position):
                    self._send_all(position, lent)
                elif lent:
                    try:
                        count = sendmsg(parts)
                    except OSError:
                        count = 0  # tried again, to see which it is
                    if count == lent:
                        parts.clear()
                        reads.clear()
                    else:
                        self._go_on_sending(0, lent, count)
                elif position:
                    count = send(outbox[:position])
                    if count < position:
                        self._outlet.send(outbox[count:position])
                session.progress = requests, bytes_read, bytes_written

                limit = INBOX
                if longest > _WHOLE and whole >= 0:
                    if self._is_unix:
                        limit = header  # the next payload shall be spliced, and not come in here
                    else:
                        # Whole requests only, so that nothing has to be moved to the front.
                        limit = INBOX // (longest + header) * (longest + header) or INBOX

                if start == end:
                    start = 0
                    session.idle = True
                    ending = session.ending
                    if ending:
                        if not (left := self._left_to_hear()):
                            return "was let go"
                        limit = min(limit, left)
                    while True:
                        try:
                            end = got = recv_into(inbox, limit)
                            break
                        except BlockingIOError:
                            intake.give_back()
                            self._outbox_memory.madvise(mmap.MADV_DONTNEED)
                            armed = False
                            intake.set_timeout(0)
                            inboxes = (inboxes | 63) + 1  # the tick is old by now
                    session.idle = False
                    if not armed:
                        armed = True
                        intake.set_timeout(_IDLE)
                    if not end:
                        return "hung up"
                else:
                    # A piece of a request is left over: to the front, where there is room for the
                    # rest, and where its payload will be aligned.
                    if start:
                        inbox[: end - start] = inbox[start:end]
                        start, end = 0, end - start
                    most = max(limit, end + header)
                    ending = session.ending
                    if ending:
                        # What has begun to arrive is taken to its end, and nothing behind it.
                        most = min(most, end + (self._left_to_hear() or self._missing(end)))
                    got = intake.receive(inbox[end:most])
                    end += got
                if ending:
                    self._last = max(0, self._left_to_hear() - got)
        finally:
            session.progress = requests, bytes_read, bytes_written

    # Sending.

    def _send_all(self, position: int, lent: int) -> int:
        """Send what waits, and give 0.

        Args:
            position: bytes of replies in the outbox.
            lent: bytes of replies that are sent from the file.
        """
        if not lent:
            if position:
                self._outlet.send(self._outbox[:position])
            return 0
        assert self._lending
        if position:
            self._lending.parts.insert(0, self._outbox[:position])
        return self._go_on_sending(position, position + lent, 0)

    def _go_on_sending(self, lead: int, total: int, sent: int) -> int:
        """Send what is left of the parts, and give 0; for the arguments see `Lending.send`."""
        assert self._lending
        for cookie, offset, length in self._lending.send(lead, total, sent):
            self._dispatch(_READ, _DF, cookie, offset, length)
        return 0

    def _can_lend(self) -> bool:
        """Tell whether short reads may be sent from the file's pages without a look."""
        plain = self._storage.plain_file
        if plain is None:
            return False
        status = os.fstat(plain.fd)
        if stat.S_ISREG(status.st_mode) and status.st_size < plain.start + self._storage.size:
            # It has been truncated. The rest of its last page can be read there, as zeroes.
            return False
        if plain.in_memory:
            # To read a hole there by its page would make it one.
            return not self._storage.is_sparse
        return self._nowait != 0 and plain.mapping.seen is not None

    # Requests that the loop does not do itself.

    def _take(self, start: int, end: int, *, inline: bool) -> tuple[int, int] | None:
        """Do the request at `inbox[start:end]`, or have it done.

        Args:
            start: where the request begins.
            end: where what has been received ends.
            inline: whether the storage is quick enough for this thread.

        Returns:
            Where the rest of the inbox begins and ends, or None if some of the request is
            missing and shall be received first.

        Raises:
            RemoteProtocolError: far more is announced than may be sent; the error is out.
        """
        _, flags, command, cookie, offset, length = self._request.unpack_from(
            self._intake.inbox, start
        )
        flags, announced, error = self._payload(command, flags, length)
        filtered = announced if command == _BLOCK_STATUS else 0
        if not error and not filtered:
            error = self._rules.check(command, flags, offset, length)
        payload = start + self._request.size
        after = payload + announced
        if after > end:
            if announced <= _WHOLE:
                return None
            self._take_long(
                flags, cookie, offset, announced, error or (filtered and _EINVAL), payload, end,
                inline=inline,
            )  # fmt: skip
            return 0, 0
        only = None
        if filtered and not error:
            try:
                length, only = parse_status_filter(self._intake.inbox[payload:after])
                error = self._rules.check(command, flags, offset, length)
                if len(set(only)) < len(only) or not self._contexts.keys() >= set(only) or not only:
                    error = _EINVAL
            except RemoteProtocolError:
                error = _EINVAL
        if error:
            self._executor.refuse(error, cookie, offset)
        elif command == _READ and not length:
            self._outlet.send(self._form.nothing_read(cookie, offset))
        elif command == _WRITE:
            data = self._intake.inbox[payload:after]
            if inline and not flags and self._storage.plain_file:
                self._executor.perform(command, flags, cookie, offset, length, data)
            else:
                self._dispatch(command, flags, cookie, offset, length, data)
        else:
            self._dispatch(command, flags, cookie, offset, length, only=only)
        return after, end

    def _payload(self, command: int, flags: int, length: int) -> tuple[int, int, int]:
        """Tell how long a request's payload is.

        Returns:
            The flags without the one that says so, the payload's length, and an error.
        """
        if self._form.style != HeaderStyle.EXTENDED:
            return flags, length if command == _WRITE else 0, 0
        if not flags & _PAYLOAD:
            return flags, 0, _EINVAL if command == _WRITE else 0
        allowed = command == _WRITE or (command == _BLOCK_STATUS and self._contexts)
        return flags ^ _PAYLOAD, length, 0 if allowed else _EINVAL

    def _dispatch(
        self,
        command: int,
        flags: int,
        cookie: int,
        offset: int,
        length: int,
        data: memoryview | None = None,
        only: tuple[int, ...] | None = None,
    ) -> None:
        """Have a worker do a request, or do it here if there is none to be had."""
        workers, perform = self._workers, self._executor.perform
        if self._storage.waits:
            cost = 0
            if command == _READ:
                cost = min(length, PIECE) if self._form.chunked and not flags & _DF else length
            elif data is not None:
                cost = length
            if workers.reserve(cost):
                # The inbox will be used again before the worker is done.
                kept = None if data is None else memoryview(bytes(data))
                request = (command, flags, cookie, offset, length, kept, only)
                if workers.submit(self._job(*request), cost, reserved=True):
                    return
        perform(command, flags, cookie, offset, length, data, only, frugal=True)

    def _job(self, *request: Any) -> Callable[[], None]:
        def do() -> None:
            try:
                self._executor.perform(*request)
            except OSError:
                self._session.cut()  # the connection broke; the other thread is to hear of it
            except Exception as error:
                self._failure = error
                self._session.cut()

        return do

    def _take_long(
        self,
        flags: int,
        cookie: int,
        offset: int,
        length: int,
        error: int,
        payload: int,
        end: int,
        *,
        inline: bool,
    ) -> None:
        """Take a payload that is not in the inbox as a whole, and store it unless `error`.

        Args:
            flags: the request's.
            cookie: the request's.
            offset: where to write.
            length: bytes of payload.
            error: why the request is refused, or 0. Its payload has to be read nevertheless.
            payload: where in the inbox it begins.
            end: where in the inbox the received bytes end; they all belong to the payload.
            inline: whether the storage is quick enough for this thread.

        Raises:
            RemoteProtocolError: far more is announced than may be sent; the error is out.
        """
        if self._last is not None:
            self._last = max(0, self._last - (length - (end - payload)))
        if error:
            if length > 2 * self._rules.maximum_payload:
                self._executor.refuse(error, cookie, offset)
                raise RemoteProtocolError(f"a request announces {length} bytes of payload")
            self._intake.skip(length - (end - payload))
            self._executor.refuse(error, cookie, offset)
            return
        storage, workers = self._storage, self._workers
        plain = storage.plain_file if inline else None
        if not plain and storage.waits and workers.reserve(length):
            try:
                data = memoryview(bytearray(length))
                data[: end - payload] = self._intake.inbox[payload:end]
                self._intake.fill(data[end - payload :])
            except BaseException:
                workers.release(length)
                raise
            request = (_WRITE, flags, cookie, offset, length, data)
            if not workers.submit(self._job(*request), length, reserved=True):
                self._executor.perform(*request)
            return
        fua = flags & _FUA != 0
        try:
            if plain and self._is_unix and length - (end - payload) >= SPLICE:
                self._intake.splice(storage, plain, offset, length, payload, end)
            else:
                self._intake.store(storage, offset, length, fua and not plain, payload, end)
        except StoringFailedError as failed:
            self._executor.fail(failed.why, _WRITE, cookie, offset, length)
            return
        self._session.count(bytes_written=length)
        if fua and plain:
            # The worker that flushes tells that it is written.
            self._dispatch(_FLUSH, 0, cookie, offset, 0)
        else:
            self._outlet.send(self._form.success(cookie, offset))

    # The end.

    def _left_to_hear(self) -> int:
        """Give how many bytes are still to be heard from a client that is to be let go.

        What had arrived when this was first asked is answered. A client that never stops to
        send would hold up the end otherwise.
        """
        if self._last is None:
            self._last = self._session.arrived()
        return self._last

    def _missing(self, end: int) -> int:
        """Give how many bytes the request at the front of the inbox lacks, as far as is known."""
        header = self._request.size
        if end < header:
            return header - end
        length: int = self._request.unpack_from(self._intake.inbox)[5]
        return header + length - end


def _nowait_flag(file: int) -> int:
    """Give the flag of reads that do not wait, or 0 if the file system does not know it."""
    try:
        os.preadv(file, (bytearray(1),), 0, os.RWF_NOWAIT)
    except BlockingIOError:
        pass
    except OSError:
        return 0
    return os.RWF_NOWAIT
