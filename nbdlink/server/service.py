"""The service around the sessions: listeners, threads, signals and a graceful end.

How it works. One thread accepts; each client has a thread of its own, in which nothing that
goes wrong can reach another client. To stop, the accepting thread

  1. tells every client in transmission to finish the requests that have arrived, and goes on
     to accept meanwhile: newcomers, and those in their handshake, are answered "shutting
     down", which tells their users more than a refused connection;
  2. once the last of them has left, or the grace is over, closes the listeners and breaks off
     the handshakes, which nothing depends on;
  3. breaks off who is still there, makes the storages durable and closes them.

The main thread of a program only waits for signals meanwhile, so that a second one is heard
whatever the first is waiting for. What SIGHUP asks for is done in a thread, too: a disk that does
not answer may hold it up.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import queue
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Final, Self

from nbdlink.server.conversation import Conversations
from nbdlink.server.export import Catalogue
from nbdlink.server.handshake import DEFAULT_TIMEOUT
from nbdlink.server.listeners import Listeners, address_of
from nbdlink.server.notices import Notices
from nbdlink.server.offer import Offer
from nbdlink.server.processes import Processes
from nbdlink.server.security import ServerSecurity
from nbdlink.server.sessions import Phase, Session, Sessions, most_connections
from nbdlink.uri import Target

if TYPE_CHECKING:
    from nbdlink.transport.exposition import Family

_log = logging.getLogger("nbdlink.server")

DEFAULT_GRACE: Final = 5.0
"""Seconds that requests in flight have to finish once the service is told to stop."""

_CHANGED_ITS_MIND: Final = frozenset({errno.EAGAIN, errno.ECONNABORTED, errno.EPROTO})
"""How accepting fails if the client is gone before it could be accepted."""
_PAUSE: Final = 1.0
"""Seconds without accepting after the system ran out of descriptors or memory."""
_ABORT_GRACE: Final = 0.2
"""Seconds for tidying up after the second signal."""
_CUT_GRACE: Final = 1.0
"""Seconds that a thread has to notice that its connection has been broken off."""
_REMINDER: Final = 60.0
"""Seconds after which it is said again that there are too many clients."""


class Service:
    """Serves a catalogue of exports on listening sockets, both of which it takes over.

    Either `run` it in the main thread of a program, or `start` it, and later `stop` and `join`
    it; a `with` block does the latter three.

    Attributes:
        catalogue: the exports.
        sessions: who is connected.
        addresses: what the listeners are bound to: (host, port) or the path of a Unix socket.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        listeners: Sequence[socket.socket],
        *,
        once: bool = False,
        shared: int = 0,
        negotiation_timeout: float = DEFAULT_TIMEOUT,
        grace: float = DEFAULT_GRACE,
        inherited: bool = False,
        on_stopping: Callable[[], None] = lambda: None,
        processes: int = 0,
        on_fork: Callable[[], None] = lambda: None,
        security: ServerSecurity | None = None,
        notices: Notices | None = None,
        offer: Offer | None = None,
    ) -> None:
        """Prepare a service; nothing is accepted before it starts.

        Args:
            catalogue: what to serve. Its storages are flushed and closed at the end.
            listeners: listening sockets, closed at the end.
            once: stop when the last client that came to transmission has gone.
            shared: how many clients may be connected at a time, the others wait to be
                accepted; 0 for any number.
            negotiation_timeout: seconds that a client has for its handshake.
            grace: seconds that requests in flight have to finish at the end.
            inherited: whether the listeners belong to somebody who keeps them (socket
                activation). Then the paths of Unix sockets stay, and who comes while the
                service stops is left to its successor.
            on_stopping: called once it begins to stop, in a thread of the service.
            processes: how many further processes may serve connections. They are forked when
                the service starts, which must be done before there are threads.
            on_fork: called in each of them first.
            security: whether there is TLS, and for whom; None for none.
            notices: who is to be told of a restart; None for nobody.
            offer: whose the catalogue is, if that may change; None if not.
        """
        self.catalogue = catalogue
        self.sessions = Sessions(shared, bound=most_connections(), on_removed=self._wake_up)
        self.addresses = [address_of(sock) for sock in listeners]
        self._processes = Processes(processes, catalogue, security)
        self._conversations = Conversations(
            catalogue,
            self.sessions,
            self._processes,
            security=security,
            notices=notices,
            negotiation_timeout=negotiation_timeout,
            is_closing=lambda: self._stopping,
            on_chosen=self._chosen,
            on_left=self._left,
        )
        self._notices = notices
        self._offer = offer
        self._on_fork = on_fork
        self._security = security
        self._listeners = Listeners(listeners, inherited=inherited)
        self._once = once
        self._grace = grace
        self._grace_ends = math.inf
        self._on_stopping = on_stopping
        self._stopping = False
        self._aborting = False
        self._done = False
        self._paused_until = 0.0
        self._reminded = -math.inf
        # Rung to make the accepting thread look up, and the one that runs in `run`; no
        # descriptor (-1) before and after.
        self._wake = self._finished = -1
        self._wake_lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="nbd-accept", daemon=True)
        self.status = 0

    # Life.

    def start(self) -> None:
        """Begin to accept clients, in a thread of its own."""
        self._processes.start(self._begin_process)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread.start()
        if self._notices:
            self._notices.start()

    def stop(self) -> None:
        """Begin to stop gracefully; `join` waits for the end. Calling it again does nothing."""
        self._stopping = True
        self._wake_up()

    def abort(self) -> None:
        """Stop without grace: connections are broken off, nothing is flushed."""
        self._aborting = True
        self.stop()
        self.sessions.wake()

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the end; tell whether it has come within `timeout` seconds."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
        self.join()

    def run(
        self,
        ready: Callable[[], None] = lambda: None,
        before_stop: Callable[[], None] = lambda: None,
    ) -> int:
        """Serve in the main thread until SIGTERM or SIGINT; give the exit status.

        SIGHUP has it read anew what it was told in files, and renews connections (see `renew`). To
        a server without any files that was started in a terminal it says that the terminal is
        closed, and ends it.

        A second signal breaks off what the first lets finish. The status is 0 after a
        graceful end, and 1 if it was broken off or something could not be made durable.

        Args:
            ready: called once clients and signals are heard. Who tells a script "I am there"
                any earlier may be killed by its signal instead of being stopped.
            before_stop: called when the first signal comes, with everybody still served.
        """
        signals: list[int] = []

        hangups: list[int] = []

        def caught(number: int, _: FrameType | None) -> None:
            # A handler may run while its own thread holds any lock, so it takes none.
            (hangups if number == signal.SIGHUP else signals).append(number)
            os.write(self._finished, b"\0")

        numbers = [signal.SIGTERM, signal.SIGINT]
        may_change = self._offer is not None and self._offer.may_change
        has_files = may_change or self._security is not None
        if has_files or signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
            numbers.append(signal.SIGHUP)
        finished, self._finished = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(finished, True)
        # The interpreter rings as well: it runs handlers in this thread only, and a signal that
        # the kernel gives to another one, or that comes just before the read, does not end it.
        wakeup = signal.set_wakeup_fd(self._finished, warn_on_full_buffer=False)
        before = [(number, signal.signal(number, caught)) for number in numbers]
        renewals: queue.SimpleQueue[bool] = queue.SimpleQueue()
        try:
            self.start()
            threading.Thread(
                target=self._renew_when_told, args=(renewals,), name="nbd-renew", daemon=True
            ).start()
            # Asked before anybody is told that we are there, and may close the terminal.
            has_terminal, session = _has_terminal(), os.getsid(0)
            try:
                ready()
            except BaseException:
                self.stop()
                self.join()
                raise
            # Who goes to the background does so in `ready`, with a session of its own.
            is_attended = not has_files and has_terminal and os.getsid(0) == session
            # One read may be rung for by several at once: look at everything each time.
            while not self._done:
                os.read(finished, 4096)
                if hangups:
                    hangups.clear()
                    if not is_attended:
                        renewals.put(True)
                    elif not signals:  # the kernel tells it, and the shell once more
                        signals.append(signal.SIGHUP)
                if len(signals) > 1:
                    _log.warning("told to stop twice: breaking off")
                    self.abort()
                    self.join(_ABORT_GRACE)
                    return 1
                if signals and not self._stopping:
                    _log.info("told to stop by %s", signal.Signals(signals[0]).name)
                    before_stop()
                    self.stop()
            self.join()
            return self.status
        finally:
            renewals.put(False)
            for number, handler in before:
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)
            if not self._thread.is_alive():
                os.close(finished)
                os.close(self._finished)

    def _renew_when_told(self, renewals: queue.SimpleQueue[bool]) -> None:
        """Renew for each True that comes, one after the other, until False does."""
        while renewals.get():
            try:
                self.renew()
            except Exception as error:  # a storage's bug is nobody else's loss
                _log.error("unexpected %s: %s", type(error).__name__, error)

    def renew(self) -> None:
        """Load credentials and exports anew, and have clients connect again that can.

        These are the ones that have asked to be told when the server is back, so that somebody
        looks after them: they are let go once what they have asked for is answered.
        """
        if self._security is not None:
            self._reload()
        if self._offer is not None and not self._stopping:
            self._offer.renew(self.sessions, self._processes.release)
        if count := self.sessions.renew():
            _log.warning(
                "%s to be renewed", "a connection is" if count == 1 else f"{count} connections are"
            )

    def _reload(self) -> None:
        """Load the credentials anew for those who come from now on; keep them if that fails."""
        assert self._security is not None
        try:
            self._security.reload()
        except Exception as error:  # a file may hold anything
            _log.error("the credentials stay as they are: %s", error)
        else:
            self._processes.reload()
            _log.warning("the credentials have been loaded anew")

    def metrics(self) -> list[Family]:
        """Give what there is to count, for Prometheus; in any thread."""
        from nbdlink.server.metrics import families

        progress = self._processes.progress()  # first: what ends meanwhile is in the books
        return families(self.catalogue, self.sessions.books(), progress, self._processes.alive)

    def uri(self, export: str = "") -> str:
        """Give the URI of an export at the first address, for a client on this machine."""
        address = self.addresses[0]
        tls = self._security is not None and self._security.mode == "require"
        if (wanted := self.catalogue.find(export)) and wanted.is_secured:
            tls = True
        if isinstance(address, str):
            return str(Target(socket=address, export=export, tls=tls))
        host, port = address
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        if tls and host in ("127.0.0.1", "::1"):
            host = "localhost"  # which is what certificates are made for
        return str(Target(host=host, port=port, export=export, tls=tls))

    def _wake_up(self) -> None:
        # Under a lock, so that it never rings a descriptor that belongs to somebody else by now.
        with self._wake_lock:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    # Accepting.

    def _work(self) -> None:
        try:
            with selectors.DefaultSelector() as selector:
                self._accept(selector)
        except Exception as error:
            _log.critical("accepting failed: %s: %s", type(error).__name__, error)
            self.status = 1
        try:
            self._wind_down()
        except Exception as error:
            _log.critical("stopping failed: %s: %s", type(error).__name__, error)
            self.status = 1
        with self._wake_lock:
            os.close(self._wake)
            self._wake = -1
        # Whatever happened, whoever runs the service must hear that it is over.
        self._done = True
        if self._finished >= 0:
            os.write(self._finished, b"\0")

    def _accept(self, selector: selectors.BaseSelector) -> None:
        """Take clients in until there is nobody left to wait for at the end."""
        selector.register(self._wake, selectors.EVENT_READ)
        listening = False
        while not self._is_over():
            now = time.monotonic()
            # Whoever is not accepted waits in the kernel's queue, as with qemu-nbd.
            ready = now >= self._paused_until and self.sessions.has_room()
            if self._stopping and self._listeners.inherited:
                ready = False
            if listening != ready:
                for sock in self._listeners.sockets:
                    if ready:
                        selector.register(sock, selectors.EVENT_READ)
                    else:
                        selector.unregister(sock)
                listening = ready
            until = self._grace_ends
            if now < self._paused_until:
                until = min(until, self._paused_until)
            for key, _ in selector.select(None if until == math.inf else max(0, until - now)):
                if key.fileobj == self._wake:
                    os.eventfd_read(self._wake)
                    self._paused_until = 0.0  # somebody left, so there may be descriptors
                elif isinstance(key.fileobj, socket.socket) and self.sessions.has_room():
                    self._accept_one(key.fileobj)
            if self._once and self._conversations.any_served and not len(self.sessions):
                _log.info("the last client has gone")
                self._stopping = True

    def _is_over(self) -> bool:
        """Tell whether there is nobody left to wait for; begin the end after a `stop`."""
        if not self._stopping:
            return False
        self._begin_to_end()
        is_late = time.monotonic() >= self._grace_ends
        return self._aborting or is_late or not self.sessions.in_transmission()

    def _begin_to_end(self) -> None:
        if self._grace_ends == math.inf:
            self._grace_ends = time.monotonic() + self._grace
            self._processes.ending = True
            self.sessions.end()
            self._processes.end()
            self._conversations.fences.close()
            self._on_stopping()

    def _make_room(self, newcomer: Session) -> None:
        """Keep a place free, so that who only holds a connection open locks nobody out."""
        slowest = self.sessions.make_room(newcomer)
        if slowest is not None:
            _log.debug("%s: broken off in its handshake to make room", slowest.peer)
        if time.monotonic() - self._reminded < _REMINDER:
            return
        self._reminded = time.monotonic()
        _log.warning(
            "%d connections are open, as many as descriptors and threads are kept for: %s",
            len(self.sessions),
            "newcomers wait" if slowest is None else "the slowest handshakes are broken off",
        )

    def _accept_one(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError as error:
            if error.errno not in _CHANGED_ITS_MIND:
                # Out of descriptors or memory, most likely. The client stays in the queue, so
                # trying again at once would keep a core busy.
                _log.warning("no new clients for now: %s", error.strerror)
                self._paused_until = time.monotonic() + _PAUSE
            return
        session = self.sessions.add(sock)
        thread = threading.Thread(
            target=self._conversations.hold,
            args=(session,),
            name=f"nbd-session-{session.number}",
            daemon=True,
        )
        session.thread = thread
        try:
            thread.start()
        except RuntimeError as error:
            _log.warning("%s: turned away: %s", session.peer, error)
            self.sessions.remove(session)
            sock.close()
            self._paused_until = time.monotonic() + _PAUSE
        if len(self.sessions) >= self.sessions.bound:
            self._make_room(session)

    def _chosen(self) -> None:
        """Do as `_left`, in a thread: the client's own has its requests to answer."""
        if self._offer is not None and self._offer.is_leaving:
            with contextlib.suppress(RuntimeError):  # no thread: the next who leaves does it
                threading.Thread(target=self._left, name="nbd-left", daemon=True).start()

    def _left(self) -> None:
        """Close the exports that were withdrawn, and that nobody uses any more."""
        if self._offer is not None and not self._stopping:
            self._offer.let_go(self.sessions, self._processes.release)

    # The end.

    def _begin_process(self) -> None:
        self._listeners.close()
        self._on_fork()

    def _wind_down(self) -> None:
        self._listeners.close()
        self._listeners.remove_files()
        self._begin_to_end()
        threads = self.sessions.threads()
        self.sessions.cut(Phase.HANDSHAKE)
        grace = max(0, self._grace_ends - time.monotonic())
        if not self.sessions.wait_until_empty(grace, lambda: self._aborting):
            if (count := self.sessions.in_transmission()) > 0:
                _log.warning("%d clients did not finish and are broken off", count)
            self.sessions.cut()
            self.sessions.wait_until_empty(_CUT_GRACE, lambda: False)
        deadline = time.monotonic() + _CUT_GRACE
        for thread in threads:
            thread.join(max(0, deadline - time.monotonic()))
        try:
            self._processes.close(kill=self._aborting or len(self.sessions) > 0)
        finally:
            self._close_storages(in_use=len(self.sessions) > 0)
            if self._notices:
                self._notices.close()

    def _close_storages(self, *, in_use: bool) -> None:
        storages = self._offer.end() if self._offer else self.catalogue.storages
        for storage in storages:
            failed = False
            try:
                if not self._aborting:
                    storage.flush()
            except Exception as error:  # a storage's bug is not the next storage's loss
                failed = True
                words = getattr(error, "strerror", None) or error
                _log.error("%s: not made durable: %s", storage.name, words)
                self.status = 1
            # A thread that hangs in a dead disk must not find its descriptor reused.
            if not in_use:
                try:
                    storage.close()
                except OSError as error:
                    # Formats write what they keep in memory, with or without a flush before.
                    if not failed:
                        _log.error("%s: not closed properly: %s", storage.name, error.strerror)
                        self.status = 1
        if in_use or self._aborting:
            self.status = 1


def _has_terminal() -> bool:
    """Tell whether this process has a terminal, whose end would be told by SIGHUP."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True
