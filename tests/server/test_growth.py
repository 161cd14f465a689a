"""Storages that grow while they are served, or shrink."""

from __future__ import annotations

import os
import struct

import pytest

from ..transport.pairs import authority, identity
from .fakes import (
    EINVAL,
    EIO,
    ENOSPC,
    FLUSH,
    INFO_EXPORT,
    OPT_INFO,
    READ,
    REP_INFO,
    TRIM,
    WRITE_ZEROES,
    RawClient,
    export_request,
)
from .served import served
from .tls_client import TLSClient

OLD, NEW = 1 << 20, 5 << 20
ROADS = {
    "unix": {"transport": "unix"},
    "tcp": {"transport": "tcp"},
    "general": {"kind": "general"},
    "TLS": {"transport": "tcp", "credentials": True},
}


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(os.urandom(OLD))
    return path


@pytest.fixture(params=ROADS)
def server(request, tmp_path, image):
    options = dict(ROADS[request.param])
    if options.get("credentials"):
        folder = authority().write_directory(tmp_path / "pki", server=identity("server"))
        options["credentials"] = folder
    with served(tmp_path, image, **options) as server:
        server.connect = TLSClient if "credentials" in options else RawClient
        yield server


@pytest.fixture
def client(server):
    with server.connect(server) as client:
        yield client


def told_size(server):
    with server.connect(server, handshake=False) as client:
        if server.connect is RawClient:
            client.receive(18)
            client.send(struct.pack(">I", 3))
        for kind, data in client.option(OPT_INFO, export_request()):
            if kind == REP_INFO and data[:2] == INFO_EXPORT.to_bytes(2, "big"):
                return int.from_bytes(data[2:10], "big")
    raise AssertionError("no size")


def test_newcomers_are_told_the_new_size(server, image):
    assert told_size(server) == OLD
    os.truncate(image, NEW)
    assert told_size(server) == NEW


def test_a_newcomer_can_use_all_of_it(server, image):
    os.truncate(image, NEW)
    with server.connect(server) as client:
        data = os.urandom(NEW - OLD)
        assert client.write(OLD, data) == 0
        assert client.ask(READ, OLD, NEW - OLD) == (0, data)
    assert image.read_bytes()[OLD:] == data


@pytest.mark.parametrize("length", [1, 4096, 64 << 10, 1 << 20, 3 << 20])
def test_a_connection_of_before_can_use_the_new_part(client, image, length):
    assert client.ask(READ, 0, 4096)[0] == 0
    os.truncate(image, NEW)
    data = os.urandom(length)
    for offset in (OLD - 1, OLD, NEW - length):
        assert client.write(offset, data) == 0
        for _ in range(3):  # aside, from the cache, and as lent pages
            assert client.ask(READ, offset, length) == (0, data)
        assert image.read_bytes()[offset : offset + length] == data


@pytest.mark.parametrize("command", [TRIM, WRITE_ZEROES])
def test_a_connection_of_before_can_empty_the_new_part(client, image, command):
    os.truncate(image, NEW)
    assert client.write(OLD, b"a" * 8192) == 0
    assert client.ask(command, OLD, 8192)[0] == 0
    assert client.ask(READ, OLD, 8192) == (0, bytes(8192))
    assert client.ask(FLUSH)[0] == 0


def test_it_may_grow_again_and_again(client, image):
    for megabytes in range(2, 6):
        end = megabytes << 20
        assert client.ask(READ, end - 1, 1) == (EINVAL, b"")
        os.truncate(image, end)
        assert client.ask(READ, end - 4096, 4096) == (0, bytes(4096))


def test_behind_the_new_end_is_still_nothing(client, image):
    os.truncate(image, NEW)
    assert client.write(NEW - 1, b"ab") == ENOSPC
    assert client.ask(READ, NEW - 1, 2) == (EINVAL, b"")
    assert image.stat().st_size == NEW


def test_many_reads_in_flight_across_a_growth_are_all_right(client, image):
    content = image.read_bytes()
    os.truncate(image, NEW)
    offsets = [i * 4096 for i in range(OLD // 4096)]
    offsets[100:100] = [OLD, NEW - 4096]
    for offset in offsets:
        client.send(_read(offset))
    answers = dict(_answers(client, len(offsets)))
    for offset in offsets:
        assert answers[offset] == (content[offset : offset + 4096] or bytes(4096)), offset


def _read(offset):
    return struct.pack(">IHHQQI", 0x25609513, 0, READ, offset, offset, 4096)


def _answers(client, count):
    for _ in range(count):
        error, cookie, data = client.reply(4096)
        assert error == 0
        yield cookie, data


def test_what_has_been_cut_off_is_an_error_and_no_crash(client, server, image):
    assert client.ask(READ, OLD - 4096, 4096)[0] == 0
    os.truncate(image, OLD // 2)
    assert client.ask(READ, OLD - 4096, 4096) == (EIO, b"")
    assert client.ask(READ, 0, 4096)[0] == 0
    assert told_size(server) == OLD  # nobody's device may shrink below what is written to it


def test_cut_off_and_grown_beyond_what_it_was(client, image):
    assert client.ask(READ, OLD - 4096, 4096)[0] == 0
    os.truncate(image, OLD // 2)
    os.truncate(image, NEW)
    assert client.ask(READ, OLD - 4096, 4096) == (0, bytes(4096))
    assert client.ask(READ, NEW - 4096, 4096) == (0, bytes(4096))


def test_grown_and_cut_off_again(client, image):
    os.truncate(image, NEW)
    assert client.ask(READ, NEW - 65536, 65536) == (0, bytes(65536))
    os.truncate(image, OLD)
    assert client.ask(READ, NEW - 65536, 65536) == (EIO, b"")
    assert client.ask(READ, OLD - 4096, 4096)[0] == 0
