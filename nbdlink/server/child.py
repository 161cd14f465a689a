"""One of a service's further processes: it serves the connections that it is given.

What it is told, and what it tells, goes over its control socket, a pickled tuple a message; see
`nbdlink.server.processes`, which is the other end.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import pickle
import queue
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn

from nbdlink.errors import (
    NBDError,
    RemoteProtocolError,
    StorageError,
    TLSError,
    TransportError,
)
from nbdlink.protocol.claim import Claim
from nbdlink.protocol.constants import HeaderStyle
from nbdlink.protocol.handshake import Handshake
from nbdlink.server.engine import Transmission
from nbdlink.server.export import Catalogue
from nbdlink.server.fencing import Refusal
from nbdlink.server.handshake import negotiate
from nbdlink.server.negotiate import NegotiatedSession, Negotiation
from nbdlink.server.security import ServerSecurity
from nbdlink.server.sessions import Phase, Session
from nbdlink.transport.stream import Deadline

_log = logging.getLogger("nbdlink.server")

MESSAGE: Final = 1 << 18
"""Bytes of the longest message: what a client has sent behind its handshake, at most."""
REPORT: Final = -1
"""Stands for a session's number in what a process tells of all its sessions."""


class ChildServer:
    """One of the further processes, seen from itself."""

    def __init__(
        self, catalogue: Catalogue, security: ServerSecurity | None, control: socket.socket
    ) -> None:
        """Serve what `catalogue` has, as told over `control`."""
        self._catalogue = catalogue
        self._security = security
        self._control = control
        self._closing = False
        self._sessions: dict[int, Session] = {}
        self._answers: dict[int, queue.SimpleQueue[Refusal | None]] = {}
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
                message, descriptors, _, _ = socket.recv_fds(self._control, MESSAGE, 1)
                if not message:
                    break
                command, number, *task = pickle.loads(message)
                if command == "end":
                    self._end()
                elif command == "let_go":
                    self._let_go(number)
                elif command == "reload":
                    self._reload()
                elif command == "release":
                    self._release(*task)
                elif command == "supersede":
                    self._supersede(number)
                elif command == "report":
                    self._report(number)
                elif command == "admitted":
                    self._answers.pop(number).put(task[0])
                elif descriptors and command == "secure":
                    self._secure(number, descriptors[0], *task)
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
            self._closing = True
            for session in self._sessions.values():
                if session.phase is Phase.TRANSMISSION:
                    session.end()

    def _let_go(self, number: int) -> None:
        """Have one session end, which may have done so by itself."""
        with self._lock:
            session = self._sessions.get(number)
            if session is not None and session.phase is Phase.TRANSMISSION:
                session.end()

    def _report(self, number: int) -> None:
        """Answer question `number` of what all sessions have done."""
        with self._lock:
            infos = [session.info() for session in self._sessions.values()]
        progress = {
            info.number: (info.requests, info.bytes_read, info.bytes_written, info.errors)
            for info in infos
        }
        # Nobody is there to read it, or there are more sessions than fit into a message.
        with contextlib.suppress(OSError):
            self._control.send(pickle.dumps((REPORT, number, progress)))

    def _supersede(self, number: int) -> None:
        with self._lock:
            if session := self._sessions.get(number):
                session.supersede()

    def _reload(self) -> None:
        # The files may have changed since the first process read them.
        try:
            if self._security is not None:
                self._security.reload()
        except Exception as error:
            _log.error("the credentials of one process stay as they are: %s", error)

    def _release(self, name: str) -> None:
        """Close an export's files: the first process is about to do so, and has the last word."""
        export = self._catalogue.find(name)
        assert export is not None
        self._catalogue.replace(each for each in self._catalogue if each is not export)
        storage = export.storage
        try:
            if storage.may_fork:
                storage.close()
            else:
                storage.disown()
        except OSError as error:
            _log.error("%s: not closed properly: %s", storage.name, error.strerror)

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
        self._start(session, lambda: Transmission(session, negotiated).run())

    def _secure(self, number: int, fd: int, machine: Handshake, seconds: float | None) -> None:
        session = Session(number, socket.socket(fileno=fd))

        def admit(export: str, claim: Claim) -> Refusal | None:
            # The first process waits, as long as there is time: it has the same deadline.
            answer = self._answers[number] = queue.SimpleQueue()
            self._control.send(pickle.dumps((number, "claims", export, claim)))
            return answer.get()

        negotiation = Negotiation(
            self._catalogue, lambda: self._closing, self._security, machine, admit
        )
        deadline = Deadline(None if seconds is None else math.ceil(seconds))

        def serve() -> str:
            negotiated = negotiate(session, negotiation, deadline)
            if negotiated is None:
                return ""
            with self._lock:
                session.export = negotiated.export.name
                session.phase = Phase.TRANSMISSION
                if self._closing:
                    session.end()
            self._control.send(pickle.dumps((number, "begun", session.export)))
            return Transmission(session, negotiated).run()

        self._start(session, serve)

    def _start(self, session: Session, serve: Callable[[], str]) -> None:
        with self._lock:
            self._sessions[session.number] = session
        work = threading.Thread(
            target=lambda: self._finish(session, fold(serve)),
            name=f"nbd-session-{session.number}",
        )
        try:
            work.start()
        except RuntimeError as error:
            self._finish(session, ("bug", str(error)))

    def _finish(self, session: Session, outcome: tuple[Any, ...]) -> None:
        with self._lock:  # or it might be told to end when its descriptor is somebody else's
            self._sessions.pop(session.number, None)
            if not session.is_bare:
                # The end is announced by who has the keys.
                with contextlib.suppress(OSError):
                    session.sock.shutdown(socket.SHUT_WR)
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


def fold(run: Callable[[], str]) -> tuple[Any, ...]:
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


def unfold(kind: str, rest: Sequence[Any]) -> str:
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
