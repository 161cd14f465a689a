"""A storage in memory that fails and waits as told, and a client that sends what it likes.

The client's bytes are made here and not by nbdlink's own codec: that way a mistake in the
codec cannot hide itself.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading

from nbdlink.storage.base import Storage

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = 1, 2, 4, 8, 16
EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP = 1, 5, 12, 22, 28, 75, 95

OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST, OPT_STARTTLS, OPT_INFO, OPT_GO = 1, 2, 3, 5, 6, 7
REP_ACK, REP_SERVER, REP_INFO = 1, 2, 3
INFO_EXPORT, INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE = range(4)

MAGIC = 0x25609513
TIMEOUT = 30


class MemoryStorage(Storage):
    """Bytes in memory.

    Attributes:
        data: the content.
        calls: every request but reads, as tuples of its name and arguments.
        failing: errno by method name; the method raises it, without doing anything.
        gate: what every write waits for.
        entered: set once a write waits.
        on_read: called with the offset before each read.
    """

    name = "memory"
    can_trim = can_fast_zero = can_cache = True
    waits = False

    def __init__(self, size=1 << 20, *, read_only=False, minimum_block=1):
        self.data = bytearray(os.urandom(size))
        self.size = size
        self.read_only = read_only
        self.minimum_block = minimum_block
        self.preferred_block = max(4096, minimum_block)
        self.calls = []
        self.failing = {}
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.on_read = lambda offset: None
        self.closed = False

    def _called(self, method, *arguments):
        assert not self.closed
        self.calls.append((method, *arguments))
        failure = self.failing.get(method)
        if isinstance(failure, int):
            raise OSError(failure, os.strerror(failure))
        if failure is not None:
            raise failure

    def read_into(self, buffer, offset):
        assert offset + len(buffer) <= self.size
        self._called("read", offset, len(buffer))
        self.on_read(offset)
        buffer[:] = self.data[offset : offset + len(buffer)]

    def write(self, buffer, offset, fua):
        assert offset + len(buffer) <= self.size
        self._called("write", offset, len(buffer), fua)
        if not self.gate.is_set():
            self.entered.set()
            assert self.gate.wait(TIMEOUT)
        self.data[offset : offset + len(buffer)] = buffer

    def zero(self, offset, length, *, may_trim, fast, fua):
        assert offset + length <= self.size
        self._called("zero", offset, length, may_trim, fast, fua)
        self.data[offset : offset + length] = bytes(length)

    def trim(self, offset, length, fua):
        assert offset + length <= self.size
        self._called("trim", offset, length, fua)

    def cache(self, offset, length):
        self._called("cache", offset, length)

    def flush(self):
        self._called("flush")

    def close(self):
        self.closed = True


class HungUpError(Exception):
    """The server closed the connection."""


class RawClient:
    """A client's end of a connection, in bytes."""

    def __init__(self, service, *, handshake=True, name=b"", block_size=True):
        address = service.addresses[0]
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        self.sock = socket.socket(family)
        try:
            self.sock.settimeout(TIMEOUT)
            self.sock.connect(address)
            if handshake:
                self._negotiate(name, block_size)
        except BaseException:
            self.sock.close()
            raise

    def _negotiate(self, name, block_size):
        assert self.receive(18) == b"NBDMAGICIHAVEOPT\x00\x03"
        self.sock.sendall(struct.pack(">I", 3))
        asked = [INFO_BLOCK_SIZE] if block_size else []
        replies = self.option(OPT_GO, export_request(name, asked))
        assert replies[-1][0] == REP_ACK, replies

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.sock.close()

    def send(self, data):
        self.sock.sendall(data)

    def receive(self, length):
        data = bytearray()
        while len(data) < length:
            try:
                piece = self.sock.recv(length - len(data))
            except ConnectionError:
                piece = b""
            if not piece:
                raise HungUpError(bytes(data))
            data += piece
        return bytes(data)

    def trickle(self, data):
        """Send a byte at a time, until the server hangs up; give how many it took."""
        self.sock.settimeout(0.02)
        count = 0
        with contextlib.suppress(ConnectionError):
            for byte in data:
                self.send(bytes([byte]))
                count += 1
                try:
                    if self.sock.recv(1) == b"":
                        break
                except TimeoutError:
                    continue
        return count

    def hung_up(self):
        """Wait until the server has hung up without another word."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionError:
            return True

    def option(self, option, data=b""):
        """Send an option; give its replies as (type, data)."""
        self.send(b"IHAVEOPT" + struct.pack(">II", option, len(data)) + data)
        return self.replies(option)

    def replies(self, option):
        replies = []
        while True:
            magic, to, kind, length = struct.unpack(">QIII", self.receive(20))
            assert (magic, to) == (0x0003E889045565A9, option)
            replies.append((kind, self.receive(length)))
            if kind == REP_ACK or kind >> 31:
                return replies

    def reply(self, length=0):
        """Give (error, cookie, data) of the next reply; `length` bytes if it is no error."""
        magic, error, cookie = struct.unpack(">IIQ", self.receive(16))
        assert magic == 0x67446698
        return error, cookie, b"" if error else self.receive(length)

    def ask(self, command, offset=0, length=0, *, flags=0, data=b"", cookie=7):
        """Send a request and give (error, data) of its reply."""
        self.send(request(command, offset, length, flags=flags, cookie=cookie) + data)
        error, answered, data = self.reply(length if command == READ else 0)
        assert answered == cookie
        return error, data

    def write(self, offset, data, flags=0):
        return self.ask(WRITE, offset, len(data), flags=flags, data=data)[0]


def request(command, offset=0, length=0, *, flags=0, cookie=7, magic=MAGIC):
    return struct.pack(">IHHQQI", magic, flags, command, cookie, offset, length)


def export_request(name=b"", asked=()):
    packed = struct.pack(f">H{len(asked)}H", len(asked), *asked)
    return struct.pack(">I", len(name)) + name + packed
