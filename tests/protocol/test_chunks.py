"""Reply chunks: every codec there and back, and what no server may send."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdlink.errors import LocalProtocolError, RemoteProtocolError
from nbdlink.protocol.chunks import (
    BlockStatus,
    ChunkHeader,
    ErrorPayload,
    Extent,
    pack_chunk,
    pack_status_filter,
    parse_hole,
    parse_status_filter,
    status_type,
)
from nbdlink.protocol.constants import MAX_STRING, HeaderStyle, ReplyType

u16 = st.integers(0, 0xFFFF)
u32 = st.integers(0, 0xFFFF_FFFF)
u64 = st.integers(0, 0xFFFF_FFFF_FFFF_FFFF)
STYLES = [HeaderStyle.STRUCTURED, HeaderStyle.EXTENDED]
S, E = STYLES


@pytest.mark.parametrize("style", STYLES)
@given(kind=u16, cookie=u64, length=u32, done=st.booleans(), offset=u64)
def test_a_header_comes_back(style, kind, cookie, length, done, offset):
    header = ChunkHeader(kind, cookie, length, done, offset if style == E else 0)
    wire = header.pack(style)
    assert len(wire) == (32 if style == E else 20)
    assert ChunkHeader.parse(wire, style) == header
    assert header.is_error == (kind >= 0x8000)


@pytest.mark.parametrize("style", STYLES)
def test_a_header_of_the_other_style_is_refused(style):
    other = S if style == E else E
    with pytest.raises(RemoteProtocolError, match="magic"):
        ChunkHeader.parse(ChunkHeader(0, 1, 0).pack(other).ljust(32, b"\0"), style)


def test_unknown_reply_flags_are_ignored():
    wire = bytearray(ChunkHeader(0, 1, 0).pack(S))
    wire[4] = 0x80
    assert ChunkHeader.parse(wire, S) == ChunkHeader(0, 1, 0)


def test_a_whole_chunk_is_a_header_and_its_payload():
    wire = pack_chunk(E, ReplyType.NONE, 7, b"xyz", done=False, offset=9)
    assert wire == ChunkHeader(0, 7, 3, False, 9).pack(E) + b"xyz"


def test_a_hole_comes_back():
    assert parse_hole(struct.pack(">QI", 5, 6)) == (5, 6)


@pytest.mark.parametrize("payload", [b"", bytes(11), bytes(13), struct.pack(">QI", 5, 0)])
def test_an_impossible_hole_is_refused(payload):
    with pytest.raises(RemoteProtocolError, match="hole"):
        parse_hole(payload)


@given(error=st.integers(1, 0xFFFF_FFFF), offset=st.none() | u64)
def test_an_error_comes_back(error, offset):
    sent = ErrorPayload(error, "no such luck", offset)
    assert sent.type == (ReplyType.ERROR if offset is None else ReplyType.ERROR_OFFSET)
    assert ErrorPayload.parse(sent.type, sent.pack()) == sent


def test_words_that_are_too_long_are_cut_at_a_character():
    sent = ErrorPayload(5, "\N{EURO SIGN}" * 2000)
    assert ErrorPayload.parse(sent.type, sent.pack()).message == "\N{EURO SIGN}" * (4096 // 3)


def test_an_errors_words_cannot_steer_the_terminal():
    assert "\x1b" not in ErrorPayload.parse(0x8001, ErrorPayload(5, "a\x1b[2J").pack()).message


@pytest.mark.parametrize(
    ("kind", "payload", "says"),
    [
        (0x8001, bytes(5), "too few"),
        (0x8001, struct.pack(">IH", 5, 1), "longer than the chunk"),
        (0x8001, struct.pack(">IH", 5, MAX_STRING + 1) + bytes(5000), "longer than the chunk"),
        (0x8001, struct.pack(">IH", 0, 0), "no error"),
        (0x8002, struct.pack(">IH", 5, 0), "wrong length"),
        (0x8002, struct.pack(">IHQ", 5, 0, 1) + b"x", "wrong length"),
    ],
)
def test_an_impossible_error_is_refused(kind, payload, says):
    with pytest.raises(RemoteProtocolError, match=says):
        ErrorPayload.parse(kind, payload)


def test_an_unknown_kind_of_error_may_say_more_behind_its_words():
    payload = struct.pack(">IH", 5, 2) + b"hiand more"
    assert ErrorPayload.parse(0x9999, payload) == ErrorPayload(5, "hi")


@pytest.mark.parametrize("style", STYLES)
@given(data=st.data(), context=u32)
def test_block_status_comes_back(style, data, context):
    number = u64 if style == E else u32
    extents = data.draw(
        st.lists(st.builds(Extent, number.filter(bool), number), min_size=1, max_size=20)
    )
    sent = BlockStatus(context, tuple(extents))
    assert BlockStatus.parse(status_type(style), sent.pack(style)) == sent


@pytest.mark.parametrize(
    ("extents", "says"), [((), "without extents"), ((Extent(1 << 32, 0),), "does not fit")]
)
def test_impossible_block_status_is_not_packed(extents, says):
    with pytest.raises(LocalProtocolError, match=says):
        BlockStatus(1, extents).pack(S)


@pytest.mark.parametrize(
    ("kind", "payload", "says"),
    [
        (ReplyType.BLOCK_STATUS, b"", "0 bytes"),
        (ReplyType.BLOCK_STATUS, bytes(4), "4 bytes"),
        (ReplyType.BLOCK_STATUS, bytes(13), "13 bytes"),
        (ReplyType.BLOCK_STATUS, bytes(12), "empty extent"),
        (ReplyType.BLOCK_STATUS_EXT, bytes(23), "23 bytes"),
        (ReplyType.BLOCK_STATUS_EXT, struct.pack(">IIQQ", 1, 2, 1, 0), "announces 2"),
        (ReplyType.BLOCK_STATUS_EXT, struct.pack(">IIQQ", 1, 1, 0, 0), "empty extent"),
    ],
)
def test_impossible_block_status_is_refused(kind, payload, says):
    with pytest.raises(RemoteProtocolError, match=says):
        BlockStatus.parse(kind, payload)


@given(length=u64, ids=st.lists(u32, max_size=9))
def test_a_status_filter_comes_back(length, ids):
    assert parse_status_filter(pack_status_filter(length, ids)) == (length, tuple(ids))


@pytest.mark.parametrize("payload", [b"", bytes(7), bytes(10)])
def test_an_impossible_status_filter_is_refused(payload):
    with pytest.raises(RemoteProtocolError, match="bytes of payload"):
        parse_status_filter(payload)
