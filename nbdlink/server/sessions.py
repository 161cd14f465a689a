"""Who is connected, what they have done so far, and how to make them leave."""

from __future__ import annotations

import contextlib
import enum
import fcntl
import resource
import select
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from nbdlink.errors import NBDError
from nbdlink.transport.stream import Wire

_SPARE: Final = 32
"""Descriptors that are kept for anything but clients."""
_MOST: Final = 4096
"""Clients at a time, however many descriptors there are: each costs a thread."""
_FAREWELL: Final = 1.0
"""Seconds that a client which goes on sending has to notice that the server is leaving."""
_GLANCE: Final = 0.02
"""Seconds between two looks at whether a silent client has taken everything."""


class Phase(enum.Enum):
    """How far a client has come."""

    HANDSHAKE = "handshake"
    TRANSMISSION = "transmission"


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """What is known of a session at one moment.

    Attributes:
        number: counts the sessions of a service from 1.
        peer: the client's address, for people.
        export: name of the export, or None during the handshake.
        started: seconds since the epoch.
        requests: how many have been answered, errors included.
        errors: how many of them were refused or failed.
        bytes_read: payload sent to the client.
        bytes_written: payload taken from the client and stored.
    """

    number: int
    peer: str
    export: str | None
    started: float
    requests: int
    errors: int
    bytes_read: int
    bytes_written: int


@dataclass(slots=True)
class Tally:
    """What the clients of an export have done that have left.

    Attributes:
        connections: how many have come to transmission, those that are still here included.
        requests, errors, bytes_read, bytes_written: as in `SessionInfo`.
    """

    connections: int = 0
    requests: int = 0
    errors: int = 0
    bytes_read: int = 0
    bytes_written: int = 0

    def add(self, info: SessionInfo) -> None:
        """Add what one client has done."""
        self.requests += info.requests
        self.errors += info.errors
        self.bytes_read += info.bytes_read
        self.bytes_written += info.bytes_written


@dataclass(frozen=True, slots=True)
class Books:
    """What all clients have done until one moment.

    Attributes:
        tallies: by export, what those have done that have left.
        sessions: what those have done so far that are here, handshakes included.
        left: how many have gone without having chosen an export.
        refused: how many of them were hung up on for what they sent, or for want of TLS.
    """

    tallies: dict[str, Tally]
    sessions: list[SessionInfo]
    left: int
    refused: int


class Session:
    """One client's connection.

    Attributes:
        progress: requests, bytes read and bytes written by the engine's loop, which alone sets
            them, all at once. What is done elsewhere is told by `count`.
        sock: the connection; with TLS, what is put on the socket.
        address: the client's IP address, for machines, or None.
        phase: how far the client has come.
        idle: whether nothing would be lost if the client were not heard any more.
        ending: whether it shall not be heard any more once it is idle.
        is_deaf: whether `recv` gives the end of the stream though the client may go on.
        elsewhere: tells another process that the session is to end, if that one serves it.
        superseded: whether a newer connection takes its place, so that nothing which has not
            begun may be done any more.
        superseded_elsewhere: tells that to another process, if that one serves the session.
        refused: whether it was hung up on in its handshake.
        is_supervised: whether somebody will connect again if it is let go.
    """

    def __init__(self, number: int, sock: socket.socket) -> None:
        """Begin a session on an accepted socket."""
        self.number = number
        self.sock: Wire = sock
        self.peer = describe_peer(sock)
        self.address = _address(sock)
        self.export: str | None = None
        self.phase = Phase.HANDSHAKE
        self.started = time.time()
        self.progress = (0, 0, 0)
        self._counting = threading.Lock()
        self._errors = self._bytes_read = self._bytes_written = 0
        self.idle = True
        self.ending = False
        self.elsewhere: Callable[[], None] | None = None
        self.superseded = False
        self.superseded_elsewhere: Callable[[], None] | None = None
        self.is_deaf = False
        self.refused = False
        self.is_supervised = False
        self._was_cut = False
        self.thread: threading.Thread | None = None

    def count(self, *, errors: int = 0, bytes_read: int = 0, bytes_written: int = 0) -> None:
        """Add to the counters, in any thread."""
        with self._counting:
            self._errors += errors
            self._bytes_read += bytes_read
            self._bytes_written += bytes_written

    def end(self) -> None:
        """Let the session finish the requests that have arrived, and no more.

        A session that is busy, or about to be, sees for itself that it is ending, at its next
        idle moment. It sets `idle` before it looks at `ending`, and here it is the other way
        round, so at least one of the two sees the other's mark.
        """
        self.ending = True
        if self.elsewhere:
            self.elsewhere()
        elif self.idle and not self.arrived():
            self.hear_no_more()

    @property
    def is_bare(self) -> bool:
        """Whether the connection is a socket without TLS."""
        return type(self.sock) is socket.socket

    def adopt(self, sock: Wire) -> None:
        """Go on with `sock`, which has taken over the connection."""
        self.sock = sock
        if self._was_cut:  # just now, when it was somebody else's
            self.cut()

    def arrived(self) -> int:
        """Give how many bytes of the client wait to be received, at most.

        With TLS they are more than what they will be decrypted.
        """
        answer = fcntl.ioctl(self.sock, termios.FIONREAD, bytes(4))
        count: int = struct.unpack("i", answer)[0]
        if isinstance(self.sock, socket.socket):
            return count
        if count or _is_readable(self.sock):
            # What has left the socket may be the beginning of the record whose end is in there.
            return max(1, count + self.sock.held())
        return 0

    def hear_no_more(self) -> None:
        """Have `recv` give what has arrived already, and then the end of the stream."""
        self.is_deaf = True
        self._shutdown(socket.SHUT_RD)

    def cut(self) -> None:
        """Break the connection, whatever it is doing."""
        self._was_cut = True
        self._shutdown(socket.SHUT_RDWR)

    def supersede(self) -> None:
        """Break the connection, and have what it has asked for and has not begun dropped.

        The mark only makes it end sooner: without it the connection would end at the first
        reply that cannot be sent.
        """
        self.superseded = True
        self.cut()
        if self.superseded_elsewhere:
            self.superseded_elsewhere()

    def take_leave(self) -> None:
        """Say that nothing more comes, and let the client take what has been sent.

        A socket that is closed while bytes of the client are unread, or before its last ones
        arrive, answers them with a reset, which throws away the replies under way. So the
        closing waits until the client has hung up, or is silent and has taken everything, but
        not for longer than a second.
        """
        self._shutdown(socket.SHUT_WR)
        end = time.monotonic() + _FAREWELL
        is_sending = False
        with contextlib.suppress(OSError, NBDError):
            self.sock.settimeout(_GLANCE)
            while time.monotonic() < end:
                try:
                    heard = self.sock.recv(1 << 16)
                except TimeoutError:
                    heard = None
                if heard:
                    is_sending = True
                    continue
                # Once we hear no more, the end of the stream need not be the client's.
                if heard is not None and not self.is_deaf:
                    return
                if not (is_sending and heard is None) and not self._untaken():
                    return
                if heard is not None:
                    time.sleep(_GLANCE)

    def _untaken(self) -> int:
        """Give how many bytes of ours the client's side has not taken yet."""
        answer = fcntl.ioctl(self.sock, termios.TIOCOUTQ, bytes(4))
        count: int = struct.unpack("i", answer)[0]
        return count

    def _shutdown(self, how: int) -> None:
        with contextlib.suppress(OSError):  # the client may have gone by itself
            self.sock.shutdown(how)

    def info(self) -> SessionInfo:
        """Give what is known now."""
        requests, bytes_read, bytes_written = self.progress
        return SessionInfo(
            self.number,
            self.peer,
            self.export,
            self.started,
            requests,
            self._errors,
            bytes_read + self._bytes_read,
            bytes_written + self._bytes_written,
        )


class Sessions:
    """All sessions of a service; safe to use from every thread.

    Attributes:
        limit: how many may be connected at a time; 0 for any number.
        bound: how many may be connected whatever the limit says.
        ending: whether those that come to transmission are to end at once.
    """

    def __init__(
        self,
        limit: int = 0,
        *,
        bound: int = _MOST,
        on_removed: Callable[[], None] = lambda: None,
    ) -> None:
        """Start with none; `on_removed` is called after each one that leaves."""
        self.limit = limit
        self.bound = bound
        self.ending = False
        self._on_removed = on_removed
        self._number = 0
        self._active: dict[int, Session] = {}
        self._tallies: dict[str, Tally] = {}
        self._left = self._refused = 0
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._active)

    def has_room(self) -> bool:
        """Tell whether one more client may come in.

        At the end the limit counts no more: newcomers are only told that it is the end.
        """
        count = len(self._active)
        return count < self.bound and (not self.limit or self.ending or count < self.limit)

    @property
    def newest(self) -> int:
        """The number of the client that came last."""
        return self._number

    def may_use(self, export: str, newest: int) -> bool:
        """Tell whether anybody uses an export that was withdrawn, or may be about to.

        Args:
            export: its name.
            newest: the number of the last client that may have found it: who was in the handshake
                then may have been told already that it can have it.
        """
        with self._changed:
            return any(
                session.export == export
                if session.phase is Phase.TRANSMISSION
                else session.number <= newest
                for session in self._active.values()
            )

    def in_transmission(self) -> int:
        """Give how many clients have come to transmission."""
        with self._changed:
            return sum(s.phase is Phase.TRANSMISSION for s in self._active.values())

    def add(self, sock: socket.socket) -> Session:
        """Take in a client."""
        with self._changed:
            self._number += 1
            session = self._active[self._number] = Session(self._number, sock)
        return session

    def begin_transmission(self, session: Session, export: str) -> None:
        """Take note that a client has chosen an export."""
        with self._changed:
            session.export = export
            session.phase = Phase.TRANSMISSION
            self._tallies.setdefault(export, Tally()).connections += 1
            if self.ending:
                session.end()

    def remove(self, session: Session) -> None:
        """Take note that a client has gone; its socket may be closed only after that."""
        with self._changed:
            if self._active.pop(session.number, None) is not None:
                if session.export is not None:
                    self._tallies[session.export].add(session.info())
                else:
                    self._left += 1
                    self._refused += session.refused
            self._changed.notify_all()
        self._on_removed()

    def make_room(self, newcomer: Session) -> Session | None:
        """Break off the handshake that has lasted longest, and give its session.

        None if nobody but the newcomer is in a handshake. The place is free once the session
        has left.
        """
        with self._changed:
            for session in self._active.values():
                if session is newcomer:
                    return None  # all the others were here before
                if session.phase is Phase.HANDSHAKE and not session.ending:
                    session.ending = True
                    session.cut()
                    return session
        return None

    def snapshot(self) -> list[SessionInfo]:
        """Give what is known of each session, oldest first."""
        with self._changed:
            return [session.info() for session in self._active.values()]

    def books(self) -> Books:
        """Give what has been done by everybody."""
        with self._changed:
            tallies = {export: replace(tally) for export, tally in self._tallies.items()}
            here = [session.info() for session in self._active.values()]
            return Books(tallies, here, self._left, self._refused)

    def threads(self) -> list[threading.Thread]:
        """Give the threads of all sessions."""
        with self._changed:
            return [s.thread for s in self._active.values() if s.thread is not None]

    # The lock is held while sockets are shut down: a session leaves before its socket is
    # closed, so no descriptor that was given to somebody else meanwhile can be hit.

    def end(self) -> None:
        """Let every client in transmission finish what has arrived, and no more."""
        with self._changed:
            self.ending = True
            for session in self._active.values():
                if session.phase is Phase.TRANSMISSION:
                    session.end()

    def renew(self) -> int:
        """Let those finish what has arrived, and go, who will connect again; give how many."""
        with self._changed:
            supervised = [
                session
                for session in self._active.values()
                if session.phase is Phase.TRANSMISSION
                and session.is_supervised
                and not session.ending
            ]
            for session in supervised:
                session.end()
            return len(supervised)

    def cut(self, *phases: Phase) -> None:
        """Break every connection, or those in `phases`."""
        with self._changed:
            for session in self._active.values():
                if not phases or session.phase in phases:
                    session.cut()

    def wait_until_empty(self, timeout: float, unless: Callable[[], bool]) -> bool:
        """Wait for all to leave; give up after `timeout` seconds or once `unless` holds."""
        with self._changed:
            self._changed.wait_for(lambda: not self._active or unless(), timeout)
            return not self._active

    def wake(self) -> None:
        """Have `wait_until_empty` look at its `unless` again."""
        with self._changed:
            self._changed.notify_all()


def _is_readable(sock: Wire) -> bool:
    """Tell whether something can be received without waiting."""
    if not isinstance(sock, socket.socket) and sock.has_pending():
        return True
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLIN)
    return bool(poll.poll(0))


def describe_peer(sock: socket.socket) -> str:
    """Give a client's address for people: host:port, or the process behind a Unix socket."""
    try:
        if sock.family == socket.AF_UNIX:
            data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            pid, uid, _ = struct.unpack("iII", data)
            return f"process {pid} of user {uid}"
        host, port = sock.getpeername()[:2]
    except OSError:  # gone already
        return "a client"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _address(sock: socket.socket) -> str | None:
    """Give the client's IP address, with its zone if it has one; None behind Unix sockets."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return None
    try:
        host, _, *more = sock.getpeername()
    except OSError:  # gone already
        return None
    return f"{host}%{more[1]}" if more and more[1] else str(host)


def most_connections() -> int:
    """Give how many connections this process can take, beside what it has open already."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return _MOST
    used = sum(1 for _ in Path("/proc/self/fd").iterdir())
    return max(1, min(_MOST, limit - used - _SPARE))
