"""Requests to an export from userspace: blocking, or many in flight at once.

How it works: requests are queued and sent as far as the socket takes them; whoever waits for
a reply drives the socket for everybody. One thread at a time is the driver: it sends what is
queued and receives what comes, until the request it waits for is done, and then the next
waiter takes over. So a single-threaded user pays for no thread switch, many threads may share
one connection, and sending never blocks while a server wants its replies taken first.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from nbdlink.client.negotiate import DEFAULT_TIMEOUT, NegotiatedExport, negotiate
from nbdlink.errors import (
    LocalProtocolError,
    NBDError,
    RemoteProtocolError,
    RequestError,
    TransportError,
)
from nbdlink.protocol.constants import Command, CommandFlag, TransmissionFlag, command_name
from nbdlink.protocol.transmission import ReplyReader, RequestHeader, known_error
from nbdlink.transport.stream import Deadline, reason
from nbdlink.uri import Target

Buffer = bytes | bytearray | memoryview

_MAX_LENGTH = 0xFFFF_FFFF
_GATHER = 64
"""Buffers that one `sendmsg` takes; far below IOV_MAX (1024) and enough to fill a socket."""


class Pending:
    """A request on its way. `result` waits for its reply."""

    __slots__ = ("_connection", "_data", "_error", "_header", "done")

    def __init__(
        self, connection: Connection, header: RequestHeader, data: bytearray | None
    ) -> None:
        self._connection = connection
        self._header = header
        self._data = data
        self._error = 0
        self.done = False

    def result(self, timeout: float | None = None) -> bytearray:
        """Wait for the reply; give a read's data, or nothing for other requests.

        Args:
            timeout: seconds, or None for ever. A request that timed out is still on its way.

        Raises:
            RequestError: the server refused the request; the connection lives on.
            TransportError, RemoteProtocolError: the connection is dead.
        """
        self._connection._wait(self, Deadline(timeout))
        if self._error:
            header = self._header
            raise RequestError(
                f"{self._connection.target.address}: {command_name(header.command)} of "
                f"{header.length} bytes at {header.offset}: {os.strerror(self._error).lower()}",
                errno=self._error,
            )
        return bytearray() if self._data is None else self._data


class Connection:
    """An export to read and write; made by `connect`. Safe to share between threads.

    Offsets and lengths are in bytes. Reads and writes longer than the server's maximum payload
    are split. Every method raises `RequestError` if the server refuses, `LocalProtocolError`
    if the export cannot do it or the request reaches past its end, and `TransportError` or
    `RemoteProtocolError` once the connection is dead.

    Attributes:
        target: where the connection leads.
        export: what the server said of the export.
    """

    def __init__(self, target: Target, sock: socket.socket, export: NegotiatedExport) -> None:
        """Take over a socket in transmission."""
        self.target = target
        self.export = export
        self._socket = sock
        sock.setblocking(False)
        self._reader = ReplyReader()
        self._rules = export.rules
        self._requests: dict[int, Pending] = {}
        self._cookie = 0
        self._queue: deque[memoryview] = deque()
        self._driven = False
        self._dead: NBDError | None = None
        self._turn = threading.Condition()
        # Wakes a driver that sleeps for replies when another thread has queued something.
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def size(self) -> int:
        """The export's size in bytes."""
        return self.export.size

    def can(self, flag: TransmissionFlag) -> bool:
        """Tell whether the export announced a transmission flag."""
        return bool(self.export.flags & flag)

    # Blocking requests.

    def pread(self, length: int, offset: int) -> bytearray:
        """Read `length` bytes."""
        self._check(Command.READ, 0, offset, length, split=True)
        data = bytearray(length)
        self.pread_into(data, offset)
        return data

    def pread_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        """Fill `buffer` with what is at `offset`."""
        view = memoryview(buffer).cast("B")
        if view.readonly:
            raise LocalProtocolError("the buffer to read into cannot be written")
        self._check(Command.READ, 0, offset, len(view), split=True)
        self._finish(
            [
                self._submit(RequestHeader(Command.READ, 0, offset + at, len(part)), into=part)
                for at, part in self._parts(view)
            ]
        )

    def pwrite(self, data: Buffer, offset: int, *, fua: bool = False) -> None:
        """Write `data`; with `fua` it is on stable storage when this returns."""
        view = memoryview(data).cast("B")
        flags = self._fua(fua)
        self._check(Command.WRITE, flags, offset, len(view), split=True)
        self._finish(
            [
                self._submit(
                    RequestHeader(Command.WRITE, 0, offset + at, len(part), flags), payload=part
                )
                for at, part in self._parts(view)
            ]
        )

    def flush(self) -> None:
        """Bring every write that was answered so far to stable storage."""
        self.submit_flush().result()

    def trim(self, length: int, offset: int, *, fua: bool = False) -> None:
        """Tell the server that the data is no longer needed."""
        self.submit_trim(length, offset, fua=fua).result()

    def zero(
        self,
        length: int,
        offset: int,
        *,
        fua: bool = False,
        no_hole: bool = False,
        fast: bool = False,
    ) -> None:
        """Write zeroes without sending them.

        Args:
            length: bytes.
            offset: bytes from the export's start.
            fua: be on stable storage when this returns.
            no_hole: keep the space allocated.
            fast: fail with ENOTSUP where this would be no faster than a write.
        """
        self.submit_zero(length, offset, fua=fua, no_hole=no_hole, fast=fast).result()

    def cache(self, length: int, offset: int) -> None:
        """Tell the server that the data will be read soon."""
        self.submit_cache(length, offset).result()

    # Requests in flight: each gives a `Pending` at once.

    def submit_read(self, length: int, offset: int) -> Pending:
        """Begin to read up to the maximum payload."""
        self._check(Command.READ, 0, offset, length)
        data = bytearray(length)
        return self._submit(RequestHeader(Command.READ, 0, offset, length), data=data)

    def submit_write(self, data: Buffer, offset: int, *, fua: bool = False) -> Pending:
        """Begin to write up to the maximum payload; `data` must not change until it is done."""
        view, flags = memoryview(data).cast("B"), self._fua(fua)
        self._check(Command.WRITE, flags, offset, len(view))
        header = RequestHeader(Command.WRITE, 0, offset, len(view), flags)
        return self._submit(header, payload=view)

    def submit_flush(self) -> Pending:
        """Begin to flush."""
        return self._simple(Command.FLUSH, 0, 0, 0)

    def submit_trim(self, length: int, offset: int, *, fua: bool = False) -> Pending:
        """Begin to trim."""
        return self._simple(Command.TRIM, self._fua(fua), offset, length)

    def submit_zero(
        self,
        length: int,
        offset: int,
        *,
        fua: bool = False,
        no_hole: bool = False,
        fast: bool = False,
    ) -> Pending:
        """Begin to write zeroes."""
        flags = self._fua(fua)
        flags |= CommandFlag.NO_HOLE if no_hole else 0
        flags |= CommandFlag.FAST_ZERO if fast else 0
        return self._simple(Command.WRITE_ZEROES, flags, offset, length)

    def submit_cache(self, length: int, offset: int) -> Pending:
        """Begin to cache."""
        return self._simple(Command.CACHE, 0, offset, length)

    def close(self) -> None:
        """Say goodbye and close; requests still in flight fail."""
        with self._turn:
            if self._socket.fileno() < 0:
                return
            if self._dead is None and not self._requests:
                # Nothing is queued, so the goodbye fits into the socket's buffer.
                with contextlib.suppress(OSError):
                    self._socket.send(RequestHeader(Command.DISC, 0).pack())
            self._fail(TransportError(f"{self.target.address}: the connection was closed"))
            while self._driven:
                os.eventfd_write(self._wake, 1)
                self._turn.wait()
            if self._socket.fileno() >= 0:  # another thread may have closed it meanwhile
                self._socket.close()
                os.close(self._wake)

    # Making requests.

    def _fua(self, fua: bool) -> int:
        if fua and not self.can(TransmissionFlag.SEND_FUA):
            raise LocalProtocolError(
                f"{self.target.address}: the export cannot do forced unit access",
                hint="write without fua, then flush",
            )
        return CommandFlag.FUA if fua else 0

    def _parts(self, view: memoryview) -> list[tuple[int, memoryview]]:
        most = self._rules.maximum_payload // self._rules.minimum_block * self._rules.minimum_block
        if len(view) <= most:
            return [(0, view)]
        return [(at, view[at : at + most]) for at in range(0, len(view), most)]

    def _check(
        self, command: Command, flags: int, offset: int, length: int, *, split: bool = False
    ) -> None:
        if offset < 0 or length < 0:
            raise LocalProtocolError("offset and length cannot be negative")
        shown = min(length, self._rules.maximum_payload) if split else length
        last = offset + length - shown
        error = self._rules.check(command, flags, last, shown)
        if not error and split:
            error = self._rules.check(command, flags, offset, shown)
        if error or (length > _MAX_LENGTH and not split):
            raise LocalProtocolError(
                f"{self.target.address}: {command_name(command)} of {length} bytes at {offset} "
                f"does not suit the export ({self._why(command, offset, length)})"
            )

    def _why(self, command: Command, offset: int, length: int) -> str:
        rules = self._rules
        if command in (Command.WRITE, Command.TRIM, Command.WRITE_ZEROES) and rules.flags & (
            TransmissionFlag.READ_ONLY
        ):
            return "it is read-only"
        if offset + length > rules.size:
            return f"it ends at {rules.size}"
        if (offset | length) & (rules.minimum_block - 1):
            return f"its minimum block size is {rules.minimum_block}"
        if length > rules.maximum_payload and command in (Command.READ, Command.WRITE):
            return f"its maximum payload is {rules.maximum_payload}"
        return "the server did not announce that it can"

    def _simple(self, command: Command, flags: int, offset: int, length: int) -> Pending:
        self._check(command, flags, offset, length)
        return self._submit(RequestHeader(command, 0, offset, length, flags))

    def _submit(
        self,
        header: RequestHeader,
        *,
        payload: memoryview | None = None,
        data: bytearray | None = None,
        into: memoryview | None = None,
    ) -> Pending:
        with self._turn:
            if self._dead:
                raise self._dead
            self._cookie = self._cookie + 1 & 0xFFFF_FFFF_FFFF_FFFF
            header = RequestHeader(
                header.command, self._cookie, header.offset, header.length, header.flags
            )
            packed = header.pack()
            pending = Pending(self, header, data)
            target = memoryview(data) if data is not None else into
            self._reader.expect(header.cookie, target)
            self._requests[header.cookie] = pending
            was_empty = not self._queue
            self._queue.append(memoryview(packed))
            if payload is not None and len(payload):
                self._queue.append(payload)
            if self._driven:
                os.eventfd_write(self._wake, 1)
            elif was_empty:
                self._send_queued()
            return pending

    def _finish(self, requests: Sequence[Pending]) -> None:
        """Wait for all of them, then report the first failure: none may be left behind."""
        failure: NBDError | None = None
        for pending in requests:
            try:
                pending.result()
            except NBDError as error:
                failure = failure or error
        if failure:
            raise failure

    # Driving the socket.

    def _wait(self, pending: Pending, deadline: Deadline) -> None:
        with self._turn:
            while not pending.done:
                if self._dead:
                    raise self._dead
                try:
                    left = deadline.left()
                except TimeoutError:
                    raise TransportError(
                        f"{self.target.address}: no reply within {deadline.seconds:g} seconds"
                    ) from None
                if self._driven:
                    self._turn.wait(left)
                    continue
                self._driven = True
                try:
                    self._drive(left)
                finally:
                    self._driven = False
                    self._turn.notify_all()

    def _drive(self, timeout: float | None) -> None:
        """Wait for the socket once, with the lock released, and move what can be moved."""
        events = select.POLLIN | (select.POLLOUT if self._queue else 0)
        poll = select.poll()
        poll.register(self._socket, events)
        poll.register(self._wake, select.POLLIN)
        self._turn.release()
        try:
            ready = dict(poll.poll(None if timeout is None else max(1, int(timeout * 1000))))
        finally:
            self._turn.acquire()
        if self._wake in ready:
            os.eventfd_read(self._wake)
        if self._dead:
            return
        if self._queue:
            self._send_queued()
        if ready.get(self._socket.fileno(), 0) & ~select.POLLOUT:
            self._receive_ready()

    def _send_queued(self) -> None:
        queue = self._queue
        try:
            while queue:
                sent = self._socket.sendmsg([queue[i] for i in range(min(len(queue), _GATHER))])
                while sent and sent >= len(queue[0]):
                    sent -= len(queue.popleft())
                if sent:
                    queue[0] = queue[0][sent:]
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(TransportError(f"{self.target.address}: {reason(error)}"))
        except BaseException:
            self._interrupted()
            raise

    def _receive_ready(self) -> None:
        reader = self._reader
        try:
            while True:
                done = reader.received(self._socket.recv_into(reader.buffer()))
                if done is not None:
                    cookie, error = done
                    pending = self._requests.pop(cookie)
                    pending._error = known_error(error)
                    pending.done = True
                    if not self._requests:
                        return
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(TransportError(f"{self.target.address}: {reason(error)}"))
        except RemoteProtocolError as error:
            error.args = (f"{self.target.address}: {error}",)
            self._fail(error)
        except BaseException:
            self._interrupted()
            raise

    def _interrupted(self) -> None:
        """A signal handler has raised between a system call and its bookkeeping.

        How far the stream is nobody knows then, and to go on would give one thread's data to
        another.
        """
        self._fail(TransportError(f"{self.target.address}: interrupted during a transfer"))

    def _fail(self, error: NBDError) -> None:
        """The connection is dead: everything in flight fails with the first reason."""
        self._dead = self._dead or error
        self._queue.clear()
        self._requests.clear()
        self._turn.notify_all()


def connect(target: Target | str, *, timeout: float | None = DEFAULT_TIMEOUT) -> Connection:
    """Connect to an export, to be used in a `with` block.

    Args:
        target: an NBD URI, `host[:port][/export]`, or a `Target`.
        timeout: seconds for connection and handshake together, or None for ever.

    Raises:
        ConfigError: the target makes no sense.
        TransportError, RemoteProtocolError, OptionError: no such export to be had there.
    """
    place = Target.parse(target) if isinstance(target, str) else target
    sock, export = negotiate(place, timeout=timeout)
    return Connection(place, sock, export)
