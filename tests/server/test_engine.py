"""What the server answers to requests, good and bad, over real sockets."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import socket
import struct
import threading

import pytest

from nbdlink.server import Export
from nbdlink.server.engine import Transmission
from nbdlink.server.negotiate import NegotiatedSession
from nbdlink.server.sessions import Session

from .fakes import (
    BLOCK_STATUS,
    CACHE,
    DF,
    DISC,
    EINVAL,
    EIO,
    ENOMEM,
    ENOSPC,
    ENOTSUP,
    EOVERFLOW,
    EPERM,
    FAST_ZERO,
    FLUSH,
    FUA,
    NO_HOLE,
    READ,
    REQ_ONE,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    HungUpError,
    MemoryStorage,
    RawClient,
    request,
)

SIZE = 1 << 20
MAXIMUM = 32 << 20


@pytest.fixture
def client(service):
    with RawClient(service) as client:
        yield client


@pytest.fixture(autouse=True)
def still_serves_others(service):
    """Whatever a test did to the server, it serves the next client."""
    yield
    with RawClient(service) as client:
        assert client.ask(READ, 0, 512)[0] == 0


@pytest.fixture
def large(serve):
    """A storage of 40 MiB: requests there may be longer than a payload."""
    storage = MemoryStorage(40 << 20)
    return storage, serve({"": storage})


# Good requests.


@pytest.mark.parametrize("length", [1, 511, 4096, 128 * 1024, 256 * 1024, SIZE])
def test_read(client, storage, length):
    assert client.ask(READ, SIZE - length, length) == (0, storage.data[SIZE - length :])


@pytest.mark.parametrize("length", [1, 511, 4096, 128 * 1024, 128 * 1024 + 1, SIZE])
def test_write(client, storage, length):
    data = os.urandom(length)
    assert client.write(SIZE - length, data) == 0
    assert storage.data[SIZE - length :] == data


def test_the_longest_read(large):
    storage, service = large
    with RawClient(service) as client:
        assert client.ask(READ, 77, MAXIMUM) == (0, storage.data[77 : 77 + MAXIMUM])


def test_the_longest_write(large):
    storage, service = large
    data = random.Random(1).randbytes(MAXIMUM)
    with RawClient(service) as client:
        assert client.write(77, data) == 0
        assert client.ask(READ, 0, 512)[0] == 0
    assert storage.data[77 : 77 + MAXIMUM] == data


@pytest.mark.parametrize("command", [READ, WRITE, TRIM, CACHE, WRITE_ZEROES])
@pytest.mark.parametrize("offset", [0, 77, SIZE])
def test_nothing_can_be_asked_for(client, storage, command, offset):
    before = bytes(storage.data)
    assert client.ask(command, offset, 0) == (0, b"")
    assert storage.data == before


def test_requests_in_one_packet_are_all_answered(client, storage):
    data = b"0123456789abcdef"
    client.send(
        request(WRITE, 100, 16, cookie=1)
        + data
        + request(READ, 100, 16, cookie=2)
        + request(FLUSH, cookie=3)
        + request(READ, SIZE, 1, cookie=4)
        + request(WRITE_ZEROES, 100, 8, cookie=5)
        + request(READ, 100, 16, cookie=6)
    )
    assert client.reply() == (0, 1, b"")
    assert client.reply(16) == (0, 2, data)
    assert client.reply() == (0, 3, b"")
    assert client.reply() == (EINVAL, 4, b"")
    assert client.reply() == (0, 5, b"")
    assert client.reply(16) == (0, 6, bytes(8) + data[8:])


def test_requests_in_the_last_packet_of_the_handshake_are_answered(service, storage):
    with RawClient(service, handshake=False) as client:
        client.receive(18)
        go = b"IHAVEOPT" + struct.pack(">IIIH", 7, 6, 0, 0)
        first, second = request(READ, 5, 10, cookie=1), request(READ, 9, 10, cookie=2)
        client.send(struct.pack(">I", 3) + go + first + second[:13])
        client.replies(7)
        assert client.reply(10) == (0, 1, storage.data[5:15])
        client.send(second[13:])
        assert client.reply(10) == (0, 2, storage.data[9:19])


@pytest.mark.parametrize("size", [1, 5, 27, 29, 4099])
def test_requests_may_come_in_pieces(client, storage, size):
    data = os.urandom(10_000)
    stream = request(READ, 0, 10, cookie=1) + request(WRITE, 50, 10_000, cookie=2) + data
    stream += request(READ, 50, 10_000, cookie=3)
    begin = bytes(storage.data[:10])
    if size < 100:  # a system call for each piece: the first headers are enough
        pieces = [stream[i : i + size] for i in range(0, 100, size)]
        pieces.append(stream[len(b"".join(pieces)) :])
    else:
        pieces = [stream[i : i + size] for i in range(0, len(stream), size)]
    for piece in pieces:
        client.send(piece)
    assert client.reply(10) == (0, 1, begin)
    assert client.reply() == (0, 2, b"")
    assert client.reply(10_000) == (0, 3, data)


def test_more_replies_than_the_outbox_holds(client, storage):
    count, length = 64, 32 * 1024
    client.send(b"".join(request(READ, i, length, cookie=i) for i in range(count)))
    for i in range(count):
        assert client.reply(length) == (0, i, storage.data[i : i + length])


def test_more_requests_than_the_buffers_hold(client):
    # 1.1 MB of headers, and 0.6 MB of replies to them.
    count = 40_000
    requests = b"".join(request(READ, 0, 0, cookie=i) for i in range(count))
    sender = threading.Thread(target=client.send, args=(requests,))
    sender.start()
    replies = client.receive(16 * count)
    sender.join()
    assert replies == b"".join(struct.pack(">IIQ", 0x67446698, 0, i) for i in range(count))


def test_writes_of_all_sizes_in_one_stream_land_where_they_belong(client, storage):
    rng = random.Random(7)
    model, stream, count = bytearray(storage.data), bytearray(), 40
    for cookie in range(count):
        length = rng.choice([1, 100, 4096, 60_000, 131_072, 131_073, 300_000])
        offset = rng.randrange(SIZE - length)
        data = rng.randbytes(length)
        model[offset : offset + length] = data
        stream += request(WRITE, offset, length, cookie=cookie) + data
    client.send(bytes(stream))
    for cookie in range(count):
        assert client.reply() == (0, cookie, b"")
    assert storage.data == model


@pytest.mark.parametrize(
    ("asked", "called"),
    [
        (dict(command=FLUSH), ("flush",)),
        (dict(command=TRIM, offset=5, length=9), ("trim", 5, 9, False)),
        (dict(command=TRIM, offset=5, length=9, flags=FUA), ("trim", 5, 9, True)),
        (dict(command=CACHE, offset=5, length=9), ("cache", 5, 9)),
        (dict(command=WRITE_ZEROES, offset=5, length=9), ("zero", 5, 9, True, False, False)),
        (
            dict(command=WRITE_ZEROES, offset=5, length=9, flags=NO_HOLE | FUA),
            ("zero", 5, 9, False, False, True),
        ),
        (
            dict(command=WRITE_ZEROES, offset=5, length=9, flags=FAST_ZERO),
            ("zero", 5, 9, True, True, False),
        ),
    ],
)
def test_requests_reach_the_storage_with_their_flags(client, storage, asked, called):
    assert client.ask(**asked) == (0, b"")
    assert storage.calls == [called]


@pytest.mark.parametrize("length", [10, 200_000])
def test_fua_reaches_the_storage(client, storage, length):
    assert client.write(5, bytes(length), flags=FUA) == 0
    assert client.write(5, bytes(length)) == 0
    assert storage.calls == [("write", 5, length, True), ("write", 5, length, False)]


def test_a_client_that_disconnects_is_let_go(client, caplog):
    with caplog.at_level(logging.WARNING):
        client.send(request(FLUSH, cookie=1) + request(DISC) + request(READ, 0, 1))
        assert client.reply() == (0, 1, b"")
        assert client.hung_up()
    assert not caplog.records


# Requests that are refused, after which the connection goes on.


def refused(client, storage, *arguments, **options):
    before = bytes(storage.data)
    error, _ = client.ask(*arguments, **options)
    assert storage.data == before
    assert client.ask(READ, 0, 512, cookie=99) == (0, storage.data[:512])
    return error


@pytest.mark.parametrize(
    ("offset", "length"),
    [(SIZE, 1), (SIZE - 1, 2), (0, SIZE + 1), (2**64 - 1, 1), (2**63, 1), (2**64 - 1, 2**32 - 1)],
)
@pytest.mark.parametrize("command", [READ, TRIM, CACHE])
def test_past_the_end(client, storage, command, offset, length):
    assert refused(client, storage, command, offset, length) == EINVAL


@pytest.mark.parametrize("offset", [SIZE - 1, SIZE, 2**63, 2**64 - 2])
def test_zeroes_past_the_end(client, storage, offset):
    assert refused(client, storage, WRITE_ZEROES, offset, 2) == ENOSPC


@pytest.mark.parametrize("length", [2, 200_000])
@pytest.mark.parametrize("offset", [SIZE - 1, SIZE, 2**63, 2**64 - 2])
def test_a_write_past_the_end(client, storage, offset, length):
    assert refused(client, storage, WRITE, offset, length, data=bytes(length)) == ENOSPC


@pytest.mark.parametrize("length", [MAXIMUM + 1, 2**31, 2**32 - 1])
def test_a_read_that_is_too_long(client, storage, length):
    assert refused(client, storage, READ, 0, length) == EINVAL


def test_a_write_that_is_too_long_is_read_past(large):
    storage, service = large
    with RawClient(service) as client:
        length = MAXIMUM + 1
        assert refused(client, storage, WRITE, 0, length, data=bytes(length)) == EINVAL


@pytest.mark.parametrize("length", [2 * MAXIMUM + 1, 2**32 - 1])
def test_a_write_that_is_far_too_long_is_the_last(client, storage, length, caplog):
    client.send(request(FLUSH, cookie=1) + request(WRITE, 0, length, cookie=2))
    assert client.reply() == (0, 1, b"")
    assert client.reply()[0] in (EINVAL, ENOSPC)
    assert client.hung_up()
    assert f"announces {length} bytes" in caplog.text


@pytest.mark.parametrize("command", [BLOCK_STATUS, 8, 9, 100, 2**16 - 1])
def test_an_unknown_command(client, storage, command):
    assert refused(client, storage, command, 0, 1) == EINVAL


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (READ, DF),
        (READ, NO_HOLE),
        (WRITE, REQ_ONE),
        (WRITE, 1 << 15),
        (TRIM, NO_HOLE),
        (CACHE, FAST_ZERO),
        (FLUSH, DF),
        (WRITE_ZEROES, DF),
        (WRITE_ZEROES, 0xFFFF),
    ],
)
def test_a_flag_that_does_not_belong_there(client, storage, command, flags):
    length = 0 if command == FLUSH else 16
    data = bytes(16) if command == WRITE else b""
    assert refused(client, storage, command, 0, length, flags=flags, data=data) == EINVAL


@pytest.mark.parametrize(("offset", "length"), [(1, 0), (0, 1)])
def test_a_flush_of_a_part(client, storage, offset, length):
    assert refused(client, storage, FLUSH, offset, length) == EINVAL


@pytest.mark.parametrize("block_size", [True, False], ids=["promised", "not promised"])
@pytest.mark.parametrize(("offset", "length"), [(1, 512), (0, 513), (511, 1), (256, 256)])
@pytest.mark.parametrize("command", [READ, WRITE, TRIM, CACHE, WRITE_ZEROES])
def test_an_unaligned_request(serve, command, offset, length, block_size):
    storage = MemoryStorage(minimum_block=512)
    data = bytes(length) if command == WRITE else b""
    with RawClient(serve({"": storage}), block_size=block_size) as client:
        assert refused(client, storage, command, offset, length, data=data) == EINVAL


@pytest.mark.parametrize("why", ["storage", "export"])
@pytest.mark.parametrize("length", [16, 200_000])
@pytest.mark.parametrize("command", [WRITE, TRIM, WRITE_ZEROES])
def test_a_read_only_export_is_not_changed(serve, command, length, why):
    storage = MemoryStorage(read_only=why == "storage")
    data = bytes(length) if command == WRITE else b""
    with RawClient(serve({"": storage}, read_only=why == "export")) as client:
        assert refused(client, storage, command, 0, length, data=data) == EPERM
        assert client.ask(FLUSH) == (0, b"")


# Failures of the storage.


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (errno.EPERM, EPERM),
        (errno.EACCES, EPERM),
        (errno.EROFS, EPERM),
        (errno.EIO, EIO),
        (errno.ENODEV, EIO),
        (errno.ENXIO, EIO),
        (errno.EBADF, EIO),
        (errno.ENOTSUP, EIO),
        (errno.ENOMEM, ENOMEM),
        (errno.EINVAL, EINVAL),
        (errno.ENOSPC, ENOSPC),
        (errno.EDQUOT, ENOSPC),
        (errno.EFBIG, ENOSPC),
        (errno.EOVERFLOW, EOVERFLOW),
    ],
)
def test_a_failure_is_told_in_the_protocols_words(client, storage, failure, told):
    storage.failing = {"write": failure}
    assert client.write(0, b"x") == told
    storage.failing = {}


@pytest.mark.parametrize(
    ("method", "command", "length"),
    [
        ("read", READ, 16),
        ("read", READ, 300_000),
        ("write", WRITE, 16),
        ("write", WRITE, 300_000),
        ("flush", FLUSH, 0),
        ("trim", TRIM, 16),
        ("cache", CACHE, 16),
        ("zero", WRITE_ZEROES, 16),
    ],
)
def test_a_request_that_fails_is_an_error_and_nothing_more(
    client, storage, method, command, length
):
    storage.failing = {method: errno.EIO}
    before = client.ask(FLUSH)[0] if command != FLUSH else 0
    data = bytes(length) if command == WRITE else b""
    assert client.ask(command, 0, length, data=data) == (EIO, b"")
    storage.failing = {}
    assert before == 0
    assert client.ask(READ, 0, 512) == (0, storage.data[:512])


def test_a_failing_request_among_others_fails_alone(client, storage):
    def bad_sector(offset):
        if offset == 512:
            raise OSError(errno.EIO, "bad sector")

    storage.on_read = bad_sector
    client.send(b"".join(request(READ, i * 512, 512, cookie=i) for i in range(3)))
    assert client.reply(512) == (0, 0, storage.data[:512])
    assert client.reply(512) == (EIO, 1, b"")
    assert client.reply(512) == (0, 2, storage.data[1024:1536])


def test_fast_zeroes_may_be_told_that_they_are_not_supported(client, storage):
    storage.failing = {"zero": errno.ENOTSUP}
    assert client.ask(WRITE_ZEROES, 0, 16, flags=FAST_ZERO)[0] == ENOTSUP
    assert client.ask(WRITE_ZEROES, 0, 16)[0] == EIO


def test_a_long_read_that_fails_at_once_is_an_error(large):
    storage, service = large
    storage.failing = {"read": errno.EIO}
    with RawClient(service) as client:
        assert client.ask(READ, 0, 4 << 20) == (EIO, b"")
        assert client.ask(FLUSH) == (0, b"")


def test_a_long_read_that_fails_in_the_middle_ends_the_connection(large, caplog, eventually):
    storage, service = large

    def bad_sector(offset):
        if offset >= 2 << 20:
            raise OSError(errno.EIO, "bad sector")

    storage.on_read = bad_sector
    with RawClient(service) as client:
        client.send(request(READ, 0, 4 << 20))
        with pytest.raises(HungUpError):
            client.reply(4 << 20)
    eventually(lambda: "in the middle of a reply: bad sector" in caplog.text)


def test_a_long_write_that_fails_is_read_to_its_end(large):
    storage, service = large
    with RawClient(service) as client:
        storage.failing = {"write": errno.ENOSPC}
        assert client.write(0, bytes(4 << 20)) == ENOSPC
        assert client.ask(READ, 0, 16) == (0, storage.data[:16])


def test_a_storage_that_keeps_failing_warns_once_a_connection(client, storage, caplog):
    storage.failing = {"read": errno.EIO}
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            assert client.ask(READ, 0, 16)[0] == EIO
    storage.failing = {}
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "NBD_CMD_READ of 16 bytes at 0 failed" in caplog.text


def test_a_bug_of_a_storage_costs_one_connection(service, client, storage, caplog):
    storage.failing = {"flush": ZeroDivisionError("oops")}
    with RawClient(service) as other:
        client.send(request(FLUSH))
        assert client.hung_up()
        storage.failing = {}
        assert other.ask(FLUSH) == (0, b"")
    (line,) = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert line.endswith("unexpected ZeroDivisionError: oops")


# Clients that break the protocol or vanish.


@pytest.mark.parametrize("magic", [0, 0x25609512, 0x668E33EF, 0xFFFFFFFF])
def test_a_wrong_magic_ends_the_connection(client, magic, caplog):
    client.send(request(FLUSH, cookie=1) + request(READ, 0, 16, magic=magic))
    assert client.reply() == (0, 1, b"")
    assert client.hung_up()
    assert "magic" in caplog.text
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        request(READ)[:1],
        request(READ)[:27],
        request(WRITE, 0, 100) + bytes(50),
        request(WRITE, 0, 500_000) + bytes(300_000),
        request(WRITE, SIZE, 500_000) + bytes(300_000),
        request(READ, 0, SIZE) * 20,
    ],
    ids=["nothing", "a byte", "a header", "a write", "a long write", "a refused write", "reads"],
)
@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_client_that_vanishes_leaves_no_trace(service, sent, reset, caplog, eventually):
    with caplog.at_level(logging.INFO), RawClient(service) as client:
        client.send(sent)
        if reset:  # closing with unread data or with a zero linger time is a reset
            client.sock.setsockopt(1, 13, struct.pack("ii", 1, 0))
        client.sock.close()
        eventually(lambda: len(service.sessions) == 0)
    assert all(record.levelno < logging.WARNING for record in caplog.records)


def test_what_was_acknowledged_before_a_client_vanished_is_there(service, storage, eventually):
    with RawClient(service) as client:
        assert client.write(100, b"kept") == 0
        client.send(request(WRITE, 200, 1000) + b"lost")
    eventually(lambda: len(service.sessions) == 0)
    assert storage.data[100:104] == b"kept"
    assert storage.data[200:204] != b"lost"


def test_a_client_that_takes_no_replies_holds_up_only_itself(service, client, storage):
    with RawClient(service) as greedy:
        greedy.sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                greedy.sock.send(request(READ, 0, SIZE) * 100)
        assert client.ask(READ, 0, 16) == (0, storage.data[:16])


def test_what_was_done_is_counted(service, client):
    client.write(0, bytes(100))
    client.ask(READ, 0, 30)
    client.ask(READ, SIZE, 30)
    client.send(request(READ, 0, 1) * 2)
    client.reply(1)
    client.reply(1)
    client.ask(FLUSH)
    (info,) = service.sessions.snapshot()
    assert (info.export, info.errors) == ("", 1)
    assert (info.bytes_read, info.bytes_written) == (32, 100)


@pytest.mark.parametrize("seed", range(20))
def test_random_requests_never_break_the_server(service, seed):
    rng = random.Random(seed)
    edges = [0, 1, 28, 511, 512, 4096, SIZE - 1, SIZE, SIZE + 1, MAXIMUM, 2**32 - 1, 2**63, 2**64]
    with RawClient(service) as client:
        for cookie in range(60):
            command = rng.choice([READ, TRIM, CACHE, WRITE_ZEROES, FLUSH, BLOCK_STATUS, 9, 65535])
            length = min(rng.choice(edges), 2**32 - 1)
            offset = min(rng.choice(edges), 2**64 - 1)
            flags = rng.choice([0, 0, 0, 1, 2, 4, 8, 16, rng.randrange(65536)])
            client.send(request(command, offset, length, flags=flags, cookie=cookie))
            error, answered, _ = client.reply(length if command == READ else 0)
            assert answered == cookie
            assert error in (0, EINVAL, ENOSPC)
            assert error or offset + length <= SIZE


def test_a_long_read_behind_many_short_replies_fits_the_outbox(storage, nothing_leaks):
    # Half a megabyte of requests at once: only a fast network brings that, or this.
    count = 20_000
    requests = request(WRITE, 0, 0) * count + request(READ, 0, SIZE) + request(DISC)
    export = Export("", storage)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(20)
        session = Session(1, theirs)
        negotiated = NegotiatedSession(export, requests)
        thread = threading.Thread(target=Transmission(session, negotiated).run)
        thread.start()
        client = RawClient.__new__(RawClient)
        client.sock = ours
        for _ in range(count):
            assert client.reply() == (0, 7, b"")
        assert client.reply(SIZE) == (0, 7, storage.data)
        thread.join()
    assert session.info().requests == count + 1
