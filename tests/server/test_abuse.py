"""Clients that mean harm or are killed: what they cannot do to the server and to others."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading

import pytest

from .fakes import FUA, READ, WRITE, MemoryStorage, RawClient, request
from .styles import SIMPLE, STYLES, StyledClient

K, M = 1 << 10, 1 << 20


class WaitingStorage(MemoryStorage):
    """A storage in memory whose requests go to workers all the same."""

    waits = True


STORAGES = {"plain": None, "workers": WaitingStorage, "inline": MemoryStorage}


@pytest.fixture(params=STORAGES)
def anything(request, tmp_path, serve):
    """A service with 8 MiB of zeroes, on each kind of storage."""
    if request.param == "plain":
        path = tmp_path / "image"
        path.write_bytes(bytes(8 * M))
        return serve({"": path})
    storage = STORAGES[request.param](8 * M)
    storage.data[:] = bytes(8 * M)
    return serve({"": storage})


def sits_still(service):
    """Tell whether another client is served as if nothing were."""
    with RawClient(service) as client:
        return client.ask(READ, 0, 512)[0] == 0


# Handshakes that are not finished.


@pytest.mark.parametrize(
    "said",
    [
        b"",
        bytes(3),
        struct.pack(">I", 3) + b"IHAVE",
        struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 7, 60_000),
        struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 99, 1 << 20),
    ],
    ids=["nothing", "half a word", "half an option", "an option", "a skipped option"],
)
def test_who_does_not_finish_the_handshake_is_hung_up_on(serve, storage, said):
    service = serve({"": storage}, negotiation_timeout=0.6)
    with RawClient(service, handshake=False) as client:
        client.receive(18)
        client.send(said)
        assert client.hung_up()


def test_sending_a_byte_now_and_then_wins_no_time(serve, storage):
    service = serve({"": storage}, negotiation_timeout=0.3)
    with RawClient(service, handshake=False) as client:
        client.receive(18)
        assert client.trickle(struct.pack(">I", 3) + b"IHAVEOPT" + bytes(1000)) < 200


def test_not_taking_the_answers_wins_no_time(serve, storage, eventually):
    service = serve({"x" * 4000: storage, "": storage}, negotiation_timeout=0.3)
    with RawClient(service, handshake=False) as client:
        client.receive(18)
        client.sock.setblocking(False)
        with contextlib.suppress(OSError):
            client.sock.send(struct.pack(">I", 3))
            for _ in range(1000):
                client.sock.send(b"IHAVEOPT" + struct.pack(">II", 3, 0))
        eventually(lambda: len(service.sessions) == 0)


# Clients that do not take their replies.


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
@pytest.mark.parametrize("length", [4 * K, 64 * K, 4 * M])
def test_who_takes_no_replies_holds_up_nobody_else(anything, length, style):
    with StyledClient(anything, style) as greedy:
        greedy.sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            for _ in range(50):
                greedy.sock.send(greedy.pack(READ, 0, length) * 20)
        for _ in range(3):
            assert sits_still(anything)


def test_many_that_take_no_replies_hold_up_nobody_else(anything):
    with contextlib.ExitStack() as stack:
        for _ in range(64):
            greedy = stack.enter_context(RawClient(anything))
            greedy.send(request(READ, 0, M) * 20)
        assert sits_still(anything)


def test_who_takes_replies_late_gets_them_all(anything):
    with RawClient(anything) as late:
        late.send(request(READ, 0, M) * 20)
        assert sits_still(anything)
        for _ in range(20):
            assert late.reply(M) == (0, 7, bytes(M))


# Clients that are killed.

KILLED = """
import os, socket, struct, sys
path, length, count, flags, extra = sys.argv[1], *map(int, sys.argv[2:])
sock = socket.socket(socket.AF_UNIX)
sock.connect(path)
sock.recv(18, socket.MSG_WAITALL)
sock.sendall(struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">IIIH", 7, 6, 0, 0))
while not sock.recv(1 << 16).endswith(struct.pack(">QIII", 0x3e889045565a9, 7, 1, 0)):
    pass
def write(number, data):
    header = struct.pack(">IHHQQI", 0x25609513, flags, 1, number, number * length, length)
    sock.sendall(header + data)
for number in range(count):
    write(number, bytes([number + 1]) * length)
for number in range(count):
    assert sock.recv(16, socket.MSG_WAITALL)[:8] == bytes.fromhex("6744669800000000")
write(count, b"x" * extra)
print("now", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("flags", [0, FUA], ids=["plain", "fua"])
@pytest.mark.parametrize("length", [16 * K, 300 * K, 1500 * K])
def test_what_a_killed_client_was_told_is_there(anything, length, flags, eventually):
    count = 3
    words = [anything.addresses[0], length, count, flags, length // 2]
    victim = subprocess.Popen(
        [sys.executable, "-c", KILLED, *map(str, words)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with victim:
        assert victim.stdout.readline() == b"now\n"
        victim.send_signal(signal.SIGKILL)
    eventually(lambda: len(anything.sessions) == 0)
    with RawClient(anything) as client:
        for number in range(count):
            assert client.ask(READ, number * length, length) == (0, bytes([number + 1]) * length)
        rest = client.ask(READ, count * length, length)[1]
        # Half of the last one came: that much may be there, and nothing else.
        assert not rest.strip(b"x\0")
        assert not rest[length // 2 :].strip(b"\0")


@pytest.mark.parametrize("length", [4 * K, 40 * K, 300 * K, 3 * M])
def test_clients_that_reset_while_they_are_answered(anything, length, eventually):
    for _ in range(10):
        with RawClient(anything) as client:
            client.send(request(READ, 0, length) * 10 + request(WRITE, M, length) + bytes(10))
            client.receive(16 + length // 2)
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    eventually(lambda: len(anything.sessions) == 0)
    assert sits_still(anything)


# What one client is told holds for all.


class Recorded(MemoryStorage):
    """Remembers what a crash would have left.

    Attributes:
        durable: the content as it would be found.
    """

    waits = True

    def __init__(self, size=M):
        super().__init__(size)
        self._changing = threading.Lock()
        self.durable = bytes(self.data)

    def write(self, buffer, offset, fua):
        super().write(buffer, offset, fua)
        if fua:
            with self._changing:
                stop = offset + len(buffer)
                self.durable = self.durable[:offset] + bytes(buffer) + self.durable[stop:]

    def flush(self):
        with self._changing:
            self.durable = bytes(self.data)


@pytest.mark.parametrize("waits", [True, False], ids=["workers", "inline"])
def test_a_flush_covers_what_was_acknowledged_on_another_connection(serve, waits):
    storage = Recorded()
    storage.waits = waits
    service = serve({"": storage})
    with RawClient(service) as one, RawClient(service) as two:
        for number in range(1, 30):
            data = bytes([number]) * 1000
            assert one.write(number * 1000, data) == 0
            assert two.ask(3) == (0, b"")
            assert storage.durable[number * 1000 :][:1000] == data


@pytest.mark.parametrize("length", [1000, 200_000])
@pytest.mark.parametrize("waits", [True, False], ids=["workers", "inline"])
def test_fua_needs_no_flush(serve, waits, length):
    storage = Recorded()
    storage.waits = waits
    with RawClient(serve({"": storage})) as client:
        data = os.urandom(length)
        assert client.write(77, data, FUA) == 0
        assert storage.durable[77:][:length] == data


@pytest.fixture
def syncs(monkeypatch):
    """Record what makes a plain file durable, and what it covers."""
    calls = []
    fdatasync, pwritev = os.fdatasync, os.pwritev
    monkeypatch.setattr(os, "fdatasync", lambda fd: calls.append("sync") or fdatasync(fd))

    def written(fd, buffers, offset, flags=0):
        if flags & os.RWF_DSYNC:
            calls.append("through")
        return pwritev(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "pwritev", written)
    return calls


@pytest.mark.parametrize("unix", [True, False], ids=["unix", "tcp"])
@pytest.mark.parametrize("length", [100, 100 * K, 300 * K, 3 * M])
@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_fua_reaches_the_file_on_every_road(serve, tmp_path, syncs, length, style, unix):
    path = tmp_path / "image"
    path.write_bytes(bytes(4 * M))
    with StyledClient(serve({"": path}, **({} if unix else {"unix": None})), style) as client:
        data = os.urandom(length)
        assert client.ask(WRITE, 77, data=data, flags=FUA) == (0, b"")
        assert syncs
        assert path.read_bytes()[77:][:length] == data


def test_a_flush_on_another_connection_reaches_the_file(serve, tmp_path, syncs):
    path = tmp_path / "image"
    path.write_bytes(bytes(M))
    service = serve({"": path})
    with RawClient(service) as one, StyledClient(service, SIMPLE) as two:
        assert one.write(0, b"data") == 0
        assert not syncs
        assert two.ask(3) == (0, b"")
        assert syncs == ["sync"]
