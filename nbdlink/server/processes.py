"""Further processes that serve connections, because one interpreter runs one thread at a time.

How it works. The processes are forked before the service has any thread, with the storages open.
The first process accepts, negotiates and keeps the books; once a client has come to
transmission, its socket goes to the process with the fewest connections, over a Unix socket,
together with what was agreed on. There `Transmission` runs as it would here. With TLS it goes
there when TLS is about to begin, which is when all that was agreed on is forgotten anyway, and
the rest of the negotiation takes place there: what OpenSSL has begun cannot be moved. The client's
thread in the first process waits for the outcome meanwhile, so nothing else needs to know:
limits, the graceful end, the log, the fences and `Session.cut` (both have the same socket) work
alike. Who claims a channel over TLS is admitted by that thread too, which it is asked for.

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
import math
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
from nbdlink.protocol.claim import Claim
from nbdlink.protocol.constants import HeaderStyle
from nbdlink.protocol.handshake import Handshake
from nbdlink.server.engine import Transmission
from nbdlink.server.export import Catalogue
from nbdlink.server.fencing import Admit, Refusal
from nbdlink.server.negotiate import NegotiatedSession, Negotiation, negotiate
from nbdlink.server.security import ServerSecurity
from nbdlink.server.sessions import Phase, Session
from nbdlink.transport.stream import Deadline

_log = logging.getLogger("nbdlink.server")

_MESSAGE: Final = 1 << 18
"""Bytes of the longest message: what a client has sent behind its handshake, at most."""
_REPORT: Final = -1
"""Stands for a session's number in what a process tells of all its sessions."""
_REPORT_SECONDS: Final = 0.5
"""A process that has not told by then is busy, and what it told last has to do."""
_GOODBYE: Final = 1.0
"""Seconds that a process has to end by itself."""


Progress = tuple[int, int, int, int]
"""Of one session: requests, bytes read, bytes written, errors."""


class _Child:
    """One process, seen from the first one.

    Attributes:
        sessions: who waits for the outcome of a session, by its number.
        progress: what the process told last of each session.
        reports: how many times it has told.
    """

    def __init__(self, pid: int, control: socket.socket) -> None:
        self.pid = pid
        self.control = control
        self.sessions: dict[int, queue.SimpleQueue[tuple[Any, ...]]] = {}
        self.alive = True
        self.progress: dict[int, Progress] = {}
        self.reports = 0


class Processes:
    """The further processes of a service."""

    def __init__(
        self, count: int, catalogue: Catalogue, security: ServerSecurity | None = None
    ) -> None:
        """Plan for `count` processes; none is there before `start`."""
        self._count = count
        self._catalogue = catalogue
        self._security = security
        self._children: list[_Child] = []
        self._here: set[int] = set()  # numbers of the sessions that this process serves
        self._lock = threading.Lock()
        self._reported = threading.Condition()

    # In the first process.

    @property
    def alive(self) -> int:
        """How many there are."""
        return sum(child.alive for child in self._children)

    def progress(self) -> dict[int, Progress]:
        """Ask what the sessions of all processes have done so far; give it by their numbers.

        What is not told in time is as it was told last.
        """
        children = [child for child in self._children if child.alive]
        with self._reported:
            before = [child.reports for child in children]
            for child in children:
                self._tell(child, "report", _REPORT)
            self._reported.wait_for(
                lambda: all(
                    child.reports > count or not child.alive
                    for child, count in zip(children, before, strict=True)
                ),
                _REPORT_SECONDS,
            )
            return {number: each for child in children for number, each in child.progress.items()}

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
                _Server(self._catalogue, self._security, theirs).run(begin)
            theirs.close()
            self._children.append(_Child(pid, ours))
        for child in self._children:
            threading.Thread(
                target=self._listen, args=(child,), name=f"nbd-process-{child.pid}", daemon=True
            ).start()

    def serve(self, session: Session, negotiated: NegotiatedSession) -> str:
        """Serve a client in the process with the fewest; give the words for how it left.

        Raises:
            RemoteProtocolError, StorageError, TransportError, TLSError, OSError: as
                `Transmission.run`.
            NBDError: the process has died.
        """
        # TLS that OpenSSL does lives in the process where it has begun.
        may_move = isinstance(session.sock, socket.socket) and negotiated.export.storage.may_fork
        child = self._choose(session) if may_move else None
        if child is None:
            with self._lock:
                self._here.add(session.number)
            return Transmission(session, negotiated).run()
        task = (
            negotiated.export.name,
            negotiated.trailing,
            int(negotiated.style),
            dict(negotiated.contexts),
            session.is_bare,
        )
        return self._serve_there(child, session, "serve", task)

    def secure(
        self,
        session: Session,
        machine: Handshake,
        seconds: float | None,
        begun: Callable[[str], None],
        admit: Admit,
    ) -> str | None:
        """Have the process with the fewest clients begin TLS with one, and serve it.

        So the processes share the work of OpenSSL, which cannot be moved once it has begun.

        Args:
            session: the client's.
            machine: its handshake, in which TLS is next.
            seconds: what is left of the time for that.
            begun: called with the export's name once the client has chosen one.
            admit: called if the client claims a channel.

        Returns:
            The words for how it left, none if it chose no export; None if it has to be served
            in this process.

        Raises:
            RemoteProtocolError, StorageError, TransportError, TLSError, OSError: as `negotiate`
                and `Transmission.run`.
            NBDError: the process has died.
        """
        if not all(storage.may_fork for storage in self._catalogue.storages):
            return None
        child = self._choose(session)
        if child is None:
            return None
        return self._serve_there(child, session, "secure", (machine, seconds), begun, admit)

    def forget(self, session: Session) -> None:
        """Take note that a client has gone."""
        with self._lock:
            self._here.discard(session.number)

    def _choose(self, session: Session) -> _Child | None:
        """Give the process with the fewest connections, or None for this one."""
        with self._lock:
            self._here.discard(session.number)
            children = [child for child in self._children if child.alive]
            best = min(children, key=lambda child: len(child.sessions), default=None)
            if best is None or len(self._here) <= len(best.sessions):
                self._here.add(session.number)
                return None
            return best

    def _serve_there(
        self,
        child: _Child,
        session: Session,
        command: str,
        task: tuple[Any, ...],
        begun: Callable[[str], None] = lambda _: None,
        admit: Admit = lambda _, __: None,
    ) -> str:
        outcome: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        with self._lock:
            child.sessions[session.number] = outcome
        try:
            try:
                message = pickle.dumps((command, session.number, *task))
                socket.send_fds(child.control, [message], [session.sock.fileno()])
            except OSError:
                raise NBDError(f"process {child.pid} has died") from None
            session.superseded_elsewhere = lambda: self._tell(child, "supersede", session.number)
            session.elsewhere = lambda: self._end(child)
            # They may have come in between. A handshake that is broken off ends alone.
            if session.superseded:
                session.superseded_elsewhere()
            if session.ending and session.phase is Phase.TRANSMISSION:
                session.elsewhere()
            while (said := outcome.get())[0] in ("begun", "claims"):
                if said[0] == "begun":
                    begun(said[1])
                else:
                    answer = pickle.dumps(("admitted", session.number, admit(*said[1:])))
                    with contextlib.suppress(OSError):  # it has died, which is heard next
                        child.control.send(answer)
            kind, session.progress, errors, session.is_deaf, *rest = said
            session.count(errors=errors)
            return _unfold(kind, rest)
        finally:
            with self._lock:
                child.sessions.pop(session.number, None)

    def end(self) -> None:
        """Tell all processes that it is the end: no client comes to transmission any more."""
        for child in self._children:
            self._end(child)

    def reload(self) -> None:
        """Have all processes load the credentials anew."""
        for child in self._children:
            with contextlib.suppress(OSError):
                child.control.send(pickle.dumps(("reload", 0)))

    def _end(self, child: _Child) -> None:
        """Tell a process, once, that all its sessions are to end: that is the only reason."""
        # One that does not listen will be cut off when the grace is over.
        self._tell(child, "end", 0)

    def _tell(self, child: _Child, command: str, number: int) -> None:
        """Tell a process something, unless it does not listen. Waits for nothing."""
        with contextlib.suppress(OSError):
            child.control.send(pickle.dumps((command, number)), socket.MSG_DONTWAIT)

    def _listen(self, child: _Child) -> None:
        """Hand outcomes to the threads that wait for them."""
        with contextlib.suppress(OSError):
            while message := child.control.recv(_MESSAGE):
                number, *outcome = pickle.loads(message)
                if number == _REPORT:
                    with self._reported:
                        child.progress = outcome[0]
                        child.reports += 1
                        self._reported.notify_all()
                    continue
                with self._lock:
                    waiting = child.sessions.get(number)
                if waiting:
                    waiting.put(tuple(outcome))
        with self._lock:
            child.alive = False
            for session, waiting in child.sessions.items():
                *progress, errors = child.progress.get(session, (0, 0, 0, 0))
                waiting.put(("died", tuple(progress), errors, False, child.pid))

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

    def __init__(
        self, catalogue: Catalogue, security: ServerSecurity | None, control: socket.socket
    ) -> None:
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
                message, descriptors, _, _ = socket.recv_fds(self._control, _MESSAGE, 1)
                if not message:
                    break
                command, number, *task = pickle.loads(message)
                if command == "end":
                    self._end()
                elif command == "reload":
                    self._reload()
                elif command == "supersede":
                    self._supersede(number)
                elif command == "report":
                    self._report()
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

    def _report(self) -> None:
        with self._lock:
            infos = [session.info() for session in self._sessions.values()]
        progress = {
            info.number: (info.requests, info.bytes_read, info.bytes_written, info.errors)
            for info in infos
        }
        # Nobody is there to read it, or there are more sessions than fit into a message.
        with contextlib.suppress(OSError):
            self._control.send(pickle.dumps((_REPORT, progress)))

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
            target=lambda: self._finish(session, _fold(serve)),
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
