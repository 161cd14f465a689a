"""What RawStorage opens, and how it says that it does not."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest

from nbdlink.errors import StorageError
from nbdlink.storage.raw import RawStorage


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(range(256)) * 16)
    return path


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def refusal(path, **options):
    """Give message and hint of the refusal, which must leave no descriptor behind."""
    before = descriptors()
    with pytest.raises(StorageError) as caught:
        RawStorage.open(path, **options)
    assert descriptors() == before
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value), caught.value.hint or ""


def test_a_missing_file(tmp_path):
    message, hint = refusal(tmp_path / "nothing")
    assert "no such file" in message
    assert "truncate" in hint


def test_a_path_through_a_file(image):
    assert "not a directory" in refusal(image / "below")[0]


def test_a_directory(tmp_path):
    message, hint = refusal(tmp_path)
    assert "is a directory" in message
    assert "regular file" in hint


def test_a_fifo_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    assert "is a FIFO" in refusal(tmp_path / "fifo")[0]


def test_a_socket(tmp_path):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "socket"))
        assert "is a socket" in refusal(tmp_path / "socket")[0]


def test_a_character_device():
    assert "is a character device" in refusal("/dev/null")[0]


def test_an_empty_file(tmp_path):
    (tmp_path / "empty").touch()
    message, hint = refusal(tmp_path / "empty")
    assert "is empty" in message
    assert "truncate" in hint


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ETXTBSY])
def test_a_file_that_can_only_be_read(image, monkeypatch, code):
    # Raised by hand: to root, who runs the tests, all rights are given.
    real = os.open

    def read_only(path, flags, *rest):
        if flags & os.O_RDWR and str(path) == str(image):
            raise OSError(code, os.strerror(code))
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", read_only)
    message, hint = refusal(image)
    assert "cannot be written" in message
    assert "-r" in hint
    RawStorage.open(image, read_only=True).close()


def test_a_file_that_cannot_even_be_read(image, monkeypatch):
    def refused(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refused)
    monkeypatch.setattr(os, "access", lambda *_: False)
    message, hint = refusal(image)
    assert "permission denied" in message
    assert "-r" not in hint


def test_an_offset_behind_the_end(image):
    message, hint = refusal(image, offset=4096)
    assert "offset 4096" in message
    assert "4096 bytes" in hint


def test_a_window_past_the_end(image):
    message, hint = refusal(image, offset=4000, size=100)
    assert "4 bytes past its end" in message
    assert "96" in hint


@pytest.mark.parametrize("window", [{"offset": -1}, {"size": 0}, {"size": -5}])
def test_a_window_that_is_none(image, window):
    assert "cannot be negative" in refusal(image, **window)[0]


def test_a_window_is_what_is_served(image):
    storage = RawStorage.open(image, offset=3, size=10)
    buffer = bytearray(10)
    storage.read_into(memoryview(buffer), 0)
    assert storage.size == 10
    assert buffer == bytes(range(3, 13))
    storage.close()


def test_the_rest_of_the_file_is_the_default(image):
    storage = RawStorage.open(image, offset=4000)
    assert storage.size == 96
    storage.close()


def test_a_read_only_storage_cannot_be_written(image):
    storage = RawStorage.open(image, read_only=True)
    assert storage.read_only
    assert not storage.can_trim
    with pytest.raises(OSError, match="Bad file descriptor"):
        storage.write(memoryview(b"x"), 0, False)
    storage.close()
