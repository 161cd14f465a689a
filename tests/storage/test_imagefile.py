"""PosixFile: what an image format asks of the file that it is in."""

from __future__ import annotations

import errno
import os

import pytest

from nbdlink.errors import StorageError
from nbdlink.storage import fallocate as fallocation
from nbdlink.storage.imagefile import PosixFile

K = 1024

# What a disk, and what a server of files, may say of a write-back.
LOSSES = [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ENODATA, errno.ETIMEDOUT, errno.ESTALE]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(os.urandom(64 * K))
    return path


@pytest.fixture
def file(path):
    file = PosixFile.open(path, read_only=False)
    yield file
    file.close()


def read(file, position, length):
    buffer = bytearray(b"?" * length)
    file.read_at(memoryview(buffer), position)
    return bytes(buffer)


def test_what_is_behind_the_end_reads_as_zeroes(file, path):
    content = path.read_bytes()
    assert read(file, 63 * K, 3 * K) == content[63 * K :] + bytes(2 * K)
    assert read(file, 100 * K, K) == bytes(K)


def test_writing_behind_the_end_makes_it_longer(file):
    file.write_at(b"x" * K, 100 * K)
    assert file.size == 101 * K
    assert read(file, 64 * K, 37 * K) == bytes(36 * K) + b"x" * K


def test_the_kernel_may_read_in_small_pieces(file, path, monkeypatch):
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, v, at: preadv(fd, [v[0][:1000]], at))
    assert read(file, 0, 70 * K) == path.read_bytes() + bytes(6 * K)


def test_the_kernel_may_write_in_small_pieces(file, path, monkeypatch):
    data = os.urandom(10 * K)
    pwritev = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, v, at: pwritev(fd, [v[0][:1000]], at))
    file.write_at(data, 77)
    assert path.read_bytes()[77 : 77 + len(data)] == data


def test_a_file_that_takes_nothing_is_an_io_error(file, monkeypatch):
    monkeypatch.setattr(os, "pwritev", lambda fd, v, at: 0)
    with pytest.raises(OSError, match="takes no more bytes") as caught:
        file.write_at(b"x", 0)
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("code", LOSSES)
def test_after_a_lost_write_every_flush_fails(code, file, monkeypatch):
    def lost(fd):
        raise OSError(code, "lost")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", lost)
        with pytest.raises(OSError, match="lost"):
            file.flush()
    with pytest.raises(OSError, match="earlier writes were lost") as caught:
        file.flush()
    assert caught.value.errno == code


def test_another_failure_of_a_flush_is_not_for_ever(file, monkeypatch):
    def interrupted(fd):
        raise OSError(errno.ENOMEM, "no memory")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", interrupted)
        with pytest.raises(OSError, match="no memory"):
            file.flush()
    file.flush()


@pytest.mark.parametrize("may_trim", [True, False])
def test_zeroes_without_writing_them(may_trim, file):
    if file.zero_at(10 * K, 20 * K, may_trim=may_trim):
        assert read(file, 10 * K, 20 * K) == bytes(20 * K)
        assert file.size == 64 * K


def test_zeroes_behind_the_end_make_the_file_longer(file, path):
    content = path.read_bytes()
    assert file.zero_at(60 * K, 40 * K, may_trim=True)
    assert path.read_bytes() == content[: 60 * K] + bytes(40 * K)


def test_a_file_system_that_cannot_zero_says_so_and_changes_nothing(file, path, monkeypatch):
    def no(*_):
        raise OSError(errno.EOPNOTSUPP, "not here")

    content = path.read_bytes()
    monkeypatch.setattr(fallocation, "fallocate", no)
    assert not file.zero_at(0, K, may_trim=True)
    file.discard_at(0, K)
    assert path.read_bytes() == content


def test_extents_tell_data_from_holes(file):
    file.truncate(4096 * K)
    file.write_at(b"x" * 4096, 1024 * K)
    found = list(file.extents(0, 5000 * K))
    assert sum(length for length, _ in found) == 5000 * K
    assert found[0] == (64 * K, True)
    assert not found[-1][1]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(StorageError, match="nowhere cannot be opened: no such file"):
        PosixFile.open(tmp_path / "nowhere", read_only=True)


def test_a_folder_is_no_image(tmp_path):
    with pytest.raises(StorageError, match="neither a regular file nor a block device"):
        PosixFile.open(tmp_path, read_only=True)


def test_closing_twice_is_fine(path):
    file = PosixFile.open(path, read_only=True)
    file.close()
    file.close()
