"""How `nbdlink mirror` speaks to the server of a mirror: one line of JSON each way.

The socket lies where the mirror's number tells (`places.control_socket`), and only its owner and
root are heard. A request is `{"do": "status"}` or `{"do": "rebuild", "member": ADDRESS}`, with
`"replace": ADDRESS` if another one takes the member's place. The answer is the mirror's status,
or `{"error": TEXT, "hint": TEXT}`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import struct
import threading
from typing import Any, Final, Self

from nbdlink.errors import NBDError, StorageError, TransportError
from nbdlink.server.export import Catalogue
from nbdlink.storage.base import Storage
from nbdlink.storage.layer import Layer
from nbdlink.storage.mirror.places import control_socket
from nbdlink.storage.mirror.storage import Mirror
from nbdlink.transport.stream import listen_unix

_log = logging.getLogger("nbdlink.mirror")

_LONGEST: Final = 64 << 10
_SECONDS: Final = 5.0
"""What a client has to say what it wants."""
_PATIENCE: Final = 120.0
"""Seconds that an answer may take: another server's export may have to be opened."""
_PAUSE: Final = 0.1
"""Seconds without accepting after the system ran out of descriptors."""
_CREDENTIALS: Final = struct.Struct("3i")  # struct ucred: process, user, group


def mirror_of(storage: Storage) -> Mirror | None:
    """Give the mirror that lies below a storage, or None if there is none."""
    while isinstance(storage, Layer):
        storage = storage.below
    return storage if isinstance(storage, Mirror) else None


def mirrors(catalogue: Catalogue) -> dict[str, Mirror]:
    """Give the mirrors that are served, by the names of their exports."""
    found = ((export.name, mirror_of(export.storage)) for export in catalogue)
    return {name: mirror for name, mirror in found if mirror is not None}


class MirrorControl:
    """Listens for `nbdlink mirror`, in threads of its own, for one mirror."""

    def __init__(self, mirror: Mirror) -> None:
        """Begin to listen.

        Raises:
            TransportError: the socket cannot be made.
        """
        self._mirror = mirror
        self._path = control_socket(mirror.mirror)
        try:
            self._path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        except OSError as error:
            raise TransportError(
                f"{self._path.parent} cannot be made: {(error.strerror or '').lower()}"
            ) from None
        self._listener = listen_unix(str(self._path))
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._accept, name="mirror-control", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes who accepts
        self._thread.join()
        self._listener.close()
        with contextlib.suppress(OSError):
            self._path.unlink()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                # It is the end, or there are no descriptors for now.
                if self._closing.wait(_PAUSE):
                    return
                continue
            thread = threading.Thread(
                target=self._serve, args=(client,), name="mirror-client", daemon=True
            )
            try:
                thread.start()
            except RuntimeError:  # the system has no more
                client.close()

    def _serve(self, client: socket.socket) -> None:
        try:
            with client:
                client.settimeout(_SECONDS)
                answer = self._answer(client)
                client.sendall(json.dumps(answer).encode() + b"\n")
        except (OSError, ValueError) as error:
            _log.debug("%s: a client left: %s", self._path, error)

    def _answer(self, client: socket.socket) -> dict[str, Any]:
        told = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        _, user, _ = _CREDENTIALS.unpack(told)
        if user not in (0, os.geteuid()):
            return {"error": "only root and the user of the server may ask", "hint": None}
        request = json.loads(_line(client))
        try:
            match request:
                case {"do": "status"}:
                    pass
                case {"do": "rebuild", "member": str(member), "replace": str(other)}:
                    self._mirror.replace(member, other)
                case {"do": "rebuild", "member": str(member)}:
                    self._mirror.rebuild(member)
                case _:
                    return {"error": "this server does not understand that", "hint": None}
        except NBDError as error:
            return {"error": str(error), "hint": error.hint}
        return self._mirror.status() | {"server": os.getpid()}


def ask(mirror: str, **request: str) -> dict[str, Any] | None:
    """Ask the server of a mirror; None if there is none.

    Raises:
        StorageError: it refuses, or does not answer.
    """
    path = control_socket(mirror)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(_PATIENCE)
        try:
            sock.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        except OSError as error:
            raise StorageError(
                f"{path}: {(error.strerror or str(error)).lower()}",
                hint="only root and the user of the server may ask it",
            ) from None
        try:
            sock.sendall(json.dumps(request).encode() + b"\n")
            answer: dict[str, Any] = json.loads(_line(sock))
        except (OSError, ValueError) as error:
            raise StorageError(f"the mirror's server does not answer at {path}: {error}") from None
    if "error" in answer:
        raise StorageError(answer["error"], hint=answer.get("hint"))
    return answer


def _line(sock: socket.socket) -> bytes:
    heard = b""
    while not heard.endswith(b"\n"):
        if len(heard) > _LONGEST or not (more := sock.recv(4096)):
            raise ValueError("no whole line came")
        heard += more
    return heard
