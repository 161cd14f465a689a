"""The codec: what is packed is parsed back, and what is malformed is refused by name."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdlink.errors import LocalProtocolError, RemoteProtocolError
from nbdlink.protocol.constants import MAX_EXPORT_SIZE, MAX_OPTION_DATA, TransmissionFlag
from nbdlink.protocol.messages import (
    BlockSizeInfo,
    DescriptionInfo,
    ExportInfo,
    ExportListing,
    ExportNameAnswer,
    ExportRequest,
    MetaContext,
    MetaContextRequest,
    NameInfo,
    OptionRequest,
    Reply,
    UnknownInfo,
    pack_export_name,
    parse_export_name,
    parse_info,
    printable,
)

text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=1000)
shown = st.text(st.characters(categories=["L", "N"]), max_size=1000)
sizes = st.integers(0, MAX_EXPORT_SIZE)
flags = st.integers(0, 0xFFFF).map(TransmissionFlag)
u16 = st.integers(0, 0xFFFF)


@st.composite
def block_sizes(draw):
    minimum = 1 << draw(st.integers(0, 16))
    preferred = max(512, minimum) << draw(st.integers(0, 8))
    return BlockSizeInfo(minimum, preferred, draw(st.integers(preferred, 0xFFFF_FFFF)))


@given(name=text, requests=st.lists(u16, unique=True, max_size=20))
def test_export_request_comes_back(name, requests):
    request = ExportRequest(name, tuple(requests))
    assert ExportRequest.parse(request.pack()) == request


@given(name=text, queries=st.lists(text, max_size=10))
def test_meta_context_request_comes_back(name, queries):
    request = MetaContextRequest(name, tuple(queries))
    assert MetaContextRequest.parse(request.pack()) == request


@given(number=st.integers(0, 0xFFFF_FFFF), name=text)
def test_meta_context_comes_back(number, name):
    assert MetaContext.parse(MetaContext(number, name).pack()) == MetaContext(number, name)


@given(name=text, description=shown)
def test_export_listing_comes_back(name, description):
    listing = ExportListing(name, description)
    assert ExportListing.parse(listing.pack()) == listing


@given(name=text)
def test_export_name_comes_back(name):
    assert parse_export_name(pack_export_name(name)) == name


@given(
    info=st.one_of(
        st.builds(ExportInfo, sizes, flags),
        st.builds(NameInfo, text),
        st.builds(DescriptionInfo, shown),
        block_sizes(),
    )
)
def test_info_comes_back(info):
    assert parse_info(info.pack()) == info


@given(size=sizes, flags=flags, zeroes=st.booleans())
def test_export_name_answer_comes_back(size, flags, zeroes):
    answer = ExportNameAnswer(size, flags)
    packed = answer.pack(zeroes=zeroes)
    assert ExportNameAnswer.parse(packed) == answer
    assert len(packed) == (134 if zeroes else 10)


def test_an_unknown_kind_of_info_is_kept_apart():
    assert parse_info(b"\x12\x34data") == UnknownInfo(0x1234, b"data")


@given(
    data=st.binary(max_size=200),
    parse=st.sampled_from(
        [
            ExportRequest.parse,
            MetaContextRequest.parse,
            MetaContext.parse,
            ExportListing.parse,
            parse_info,
            parse_export_name,
        ]
    ),
)
def test_random_bytes_parse_or_are_refused(data, parse):
    with contextlib.suppress(RemoteProtocolError):
        assert parse(data) is not None


@pytest.mark.parametrize(
    ("parse", "data", "says"),
    [
        (ExportRequest.parse, b"\0\0\0\0\0", "too few"),
        (ExportRequest.parse, b"\0\0\0\x01\0\0", "longer than the option"),
        (ExportRequest.parse, b"\xff\xff\xff\xff\0\0", "longer than the option"),
        (ExportRequest.parse, b"\0\0\0\0\0\x02\0\0", "announces 2"),
        (ExportRequest.parse, b"\0\0\0\x01\xff\0\0", "UTF-8"),
        (ExportRequest.parse, b"\0\0\0\x01\0\0\0", "NUL"),
        (ExportListing.parse, b"\0\0", "too few"),
        (ExportListing.parse, b"\0\0\0\x05name", "longer than the reply"),
        (parse_info, b"\0", "too few"),
        (parse_info, b"\0\0\0", "NBD_INFO_EXPORT has 3 bytes"),
        (parse_info, struct.pack(">HQH", 0, 1 << 63, 1), "2^63"),
        (parse_info, b"\0\3\0", "NBD_INFO_BLOCK_SIZE has 3 bytes"),
        (parse_info, struct.pack(">HIII", 3, 3, 4096, 4096), "minimum block size of 3"),
        (parse_info, struct.pack(">HIII", 3, 0, 4096, 4096), "minimum block size of 0"),
        (parse_info, struct.pack(">HIII", 3, 1 << 17, 1 << 17, 1 << 20), "minimum block size"),
        (parse_info, struct.pack(">HIII", 3, 1, 256, 4096), "preferred block size of 256"),
        (parse_info, struct.pack(">HIII", 3, 1024, 512, 4096), "preferred block size of 512"),
        (parse_info, struct.pack(">HIII", 3, 1, 4096, 512), "maximum payload of 512"),
        (MetaContext.parse, b"\0", "too few"),
        (MetaContextRequest.parse, b"\0\0", "cut off"),
        (MetaContextRequest.parse, b"\0\0\0\0\0\0", "before its number"),
        (MetaContextRequest.parse, b"\0\0\0\0\xff\xff\xff\xff", "announces 4294967295"),
        (MetaContextRequest.parse, b"\0\0\0\0\0\0\0\x01\0\0\0\x09", "longer than the message"),
        (MetaContextRequest.parse, b"\0\0\0\0\0\0\0\0!", "behind its last query"),
        (MetaContextRequest.parse, struct.pack(">III", 0, 2, 3) + b"abcde", "cut off"),
        (parse_export_name, b"n" * 4097, "4097 bytes long"),
    ],
)
def test_malformed_data_is_refused_by_name(parse, data, says):
    with pytest.raises(RemoteProtocolError) as caught:
        parse(data)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "pack",
    [
        lambda: pack_export_name("a" * 4097),
        lambda: pack_export_name("nul\0"),
        lambda: pack_export_name("\ud800"),
        lambda: ExportRequest("x", (1, 1)).pack(),
        lambda: ExportInfo(-1, TransmissionFlag(1)).pack(),
        lambda: ExportInfo(1 << 63, TransmissionFlag(1)).pack(),
        lambda: BlockSizeInfo(3, 512, 512).pack(),
        lambda: OptionRequest(1, bytes(MAX_OPTION_DATA + 1)).pack(),
        lambda: Reply(1, 1, bytes(MAX_OPTION_DATA + 1)).pack(),
    ],
)
def test_what_the_protocol_cannot_say_is_not_packed(pack):
    with pytest.raises(LocalProtocolError):
        pack()


def test_a_peers_words_cannot_steer_a_terminal():
    assert "\x1b" not in printable(b"\x1b[2Jhello\r\n")
