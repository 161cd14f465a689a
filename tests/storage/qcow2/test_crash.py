"""A power cut at any moment leaves a sound image that holds all that was flushed.

What is written is told from everything else: each sector of it says which write it belongs to
and where it should be. So a sector that shows up in a wrong place is noticed, as is one that
was thrown away before.

NBDLINK_CRASH_STATES sets how many states are looked at for each kind of image.
"""

from __future__ import annotations

import os
import random
import struct
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import pytest

from nbdlink.storage.chain import Chain
from nbdlink.storage.qcow2 import Qcow2Storage, image, refcounts

from . import qemu
from .crash import SECTOR, Recorder
from .ways import write, write_promptly

STATES = int(os.environ.get("NBDLINK_CRASH_STATES", "14"))
ZEROES = bytes(SECTOR)


def pattern(number, offset, length):
    """Give the bytes of write `number`: each sector says what it is."""
    return b"".join(
        struct.pack("<QQ", number, at // SECTOR) * (SECTOR // 16)
        for at in range(offset, offset + length, SECTOR)
    )


class Disk:
    """A storage whose every request is noted, with what each sector may hold after a cut.

    Attributes:
        flushed: content at the last flush.
        since: by sector, what it may hold otherwise.
    """

    def __init__(self, path, recorder, content, discard, open_file=None):
        self.recorder = recorder
        self.storage = Qcow2Storage.open(
            path, open_file=open_file or (lambda p, _: recorder), discard=discard
        )
        self.content = bytearray(content)
        self.possible = defaultdict(set)
        self.history = [(0, bytes(content), {})]
        self.number = 0

    def _note(self, offset, data):
        for at in range(0, len(data), SECTOR):
            self.possible[(offset + at) // SECTOR].add(bytes(data[at : at + SECTOR]))
        # Whatever is cut off from here on, this request may be seen.
        possible = {sector: set(found) for sector, found in self.possible.items()}
        self.history.append((len(self.recorder.log), self.history[-1][1], possible))

    def write(self, offset, length):
        self.number += 1
        data = pattern(self.number, offset, length)
        self._note(offset, data)
        (write if self.number % 2 else write_promptly)(self.storage, data, offset)
        self.content[offset : offset + length] = data

    def zero(self, offset, length, may_trim):
        self._note(offset, bytes(length))
        self.storage.zero(offset, length, may_trim=may_trim, fast=False, fua=False)
        self.content[offset : offset + length] = bytes(length)

    def trim(self, offset, length):
        self._note(offset, bytes(length))
        self.storage.trim(offset, length, False)
        now = bytearray(length)
        self.storage.read_into(memoryview(now), offset)
        self.content[offset : offset + length] = now

    def flush(self):
        self.storage.flush()
        self.possible = defaultdict(set)
        self.history.append((len(self.recorder.log), bytes(self.content), {}))

    def allowed(self, until):
        """Give what may be there after a cut behind `until` entries of the log."""
        found = self.history[0]
        for entry in self.history:
            # A request that had begun may be seen; a flush counts once it is through.
            if entry[0] <= until:
                found = entry
        return found[1], found[2]


KINDS = {
    "plain": ("", 2 << 20, None),
    "small clusters": ("cluster_size=512", 96 << 10, None),
    "version 2": ("compat=0.10,cluster_size=4k", 512 << 10, None),
    "backing": ("cluster_size=4k", 512 << 10, "raw"),
    "extended L2": ("extended_l2=on,cluster_size=16k", 1 << 20, "raw"),
    "wide refcounts": ("cluster_size=512,refcount_bits=64", 96 << 10, None),
    "narrow refcounts": ("cluster_size=1k,refcount_bits=1", 192 << 10, None),
    "snapshots": ("cluster_size=4k", 512 << 10, None),
    "compressed": ("cluster_size=4k", 512 << 10, None),
    "a refcount table that grows": ("cluster_size=512,refcount_bits=64", 2300 << 10, None),
    "little memory": ("cluster_size=512,refcount_bits=64", 256 << 10, None),
}
FILLED = {"snapshots": 200 << 10, "a refcount table that grows": 1800 << 10}


def script(disk, rnd, size, cluster):
    for _ in range(60):
        offset = rnd.randrange(0, size, SECTOR)
        length = min(rnd.choice((1, 2, 8, 9, 40)) * SECTOR, size - offset)
        match rnd.randrange(8):
            case 0 | 1 | 2 | 3:
                disk.write(offset, length)
            case 4:
                disk.zero(offset, length, rnd.random() < 0.5)
            case 5:
                offset = offset // cluster * cluster
                disk.trim(offset, min(3 * cluster, size - offset))
            case _:
                disk.flush()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("discard", [True, False], ids=["discard", "keep"])
def test_a_power_cut_leaves_what_was_flushed_and_nothing_else(kind, discard, folder, monkeypatch):
    options, size, backing = KINDS[kind]
    if kind == "little memory":  # tables come and go
        monkeypatch.setattr(image, "L2_LIMIT", 0)
        monkeypatch.setattr(refcounts, "_KEPT", 0)
    rnd = random.Random(kind)
    path = folder / "disk.qcow2"
    content = bytes(size)
    if backing:
        content = pattern(1 << 40, 0, size - 8192) + bytes(8192)
        (folder / "base.raw").write_bytes(content[: size - 8192])
    if kind == "compressed":
        content = pattern(1 << 40, 0, size)
        (folder / "base.raw").write_bytes(content)
        qemu.run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options,
                 folder / "base.raw", path)  # fmt: skip
    else:
        qemu.create(path, size, options=options, backing="base.raw" if backing else None,
                    backing_format="raw")  # fmt: skip
    if filled := FILLED.get(kind):
        qemu.io(path, f"write -P 5 0 {filled}")
        content = b"\x05" * filled + content[filled:]
    if kind == "snapshots":
        qemu.run("qemu-img", "snapshot", "-c", "before", path)
    cluster = qemu.info(path)["cluster-size"]
    recorder = Recorder.of(path)
    disk = Disk(path, recorder, content, discard)
    if "grows" in kind:
        for offset in range(FILLED[kind], size, 16 << 10):
            disk.write(offset, min(16 << 10, size - offset))
    script(disk, rnd, size, cluster)
    disk.storage.close()
    cut = folder / "cut.qcow2"
    total = len(recorder.log)
    # What is done once only, and changes the header, is worth a closer look.
    rare = [i for i, entry in enumerate(recorder.log) if entry and entry[0] < SECTOR]
    assert bool(rare) == ("grows" in kind)
    for number in range(STATES):
        until = rnd.randrange(total + 1)
        if rare and number % 2:
            until = max(0, rnd.choice(rare) + rnd.randrange(-6, 4))
        cut.write_bytes(recorder.state(until, rnd if number % 5 else None))
        qemu.check(cut, leaks=True)
        flushed, possible = disk.allowed(until)
        with_storage(cut, flushed, possible)
    # And the end of it all wastes nothing.
    cut.write_bytes(recorder.state(total, None))
    qemu.check(cut)
    assert qemu.content(cut)[:size] == bytes(disk.content)


def with_storage(path, flushed, possible, **options):
    """See that an image holds what was flushed, or what was written since."""
    storage = Qcow2Storage.open(path, read_only=True, **options)
    found = bytearray(storage.size)
    storage.read_into(memoryview(found), 0)
    storage.close()
    if found == flushed:
        return
    for at in range(0, len(found), SECTOR):
        now = found[at : at + SECTOR]
        if now == flushed[at : at + SECTOR]:
            continue
        assert bytes(now) in possible.get(at // SECTOR, ()), f"sector {at // SECTOR}"


def test_a_power_cut_leaves_bitmaps_true_or_in_use(folder):
    rnd = random.Random(1)
    size = 512 << 10
    path = qemu.create(folder / "disk.qcow2", size, options="cluster_size=512")
    qemu.run("qemu-img", "bitmap", "--add", "-g", "512", "-f", "qcow2", path, "b")
    recorder = Recorder.of(path)
    storage = Qcow2Storage.open(path, open_file=lambda p, _: recorder)
    written = set()
    for _ in range(20):
        sector = rnd.randrange(size // SECTOR)
        storage.write(memoryview(bytes([1]) * SECTOR), sector * SECTOR, rnd.random() < 0.2)
        written.add(sector)
    storage.close()
    cut = folder / "cut.qcow2"
    context = "qemu:dirty-bitmap:b"
    seen = set()
    for number in range(4 * STATES):
        # Mostly towards the end, where the bitmap is stored.
        begin = len(recorder.log) - 12 if number % 4 else 0
        cut.write_bytes(recorder.state(rnd.randrange(begin, len(recorder.log) + 1), rnd))
        qemu.check(cut, leaks=True)
        storage = Qcow2Storage.open(cut, read_only=True)
        seen.add(context in storage.contexts)
        if context in storage.contexts:
            dirty, at = set(), 0
            for length, flags in storage.extents(context, 0, size):
                if flags:
                    dirty |= set(range(at // SECTOR, (at + length) // SECTOR))
                at += length
            found = bytearray(size)
            storage.read_into(memoryview(found), 0)
            there = {n for n in range(size // SECTOR) if any(found[n * SECTOR : (n + 1) * SECTOR])}
            assert there <= dirty <= written
        storage.close()
    assert seen == {True, False}


@pytest.mark.parametrize("options", ["", "extended_l2=on"])
def test_a_power_cut_with_a_data_file(options, folder):
    rnd = random.Random(1)
    size = 1 << 20
    path = qemu.create(
        folder / "disk.qcow2", size, options=",".join(filter(None, [options, "data_file=data.raw"]))
    )
    both = TwoFiles(Recorder.of(path), Recorder.of(folder / "data.raw"))
    disk = Disk(path, both.log, bytes(size), True, open_file=both.open)
    script(disk, rnd, size, 64 << 10)
    disk.storage.close()
    cut, cut_data = folder / "cut.qcow2", folder / "cut.raw"
    for _ in range(STATES):
        until = rnd.randrange(len(both.log.log) + 1)
        cut.write_bytes(both.state(both.image, until, rnd))
        cut_data.write_bytes(both.state(both.data, until, rnd))
        flushed, possible = disk.allowed(until)
        with_storage(cut, flushed, possible, chain=Chain(cut_data))


@pytest.mark.parametrize("options", ["cluster_size=4k", "cluster_size=512", "extended_l2=on"])
def test_a_power_cut_while_many_threads_write(options, folder):
    size, workers = 512 << 10, 5
    path = qemu.create(folder / "disk.qcow2", size, options=options)
    recorder = Recorder.of(path)
    storage = Qcow2Storage.open(path, open_file=lambda p, _: recorder)
    flushed = []  # places in the log, and the turns that are durable there by sector

    def work(me):
        rnd = random.Random(me)
        mine = {}
        for turn in range(1, 60):
            sector = rnd.randrange(size // SECTOR // workers) * workers + me
            if sector % 64 < 48:
                data = pattern(turn, sector * SECTOR, SECTOR)
                write_promptly(storage, data, sector * SECTOR)
                mine[sector] = turn
            else:  # nobody writes to the last clusters but for giving them back again
                begin = sector // 64 * 64 * SECTOR + 48 * SECTOR
                write_promptly(storage, pattern(turn, begin, 16 * SECTOR), begin)
                storage.trim(begin, 16 * SECTOR, False)
            if rnd.random() < 0.15:
                durable = dict(mine)
                storage.flush()
                flushed.append((len(recorder.log), durable))

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, range(workers)))
    storage.close()
    rnd = random.Random(1)
    cut = folder / "cut.qcow2"
    for _ in range(STATES):
        until = rnd.randrange(len(recorder.log) + 1)
        cut.write_bytes(recorder.state(until, rnd))
        qemu.check(cut, leaks=True)
        storage = Qcow2Storage.open(cut, read_only=True)
        found = bytearray(size)
        storage.read_into(memoryview(found), 0)
        storage.close()
        turns = {}
        for sector in range(size // SECTOR):
            data = bytes(found[sector * SECTOR : (sector + 1) * SECTOR])
            turns[sector], where = struct.unpack_from("<QQ", data)
            assert where == (sector if turns[sector] else 0)
            assert data == (pattern(turns[sector], sector * SECTOR, SECTOR) if where else data)
        for place, durable in flushed:
            if place <= until:
                assert all(turns[sector] >= turn for sector, turn in durable.items())


class TwoFiles:
    """Two recorders whose writes have an order among each other, as the power fails for both."""

    def __init__(self, image, data):
        self.image, self.data = image, data
        self.log = Recorder("both", b"")
        for file in (image, data):
            file.log = Both(file, self.log.log)

    def open(self, path, read_only):
        return self.data if path.name == "data.raw" else self.image

    @staticmethod
    def state(file, until, rnd):
        own = [entry for whose, entry in file.log.both[:until] if whose is file]
        alone = Recorder(file.name, file.begin)
        alone.log = own
        return alone.state(len(own), rnd)


class Both(list):
    """A log that also goes to a common one, where it is said whose an entry is."""

    def __init__(self, file, both):
        super().__init__()
        self.file, self.both = file, both

    def append(self, entry):
        super().append(entry)
        self.both.append((self.file, entry))
