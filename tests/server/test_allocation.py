"""What zeroing and trimming do to a file's space, asked for through the server."""

from __future__ import annotations

import os

import pytest

from .fakes import EINVAL, FAST_ZERO, FUA, NO_HOLE, READ, TRIM, WRITE, WRITE_ZEROES, MemoryStorage
from .styles import STYLES, StyledClient

M = 1 << 20
SEND_TRIM, SEND_WRITE_ZEROES, SEND_FAST_ZERO = 1 << 5, 1 << 6, 1 << 11


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(os.urandom(4 * M))
    return path


@pytest.fixture(params=STYLES.values(), ids=STYLES)
def client(serve, image, request):
    with StyledClient(serve({"": image}), request.param) as client:
        yield client


def space(path):
    """Give the bytes that a file takes; an fsync, as some file systems decide late."""
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
        return os.fstat(fd).st_blocks * 512
    finally:
        os.close(fd)


def test_it_is_offered(client):
    offered = SEND_TRIM | SEND_WRITE_ZEROES | SEND_FAST_ZERO
    assert client.flags & offered == offered


@pytest.mark.parametrize("flags", [0, FUA, FAST_ZERO], ids=["plain", "fua", "fast"])
def test_zeroes_give_space_back(client, image, flags):
    before = space(image)
    assert client.ask(WRITE_ZEROES, M, 2 * M, flags=flags) == (0, b"")
    assert client.ask(READ, M, 2 * M) == (0, bytes(2 * M))
    assert space(image) <= before - 2 * M + 64 * 1024


@pytest.mark.parametrize("flags", [NO_HOLE, NO_HOLE | FUA, NO_HOLE | FAST_ZERO])
def test_zeroes_that_must_not_be_holes_keep_their_space(client, image, flags):
    before = space(image)
    assert client.ask(WRITE_ZEROES, M, 2 * M, flags=flags) == (0, b"")
    assert client.ask(READ, M, 2 * M) == (0, bytes(2 * M))
    assert space(image) >= before


def test_zeroes_that_must_not_be_holes_fill_a_hole(client, image):
    assert client.ask(WRITE_ZEROES, 0, 4 * M) == (0, b"")
    hole = space(image)
    assert client.ask(WRITE_ZEROES, 0, 4 * M, flags=NO_HOLE) == (0, b"")
    assert space(image) >= hole + 4 * M - 64 * 1024


def test_trimming_gives_space_back(client, image):
    before = space(image)
    assert client.ask(TRIM, M, 2 * M) == (0, b"")
    assert space(image) <= before - 2 * M + 64 * 1024


@pytest.mark.parametrize("command", [TRIM, WRITE_ZEROES])
def test_neighbours_stay_as_they_are(client, image, command):
    content = image.read_bytes()
    assert client.ask(command, M + 77, M) == (0, b"")
    assert client.ask(READ, 0, M + 77) == (0, content[: M + 77])
    assert client.ask(READ, 2 * M + 77, 2 * M - 77) == (0, content[2 * M + 77 :])


def test_writing_takes_space_again(client, image):
    before = space(image)
    assert client.ask(TRIM, 0, 4 * M) == (0, b"")
    assert client.ask(WRITE, 0, data=os.urandom(4 * M)) == (0, b"")
    assert space(image) >= before - 64 * 1024


# Blocks.


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
@pytest.mark.parametrize(("offset", "length"), [(0, 512), (4096, 100), (1, 4096), (4000, 4192)])
def test_what_is_not_aligned_is_refused_in_every_style(serve, style, offset, length):
    storage = MemoryStorage(M + 5000, minimum_block=4096)
    before = bytes(storage.data)
    with StyledClient(serve({"": storage}), style) as client:
        assert client.size == M + 4096, "whole blocks only"
        assert client.ask(READ, offset, length)[0] == EINVAL
        assert client.ask(WRITE, offset, data=bytes(length))[0] == EINVAL
        assert client.ask(WRITE_ZEROES, offset, length)[0] == EINVAL
        assert client.ask(READ, 4096, 8192) == (0, before[4096:12288])
    assert storage.data == before
