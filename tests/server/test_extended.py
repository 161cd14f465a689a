"""Extended headers: 32 bytes both ways, payload lengths, and lengths of 64 bits."""

from __future__ import annotations

import os
import struct

import pytest

from .fakes import (
    BLOCK_STATUS,
    CACHE,
    DISC,
    EINVAL,
    ENOSPC,
    FLUSH,
    FUA,
    OPT_EXPORT_NAME,
    READ,
    REP_ACK,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    RawClient,
    request,
)
from .styles import (
    ALLOCATION,
    EXTENDED,
    NONE,
    OPT_EXTENDED_HEADERS,
    OPT_SET_META_CONTEXT,
    OPT_STRUCTURED_REPLY,
    PAYLOAD_LEN,
    REP_ERR_EXT_HEADER_REQD,
    REP_ERR_INVALID,
    STATUS_EXT,
    STRUCTURED,
    StyledClient,
    extents_of,
    meta_query,
)

SIZE = 1 << 20
G = 1 << 30
BLOCK_STATUS_PAYLOAD = 1 << 12


@pytest.fixture
def client(service):
    with StyledClient(service, EXTENDED) as client:
        yield client


@pytest.fixture
def huge(tmp_path):
    path = tmp_path / "huge"
    path.touch()
    os.truncate(path, 6 * G)
    return path


@pytest.fixture
def asking(service):
    """A client that may ask for the block status."""
    with StyledClient(service, EXTENDED, contexts=[ALLOCATION]) as client:
        yield client


def header(command, flags, offset, length, cookie=7):
    return struct.pack(">IHHQQQ", 0x21E41C71, flags, command, cookie, offset, length)


# The handshake.


def test_the_last_word_on_headers_counts(service):
    structured = (OPT_STRUCTURED_REPLY, b"")
    with RawClient(service, handshake=False) as client:
        client.receive(18)
        client.send(struct.pack(">I", 3))
        assert client.option(*structured) == [(REP_ACK, b"")]
        assert client.option(OPT_EXTENDED_HEADERS) == [(REP_ACK, b"")]
        ((kind, _),) = client.option(*structured)
        assert kind == REP_ERR_EXT_HEADER_REQD


@pytest.mark.parametrize("option", [OPT_STRUCTURED_REPLY, OPT_EXTENDED_HEADERS])
def test_headers_are_not_changed_by_an_option_with_data(service, option):
    with RawClient(service, handshake=False) as client:
        client.receive(18)
        client.send(struct.pack(">I", 3))
        ((kind, _),) = client.option(option, b"x")
        assert kind == REP_ERR_INVALID
        client.option(7, struct.pack(">IH", 0, 0))
        assert client.ask(READ, 0, 4)[0] == 0, "the replies are simple"


def test_export_name_is_no_way_out_of_extended_headers(service):
    with RawClient(service, handshake=False) as client:
        client.receive(18)
        client.send(struct.pack(">I", 3))
        client.option(OPT_EXTENDED_HEADERS)
        client.send(b"IHAVEOPT" + struct.pack(">II", OPT_EXPORT_NAME, 0))
        assert client.hung_up()


# Headers.


@pytest.mark.parametrize("offset", [0, 77, SIZE - 4])
@pytest.mark.parametrize("command", [READ, WRITE, TRIM, CACHE, WRITE_ZEROES])
def test_every_reply_repeats_cookie_and_offset(client, command, offset):
    data = b"data" if command == WRITE else b""
    answer = client.whole(command, offset, 4, data=data, cookie=2**64 - 2)
    assert answer.error == 0
    assert {chunk.offset for chunk in answer.chunks} == {offset}


@pytest.mark.parametrize("offset", [SIZE, 2**63, 2**64 - 1])
def test_an_error_repeats_the_offset_too(client, offset):
    (chunk,) = client.whole(READ, offset, 4).chunks
    assert chunk.offset == offset
    assert client.whole(WRITE, offset, data=b"data").error == ENOSPC


def test_success_without_data_is_a_chunk_of_nothing(client):
    (chunk,) = client.whole(WRITE, 5, data=b"data").chunks
    assert chunk.kind == NONE


def test_a_compact_request_ends_the_connection(client):
    client.send(request(READ, 0, 4) + bytes(4))
    assert client.hung_up()


def test_an_extended_request_ends_a_connection_that_did_not_agree_on_it(service):
    with StyledClient(service, STRUCTURED) as client:
        client.send(header(READ, 0, 0, 4))
        assert client.hung_up()


def test_a_client_that_disconnects_is_let_go(client):
    client.send(client.pack(DISC))
    assert client.hung_up()


# Payload lengths.


def test_a_write_without_payload_is_refused(client, storage):
    before = bytes(storage.data)
    client.expect(WRITE, 0, 16, 7)
    client.send(header(WRITE, 0, 0, 16))
    assert client.answer().error == EINVAL
    assert client.ask(READ, 0, 16) == (0, before[:16]), "no payload was waited for"
    assert storage.data == before


@pytest.mark.parametrize("length", [1, 16, 100_000, 200_000, 3 << 20])
@pytest.mark.parametrize("command", [READ, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS, 9, 999])
def test_a_payload_where_none_belongs_is_consumed_and_refused(client, storage, command, length):
    before = bytes(storage.data)
    client.expect(command, 0, 0, 7)
    client.send(header(command, PAYLOAD_LEN, 0, length) + bytes(length))
    assert client.answer().error == EINVAL
    assert client.ask(READ, 0, 16) == (0, before[:16])
    assert storage.data == before


@pytest.mark.parametrize("command", [READ, WRITE, BLOCK_STATUS])
def test_an_endless_payload_ends_the_connection(client, command):
    client.expect(command, 0, 0, 7)
    client.send(header(command, PAYLOAD_LEN, 0, 2**63))
    assert client.answer().error in (EINVAL, ENOSPC)
    assert client.hung_up()


def test_nothing_can_be_written(client):
    client.expect(WRITE, 5, 0, 7)
    client.send(header(WRITE, PAYLOAD_LEN, 5, 0))
    assert client.answer().error == 0


@pytest.mark.parametrize("length", [16, 100_000, 200_000])
def test_flags_beside_the_payloads_reach_the_storage(client, storage, length):
    assert client.ask(WRITE, 5, data=bytes(length), flags=FUA) == (0, b"")
    assert storage.calls == [("write", 5, length, True)]


# 64 bits of length.


@pytest.mark.parametrize("command", [WRITE_ZEROES, TRIM, CACHE])
def test_lengths_may_have_more_than_32_bits(serve, huge, command):
    with huge.open("r+b") as file:
        file.seek(5 * G - 4096)
        file.write(b"x" * 8192)
    with StyledClient(serve({"": huge}), EXTENDED) as client:
        assert client.ask(command, 0, 5 * G) == (0, b"")
        if command == WRITE_ZEROES:
            assert client.ask(READ, 5 * G - 4096, 8192) == (0, bytes(4096) + b"x" * 4096)


@pytest.mark.parametrize("length", [6 * G + 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("command", [WRITE_ZEROES, TRIM, CACHE, READ, BLOCK_STATUS])
def test_lengths_past_the_end_are_refused(serve, huge, command, length):
    with StyledClient(serve({"": huge}), EXTENDED, contexts=[ALLOCATION]) as client:
        assert client.ask(command, 0, length)[0] in (EINVAL, ENOSPC)
        assert client.ask(READ, 0, 16) == (0, bytes(16))


def test_a_hole_of_more_than_32_bits_is_one_extent(serve, huge):
    with StyledClient(serve({"": huge}), EXTENDED, contexts=[ALLOCATION]) as client:
        assert client.status(0, 6 * G) == [(6 * G, 3)]


# Asking for the status of some contexts only.


def filtered(client, length, ids, flags=0, extra=b""):
    payload = struct.pack(f">Q{len(ids)}I", length, *ids) + extra
    client.expect(BLOCK_STATUS, 0, length, 7)
    client.send(header(BLOCK_STATUS, flags | PAYLOAD_LEN, 0, len(payload)) + payload)
    return client.answer()


def test_the_payload_is_offered_to_who_has_contexts(client, asking):
    assert asking.flags & BLOCK_STATUS_PAYLOAD
    assert not client.flags & BLOCK_STATUS_PAYLOAD


def test_a_context_can_be_asked_for_by_its_id(asking):
    (number,) = asking.contexts.values()
    (chunk,) = filtered(asking, 4096, [number]).chunks
    assert chunk.kind == STATUS_EXT
    assert extents_of(chunk) == (number, [(4096, 0)])


@pytest.mark.parametrize(
    "ids", [[], [0], [99], [1, 99], [1, 1], [2**32 - 1], range(1, 40_000)], ids=repr
)
def test_ids_that_are_not_there_are_refused(asking, ids):
    assert list(asking.contexts.values()) == [1]
    assert filtered(asking, 4096, ids).error == EINVAL
    assert asking.status(0, 4096) == [(4096, 0)]


@pytest.mark.parametrize("length", [0, SIZE + 1, 2**64 - 1])
def test_the_payloads_length_is_checked(asking, length):
    assert filtered(asking, length, [1]).error == EINVAL


@pytest.mark.parametrize("extra", [b"x", b"xx", b"xxx"])
def test_a_payload_of_a_strange_length_is_refused(asking, extra):
    assert filtered(asking, 4096, [1], extra=extra).error == EINVAL
    assert asking.status(0, 4096) == [(4096, 0)]


@pytest.mark.parametrize("length", [0, 1, 7])
def test_a_payload_too_short_to_say_a_length_is_refused(asking, length):
    asking.expect(BLOCK_STATUS, 0, length, 7)
    asking.send(header(BLOCK_STATUS, PAYLOAD_LEN, 0, length) + bytes(length))
    assert asking.answer().error == EINVAL
    assert asking.status(0, 4096) == [(4096, 0)]


def test_contexts_survive_a_change_from_structured_to_extended_headers(service):
    options = [
        (OPT_SET_META_CONTEXT, meta_query(b"", [ALLOCATION])),
        (OPT_EXTENDED_HEADERS, b""),
    ]
    with StyledClient(service, STRUCTURED, before_go=options) as client:
        client.style, client.contexts = EXTENDED, {ALLOCATION: 1}
        assert client.status(0, 4096) == [(4096, 0)]
