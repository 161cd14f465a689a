"""Bytes that the storage has to write itself, though the file is plain: the engine leaves them."""

from __future__ import annotations

import os
import tempfile

import pytest

from nbdlink.storage.firstsector import FirstSector
from nbdlink.storage.policy import Policy
from nbdlink.storage.raw import RawStorage

from .fakes import EPERM, FUA, READ, WRITE, RawClient, request

SIZE = 4 << 20
QCOW2 = b"QFI\xfb\0\0\0\3"

# What fits into the inbox, what is received exactly, and what may be spliced.
LENGTHS = [8, 4096, 100_000, 200_000, 1_500_000]


@pytest.fixture(params=["unix", "tcp", "memory"])
def client(request, serve, tmp_path):
    folder = "/dev/shm" if request.param == "memory" else tmp_path
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.truncate(SIZE)
        storage = FirstSector(RawStorage.open(file.name))
        options = {"unix": None, "host": "127.0.0.1"} if request.param == "tcp" else {}
        with RawClient(serve({"": storage}, **options)) as client:
            yield client


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("flags", [0, FUA])
def test_what_would_look_like_a_format_is_refused_whatever_its_length(client, length, flags):
    assert client.write(0, QCOW2.ljust(length, b"x"), flags) == EPERM
    assert client.ask(READ, 0, 512) == (0, bytes(512))
    # The payload is off the socket, and the connection goes on.
    assert client.write(512, b"y" * 100) == 0


@pytest.mark.parametrize("length", LENGTHS)
def test_anything_else_is_written(client, length):
    data = os.urandom(length - 4).join([b"data", b""])
    assert client.write(0, data) == 0
    assert client.ask(READ, 0, length) == (0, data)


@pytest.mark.parametrize("length", LENGTHS)
def test_what_begins_later_is_nobodys_business(client, length):
    data = QCOW2 + os.urandom(length - 8)
    assert client.write(512, data) == 0
    assert client.ask(READ, 512, length) == (0, data)


def test_requests_before_and_after_are_answered(client):
    many = b"".join(
        request(WRITE, at * 4096, 8, cookie=at) + (QCOW2 if at % 3 == 0 else b"harmless")
        for at in range(9)
    )
    client.send(many)
    answers = {}
    for _ in range(9):
        error, cookie, _ = client.reply()
        answers[cookie] = error
    assert answers == {0: EPERM, **dict.fromkeys(range(1, 9), 0)}


def test_writes_through_are_never_the_engines(serve, tmp_path):
    path = tmp_path / "image"
    path.write_bytes(bytes(SIZE))
    written = []

    class Watched(RawStorage):
        def write(self, buffer, offset, fua):
            written.append((len(buffer), fua))
            super().write(buffer, offset, fua)

    storage = Policy(Watched.open(path), write_through=True)
    with RawClient(serve({"": storage})) as client:
        for length in LENGTHS:
            assert client.write(1 << 20, b"x" * length) == 0
    assert all(fua for _, fua in written)
    assert sum(length for length, _ in written) == sum(LENGTHS)
