"""A wire between a client and a server that keeps what it carries, and alters it as told."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

UP, DOWN = "up", "down"

Alter = Callable[[str, bytes], bytes | None]


def faithfully(direction: str, data: bytes) -> bytes:
    """Alter nothing."""
    return data


class Wire:
    """Carries bytes between a client's socket and a server's, each in a thread.

    Attributes:
        carried: what has gone "up" to the server, and "down" to the client.
        alter: called with direction and bytes, in that direction's thread; gives what is carried
            in their place, or None to cut the wire.
    """

    def __init__(
        self, client: socket.socket, server: socket.socket, alter: Alter = faithfully
    ) -> None:
        self.carried = {UP: bytearray(), DOWN: bytearray()}
        self.alter = alter
        self._ends = client, server
        self._threads = [
            threading.Thread(target=self._carry, args=(UP, client, server)),
            threading.Thread(target=self._carry, args=(DOWN, server, client)),
        ]
        for thread in self._threads:
            thread.start()

    def _carry(self, direction: str, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                altered = self.alter(direction, data)
                if altered is None:
                    self.cut()
                    return
                # First the books, so that who has received something finds it there.
                self.carried[direction] += altered
                sink.sendall(altered)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        """End both connections as if their peers had gone."""
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.cut()
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive(), "the wire hangs"
        for end in self._ends:
            end.close()


class Tap:
    """A listener that leads each client to a server by a `Wire`.

    Attributes:
        addresses: where it listens, as `Service.addresses`.
        wires: those that there have been.
        alter: what new wires begin with.
    """

    def __init__(self, address: str | tuple[str, int], path: str) -> None:
        self.addresses: list[str | tuple[str, int]] = [path]
        self.wires: list[Wire] = []
        self.alter: Alter = faithfully
        self._address = address
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            unix = isinstance(self._address, str)
            server = socket.socket(socket.AF_UNIX if unix else socket.AF_INET)
            server.connect(self._address)
            self.wires.append(Wire(client, server, self.alter))

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        for wire in self.wires:
            wire.close()


@contextlib.contextmanager
def tapped(address: str | tuple[str, int], path: object) -> Iterator[Tap]:
    """Listen in on who connects to `path`; they are led to `address`."""
    tap = Tap(address, str(path))
    try:
        yield tap
    finally:
        tap.close()


def records(data: bytes | bytearray) -> list[tuple[int, bytes]]:
    """Divide a stream into TLS records: the kind and the whole of each (RFC 8446, section 5.1)."""
    found = []
    position = 0
    while position < len(data):
        end = position + 5 + int.from_bytes(data[position + 3 : position + 5])
        assert data[position + 1] == 3, f"no TLS record at {position}: {data[position:][:40]!r}"
        assert end <= len(data), "the last record is not whole"
        found.append((data[position], bytes(data[position:end])))
        position = end
    return found
