"""RawStorage against a bytearray, on the file systems that tests run on."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdlink.storage import fallocate as fallocation
from nbdlink.storage.fallocate import fallocate
from nbdlink.storage.raw import RawStorage

from .arrays import play

K = 1024

# What a disk, and what a server of files, may say of a write-back.
LOSSES = [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ENODATA, errno.ETIMEDOUT, errno.ESTALE]
FOLDERS = [Path(tempfile.gettempdir())]
if Path("/dev/shm").is_dir():
    FOLDERS.append(Path("/dev/shm"))  # tmpfs has holes, but no ZERO_RANGE


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(64 * K))
    return path


@pytest.fixture
def storage(image):
    storage = RawStorage.open(image)
    yield storage
    storage.close()


def read(storage, offset=0, length=None):
    buffer = bytearray(storage.size - offset if length is None else length)
    storage.read_into(memoryview(buffer), offset)
    return bytes(buffer)


def write(storage, data, offset, fua=False):
    storage.write(memoryview(data), offset, fua)


def no_fallocate(fd, mode, offset, length):
    raise OSError(errno.EOPNOTSUPP, "not here")


# Every sequence of requests leaves what it would leave in an array of bytes.

SIZE = 40 * K
START = 515

ranges = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(sorted)
requests = st.one_of(
    st.tuples(st.just("write"), ranges, st.booleans(), st.integers(0, 255)),
    st.tuples(st.just("zero"), ranges, st.booleans(), st.booleans()),
    st.tuples(st.just("trim"), ranges, st.booleans(), st.none()),
    st.tuples(st.just("cache"), ranges, st.none(), st.none()),
)


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
@pytest.mark.parametrize("offload", [True, False], ids=["fallocate", "no fallocate"])
@settings(max_examples=60, deadline=None)
@given(script=st.lists(requests, max_size=8))
def test_a_window_behaves_as_an_array_of_bytes(folder, offload, script):
    before, after = os.urandom(START), os.urandom(777)
    model = bytearray(os.urandom(SIZE))
    with pytest.MonkeyPatch.context() as patch, tempfile.NamedTemporaryFile(dir=folder) as file:
        if not offload:
            patch.setattr(fallocation, "fallocate", no_fallocate)
        file.write(before + model + after)
        file.flush()
        storage = RawStorage.open(file.name, offset=START, size=SIZE)
        try:
            play(storage, model, script)
            assert read(storage) == model
        finally:
            storage.close()
        assert Path(file.name).read_bytes() == before + model + after


# Reading and writing.


def test_the_kernel_may_read_in_small_pieces(storage, image, monkeypatch):
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, v, at: preadv(fd, [v[0][:1000]], at))
    assert read(storage) == image.read_bytes()


def test_the_kernel_may_write_in_small_pieces(storage, image, monkeypatch):
    data = os.urandom(10 * K)
    pwritev = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, v, at, f: pwritev(fd, [v[0][:1000]], at, f))
    write(storage, data, 77)
    assert image.read_bytes()[77 : 77 + len(data)] == data


@pytest.mark.parametrize("offset", [0, 32 * K, 63 * K])
def test_reading_where_the_file_was_cut_off_is_an_io_error(storage, image, offset):
    os.truncate(image, 10 * K)
    with pytest.raises(OSError, match="shorter") as caught:
        read(storage, offset)
    assert caught.value.errno == errno.EIO


def test_reading_before_the_cut_still_works(storage, image):
    os.truncate(image, 10 * K)
    assert read(storage, 0, 10 * K) == image.read_bytes()


def test_a_full_disk_is_told(storage):
    # RLIMIT_FSIZE and quotas need a process of their own; /dev/full says it as a disk would.
    full = os.open("/dev/full", os.O_RDWR)
    os.dup2(full, storage._fd)
    os.close(full)
    with pytest.raises(OSError, match="No space") as caught:
        write(storage, b"x", 0)
    assert caught.value.errno == errno.ENOSPC


# Durability.


@pytest.fixture
def syncs(monkeypatch):
    """Give the list of fdatasync calls made from now on."""
    calls = []
    monkeypatch.setattr(os, "fdatasync", calls.append)
    return calls


def test_flush_is_an_fdatasync(storage, syncs):
    storage.flush()
    assert len(syncs) == 1


def test_a_read_only_storage_has_nothing_to_flush(image, syncs):
    storage = RawStorage.open(image, read_only=True)
    storage.flush()
    storage.close()
    assert not syncs


def test_fua_is_a_write_through(storage, monkeypatch):
    flags = []
    pwritev = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda *a: flags.append(a[3]) or pwritev(*a))
    write(storage, b"x", 0, fua=True)
    write(storage, b"x", 0, fua=False)
    assert flags == [os.RWF_DSYNC, 0]


def test_fua_is_a_sync_where_the_kernel_cannot_write_through(storage, image, syncs, monkeypatch):
    pwritev = os.pwritev

    def old(fd, vector, offset, flags):
        if flags:
            raise OSError(errno.EOPNOTSUPP, "not here")
        return pwritev(fd, vector, offset)

    monkeypatch.setattr(os, "pwritev", old)
    write(storage, b"one", 0, fua=True)
    write(storage, b"two", 3, fua=True)
    assert len(syncs) == 2
    assert image.read_bytes()[:6] == b"onetwo"


@pytest.mark.parametrize(
    "request_",
    [
        lambda s: s.zero(0, K, may_trim=True, fast=False, fua=True),
        lambda s: s.trim(0, K, True),
    ],
    ids=["zero", "trim"],
)
def test_fua_of_requests_without_payload_is_a_sync(storage, syncs, request_):
    request_(storage)
    assert len(syncs) == 1


@pytest.mark.parametrize("code", LOSSES)
def test_a_lost_write_back_is_told_to_everybody(storage, monkeypatch, code):
    # The kernel tells it once, and the next fdatasync of the same open file succeeds.
    def fail_once(fd):
        monkeypatch.undo()
        raise OSError(code, "lost")

    monkeypatch.setattr(os, "fdatasync", fail_once)
    for attempt in (
        storage.flush,
        storage.flush,
        lambda: write(storage, b"x", 0, fua=True),
        lambda: storage.trim(0, 1, True),
    ):
        with pytest.raises(OSError, match="lost") as caught:
            attempt()
        assert caught.value.errno == code


@pytest.mark.parametrize("call", ["fdatasync", "pwritev"])
def test_a_flush_that_overlaps_a_failing_one_fails_too(storage, monkeypatch, call):
    # Of two calls in flight the kernel tells one, whose data it was the other is not told.
    real = getattr(os, call)

    def succeed_while_a_neighbour_fails(*arguments):
        storage._lost.note(OSError(errno.EIO, "lost"))
        return real(*arguments)

    monkeypatch.setattr(os, call, succeed_while_a_neighbour_fails)
    with pytest.raises(OSError, match="lost"):
        storage.flush() if call == "fdatasync" else write(storage, b"x", 0, fua=True)


def test_no_room_that_was_a_lost_write_back_is_told(storage, monkeypatch):
    # RWF_DSYNC may fail with ENOSPC for earlier data; then the plain write finds room.
    real = os.pwritev

    def no_room_once(*arguments):
        monkeypatch.setattr(os, "pwritev", real)
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "pwritev", no_room_once)
    with pytest.raises(OSError, match="no space left"):
        write(storage, b"x", 0, fua=True)
    with pytest.raises(OSError, match="lost"):
        storage.flush()


def test_an_interrupted_sync_is_no_loss(storage, monkeypatch):
    def fail(fd):
        raise OSError(errno.EINVAL, "a moment")

    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(OSError, match="a moment"):
        storage.flush()
    monkeypatch.undo()
    storage.flush()


# Zeroes and holes.


def allocated(path):
    return path.stat().st_blocks * 512


@pytest.fixture(params=FOLDERS, ids=str)
def large(request):
    """Give a file of 8 MiB of data, and a storage on it, on each file system."""
    with tempfile.NamedTemporaryFile(dir=request.param) as file:
        file.write(os.urandom(8 << 20))
        file.flush()
        storage = RawStorage.open(file.name)
        yield storage, Path(file.name)
        storage.close()


def test_zeroes_that_may_trim_give_space_back(large):
    storage, path = large
    storage.zero(0, 4 << 20, may_trim=True, fast=False, fua=True)
    assert allocated(path) <= 5 << 20
    assert read(storage, 0, 4 << 20) == bytes(4 << 20)


def test_zeroes_that_must_not_trim_keep_the_space(large):
    storage, path = large
    storage.zero(0, 4 << 20, may_trim=False, fast=False, fua=True)
    assert allocated(path) >= 8 << 20
    assert read(storage, 0, 4 << 20) == bytes(4 << 20)


def test_trim_gives_space_back(large):
    storage, path = large
    assert storage.can_trim
    storage.trim(0, 4 << 20, True)
    assert allocated(path) <= 5 << 20


def test_fast_zeroes_are_fast_where_holes_are(large):
    storage, _ = large
    storage.zero(0, 8 << 20, may_trim=True, fast=True, fua=False)
    assert not any(read(storage))


@pytest.mark.parametrize("may_trim", [True, False])
def test_fast_zeroes_that_would_be_slow_change_nothing(image, monkeypatch, may_trim):
    monkeypatch.setattr(fallocation, "fallocate", no_fallocate)
    storage = RawStorage.open(image)
    before = image.read_bytes()
    with pytest.raises(OSError, match="fast") as caught:
        storage.zero(0, storage.size, may_trim=may_trim, fast=True, fua=False)
    assert caught.value.errno == errno.ENOTSUP
    assert image.read_bytes() == before
    storage.close()


def test_a_file_system_without_holes_does_not_offer_trim(image, monkeypatch):
    monkeypatch.setattr(fallocation, "fallocate", no_fallocate)
    storage = RawStorage.open(image)
    assert not storage.can_trim
    storage.close()


def test_an_unknown_mode_is_tried_once(image, monkeypatch):
    calls = []

    def counting(fd, mode, offset, length):
        calls.append(mode)
        no_fallocate(fd, mode, offset, length)

    monkeypatch.setattr(fallocation, "fallocate", counting)
    storage = RawStorage.open(image)
    for _ in range(3):
        storage.zero(0, K, may_trim=True, fast=False, fua=False)
    storage.close()
    assert len(calls) == len(set(calls))


def test_other_failures_of_fallocate_are_told(storage, monkeypatch):
    def fail(fd, mode, offset, length):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fallocation, "fallocate", fail)
    with pytest.raises(OSError, match="No space"):
        storage.zero(0, K, may_trim=False, fast=False, fua=False)


def test_four_gibibytes_of_zeroes_take_no_time(tmp_path):
    path = tmp_path / "huge"
    path.touch()
    os.truncate(path, 5 << 30)
    storage = RawStorage.open(path)
    write(storage, b"x" * K, 4 << 30)
    storage.zero(1 << 20, 0xFFFF_FFFF, may_trim=True, fast=True, fua=False)
    assert not any(read(storage, 4 << 30, K))
    storage.close()


def test_fallocate_tells_the_errno():
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        fallocate(-1, 0, 0, 1)
    assert caught.value.errno == errno.EBADF


# The rest.


def test_closing_twice_does_no_harm(storage):
    storage.close()
    storage.close()


def test_a_file_has_blocks_of_one_byte(storage):
    assert storage.minimum_block == 1
    assert storage.preferred_block >= 512
    assert storage.maximum_payload >= 32 << 20
