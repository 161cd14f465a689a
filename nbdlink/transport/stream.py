"""Sockets, connected and listening: TCP over IPv4 and IPv6, and Unix.

Every wait is bounded: a `Deadline` is carried from the first connect to the last byte of a
handshake, so a peer that answers one byte an hour is as dead as one that answers none.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, Union

from nbdlink.errors import ConfigError, TransportError
from nbdlink.uri import Target

if TYPE_CHECKING:
    from nbdlink.transport.tls import TLSStream

Wire = Union[socket.socket, "TLSStream"]
"""What a connection runs over: a bare socket, or one with TLS on it. They are used alike."""

BACKLOG = 1024
"""Clients that may wait to be accepted; the kernel's net.core.somaxconn may allow fewer."""

KEEPALIVE_IDLE = 30
KEEPALIVE_INTERVAL = 10
KEEPALIVE_PROBES = 3
"""Seconds of silence before a peer is asked whether it lives, between the questions, and how
many stay unanswered before it counts as dead: after a minute in all."""


class Deadline:
    """A moment on the monotonic clock, by which something must have happened."""

    def __init__(self, seconds: float | None) -> None:
        """Set the moment `seconds` from now; None is never."""
        self.seconds = seconds
        self._at = None if seconds is None else time.monotonic() + seconds

    def left(self) -> float | None:
        """Give the seconds left, or None for ever.

        Raises:
            TimeoutError: none are left.
        """
        if self._at is None:
            return None
        left = self._at - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


def connect(target: Target, deadline: Deadline) -> socket.socket:
    """Connect to the server of `target`, trying each of its addresses in turn.

    Raises:
        TransportError: no address could be reached in time; the message names the server and
            the reason.
    """
    try:
        if target.socket is not None:
            return _connect_unix(target.socket, deadline)
        return _connect_tcp(target.host or "localhost", target.port, deadline)
    except TimeoutError:
        raise TransportError(
            f"{target.address}: no answer within {deadline.seconds:g} seconds",
            hint="is the server up, and does a firewall let the port through? "
            f"{ASK_DOCTOR.format(target)}",
        ) from None
    except OSError as error:
        raise TransportError(
            f"{target.address}: {reason(error)}", hint=_connect_hint(error, target)
        ) from None


def reason(error: OSError) -> str:
    """Give an error's words without Python's dress."""
    if isinstance(error, socket.gaierror):
        return (
            "host name cannot be resolved"
            if error.errno == socket.EAI_NONAME
            else str(error.strerror).lower()
        )
    return (error.strerror or str(error)).lower() if error.errno else str(error)


ASK_DOCTOR: Final = "`nbdlink doctor {}` walks the way there step by step"
"""What to do next if it is not known what keeps a server from answering."""


def _connect_hint(error: OSError, target: Target) -> str:
    if isinstance(error, socket.gaierror):
        # Unlike Path.exists this takes any word, be it too long for a path.
        if target.host and os.path.exists(target.host):  # noqa: PTH110
            return f"{target.host} is a file of this machine; a server is wanted: nbdlink serve"
        return "check the host's spelling, or use an address"
    match error.errno:
        case errno.ECONNREFUSED:
            return "no server listens there; start one, or check host and port"
        case errno.ENOENT:
            return "the socket does not exist; is the server running?"
        case errno.EACCES | errno.EPERM:
            return "you may not open the socket; try as root"
        case errno.ENAMETOOLONG:
            return "a Unix socket's path has at most 107 bytes"
        case errno.ENOTSOCK:
            return f"{target.socket} is not a socket"
    return ASK_DOCTOR.format(target)


def _connect_unix(path: str, deadline: Deadline) -> socket.socket:
    if len(os.fsencode(path)) > 107:
        raise OSError(errno.ENAMETOOLONG, "the socket's path is too long")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(deadline.left())
        sock.connect(path)
    except BaseException:
        sock.close()
        raise
    return sock


def _connect_tcp(host: str, port: int, deadline: Deadline) -> socket.socket:
    failure: OSError | None = None
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError:
        raise OSError(errno.EINVAL, f"{host!r} is not a host name") from None
    for number, (family, kind, protocol, _, address) in enumerate(addresses):
        sock = None
        try:
            left = deadline.left()
            sock = socket.socket(family, kind, protocol)
            # A first address that swallows packets must leave time for the next one.
            share = None if left is None else left / (len(addresses) - number)
            sock.settimeout(share)
            sock.connect(address)
            tune(sock)
            return sock
        except OSError as error:
            failure = error
            if sock is not None:
                sock.close()
        except BaseException:
            if sock is not None:
                sock.close()
            raise
    raise failure or OSError(errno.EADDRNOTAVAIL, "the host has no address")


UNIX_BUFFER: Final = 1 << 20
"""Bytes that may be under way in a Unix socket, if the system allows so many."""


def tune(sock: socket.socket) -> None:
    """Set what every NBD socket wants: requests go out at once, a dead peer is noticed."""
    if sock.family == socket.AF_UNIX:
        # TCP's buffers grow by themselves. A queue of 64 times 4 KiB fills what a Unix socket
        # has from the start, and the two sides then wake each other for every few replies.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNIX_BUFFER)
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # The kernel's defaults would take more than two hours.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)


def listen_tcp(host: str | None, port: int) -> list[socket.socket]:
    """Listen on every address of `host` (None: all addresses of this machine).

    Port 0 lets the system choose; all returned sockets then have the same one.

    Raises:
        TransportError: an address cannot be listened on.
    """
    listeners: list[socket.socket] = []
    where = f"{host or '*'}:{port}"
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in addresses:
            try:
                sock = socket.socket(family, kind, protocol)
            except OSError as error:
                if error.errno == errno.EAFNOSUPPORT and len(addresses) > 1:
                    continue  # a machine without IPv6 still resolves "*" to "::"
                raise
            listeners.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if port == 0 and len(listeners) > 1:
                address = (address[0], listeners[0].getsockname()[1], *address[2:])
            try:
                sock.bind(address)
            except OSError as error:
                if error.errno == errno.EADDRNOTAVAIL and len(addresses) > 1:
                    listeners.pop().close()
                    continue
                raise
            sock.listen(BACKLOG)
    except UnicodeError:
        raise TransportError(f"cannot listen on {where}: that is not a host name") from None
    except OSError as error:
        for sock in listeners:
            sock.close()
        hint = None
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            hint = "`ip address` shows the addresses of this machine; without one it is all of them"
        elif error.errno == errno.EADDRINUSE:
            hint = "another server has the port; stop it, or choose one with --port"
        elif error.errno == errno.EACCES:
            hint = "ports below 1024 need root"
        raise TransportError(f"cannot listen on {where}: {reason(error)}", hint=hint) from None
    if not listeners:
        raise TransportError(f"cannot listen on {where}: no usable address")
    return listeners


def listen_unix(path: str) -> socket.socket:
    """Listen on a Unix socket; one that a dead server left behind is replaced.

    Raises:
        TransportError: a live server has it, something else lies there, or it cannot be made.
    """
    if len(os.fsencode(path)) > 107:
        raise ConfigError(
            f"{path}: a Unix socket's path has at most 107 bytes", hint="choose a shorter path"
        )
    _remove_stale(Path(path))
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(path)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        hint = None
        if error.errno == errno.ENOENT:
            hint = f"make its folder first: mkdir -p {Path(path).parent}"
        elif error.errno == errno.EACCES:
            hint = f"you may not write to {Path(path).parent}; choose another path, or try as root"
        raise TransportError(f"cannot listen on {path}: {reason(error)}", hint=hint) from None
    return sock


def _remove_stale(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise TransportError(
                f"{path} exists and is not a socket", hint="choose another path for the socket"
            )
    except OSError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except OSError:
            return
    raise TransportError(
        f"{path}: another server listens there", hint="stop it, or choose another path"
    )


def receive(sock: Wire, deadline: Deadline, limit: int = 65536) -> bytes:
    """Receive up to `limit` bytes; empty once the peer has hung up.

    Raises:
        TransportError: the deadline passed, or the connection broke.
    """
    try:
        sock.settimeout(deadline.left())
        return sock.recv(limit)
    except TimeoutError:
        raise TransportError(f"no answer within {deadline.seconds:g} seconds") from None
    except OSError as error:
        raise TransportError(reason(error)) from None


def send(sock: Wire, data: bytes, deadline: Deadline) -> None:
    """Send all of `data`.

    Raises:
        TransportError: the deadline passed, or the connection broke.
    """
    try:
        sock.settimeout(deadline.left())
        sock.sendall(data)
    except TimeoutError:
        raise TransportError(f"the peer took nothing for {deadline.seconds:g} seconds") from None
    except OSError as error:
        raise TransportError(reason(error)) from None
