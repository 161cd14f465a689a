"""Where a server can be found: the sockets that it listens on, and its pid files."""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

from nbdlink.errors import ConfigError, TransportError
from nbdlink.uri import DEFAULT_PORT

if TYPE_CHECKING:
    from nbdlink.cli.devices import ServedDevice
    from nbdlink.server.daemon import PidFile

_LONGEST_NAME: Final = 200
"""Bytes of a signature in a file's name, which may have 255 in all."""


def parse_ports(text: str) -> range:
    """Read a port, or a range of them: `10809`, `10809-10820`.

    Raises:
        ConfigError: it is neither.
    """
    first, hyphen, last = text.partition("-")
    words = [first, last] if hyphen else [first]
    if not all(word.isascii() and word.isdigit() and int(word) < 65536 for word in words):
        raise ConfigError(
            f"{text!r} is not a port",
            hint="use 1 to 65535, 0 for any, or a range such as 10809-10820",
        )
    ports = range(int(words[0]), int(words[-1]) + 1)
    if hyphen and (not ports or not ports.start):
        raise ConfigError(
            f"there is no port in {text}", hint="say the lower one first, and none of them 0"
        )
    return ports


def listeners(arguments: argparse.Namespace, device: ServedDevice | None) -> list[socket.socket]:
    """Listen on all that is asked for, or on nothing.

    Raises:
        TransportError: some of it cannot be listened on.
    """
    from nbdlink.transport.stream import listen_unix

    ports = arguments.port or range(DEFAULT_PORT, DEFAULT_PORT + 1)
    with contextlib.ExitStack() as undo:
        sockets = []
        path = arguments.socket
        if path is None and device is not None:
            path = device.socket  # the first, for the device comes by it
        if path is not None:
            sockets.append(undo.enter_context(listen_unix(path)))
        if path is None or arguments.port is not None or arguments.bind:
            for sock in _listen_tcp(arguments.bind or [None], ports):
                sockets.append(undo.enter_context(sock))
        undo.pop_all()
        return sockets


def _listen_tcp(hosts: list[str | None], ports: range) -> list[socket.socket]:
    """Listen on the first port that is free on all addresses."""
    from nbdlink.transport.stream import listen_tcp

    for port in ports:
        with contextlib.ExitStack() as undo:
            sockets = []
            try:
                for host in hosts:
                    for sock in listen_tcp(host, port):
                        sockets.append(undo.enter_context(sock))
            except TransportError as error:
                why = error.__context__
                if not (isinstance(why, OSError) and why.errno == errno.EADDRINUSE):
                    raise
                if port < ports[-1]:
                    continue
                if len(ports) == 1:
                    raise
                raise TransportError(
                    f"cannot listen: all ports from {ports[0]} to {ports[-1]} are in use",
                    hint="stop a server, or choose others with --port",
                ) from None
            undo.pop_all()
            return sockets
    raise AssertionError("no port was tried")


# Pid files.


def pid_files(arguments: argparse.Namespace, signatures: Iterable[str]) -> list[PidFile]:
    """Give the files that are to tell the process's number, and keep second servers away.

    That is the one that is asked for; or else one for each signature that was given, so that two
    servers that say they have the same data do not run on one machine by mistake.

    Raises:
        DaemonError: a live server has one of them, or it cannot be made.
    """
    from nbdlink.server.daemon import PidFile

    if arguments.pid_file is not None:
        return [PidFile(arguments.pid_file)]
    given = sorted(set(signatures))
    folder = _runtime_directory() if given else None
    if folder is None:
        return []
    hint = "stop it, or choose another signature; --pid-file PATH, too, makes it another server"
    return [PidFile(folder / _file_name(signature), hint=hint) for signature in given]


def _file_name(signature: str) -> str:
    name = quote(signature, safe=" =+,:@")
    if len(name) > _LONGEST_NAME:
        name = hashlib.sha256(signature.encode()).hexdigest()
    return f"server-{name}.pid"


def _runtime_directory() -> Path | None:
    """Give the directory for what lasts until the next boot; None if this user has none."""
    from nbdlink.link import record

    folder = record.DIRECTORY
    if os.geteuid() and "NBDLINK_RUNTIME_DIRECTORY" not in os.environ:
        if not (own := os.environ.get("XDG_RUNTIME_DIR")):
            return None
        folder = Path(own, "nbdlink")
    with contextlib.suppress(OSError):  # said better by who writes there
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    return folder
