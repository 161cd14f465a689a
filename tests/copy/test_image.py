"""Copying between files, streams and exports of our own server."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from nbdlink.copy import engine, ranges
from nbdlink.copy.engine import Tuning
from nbdlink.copy.image import CopySpec, Summary, copy, export_of
from nbdlink.errors import ConfigError, NBDError, StorageError
from nbdlink.server import serve_in_thread

from ..storage.test_raw_device import loop_device

SIZE = 3 << 20


def patterned(path, size=SIZE):
    """Make a file of data, a hole, zeroes that take space, and data that is no whole block."""
    with path.open("wb") as file:
        file.truncate(size)
        file.write(os.urandom(700_001))
        file.seek(1 << 20)
        file.write(bytes(300_000))
        file.seek(2 << 20)
        file.write(os.urandom(size - (2 << 20)))
    return path


@pytest.fixture
def source(tmp_path):
    return patterned(tmp_path / "source.img")


@pytest.fixture
def export(tmp_path):
    """Serve a file of SIZE bytes of something; give the file and its URI."""
    path = tmp_path / "export.img"
    path.write_bytes(os.urandom(SIZE))
    with serve_in_thread({"": path}, unix=tmp_path / "export.sock") as service:
        yield path, service.uri()


def blocks(path):
    return Path(path).stat().st_blocks * 512


@pytest.mark.parametrize("connections", [None, 1, 3])
@pytest.mark.parametrize("request_size", [4096, 1 << 20])
def test_a_file_comes_to_an_export_as_it_is(source, export, connections, request_size):
    path, uri = export
    tuning = Tuning(request_size=request_size, requests=3)
    summary = copy(CopySpec(str(source), uri, connections, tuning, verify=True))
    assert path.read_bytes() == source.read_bytes()
    assert summary.size == summary.data + summary.zeroes == SIZE
    assert summary.verified
    if connections:
        assert summary.connections == connections


@pytest.mark.parametrize("connections", [None, 1])
def test_an_export_comes_to_a_new_file_as_it_is(source, tmp_path, connections):
    new = tmp_path / "new.img"
    with serve_in_thread({"": source}, unix=tmp_path / "socket") as service:
        copy(CopySpec(service.uri(), str(new), connections, verify=True))
    assert new.read_bytes() == source.read_bytes()


def test_an_export_comes_to_another_export(source, export, tmp_path):
    path, uri = export
    with serve_in_thread({"": source}, unix=tmp_path / "socket") as service:
        copy(CopySpec(service.uri(), uri, tuning=Tuning(request_size=4096), verify=True))
    assert path.read_bytes() == source.read_bytes()


def test_holes_and_zeroes_take_no_space_in_a_new_file(source, tmp_path):
    new = tmp_path / "new.img"
    with serve_in_thread({"": source}, unix=tmp_path / "socket") as service:
        summary = copy(CopySpec(service.uri(), str(new)))
    assert summary.zeroes >= 1_300_000
    assert blocks(new) <= SIZE - 1_300_000


def test_holes_take_space_if_that_is_asked_for(source, tmp_path):
    new = tmp_path / "new.img"
    with serve_in_thread({"": source}, unix=tmp_path / "socket") as service:
        copy(CopySpec(service.uri(), str(new), tuning=Tuning(allocate=True)))
    assert new.read_bytes() == source.read_bytes()
    assert blocks(new) >= SIZE


def test_zeroes_in_data_are_sent_if_nobody_looks_for_them(tmp_path):
    zeroes, new = tmp_path / "zeroes", tmp_path / "new.img"
    zeroes.write_bytes(bytes(100_000))
    with zeroes.open("rb") as file, serve_in_thread({"": zeroes}) as service:
        has_extents = os.lseek(file.fileno(), 0, os.SEEK_HOLE) == 100_000
        summary = copy(CopySpec(service.uri(), str(new), tuning=Tuning(sparse=0)))
    assert has_extents
    assert summary.data == 100_000


def test_what_the_destination_had_is_overwritten_by_zeroes_too(source, tmp_path):
    old = tmp_path / "old.img"
    old.write_bytes(b"x" * (SIZE + 10))
    with serve_in_thread({"": source}, unix=tmp_path / "socket") as service:
        copy(CopySpec(service.uri(), str(old)))
    assert old.read_bytes() == source.read_bytes() + b"x" * 10


def test_a_file_system_without_holes_gets_zeroes_written(source, tmp_path, monkeypatch):
    def cannot(*_):
        raise OSError(errno.EOPNOTSUPP, "not here")

    monkeypatch.setattr("nbdlink.copy.files.fallocate", cannot)
    old = tmp_path / "old.img"
    old.write_bytes(b"x" * SIZE)
    with serve_in_thread({"": source}, unix=tmp_path / "socket") as service:
        copy(CopySpec(service.uri(), str(old)))
    assert old.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("exists", [False, True])
def test_a_file_comes_to_a_file(source, tmp_path, by_hand, exists, monkeypatch):
    if by_hand:
        monkeypatch.setattr(ranges.os, "copy_file_range", lambda *_: 0)
    new = tmp_path / "new.img"
    if exists:
        new.write_bytes(b"x" * SIZE)
    summary = copy(CopySpec(str(source), str(new), verify=True))
    assert new.read_bytes() == source.read_bytes()
    assert summary.zeroes


@pytest.mark.parametrize("size", [1, 4095, 4097])
def test_odd_sizes_are_copied_to_the_last_byte(tmp_path, size):
    source, new = tmp_path / "source", tmp_path / "new"
    source.write_bytes(os.urandom(size))
    with serve_in_thread({"": source}, unix=tmp_path / "socket") as service:
        summary = copy(CopySpec(service.uri(), str(new), verify=True))
    assert new.read_bytes() == source.read_bytes()
    assert summary.size == size


def test_an_empty_file_is_copied_too(tmp_path):
    source, new = tmp_path / "source", tmp_path / "new"
    source.touch()
    assert copy(CopySpec(str(source), str(new), verify=True)).size == 0
    assert new.read_bytes() == b""


def test_nothing_at_all_is_left_of_what_goes_to_null(export):
    _, uri = export
    assert copy(CopySpec(uri, "null:")).data == SIZE


# Streams.


def test_a_stream_fills_an_export_from_its_beginning(tmp_path, export):
    path, uri = export
    before, content = path.read_bytes(), os.urandom(1_000_001)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = threading.Thread(target=fifo.write_bytes, args=(content,))
    writer.start()
    summary = copy(CopySpec(str(fifo), uri))
    writer.join()
    assert summary.size == len(content)
    assert path.read_bytes() == content + before[len(content) :]


def test_a_stream_makes_a_file_of_its_length(tmp_path):
    fifo, new = tmp_path / "fifo", tmp_path / "new"
    os.mkfifo(fifo)
    writer = threading.Thread(target=fifo.write_bytes, args=(b"abc" + bytes(1 << 20),))
    writer.start()
    copy(CopySpec(str(fifo), str(new)))
    writer.join()
    assert new.read_bytes() == b"abc" + bytes(1 << 20)


def test_an_export_streams_in_order(source, tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    got = []
    reader = threading.Thread(target=lambda: got.append(fifo.read_bytes()))
    reader.start()
    with serve_in_thread({"": source}, unix=tmp_path / "socket") as service:
        copy(CopySpec(service.uri(), str(fifo), tuning=Tuning(request_size=4096)))
    reader.join()
    assert got[0] == source.read_bytes()


def test_a_stream_whose_zeroes_reach_past_the_end_of_a_device_is_an_error(tmp_path):
    # There the kernel makes a hole of as much as there is, and says that all is well.
    disk, fifo = tmp_path / "disk.img", tmp_path / "fifo"
    disk.write_bytes(os.urandom(1_000_448))
    os.mkfifo(fifo)
    with loop_device(disk) as device:
        writer = threading.Thread(target=fifo.write_bytes, args=(bytes(1 << 20),))
        writer.start()
        with pytest.raises(StorageError, match="cannot be written at 1000448: no space left"):
            copy(CopySpec(str(fifo), device))
        writer.join()


def test_a_stream_that_is_too_long_is_an_error(tmp_path):
    small, fifo = tmp_path / "small", tmp_path / "fifo"
    small.write_bytes(bytes(10_000))
    os.mkfifo(fifo)

    def write():
        with fifo.open("wb", buffering=0) as file:
            try:
                file.write(b"x" * (4 << 20))
            except BrokenPipeError:
                return

    writer = threading.Thread(target=write)
    writer.start()
    with (
        serve_in_thread({"": small}, unix=tmp_path / "socket") as service,
        pytest.raises(NBDError, match="ends at 10000") as caught,
    ):
        copy(CopySpec(str(fifo), service.uri()))
    writer.join()
    assert "is incomplete" in caught.value.hint


# What cannot be.


@pytest.mark.parametrize(
    ("source_", "destination", "says"),
    [
        ("{a}", "{a}", "are the same"),
        ("{a}", "{link}", "are the same"),
        ("nbd://h:1/x", "h:1/x", "are the same"),
        ("null:", "{a}", "for a destination"),
        ("{nothing}", "{nothing}", "are the same"),
    ],
)
def test_what_makes_no_sense_is_refused(source_, destination, says, tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "link").symlink_to("a")
    names = {name: tmp_path / name for name in ("a", "link", "nothing")}
    with pytest.raises(ConfigError, match=says):
        copy(CopySpec(source_.format(**names), destination.format(**names)))
    assert (tmp_path / "a").read_bytes() == b"x"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"connections": 0}, "0 connections"),
        ({"tuning": Tuning(requests=0)}, "0 requests"),
        ({"tuning": Tuning(request_size=1000)}, "requests of 1000 bytes"),
        ({"tuning": Tuning(request_size=64 << 20)}, "requests of 67108864 bytes"),
        ({"tuning": Tuning(sparse=100)}, "blocks of zeroes of 100 bytes"),
    ],
)
def test_impossible_tuning_is_refused(options, says):
    with pytest.raises(ConfigError, match=says):
        copy(CopySpec("/a", "/b", **options))


@pytest.mark.parametrize("destination", ["-", "null:", "/dev/null"])
def test_what_cannot_be_read_again_is_not_verified(destination, source):
    with pytest.raises(ConfigError, match="read again"):
        copy(CopySpec(str(source), destination, verify=True))


def test_a_smaller_file_is_left_alone(source, tmp_path):
    small = tmp_path / "small"
    small.write_bytes(b"x")
    with pytest.raises(ConfigError, match="has only 1 bytes") as caught:
        copy(CopySpec(str(source), str(small)))
    assert f"truncate -s {SIZE}" in caught.value.hint
    assert small.read_bytes() == b"x"


def test_a_smaller_export_is_left_alone(tmp_path, export):
    path, uri = export
    before = path.read_bytes()
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(SIZE + 1)
    with pytest.raises(ConfigError, match=f"has only {SIZE} bytes"):
        copy(CopySpec(str(large), uri))
    assert path.read_bytes() == before


def test_a_read_only_export_is_not_written(source, tmp_path):
    other = tmp_path / "other"
    other.write_bytes(bytes(SIZE))
    with (
        serve_in_thread({"": other}, unix=tmp_path / "socket", read_only=True) as service,
        pytest.raises(ConfigError, match="is read-only"),
    ):
        copy(CopySpec(str(source), service.uri()))


@pytest.mark.parametrize(
    ("source_", "destination", "says"),
    [
        ("{tmp}/nothing", "{tmp}/new", "cannot be opened: no such file"),
        ("{tmp}", "{tmp}/new", "is a directory"),
        ("{tmp}/source.img", "{tmp}", "is a directory"),
        ("{tmp}/source.img", "{tmp}/no/such/folder", "cannot be opened"),
        ("{tmp}/source.img", "/dev/full", "cannot be written at 0: no space left"),
    ],
)
def test_what_cannot_be_opened_or_written_is_named(source_, destination, says, source, tmp_path):
    with pytest.raises(StorageError, match=says):
        copy(CopySpec(source_.format(tmp=tmp_path), destination.format(tmp=tmp_path)))


def test_a_source_that_shrinks_is_an_error(source, tmp_path, export, monkeypatch):
    real, shrunk = os.preadv, []

    def preadv(*arguments):
        if not shrunk:
            shrunk.append(True)
            os.truncate(source, 100_000)
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(StorageError, match=f"ends at 100000 now; it had {SIZE}"):
        copy(CopySpec(str(source), export[1], tuning=Tuning(request_size=4096)))


def test_a_new_file_that_is_incomplete_is_left_and_said_to_be(source, tmp_path, monkeypatch):
    new = tmp_path / "new"

    def fails(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pwritev", fails)
    with (
        serve_in_thread({"": source}, unix=tmp_path / "socket") as service,
        pytest.raises(StorageError, match=r"cannot be written at \d+: input") as caught,
    ):
        copy(CopySpec(service.uri(), str(new)))
    assert f"{new} is incomplete" in caught.value.hint
    assert new.exists()


# Verifying.


@pytest.mark.parametrize("at", [0, 700_000, SIZE - 1])
def test_the_first_difference_is_named(source, tmp_path, monkeypatch, at):
    new = tmp_path / "new"
    real = engine.run_lanes

    def run(*arguments):
        real(*arguments)
        with new.open("r+b") as file:
            for place in {at, SIZE - 1}:
                file.seek(place)
                byte = file.read(1)
                file.seek(place)
                file.write(bytes([byte[0] ^ 1]))
        monkeypatch.setattr("nbdlink.copy.image.run_lanes", real)

    monkeypatch.setattr("nbdlink.copy.image.run_lanes", run)
    tuning = Tuning(request_size=4096)
    with (
        serve_in_thread({"": source}, unix=tmp_path / "socket") as service,
        pytest.raises(StorageError, match=rf"differs from .* at offset {at}$"),
    ):
        copy(CopySpec(service.uri(), str(new), tuning=tuning, verify=True))


def test_progress_is_told_up_to_the_end(source, export):
    told = {}

    def watch(what, total):
        told[what] = [total]
        return told[what].append

    summary = copy(CopySpec(str(source), export[1], verify=True), watch)
    assert isinstance(summary, Summary)
    assert {what: (seen[0], seen[-1]) for what, seen in told.items()} == {
        "copying": (SIZE, SIZE),
        "verifying": (SIZE, SIZE),
    }


# What is an export, and what a path.


@pytest.mark.parametrize(
    ("word", "host"),
    [
        ("store1:10809", "store1"),
        ("10.0.0.1:10809/data", "10.0.0.1"),
        ("[fd00::1]:10809/data", "fd00::1"),
        ("[fe80::1%eth0.7]:10809", "fe80::1%eth0.7"),
        ("nbd://store1/data", "store1"),
    ],
)
def test_an_address_with_a_port_is_an_export(word, host):
    assert export_of(word).host == host


@pytest.mark.parametrize("word", ["disk.img", "a:b", "[x]:1", "./store1:10809", "-"])
def test_what_is_no_address_is_a_path(word):
    assert export_of(word) is None
