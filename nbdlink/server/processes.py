"""Further processes that serve connections, because one interpreter runs one thread at a time.

How it works. The processes are forked before the service has any thread, with the storages open.
The first process accepts, negotiates and keeps the books; once a client has come to
transmission, its socket goes to the process with the fewest connections, over a Unix socket,
together with what was agreed on. There `Transmission` runs as it would here. The client's
thread in the first process waits for the outcome meanwhile, so nothing else needs to know:
limits, the graceful end, the log and `Session.cut` (both have the same socket) work alike.

All processes share the open file, hence the page cache, and one fdatasync covers them all.
Only storages that keep nothing else in memory may be served so (`Storage.may_fork`).

A process that dies costs the clients it served their connections, and the service goes on
with the others. When the first process dies, the others see the end of their control socket and
go too, in the middle of whatever they do.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import pickle
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn

from nbdlink.errors import (
    NBDError,
    RemoteProtocolError,
    StorageError,
    TLSError,
    TransportError,
)
from nbdlink.protocol.constants import HeaderStyle
from nbdlink.server.engine import Transmission
from nbdlink.server.export import Catalogue
from nbdlink.server.negotiate import NegotiatedSession
from nbdlink.server.sessions import Phase, Session

_log = logging.getLogger("nbdlink.server")

_MESSAGE: Final = 1 << 18
"""Bytes of the longest message: what a client has sent behind its handshake, at most."""
_GOODBYE: Final = 1.0
"""Seconds that a process has to end by itself."""


class _Child:
    """One process, seen from the first one."""

    def __init__(self, pid: int, control: socket.socket) -> None:
        self.pid = pid
        self.control = control
        self.sessions: dict[int, queue.SimpleQueue[tuple[Any, ...]]] = {}
        self.alive = True


class Processes:
    """The further processes of a service."""

    def __init__(self, count: int, catalogue: Catalogue) -> None:
        """Plan for `count` processes; none is there before `start`."""
        self._count = count
        self._catalogue = catalogue
        self._children: list[_Child] = []
        self._here = 0
        self._lock = threading.Lock()

    # In the first process.

    def start(self, begin: Callable[[], None]) -> None:
        """Fork. No other thread may exist.

        Args:
            begin: called in each new process, to close what it must not hold open.
        """
        if not any(storage.may_fork for storage in self._catalogue.storages):
            return
        # Whoever started us may have it ignored, and then no child could be waited for.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        # What is there already will not be looked at, and so not be copied, by any collector.
        gc.freeze()
        for _ in range(self._count):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                pid = os.fork()
            except OSError as error:
                _log.warning("no further process: %s", error.strerror)
                ours.close()
                theirs.close()
                break
            if pid == 0:
                ours.close()
                for child in self._children:
                    child.control.close()
                _Server(self._catalogue, theirs).run(begin)
            theirs.close()
            self._children.append(_Child(pid, ours))
        for child in self._children:
            threading.Thread(
                target=self._listen, args=(child,), name=f"nbd-process-{child.pid}", daemon=True
            ).start()

    def serve(self, session: Session, negotiated: NegotiatedSession) -> str:
        """Serve a client in the process with the fewest; give the words for how it left.

        Raises:
            RemoteProtocolError, StorageError, OSError: as `Transmission.run`.
            NBDError: the process has died.
        """
        child = self._choose(session, negotiated)
        try:
            if child is None:
                return Transmission(session, negotiated).run()
            return self._serve_there(child, session, negotiated)
        finally:
            with self._lock:
                if child is None:
                    self._here -= 1
                else:
                    child.sessions.pop(session.number, None)

    def _choose(self, session: Session, negotiated: NegotiatedSession) -> _Child | None:
        """Give the process with the fewest connections, or None for this one."""
        with self._lock:
            children = [child for child in self._children if child.alive]
            best = min(children, key=lambda child: len(child.sessions), default=None)
            if (
                best is None
                or not isinstance(session.sock, socket.socket)  # TLS lives in this process
                or not negotiated.export.storage.may_fork
                or self._here <= len(best.sessions)
            ):
                self._here += 1
                return None
            return best

    def _serve_there(self, child: _Child, session: Session, negotiated: NegotiatedSession) -> str:
        outcome: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        with self._lock:
            child.sessions[session.number] = outcome
        task = (
            session.number,
            negotiated.export.name,
            negotiated.trailing,
            int(negotiated.style),
            dict(negotiated.contexts),
            session.is_bare,
        )
        try:
            message = pickle.dumps(("serve", *task))
            socket.send_fds(child.control, [message], [session.sock.fileno()])
        except OSError:
            raise NBDError(f"process {child.pid} has died") from None
        session.elsewhere = lambda: self._end(child)
        if session.ending:  # it may have come in between
            session.elsewhere()
        kind, progress, errors, session.is_deaf, *rest = outcome.get()
        session.progress = progress
        session.count(errors=errors)
        return _unfold(kind, rest)

    def _end(self, child: _Child) -> None:
        """Tell a process, once, that all its sessions are to end: that is the only reason."""
        # One that does not listen will be cut off when the grace is over.
        with contextlib.suppress(OSError):
            child.control.send(pickle.dumps(("end", 0)), socket.MSG_DONTWAIT)

    def _listen(self, child: _Child) -> None:
        """Hand outcomes to the threads that wait for them."""
        with contextlib.suppress(OSError):
            while message := child.control.recv(_MESSAGE):
                number, *outcome = pickle.loads(message)
                with self._lock:
                    waiting = child.sessions.get(number)
                if waiting:
                    waiting.put(tuple(outcome))
        with self._lock:
            child.alive = False
            for waiting in child.sessions.values():
                waiting.put(("died", (0, 0, 0), 0, False, child.pid))

    def close(self, *, kill: bool) -> None:
        """End the processes, which have no clients any more, or shall not have them."""
        for child in self._children:
            with contextlib.suppress(OSError):
                child.control.shutdown(socket.SHUT_RDWR)
            if kill:
                os.kill(child.pid, signal.SIGKILL)
        deadline = time.monotonic() + _GOODBYE
        for child in self._children:
            if not _has_ended(child.pid, deadline):
                os.kill(child.pid, signal.SIGKILL)
                if not _has_ended(child.pid, deadline + _GOODBYE):
                    _log.error("process %d hangs in the kernel, and is left behind", child.pid)
            child.control.close()
        self._children.clear()


def _has_ended(pid: int, deadline: float) -> bool:
    """Wait for a child until `deadline`; it is reaped then."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(pid, os.WNOHANG)[0] == 0:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)
    return True


class _Server:
    """One of the further processes, seen from itself."""

    def __init__(self, catalogue: Catalogue, control: socket.socket) -> None:
        self._catalogue = catalogue
        self._control = control
        self._sessions: dict[int, Session] = {}
        self._lock = threading.Lock()

    def run(self, begin: Callable[[], None]) -> NoReturn:
        """Serve what comes until the first process has gone; `begin` is called first."""
        status = 1
        try:
            begin()
            # Signals are for the first process, which tells what to do. A terminal and a
            # service manager send them to all.
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            while True:
                message, descriptors, _, _ = socket.recv_fds(self._control, _MESSAGE, 1)
                if not message:
                    break
                command, number, *task = pickle.loads(message)
                if command == "end":
                    self._end()
                elif descriptors:
                    self._begin(number, descriptors[0], *task)
                else:  # lost on the way
                    answer = (number, "bug", (0, 0, 0), 0, False, "out of descriptors")
                    self._control.send(pickle.dumps(answer))
            status = 0
        except BaseException as error:
            _log.critical("a process for connections failed: %s: %s", type(error).__name__, error)
        finally:
            # At once, whatever the threads do: nobody waits for it any more.
            os._exit(status)

    def _end(self) -> None:
        with self._lock:
            for session in self._sessions.values():
                session.end()

    def _begin(
        self,
        number: int,
        fd: int,
        name: str,
        trailing: bytes,
        style: int,
        contexts: dict[int, str],
        is_bare: bool,
    ) -> None:
        session = Session(number, _socket(fd, is_bare))
        session.export = name
        session.phase = Phase.TRANSMISSION
        export = self._catalogue.find(name)
        assert export is not None
        negotiated = NegotiatedSession(export, trailing, HeaderStyle(style), contexts)
        with self._lock:
            self._sessions[number] = session
        work = threading.Thread(
            target=self._serve, args=(session, negotiated), name=f"nbd-session-{number}"
        )
        try:
            work.start()
        except RuntimeError as error:
            self._finish(session, ("bug", str(error)))

    def _serve(self, session: Session, negotiated: NegotiatedSession) -> None:
        self._finish(session, _fold(lambda: Transmission(session, negotiated).run()))

    def _finish(self, session: Session, outcome: tuple[Any, ...]) -> None:
        with self._lock:  # or it might be told to end when its descriptor is somebody else's
            self._sessions.pop(session.number, None)
            session.sock.close()
        info = session.info()
        progress = info.requests, info.bytes_read, info.bytes_written
        message = (session.number, outcome[0], progress, info.errors, session.is_deaf, *outcome[1:])
        with contextlib.suppress(OSError):
            self._control.send(pickle.dumps(message))


def _socket(fd: int, is_bare: bool) -> socket.socket:
    if is_bare:
        return socket.socket(fileno=fd)
    from nbdlink.transport.ktls import KernelTLSSocket  # for TLS only

    return KernelTLSSocket(fileno=fd)


def _fold(run: Callable[[], str]) -> tuple[Any, ...]:
    """Call `run`, and put what comes of it into words that can be sent."""
    try:
        return "left", run()
    except RemoteProtocolError as error:
        return "protocol", str(error)
    except StorageError as error:
        return "storage", str(error)
    except TransportError as error:
        return "cut", str(error)
    except TLSError as error:
        return "tls", str(error)
    except OSError as error:
        return "lost", error.errno, error.strerror
    except Exception as error:
        return "bug", f"{type(error).__name__}: {error}"


def _unfold(kind: str, rest: Sequence[Any]) -> str:
    """Do what `run` would have done."""
    match kind:
        case "left":
            return str(rest[0])
        case "protocol":
            raise RemoteProtocolError(rest[0])
        case "storage":
            raise StorageError(rest[0])
        case "cut":
            raise TransportError(rest[0])
        case "tls":
            raise TLSError(rest[0])
        case "lost":
            raise OSError(*rest)
        case "died":
            raise NBDError(f"process {rest[0]}, which served it, has died")
    raise NBDError(f"unexpected {rest[0]}")
