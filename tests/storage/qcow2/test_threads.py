"""Many threads at once: nobody waits for what need not be waited for, and nobody sees garbage."""

from __future__ import annotations

import random
import struct
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from nbdlink.storage.imagefile import PosixFile
from nbdlink.storage.qcow2 import Qcow2Storage

from . import qemu
from .ways import (
    read,
    read_at_once,
    read_promptly,
    write,
    write_at_once,
    write_promptly,
)

K = 1024
CLUSTER = 64 * K
SECTOR = 512
WAYS = ((read, write), (read_promptly, write_promptly))


class Gated(PosixFile):
    """A file whose reads, writes, flushes or discards wait at a gate.

    Attributes:
        closed: "read", "write", "flush" or "discard": what has to wait; None for nothing.
        arrived: set when somebody waits.
        gate: let them through.
        reads: the bytes of each read.
    """

    closed = None
    reads = ()

    def arrive(self, what, buffer):
        if self.closed == what and threading.current_thread() is self.who:
            self.arrived.set()
            assert self.gate.wait(30)

    def read_at(self, buffer, position):
        self.reads = (*self.reads, len(buffer))
        self.arrive("read", buffer)
        super().read_at(buffer, position)

    def read_now(self, buffer, position):
        self.arrive("read", buffer)
        return super().read_now(buffer, position)

    def write_at(self, buffer, position):
        self.arrive("write", buffer)
        super().write_at(buffer, position)

    def flush(self):
        self.arrive("flush", b"")
        super().flush()

    def discard_at(self, position, length):
        self.arrive("discard", b"")
        super().discard_at(position, length)


class Slow:
    """A storage, and a request on it that is stopped in the middle of its data."""

    def __init__(self, path, **options):
        files = []

        def open_file(path, read_only):
            files.append(Gated.open(path, read_only=read_only))
            return files[-1]

        self.storage = Qcow2Storage.open(path, open_file=open_file, **options)
        self.file = files[0]

    def start(self, what, function):
        """Begin a request in a thread of its own, and return when it waits at the gate."""
        self.result = None

        def run():
            self.result = function()

        self.thread = threading.Thread(target=run)
        self.file.arrived, self.file.gate = threading.Event(), threading.Event()
        self.file.who, self.file.closed = self.thread, what
        self.thread.start()
        assert self.file.arrived.wait(30)

    def finish(self):
        self.file.closed = None
        self.file.gate.set()
        self.thread.join(30)
        assert not self.thread.is_alive()
        return self.result


@pytest.fixture
def path(folder):
    return qemu.create(folder / "disk.qcow2", 16 * K * K)


@pytest.fixture
def slow(path):
    slow = Slow(path)
    write(slow.storage, b"-", 255 * CLUSTER)  # so that there is a table, and only data has to wait
    yield slow
    slow.storage.close()
    qemu.check(path)


@pytest.mark.parametrize("get", [read, read_at_once])
def test_a_cluster_is_not_used_again_while_it_is_being_read(get, slow):
    storage = slow.storage
    write(storage, b"old" * 1000, 0)
    slow.start("read", lambda: get(storage, 0, 3000))
    storage.trim(0, CLUSTER, False)
    for at in range(1, 60):
        storage.flush()
        write(storage, b"n" * CLUSTER, at * CLUSTER)
    assert slow.finish() == b"old" * 1000


@pytest.mark.parametrize("put", [write, write_at_once])
def test_a_cluster_is_not_used_again_while_it_is_being_written_to(put, slow):
    storage = slow.storage
    write(storage, bytes(CLUSTER), 0)
    slow.start("write", lambda: put(storage, b"late", 0))
    storage.trim(0, CLUSTER, False)
    for at in range(1, 60):
        storage.flush()
        write(storage, b"n" * CLUSTER, at * CLUSTER)
    slow.finish()
    assert read(storage, CLUSTER, 59 * CLUSTER) == b"n" * (59 * CLUSTER)


def test_a_cluster_is_used_again_once_nobody_uses_it(slow):
    storage = slow.storage
    write(storage, b"o" * CLUSTER, 0)
    slow.start("read", lambda: read(storage, 0, 3000))
    storage.trim(0, CLUSTER, False)
    storage.flush()
    slow.finish()
    storage.flush()
    size = slow.file.size
    write(storage, b"n" * CLUSTER, CLUSTER)
    storage.flush()
    assert slow.file.size == size


def test_other_requests_do_not_wait_for_a_slow_write(slow):
    storage = slow.storage
    slow.start("write", lambda: write(storage, b"slow", 0))
    write(storage, b"fast", CLUSTER)
    storage.flush()
    storage.zero(2 * CLUSTER, CLUSTER, may_trim=True, fast=True, fua=True)
    storage.trim(3 * CLUSTER, CLUSTER, True)
    assert read(storage, CLUSTER, 4) == b"fast"
    assert list(storage.extents("base:allocation", 0, 4 * CLUSTER))
    slow.finish()


@pytest.mark.parametrize(
    "what", ["L2 table", "new L2 table", "refcount block", "new refcount block"]
)
def test_other_requests_do_not_wait_for_tables_of_a_slow_disk(what, folder):
    cluster, size = 512, 256 * K
    options = "cluster_size=512,refcount_bits=64"  # a refcount block for 32 KiB
    path = qemu.create(folder / "disk.qcow2", size, options=options)
    qemu.io(path, "write -P 1 0 4k", "write -P 1 64k 1k")
    slow = Slow(path)
    storage = slow.storage
    read(storage, 0, 1)
    gate, request = {
        "L2 table": ("read", lambda: read(storage, 64 * K, 1)),
        "new L2 table": ("write", lambda: write(storage, b"2" * cluster, 128 * K)),
        "refcount block": ("read", lambda: write(storage, b"2" * cluster, 4 * K)),
        "new refcount block": ("flush", lambda: write(storage, b"2" * 40 * K, 4 * K)),
    }[what]
    slow.start(gate, request)

    def others():
        write(storage, b"3", 0)
        if what in ("L2 table", "new L2 table"):
            write(storage, b"4" * cluster, 8 * K)
        storage.zero(cluster, cluster, may_trim=True, fast=True, fua=False)
        return read(storage, 0, 2 * cluster)

    with ThreadPoolExecutor(1) as pool:
        try:
            found = pool.submit(others).result(30)
        finally:
            slow.finish()
    storage.close()
    qemu.check(path)
    assert found == b"3" + b"\x01" * (cluster - 1) + bytes(cluster)
    place = 128 * K if what == "new L2 table" else 4 * K
    assert what == "L2 table" or qemu.content(path)[place:][:cluster] == b"2" * cluster


@pytest.mark.parametrize("options", ["data_file=data.raw", "data_file=data.raw,extended_l2=on"])
def test_only_who_writes_there_waits_until_space_of_a_data_file_is_given_back(options, folder):
    path = qemu.create(folder / "disk.qcow2", 16 * K * K, options=options)
    slow = Slow(path)
    storage = slow.storage
    slow.file = storage._data
    write(storage, b"o" * (4 * CLUSTER), 0)
    slow.start("discard", lambda: storage.trim(CLUSTER, CLUSTER, False))
    with ThreadPoolExecutor(2) as pool:
        same = pool.submit(write, storage, b"n", CLUSTER)
        try:
            pool.submit(storage.trim, 8 * CLUSTER, CLUSTER, True).result(30)
            pool.submit(write, storage, b"p", 9 * CLUSTER).result(30)
            assert pool.submit(read, storage, CLUSTER, 2).result(30) == bytes(2)
            assert not same.done()
        finally:
            slow.finish()
        same.result(30)
    storage.close()
    qemu.check(path)
    expected = b"o" * CLUSTER + (b"n" + bytes(CLUSTER - 1)) + b"o" * (2 * CLUSTER)
    assert qemu.content(path)[: 4 * CLUSTER] == expected


@pytest.mark.parametrize("requests", [2, 8])
def test_a_table_is_read_once_for_all_who_wait_for_it(requests, folder):
    path = qemu.create(folder / "disk.qcow2", 16 * K * K)
    qemu.io(path, "write -P 1 0 1M")
    slow = Slow(path)
    slow.file.reads = ()
    slow.start("read", lambda: read(slow.storage, 0, 512))
    with ThreadPoolExecutor(requests) as pool:
        others = [
            pool.submit(read, slow.storage, number * CLUSTER, 512) for number in range(requests)
        ]
        slow.finish()
        assert {other.result(30) for other in others} == {b"\x01" * 512}
    assert slow.file.reads.count(CLUSTER) == 1
    slow.storage.close()


@pytest.mark.parametrize(("get", "put"), [(read, write), (read_at_once, write_at_once)])
def test_who_reads_what_is_being_written_sees_the_old(get, put, slow):
    storage = slow.storage
    write(storage, b"refcounts in memory", CLUSTER)
    slow.start("write", lambda: put(storage, b"new!", 0))
    assert get(storage, 0, 4) == bytes(4)
    assert not write_at_once(storage, b"else", 4)  # that had to wait
    slow.finish()
    assert get(storage, 0, 4) == b"new!"


def test_a_flush_leaves_out_what_is_still_being_written(slow, path):
    storage = slow.storage
    slow.start("write", lambda: write(storage, b"new!", 0))
    storage.flush()
    assert qemu.content(path)[:4] == bytes(4)
    qemu.check(path, leaks=True)
    slow.finish()


@pytest.mark.parametrize("what", ["write", "zero", "trim"])
def test_who_changes_the_same_cluster_waits(what, slow):
    storage = slow.storage
    slow.start("write", lambda: write(storage, b"first", 0))
    second = {
        "write": lambda: write(storage, b"second", 100),
        "zero": lambda: storage.zero(0, CLUSTER, may_trim=True, fast=False, fua=False),
        "trim": lambda: storage.trim(0, CLUSTER, False),
    }[what]
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(second)
        # That it waits can only be seen by its not being done; a while is enough to notice.
        with pytest.raises(TimeoutError):
            done.result(0.1)
        slow.finish()
        done.result(30)
    expected = b"first" + bytes(95) + b"second" if what == "write" else bytes(106)
    assert read(storage, 0, 106) == expected


@pytest.mark.parametrize(
    ("options", "snapshot"),
    [
        ("cluster_size=4k", False),
        ("cluster_size=4k", True),
        ("", False),
        ("extended_l2=on,cluster_size=16k", False),
        ("extended_l2=on,cluster_size=16k", True),
        ("cluster_size=512,refcount_bits=64", False),
    ],
)
def test_every_sector_is_what_its_owner_wrote(options, snapshot, folder):
    size, workers = 2 * K * K, 8
    path = qemu.create(folder / "disk.qcow2", size, options=options)
    if snapshot:
        qemu.io(path, "write -P 0 0 2M")
        qemu.run("qemu-img", "snapshot", "-c", "s", path)
    storage = Qcow2Storage.open(path)
    model = [None] * (size // SECTOR)

    def sector(number, turn):
        return struct.pack("<QQ", number, turn) * (SECTOR // 16)

    def check(number, data):
        if any(data):
            where, turn = struct.unpack_from("<QQ", data)
            assert where == number
            assert data == sector(number, turn)

    def work(me):
        rnd = random.Random(me)
        get, put = WAYS[me % 2]
        for turn in range(1, 150):
            # Whole requests of sectors that are side by side with other workers' ones.
            number = rnd.randrange(len(model) // workers) * workers + me
            match rnd.randrange(8):
                case 0 | 1 | 2 | 3:
                    put(storage, sector(number, turn), number * SECTOR)
                    model[number] = turn
                case 4:
                    at = number * SECTOR
                    storage.zero(at, SECTOR, may_trim=True, fast=False, fua=False)
                    model[number] = None
                case 5:
                    storage.flush()
                case _:
                    first = rnd.randrange(len(model) - 40)
                    found = get(storage, first * SECTOR, 40 * SECTOR)
                    for i in range(40):
                        check(first + i, found[i * SECTOR : (i + 1) * SECTOR])
            turn_of = model[number]
            expected = bytes(SECTOR) if turn_of is None else sector(number, turn_of)
            assert get(storage, number * SECTOR, SECTOR) == expected

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, range(workers)))
    storage.close()
    qemu.check(path)
    content = qemu.content(path)
    for number, turn in enumerate(model):
        expected = bytes(SECTOR) if turn is None else sector(number, turn)
        assert content[number * SECTOR : (number + 1) * SECTOR] == expected


def test_clusters_that_come_and_go_never_show_what_belongs_elsewhere(folder):
    clusters, workers = 64, 6
    path = qemu.create(folder / "disk.qcow2", clusters * 4 * K, options="cluster_size=4k")
    storage = Qcow2Storage.open(path)

    def work(me):
        rnd = random.Random(me)
        get, put = WAYS[me % 2]
        for _ in range(200):
            number = rnd.randrange(clusters)
            at = number * 4 * K
            match rnd.randrange(5):
                case 0 | 1:
                    put(storage, bytes([number + 1]) * rnd.choice((512, 4096)), at)
                case 2:
                    storage.trim(at, 4 * K, rnd.random() < 0.3)
                case _:
                    assert set(get(storage, at, 4 * K)) <= {0, number + 1}

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, range(workers)))
    storage.close()
    qemu.check(path)
