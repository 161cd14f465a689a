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
from .ways import read, read_promptly, write, write_promptly

K = 1024
CLUSTER = 64 * K
SECTOR = 512
WAYS = ((read, write), (read_promptly, write_promptly))


class Gated(PosixFile):
    """A file whose reads or writes of data wait at a gate.

    Attributes:
        closed: "read" or "write": what has to wait; None for nothing.
        arrived: set when somebody waits.
        gate: let them through.
    """

    closed = None

    def arrive(self, what, buffer):
        # Tables are read as a whole, and data here by the sector.
        if (
            self.closed == what
            and len(buffer) <= CLUSTER
            and threading.current_thread() is self.who
        ):
            self.arrived.set()
            assert self.gate.wait(30)

    def read_at(self, buffer, position):
        self.arrive("read", buffer)
        super().read_at(buffer, position)

    def write_at(self, buffer, position):
        self.arrive("write", buffer)
        super().write_at(buffer, position)


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
    yield slow
    slow.storage.close()
    qemu.check(path)


def test_a_cluster_is_not_used_again_while_it_is_being_read(slow):
    storage = slow.storage
    write(storage, b"old" * 1000, 0)
    slow.start("read", lambda: read(storage, 0, 3000))
    storage.trim(0, CLUSTER, False)
    for at in range(1, 60):
        storage.flush()
        write(storage, b"n" * CLUSTER, at * CLUSTER)
    assert slow.finish() == b"old" * 1000


def test_a_cluster_is_not_used_again_while_it_is_being_written_to(slow):
    storage = slow.storage
    write(storage, bytes(CLUSTER), 0)
    slow.start("write", lambda: write(storage, b"late", 0))
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


def test_who_reads_what_is_being_written_sees_the_old(slow):
    storage = slow.storage
    slow.start("write", lambda: write(storage, b"new!", 0))
    assert read(storage, 0, 4) == bytes(4)
    slow.finish()
    assert read(storage, 0, 4) == b"new!"


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
