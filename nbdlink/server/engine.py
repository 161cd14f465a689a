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
  * Of a storage that is no plain file, what it says it does at once: into the outbox, and
    from the inbox, too (`prompt`).
  * Everything else: the `Executor`, in a worker thread. So a cold read, a flush or a slow disk
    never holds the queue up. Replies then come in another order than the requests, which the
    protocol allows.

The limits that keep memory bounded, however the client behaves:

  * A write of more than `WHOLE` bytes is not waited for in the inbox. Its payload is received
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
import threading
from resource import RUSAGE_THREAD, getrusage
from time import monotonic
from typing import Final

from nbdlink.errors import RemoteProtocolError, TransportError
from nbdlink.protocol.constants import (
    EXTENDED_REQUEST_MAGIC,
    REQUEST_MAGIC,
    Command,
    CommandFlag,
    HeaderStyle,
)
from nbdlink.protocol.transmission import EXTENDED_REQUEST, REQUEST
from nbdlink.server import prompt
from nbdlink.server.dispatcher import WHOLE, Dispatcher
from nbdlink.server.executor import PIECE
from nbdlink.server.intake import INBOX, HungUpError, Intake, buffer
from nbdlink.server.lending import COPIED, LONG, Lending, Read
from nbdlink.server.negotiate import NegotiatedSession
from nbdlink.server.outlet import Outlet, Part
from nbdlink.server.pace import Pace, set_policy
from nbdlink.server.replies import ReplyFormat
from nbdlink.server.sessions import Session
from nbdlink.server.words import (
    EXTENDED_DATA,
    EXTENDED_DATA_WORDS,
    EXTENDED_OK,
    EXTENDED_REQUEST_WORDS,
    EXTENDED_WORDS,
    REQUEST_WORDS,
    SIMPLE_OK,
    SIMPLE_WORDS,
    STRUCTURED_DATA,
    STRUCTURED_DATA_WORDS,
)
from nbdlink.server.workers import Workers
from nbdlink.storage.mapping import NO_WINDOW, PAGE

# Plain numbers: comparing with a member of an enum takes three times as long.
_READ: Final = int(Command.READ)
_WRITE: Final = int(Command.WRITE)
_DISCONNECT: Final = int(Command.DISC)
_DF: Final = int(CommandFlag.DF)
_PAYLOAD: Final = int(CommandFlag.PAYLOAD_LEN)

DISCONNECTED: Final = "disconnected"
"""The words for a client that has said goodbye."""

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
        self._trailing = negotiated.trailing
        self._form = form = ReplyFormat(negotiated.style)
        request = EXTENDED_REQUEST if form.style == HeaderStyle.EXTENDED else REQUEST
        self._intake = Intake(session, request)
        self._workers = workers = Workers(f"{threading.current_thread().name}-worker")
        self._outlet = outlet = Outlet(session.sock, workers)
        self._aside = Dispatcher(session, negotiated, form, self._intake, outlet, workers)
        plain = self._storage.plain_file
        # TLS in this process encrypts what it can read without being killed for it: copies.
        self._copies = not isinstance(session.sock, socket.socket)
        self._lending = plain and Lending(
            self._storage,
            plain,
            form,
            outlet,
            workers,
            self._aside.executor,
            session,
            copies=self._copies,
        )
        self._at_once = None if plain else self._storage.at_once
        # Data is page aligned behind the first header.
        head = form.data.size
        size = _OUTBOX + head + (PIECE if self._at_once else max(LONG, COPIED))
        self._outbox_memory, self._outbox = buffer(size, mmap.PAGESIZE - head)

    def run(self) -> str:
        """Serve until the client leaves; give the words for how it left.

        Raises:
            RemoteProtocolError: the client broke the protocol; hang up.
            StorageError: the storage failed in the middle of a reply; hang up.
            OSError: the connection broke.
        """
        workers = self._workers
        lost: OSError | TransportError | None = None
        try:
            how = self._serve()
        except HungUpError:
            how = "hung up in the middle of a request"
        except (OSError, TransportError) as error:
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
        try:
            if failure := self._aside.failure or lost:
                raise failure
            return how
        finally:
            # An exception knows this frame; if the frame kept it, both would stay, and the
            # mapped file with them, until the collector comes by.
            failure = lost = self._aside.failure = None

    def _serve(self) -> str:
        # All in one function, with local names, and no object made for a request: at 100 000
        # requests a second an attribute that is looked up for each costs 0.3 % of a core, a
        # call 1 %, an enum operation 5 %.
        session, intake, workers = self._session, self._intake, self._workers
        aside = self._aside
        sock, inbox, outbox = session.sock, intake.inbox, self._outbox
        recv_into, send, sendmsg = sock.recv_into, sock.send, sock.sendmsg
        preadv: prompt.Read = os.preadv
        pwrite: prompt.Write = os.pwrite
        pack_simple, pack_simple_into = SIMPLE_WORDS.pack, SIMPLE_WORDS.pack_into
        pack_data = STRUCTURED_DATA_WORDS.pack
        header, data_header = intake.request.size, self._form.data.size
        simple = self._form.style == HeaderStyle.SIMPLE
        extended = self._form.style == HeaderStyle.EXTENDED
        unpack = EXTENDED_REQUEST_WORDS if extended else REQUEST_WORDS
        magic = EXTENDED_REQUEST_MAGIC if extended else REQUEST_MAGIC
        a_read = magic << 32 | _READ
        a_write = magic << 32 | (_PAYLOAD << 16 if extended else 0) | _WRITE
        size, misaligned = self._rules.size, self._rules.minimum_block - 1
        # The fast ways: up to how many bytes. Only a plain file has all of them.
        file, base, in_memory, nowait = -1, 0, True, 0
        short = long = guarded = 0
        whole = -1
        parts: list[Part] = []
        reads: list[Read | tuple[int, int, int]] = []
        pages, first, last = NO_WINDOW
        seen = None
        if plain := self._storage.plain_file:
            assert self._lending
            file, base, in_memory, mapping, guarded = plain
            short, long = LONG, self._rules.maximum_payload
            if self._copies and not self._storage.is_sparse:
                short = COPIED + 1
            whole = -1 if self._export.is_read_only else WHOLE
            parts, reads = self._lending.parts, self._lending.reads
            seen, nowait = None if in_memory else mapping.seen, mapping.nowait
        elif at_once := self._at_once:
            preadv, pwrite = prompt.as_system_calls(at_once)
            in_memory, nowait, short = at_once.in_memory, at_once.nowait, PIECE + 1
            whole = -1 if self._export.is_read_only or at_once.write is None else WHOLE
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
                                opening = pack_simple(SIMPLE_OK, cookie)
                            elif extended:
                                opening = EXTENDED_DATA_WORDS.pack(
                                    EXTENDED_DATA, cookie, offset, length + 8, offset
                                )
                            else:
                                opening = pack_data(STRUCTURED_DATA, cookie, length + 8, offset)
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
                            elif seen is None or mapping.is_cached(offset, length, tick):
                                continue  # once more
                            else:
                                start += header
                                requests += 1
                                aside.dispatch(_READ, 0, cookie, offset, length)
                                continue

                        if position and length >= LONG:
                            # Data at the front is page aligned. 8 to 24 bytes behind the beginning
                            # of a page, 64 KiB took three times as long to be read.
                            position = lent = self._send_all(position, lent)
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
                            aside.dispatch(_READ, 0, cookie, offset, length)
                            continue
                        outbox[position:body] = self._form.data_header(cookie, offset, length)
                        position = after
                        bytes_read += length

                    elif (
                        kind == a_write
                        and length <= whole
                        and guarded <= offset <= size - length
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
                            # Once more, by the storage, which may wait, and knows what to say.
                            data = inbox[payload:after]
                            aside.dispatch(_WRITE, 0, cookie, offset, length, data)
                            continue
                        if extended:
                            EXTENDED_WORDS.pack_into(
                                outbox, position, EXTENDED_OK, cookie, offset, 0
                            )
                            position += 32
                        else:
                            pack_simple_into(outbox, position, SIMPLE_OK, cookie)
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
                        queued = self._lending.answer(cookie, offset, length, tick)
                        if queued < 0:
                            aside.dispatch(_READ, 0, cookie, offset, length)
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
                            return DISCONNECTED
                        taken = aside.take(start, end, inline=patience == 0)
                        if taken is None:
                            break  # the rest will come
                        start, end = taken
                        requests += 1
                        if command == _WRITE:
                            longest = length
                        if aside.rules.size != size:
                            # It has grown. Nothing is lent now, so nothing refers to what was.
                            size = aside.rules.size
                            if plain := self._storage.plain_file:
                                assert self._lending
                                self._lending.plain = plain
                                mapping = plain.mapping
                                seen = None if in_memory else mapping.seen
                                pages, first, last = NO_WINDOW
                                lends = short > 0 and self._can_lend()
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
                if longest > WHOLE and whole >= 0:
                    if intake.is_unix:
                        limit = header  # the next payload shall be spliced, and not come in here
                    else:
                        # Whole requests only, so that nothing has to be moved to the front.
                        limit = INBOX // (longest + header) * (longest + header) or INBOX

                if start == end:
                    start = 0
                    session.idle = True
                    ending = session.ending
                    if ending:
                        if not (left := intake.left_to_hear()):
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
                        most = min(most, end + (intake.left_to_hear() or intake.missing(end)))
                    got = intake.receive(inbox[end:most])
                    end += got
                if ending:
                    intake.note(got)
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
            self._aside.dispatch(_READ, _DF, cookie, offset, length)
        return 0

    def _can_lend(self) -> bool:
        """Tell whether short reads may be sent from the file's pages without a look."""
        plain = self._storage.plain_file
        if plain is None or self._copies:
            return False
        status = os.fstat(plain.fd)
        if stat.S_ISREG(status.st_mode) and status.st_size < plain.start + self._storage.size:
            # It has been truncated. The rest of its last page can be read there, as zeroes.
            return False
        if plain.in_memory:
            # To read a hole there by its page would make it one.
            return not self._storage.is_sparse
        return plain.mapping.nowait != 0 and plain.mapping.seen is not None
