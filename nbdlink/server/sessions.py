"""Who is connected, what they have done so far, and how to make them leave."""

from __future__ import annotations

import contextlib
import enum
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass


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


class Session:
    """One client's connection. Only the thread that serves it writes the counters.

    Attributes:
        sock: the connection.
        phase: how far the client has come.
        idle: whether nothing would be lost if the client were not heard any more.
        ending: whether it shall not be heard any more once it is idle.
    """

    def __init__(self, number: int, sock: socket.socket) -> None:
        """Begin a session on an accepted socket."""
        self.number = number
        self.sock = sock
        self.peer = describe_peer(sock)
        self.export: str | None = None
        self.phase = Phase.HANDSHAKE
        self.started = time.time()
        self.requests = self.errors = self.bytes_read = self.bytes_written = 0
        self.idle = True
        self.ending = False
        self.thread: threading.Thread | None = None

    def end(self) -> None:
        """Let the session finish the requests that have arrived, and no more.

        A session that is busy calls `hear_no_more` itself, at its next idle moment. It sets
        `idle` before it looks at `ending`, and here it is the other way round, so at least
        one of the two sees the other's mark.
        """
        self.ending = True
        if self.idle:
            self.hear_no_more()

    def hear_no_more(self) -> None:
        """Have `recv` give what has arrived already, and then the end of the stream."""
        self._shutdown(socket.SHUT_RD)

    def cut(self) -> None:
        """Break the connection, whatever it is doing."""
        self._shutdown(socket.SHUT_RDWR)

    def _shutdown(self, how: int) -> None:
        with contextlib.suppress(OSError):  # the client may have gone by itself
            self.sock.shutdown(how)

    def info(self) -> SessionInfo:
        """Give what is known now."""
        return SessionInfo(
            self.number,
            self.peer,
            self.export,
            self.started,
            self.requests,
            self.errors,
            self.bytes_read,
            self.bytes_written,
        )


class Sessions:
    """All sessions of a service; safe to use from every thread.

    Attributes:
        limit: how many may be connected at a time; 0 for any number.
    """

    def __init__(self, limit: int = 0, *, on_removed: Callable[[], None] = lambda: None) -> None:
        """Start with none; `on_removed` is called after each one that leaves."""
        self.limit = limit
        self._on_removed = on_removed
        self._number = 0
        self._active: dict[int, Session] = {}
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._active)

    def has_room(self) -> bool:
        """Tell whether one more client may come in."""
        return not self.limit or len(self._active) < self.limit

    def add(self, sock: socket.socket) -> Session:
        """Take in a client."""
        with self._changed:
            self._number += 1
            session = self._active[self._number] = Session(self._number, sock)
        return session

    def remove(self, session: Session) -> None:
        """Take note that a client has gone; its socket may be closed only after that."""
        with self._changed:
            self._active.pop(session.number, None)
            self._changed.notify_all()
        self._on_removed()

    def snapshot(self) -> list[SessionInfo]:
        """Give what is known of each session, oldest first."""
        with self._changed:
            return [session.info() for session in self._active.values()]

    def threads(self) -> list[threading.Thread]:
        """Give the threads of all sessions."""
        with self._changed:
            return [s.thread for s in self._active.values() if s.thread is not None]

    # The lock is held while sockets are shut down: a session leaves before its socket is
    # closed, so no descriptor that was given to somebody else meanwhile can be hit.

    def end(self) -> None:
        """Let every session finish what has arrived, and no more."""
        with self._changed:
            for session in self._active.values():
                session.end()

    def cut(self) -> None:
        """Break every connection."""
        with self._changed:
            for session in self._active.values():
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
