"""What a raw file's extents tell, on the file systems that tests run on."""

from __future__ import annotations

import errno
import os
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdlink.storage.fallocate import PUNCH_HOLE, fallocate
from nbdlink.storage.raw import RawStorage

from .test_raw import FOLDERS

BLOCK = 4096
BLOCKS = 24
SIZE = BLOCKS * BLOCK
CONTEXT = "base:allocation"
HOLE = 3


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image"
    path.touch()
    os.truncate(path, SIZE)
    return path


@pytest.fixture
def storage(image):
    storage = RawStorage.open(image)
    yield storage
    storage.close()


def write(storage, data, offset):
    storage.write(memoryview(data), offset, False)


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
@settings(max_examples=60, deadline=None)
@given(
    filled=st.sets(st.integers(0, BLOCKS - 1)),
    punched=st.sets(st.integers(0, BLOCKS - 1)),
    window=st.tuples(st.integers(0, SIZE - 1), st.integers(0, SIZE - 1)).map(sorted),
    asked=st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(sorted),
)
def test_extents_tile_and_holes_read_as_zeroes(folder, filled, punched, window, asked):
    start, stop = window[0], window[1] + 1
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        os.truncate(file.name, SIZE)
        for block in filled:
            os.pwrite(file.fileno(), b"\xff" * BLOCK, block * BLOCK)
        for block in punched:
            fallocate(file.fileno(), PUNCH_HOLE, block * BLOCK, BLOCK)
        content = file.read()
        storage = RawStorage.open(file.name, offset=start, size=stop - start)
        try:
            offset = min(asked[0], storage.size - 1)
            length = max(1, min(asked[1], storage.size) - offset)
            at = start + offset
            for count, flags in storage.extents(CONTEXT, offset, length):
                assert count > 0
                if flags:
                    assert flags == HOLE
                    assert not any(content[at : at + count])
                at += count
            assert at == start + offset + length
        finally:
            storage.close()


def test_a_new_file_is_a_hole(storage):
    assert list(storage.extents(CONTEXT, 77, 1000)) == [(1000, HOLE)]
    assert storage.is_sparse


def test_what_was_just_written_is_data(storage):
    write(storage, b"x" * BLOCK, BLOCK)
    assert list(storage.extents(CONTEXT, 0, 3 * BLOCK)) == [
        (BLOCK, HOLE), (BLOCK, 0), (BLOCK, HOLE),
    ]  # fmt: skip


def test_what_was_trimmed_is_a_hole(storage):
    write(storage, b"x" * 4 * BLOCK, 0)
    storage.trim(BLOCK, BLOCK, False)
    assert [flags for _, flags in storage.extents(CONTEXT, 0, 4 * BLOCK)] == [0, HOLE, 0]


def test_a_file_that_is_full_is_not_looked_through(tmp_path):
    (tmp_path / "full").write_bytes(b"x" * SIZE)
    storage = RawStorage.open(tmp_path / "full")
    try:
        assert not storage.is_sparse
        storage.trim(0, BLOCK, False)
        assert storage.is_sparse, "now it may be worth it"
    finally:
        storage.close()


def test_a_hole_that_is_made_meanwhile_leaves_no_empty_extent(storage, image, monkeypatch):
    write(storage, b"x" * 2 * BLOCK, 0)
    lseek = os.lseek

    def late(fd, position, how):
        if how == os.SEEK_HOLE and position == 0:
            with image.open("r+b") as file:
                fallocate(file.fileno(), PUNCH_HOLE, 0, BLOCK)
        return lseek(fd, position, how)

    monkeypatch.setattr(os, "lseek", late)
    assert list(storage.extents(CONTEXT, 0, 2 * BLOCK)) == [(BLOCK, HOLE), (BLOCK, 0)]


def test_a_file_that_became_shorter_has_no_holes_there(storage, image):
    os.truncate(image, BLOCK)
    with pytest.raises(OSError, match="shorter") as caught:
        list(storage.extents(CONTEXT, 2 * BLOCK, BLOCK))
    assert caught.value.errno == errno.EIO


def test_a_file_system_that_cannot_tell_has_data_only(storage, monkeypatch):
    def unknown(fd, position, how):
        raise OSError(errno.EINVAL, "what is SEEK_DATA?")

    monkeypatch.setattr(os, "lseek", unknown)
    assert list(storage.extents(CONTEXT, 0, SIZE)) == [(SIZE, 0)]


def test_other_failures_are_told(storage, monkeypatch):
    def broken(fd, position, how):
        raise OSError(errno.EIO, "bad sector")

    monkeypatch.setattr(os, "lseek", broken)
    with pytest.raises(OSError, match="bad sector"):
        list(storage.extents(CONTEXT, 0, SIZE))
