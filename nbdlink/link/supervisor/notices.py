"""Hearing from servers that they are back.

A server that was told a port (`nbdlink.protocol.claim`) sends a datagram to it when it has been
started again. That is a hint, no more: it makes a supervisor try at once what it would have
tried anyway, at a target that it has been given by its administrator. What does not name a
device by the digest of its secret number is nobody's business, and of each only so many are
listened to.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import time
from typing import Final

from nbdlink.protocol.claim import NOTICE

_log = logging.getLogger("nbdlink.supervisor")

DEFAULT_PORT: Final = 10809
_LONGEST: Final = 128
_MOST_AT_ONCE: Final = 64
_RATE_SECONDS: Final = 0.2
"""Between two hints for the same device that are listened to."""
_MOST_REMEMBERED: Final = 1024


class Notices:
    """A UDP socket that servers may write to.

    Attributes:
        port: on which they may, or None if nobody listens.
    """

    def __init__(self, port: int | None) -> None:
        """Listen, on all addresses; for a port that is taken, as by another supervisor, any.

        Args:
            port: 0 for any that is free, None not to listen.
        """
        self.port: int | None = None
        self._socket: socket.socket | None = None
        self._last: dict[str, float] = {}
        if port is None:
            return
        try:
            try:
                self._socket = _bound(port)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                self._socket = _bound(0)
        except OSError as error:
            _log.warning(
                "servers that are back cannot tell it: UDP port %d: %s", port, error.strerror
            )
            return
        self.port = self._socket.getsockname()[1]

    def fileno(self) -> int:
        """Give the descriptor, or -1."""
        return self._socket.fileno() if self._socket else -1

    def read(self) -> set[str]:
        """Give the digests of the sessions for which there is a hint, without waiting."""
        found: set[str] = set()
        for _ in range(_MOST_AT_ONCE if self._socket else 0):
            assert self._socket is not None
            try:
                data = self._socket.recv(_LONGEST + 1)
            except OSError:
                break
            text = data.decode("ascii", "replace") if len(data) <= _LONGEST else ""
            if not text.startswith(f"{NOTICE} "):
                continue
            digest = text.removeprefix(f"{NOTICE} ").strip()
            if self._is_fresh(digest):
                found.add(digest)
        return found

    def _is_fresh(self, digest: str) -> bool:
        now = time.monotonic()
        if now - self._last.get(digest, -1e9) < _RATE_SECONDS:
            return False
        if len(self._last) >= _MOST_REMEMBERED:
            self._last.clear()
        self._last[digest] = now
        return True

    def close(self) -> None:
        """Stop listening."""
        if self._socket is not None:
            self._socket.close()

    def __enter__(self) -> Notices:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _bound(port: int) -> socket.socket:
    """Bind to the port for both address families, where there are both."""
    sock: socket.socket | None = None
    with contextlib.suppress(OSError):
        sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.setblocking(False)
        sock.bind(("::", port))
        return sock
    if sock is not None:
        sock.close()
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setblocking(False)
    try:
        sock.bind(("0.0.0.0", port))
    except OSError:
        sock.close()
        raise
    return sock
