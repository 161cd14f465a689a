"""A server that says exactly what a test tells it to, over a real socket."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable

import pytest

from nbdlink.errors import RemoteProtocolError
from nbdlink.uri import Target


class Liar:
    """Runs `script(connection)` for each client, one after the other, then hangs up."""

    def __init__(self, path, script: Callable[[socket.socket], None]) -> None:
        self.target = Target(socket=str(path), export="data")
        self.connections = 0
        self._script = script
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            with connection, contextlib.suppress(OSError, RemoteProtocolError):
                connection.settimeout(20)
                self._script(connection)

    def close(self):
        if self._listener.fileno() >= 0:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        self._thread.join()


@pytest.fixture
def liar(tmp_path):
    """Start a server with a script; it is gone when the test is."""
    with contextlib.ExitStack() as stack:

        def start(script):
            server = Liar(tmp_path / "socket", script)
            stack.callback(server.close)
            return server

        yield start
