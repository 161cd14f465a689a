"""Files that fill up or are cut off under the server, on every road a request can take."""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import tempfile
import threading
from pathlib import Path

import pytest

from .fakes import (
    EIO,
    ENOSPC,
    FUA,
    NO_HOLE,
    READ,
    WRITE,
    WRITE_ZEROES,
    HungUpError,
    MemoryStorage,
    RawClient,
)
from .served import served, served_from_a_tiny_disk
from .styles import SIMPLE, STYLES, StyledClient

K, M = 1 << 10, 1 << 20
KINDS = ["plain", "general"]
TRANSPORTS = ["unix", "tcp"]


PATTERN = struct.pack(f">{M}Q", *range(M))


def data_for(offset, length):
    """Give bytes that tell where they belong."""
    return PATTERN[offset : offset + length]


# A full disk.


def fill(client):
    """Write until there is no room; give how many bytes were acknowledged."""
    done = 0
    for length in (64 * K, 4 * K):
        while client.ask(WRITE, done, data=data_for(done, length))[0] == 0:
            done += length
    return done


FULL = {
    "short": dict(command=WRITE, data=bytes([1]) * 8 * K),
    "whole": dict(command=WRITE, data=bytes([1]) * 128 * K),
    "long": dict(command=WRITE, data=bytes([1]) * 700 * K),
    "longer": dict(command=WRITE, data=bytes([1]) * 3 * M),
    "fua": dict(command=WRITE, data=bytes([1]) * 8 * K, flags=FUA),
    "long fua": dict(command=WRITE, data=bytes([1]) * 700 * K, flags=FUA),
    "zeroes": dict(command=WRITE_ZEROES, length=2 * M, flags=NO_HOLE),
}


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_is_told_on_every_road(tmp_path, kind, transport):
    with served_from_a_tiny_disk(tmp_path, kind=kind, transport=transport) as server:
        for style in STYLES.values():
            with StyledClient(server, style) as client, StyledClient(server, style) as other:
                done = fill(client)
                assert 256 * K <= done <= M
                for name, request in FULL.items():
                    error, _ = client.ask(offset=8 * M, **request)
                    assert error == ENOSPC, name
                    # What was stored of it takes the room that the next one would need.
                    assert client.ask(WRITE_ZEROES, 8 * M, 4 * M) == (0, b"")
                    assert other.ask(READ, 0, done) == (0, data_for(0, done)), name
                assert client.ask(WRITE_ZEROES, 0, 16 * M) == (0, b"")
                assert client.ask(WRITE, 0, data=bytes(64 * K)) == (0, b""), "there is room again"
                assert client.ask(WRITE_ZEROES, 0, 16 * M) == (0, b"")


# Where system calls that save copies do not work, the storage is asked.


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(data_for(0, 8 * M))
    return path


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_that_cannot_be_spliced_to_is_written(serve, image, monkeypatch, code):
    splice = os.splice

    def no_files(source, target, count, offset_dst=None):
        if offset_dst is not None:
            raise OSError(code, "not here")
        return splice(source, target, count)

    monkeypatch.setattr(os, "splice", no_files)
    with RawClient(serve({"": image})) as client:
        data = os.urandom(3 * M)
        assert client.write(77, data) == 0
        assert client.ask(READ, 77, 3 * M) == (0, data)


def test_a_long_write_needs_no_pipe(serve, image, monkeypatch):
    def exhausted():
        raise OSError(errno.EMFILE, "too many open files")

    with RawClient(serve({"": image})) as client:
        monkeypatch.setattr(os, "pipe", exhausted)
        data = os.urandom(3 * M)
        assert client.write(77, data) == 0
        assert client.ask(READ, 77, 3 * M) == (0, data)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ESTALE, errno.EIO])
def test_a_file_that_cannot_be_sent_from_is_read(serve, image, monkeypatch, code):
    def not_here(*_):
        raise OSError(code, "not here")

    with RawClient(serve({"": image})) as client:
        assert client.ask(READ, 0, M) == (0, data_for(0, M))  # in the page cache from now on
        monkeypatch.setattr(os, "sendfile", not_here)
        assert client.ask(READ, 8, 2 * M) == (0, data_for(8, 2 * M))


# A file that becomes shorter.

CUT = M
SIZES = {"short": 4 * K, "lent": 64 * K, "sent": 512 * K, "longest": 3 * M}


def read_until_cut(client, length, cut):
    """Read in front of the cut and behind it until that fails; call `cut` in the middle of it.

    The data in front must be right at any time. Gives the error, or None if the server hung up,
    as it must if it is in the middle of a reply.
    """
    count = max(4, 2 * M // length)
    offsets = [M // 2, 4 * M] * count
    good = min(length, CUT - M // 2)
    stream = b"".join(
        client.pack(READ, offset, length, cookie=cookie) for cookie, offset in enumerate(offsets)
    )
    error = 0
    with contextlib.suppress(HungUpError):
        while not error:
            for cookie, offset in enumerate(offsets):
                client.expect(READ, offset, length, cookie)
            client.send(stream)
            for _ in offsets:
                answer = client.answer()
                cut()
                error = error or answer.error
                if not answer.error and offsets[answer.cookie] < CUT:
                    assert answer.data[:good] == data_for(M // 2, good)
        return error
    return None


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_cut_off_costs_no_more_than_its_end(tmp_path, image, kind, transport, style):
    with served(tmp_path, image, kind=kind, transport=transport) as server:
        for length in SIZES.values():
            image.write_bytes(PATTERN)
            with StyledClient(server, style) as client, StyledClient(server, SIMPLE) as other:
                begun = threading.Event()
                cutter = threading.Thread(target=_cut, args=(image, begun))
                cutter.start()
                assert read_until_cut(client, length, begun.set) in (EIO, None)
                cutter.join()
                assert other.ask(READ, 0, CUT) == (0, data_for(0, CUT))
                assert other.ask(READ, 4 * M, 4 * K)[0] == EIO
        assert server.is_alive()


def _cut(image, begun):
    assert begun.wait(20)
    os.truncate(image, CUT)


@pytest.mark.parametrize("folder", [tempfile.gettempdir(), "/dev/shm"])
@pytest.mark.parametrize("length", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("unix", [True, False], ids=["unix", "tcp"])
def test_what_was_cut_off_is_an_error_even_if_it_was_just_read(serve, length, folder, unix):
    if not Path(folder).is_dir():
        pytest.skip(f"there is no {folder}")
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(PATTERN)
        file.flush()
        service = serve({"": file.name}, **({} if unix else {"unix": None}))
        with RawClient(service) as client:
            for at in range(0, 8 * M, 512 * K):  # in the page cache from now on
                assert client.ask(READ, at, 512 * K) == (0, data_for(at, 512 * K))
            os.truncate(file.name, CUT)
            assert client.ask(READ, CUT, length) == (EIO, b"")
            assert client.ask(READ, 0, CUT) == (0, data_for(0, CUT))
            with contextlib.suppress(HungUpError):  # what is there was sent already
                assert client.ask(READ, CUT - 4 * K, length + 4 * K) == (EIO, b"")


# A storage that fails as told, in threads and without them.


@pytest.mark.parametrize("waits", [True, False], ids=["workers", "inline"])
@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_a_disk_with_bad_sectors_fails_where_they_are(serve, style, waits):
    storage = MemoryStorage(8 * M)
    storage.waits = waits

    def bad_sector(offset):
        if offset >= 4 * M:
            raise OSError(errno.EIO, "bad sector")

    storage.on_read = bad_sector
    with StyledClient(serve({"": storage}), style) as client:
        for length in SIZES.values():
            assert client.ask(READ, 4 * M, length)[0] == EIO
            assert client.ask(READ, 0, length) == (0, storage.data[:length])
