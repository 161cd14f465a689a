"""Files without the page cache: any alignment, and sizes that are no whole number of blocks."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings

from nbdlink.errors import StorageError
from nbdlink.storage.direct import DirectStorage

from .arrays import play, read, scripts, write

ODD = 5 * 4096 + 777


@pytest.mark.parametrize("start", [0, 515])
@settings(max_examples=60, deadline=None)
@given(script=scripts(ODD))
def test_a_file_of_any_size_behaves_as_an_array_of_bytes(start, script):
    before, model = os.urandom(start), bytearray(os.urandom(ODD))
    with tempfile.NamedTemporaryFile(dir=tempfile.gettempdir()) as file:
        file.write(before + model)
        file.flush()
        storage = DirectStorage.open(file.name, offset=start)
        try:
            play(storage, model, script)
            assert read(storage) == model
        finally:
            storage.close()
        assert Path(file.name).read_bytes() == before + model


@pytest.fixture
def storage(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(3 << 20))
    storage = DirectStorage.open(path)
    yield storage
    storage.close()


def test_every_request_to_the_kernel_is_aligned(storage, monkeypatch):
    seen = []
    for name in ("preadv", "pwritev"):
        real = getattr(os, name)

        def call(fd, buffers, position, flags=0, real=real):
            seen.append((len(buffers[0]), position))
            return real(fd, buffers, position, flags)

        monkeypatch.setattr(os, name, call)
    write(storage, b"x" * 3_000_001, 77)
    assert read(storage, 77, 3_000_001) == b"x" * 3_000_001
    assert len(seen) > 6
    assert not any((length | position) % 512 for length, position in seen)


def test_nothing_of_it_is_in_the_page_cache(storage):
    os.fsync(storage._fd)
    while resident(storage.path):  # from when it was made
        os.posix_fadvise(storage._fd, 0, 0, os.POSIX_FADV_DONTNEED)
    write(storage, b"x" * 100_000, 1 << 20)
    write(storage, b"y" * 100_000, (1 << 20) + 1)
    read(storage)
    assert resident(storage.path) == 0


def resident(path):
    """Give how many pages of a file are in the page cache."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as pages:
        first = ctypes.c_char.from_buffer(pages)
        answer = ctypes.create_string_buffer(-(-len(pages) // mmap.PAGESIZE))
        libc = ctypes.CDLL(None, use_errno=True)
        where = ctypes.c_void_p(ctypes.addressof(first))
        failed = libc.mincore(where, ctypes.c_size_t(len(pages)), answer)
        del first, where
    assert not failed
    return sum(each & 1 for each in answer.raw)


def _write_beside(monkeypatch, storage, other, data, offset):
    """Write part of a block, and in the middle of that something else to `other`."""
    real, others = os.preadv, []

    def preadv(fd, buffers, position, flags=0):
        count = real(fd, buffers, position, flags)
        if not others:
            others.append(threading.Thread(target=write, args=(other, data, offset)))
            others[0].start()
            others[0].join(0.3)  # comes back at once if the neighbour does not wait
        return count

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", preadv)
        write(storage, b"a" * 100, 0)
        others[0].join()


@pytest.mark.parametrize(("offset", "length"), [(200, 100), (0, 4096), (200, 8192)])
def test_a_neighbour_waits_while_a_block_is_read_to_be_written_back(
    storage, monkeypatch, offset, length
):
    # What it wrote in between would be undone.
    _write_beside(monkeypatch, storage, storage, b"b" * length, offset)
    content = read(storage, 0, 16384)
    assert content[max(100, offset) : offset + length] == b"b" * (
        offset + length - max(100, offset)
    )
    assert content[: min(offset, 100)] == b"a" * min(offset, 100)


def test_a_neighbour_of_another_export_of_the_file_waits_as_well(storage, monkeypatch):
    other = DirectStorage.open(storage.path, offset=200)
    _write_beside(monkeypatch, storage, other, b"b" * 100, 0)
    assert read(storage, 200, 100) == b"b" * 100
    other.close()


def test_a_file_that_was_cut_off_is_an_error(storage):
    os.truncate(storage.path, 1 << 20)
    with pytest.raises(OSError, match="shorter") as caught:
        read(storage)
    assert caught.value.errno == errno.EIO


def test_a_file_system_that_cannot_is_named(tmp_path, monkeypatch):
    real = os.open

    def refuse(path, flags, *rest, **options):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *rest, **options)

    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StorageError, match="without the page cache") as caught:
        DirectStorage.open(path)
    assert "--cache writeback" in caught.value.hint


def test_a_file_smaller_than_a_block(tmp_path):
    path = tmp_path / "tiny.img"
    path.write_bytes(b"a" * 100)
    storage = DirectStorage.open(path)
    write(storage, b"b" * 10, 5)
    assert read(storage) == b"a" * 5 + b"b" * 10 + b"a" * 85
    assert storage.head(512) == read(storage)
    storage.close()
    assert path.stat().st_size == 100


def test_a_file_that_grows_is_noticed(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(b"a" * 1000)
    storage = DirectStorage.open(path)
    os.truncate(path, 5001)
    storage.notice_growth()
    assert storage.size == 5001
    write(storage, b"z" * 4500, 501)
    storage.close()
    assert path.read_bytes() == b"a" * 501 + b"z" * 4500
