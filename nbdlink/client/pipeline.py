"""Requests in flight on a socket, and who moves them.

How it works: requests are queued and sent as far as the socket takes them; whoever waits for
a reply drives the socket for everybody. One thread at a time is the driver: it sends what is
queued and receives what comes, until the request it waits for is done, and then the next
waiter takes over. So a single-threaded user pays for no thread switch, many threads may share
one connection, and sending never blocks while a server wants its replies taken first.
`wait_for_any` drives several sockets at once, for a thread that has requests on all of them.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections import deque
from collections.abc import Iterator

from nbdlink.errors import (
    NBDError,
    RemoteProtocolError,
    RequestError,
    TLSError,
    TransportError,
)
from nbdlink.protocol.constants import (
    EXTENDED_REQUEST_MAGIC,
    REQUEST_MAGIC,
    Command,
    CommandFlag,
    HeaderStyle,
    command_name,
)
from nbdlink.protocol.replies import Awaited, ChunkReader, ReplyReader
from nbdlink.protocol.transmission import EXTENDED_REQUEST, REQUEST, RequestHeader
from nbdlink.transport.stream import Deadline, Wire, reason

_GATHER = 64
"""Buffers that one `sendmsg` takes; far below IOV_MAX (1024) and enough to fill a socket."""

# Plain integers: an operator of IntFlag is a Python function that takes a microsecond.
_PAYLOAD_LEN = int(CommandFlag.PAYLOAD_LEN)
_LAST_COOKIE = 0xFFFF_FFFF_FFFF_FFFF

_SECOND_LOOK = 0.5
"""Seconds to take what has come, once the time for it is over. A process that was stopped did not
see it come, and the connection must not count as dead for that."""


class Pending(Awaited):
    """A request on its way. `result` waits for its reply."""

    __slots__ = ("_data", "_pipeline")

    def __init__(
        self,
        pipeline: Pipeline,
        command: int,
        offset: int,
        length: int,
        flags: int = 0,
        *,
        data: bytearray | None = None,
        into: memoryview | None = None,
        contexts: tuple[int, ...] = (),
    ) -> None:
        """Describe a request; `Pipeline.submit` sends it.

        Args:
            pipeline: where it will be sent.
            command: a `Command`.
            offset: bytes from the export's start.
            length: bytes of the export that it is about.
            flags: command flags.
            data: what `result` gives; for a read also where the data goes.
            into: where a read's data goes instead.
            contexts: ids of the metadata contexts that a block status must tell of.
        """
        payload = memoryview(data) if into is None and data is not None else into
        super().__init__(command, 0, offset, length, flags, payload, contexts)
        self._pipeline = pipeline
        self._data = data

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the reply.

        Args:
            timeout: seconds, or None for as long as the pipeline allows. A request that timed
                out is still on its way.

        Raises:
            RequestError: the server refused the request; the connection lives on.
            TransportError, RemoteProtocolError: the connection is dead.
        """
        if not self.done:
            self._pipeline.wait(self, timeout)
        if self.error:
            raise self._refused()

    def result(self, timeout: float | None = None) -> bytearray:
        """Wait as `wait` does; give a read's data, or nothing for other requests."""
        self.wait(timeout)
        return bytearray() if self._data is None else self._data

    def _refused(self) -> RequestError:
        what = f"{command_name(self.command)} of {self.length} bytes at {self.offset}"
        where = "" if self.error_offset is None else f" at {self.error_offset}"
        said = f" (the server says: {self.message})" if self.message else ""
        return RequestError(
            f"{self._pipeline.address}: {what}: {os.strerror(self.error).lower()}{where}{said}",
            errno=self.error,
            offset=self.error_offset,
        )


class Pipeline:
    """A socket in transmission and the requests on it. Safe to share between threads.

    Attributes:
        address: the server, for messages.
    """

    def __init__(
        self, sock: Wire, style: HeaderStyle, address: str, timeout: float | None = None
    ) -> None:
        """Take over a socket whose handshake agreed on `style`.

        Args:
            sock: the socket.
            style: how requests and replies look.
            address: see the attribute.
            timeout: seconds that whoever waits for a request, and says no time himself, gives
                the server; then the connection counts as dead. None is for ever.
        """
        self.address = address
        self._timeout = timeout
        self._socket = sock
        # Has a say of its own in what is ready: it may hold what the socket has no more.
        self._tls = None if isinstance(sock, socket.socket) else sock
        sock.setblocking(False)
        self._style = style
        self._reader: ReplyReader[Pending] = (
            ReplyReader() if style == HeaderStyle.SIMPLE else ChunkReader(style)
        )
        self._cookie = 0
        self._queue: deque[memoryview] = deque()
        self._held = 0
        self._driven = False
        self._dead: NBDError | None = None
        self._turn = threading.Condition()
        # Wakes a driver that sleeps for replies when another thread has queued something.
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._poll.register(self._wake, select.POLLIN)
        self._polled = select.POLLIN

    def submit(self, request: Pending, payload: memoryview | None = None) -> None:
        """Queue a request, and send what the socket takes.

        Raises:
            TransportError, RemoteProtocolError: the connection is dead.
        """
        with self._turn:
            if self._dead:
                raise self._dead
            request.cookie = self._cookie = self._cookie + 1 & _LAST_COOKIE
            header = self._header(request, payload)
            self._reader.expect(request)
            was_empty = not self._queue
            self._queue.append(memoryview(header))
            if payload is not None and len(payload):
                self._queue.append(payload)
            if self._driven:
                if was_empty:
                    os.eventfd_write(self._wake, 1)
            elif was_empty and not self._held:
                self._send_queued()

    def _header(self, request: Pending, payload: memoryview | None) -> bytes:
        if self._style != HeaderStyle.EXTENDED:
            return REQUEST.pack(
                REQUEST_MAGIC,
                request.flags,
                request.command,
                request.cookie,
                request.offset,
                request.length,
            )
        flags, length = request.flags, request.length
        if payload is not None:
            flags, length = flags | _PAYLOAD_LEN, len(payload)
        return EXTENDED_REQUEST.pack(
            EXTENDED_REQUEST_MAGIC, flags, request.command, request.cookie, request.offset, length
        )

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """Hold back what is submitted in the block, and send it in one go."""
        with self._turn:
            self._held += 1
        try:
            yield
        finally:
            with self._turn:
                self._held -= 1
                if self._queue and not self._held and not self._driven and not self._dead:
                    self._send_queued()

    def wait(self, request: Pending, timeout: float | None = None) -> None:
        """Wait until `request` is done; see `Pending.wait`.

        Raises:
            TransportError: it took too long, or the connection is dead.
            RemoteProtocolError: the connection is dead.
        """
        seconds = self._timeout if timeout is None else timeout
        deadline = Deadline(seconds)
        is_over = False
        with self._turn:
            while not request.done:
                if self._dead:
                    raise self._dead
                try:
                    left = deadline.left()
                except TimeoutError:
                    if timeout is None and not is_over:
                        deadline, is_over = Deadline(_SECOND_LOOK), True
                        continue
                    error = TransportError(f"{self.address}: no reply within {seconds:g} seconds")
                    if timeout is None:
                        self._fail(error)
                    raise error from None
                if self._driven:
                    self._turn.wait(left)
                    continue
                self._driven = True
                try:
                    self._drive(left, request)
                finally:
                    self._driven = False
                    self._turn.notify_all()

    def close(self) -> None:
        """Say goodbye and close; requests still in flight fail."""
        with self._turn:
            if self._socket.fileno() < 0:
                return
            if self._dead is None and not self._reader.outstanding:
                # Nothing is queued, so the goodbye fits into the socket's buffer.
                with contextlib.suppress(OSError, NBDError):
                    self._socket.send(RequestHeader(Command.DISC, 0).pack(self._style))
            self._fail(TransportError(f"{self.address}: the connection was closed"))
            while self._driven:
                self._turn.wait()
            if self._socket.fileno() >= 0:  # another thread may have closed it meanwhile
                self._socket.close()
                os.close(self._wake)

    # Driving the socket. All of this runs with the lock held, except for the sleep.

    def _drive(self, timeout: float | None, request: Pending) -> None:
        """Wait for the socket once, with the lock released, and move what can be moved."""
        self._choose_events()
        ready = self._ready_already()
        if not ready:
            self._turn.release()
            try:
                ready = dict(
                    self._poll.poll(None if timeout is None else max(1, int(timeout * 1000)))
                )
            finally:
                self._turn.acquire()
        self._move(ready, (request,))

    def _ready_already(self) -> dict[int, int]:
        """Tell what can be moved without waiting for the socket."""
        if self._tls is None or not self._tls.has_pending():
            return {}
        return {self._socket.fileno(): select.POLLIN}

    def _wants(self) -> int:
        """Tell what the socket is to be waited for."""
        if self._queue or (self._tls is not None and self._tls.has_backlog):
            return select.POLLIN | select.POLLOUT
        return select.POLLIN

    def _choose_events(self) -> None:
        events = self._wants()
        if events != self._polled:
            self._poll.modify(self._socket, events)
            self._polled = events

    def _move(self, ready: dict[int, int], requests: tuple[Pending, ...]) -> None:
        """Send and receive what is `ready`, as far as `requests` need it."""
        can_send = self._wake in ready
        if can_send:
            os.eventfd_read(self._wake)
        events = ready.get(self._socket.fileno(), 0)
        if (can_send or events & select.POLLOUT) and not self._dead:
            self._send_queued()
        if events & ~select.POLLOUT and not self._dead:
            self._receive_ready(requests)

    def _send_queued(self) -> None:
        queue = self._queue
        try:
            while queue:
                sent = self._socket.sendmsg([queue[i] for i in range(min(len(queue), _GATHER))])
                while sent and sent >= len(queue[0]):
                    sent -= len(queue.popleft())
                if sent:
                    queue[0] = queue[0][sent:]
            if self._tls is not None and self._tls.has_backlog:
                self._tls.flush()
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(TransportError(f"{self.address}: {reason(error)}"))
        except TLSError as error:
            error.args = (f"{self.address}: {error}",)
            self._fail(error)
        except BaseException:
            self._interrupted()
            raise

    def _receive_ready(self, requests: tuple[Pending, ...]) -> None:
        reader = self._reader
        try:
            while True:
                place = reader.buffer()
                count = self._socket.recv_into(place)
                if any(done not in requests for done in reader.received(count)):
                    self._turn.notify_all()  # somebody else's reply has come along
                # Less than asked for is all there is: no need to be told so by another call.
                if count < len(place) or any(request.done for request in requests):
                    return
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(TransportError(f"{self.address}: {reason(error)}"))
        except (RemoteProtocolError, TransportError, TLSError) as error:
            error.args = (f"{self.address}: {error}",)
            self._fail(error)
        except BaseException:
            self._interrupted()
            raise

    def _interrupted(self) -> None:
        """A signal handler has raised between a system call and its bookkeeping.

        How far the stream is nobody knows then, and to go on would give one thread's data to
        another.
        """
        self._fail(TransportError(f"{self.address}: interrupted during a transfer"))

    def _fail(self, error: NBDError) -> None:
        """The connection is dead: everything in flight fails with the first reason."""
        self._dead = self._dead or error
        self._queue.clear()
        self._turn.notify_all()
        if self._driven:
            os.eventfd_write(self._wake, 1)  # the driver may have longer to wait


def wait_for_any(*requests: Pending) -> None:
    """Wait until one of `requests`, which may be on several connections, is done.

    A request's failure is left for `Pending.wait` to report.

    Raises:
        TransportError, RemoteProtocolError: one of the connections is dead.
    """
    pipelines: list[Pipeline] = []
    for request in requests:
        if request._pipeline not in pipelines:
            pipelines.append(request._pipeline)
    with contextlib.ExitStack() as roles:
        # No thread that holds one of these roles waits for another, except in here.
        for pipeline in sorted(pipelines, key=id):
            roles.enter_context(_driving(pipeline))
        poll = select.poll()
        while not any(request.done for request in requests):
            for pipeline in pipelines:
                if pipeline._dead:
                    raise pipeline._dead
            places: dict[int, Pipeline] = {}
            ready: dict[int, int] = {}
            for pipeline in pipelines:
                sock = pipeline._socket.fileno()
                places[sock] = places[pipeline._wake] = pipeline
                poll.register(sock, pipeline._wants())
                poll.register(pipeline._wake, select.POLLIN)
                ready.update(pipeline._ready_already())
            ready = ready or dict(poll.poll())
            for pipeline in {places[number] for number in ready}:
                with pipeline._turn:
                    pipeline._move(ready, requests)


@contextlib.contextmanager
def _driving(pipeline: Pipeline) -> Iterator[None]:
    with pipeline._turn:
        while pipeline._driven:
            pipeline._turn.wait()
        pipeline._driven = True
    try:
        yield
    finally:
        with pipeline._turn:
            pipeline._driven = False
            pipeline._turn.notify_all()
