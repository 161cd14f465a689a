"""What clients can make the server hold in memory, measured from outside of its process."""

from __future__ import annotations

import contextlib
import os
import struct

import pytest

from .fakes import FLUSH, READ, TRIM, WRITE, RawClient, request
from .served import served
from .styles import EXTENDED, STYLES, StyledClient

K, M = 1 << 10, 1 << 20
TRANSPORTS = ["unix", "tcp"]


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(os.urandom(M) * 32)
    return path


def stuff(client, data, most):
    """Send as much as the server takes without its replies being taken, up to `most` bytes."""
    client.sock.settimeout(0.2)
    sent = 0
    with contextlib.suppress(TimeoutError):
        while sent < most:
            sent += client.sock.send(data)
    return sent


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_idle_connection_gives_its_buffers_back(tmp_path, image, transport, eventually):
    count = 30
    with served(tmp_path, image, transport=transport) as server, contextlib.ExitStack() as stack:
        before = server.memory()
        for number in range(count):
            client = stack.enter_context(StyledClient(server, number % 3))
            assert client.ask(WRITE, 0, data=bytes(M)) == (0, b"")
            assert client.ask(READ, 0, M) == (0, bytes(M))
            for cookie in range(32):
                client.expect(WRITE, 0, 16 * K, cookie)
            client.send(
                b"".join(client.pack(WRITE, 0, data=bytes(16 * K), cookie=i) for i in range(32))
            )
            for _ in range(32):
                assert client.answer().error == 0
        eventually(lambda: server.memory() - before < count * 64 * K, "more than 64 KiB are left")


@pytest.mark.parametrize(
    ("length", "transport"), [(512, "unix"), (64 * K, "tcp"), (32 * M, "unix")]
)
@pytest.mark.parametrize(("kind", "most"), [("plain", 16 * M), ("general", 320 * M)])
def test_a_client_that_takes_no_replies_cannot_fill_the_memory(
    tmp_path, image, kind, transport, length, most
):
    with served(tmp_path, image, kind=kind, transport=transport) as server:
        before = server.memory()
        with RawClient(server) as greedy, RawClient(server) as other:
            stuff(greedy, request(READ, 0, length) * 1000, 20 * M)
            assert server.memory() - before < most
            assert other.ask(READ, 0, K) == (0, image.read_bytes()[:K])


@pytest.mark.parametrize("command", [FLUSH, TRIM])
def test_requests_without_data_cannot_either(tmp_path, image, command):
    with served(tmp_path, image, kind="general") as server:
        before = server.memory()
        with RawClient(server) as greedy:
            stuff(greedy, request(command) * 1000, 20 * M)
            assert server.memory() - before < 8 * M


@pytest.mark.parametrize(("kind", "most"), [("plain", 128 * M), ("general", 448 * M)])
def test_many_that_take_no_replies_share_what_there_is(tmp_path, image, kind, most):
    with served(tmp_path, image, kind=kind) as server, contextlib.ExitStack() as stack:
        before = server.memory()
        for _ in range(64):
            greedy = stack.enter_context(RawClient(server))
            greedy.sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                for _ in range(10):
                    greedy.sock.send(request(READ, 0, 32 * M) * 100)
        with RawClient(server) as client:
            assert client.ask(READ, 0, K) == (0, image.read_bytes()[:K])
            assert server.memory() - before < most


# Floods.


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_a_flood_of_bad_requests_is_answered_and_leaves_nothing(tmp_path, image, style):
    count = 100
    with served(tmp_path, image) as server, StyledClient(server, style) as client:
        (chunk,) = client.whole(9).chunks
        size = 16 if chunk.simple else (32 if style == EXTENDED else 20) + len(chunk.payload)
        stream = client.pack(9, 2**63, 2**32 - 1) * count
        for number in range(333):  # a hundred thousand in all styles together
            if number == 10:
                before = server.memory()
            client.send(stream)
            client.receive(count * size)
        assert server.memory() - before < M
        assert client.ask(READ, 0, 16) == (0, image.read_bytes()[:16])


def test_requests_of_four_gibibytes_are_refused_one_by_one(tmp_path, image):
    with served(tmp_path, image) as server, RawClient(server) as client:
        before = server.memory()
        for _ in range(100):
            assert client.ask(READ, 0, 2**32 - 1)[0] == 22
        assert server.memory() - before < M


def test_options_that_are_sent_without_an_end_are_the_last(tmp_path, image):
    with served(tmp_path, image) as server, RawClient(server, handshake=False) as client:
        client.receive(18)
        client.send(struct.pack(">I", 3))
        before = server.memory()
        with contextlib.suppress(ConnectionError):
            stuff(client, (b"IHAVEOPT" + struct.pack(">II", 3, 0)) * 1000, 8 * M)
        client.sock.settimeout(20)
        with contextlib.suppress(ConnectionError):
            while client.sock.recv(1 << 16):
                pass
        assert server.memory() - before < 4 * M
        with RawClient(server) as other:
            assert other.ask(READ, 0, 16)[0] == 0
