"""The way of replies onto a socket, for the connection's own thread and for its workers.

The lock says whose turn it is; replies may go out in any order, but only in whole. The
connection's thread takes it only while workers have something to do, which it sees in
`Workers.pending`: only that thread makes it rise.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Sequence
from typing import Final

from nbdlink.server.workers import Workers

_GATHER: Final = 1000
"""Buffers that one system call takes; the kernel's limit is 1024."""

Part = bytes | memoryview


class Outlet:
    """Sends replies. All methods block until the socket has taken everything."""

    def __init__(self, sock: socket.socket, workers: Workers) -> None:
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

    def send_vector(self, parts: Sequence[Part]) -> int:
        """Send many parts, as far as it goes; the caller holds the lock if it must.

        Returns:
            How many bytes have been sent. Less than all of them means that the kernel could
            not read the rest (EFAULT), which happens only with memory lent from a file.
        """
        sock, sent = self._sock, 0
        index = inside = 0  # the part to go on with, and the byte in it
        while index < len(parts):
            batch: list[Part] = list(parts[index : index + _GATHER])
            if inside:
                batch[0] = memoryview(batch[0])[inside:]
            try:
                count = sock.sendmsg(batch)
            except OSError as error:
                if error.errno == errno.EFAULT:
                    return sent
                raise
            sent += count
            count += inside
            while index < len(parts) and count >= len(parts[index]):
                count -= len(parts[index])
                index += 1
            inside = count
        return sent

    def send_file(self, header: bytes, fd: int, position: int, length: int) -> int:
        """Send a header and then a range of a file, without its bytes coming by here.

        The caller holds the lock if it must.

        Returns:
            How many bytes of the file were sent; less than `length` if no more can be read.
        """
        sock, sent = self._sock, 0
        sock.sendall(header, socket.MSG_MORE)
        while sent < length:
            try:
                count = os.sendfile(sock.fileno(), fd, position + sent, length - sent)
            except ConnectionError:
                raise
            except OSError:
                break  # it is the file, or will show again
            if not count:
                break
            sent += count
        return sent
