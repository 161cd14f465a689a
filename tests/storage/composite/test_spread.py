"""Linear and striped storages are arrays of bytes, and each byte lies where it should."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdlink.errors import StorageError
from nbdlink.storage.composite.spread import Linear, Stripe
from nbdlink.storage.raw import RawStorage

from ..arrays import SIZE, play, read, scripts, told, write

sizes = st.lists(st.integers(1, SIZE), min_size=2, max_size=4)
units = st.sampled_from([1, 7, 512, 4096])


@contextlib.contextmanager
def files(sizes):
    """Give open files of these sizes, and their paths."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        paths = [Path(folder, f"{number}.img") for number in range(len(sizes))]
        members = []
        for path, size in zip(paths, sizes, strict=True):
            path.write_bytes(os.urandom(size))
            members.append(RawStorage.open(path))
            stack.callback(members[-1].close)
        yield members, paths


@given(sizes, st.data())
def test_linear_storages_lie_end_to_end(sizes, data):
    with files(sizes) as (members, paths):
        storage = Linear(members)
        model = bytearray(b"".join(path.read_bytes() for path in paths))
        assert storage.size == len(model)
        play(storage, model, data.draw(scripts(storage.size)))
        storage.flush()
        assert read(storage) == model
        assert b"".join(path.read_bytes() for path in paths) == model


@given(sizes, units, st.data())
def test_stripes_alternate_by_the_unit(sizes, unit, data):
    with files([size + unit for size in sizes]) as (members, paths):
        storage = Stripe(members, unit)
        rows = min(path.stat().st_size for path in paths) // unit
        assert storage.size == rows * unit * len(paths)

        def interleaved():
            contents = [path.read_bytes() for path in paths]
            places = [(row * unit, each) for row in range(rows) for each in contents]
            return b"".join(each[at : at + unit] for at, each in places)

        model = bytearray(interleaved())
        play(storage, model, data.draw(scripts(storage.size)))
        storage.flush()
        assert read(storage) == model == interleaved()


@given(sizes, units, st.data())
def test_parts_of_stripes_are_read_as_of_the_whole(sizes, unit, data):
    with files([size + unit for size in sizes]) as (members, _):
        storage = Stripe(members, unit)
        begin = data.draw(st.integers(0, storage.size))
        end = data.draw(st.integers(begin, storage.size))
        assert read(storage, begin, end - begin) == read(storage)[begin:end]


def holed(path, pattern):
    """Make a file of blocks of 64 KiB, data where the pattern has an x."""
    with path.open("wb") as file:
        for number, mark in enumerate(pattern):
            file.seek(number << 16)
            if mark == "x":
                file.write(b"x" * (1 << 16))
        file.truncate(len(pattern) << 16)
    return RawStorage.open(path)


@pytest.mark.parametrize(
    ("make", "picture"),
    [
        (Linear, "x..xxx...."),
        (lambda members: Stripe(members, 1 << 16), "xx....x.x."),
        # Every other half block: those of the first storage.
        (lambda members: Stripe(members, 1 << 15), "xx....xxxx"),
    ],
    ids=["linear", "stripe", "stripe by halves"],
)
def test_holes_are_told_wherever_they_are(tmp_path, make, picture):
    storage = make([holed(tmp_path / "a", "x..xx"), holed(tmp_path / "b", "x....")])
    found = ["?"] * (storage.size >> 15)
    for offset, length, flags in told(storage):
        found[offset >> 15 : offset + length >> 15] = ("." if flags else "x") * (length >> 15)
    data = ["x" if any(read(storage, at << 15, 1 << 15)) else "." for at in range(len(found))]
    assert found == data
    assert "".join(found[::2]) == picture
    storage.close()


def test_extents_of_an_empty_giant_come_at_once(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.touch()
        os.truncate(path, 1 << 42)
    storage = Stripe([RawStorage.open(path) for path in paths], 4096)
    assert len(list(storage.extents("base:allocation", 0, storage.size))) < 10
    storage.close()


def test_what_fails_in_one_member_is_told(tmp_path):
    with files([8192, 8192]) as (members, paths):
        storage = Linear(members)
        os.truncate(paths[1], 0)
        with pytest.raises(OSError, match="shorter") as caught:
            read(storage)
        assert caught.value.errno == errno.EIO
        assert len(read(storage, 0, 8192)) == 8192


def test_long_requests_go_to_all_members_at_once(tmp_path):
    with files([4 << 20, 4 << 20]) as (members, _):
        storage = Stripe(members, 4096)
        data = os.urandom(storage.size)
        write(storage, data, 0, fua=True)
        assert read(storage) == data


@pytest.mark.parametrize("unit", [0, 8192])
def test_a_unit_of_no_use_is_refused(unit):
    with files([4096, 8192]) as (members, _), pytest.raises(StorageError):
        Stripe(members, unit)


def test_one_storage_is_too_few():
    with files([4096]) as (members, _), pytest.raises(StorageError, match="two storages or more"):
        Linear(members)


def test_a_linear_storage_grows_with_its_last_member():
    with files([1000, 2000]) as (members, paths):
        storage = Linear(members)
        os.truncate(paths[0], 5000)
        storage.notice_growth()
        assert storage.size == 3000
        os.truncate(paths[1], 2500)
        storage.notice_growth()
        assert storage.size == 3500
        write(storage, b"x" * 500, 3000)
        assert paths[1].read_bytes()[2000:] == b"x" * 500


def test_stripes_grow_by_the_rows_that_all_members_have():
    with files([1024, 1024]) as (members, paths):
        storage = Stripe(members, 512)
        before = read(storage)
        os.truncate(paths[0], 4096)
        storage.notice_growth()
        assert storage.size == 2048
        os.truncate(paths[1], 2000)
        storage.notice_growth()
        assert storage.size == 3 * 1024
        assert read(storage, 0, 2048) == before
        write(storage, b"x" * 1024, 2048)
        assert all(path.read_bytes()[1024:1536] == b"x" * 512 for path in paths)
