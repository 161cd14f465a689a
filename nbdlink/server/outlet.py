"""The way of replies onto a socket, for the connection's own thread and for its workers.

The lock says whose turn it is; replies may go out in any order, but only in whole. The
connection's thread takes it only while workers have something to do, which it sees in
`Workers.pending`: only that thread makes it rise.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Sequence
from typing import Final

from nbdlink.server.workers import Workers
from nbdlink.transport.stream import Wire

_GATHER: Final = 1000
"""Buffers that one system call takes; the kernel's limit is 1024."""

Part = bytes | memoryview


class Outlet:
    """Sends replies. All methods block until the socket has taken everything."""

    def __init__(self, sock: Wire, workers: Workers) -> None:
        """Send to `sock`."""
        self._sock = sock
        self._workers = workers
        self.lock = threading.Lock()

    def send(self, data: Part) -> None:
        """Send a reply, from the connection's own thread."""
        if self._workers.pending:
            with self.lock:
                self._sock.sendall(data)
        else:
            self._sock.sendall(data)

    def send_shared(self, data: Part) -> None:
        """Send a reply, from any thread."""
        with self.lock:
            self._sock.sendall(data)

    def send_locked(self, data: Part) -> None:
        """Send a part of a reply; the caller holds the lock."""
        self._sock.sendall(data)

    def send_vector(self, parts: Sequence[Part], sent: int = 0) -> int:
        """Send many parts, as far as it goes; the caller holds the lock if it must.

        Args:
            parts: what to send.
            sent: how many bytes of it have been sent already.

        Returns:
            How many bytes have been sent. Less than all of them means that the kernel could
            not read the rest (EFAULT), which happens only with memory lent from a file.
        """
        index, inside = 0, sent  # the part to go on with, and the byte in it
        while True:
            while index < len(parts) and inside >= len(parts[index]):
                inside -= len(parts[index])
                index += 1
            if index == len(parts):
                return sent
            batch: list[Part] = list(parts[index : index + _GATHER])
            batch[0] = memoryview(batch[0])[inside:]
            try:
                count = self._sock.sendmsg(batch)
            except OSError as error:
                if error.errno == errno.EFAULT:
                    return sent
                raise
            sent += count
            inside += count
