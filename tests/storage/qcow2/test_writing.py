"""Images that were written to here are sound to QEMU, and hold what they should."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import struct

import pytest

from nbdlink.errors import StorageError
from nbdlink.storage.imagefile import PosixFile
from nbdlink.storage.qcow2 import Qcow2Storage, image
from nbdlink.storage.raw import RawStorage

from . import qemu

K = 1024
SIZE = 3 * K * K + 512

OPTIONS = [
    "cluster_size=512",
    "cluster_size=64k",
    "cluster_size=2M",
    "compat=0.10",
    "compat=0.10,cluster_size=512",
    "cluster_size=4k,refcount_bits=1",
    "cluster_size=1k,refcount_bits=2",
    "refcount_bits=4",
    "cluster_size=1k,refcount_bits=8",
    "cluster_size=512,refcount_bits=32",
    "cluster_size=512,refcount_bits=64",
    "extended_l2=on",
    "extended_l2=on,cluster_size=16k",
    "lazy_refcounts=on",
    "preallocation=metadata",
    "preallocation=full,extended_l2=on",
    "data_file=data.raw",
    "data_file=data.raw,data_file_raw=on",
    "data_file=data.raw,extended_l2=on",
]
BACKING = {"none": 0, "shorter": 1024 * K + 100, "longer": 4 * K * K}


def read(storage, offset=0, length=None):
    buffer = bytearray(storage.size - offset if length is None else length)
    storage.read_into(memoryview(buffer), offset)
    return bytes(buffer)


def write(storage, data, offset, fua=False):
    storage.write(memoryview(data), offset, fua)


@pytest.fixture
def opened():
    storages = []

    def start(path, **options):
        storages.append(Qcow2Storage.open(path, **options))
        return storages[-1]

    yield start
    for storage in storages:
        storage.close()


def change(storage, model, rnd):
    """Do something random to a storage and its model."""
    begin, end = sorted(rnd.randrange(SIZE + 1) for _ in range(2))
    if rnd.random() < 0.7:
        end = min(end, begin + rnd.choice([1, 512, 4096, 70000, 300000]))
    if rnd.random() < 0.3:
        begin, end = begin >> 16 << 16, max(begin, end >> 16 << 16)
    length = end - begin
    if not length:
        return
    match rnd.randrange(6):
        case 0 | 1 | 2:
            model[begin:end] = data = rnd.randbytes(length)
            write(storage, data, begin)
        case 3:
            model[begin:end] = bytes(length)
            may_trim = rnd.random() < 0.5
            storage.zero(begin, length, may_trim=may_trim, fast=False, fua=False)
        case 4:
            storage.trim(begin, length, False)
            model[begin:end] = read(storage, begin, length)  # anything is right there
        case 5:
            storage.flush()


@pytest.mark.parametrize("backing", BACKING)
@pytest.mark.parametrize("options", OPTIONS)
def test_what_was_written_is_there_for_qemu(options, backing, folder):
    if BACKING[backing] and ("data_file_raw" in options or "prealloc" in options):
        return  # the format does not have that
    rnd = random.Random(options + backing)
    model = bytearray(SIZE)
    path = folder / "disk.qcow2"
    if BACKING[backing]:
        data = rnd.randbytes(1000) * (BACKING[backing] // 1000)
        (folder / "base.raw").write_bytes(data)
        model[: min(SIZE, len(data))] = data[:SIZE]
        qemu.create(path, SIZE, options=options, backing="base.raw", backing_format="raw")
    else:
        qemu.create(path, SIZE, options=options)
    for turn in range(2):
        storage = Qcow2Storage.open(path)
        for _ in range(16):
            change(storage, model, rnd)
        assert read(storage) == model
        storage.close()
        qemu.check(path)
        assert qemu.content(path)[:SIZE] == model
        if not turn and "data_file" not in options and "refcount_bits=1" not in options:
            qemu.run("qemu-img", "snapshot", "-c", f"turn {turn}", path)
    if "data_file_raw" in options:
        assert (folder / "data.raw").read_bytes()[:SIZE] == model
    storage = Qcow2Storage.open(path, read_only=True)
    assert qemu.ours(storage) == qemu.mapping(path)
    storage.close()


def test_snapshots_keep_what_they_were_taken_of(folder):
    rnd = random.Random(1)
    path = qemu.create(folder / "disk.qcow2", SIZE, options="cluster_size=4k")
    model, taken = bytearray(SIZE), {}
    for turn in range(4):
        storage = Qcow2Storage.open(path)
        for _ in range(10):
            change(storage, model, rnd)
        storage.close()
        qemu.run("qemu-img", "snapshot", "-c", f"turn {turn}", path)
        taken[f"turn {turn}"] = bytes(model)
    qemu.run("qemu-img", "snapshot", "-d", "turn 1", path)
    del taken["turn 1"]
    qemu.check(path)
    for name, content in taken.items():
        storage = Qcow2Storage.open(path, read_only=True, snapshot=name)
        assert read(storage) == content
        storage.close()


@pytest.mark.parametrize("options", ["cluster_size=4k", "cluster_size=512", "extended_l2=on"])
def test_compressed_clusters_can_be_written_over(options, folder):
    rnd = random.Random(1)
    source = folder / "source.raw"
    source.write_bytes((b"text " * SIZE)[:SIZE])
    path = folder / "disk.qcow2"
    qemu.run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options,
             source, path)  # fmt: skip
    model = bytearray(source.read_bytes())
    for _ in range(3):
        storage = Qcow2Storage.open(path)
        for _ in range(12):
            change(storage, model, rnd)
        assert read(storage)[:SIZE] == model
        storage.close()
        qemu.check(path)
        assert qemu.content(path)[:SIZE] == model


def test_a_backing_chain_is_never_written_to(folder):
    base = qemu.create(folder / "base.qcow2", SIZE)
    qemu.io(base, "write -P 1 0 2M")
    before = base.read_bytes()
    path = qemu.create(folder / "disk.qcow2", SIZE, backing="base.qcow2", backing_format="qcow2")
    storage = Qcow2Storage.open(path)
    write(storage, b"x" * 100, 77)
    storage.zero(K * K, K * K, may_trim=True, fast=False, fua=True)
    storage.close()
    assert base.read_bytes() == before


def test_reading_changes_nothing(folder, opened):
    path = qemu.create(folder / "disk.qcow2", SIZE)
    before = path.read_bytes()
    storage = opened(path, read_only=True)
    read(storage)
    storage.flush()
    assert path.read_bytes() == before


# What costs no space, and what gives it back.


def used(path):
    return path.stat().st_blocks * 512


def test_discarded_space_goes_back_to_the_file_system_with_a_flush(folder, opened):
    path = qemu.create(folder / "disk.qcow2", 64 * K * K)
    storage = opened(path)
    write(storage, os.urandom(16 * K * K), 0)
    storage.flush()
    before = used(path)
    storage.trim(0, 16 * K * K, False)
    storage.flush()
    assert used(path) <= before - 15 * K * K


def test_discarded_clusters_are_used_again(folder, opened):
    path = qemu.create(folder / "disk.qcow2", 64 * K * K)
    storage = opened(path)
    for at in range(0, 64 * K * K, 8 * K * K):
        write(storage, b"d" * 8 * K * K, at)
        storage.trim(at, 8 * K * K, False)
        storage.flush()
    assert path.stat().st_size < 20 * K * K


def test_keeping_space_is_possible(folder, opened):
    path = qemu.create(folder / "disk.qcow2", 64 * K * K)
    storage = opened(path, discard=False)
    write(storage, os.urandom(16 * K * K), 0)
    storage.trim(0, 16 * K * K, True)
    assert used(path) > 16 * K * K


@pytest.mark.parametrize("options", ["", "extended_l2=on"])
def test_zeroes_cost_no_space(options, folder, opened):
    path = qemu.create(folder / "disk.qcow2", 1 << 40, options=options)
    storage = opened(path)
    storage.zero(0, 1 << 40, may_trim=True, fast=True, fua=True)
    storage.zero(0, 1 << 40, may_trim=False, fast=True, fua=True)
    assert used(path) < K * K


@pytest.mark.parametrize("may_trim", [True, False])
def test_zeroes_keep_their_space_unless_it_may_be_given_back(may_trim, folder, opened):
    path = qemu.create(folder / "disk.qcow2", 4 * K * K)
    storage = opened(path)
    write(storage, os.urandom(4 * K * K), 0)
    storage.flush()
    storage.zero(0, 4 * K * K, may_trim=may_trim, fast=True, fua=True)
    assert read(storage) == bytes(4 * K * K)
    assert (used(path) < K * K) == may_trim


def test_version_2_cannot_zero_fast_over_a_backing_file(folder, opened):
    (folder / "base.raw").write_bytes(b"b" * SIZE)
    path = qemu.create(folder / "disk.qcow2", SIZE, options="compat=0.10", backing="base.raw",
                       backing_format="raw")  # fmt: skip
    storage = opened(path)
    assert (storage.can_trim, storage.can_fast_zero) == (False, False)
    with pytest.raises(OSError, match="no fast way") as caught:
        storage.zero(0, K, may_trim=True, fast=True, fua=False)
    assert caught.value.errno == errno.ENOTSUP
    storage.trim(0, K * K, False)
    assert read(storage) == b"b" * SIZE


# What others know of it.


def test_a_writer_is_one_process(folder, opened):
    assert not opened(qemu.create(folder / "disk.qcow2", SIZE)).may_fork


def test_an_image_has_a_signature_that_its_bare_file_has_not(folder, opened):
    path = qemu.create(folder / "disk.qcow2", SIZE)
    qemu.run("qemu-img", "snapshot", "-c", "s", path)
    storage, again = opened(path), opened(path, read_only=True)
    with contextlib.closing(RawStorage.open(path, read_only=True)) as bare:
        assert storage.signature == again.signature != bare.signature
    assert opened(path, read_only=True, snapshot="s").signature != storage.signature


def test_closing_twice_is_fine(folder):
    storage = Qcow2Storage.open(qemu.create(folder / "disk.qcow2", SIZE))
    storage.close()
    storage.close()


# When the disk refuses.


class Refusing(PosixFile):
    """A file that fails when it is told to."""

    fails = None

    def write_at(self, buffer, position):
        if self.fails == "write":
            raise OSError(errno.ENOSPC, "no space")
        super().write_at(buffer, position)

    def flush(self):
        if self.fails == "flush":
            raise OSError(errno.EIO, "lost")
        super().flush()


@pytest.fixture
def refusing(folder):
    path = qemu.create(folder / "disk.qcow2", SIZE)
    files = []

    def open_file(path, read_only):
        files.append(Refusing.open(path, read_only=read_only))
        return files[-1]

    storage = Qcow2Storage.open(path, open_file=open_file)
    yield path, storage, files[0]
    files[0].fails = None
    storage.close()
    qemu.check(path)


def test_a_write_without_room_changes_nothing_and_can_be_done_again(refusing):
    _, storage, file = refusing
    write(storage, b"a" * 100, 0)
    file.fails = "write"
    with pytest.raises(OSError, match="no space"):
        write(storage, b"b" * 100 * K, 70 * K)
    file.fails = None
    assert read(storage, 70 * K, 100 * K) == bytes(100 * K)
    write(storage, b"c" * 100 * K, 70 * K)
    storage.flush()
    assert read(storage, 70 * K, 100 * K) == b"c" * 100 * K


@pytest.mark.parametrize("table", ["new", "old"])
@pytest.mark.parametrize("how", ["write", "flush"])
def test_a_flush_that_failed_can_be_done_again(how, table, refusing):
    path, storage, file = refusing
    if table == "old":
        write(storage, b"z", 2 * K * K, fua=True)
    write(storage, b"a" * 100 * K, 0)
    storage.trim(0, 64 * K, False)
    file.fails = how
    with pytest.raises(OSError, match=r"no space|lost"):
        storage.flush()
    file.fails = None
    storage.flush()
    assert qemu.content(path)[64 * K : 100 * K] == b"a" * 36 * K


def test_fua_is_a_flush(refusing):
    _, storage, file = refusing
    file.fails = "flush"
    with pytest.raises(OSError, match="lost"):
        write(storage, b"a", 0, fua=True)


class Picky(PosixFile):
    """A file that fails once at each of some places.

    Attributes:
        bad: begin and end of these places.
    """

    def __init__(self, *words, **options):
        super().__init__(*words, **options)
        self.bad = []

    def write_at(self, buffer, position):
        for place in self.bad:
            if place[0] <= position < place[1]:
                self.bad.remove(place)
                raise OSError(errno.EIO, "a bad sector")
        super().write_at(buffer, position)


@pytest.fixture
def picky(folder):
    """An image whose refcount table counts 1 MiB and whose blocks count 32 KiB."""
    path = qemu.create(folder / "disk.qcow2", SIZE, options="cluster_size=512,refcount_bits=64")
    files = []

    def open_file(path, read_only):
        files.append(Picky.open(path, read_only=read_only))
        return files[0]

    storage = Qcow2Storage.open(path, open_file=open_file)
    yield path, storage, files[0]
    with contextlib.suppress(OSError):
        storage.close()


def table_of(path):
    """Give where the refcount table begins and ends."""
    with path.open("rb") as file:
        file.seek(48)
        offset, clusters = struct.unpack(">QI", file.read(12))
    return offset, offset + 512 * clusters


def test_a_refcount_block_that_could_not_be_linked_is_linked_later(picky):
    path, storage, file = picky
    file.bad.append(table_of(path))
    with pytest.raises(OSError, match="a bad sector"):
        write(storage, b"a" * 200 * K, 0)
    assert not file.bad
    write(storage, b"b" * 200 * K, 0)
    storage.close()
    qemu.check(path, leaks=True)
    assert qemu.content(path)[: 200 * K] == b"b" * 200 * K


def test_nothing_is_written_once_the_header_may_name_either_refcount_table(picky):
    path, storage, file = picky
    write(storage, b"a" * 500 * K, 0)
    storage.flush()
    file.bad.append((48, 60))
    with pytest.raises(OSError, match="a bad sector"):
        write(storage, b"b" * 2000 * K, 600 * K)
    for attempt in (lambda: write(storage, b"c" * K, 0), storage.flush):
        with pytest.raises(OSError, match="open it again"):
            attempt()
    with contextlib.suppress(OSError):
        storage.close()
    qemu.check(path, leaks=True)
    assert qemu.content(path)[: 500 * K] == b"a" * 500 * K


# What must not be written to.


@pytest.mark.parametrize("bit", ["corrupt"])
def test_a_corrupt_image_is_read_only(bit, folder, opened):
    path = qemu.create(folder / "disk.qcow2", SIZE)
    content = bytearray(path.read_bytes())
    content[79] |= 2
    path.write_bytes(content)
    with pytest.raises(StorageError, match="marked as corrupt"):
        Qcow2Storage.open(path)
    assert "corrupt" in opened(path, read_only=True).warnings[0]


def test_unknown_autoclear_bits_are_cleared_by_a_writer(folder, opened):
    path = qemu.create(folder / "disk.qcow2", SIZE)
    content = bytearray(path.read_bytes())
    content[88] |= 0x80
    path.write_bytes(content)
    opened(path, read_only=True)
    assert path.read_bytes()[88] == 0x80
    opened(path)
    assert path.read_bytes()[88] == 0


@pytest.mark.parametrize("request_", ["zero", "trim"])
def test_a_range_as_long_as_the_disk_does_not_keep_all_tables_in_memory(
    request_, folder, monkeypatch
):
    monkeypatch.setattr(image, "L2_LIMIT", 16 * 512)
    backing = qemu.create(folder / "base.qcow2", 4 << 20)
    path = qemu.create(
        folder / "disk.qcow2",
        None,
        options="cluster_size=512",
        backing=backing.name,
        backing_format="qcow2",
    )
    storage = Qcow2Storage.open(path)
    if request_ == "zero":
        storage.zero(0, storage.size, may_trim=True, fast=True, fua=False)
    else:
        storage.trim(0, storage.size, False)
    assert len(storage._image.tables) <= 16
    storage.close()
    qemu.check(path)
