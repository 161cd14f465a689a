"""Reads in structured and extended replies: how they are divided, and how they fail."""

from __future__ import annotations

import errno
import os
import struct

import pytest

from .fakes import DF, EINVAL, EIO, FLUSH, FUA, READ, TRIM, WRITE, WRITE_ZEROES, MemoryStorage
from .styles import (
    ERROR,
    ERROR_OFFSET,
    EXTENDED,
    NONE,
    OFFSET_DATA,
    OFFSET_HOLE,
    SIMPLE,
    STRUCTURED,
    StyledClient,
    error_of,
)

SIZE = 8 << 20
K, M = 1 << 10, 1 << 20
SEND_DF = 1 << 7


@pytest.fixture(params=[STRUCTURED, EXTENDED], ids=["structured", "extended"])
def style(request):
    return request.param


@pytest.fixture
def storage():
    return MemoryStorage(SIZE)


@pytest.fixture
def client(service, style):
    with StyledClient(service, style) as client:
        yield client


@pytest.fixture
def image(tmp_path):
    """A sparse file: data at 1 MiB and at 5 MiB, a hole everywhere else."""
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(SIZE)
        for at in (M, 5 * M):
            file.seek(at)
            file.write(os.urandom(M))
    return path


@pytest.fixture
def sparse(serve, image, style):
    with StyledClient(serve({"": image}), style) as client:
        yield client


def kinds(answer):
    return [chunk.kind for chunk in answer.chunks]


def places(answer):
    """Give (offset, length) of each content chunk."""
    found = []
    for chunk in answer.chunks:
        (at,) = struct.unpack_from(">Q", chunk.payload)
        if chunk.kind == OFFSET_HOLE:
            found.append((at, *struct.unpack_from(">I", chunk.payload, 8)))
        elif chunk.kind == OFFSET_DATA:
            found.append((at, len(chunk.payload) - 8))
    return found


@pytest.mark.parametrize("length", [1, 4096, 100_000, M])
def test_a_read_is_one_chunk_of_data(client, storage, length):
    answer = client.whole(READ, 77, length)
    assert kinds(answer) == [OFFSET_DATA]
    assert answer.data == storage.data[77 : 77 + length]


def test_a_long_read_comes_in_chunks_that_tile_it(client, storage):
    answer = client.whole(READ, 77, 5 * M)
    assert len(answer.chunks) > 1
    assert [chunk.done for chunk in answer.chunks] == [False] * (len(answer.chunks) - 1) + [True]
    end = 77
    for at, length in places(answer):
        assert at == end
        end += length
    assert end == 77 + 5 * M
    assert answer.data == storage.data[77:end]


def test_df_is_offered(client):
    assert client.flags & SEND_DF


def test_df_is_not_offered_without_chunks(service):
    with StyledClient(service, SIMPLE) as client:
        assert not client.flags & SEND_DF


@pytest.mark.parametrize("length", [1, 65_536, 5 * M])
def test_a_read_that_must_not_be_fragmented_is_one_chunk(client, storage, length):
    answer = client.whole(READ, 77, length, flags=DF)
    assert kinds(answer) == [OFFSET_DATA]
    assert answer.data == storage.data[77 : 77 + length]


@pytest.mark.parametrize("flags", [0, DF, FUA], ids=["plain", "DF", "FUA"])
def test_a_read_of_nothing_has_no_content(client, flags):
    assert kinds(client.whole(READ, 5, 0, flags=flags)) == [NONE]


def test_a_hole_is_a_chunk_of_twelve_bytes(sparse):
    answer = sparse.whole(READ, 2 * M, 2 * M)
    assert kinds(answer) == [OFFSET_HOLE]
    assert places(answer) == [(2 * M, 2 * M)]


def test_data_and_holes_tile_a_read(sparse, image):
    answer = sparse.whole(READ, M // 2 + 512, 2 * M)
    assert set(kinds(answer)) == {OFFSET_DATA, OFFSET_HOLE}
    assert answer.data == image.read_bytes()[M // 2 + 512 :][: 2 * M]


@pytest.mark.parametrize("length", [65_536, 2 * M])
def test_a_hole_that_must_not_be_fragmented_is_zeroes(sparse, length):
    answer = sparse.whole(READ, 2 * M - 100, length, flags=DF)
    assert kinds(answer) == [OFFSET_DATA]
    assert answer.data[100:] == bytes(length - 100)


def test_what_was_written_into_a_hole_is_no_hole_any_more(sparse):
    data = os.urandom(M)
    assert sparse.ask(WRITE, 3 * M, data=data) == (0, b"")
    assert sparse.ask(READ, 3 * M - 10, M + 20) == (0, bytes(10) + data + bytes(10))


def test_a_file_without_holes_gets_them_by_zeroing(serve, tmp_path, style):
    path = tmp_path / "full"
    path.write_bytes(os.urandom(M))
    with StyledClient(serve({"": path}), style) as client:
        assert kinds(client.whole(READ, 0, M)) == [OFFSET_DATA]
        assert client.ask(WRITE_ZEROES, 0, M) == (0, b"")
        assert kinds(client.whole(READ, 0, M)) == [OFFSET_HOLE]


def test_many_holes_do_not_mean_many_chunks(serve, tmp_path, style):
    path = tmp_path / "holes"
    with path.open("wb") as file:
        file.truncate(8 * M)
        for at in range(0, 8 * M, 16 * K):
            file.seek(at)
            file.write(b"x" * 4096)
    with StyledClient(serve({"": path}), style) as client:
        answer = client.whole(READ, 0, 8 * M)
        assert answer.data == path.read_bytes()
        assert len(answer.chunks) < 100


# What fails.


@pytest.mark.parametrize("length", [16, 4 * M])
def test_a_read_that_fails_says_where(client, storage, length):
    storage.failing = {"read": errno.EIO}
    answer = client.whole(READ, 99, length)
    storage.failing = {}
    assert kinds(answer) == [ERROR_OFFSET]
    error, message, at = error_of(answer.chunks[0])
    assert (error, at) == (EIO, 99)
    assert message == os.strerror(EIO)


def test_a_read_that_fails_in_the_middle_gives_what_came_before(client, storage):
    def bad_sector(offset):
        if offset > 2 * M:
            raise OSError(errno.EIO, "bad sector in /srv/secret.img")

    storage.on_read = bad_sector
    answer = client.whole(READ, 77, 4 * M)
    assert kinds(answer) == [OFFSET_DATA, OFFSET_DATA, ERROR_OFFSET]
    good = b"".join(chunk.payload[8:] for chunk in answer.chunks[:2])
    assert good == storage.data[77 : 77 + 2 * M]
    assert error_of(answer.chunks[-1]) == (EIO, os.strerror(EIO), 77 + 2 * M)
    assert client.ask(READ, 0, 512)[0] == 0, "the connection goes on"


@pytest.mark.parametrize(
    ("method", "command", "length"),
    [
        ("write", WRITE, 16),
        ("write", WRITE, 300_000),
        ("trim", TRIM, 16),
        ("zero", WRITE_ZEROES, 16),
    ],
)
def test_a_failure_to_change_something_says_where(client, storage, method, command, length):
    storage.failing = {method: OSError(errno.ENOSPC, "/srv/secret.img is full")}
    data = bytes(length) if command == WRITE else b""
    (chunk,) = client.whole(command, 99, length, data=data).chunks
    assert chunk.kind == ERROR_OFFSET
    assert error_of(chunk) == (28, os.strerror(28), 99)


def test_a_flush_that_fails_has_no_place(client, storage):
    storage.failing = {"flush": errno.EIO}
    (chunk,) = client.whole(FLUSH).chunks
    storage.failing = {}
    assert chunk.kind == ERROR
    assert error_of(chunk)[0] == EIO


def test_a_refusal_is_an_error_chunk(client):
    (chunk,) = client.whole(READ, SIZE, 1).chunks
    assert chunk.kind == ERROR
    assert not chunk.simple
    assert error_of(chunk)[0] == EINVAL


def test_what_changes_something_is_answered_by_a_simple_reply_among_structured_ones(service):
    with StyledClient(service, STRUCTURED) as client:
        for command in (WRITE, TRIM, WRITE_ZEROES, FLUSH):
            length = 0 if command == FLUSH else 16
            data = bytes(16) if command == WRITE else b""
            (chunk,) = client.whole(command, 0, length, data=data).chunks
            assert chunk.simple


def test_a_sparse_file_that_became_shorter_is_an_error_and_no_hole(sparse, image):
    os.truncate(image, 3 * M)
    assert sparse.ask(READ, 2 * M, 4096) == (0, bytes(4096))
    answer = sparse.whole(READ, 6 * M, M)
    assert answer.error == EIO
    assert OFFSET_HOLE not in kinds(answer)
