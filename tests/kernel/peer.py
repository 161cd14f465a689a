"""A server of the transmission phase only, on one end of a connected socket pair.

It speaks simple replies from a bytearray, in threads, so that a test needs neither a port nor
a negotiation, and can be as nasty as it likes.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time

REQUEST = struct.Struct(">IHHQQI")
REPLY = struct.Struct(">IIQ")
REQUEST_MAGIC, REPLY_MAGIC = 0x25609513, 0x67446698
READ, WRITE, DISC, FLUSH, TRIM = range(5)

HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_FUA, SEND_TRIM, MULTI_CONN = 1, 2, 4, 8, 32, 256


class Peer:
    """Serves `data` on every socket pair it makes."""

    def __init__(self, size: int, family: int = socket.AF_INET) -> None:
        self.data = bytearray(size)
        self.family = family
        self.flags = HAS_FLAGS | SEND_FLUSH
        self.answering = threading.Event()
        self.answering.set()
        self.write_seconds = 0.0
        self.requests: list[int] = []
        self._ours: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._closing = False

    def connect(self) -> socket.socket:
        """Give the client's end of a new connection."""
        if self.family == socket.AF_UNIX:
            ours, theirs = socket.socketpair()
        else:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                theirs = socket.create_connection(listener.getsockname())
                ours, _ = listener.accept()
        self._ours.append(ours)
        thread = threading.Thread(target=self._serve, args=(ours,), daemon=True)
        thread.start()
        self._threads.append(thread)
        return theirs

    def kill(self, number: int | None = None) -> None:
        """Cut one connection, or all of them."""
        for ours in self._ours if number is None else [self._ours[number]]:
            with contextlib.suppress(OSError):
                ours.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._closing = True
        self.answering.set()
        self.kill()
        for thread in self._threads:
            thread.join(10)
        for ours in self._ours:
            ours.close()

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                magic, _, kind, cookie, offset, length = REQUEST.unpack(_exactly(sock, 28))
                assert magic == REQUEST_MAGIC
                payload = _exactly(sock, length) if kind == WRITE else b""
                self.requests.append(kind)
                if kind == DISC:
                    return
                self.answering.wait()
                if self._closing:
                    return
                answer = b""
                if kind == READ:
                    answer = bytes(self.data[offset : offset + length])
                elif kind == WRITE:
                    time.sleep(self.write_seconds)
                    self.data[offset : offset + length] = payload
                sock.sendall(REPLY.pack(REPLY_MAGIC, 0, cookie) + answer)


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        chunk = sock.recv(count - len(data))
        if not chunk:
            raise EOFError
        data += chunk
    return data
