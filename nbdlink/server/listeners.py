"""The sockets that clients come in by, and the files that belong to them."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence
from pathlib import Path


class Listeners:
    """Listening sockets of a service, which owns them.

    Attributes:
        sockets: they do not block.
        inherited: whether they belong to somebody who keeps them (socket activation).
    """

    def __init__(self, sockets: Sequence[socket.socket], *, inherited: bool) -> None:
        """Take them over."""
        self.sockets = tuple(sockets)
        self.inherited = inherited
        self._files = [] if inherited else [_socket_file(sock) for sock in sockets]
        for sock in self.sockets:
            sock.setblocking(False)

    def close(self) -> None:
        """Close them; in a process that was forked off, without a word to anybody."""
        for sock in self.sockets:
            sock.close()

    def remove_files(self) -> None:
        """Remove the files of Unix sockets, unless they are somebody else's."""
        for path, inode in filter(None, self._files):
            # Only if it is still ours: another server may have taken the path over.
            with contextlib.suppress(OSError):
                if path.lstat().st_ino == inode:
                    path.unlink()


def address_of(sock: socket.socket) -> tuple[str, int] | str:
    """Give what a socket is bound to: (host, port), or the path of a Unix socket."""
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return os.fsdecode(name)
    return name[0], name[1]


def _socket_file(sock: socket.socket) -> tuple[Path, int] | None:
    """Give path and inode of a Unix socket, to remove that very file later."""
    name = address_of(sock)
    if not isinstance(name, str) or name.startswith("\0") or not name:
        return None
    # Made absolute now: a daemon changes its directory.
    path = Path(name).absolute()
    try:
        return path, path.lstat().st_ino
    except OSError:
        return None
