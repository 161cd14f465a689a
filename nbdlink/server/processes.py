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
import os
import pickle
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from nbdlink.errors import NBDError
from nbdlink.protocol.handshake import Handshake
from nbdlink.server.child import MESSAGE, REPORT, ChildServer, unfold
from nbdlink.server.engine import Transmission
from nbdlink.server.export import Catalogue, Export
from nbdlink.server.fencing import Admit
from nbdlink.server.negotiate import NegotiatedSession
from nbdlink.server.security import ServerSecurity
from nbdlink.server.sessions import Phase, Session

_log = logging.getLogger("nbdlink.server")

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
        asked: how often it has been asked for that.
        told: the number of the question that it has answered last.
    """

    def __init__(self, pid: int, control: socket.socket) -> None:
        self.pid = pid
        self.control = control
        self.sessions: dict[int, queue.SimpleQueue[tuple[Any, ...]]] = {}
        self.alive = True
        self.progress: dict[int, Progress] = {}
        self.asked = self.told = 0


class Processes:
    """The further processes of a service.

    Attributes:
        ending: whether sessions are let go because the service is about to end.
    """

    def __init__(
        self, count: int, catalogue: Catalogue, security: ServerSecurity | None = None
    ) -> None:
        """Plan for `count` processes; none is there before `start`."""
        self.ending = False
        self._count = count
        self._catalogue = catalogue
        self._security = security
        self._children: list[_Child] = []
        self._known: dict[str, Export] = {}  # what the processes have been forked with
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
            for child in children:
                child.asked += 1
                self._tell(child, "report", child.asked)
            # An answer to somebody who has asked before says nothing of what was told since.
            asked = [child.asked for child in children]
            self._reported.wait_for(
                lambda: all(
                    child.told >= number or not child.alive
                    for child, number in zip(children, asked, strict=True)
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
        self._known = {export.name: export for export in self._catalogue}
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
                ChildServer(self._catalogue, self._security, theirs).run(begin)
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
        may_move = isinstance(session.sock, socket.socket) and self._is_known(negotiated.export)
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
        exports = list(self._catalogue)
        # There it would find, or miss, what has gone or come since these were forked.
        if len(exports) != len(self._known) or not all(map(self._is_known, exports)):
            return None
        child = self._choose(session)
        if child is None:
            return None
        return self._serve_there(child, session, "secure", (machine, seconds), begun, admit)

    def _is_known(self, export: Export) -> bool:
        """Tell whether the other processes can serve an export as it is now."""
        return export.storage.may_fork and self._known.get(export.name) is export

    def release(self, export: Export) -> None:
        """Have all processes close an export's storage, which nobody uses any more."""
        known = self._known.get(export.name)
        if known is None or known.storage is not export.storage:
            return
        for child in self._children:
            with contextlib.suppress(OSError):
                child.control.send(pickle.dumps(("release", 0, export.name)))
        # Now: whoever begins TLS there must find in its queue that the export is gone.
        del self._known[export.name]
        # They do one thing after the other: once they have told, the file is closed everywhere,
        # and its locks are gone.
        self.progress()

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
            session.elsewhere = lambda: self._let_go(child, session.number)
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
            return unfold(kind, rest)
        finally:
            with self._lock:
                child.sessions.pop(session.number, None)

    def end(self) -> None:
        """Tell all processes that it is the end: no client comes to transmission any more."""
        # One that does not listen will be cut off when the grace is over.
        for child in self._children:
            self._tell(child, "end", 0)

    def _let_go(self, child: _Child, number: int) -> None:
        """Have a session end; at the end of the service all, as of many messages some get lost."""
        if self.ending:
            self._tell(child, "end", 0)
        else:
            self._tell(child, "let_go", number)

    def reload(self) -> None:
        """Have all processes load the credentials anew."""
        for child in self._children:
            with contextlib.suppress(OSError):
                child.control.send(pickle.dumps(("reload", 0)))

    def _tell(self, child: _Child, command: str, number: int) -> None:
        """Tell a process something, unless it does not listen. Waits for nothing."""
        with contextlib.suppress(OSError):
            child.control.send(pickle.dumps((command, number)), socket.MSG_DONTWAIT)

    def _listen(self, child: _Child) -> None:
        """Hand outcomes to the threads that wait for them."""
        with contextlib.suppress(OSError):
            while message := child.control.recv(MESSAGE):
                number, *outcome = pickle.loads(message)
                if number == REPORT:
                    with self._reported:
                        child.told, child.progress = outcome
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
