"""The least of an NBD client: one connection, many requests at once, and when each is answered.

fio tells percentiles of everything together; here it counts which request was held up.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from bench.processes import START_SECONDS, Server

READ, DISCONNECT, FLUSH = 0, 2, 3
BLOCK = 4096

_OPTION = struct.Struct(">8sII")
_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")
_FIXED_NEWSTYLE_NO_ZEROES = 3
_EXPORT_NAME = 1
_REQUEST_MAGIC = 0x25609513


@contextmanager
def connected(server: Server) -> Iterator[socket.socket]:
    """Connect to a server's export and come to transmission; leave it politely."""
    family = socket.AF_UNIX if isinstance(server.address, str) else socket.AF_INET
    name = server.export.encode()
    with socket.socket(family) as sock:
        sock.settimeout(START_SECONDS)
        sock.connect(server.address)
        _receive(sock, 18)
        sock.sendall(
            struct.pack(">I", _FIXED_NEWSTYLE_NO_ZEROES)
            + _OPTION.pack(b"IHAVEOPT", _EXPORT_NAME, len(name))
            + name
        )
        _receive(sock, 10)
        yield sock
        with suppress(OSError):  # a server that is gone needs no good-bye
            sock.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, DISCONNECT, 0, 0, 0))


def at_once(sock: socket.socket, requests: Sequence[tuple[int, int]]) -> list[float]:
    """Send requests in one go; give the seconds until each was answered, in their order.

    Args:
        sock: a connection in transmission.
        requests: (command, offset); a read is of one block.

    Raises:
        OSError: the connection broke, or a request failed.
    """
    packed = [
        _REQUEST.pack(_REQUEST_MAGIC, 0, command, number, offset, BLOCK * (command == READ))
        for number, (command, offset) in enumerate(requests)
    ]
    answered = [0.0] * len(requests)
    start = time.perf_counter()
    sock.sendall(b"".join(packed))
    for _ in requests:
        _, error, number = _REPLY.unpack(_receive(sock, _REPLY.size))
        if error:
            raise OSError(error, "the server refuses")
        if requests[number][0] == READ:
            _receive(sock, BLOCK)
        answered[number] = time.perf_counter() - start
    return answered


def _receive(sock: socket.socket, length: int) -> bytes:
    # MSG_WAITALL does not wait on a socket that has a timeout.
    data = b""
    while len(data) < length:
        more = sock.recv(length - len(data))
        if not more:
            raise ConnectionResetError("the server hung up")
        data += more
    return data
