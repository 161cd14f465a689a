"""Reading replies: split anywhere, in any order, without copying, and never trusting."""

from __future__ import annotations

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdlink.errors import LocalProtocolError, RemoteProtocolError
from nbdlink.protocol import replies
from nbdlink.protocol.chunks import (
    MAX_CONTROL_PAYLOAD,
    BlockStatus,
    ErrorPayload,
    Extent,
    pack_chunk,
    status_type,
)
from nbdlink.protocol.constants import (
    SIMPLE_REPLY_MAGIC,
    Command,
    CommandFlag,
    Error,
    HeaderStyle,
    ReplyType,
)
from nbdlink.protocol.replies import Awaited, ChunkReader, ReplyReader
from nbdlink.protocol.transmission import pack_simple_reply

S, E = HeaderStyle.STRUCTURED, HeaderStyle.EXTENDED
STYLES = [S, E]
DATA, HOLE = ReplyType.OFFSET_DATA, ReplyType.OFFSET_HOLE


def reading(cookie, length, offset=0, flags=0):
    """Await a read into a buffer that is full of something else."""
    buffer = bytearray(b"\xee" * length)
    return Awaited(Command.READ, cookie, offset, length, flags, memoryview(buffer))


def feed(reader, wire, step=1 << 20):
    """Give the reader what came, in steps; give the requests that were done, in order."""
    done = []
    while wire:
        place = reader.buffer()
        assert len(place)
        count = min(len(place), step, len(wire))
        place[:count] = wire[:count]
        wire = wire[count:]
        done += reader.received(count)
    return done


def data(at, content):
    return DATA, struct.pack(">Q", at) + content


def hole(at, length):
    return HOLE, struct.pack(">QI", at, length)


def chunks(style, request, *parts, done=True):
    """Give a reply of several chunks; the last one is the end."""
    return b"".join(
        pack_chunk(
            style,
            kind,
            request.cookie,
            payload,
            done=done and number == len(parts) - 1,
            offset=request.offset,
        )
        for number, (kind, payload) in enumerate(parts)
    )


# Simple replies.


@given(
    answers=st.lists(st.tuples(st.binary(max_size=50), st.booleans(), st.integers(0, 200))),
    step=st.integers(1, 60),
    shuffle=st.randoms(use_true_random=False),
)
def test_simple_replies_are_read_in_any_order_and_split_anywhere(answers, step, shuffle):
    reader = ReplyReader()
    requests = [
        reading(cookie, len(payload)) if is_read else Awaited(Command.WRITE, cookie)
        for cookie, (payload, is_read, _) in enumerate(answers)
    ]
    for request in requests:
        reader.expect(request)
    shuffled = shuffle.sample(requests, len(requests))
    wire = b""
    for request in shuffled:
        payload, is_read, error = answers[request.cookie]
        wire += pack_simple_reply(error, request.cookie)
        wire += payload if is_read and not error else b""
    assert feed(reader, wire, step) == shuffled
    assert reader.outstanding == 0
    for (payload, is_read, error), request in zip(answers, requests, strict=True):
        assert request.done
        assert bool(request.error) == bool(error)
        if is_read and not error:
            assert request.payload == payload


def test_many_simple_replies_are_taken_at_once():
    reader = ReplyReader()
    requests = [Awaited(Command.WRITE, cookie) for cookie in range(100)]
    for request in requests:
        reader.expect(request)
    wire = b"".join(pack_simple_reply(0, cookie) for cookie in range(100))
    assert len(reader.buffer()) >= len(wire)
    assert feed(reader, wire) == requests


@pytest.mark.parametrize("reader", [ReplyReader(), ChunkReader(S), ChunkReader(E)])
def test_the_data_of_a_large_read_goes_straight_to_its_owner(reader):
    request = reading(1, 1 << 20)
    reader.expect(request)
    head = pack_simple_reply(0, 1)
    if isinstance(reader, ChunkReader):
        style = E if reader._extended else S
        head = chunks(style, request, data(0, bytes(1 << 20)))[: -(1 << 20)]
    # No more than the header may be taken before the request is known that it belongs to.
    assert len(reader.buffer()) == len(head)
    feed(reader, head)
    assert reader.buffer().obj is request.payload.obj


def test_an_unknown_error_counts_as_einval():
    reader, request = ReplyReader(), Awaited(Command.WRITE, 1)
    reader.expect(request)
    feed(reader, pack_simple_reply(4711, 1))
    assert request.error == Error.EINVAL


@pytest.mark.parametrize("reader", [ReplyReader(), ChunkReader(S)])
def test_a_simple_reply_to_nothing_is_refused(reader):
    with pytest.raises(RemoteProtocolError, match="never made"):
        feed(reader, pack_simple_reply(0, 7))


@pytest.mark.parametrize("reader", [ReplyReader(), ChunkReader(S), ChunkReader(E)])
def test_a_reply_with_another_magic_is_refused(reader):
    with pytest.raises(RemoteProtocolError, match="magic"):
        feed(reader, bytes(32))


def test_a_cookie_in_use_cannot_be_used_again():
    reader = ReplyReader()
    reader.expect(Awaited(Command.WRITE, 1))
    with pytest.raises(LocalProtocolError, match="in use"):
        reader.expect(Awaited(Command.WRITE, 1))


def test_the_end_of_the_stream_is_an_error_that_counts_what_is_unanswered():
    reader = ReplyReader()
    reader.expect(Awaited(Command.WRITE, 1))
    with pytest.raises(RemoteProtocolError, match="with a request unanswered"):
        reader.received(0)


def test_the_end_of_an_idle_stream_is_said_plainly():
    with pytest.raises(RemoteProtocolError, match=r"closed the connection$"):
        ReplyReader().received(0)


# Chunks.


@st.composite
def content(draw):
    """Give a read's offset, its data, and chunks of it in any order."""
    offset = draw(st.integers(0, 1000))
    cuts = sorted(draw(st.sets(st.integers(1, 299), max_size=8)) | {0, 300})
    parts, whole = [], b""
    for begin, end in itertools.pairwise(cuts):
        if draw(st.booleans()):
            parts.append(hole(offset + begin, end - begin))
            whole += bytes(end - begin)
        else:
            piece = draw(st.binary(min_size=end - begin, max_size=end - begin))
            parts.append(data(offset + begin, piece))
            whole += piece
    parts = draw(st.permutations(parts))
    if draw(st.booleans()):
        parts.append((ReplyType.NONE, b""))
    return offset, whole, parts


@pytest.mark.parametrize("style", STYLES)
@given(
    contents=st.lists(content(), max_size=5),
    writes=st.integers(0, 3),
    step=st.integers(1, 400),
    pick=st.randoms(use_true_random=False),
)
def test_chunks_are_put_together_however_they_are_mixed_and_split(
    style, contents, writes, step, pick
):
    reader = ChunkReader(style)
    requests, queues = [], []
    for cookie, (offset, whole, parts) in enumerate(contents):
        request = reading(cookie, len(whole), offset)
        requests.append(request)
        queues.append(
            [
                chunks(style, request, part, done=number == len(parts) - 1)
                for number, part in enumerate(parts)
            ]
        )
    for cookie in range(100, 100 + writes):
        request = Awaited(Command.WRITE, cookie, 77, 5)
        requests.append(request)
        simple = style == S and cookie % 2
        end = pack_simple_reply(0, cookie) if simple else chunks(style, request, (0, b""))
        queues.append([end])
    for request in requests:
        reader.expect(request)
    wire = b""
    while queues := [queue for queue in queues if queue]:
        wire += pick.choice(queues).pop(0)
    assert {*feed(reader, wire, step)} == {*requests}
    for (_, whole, _), request in zip(contents, requests, strict=False):
        assert request.payload == whole
        assert not request.error


@pytest.mark.parametrize("style", STYLES)
def test_a_large_hole_is_filled_with_zeroes(style):
    reader, request = ChunkReader(style), reading(1, 600_000)
    reader.expect(request)
    feed(reader, chunks(style, request, hole(0, 600_000)))
    assert request.payload == bytes(600_000)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("step", [1, 7, 1 << 20])
def test_an_error_is_told_with_its_words_and_its_offset(style, step):
    reader, request = ChunkReader(style), reading(1, 100, 50)
    reader.expect(request)
    first, second = ErrorPayload(Error.EIO, "bad sector", 60), ErrorPayload(Error.ENOSPC, "no")
    parts = (first.type, first.pack()), data(70, b"x"), (second.type, second.pack())
    assert feed(reader, chunks(style, request, *parts), step) == [request]
    told = request.error, request.message, request.error_offset
    assert told == (Error.EIO, "bad sector", 60)


def test_an_error_may_come_for_data_that_has_come():
    reader, request = ChunkReader(S), reading(1, 100)
    reader.expect(request)
    error = ErrorPayload(Error.EIO, "", 10)
    feed(reader, chunks(S, request, data(0, bytes(50)), (error.type, error.pack())))
    assert request.error_offset == 10


def test_an_unknown_kind_of_error_fails_the_request_and_no_more():
    reader, request = ChunkReader(S), reading(1, 100)
    reader.expect(request)
    payload = ErrorPayload(Error.EIO, "odd").pack() + b"something new"
    assert feed(reader, chunks(S, request, (0x8123, payload))) == [request]
    assert (request.error, request.message) == (Error.EIO, "odd")


def test_a_simple_reply_may_say_that_a_block_status_failed():
    reader, request = ChunkReader(S), Awaited(Command.BLOCK_STATUS, 1, 0, 5, contexts=(1,))
    reader.expect(request)
    feed(reader, pack_simple_reply(Error.EINVAL, 1))
    assert request.error == Error.EINVAL


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("step", [3, 1 << 20])
def test_block_status_tells_of_every_context(style, step):
    reader = ChunkReader(style)
    request = Awaited(Command.BLOCK_STATUS, 1, 4096, 8192, contexts=(3, 4))
    reader.expect(request)
    told = {3: (Extent(4096, 0), Extent(1 << 20, 3)), 4: (Extent(1, 1),)}
    parts = [(status_type(style), BlockStatus(*item).pack(style)) for item in told.items()]
    feed(reader, chunks(style, request, *parts), step)
    assert request.status == told


def test_one_extent_is_told_where_one_was_asked_for():
    reader = ChunkReader(S)
    request = Awaited(Command.BLOCK_STATUS, 1, 0, 5, CommandFlag.REQ_ONE, contexts=(3,))
    reader.expect(request)
    status = BlockStatus(3, (Extent(5, 0),))
    feed(reader, chunks(S, request, (status_type(S), status.pack(S))))
    assert request.status == {3: status.extents}


def test_a_reply_to_a_read_of_nothing_is_empty():
    reader, request = ChunkReader(S), reading(1, 0)
    reader.expect(request)
    assert feed(reader, chunks(S, request, (0, b""))) == [request]


def test_the_stage_goes_round():
    reader = ChunkReader(S)
    requests = [Awaited(Command.WRITE, cookie) for cookie in range(10_000)]
    for request in requests:
        reader.expect(request)
    wire = b"".join(chunks(S, request, (0, b"")) for request in requests)
    assert feed(reader, wire, 4099) == requests


# What no server may send.

STATUS = BlockStatus(3, (Extent(5, 0),))
TWO = BlockStatus(3, (Extent(5, 0), Extent(5, 1)))
LONG = BlockStatus(3, (Extent(500, 0), Extent(5, 1)))


def asked_status(flags=0, contexts=(3,)):
    return Awaited(Command.BLOCK_STATUS, 1, 50, 100, flags, contexts=contexts)


def told(status, style=S):
    return status_type(style), status.pack(style)


@pytest.mark.parametrize(
    ("request_", "parts", "says"),
    [
        (reading(1, 100, 50), [data(49, b"x")], "in reply to a read"),
        (reading(1, 100, 50), [data(149, b"xy")], "in reply to a read"),
        (reading(1, 100, 50), [hole(49, 1)], "in reply to a read"),
        (reading(1, 100, 50), [hole(50, 101)], "in reply to a read"),
        (reading(1, 100, 50), [data(50, b"x" * 9), data(58, b"x")], "twice"),
        (reading(1, 100, 50), [data(58, b"x" * 9), data(50, b"x" * 9)], "twice"),
        (reading(1, 100, 50), [hole(50, 100), hole(50, 100)], "twice"),
        (
            reading(1, 100, 50),
            [(0x8002, ErrorPayload(5, "", 60).pack()), hole(50, 100)],
            "twice",
        ),
        (reading(1, 100, 50), [data(50, b"x" * 99)], "leaves some out"),
        (reading(1, 100, 50), [data(50, b"x"), hole(60, 90)], "leaves some out"),
        (reading(1, 100, 50), [(0, b"")], "leaves some out"),
        (reading(1, 100, 50, CommandFlag.DF), [hole(50, 50), hole(100, 50)], "told not to split"),
        (reading(1, 100, 50), [(DATA, bytes(8))], "data chunk"),
        (reading(1, 100, 50), [(DATA, b"")], "data chunk"),
        (reading(1, 100, 50), [(HOLE, bytes(11))], "hole"),
        (reading(1, 100, 50), [hole(50, 0)], "hole"),
        (reading(1, 100, 50), [(0, b"x")], "empty chunk"),
        (reading(1, 100, 50), [(0, b""), (0, b"")], "empty chunk"),
        (reading(1, 100, 50), [(3, b"")], "unknown type 0x3"),
        (reading(1, 100, 50), [told(STATUS)], "told block status in reply to NBD_CMD_READ"),
        (reading(1, 100, 50), [(0x8002, ErrorPayload(5, "", 150).pack())], "outside"),
        (reading(1, 100, 50), [(0x8001, bytes(3))], "too few"),
        (Awaited(Command.WRITE, 1, 50, 100), [data(50, b"x")], "data in reply to NBD_CMD_WRITE"),
        (asked_status(), [told(STATUS), told(STATUS)], "twice"),
        (asked_status(), [told(BlockStatus(9, STATUS.extents))], "not asked"),
        (asked_status(), [(0, b"")], "left a metadata context"),
        (asked_status(contexts=(3, 4)), [told(STATUS)], "left a metadata context"),
        (asked_status(CommandFlag.REQ_ONE), [told(TWO)], "more than the one"),
        (asked_status(CommandFlag.REQ_ONE), [told(LONG)], "more than the one"),
        (asked_status(), [told(LONG)], "beyond"),
        (asked_status(), [told(STATUS, E)], "unknown type 0x6"),
    ],
)
def test_a_reply_that_breaks_the_rules_is_refused(request_, parts, says):
    reader = ChunkReader(S)
    # Parameters are made once: what an earlier test left in them does not belong here.
    request = Awaited(
        request_.command,
        1,
        request_.offset,
        request_.length,
        request_.flags,
        request_.payload,
        request_.contexts,
    )
    reader.expect(request)
    with pytest.raises(RemoteProtocolError, match=says):
        feed(reader, chunks(S, request, *parts))


@pytest.mark.parametrize("command", [Command.READ, Command.BLOCK_STATUS])
def test_a_simple_reply_where_data_belongs_is_refused(command):
    reader = ChunkReader(S)
    reader.expect(Awaited(command, 1, 0, 5))
    with pytest.raises(RemoteProtocolError, match="a simple reply to"):
        feed(reader, pack_simple_reply(0, 1))


def test_a_simple_reply_after_extended_headers_is_refused():
    reader = ChunkReader(E)
    reader.expect(Awaited(Command.WRITE, 1))
    with pytest.raises(RemoteProtocolError, match=f"magic {SIMPLE_REPLY_MAGIC:#x}"):
        feed(reader, pack_simple_reply(0, 1).ljust(32, b"\0"))


def test_an_extended_reply_must_say_the_requests_offset():
    reader, request = ChunkReader(E), reading(1, 10, 50)
    reader.expect(request)
    wire = pack_chunk(E, *data(50, bytes(10))[:1], 1, data(50, bytes(10))[1], offset=51)
    with pytest.raises(RemoteProtocolError, match="at 51 instead of 50"):
        feed(reader, wire)


def test_a_control_payload_that_would_take_much_memory_is_refused_by_its_header():
    reader = ChunkReader(E)
    reader.expect(Awaited(Command.WRITE, 1))
    wire = struct.pack(">IHHQQQ", 0x6E8A278C, 0, 0x8001, 1, 0, MAX_CONTROL_PAYLOAD + 1)
    with pytest.raises(RemoteProtocolError, match="announces"):
        feed(reader, wire)


def test_gaps_without_end_are_refused(monkeypatch):
    monkeypatch.setattr(replies, "MAX_FRAGMENTS", 20)
    reader, request = ChunkReader(S), reading(1, 1000)
    reader.expect(request)
    with pytest.raises(RemoteProtocolError, match="more than 10 gaps"):
        feed(reader, chunks(S, request, *(data(2 * n, b"x") for n in range(11))))


@pytest.mark.parametrize("style", STYLES)
@given(wire=st.binary(max_size=200), step=st.integers(1, 50))
def test_garbage_is_refused_or_needs_more(style, wire, step):
    reader = ChunkReader(style)
    reader.expect(reading(0, 100))
    magic = 0x668E33EF if style == S else 0x6E8A278C
    try:
        feed(reader, struct.pack(">I", magic) + wire, step)
    except RemoteProtocolError:
        return
    assert reader.outstanding == 1
