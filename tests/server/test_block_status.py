"""Metadata contexts: how they are listed and selected, and what BLOCK_STATUS then tells."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from nbdlink.protocol.chunks import Extent
from nbdlink.server import executor

from .fakes import (
    BLOCK_STATUS,
    EINVAL,
    EIO,
    OPT_GO,
    READ,
    REP_ACK,
    REQ_ONE,
    MemoryStorage,
    RawClient,
)
from .styles import (
    ALLOCATION,
    ERROR,
    EXTENDED,
    OPT_LIST_META_CONTEXT,
    OPT_SET_META_CONTEXT,
    OPT_STRUCTURED_REPLY,
    REP_ERR_INVALID,
    REP_ERR_TOO_BIG,
    REP_ERR_UNKNOWN,
    REP_META_CONTEXT,
    SIMPLE,
    STATUS,
    STATUS_EXT,
    STRUCTURED,
    StyledClient,
    meta_query,
)

K, M, G = 1 << 10, 1 << 20, 1 << 30
HOLE = 3


@pytest.fixture(params=[STRUCTURED, EXTENDED], ids=["structured", "extended"])
def style(request):
    return request.param


@pytest.fixture
def haggling(serve, storage):
    """A client that goes on haggling, over exports "" and "other"."""
    service = serve({"": storage, "other": MemoryStorage()})
    with RawClient(service, handshake=False) as client:
        client.receive(18)
        client.send(struct.pack(">I", 3))
        assert client.option(OPT_STRUCTURED_REPLY) == [(REP_ACK, b"")]
        yield client


def names(replies):
    """Give the contexts in an option's replies, as (id, name)."""
    *contexts, (last, _) = replies
    assert last == REP_ACK
    assert all(kind == REP_META_CONTEXT for kind, _ in contexts)
    return [(struct.unpack_from(">I", data)[0], data[4:]) for _, data in contexts]


# Listing.


@pytest.mark.parametrize(
    "queries",
    [
        [],
        [b"base:"],
        [ALLOCATION],
        [ALLOCATION, ALLOCATION],
        [b"x-unknown:leaf", ALLOCATION],
        [b"base:", ALLOCATION, b"base:unknown"],
    ],
    ids=repr,
)
def test_what_is_listed_once(haggling, queries):
    found = names(haggling.option(OPT_LIST_META_CONTEXT, meta_query(b"", queries)))
    assert found == [(0, ALLOCATION)]


@pytest.mark.parametrize(
    "query", [b"base:unknown", b"base:alloc", b"BASE:", b"x-unknown:", b"qemu:dirty-bitmap:", b":"]
)
def test_what_is_not_listed(haggling, query):
    assert names(haggling.option(OPT_LIST_META_CONTEXT, meta_query(b"", [query]))) == []


def test_contexts_can_be_listed_before_structured_replies(service):
    with RawClient(service, handshake=False) as client:
        client.receive(18)
        client.send(struct.pack(">I", 3))
        assert len(names(client.option(OPT_LIST_META_CONTEXT, meta_query()))) == 1


# Selecting.


@pytest.mark.parametrize(
    "queries",
    [
        [ALLOCATION],
        [ALLOCATION, ALLOCATION],
        [b"x-unknown:leaf", ALLOCATION],
        [b"base:", ALLOCATION],
    ],
    ids=repr,
)
def test_what_is_selected_once(haggling, queries):
    ((number, name),) = names(haggling.option(OPT_SET_META_CONTEXT, meta_query(b"", queries)))
    assert name == ALLOCATION
    assert number


@pytest.mark.parametrize("queries", [[], [b"base:"], [b"base:unknown"], [b"x-unknown:"]], ids=repr)
def test_what_selects_nothing(haggling, queries):
    assert names(haggling.option(OPT_SET_META_CONTEXT, meta_query(b"", queries))) == []


@pytest.mark.parametrize("option", [OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT])
@pytest.mark.parametrize(
    ("data", "error"),
    [
        (meta_query(b"nope", [ALLOCATION]), REP_ERR_UNKNOWN),
        (meta_query(b"", [b"base"]), REP_ERR_INVALID),
        (meta_query(b"", [ALLOCATION, b""]), REP_ERR_INVALID),
        (meta_query(b"", [b"base:\xff"]), REP_ERR_INVALID),
        (b"", REP_ERR_INVALID),
        (bytes(4), REP_ERR_INVALID),
        (bytes(4) + struct.pack(">I", 1), REP_ERR_INVALID),
        (bytes(4) + struct.pack(">I", 2**32 - 1), REP_ERR_INVALID),
        (bytes(4) + struct.pack(">II", 1, 2**32 - 1), REP_ERR_INVALID),
        (meta_query(b"", [ALLOCATION]) + b"x", REP_ERR_INVALID),
        (meta_query(b"", [b"x" * 4096 + b":"]), REP_ERR_INVALID),
        (meta_query(b"", [b"x:" + b"y" * 4000] * 17), REP_ERR_TOO_BIG),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_what_cannot_be_asked(haggling, option, data, error):
    ((kind, _),) = haggling.option(option, data)
    assert kind == error
    assert names(haggling.option(OPT_LIST_META_CONTEXT, meta_query())) != []


def can_ask(client, service_name=b""):
    """Go, and tell whether the block status may be asked for."""
    client.option(OPT_GO, struct.pack(">I", len(service_name)) + service_name + bytes(2))
    client.send(struct.pack(">IHHQQI", 0x25609513, 0, BLOCK_STATUS, 7, 0, 4096))
    magic, flags, kind, cookie, length = struct.unpack(">IHHQI", client.receive(20))
    payload = client.receive(length)
    assert (magic, flags, cookie) == (0x668E33EF, 1, 7)
    if kind == STATUS:
        return True
    assert kind == ERROR
    assert struct.unpack_from(">I", payload)[0] == EINVAL
    return False


def test_who_selected_may_ask(haggling):
    haggling.option(OPT_SET_META_CONTEXT, meta_query(b"", [ALLOCATION]))
    assert can_ask(haggling)


def test_who_selected_nothing_may_not(haggling):
    assert not can_ask(haggling)


def test_what_was_selected_for_another_export_does_not_count(haggling):
    haggling.option(OPT_SET_META_CONTEXT, meta_query(b"other", [ALLOCATION]))
    assert not can_ask(haggling)


def test_going_to_another_export_later_makes_it_count(haggling):
    haggling.option(OPT_SET_META_CONTEXT, meta_query(b"other", [ALLOCATION]))
    assert can_ask(haggling, b"other")


@pytest.mark.parametrize(
    "second",
    [
        meta_query(b"", []),
        meta_query(b"", [b"base:unknown"]),
        meta_query(b"nope", [ALLOCATION]),
        meta_query(b"", [b"no colon"]),
        b"garbage",
        bytes(70_000),
    ],
    ids=["nothing", "unknown", "no export", "invalid", "garbage", "too big"],
)
def test_selecting_again_replaces_even_if_it_fails(haggling, second):
    haggling.option(OPT_SET_META_CONTEXT, meta_query(b"", [ALLOCATION]))
    haggling.option(OPT_SET_META_CONTEXT, second)
    assert not can_ask(haggling)


def test_listing_replaces_nothing(haggling):
    haggling.option(OPT_SET_META_CONTEXT, meta_query(b"", [ALLOCATION]))
    haggling.option(OPT_LIST_META_CONTEXT, meta_query(b"other", [b"base:unknown"]))
    assert can_ask(haggling)


def test_selecting_takes_structured_replies(service):
    with RawClient(service, handshake=False) as client:
        client.receive(18)
        client.send(struct.pack(">I", 3))
        ((kind, _),) = client.option(OPT_SET_META_CONTEXT, meta_query(b"", [ALLOCATION]))
        assert kind == REP_ERR_INVALID


def test_simple_replies_have_no_block_status(service):
    with StyledClient(service, SIMPLE) as client:
        client.send(client.pack(BLOCK_STATUS, 0, 4096))
        assert client.receive(16) == struct.pack(">IIQ", 0x67446698, EINVAL, 7)


# What is told.


@pytest.fixture
def image(tmp_path):
    """A sparse file of 8 MiB: data at 1 MiB and at 5 MiB, a hole everywhere else."""
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(8 * M)
        for at in (M, 5 * M):
            file.seek(at)
            file.write(os.urandom(M))
    return path


@pytest.fixture
def client(serve, image, style):
    with StyledClient(serve({"": image}), style, contexts=[ALLOCATION]) as client:
        yield client


def test_data_and_holes_are_told_apart(client):
    assert client.status(0, 8 * M) == [(M, HOLE), (M, 0), (3 * M, HOLE), (M, 0), (2 * M, HOLE)]


def test_the_type_of_the_chunk_is_the_styles(client, style):
    (chunk,) = client.whole(BLOCK_STATUS, 0, M).chunks
    assert chunk.kind == (STATUS_EXT if style == EXTENDED else STATUS)


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 1), (M - 1, 2), (M + 77, 100), (3 * M, 5 * M), (8 * M - 1, 1)]
)
def test_extents_tile_what_was_asked_for(client, image, offset, length):
    extents = client.status(offset, length)
    assert sum(count for count, _ in extents) == length
    data = image.read_bytes()
    for count, flags in extents:
        assert not flags or not any(data[offset : offset + count])
        offset += count


@pytest.mark.parametrize("offset", [0, M, M + 77])
def test_one_extent_if_one_is_asked_for(client, offset):
    ((length, _),) = client.status(offset, 5 * M, flags=REQ_ONE)
    assert length == (M - offset if offset < M else 2 * M - offset)


def test_one_extent_is_no_longer_than_what_was_asked_for(client):
    assert client.status(2 * M, 4096, flags=REQ_ONE) == [(4096, HOLE)]


@pytest.mark.parametrize(("offset", "length"), [(0, 0), (8 * M, 1), (M, 8 * M), (2**64 - 1, 1)])
def test_what_has_no_status(client, offset, length):
    assert client.whole(BLOCK_STATUS, offset, length).error == EINVAL
    assert client.ask(READ, 0, 512) == (0, bytes(512))


def test_a_file_that_became_shorter_has_no_status_there(client, image):
    os.truncate(image, 2 * M)
    assert client.whole(BLOCK_STATUS, 4 * M, M).error == EIO
    assert client.status(0, 2 * M) == [(M, HOLE), (M, 0)]


@pytest.mark.parametrize("flags", [0, REQ_ONE], ids=["all", "one"])
def test_four_gibibytes_fit_into_32_bits_piece_by_piece(serve, tmp_path, flags):
    path = tmp_path / "huge"
    path.touch()
    os.truncate(path, 9 * G)
    with StyledClient(serve({"": path}), STRUCTURED, contexts=[ALLOCATION]) as client:
        offset, rounds = 0, 0
        while offset < 9 * G:
            length = min(2**32 - 4096, 9 * G - offset)
            extents = client.status(offset, length, flags=flags)
            assert sum(count for count, _ in extents) <= length
            assert {flag for _, flag in extents} == {HOLE}
            offset += sum(count for count, _ in extents)
            rounds += 1
        assert rounds < 10


# Many extents.


class Chequered(MemoryStorage):
    """Data and holes by turns, of 512 bytes each, or whatever `pattern` says."""

    waits = True
    is_sparse = False

    def pattern(self, offset):
        return HOLE * (offset // 512 % 2)

    def extents(self, context, offset, length):
        assert context == "base:allocation"
        end = offset + length
        while offset < end:
            stop = min(end, (offset // 512 + 1) * 512)
            yield Extent(stop - offset, self.pattern(offset))
            offset = stop


def test_many_extents_are_told_in_bounded_pieces(serve, style, monkeypatch):
    monkeypatch.setattr(executor, "_MOST_EXTENTS", 1000)
    storage = Chequered(4 * M)
    with StyledClient(serve({"": storage}), style, contexts=[ALLOCATION]) as client:
        offset = 0
        while offset < 4 * M:
            extents = client.status(offset, 4 * M - offset)
            assert len(extents) <= 1000
            for length, flags in extents:
                assert (length, flags) == (512, storage.pattern(offset))
                offset += length


def test_a_hundred_thousand_extents_are_one_bounded_reply(serve, style):
    with StyledClient(serve({"": Chequered(50 * M)}), style, contexts=[ALLOCATION]) as client:
        assert 2**10 <= len(client.status(0, 50 * M)) <= 2**20
        assert client.ask(READ, 0, 512)[0] == 0


def test_neighbours_of_the_same_status_are_one_extent(serve, style):
    storage = Chequered(M)
    storage.pattern = lambda offset: HOLE * (offset >= M // 2)
    with StyledClient(serve({"": storage}), style, contexts=[ALLOCATION]) as client:
        assert client.status(0, M) == [(M // 2, 0), (M // 2, HOLE)]
        assert client.status(0, M, flags=REQ_ONE) == [(M // 2, 0)]


def test_a_storage_that_cannot_tell_its_status_is_an_error(serve, style, caplog):
    storage = Chequered(M)
    storage.pattern = lambda offset: Path("/nowhere/secret.img").stat()
    with StyledClient(serve({"": storage}), style, contexts=[ALLOCATION]) as client:
        (chunk,) = client.whole(BLOCK_STATUS, 0, M).chunks
        assert chunk.kind == ERROR
        assert b"secret" not in chunk.payload
        assert client.ask(READ, 0, 512)[0] == 0
