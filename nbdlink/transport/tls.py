"""A socket with TLS on it.

Theory of operation. OpenSSL works in memory (BIOs); the socket is ours. So OpenSSL never waits,
one lock that is held for microseconds lets a thread receive while others send, and one system
call moves many records. A stream has two ways of receiving:

  * Until the end of the NBD negotiation it takes one record at a time off the socket, exactly,
    and counts those that are protected by the session's final keys, in both directions. So
    between two messages nothing that was received is left undecrypted, and the connection can
    be handed to the kernel with its keys (`ktls`).
  * After `release` it takes whatever has arrived.

Records: RFC 8446, section 5. The final keys of a direction protect everything behind its
Finished message; for both sides these are the application-data records that come or go once
OpenSSL says that the handshake is complete, a server's session tickets among them.

A connection that ends without close_notify was cut off, by accident or by somebody, and that is
an error, not the end of a file (RFC 8446, section 6.1).
"""

from __future__ import annotations

import contextlib
import mmap
import select
import socket
import struct
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from cryptography import x509
from OpenSSL import SSL

from nbdlink.errors import TLSError, TransportError
from nbdlink.transport import bindings
from nbdlink.transport.alerts import explain_failure, explain_stream, suspicion
from nbdlink.transport.credentials import describe
from nbdlink.transport.stream import Deadline, reason
from nbdlink.transport.tlscontext import Judgement, reasons

_lib: Any = SSL._lib  # type: ignore[attr-defined]
_ffi: Any = SSL._ffi  # type: ignore[attr-defined]

# A call through the library's object would look the function up each time.
_read, _write = _lib.SSL_read, _lib.SSL_write
_memory, _read_memory, _write_memory = _lib.BIO_get_mem_data, _lib.BIO_read, _lib.BIO_write

Data = bytes | bytearray | memoryview

_HEADER: Final = struct.Struct(">BBBH")
_ALERT, _APPLICATION_DATA = 21, 23
_RECORD_TYPES: Final = frozenset({20, _ALERT, 22, _APPLICATION_DATA})
_LONGEST_RECORD: Final = (1 << 14) + 2048
"""Bytes of a protected record in TLS 1.2; in 1.3 they are fewer."""
_CHUNK: Final = 144 * 1024
"""Bytes that are encrypted or received in one go: room for 128 KiB of data and the headers to it.

They are nine full records, and small enough for the processor's cache.
"""
_ROOM: Final = _CHUNK + 4096
"""Bytes that a chunk has once it is encrypted, at most: 22 more for each 16 KiB, and alerts."""
_MOST_UNSENT: Final = 2 * _ROOM
"""Bytes that OpenSSL may keep for a peer that takes nothing: more than a chunk, and room for
thousands of answers to new keys."""
_WAITALL: Final = int(socket.MSG_WAITALL)


@dataclass(frozen=True, slots=True)
class TLSSession:
    """What a handshake came to.

    Attributes:
        version: "TLSv1.3" or "TLSv1.2".
        cipher: the suite's name, as OpenSSL spells it.
        peer: the subject of the peer's certificate, or the user of a pre-shared key; None if
            the peer did not say.
        certificate: the peer's certificate, or None.
    """

    version: str
    cipher: str
    peer: str | None
    certificate: x509.Certificate | None


class TLSStream:
    """A socket with TLS on it, to be used like a socket; made by `TLSContext.stream`.

    One thread may receive while others send. What a socket would raise, this raises as well;
    `TLSError` if something is wrong with TLS, `TransportError` if the connection was cut off.

    Attributes:
        session: what the handshake came to, once it is done.
    """

    def __init__(
        self, sock: socket.socket, connection: SSL.Connection, judgement: Judgement
    ) -> None:
        """Take over a socket and an OpenSSL connection that has none."""
        self.session: TLSSession | None = None
        self._sock = sock
        self._connection = connection
        self._judgement = judgement
        self._ssl = connection._ssl
        self._in, self._out = connection._into_ssl, connection._from_ssl
        # What is written is taken as a whole: there is no socket to wait for.
        _lib.SSL_clear_mode(self._ssl, _lib.SSL_MODE_ENABLE_PARTIAL_WRITE)
        self._lock = threading.Lock()  # held for every call of OpenSSL
        self._sending = threading.Lock()  # held from encrypting to sending: records are in order
        self._timeout = sock.gettimeout()
        self._exact = True
        self._counts = False
        self.records_received = self.records_sent = 0
        self._dry = True  # whether OpenSSL has nothing to give before it gets more
        self._deaf = False
        self._closing = False
        # Mapped memory costs nothing before it is touched, and can be given back.
        self._received_memory = mmap.mmap(-1, _CHUNK, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._received = memoryview(self._received_memory)
        self._received_at = _ffi.from_buffer(self._received_memory)
        self._encrypted_memory = mmap.mmap(-1, _ROOM, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._encrypted = memoryview(self._encrypted_memory)
        self._encrypted_at = _ffi.from_buffer(self._encrypted_memory)
        self._backlog = self._encrypted[:0]  # encrypted, and not yet taken by the socket
        self._memory = _ffi.new("char **")
        self._place: Any = None  # where was received last, and the same for OpenSSL
        self._target: Any = None

    # The handshake.

    def handshake(self, deadline: Deadline) -> TLSSession:
        """Agree on keys, and on who is who.

        Raises:
            TLSError: the peer is not believed, does not believe us, or speaks no TLS.
            TransportError: the deadline passed, or the connection broke.
        """
        is_server = self._judgement.role == "client"
        try:
            while True:
                try:
                    self._connection.do_handshake()
                except SSL.WantReadError:
                    self._flush_within(deadline)
                    self._receive_record(deadline)
                else:
                    break
            counts = self._connection.get_protocol_version_name() == "TLSv1.3"
            # What is still to be sent: a server's session tickets count, while a client's
            # Finished has the handshake's keys.
            self._counts = counts and is_server
            self._flush_within(deadline)
            self._counts = counts
        except SSL.Error as error:
            self._say_why(deadline)
            raise explain_failure(error, self._judgement) from None
        except TLSError:
            self._say_why(deadline)
            raise
        except TransportError as error:
            # Programs with GnuTLS like to close the connection without an alert.
            if not is_server and not isinstance(error.__context__, TimeoutError):
                error.hint = suspicion(self._judgement)
            raise
        judgement = self._judgement
        if judgement.host is not None and not judgement.host_matches:
            # Cannot be, as OpenSSL asks us about every certificate; and if, then not in silence.
            raise TLSError(f"the server's certificate was not compared with {judgement.host}")
        session = self._describe()
        if judgement.has_keys and (
            session.certificate is not None or (is_server and not session.peer)
        ):
            raise TLSError(f"the {judgement.role} has not used a pre-shared key")  # cannot be
        self.session = session
        return session

    def _say_why(self, deadline: Deadline) -> None:
        """Send the alert that OpenSSL has made."""
        with contextlib.suppress(TransportError, OSError):
            self._flush_within(deadline)

    def _describe(self) -> TLSSession:
        connection = self._connection
        try:
            certificate = bindings.peer_certificate(connection)
        except Exception:  # malformed, which is no matter if nobody asks who the peer is
            certificate = None
        peer = self._judgement.user if certificate is None else describe(certificate)
        return TLSSession(
            connection.get_protocol_version_name(),
            connection.get_cipher_name() or "?",
            peer,
            certificate,
        )

    def _receive_record(self, deadline: Deadline) -> None:
        """Give OpenSSL one record.

        Raises:
            TLSError: what comes is no TLS record.
            TransportError: the deadline passed, or the connection broke.
        """
        header = self._receive_exactly(_HEADER.size, deadline)
        kind, major, _, length = _HEADER.unpack(header)
        if kind not in _RECORD_TYPES or major != 3:
            raise TLSError(
                f"the {self._judgement.role} does not speak TLS: it sent {bytes(header)!r}"
            )
        if length > _LONGEST_RECORD:
            raise TLSError(f"the {self._judgement.role} sent a TLS record of {length} bytes")
        self._feed(header + self._receive_exactly(length, deadline))
        if self._counts and kind == _APPLICATION_DATA:
            self.records_received += 1

    def _receive_exactly(self, length: int, deadline: Deadline) -> bytes:
        data = b""
        while len(data) < length:
            try:
                self._sock.settimeout(deadline.left())
                piece = self._sock.recv(length - len(data))
            except TimeoutError:
                raise TransportError(f"no answer within {deadline.seconds:g} seconds") from None
            except OSError as error:
                raise TransportError(reason(error)) from None
            if not piece:
                raise self._cut_off()
            data += piece
        return data

    def _feed(self, data: Data) -> None:
        with self._lock:
            taken = _lib.BIO_write(self._in, _ffi.from_buffer(data), len(data))
        if taken != len(data):
            raise MemoryError
        self._dry = False

    def _flush_within(self, deadline: Deadline) -> None:
        with self._sending:
            try:
                self._flush(deadline)
            except TimeoutError:
                raise TransportError(
                    f"the peer took nothing for {deadline.seconds:g} seconds"
                ) from None
            except OSError as error:
                raise TransportError(reason(error)) from None

    # Receiving.

    def recv(self, limit: int, flags: int = 0) -> bytes:
        """Receive up to `limit` bytes; none at all is the end of the stream."""
        place = bytearray(limit)
        try:
            return bytes(place[: self.recv_into(place, limit, flags)])
        finally:
            self._place = self._target = None

    def recv_into(self, place: bytearray | memoryview, count: int = 0, flags: int = 0) -> int:
        """Receive into `place` up to `count` bytes, or all that fit; give how many.

        With MSG_WAITALL there are fewer only at the end of the stream.

        Raises:
            TLSError: something is wrong with TLS, or the peer changes its keys again and again
                and takes none of the answers.
        """
        # Each call of OpenSSL costs a microsecond of the interpreter, so none is made to learn
        # what can be known: a read that gives less than it may has come to a record's end.
        size = count or len(place)
        if place is self._place:
            target = self._target
        else:
            target = _address(place)
            if self._timeout is None and isinstance(place, memoryview):
                # A server's inbox. A client's buffers are let go: they may be resized later.
                self._place, self._target = place, target
        # One for all records: there are some without data, of which a peer may send many.
        deadline = Deadline(self._timeout) if self._timeout else None
        done = 0
        while done < size:
            if not self._dry:
                try:
                    with self._lock:
                        left = size - done
                        got = _read(self._ssl, target + done if done else target, left)
                        if got <= 0:
                            is_end = self._why_nothing(got)
                        else:
                            done += got
                            self._dry = got < left and _memory(self._in, self._memory) == 0
                except TLSError:
                    self._answer()  # by an alert
                    raise
                if got > 0:
                    continue
                if is_end:
                    break
                if self._output():
                    self._answer()
                    if self._output() > _MOST_UNSENT:
                        raise TLSError(
                            f"the {self._judgement.role} asks for new keys again and again, and "
                            "takes no answer"
                        )
            if done and not flags & _WAITALL:
                break
            if self._exact:
                self._receive_record(deadline or Deadline(self._timeout))
                continue
            try:
                if deadline:
                    self._sock.settimeout(deadline.left())
                arrived = self._sock.recv_into(self._received)
            except BlockingIOError:
                if done:
                    break
                self.give_back()
                raise
            if not arrived:
                if self._deaf:
                    break
                raise self._cut_off()
            with self._lock:
                if _write_memory(self._in, self._received_at, arrived) != arrived:
                    raise MemoryError
            self._dry = False
        return done

    def _why_nothing(self, result: int) -> bool:
        """Tell whether the stream has ended; the lock is held.

        Raises:
            TLSError: something is wrong.
        """
        error = _lib.SSL_get_error(self._ssl, result)
        if error == _lib.SSL_ERROR_ZERO_RETURN:
            return True
        if error == _lib.SSL_ERROR_WANT_READ:
            self._dry = True
            return False
        try:
            self._connection._raise_ssl_error(self._ssl, result)
        except SSL.Error as failure:
            raise explain_stream(reasons(failure), self._judgement.role) from None
        raise TLSError("OpenSSL wants what it cannot have")

    def _cut_off(self) -> TransportError:
        if self.session is None:
            return TransportError(f"the {self._judgement.role} hung up in the TLS handshake")
        return TransportError("the connection was cut off: it ended without TLS's close_notify")

    def has_pending(self) -> bool:
        """Tell whether something can be received without waiting for the socket."""
        return not self._dry

    def held(self) -> int:
        """Give how many bytes have left the socket and were not received yet, at most.

        OpenSSL does not tell how much it has of a record whose end has not arrived.
        """
        with self._lock:
            return int(_memory(self._in, self._memory)) + _LONGEST_RECORD

    # Sending.

    def send(self, data: Data) -> int:
        """Send `data`, all of it unless the socket does not block; give how much was taken."""
        size = len(data)
        if size > _CHUNK or self._exact or self._timeout == 0 or not size:
            return self.sendmsg((data,))
        # As `sendmsg` does it, without its loops: what most replies take.
        with self._sending:
            if self._backlog:
                self._send_backlog()
            with self._lock:
                result = _write(self._ssl, _ffi.from_buffer(data), size)
                if result <= 0:
                    self._cannot_write(result)
                count = _read_memory(self._out, self._encrypted_at, _ROOM)
            sent = self._sock.send(self._encrypted[:count])
            if sent < count:
                self._backlog = self._encrypted[sent:count]
                self._send_backlog()
            if count == _ROOM:
                self._flush()
        return size

    def sendall(self, data: Data) -> None:
        """Send all of `data`."""
        self.send(data)

    def sendmsg(self, parts: Iterable[Data]) -> int:
        """Send the parts, all of them unless the socket does not block; give how much was taken.

        Small ones are joined: a record for each would cost more than their copying.

        Raises:
            BlockingIOError: the socket, which does not block, has not taken what was sent
                before.
        """
        taken = 0
        blocks = self._timeout != 0
        deadline = Deadline(self._timeout) if self._timeout else None
        with self._sending:
            if self._backlog and not self._send_backlog(deadline):
                raise BlockingIOError
            for chunk in _chunks(parts):
                with self._lock:
                    result = _lib.SSL_write(self._ssl, _ffi.from_buffer(chunk), len(chunk))
                    if result <= 0:
                        self._cannot_write(result)
                taken += len(chunk)
                if not self._flush(deadline) and not blocks:
                    break
        return taken

    def _cannot_write(self, result: int) -> None:
        try:
            self._connection._raise_ssl_error(self._ssl, result)
        except SSL.Error as failure:
            raise explain_stream(reasons(failure), self._judgement.role) from None

    def flush(self) -> bool:
        """Send what a socket that does not block has not taken; tell whether nothing is left."""
        with self._sending:
            return self._send_backlog() and self._flush()

    @property
    def has_backlog(self) -> bool:
        """Whether something is encrypted that the socket has not taken."""
        return len(self._backlog) > 0

    def _flush(self, deadline: Deadline | None = None, *, wait: bool = True) -> bool:
        """Send what OpenSSL has made; tell whether nothing is left. `_sending` is held.

        For the arguments see `_send_backlog`.
        """
        while True:
            with self._lock:
                count = _lib.BIO_read(self._out, self._encrypted_at, len(self._encrypted))
            if count <= 0:
                return True
            is_last = count < len(self._encrypted)
            if self._counts and self._exact:
                self.records_sent += _application_records(self._encrypted[:count])
            self._backlog = self._encrypted[:count]
            if not self._send_backlog(deadline, wait=wait):
                return False
            if is_last:
                return True

    def _send_backlog(self, deadline: Deadline | None = None, *, wait: bool = True) -> bool:
        """Send what is encrypted; tell whether nothing is left. `_sending` is held.

        Args:
            deadline: when all of it must have been taken, however slowly the peer takes it;
                None for the socket's own timeout.
            wait: whether to wait for a socket that does that.
        """
        backlog = self._backlog
        try:
            while backlog:
                if deadline:
                    self._sock.settimeout(deadline.left())
                if not wait and not self._takes_more():
                    return False
                backlog = backlog[self._sock.send(backlog, 0 if wait else socket.MSG_DONTWAIT) :]
        except BlockingIOError:
            return False
        finally:
            self._backlog = backlog
        return True

    def _output(self) -> int:
        """Give how many bytes OpenSSL has made that nobody has begun to send."""
        with self._lock:
            return int(_memory(self._out, self._memory))

    def _takes_more(self) -> bool:
        poll = select.poll()
        poll.register(self._sock, select.POLLOUT)
        return bool(poll.poll(0))

    def _answer(self) -> None:
        """Send what receiving has brought about: the answer to a KeyUpdate, or an alert.

        Who receives never waits for that. If the socket is full, or somebody is sending, it goes
        out with what is sent next, before which the protocol demands it (RFC 8446, section
        4.6.3). To wait would be for ever if the peer did not receive before we did.
        """
        if not self._sending.acquire(blocking=False):
            return
        try:
            with contextlib.suppress(OSError):  # receiving will tell
                if self._send_backlog(wait=False):
                    self._flush(wait=False)
        finally:
            self._sending.release()

    # The rest of a socket.

    @property
    def family(self) -> int:
        """The socket's address family."""
        return self._sock.family

    def release(self) -> None:
        """Receive what there is from now on, not record by record."""
        self._exact = False
        self._judgement.secrets.clear()

    def give_back(self) -> None:
        """Give memory back to the system until it is used again."""
        self._received_memory.madvise(mmap.MADV_DONTNEED)
        if self._sending.acquire(blocking=False):
            try:
                if not self._backlog:
                    self._encrypted_memory.madvise(mmap.MADV_DONTNEED)
            finally:
                self._sending.release()

    def settimeout(self, seconds: float | None) -> None:
        """Let each call take so long; None for ever, 0 for no waiting."""
        self._timeout = seconds
        self._sock.settimeout(seconds)

    def gettimeout(self) -> float | None:
        """Give what `settimeout` was told."""
        return self._timeout

    def setblocking(self, flag: bool) -> None:
        """Wait for the socket or not."""
        self.settimeout(None if flag else 0)

    def setsockopt(self, level: int, option: int, value: int | bytes) -> None:
        """Set an option of the socket."""
        self._sock.setsockopt(level, option, value)

    def fileno(self) -> int:
        """Give the socket's descriptor, or -1 once it is closed."""
        return self._sock.fileno()

    def getpeername(self) -> Any:
        """Give the peer's address."""
        return self._sock.getpeername()

    def shutdown(self, how: int) -> None:
        """Say that nothing more comes (SHUT_WR), hear no more (SHUT_RD), or cut it off (both)."""
        if how == socket.SHUT_RD:
            self._deaf = True
        elif how == socket.SHUT_WR:
            self._say_goodbye()
        self._sock.shutdown(how)

    def close(self) -> None:
        """Say that nothing more comes, and close."""
        if self._sock.fileno() >= 0:
            self._say_goodbye()
            self._sock.close()

    def abandon(self) -> None:
        """Close without a word: another process goes on with the connection."""
        self._closing = True
        self._sock.close()

    def detach_socket(self) -> socket.socket:
        """Give the bare socket away: somebody else has the keys. It is blocking."""
        self._closing = True  # there is nobody left to say goodbye to
        sock = socket.socket(fileno=self._sock.detach())
        sock.settimeout(None)
        return sock

    def secret(self, side: str) -> bytes | None:
        """Give a side's traffic secret ("CLIENT" or "SERVER"), if it is still known."""
        return self._judgement.secrets.get(f"{side}_TRAFFIC_SECRET_0")

    @property
    def is_server(self) -> bool:
        """Whether this is the server's side."""
        return self._judgement.role == "client"

    def _say_goodbye(self) -> None:
        """Send close_notify, if the socket takes it at once."""
        if self._closing or self.session is None:
            return
        self._closing = True
        with contextlib.suppress(OSError, SSL.Error):
            if not self._sending.acquire(timeout=0.1):
                return
            try:
                with self._lock:
                    self._connection.shutdown()
                # The socket stays as it is: another thread may be receiving.
                if self._send_backlog(wait=False):
                    self._flush(wait=False)
            finally:
                self._sending.release()

    def __enter__(self) -> TLSStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _address(place: bytearray | memoryview) -> Any:
    """Give where memory is, for OpenSSL; whoever uses that must keep `place`.

    What `from_buffer` gives is let go at once. Should it be garbage together with a memoryview
    that it was made from, as part of an exception's frames, then Python 3.11 crashes in its
    collector (CPython issue 77894).
    """
    return _ffi.cast("char *", _ffi.from_buffer(place))


def _chunks(parts: Iterable[Data]) -> Iterable[Data]:
    """Join small parts and divide long ones, so that each piece has up to `_CHUNK` bytes."""
    joined: list[Data] = []
    length = 0
    for part in parts:
        size = len(part)
        if length + size <= _CHUNK:
            joined.append(part)
            length += size
            continue
        if length:  # OpenSSL writes nothing only with an error
            yield joined[0] if len(joined) == 1 else b"".join(joined)
        view = memoryview(part)
        while len(view) > _CHUNK:
            yield view[:_CHUNK]
            view = view[_CHUNK:]
        joined, length = [view], len(view)
    if length:
        yield joined[0] if len(joined) == 1 else b"".join(joined)


def _application_records(data: memoryview) -> int:
    """Count the application-data records in `data`, which are whole."""
    count = position = 0
    while position < len(data):
        kind, _, _, length = _HEADER.unpack_from(data, position)
        count += kind == _APPLICATION_DATA
        position += _HEADER.size + length
    return count
