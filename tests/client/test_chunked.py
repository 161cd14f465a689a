"""Requests from userspace where replies come in chunks, and what only such servers can do."""

from __future__ import annotations

import contextlib
import errno
import threading

import pytest

import nbdlink
from nbdlink.client.connection import connect
from nbdlink.client.pipeline import wait_for_any
from nbdlink.errors import LocalProtocolError, NBDError, RemoteProtocolError, RequestError
from nbdlink.protocol.chunks import (
    BlockStatus,
    ErrorPayload,
    Extent,
    pack_chunk,
    parse_status_filter,
    status_type,
)
from nbdlink.protocol.constants import (
    Command,
    CommandFlag,
    HeaderStyle,
    Option,
    OptionReply,
    ReplyType,
    TransmissionFlag,
)
from nbdlink.protocol.messages import BlockSizeInfo, ExportInfo, MetaContext
from nbdlink.protocol.transmission import EXTENDED_REQUEST, REQUEST, RequestHeader

from .test_connection import EVERYTHING, read_exactly
from .test_negotiate import converse

F = TransmissionFlag
S, E = HeaderStyle.STRUCTURED, HeaderStyle.EXTENDED
SIZE = 1 << 40
NAMES = {"base:allocation": 3, "x-test:other": 9}


def serving(handle, *, style=S, flags=EVERYTHING | F.SEND_DF, minimum=1, size=SIZE, names=NAMES):
    """Give a script that agrees to `style` and calls `handle(answer, header, payload)`.

    `answer(kind, payload=b"", done=True)` sends a chunk.
    """
    agreed = Option.STRUCTURED_REPLY if style == S else Option.EXTENDED_HEADERS
    contexts = [
        (OptionReply.META_CONTEXT, MetaContext(number, name).pack())
        for name, number in names.items()
    ]
    go = [
        (OptionReply.INFO, ExportInfo(size, flags).pack()),
        (OptionReply.INFO, BlockSizeInfo(minimum, 4096, 1 << 25).pack()),
        OptionReply.ACK,
    ]
    answers = {
        agreed: [OptionReply.ACK],
        Option.SET_META_CONTEXT: [*contexts, OptionReply.ACK],
        Option.GO: go,
    }

    def script(connection):
        converse(connection, answers)
        with contextlib.suppress(EOFError):
            while True:
                if style == E:
                    header = RequestHeader.parse(
                        read_exactly(connection, EXTENDED_REQUEST.size), style
                    )
                    has_payload = header.flags & CommandFlag.PAYLOAD_LEN
                else:
                    header = RequestHeader.parse(read_exactly(connection, REQUEST.size))
                    has_payload = header.command == Command.WRITE
                if header.command == Command.DISC:
                    return
                payload = read_exactly(connection, header.length if has_payload else 0)

                def answer(kind, payload=b"", done=True, header=header):
                    wire = pack_chunk(
                        style, kind, header.cookie, payload, done=done, offset=header.offset
                    )
                    connection.sendall(wire)

                handle(answer, header, payload)

    return script


def data(offset, content):
    return ReplyType.OFFSET_DATA, offset.to_bytes(8, "big") + content


def hole(offset, length):
    return ReplyType.OFFSET_HOLE, offset.to_bytes(8, "big") + length.to_bytes(4, "big")


def tell(style, answer, told):
    """Answer with block status; `told` maps ids to extents."""
    for number, (context, extents) in enumerate(told.items()):
        status = BlockStatus(context, tuple(extents))
        answer(status_type(style), status.pack(style), done=number == len(told) - 1)


@pytest.mark.parametrize("style", [S, E])
def test_chunks_and_holes_become_what_was_read(liar, style):
    def handle(answer, header, payload):
        answer(*hole(header.offset + 6, 4), done=False)
        answer(*data(header.offset, b"abcdef"), done=False)
        answer(ReplyType.NONE)

    with nbdlink.connect(liar(serving(handle, style=style)).target) as nbd:
        assert nbd.export.style == style
        buffer = bytearray(b"\xee" * 10)
        nbd.pread_into(buffer, 100)
        assert buffer == b"abcdef\0\0\0\0"


@pytest.mark.parametrize("style", [S, E])
def test_replies_of_several_requests_are_mixed(liar, style):
    held = []

    def handle(answer, header, payload):
        held.append((answer, header))
        if len(held) == 4:
            for half in (4, 0):
                for answer, header in held:
                    content = bytes([header.offset]) * 4
                    answer(*data(header.offset + half, content), done=not half)

    with nbdlink.connect(liar(serving(handle, style=style)).target) as nbd:
        requests = [nbd.submit_read(8, n) for n in range(4)]
        assert [r.result(20) for r in requests] == [bytes([n]) * 8 for n in range(4)]


def test_a_batch_arrives_in_order(liar):
    seen = []

    def handle(answer, header, payload):
        seen.append(header.offset)
        answer(ReplyType.NONE)

    with nbdlink.connect(liar(serving(handle)).target) as nbd:
        with nbd.batch():
            requests = [nbd.submit_write(b"x", offset) for offset in range(100)]
        for request in requests:
            request.result(20)
    assert seen[:100] == list(range(100))


def test_the_servers_words_and_the_offset_of_a_failure_are_told(liar):
    def handle(answer, header, payload):
        error = ErrorPayload(errno.EIO, "the disk is \x1bon fire", header.offset + 5)
        answer(error.type, error.pack())

    with nbdlink.connect(liar(serving(handle)).target) as nbd:
        with pytest.raises(RequestError) as caught:
            nbd.pread(10, 100)
        assert (caught.value.errno, caught.value.offset) == (errno.EIO, 105)
        assert "at 105 (the server says: the disk is " in str(caught.value)
        assert "\x1b" not in str(caught.value)


def test_a_read_in_one_piece_says_so_and_may_be_too_large(liar):
    seen = []

    def handle(answer, header, payload):
        seen.append(header.flags)
        error = ErrorPayload(errno.EOVERFLOW)
        answer(error.type, error.pack())

    with nbdlink.connect(liar(serving(handle)).target) as nbd:
        with pytest.raises(RequestError) as caught:
            nbd.pread(10, 0, whole=True)
        assert caught.value.errno == errno.EOVERFLOW
    assert seen[0] == CommandFlag.DF


def test_a_read_in_one_piece_is_not_asked_where_it_was_not_offered(liar):
    server = liar(serving(lambda *_: None, flags=EVERYTHING))
    with nbdlink.connect(server.target) as nbd, pytest.raises(LocalProtocolError):
        nbd.submit_read(10, 0, whole=True)


def test_a_reply_that_breaks_the_rules_ends_the_connection(liar):
    def handle(answer, header, payload):
        answer(*data(header.offset, b"toolong"))

    with nbdlink.connect(liar(serving(handle)).target) as nbd:
        with pytest.raises(RemoteProtocolError, match="in reply to a read"):
            nbd.pread(3, 0)
        with pytest.raises(NBDError):
            nbd.pread(3, 0)


@pytest.mark.parametrize("style", [S, E])
def test_nothing_is_longer_than_the_style_allows(liar, style):
    seen = []

    def handle(answer, header, payload):
        seen.append(header.length)
        answer(ReplyType.NONE)

    with nbdlink.connect(liar(serving(handle, style=style, minimum=4096)).target) as nbd:
        nbd.zero(5 << 32, 0)
        if style == S:
            with pytest.raises(LocalProtocolError, match="no extended headers"):
                nbd.submit_trim(5 << 32, 0)
        nbd.trim(5 << 32, 0)
        nbd.cache(5 << 32, 0)
    expected = [5 << 32] if style == E else [*[0xFFFF_F000] * 5, 5 * 4096]
    assert seen[: 3 * len(expected)] == expected * 3


def test_a_buffer_is_filled_in_place(liar):
    def handle(answer, header, payload):
        answer(*data(header.offset, b"abc"))

    with nbdlink.connect(liar(serving(handle)).target) as nbd:
        buffer = bytearray(5)
        nbd.submit_read(3, 0, into=memoryview(buffer)[1:4]).wait(20)
        assert buffer == b"\0abc\0"
        with pytest.raises(LocalProtocolError, match="a buffer of 5 bytes for 3"):
            nbd.submit_read(3, 0, into=memoryview(buffer))


# Block status.


@pytest.mark.parametrize("style", [S, E])
def test_block_status_is_told_by_the_names_of_contexts(liar, style):
    seen = []

    def handle(answer, header, payload):
        seen.append((header.offset, header.length, header.flags))
        tell(style, answer, {9: [Extent(10, 1)], 3: [Extent(4, 0), Extent(6, 3)]})

    with nbdlink.connect(liar(serving(handle, style=style)).target) as nbd:
        assert nbd.contexts == ("base:allocation", "x-test:other")
        assert nbd.block_status(10, 50) == {
            "base:allocation": [Extent(4, 0), Extent(6, 3)],
            "x-test:other": [Extent(10, 1)],
        }
    assert seen[0] == (50, 10, 0)


def test_one_extent_may_be_asked_for(liar):
    def handle(answer, header, payload):
        assert header.flags == CommandFlag.REQ_ONE
        tell(S, answer, {3: [Extent(10, 0)], 9: [Extent(1, 0)]})

    with nbdlink.connect(liar(serving(handle)).target) as nbd:
        assert nbd.block_status(10, 0, one=True)["base:allocation"] == [Extent(10, 0)]


def test_a_single_context_is_asked_for_where_the_server_can_choose(liar):
    seen = []

    def handle(answer, header, payload):
        seen.append(parse_status_filter(payload))
        tell(E, answer, {9: [Extent(1 << 40, 5)]})

    flags = EVERYTHING | F.BLOCK_STATUS_PAYLOAD
    with nbdlink.connect(liar(serving(handle, style=E, flags=flags)).target) as nbd:
        told = nbd.block_status(1 << 40, 0, contexts=["x-test:other"])
    assert told == {"x-test:other": [Extent(1 << 40, 5)]}
    assert seen == [(1 << 40, (9,))]


def test_a_context_that_was_not_selected_is_not_asked_for(liar):
    with nbdlink.connect(liar(serving(lambda *_: None)).target) as nbd:
        with pytest.raises(LocalProtocolError, match="'x' was not selected"):
            nbd.block_status(1, 0, contexts=["x"])
        with pytest.raises(LocalProtocolError, match="'x' was not selected"):
            nbd.extents(context="x")


def test_block_status_without_contexts_is_not_asked_for(liar):
    server = liar(serving(lambda *_: None, names={}))
    with (
        nbdlink.connect(server.target) as nbd,
        pytest.raises(LocalProtocolError, match="no metadata context"),
    ):
        nbd.block_status(1, 0)


def striped(style, stripe, size):
    """Give a handler that tells of stripes, data and holes in turns, a few at a time."""

    def handle(answer, header, payload):
        extents, at = [], header.offset
        while at < min(header.offset + header.length, size) and len(extents) < 3:
            # In halves, which nobody is to notice.
            part = min(stripe - at % stripe, stripe // 2)
            extents.append(Extent(part, at // stripe % 2 * 3))
            at += part
        tell(style, answer, {3: extents})

    return handle


@pytest.mark.parametrize("style", [S, E])
def test_extents_fill_the_export_and_neighbours_are_joined(liar, style):
    names = {"base:allocation": 3}
    size = 10_000
    handle = striped(style, 1000, size)
    with nbdlink.connect(liar(serving(handle, style=style, size=size, names=names)).target) as nbd:
        assert list(nbd.extents()) == [Extent(1000, n % 2 * 3) for n in range(10)]
        assert list(nbd.extents(500, 1000)) == [Extent(500, 0), Extent(500, 3)]
        assert list(nbd.extents(size)) == []
        with pytest.raises(LocalProtocolError, match="no range"):
            nbd.extents(size, 1)


def test_extents_end_where_the_export_ends_whatever_the_server_says(liar):
    def handle(answer, header, payload):
        tell(S, answer, {3: [Extent(1 << 20, 0)]})

    names = {"base:allocation": 3}
    with nbdlink.connect(liar(serving(handle, size=5000, names=names)).target) as nbd:
        assert list(nbd.extents()) == [Extent(5000, 0)]


def test_a_tail_that_fills_no_block_counts_as_data(liar):
    def handle(answer, header, payload):
        tell(S, answer, {3: [Extent(4096, 3)]})

    server = liar(serving(handle, size=5000, minimum=4096, names={"base:allocation": 3}))
    with nbdlink.connect(server.target) as nbd:
        assert list(nbd.extents()) == [Extent(4096, 3), Extent(904, 0)]


def test_an_answer_that_ends_within_a_block_is_asked_for_again_from_its_beginning(liar):
    asked = []

    def handle(answer, header, payload):
        asked.append(header.offset)
        extents = [Extent(1000, 0), Extent(3500, 3)]
        tell(S, answer, {3: extents if not header.offset else [Extent(404, 3), Extent(9000, 0)]})

    names = {"base:allocation": 3}
    server = liar(serving(handle, size=12288, minimum=4096, names=names))
    with nbdlink.connect(server.target) as nbd:
        assert list(nbd.extents()) == [Extent(1000, 0), Extent(3500, 3), Extent(7788, 0)]
    assert asked == [0, 4096]


def test_a_server_that_tells_of_less_than_a_block_is_not_asked_for_ever(liar):
    def handle(answer, header, payload):
        tell(S, answer, {3: [Extent(1000, 0)]})

    names = {"base:allocation": 3}
    server = liar(serving(handle, size=8192, minimum=4096, names=names))
    with (
        nbdlink.connect(server.target) as nbd,
        pytest.raises(RemoteProtocolError, match="no more than 1000 bytes of the block at 0"),
    ):
        list(nbd.extents())


def test_how_much_is_asked_at_a_time_is_learnt(liar):
    asked = []

    def handle(answer, header, payload):
        asked.append(header.length)
        many = len(asked) == 3
        one = [Extent(512, len(asked) % 2)]
        tell(E, answer, {3: [Extent(512, n % 2) for n in range(100_000)] if many else one})

    server = liar(serving(handle, style=E, names={"base:allocation": 3}))
    with nbdlink.connect(server.target) as nbd:
        found = nbd.extents()
        for _ in range(100_001):
            next(found)
    assert asked[:4] == [1 << 30, 1 << 32, 1 << 34, 1 << 32]


def test_without_contexts_everything_is_data(liar):
    server = liar(serving(lambda *_: None, names={}))
    with nbdlink.connect(server.target) as nbd:
        assert list(nbd.extents(10, 20)) == [Extent(20, 0)]


def test_a_reply_that_has_come_while_nobody_could_look_is_not_late(liar):
    answered = threading.Event()

    def handle(answer, header, payload):
        answer(ReplyType.NONE)
        answered.set()

    # The time is over before anybody waits, as it is for a process that was stopped meanwhile.
    with nbdlink.connect(liar(serving(handle)).target, request_timeout=1e-9) as nbd:
        request = nbd.submit_flush()
        assert answered.wait(20)
        request.wait()


# Several connections on one thread.


def echo(answer, header, payload):
    if header.command == Command.READ:
        answer(*data(header.offset, bytes([header.offset]) * header.length))
    else:
        answer(ReplyType.NONE)


def test_one_thread_waits_for_two_connections(liar):
    may_answer = threading.Event()

    def handle(answer, header, payload):
        if header.offset == 1:
            may_answer.wait(20)
        echo(answer, header, payload)

    server = liar(serving(handle))
    # The liar serves one client after the other, so the second one is another liar's.
    with nbdlink.connect(server.target) as first:
        slow = first.submit_read(3, 1)
        other = type(server)(server.target.socket + "2", serving(echo))
        try:
            with connect(other.target) as second:
                quick = second.submit_read(3, 2)
                wait_for_any(slow, quick)
                assert (slow.done, quick.done) == (False, True)
                may_answer.set()
                wait_for_any(slow)
                assert slow.result() == b"\1\1\1"
        finally:
            may_answer.set()
            other.close()


def test_waiting_for_any_on_a_dead_connection_is_an_error(liar):
    with nbdlink.connect(liar(serving(lambda *_: None)).target) as nbd:
        request = nbd.submit_read(1, 0)
        nbd.close()
        with pytest.raises(NBDError, match="was closed"):
            wait_for_any(request)
