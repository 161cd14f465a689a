"""Requests from userspace: pipelined, split, refused, cut off."""

from __future__ import annotations

import contextlib
import errno
import threading

import pytest

import nbdlink
from nbdlink.errors import LocalProtocolError, NBDError, RemoteProtocolError, RequestError
from nbdlink.protocol.constants import Command, Option, OptionReply, TransmissionFlag
from nbdlink.protocol.messages import BlockSizeInfo, ExportInfo
from nbdlink.protocol.transmission import REQUEST, RequestHeader, pack_simple_reply

from .test_negotiate import converse

F = TransmissionFlag
EVERYTHING = (
    F.HAS_FLAGS | F.SEND_FLUSH | F.SEND_FUA | F.SEND_TRIM | F.SEND_WRITE_ZEROES | F.SEND_CACHE
)
SIZE = 1 << 20
SIZES = BlockSizeInfo(1, 4096, 1 << 16)


def read_exactly(connection, length):
    data = b""
    while len(data) < length:
        more = connection.recv(length - len(data))
        if not more:
            raise EOFError
        data += more
    return data


def serving(handle, *, flags=EVERYTHING, sizes=SIZES):
    """Give a script that negotiates and then calls `handle(connection, header, payload)`."""
    infos = [(OptionReply.INFO, ExportInfo(SIZE, flags).pack())]
    infos.append((OptionReply.INFO, sizes.pack()))

    def script(connection):
        converse(connection, {Option.GO: [*infos, OptionReply.ACK]})
        with contextlib.suppress(EOFError):
            while True:
                header = RequestHeader.parse(read_exactly(connection, REQUEST.size))
                payload = read_exactly(connection, header.payload_length)
                handle(connection, header, payload)

    return script


def answer(connection, header, payload):
    data = bytes(header.length) if header.command == Command.READ else b""
    connection.sendall(pack_simple_reply(0, header.cookie) + data)


def test_long_reads_and_writes_are_split_at_the_maximum_payload(liar):
    seen = []

    def handle(connection, header, payload):
        seen.append((header.command, header.offset, header.length))
        answer(connection, header, payload)

    with nbdlink.connect(liar(serving(handle)).target) as nbd:
        nbd.pwrite(bytes(100_000), 10)
        assert nbd.pread(100_000, 10) == bytes(100_000)
    parts = [(10, 65536), (10 + 65536, 34464)]
    assert seen[:4] == [(c, o, n) for c in (Command.WRITE, Command.READ) for o, n in parts]


def test_every_command_reaches_the_server_with_its_flags(liar):
    seen = []

    def handle(connection, header, payload):
        seen.append((Command(header.command).name, header.offset, header.length, header.flags))
        answer(connection, header, payload)

    with nbdlink.connect(liar(serving(handle)).target) as nbd:
        nbd.pwrite(b"abc", 1, fua=True)
        nbd.flush()
        nbd.trim(10, 20, fua=True)
        nbd.zero(10, 20, no_hole=True)
        nbd.cache(10, 20)
    assert seen[:5] == [
        ("WRITE", 1, 3, 1),
        ("FLUSH", 0, 0, 0),
        ("TRIM", 20, 10, 1),
        ("WRITE_ZEROES", 20, 10, 2),
        ("CACHE", 20, 10, 0),
    ]


def test_closing_says_goodbye(liar):
    seen = []
    server = liar(serving(lambda connection, header, payload: seen.append(header.command)))
    nbdlink.connect(server.target).close()
    server.close()
    assert seen == [Command.DISC]


def test_replies_may_come_in_any_order(liar):
    held = []

    def handle(connection, header, payload):
        held.append(header)
        if len(held) == 8:
            for h in reversed(held):
                data = bytes([h.offset]) * h.length
                connection.sendall(pack_simple_reply(0, h.cookie) + data)

    with nbdlink.connect(liar(serving(handle)).target) as nbd:
        requests = [nbd.submit_read(5, n) for n in range(8)]
        assert [r.result(20) for r in requests] == [bytes([n]) * 5 for n in range(8)]


def test_a_refused_request_leaves_the_connection_alive(liar):
    def handle(connection, header, payload):
        if header.offset:
            connection.sendall(pack_simple_reply(errno.ENOSPC, header.cookie))
        else:
            answer(connection, header, payload)

    with nbdlink.connect(liar(serving(handle)).target) as nbd:
        with pytest.raises(RequestError, match="no space left") as caught:
            nbd.pwrite(b"x", 1)
        assert caught.value.errno == errno.ENOSPC
        assert nbd.pread(1, 0) == b"\0"


def test_an_error_number_that_nobody_knows_counts_as_einval(liar):
    def handle(connection, header, payload):
        connection.sendall(pack_simple_reply(4711, header.cookie))

    with (
        nbdlink.connect(liar(serving(handle)).target) as nbd,
        pytest.raises(OSError, match="invalid argument") as caught,
    ):
        nbd.pread(1, 0)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda nbd: nbd.pread(1, SIZE), "ends at"),
        (lambda nbd: nbd.pread(1, -1), "negative"),
        (lambda nbd: nbd.pread(2 * SIZE, 0), "ends at"),
        (lambda nbd: nbd.submit_read(65537, 0), "maximum payload"),
        (lambda nbd: nbd.zero(1, 0, fast=True), "did not announce"),
    ],
)
def test_what_the_server_would_refuse_is_not_sent(liar, ask, says):
    with (
        nbdlink.connect(liar(serving(answer)).target) as nbd,
        pytest.raises(LocalProtocolError, match=says),
    ):
        ask(nbd)


@pytest.mark.parametrize(
    ("flags", "sizes", "ask", "says"),
    [
        (F.HAS_FLAGS | F.READ_ONLY, (1, 512, 512), lambda nbd: nbd.pwrite(b"x", 0), "read-only"),
        (F.HAS_FLAGS, (512, 512, 512), lambda nbd: nbd.pread(1, 0), "minimum block size"),
        (F.HAS_FLAGS, (1, 512, 512), lambda nbd: nbd.flush(), "did not announce"),
        (F.HAS_FLAGS, (1, 512, 512), lambda nbd: nbd.pwrite(b"", 0, fua=True), "forced unit"),
    ],
)
def test_what_the_export_cannot_do_is_not_sent(liar, flags, sizes, ask, says):
    server = liar(serving(answer, flags=flags, sizes=BlockSizeInfo(*sizes)))
    with nbdlink.connect(server.target) as nbd, pytest.raises(LocalProtocolError, match=says):
        ask(nbd)


@pytest.mark.parametrize("cut", range(20))
def test_a_reply_cut_off_at_any_byte_fails_every_request_in_flight(liar, cut):
    def handle(connection, header, payload):
        wire = pack_simple_reply(0, header.cookie) + bytes(header.length)
        connection.sendall(wire[:cut])
        connection.shutdown(2)

    with nbdlink.connect(liar(serving(handle)).target) as nbd:
        requests = [nbd.submit_read(4, 0), nbd.submit_read(4, 4)]
        for request in requests:
            with pytest.raises(NBDError):
                request.result(20)
        with pytest.raises(NBDError):
            nbd.pread(1, 0)


def test_a_reply_to_nothing_ends_the_connection(liar):
    def handle(connection, header, payload):
        connection.sendall(pack_simple_reply(0, header.cookie + 77))

    with (
        nbdlink.connect(liar(serving(handle)).target) as nbd,
        pytest.raises(RemoteProtocolError, match="never made"),
    ):
        nbd.pread(1, 0)


def test_a_reply_that_never_comes_is_given_up_in_time(liar):
    with nbdlink.connect(liar(serving(lambda *_: None)).target) as nbd:
        request = nbd.submit_read(1, 0)
        with pytest.raises(NBDError, match="no reply within"):
            request.result(0.05)


def test_many_requests_do_not_stop_a_server_that_answers_before_it_reads_on(liar):
    # 256 reads of 64 KiB: far more than both sockets' buffers hold, in either direction.
    with nbdlink.connect(liar(serving(answer)).target) as nbd:
        requests = [nbd.submit_read(65536, 0) for _ in range(256)]
        requests += [nbd.submit_write(bytes(65536), 0) for _ in range(256)]
        for request in requests:
            request.result(60)


def test_threads_share_a_connection(liar):
    def handle(connection, header, payload):
        data = header.offset.to_bytes(8, "big")
        connection.sendall(pack_simple_reply(0, header.cookie) + data)

    wrong = []
    with nbdlink.connect(liar(serving(handle)).target) as nbd:

        def work(number):
            for n in range(100):
                offset = number * 1000 + n
                if nbd.pread(8, offset) != offset.to_bytes(8, "big"):
                    wrong.append(offset)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_an_interrupted_transfer_ends_the_connection(liar, monkeypatch):
    # As a signal handler does that raises after the bytes were taken and before they count.
    with nbdlink.connect(liar(serving(answer)).target) as nbd:
        received = nbd._pipeline._reader.received

        def interrupted(count):
            monkeypatch.setattr(nbd._pipeline._reader, "received", received)
            raise KeyboardInterrupt

        monkeypatch.setattr(nbd._pipeline._reader, "received", interrupted)
        with pytest.raises(KeyboardInterrupt):
            nbd.pread(10, 0)
        with pytest.raises(NBDError, match="interrupted during a transfer"):
            nbd.pread(10, 0)


def test_a_buffer_that_cannot_be_written_is_refused(liar):
    with nbdlink.connect(liar(serving(answer)).target) as nbd:
        with pytest.raises(LocalProtocolError, match="cannot be written"):
            nbd.pread_into(memoryview(b"x"), 0)
        assert nbd.pread(1, 0) == b"\0"


def test_a_read_far_past_the_end_takes_no_memory(liar):
    with (
        nbdlink.connect(liar(serving(answer)).target) as nbd,
        pytest.raises(LocalProtocolError, match="ends at"),
    ):
        nbd.pread(1 << 60, 0)


def test_closing_wakes_a_thread_that_waits(liar):
    arrived = threading.Event()
    failed = []

    def handle(connection, header, payload):
        arrived.set()

    nbd = nbdlink.connect(liar(serving(handle)).target)

    def wait():
        try:
            nbd.pread(1, 0)
        except NBDError as error:
            failed.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    assert arrived.wait(20)
    nbd.close()
    thread.join(20)
    assert failed
    assert "was closed" in failed[0]
