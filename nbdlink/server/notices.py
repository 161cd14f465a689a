"""Telling the clients of before that the server is back (`serve --remember-clients`).

A client that has lost its server tries again after longer and longer pauses. One that says in
its claim where it listens (`protocol/claim.py`) is kept in a file for as long as it uses an
export, and a server that starts sends a datagram to everybody in its file:

    nbdlink-notice 1 <digest of the session's number>

That is a hint and nothing else: it may be lost, forged or too late, and asks for no more than an
earlier try. Nothing here holds the service up: one thread writes the file and sends the
datagrams, and what fails is said once.

Who says goodbye (NBD_CMD_DISC) on its last connection is forgotten, as is who does not come back
within a few minutes of the start.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import json
import logging
import math
import os
import socket
import stat
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any, Final

from nbdlink.errors import ConfigError
from nbdlink.protocol.claim import Claim
from nbdlink.server.sessions import Session

_log = logging.getLogger("nbdlink.server")

_VERSION: Final = 1
_MOST: Final = 1024
"""Clients that are remembered; of more, those that are not connected are forgotten first."""
_LARGEST: Final = 1 << 20
"""Bytes of a file that is read at all."""
_TIMES: Final = (0.0, 0.3, 1.0, 3.0)
"""Seconds after the start at which those are told who have not come back."""
_PATIENCE: Final = 180.0
"""Seconds after the start in which a client has to come back in order not to be forgotten."""
_GOODBYE: Final = 1.0
"""Seconds that the file may take to be written when the service ends."""

_Key = tuple[str, int, str]
"""Address, port and session."""


class Notices:
    """The clients that want to hear of a restart; safe to use from every thread."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read who was there before; a file that is of no use is reported, and counts as empty.

        Args:
            path: of the file, which need not exist; its directory must.

        Raises:
            ConfigError: no file can be made there.
        """
        self._path = Path(path).absolute()  # a daemon changes its directory
        folder = self._path.parent
        if not os.access(folder, os.W_OK | os.X_OK) or not folder.is_dir():
            raise ConfigError(
                f"--remember-clients {path}: {folder} is no directory to write to",
                hint=f"make it: mkdir -p {folder}",
            )
        self._clients: OrderedDict[_Key, set[int]] = OrderedDict()  # with sessions' numbers
        self._of: dict[int, _Key] = {}
        self._missing = self._read()  # of before, and not back yet
        for key in self._missing:
            self._clients[key] = set()
        self._told = 0  # how often the missing ones have been told
        self._started = math.inf
        self._stale = False  # whether the file is
        self._closing = False
        self._complained = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="nbd-notices", daemon=True)

    def start(self) -> None:
        """Begin to tell those of before, and to write the file."""
        self._started = time.monotonic()
        self._thread.start()

    def arrived(self, session: Session, claim: Claim) -> None:
        """Take note of a connection that has claimed a channel."""
        if claim.notice is None or session.address is None:
            return
        key = session.address, claim.notice, claim.session
        with self._changed:
            for missing in [one for one in self._missing if one[2] == claim.session]:
                # It is back, be it from another address.
                self._missing.discard(missing)
                if missing != key:
                    del self._clients[missing]
            self._clients.setdefault(key, set()).add(session.number)
            self._clients.move_to_end(key)
            self._of[session.number] = key
            if len(self._clients) > _MOST:
                idle = (one for one, sessions in self._clients.items() if not sessions)
                self._forget(next(idle, next(iter(self._clients))))
            self._note_change()

    def left(self, session: Session, *, properly: bool) -> None:
        """Take note of the end of a connection.

        Args:
            session: the connection's.
            properly: whether the client has ended it, and so does not want it any more.
        """
        with self._changed:
            key = self._of.pop(session.number, None)
            if key is None or key not in self._clients:
                return
            self._clients[key].discard(session.number)
            if properly and not self._clients[key]:
                self._forget(key)
                self._note_change()

    def close(self) -> None:
        """Write the file for the last time."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(_GOODBYE)

    def _forget(self, key: _Key) -> None:
        del self._clients[key]
        self._missing.discard(key)

    def _note_change(self) -> None:
        self._stale = True
        self._changed.notify()

    # The thread.

    def _work(self) -> None:
        try:
            while self._turn():
                pass
        except Exception as error:  # the service goes on without
            self._complain(f"clients are not remembered any more: {error}")

    def _turn(self) -> bool:
        """Wait for something to do, and do it; False at the end."""
        with self._changed:
            left = max(0.0, self._next() - time.monotonic()) if self._missing else None
            self._changed.wait_for(lambda: self._stale or self._closing, left)
            due: list[_Key] = []
            if self._missing and not self._closing and time.monotonic() >= self._next():
                if self._told < len(_TIMES):
                    due = list(self._missing)
                    self._told += 1
                else:
                    for key in list(self._missing):
                        self._forget(key)
                    self._stale = True
            is_stale, self._stale = self._stale, False
            closing = self._closing
            clients = list(self._clients)
        if due:
            self._send(due)
        if is_stale:
            self._write(clients)
        return not closing

    def _next(self) -> float:
        """Give when something is due for those that are missing."""
        after = _TIMES[self._told] if self._told < len(_TIMES) else _PATIENCE
        return self._started + after

    def _send(self, keys: list[_Key]) -> None:
        if self._told == 1:
            _log.info("%d clients of before are told that the server is back", len(keys))
        with contextlib.ExitStack() as undo:
            sockets: dict[int, socket.socket] = {}
            for address, port, session in keys:
                try:
                    family, kind, protocol, _, where = socket.getaddrinfo(
                        address, port, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST
                    )[0]
                    if family not in sockets:
                        sockets[family] = undo.enter_context(socket.socket(family, kind, protocol))
                        sockets[family].setblocking(False)
                    sockets[family].sendto(f"{Claim(session, 0, 0).notice_text}\n".encode(), where)
                except OSError as error:
                    # A refusal of the last datagram is told with the next.
                    if error.errno != errno.ECONNREFUSED:
                        self._complain(f"{address} cannot be told of the restart: {error.strerror}")

    def _complain(self, words: str) -> None:
        if not self._complained:
            self._complained = True
            _log.warning("%s", words)

    # The file.

    def _write(self, clients: list[_Key]) -> None:
        content = {
            "version": _VERSION,
            "clients": [
                {"address": address, "port": port, "session": session}
                for address, port, session in clients
            ],
        }
        try:
            # Always the same name, so that a server which is killed here leaves no more than one.
            new = self._path.with_name(f".{self._path.name}.new")
            new.unlink(missing_ok=True)
            # For nobody else to read: a session's number is a secret.
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=1)
                file.write("\n")
            new.replace(self._path)
        except OSError as error:
            self._complain(f"{self._path}: clients cannot be remembered: {error.strerror}")

    def _read(self) -> set[_Key]:
        try:
            # Not blocking, as it might be a FIFO.
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            with os.fdopen(fd, "rb") as file:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise ValueError("it is no regular file")
                data = file.read(_LARGEST + 1)
            return _parsed(data)
        except FileNotFoundError:
            return set()
        except OSError as error:
            words = error.strerror or str(error)
        except ValueError as error:
            words = str(error)
        _log.warning("%s is ignored: %s", self._path, words)
        return set()


def _parsed(data: bytes) -> set[_Key]:
    """Read the file's content.

    Raises:
        ValueError: it is not what a server writes.
    """
    if len(data) > _LARGEST:
        raise ValueError(f"it has more than {_LARGEST} bytes")
    try:
        content: Any = json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"it is not JSON: {error}") from None
    if not isinstance(content, dict) or content.get("version") != _VERSION:
        raise ValueError(f"it is not of version {_VERSION}")
    clients = content.get("clients")
    if not isinstance(clients, list) or len(clients) > _MOST:
        raise ValueError(f"it has no list of at most {_MOST} clients")
    found = set()
    for client in clients:
        try:
            address, port = client["address"], client["port"]
            if not isinstance(address, str) or type(port) is not int:
                raise TypeError
            ipaddress.ip_address(address)
            found.add((address, port, Claim(client["session"], 0, 0, port).session))
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"it lists something that is no client: {client!r:.80}") from None
    return found
