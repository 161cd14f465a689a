"""What a storage gets for nothing: zeroes written the plain way."""

from __future__ import annotations

import errno

import pytest

from nbdlink.storage.base import Storage


class Plain(Storage):
    """Implements what must be implemented, and nothing else."""

    name = "plain"
    read_only = False
    zero_chunk = 100

    def __init__(self, size=1000):
        self.size = size
        self.data = bytearray(b"x" * size)
        self.writes = []
        self.flushes = 0

    def read_into(self, buffer, offset):
        buffer[:] = self.data[offset : offset + len(buffer)]

    def write(self, buffer, offset, fua):
        self.writes.append(len(buffer))
        self.data[offset : offset + len(buffer)] = buffer

    def flush(self):
        self.flushes += 1

    def close(self):
        pass


@pytest.fixture
def storage():
    return Plain()


@pytest.mark.parametrize(("offset", "length"), [(0, 1000), (7, 100), (7, 101), (999, 1), (5, 0)])
def test_zeroes_are_written_where_they_belong(storage, offset, length):
    storage.zero(offset, length, may_trim=True, fast=False, fua=False)
    rest = 1000 - offset - length
    assert storage.data == b"x" * offset + bytes(length) + b"x" * rest
    assert not storage.flushes


def test_zeroes_are_written_in_bounded_pieces(storage):
    storage.zero(0, 250, may_trim=True, fast=False, fua=False)
    assert storage.writes == [100, 100, 50]


def test_durable_zeroes_are_flushed(storage):
    storage.zero(0, 250, may_trim=True, fast=False, fua=True)
    assert storage.flushes == 1


def test_fast_zeroes_are_refused(storage):
    with pytest.raises(OSError, match="no faster") as caught:
        storage.zero(0, 250, may_trim=True, fast=True, fua=False)
    assert caught.value.errno == errno.ENOTSUP
    assert storage.data == b"x" * 1000


def test_hints_change_nothing(storage):
    storage.trim(0, 1000, False)
    storage.cache(0, 1000)
    assert storage.data == b"x" * 1000
