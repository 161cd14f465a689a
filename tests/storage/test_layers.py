"""Layers over a raw file: windows, overlays, policies and the guard of the first sector."""

from __future__ import annotations

import errno
import os
import random
import select
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings

from nbdlink.errors import StorageError
from nbdlink.protocol.constants import DEPTH_CONTEXT
from nbdlink.storage.blocksize import BlockSized, BlockSizes
from nbdlink.storage.direct import DirectStorage
from nbdlink.storage.firstsector import FirstSector
from nbdlink.storage.overlay import Overlay
from nbdlink.storage.policy import Policy
from nbdlink.storage.rangelocks import LockedRanges
from nbdlink.storage.ranges import RangeLock
from nbdlink.storage.raw import RawStorage
from nbdlink.storage.window import Window
from nbdlink.storage.writebehind import WriteBehind

from ..server.fakes import MemoryStorage
from .arrays import SIZE, play, read, scripts, told, write

K = 1024
HOLE = 3


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(64 * K))
    return path


LAYERS = {
    "window": lambda path: Window(RawStorage.open(path), 0, SIZE),
    "overlay": lambda path: Overlay(RawStorage.open(path, read_only=True)),
    "policy": lambda path: Policy(
        RawStorage.open(path), write_through=True, discards=False, detect_zeroes="on"
    ),
    "first sector": lambda path: FirstSector(RawStorage.open(path)),
    "direct": DirectStorage.open,
    "write behind": lambda path: WriteBehind(RawStorage.open(path), 16 * K),
    "locked ranges": lambda path: LockedRanges(RawStorage.open(path)),
}


@pytest.mark.parametrize("layer", LAYERS)
@settings(max_examples=60, deadline=None)
@given(script=scripts())
def test_every_layer_behaves_as_an_array_of_bytes(layer, script):
    model = bytearray(os.urandom(SIZE))
    with tempfile.NamedTemporaryFile(dir=tempfile.gettempdir()) as file:
        file.write(model)
        file.flush()
        storage = LAYERS[layer](file.name)
        before = bytes(model)
        try:
            play(storage, model, script)
            assert read(storage) == model
        finally:
            storage.close()
        assert Path(file.name).read_bytes() == (before if layer == "overlay" else model)


# Windows.


def test_a_window_leaves_what_is_around_it_alone(image):
    before = image.read_bytes()
    window = Window(RawStorage.open(image), 1000, 5000)
    write(window, bytes(5000), 0)
    assert read(window) == bytes(5000)
    window.close()
    assert image.read_bytes() == before[:1000] + bytes(5000) + before[6000:]


@pytest.mark.parametrize(
    ("offset", "size", "says"),
    [
        (64 * K, None, "lies behind its end"),
        (0, 64 * K + 1, "1 bytes past its end"),
        (0, 0, "cannot be negative"),
    ],
)
def test_a_window_that_is_not_there_is_refused(image, offset, size, says):
    storage = RawStorage.open(image)
    with pytest.raises(StorageError, match=says):
        Window(storage, offset, size)
    storage.close()


def test_a_window_without_a_size_grows(image):
    window = Window(RawStorage.open(image), 512, None)
    os.truncate(image, 128 * K)
    window.notice_growth()
    assert window.size == 128 * K - 512
    window.close()


def test_a_window_has_another_signature_than_the_whole(image):
    whole = RawStorage.open(image)
    assert Window(whole, 512, None).signature != whole.signature
    whole.close()


# Overlays.


@pytest.fixture
def sparse(tmp_path):
    """One MiB, of which the first half has data."""
    path = tmp_path / "sparse.img"
    path.write_bytes(os.urandom(512 * K))
    os.truncate(path, 1024 * K)
    return path


@pytest.fixture
def overlay(sparse):
    overlay = Overlay(RawStorage.open(sparse, read_only=True))
    yield overlay
    overlay.close()


def test_an_overlay_tells_what_it_has_and_what_is_below(overlay):
    write(overlay, b"x" * 4096, 768 * K)
    overlay.zero(0, 64 * K, may_trim=True, fast=True, fua=False)
    assert told(overlay) == [
        (0, 64 * K, HOLE),
        (64 * K, 448 * K, 0),
        (512 * K, 256 * K, HOLE),
        (768 * K, 4 * K, 0),
        (772 * K, 252 * K, HOLE),
    ]


def test_an_overlay_is_one_deep_and_what_is_below_is_deeper(overlay):
    write(overlay, b"x", 100 * K)
    assert told(overlay, DEPTH_CONTEXT) == [
        (0, 100 * K, 2),
        (100 * K, 4 * K, 1),
        (104 * K, 920 * K, 2),
    ]


def test_what_an_overlay_trims_reads_as_zeroes_and_takes_no_space(overlay):
    write(overlay, b"x" * (256 * K), 0)
    took = os.fstat(overlay._fd).st_blocks
    overlay.trim(0, 256 * K, fua=False)
    assert read(overlay, 0, 256 * K) == bytes(256 * K)
    assert os.fstat(overlay._fd).st_blocks <= took - 500


def test_an_overlay_has_a_signature_of_its_own_each_time(sparse):
    seen = set()
    for _ in range(2):
        overlay = Overlay(RawStorage.open(sparse, read_only=True))
        seen.add(overlay.signature)
        overlay.close()
    assert len(seen) == 2


def test_an_overlay_leaves_no_file_behind(sparse, tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    overlay = Overlay(RawStorage.open(sparse, read_only=True))
    write(overlay, b"x", 0)
    assert list(folder.iterdir()) == []
    overlay.close()


def test_an_overlay_without_a_folder_says_where_it_looked(sparse, monkeypatch):
    monkeypatch.setenv("TMPDIR", "/nonexistent")
    storage = RawStorage.open(sparse, read_only=True)
    with pytest.raises(StorageError, match="/nonexistent: no such file") as caught:
        Overlay(storage)
    assert "TMPDIR" in caught.value.hint
    storage.close()


def test_an_overlay_over_what_is_far_too_large_says_so(sparse, monkeypatch):
    monkeypatch.setattr(os, "ftruncate", lambda fd, size: None)
    storage = RawStorage.open(sparse, read_only=True)
    storage.size = 1 << 62
    with pytest.raises(StorageError, match="too large for a temporary overlay"):
        Overlay(storage)
    storage.close()


def hammer(storage, threads=8, rounds=200, unit=100):
    """Have each thread write its own bytes of every block; give what must be there then."""
    size = storage.size // (threads * unit) * threads * unit
    wrong = []

    def work(number):
        try:
            for turn in range(rounds):
                for at in range(number * unit, size, threads * unit):
                    if (at // unit + turn) % 4 == 0:
                        write(storage, bytes([number + 1]) * unit, at)
        except BaseException as error:
            wrong.append(error)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
    return b"".join(bytes([number + 1]) * unit for number in range(threads)) * (
        size // (threads * unit)
    )


@pytest.mark.parametrize("kind", ["overlay", "direct"])
def test_neighbours_in_a_block_lose_nothing_of_each_other(kind, tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(16 * K))
    storage = LAYERS[kind](path)
    expected = hammer(storage, rounds=20)
    assert read(storage, 0, len(expected)) == expected
    storage.close()


@pytest.mark.parametrize("kind", ["overlay", "direct"])
@pytest.mark.parametrize("seed", range(3))
def test_each_thread_has_its_part_as_if_it_were_alone(kind, seed, tmp_path):
    # Parts that begin and end within blocks, which two neighbours share.
    part, threads = 10_001, 6
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(seed).randbytes(part * threads))
    content = path.read_bytes()
    storage = LAYERS[kind](path)
    wrong = []

    def work(number):
        dice = random.Random(f"{seed} {number}")
        start = number * part
        model = bytearray(content[start : start + part])
        try:
            for _ in range(150):
                begin, end = sorted(dice.choices(range(part + 1), k=2))
                what = dice.choice(["write", "write", "zero", "trim"])
                if what == "write":
                    model[begin:end] = dice.randbytes(end - begin)
                    write(storage, model[begin:end], start + begin)
                elif what == "zero":
                    model[begin:end] = bytes(end - begin)
                    storage.zero(start + begin, end - begin, may_trim=True, fast=False, fua=False)
                elif end > begin:
                    storage.trim(start + begin, end - begin, False)
                    model[begin:end] = read(storage, start + begin, end - begin)
                assert read(storage, start, part) == model
        except BaseException as error:
            wrong.append(error)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    storage.close()
    assert not wrong, wrong[0]


# Policies.


@pytest.fixture
def memory():
    return MemoryStorage(64 * K)


def test_write_through_makes_everything_durable(memory):
    policy = Policy(memory, write_through=True)
    write(policy, b"x", 0)
    policy.zero(0, 1, may_trim=False, fast=False, fua=False)
    policy.trim(0, 1, fua=False)
    assert memory.calls == [
        ("write", 0, 1, True),
        ("zero", 0, 1, False, False, True),
        ("trim", 0, 1, True),
    ]


def test_unsafe_makes_nothing_durable(memory):
    policy = Policy(memory, flushes=False)
    write(policy, b"x", 0, fua=True)
    policy.flush()
    assert memory.calls == [("write", 0, 1, False)]


def test_what_is_not_to_be_discarded_is_not(memory):
    policy = Policy(memory, discards=False)
    policy.trim(0, 4096, fua=False)
    policy.zero(0, 4096, may_trim=True, fast=False, fua=False)
    assert memory.calls == [("zero", 0, 4096, False, False, False)]
    assert policy.can_trim


@pytest.mark.parametrize(
    ("mode", "data", "offset", "call"),
    [
        ("off", bytes(4096), 0, ("write", 0, 4096, False)),
        ("on", bytes(4096), 4096, ("zero", 4096, 4096, False, False, False)),
        ("unmap", bytes(8192), 0, ("zero", 0, 8192, True, False, False)),
        ("on", bytes(4095) + b"x", 0, ("write", 0, 4096, False)),
        ("on", bytes(4096), 512, ("write", 512, 4096, False)),
        ("on", bytes(512), 0, ("write", 0, 512, False)),
        ("on", b"", 0, ("write", 0, 0, False)),
    ],
)
def test_aligned_writes_of_nothing_but_zeroes_are_found(memory, mode, data, offset, call):
    write(Policy(memory, detect_zeroes=mode), data, offset)
    assert memory.calls == [call]


@pytest.mark.parametrize(
    ("options", "guarded"),
    [
        ({"flushes": False}, False),
        ({"discards": False}, False),
        ({"write_through": True}, True),
        ({"detect_zeroes": "on"}, True),
    ],
)
def test_a_policy_keeps_the_engine_from_writing_only_where_it_must(image, options, guarded):
    storage = Policy(RawStorage.open(image), **options)
    assert (storage.plain_file.guarded > storage.size) is guarded
    storage.close()


# The first sector.


@pytest.fixture
def guarded(image):
    image.write_bytes(bytes(64 * K))
    storage = FirstSector(RawStorage.open(image))
    yield storage
    storage.close()


def refused(call, *arguments, **options):
    with pytest.raises(OSError, match="would look like") as caught:
        call(*arguments, **options)
    assert caught.value.errno == errno.EPERM


def test_the_first_sector_cannot_become_another_format(guarded, image):
    refused(write, guarded, b"QFI\xfb\0\0\0\3" + bytes(5000), 0)
    assert image.read_bytes() == bytes(64 * K)


def test_nor_can_it_bit_by_bit(guarded):
    write(guarded, b"QFI", 0)
    write(guarded, b"\0\0\0\3", 4)
    refused(write, guarded, b"\xfb", 3)


def test_nor_by_two_processes_of_which_each_writes_half(guarded):
    go, begin = os.pipe()
    done, told = os.pipe()
    child = os.fork()
    if not child:
        os.read(go, 1)
        try:
            write(guarded, b"QFI\xfb", 0)
        except OSError:
            os.write(told, b"refused")
        else:
            os.write(told, b"written")
        os._exit(0)
    with guarded._checked(4, b"\0\0\0\3"):
        os.write(begin, b"!")
        assert not select.select([done], [], [], 0.3)[0], "it did not wait"
        guarded.below.write(memoryview(b"\0\0\0\3"), 4, False)
    assert os.read(done, 7) == b"refused"
    os.waitpid(child, 0)
    for fd in (go, begin, done, told):
        os.close(fd)


def test_nor_by_zeroes(guarded):
    write(guarded, b"QED!", 0)
    refused(guarded.zero, 3, 5, may_trim=True, fast=False, fua=False)
    refused(guarded.trim, 3, 4096, fua=False)


def test_what_is_behind_it_is_nobodys_business(guarded):
    write(guarded, b"QFI\xfb\0\0\0\3", 512)
    assert guarded.plain_file.guarded == 512


def test_a_window_that_begins_later_has_less_to_guard(image):
    image.write_bytes(bytes(64 * K))
    storage = FirstSector(RawStorage.open(image, offset=0x40, size=4096))
    assert storage.plain_file.guarded == 512 - 0x40
    refused(write, storage, b"\x7f\x10\xda\xbe", 0)  # VDI has its sign there
    storage.close()


# Ranges.


def test_ranges_that_do_not_meet_are_held_at_once():
    lock = RangeLock()
    with lock.hold(0, 3, exclusive=True):
        thread = threading.Thread(target=lambda: lock.hold(4, 5, exclusive=True).__enter__())
        thread.start()
        thread.join(30)
        assert not thread.is_alive()


def test_a_range_is_waited_for():
    lock, order = RangeLock(), []

    def second():
        with lock.hold(3, 9, exclusive=False):
            order.append("second")

    with lock.hold(0, 3, exclusive=True):
        thread = threading.Thread(target=second)
        thread.start()
        order.append("first")
    thread.join(30)
    assert order == ["first", "second"]


def test_a_writer_that_waits_is_not_passed_by_new_readers(eventually):
    lock, order = RangeLock(), []

    def take(name, exclusive):
        with lock.hold(0, 3, exclusive=exclusive):
            order.append(name)

    with lock.hold(0, 0, exclusive=False):
        threads = []
        for name, exclusive in (("writer", True), ("reader", False)):
            threads.append(threading.Thread(target=take, args=(name, exclusive)))
            threads[-1].start()
            eventually(lambda: len(lock._asked) == len(threads) + 1)
        assert order == []
    for thread in threads:
        thread.join(30)
    assert order == ["writer", "reader"]


def test_readers_of_a_range_do_not_wait_for_each_other():
    lock = RangeLock()
    with lock.hold(0, 3, exclusive=False):
        thread = threading.Thread(target=lambda: lock.hold(0, 3, exclusive=False).__enter__())
        thread.start()
        thread.join(30)
        assert not thread.is_alive()


# Locked ranges.


def test_a_write_that_overlaps_waits_for_the_one_that_is_under_way(eventually):
    below = MemoryStorage()
    below.gate.clear()
    storage = LockedRanges(below)
    threads = [
        threading.Thread(target=write, args=(storage, letter * 8, at))
        for letter, at in ((b"a", 0), (b"b", 4), (b"c", 100))
    ]
    threads[0].start()
    assert below.entered.wait(30)
    for thread in threads[1:]:
        thread.start()
    eventually(lambda: len(below.calls) == 2 and len(storage._ranges._asked) == 3)
    assert [call[1] for call in below.calls] == [0, 100]
    below.gate.set()
    for thread in threads:
        thread.join(30)
    assert below.data[:12] == b"aaaabbbbbbbb"


def test_a_read_waits_for_the_write_of_its_range_and_no_other(eventually):
    below = MemoryStorage()
    below.gate.clear()
    storage = LockedRanges(below)
    writer = threading.Thread(target=write, args=(storage, b"a" * 8, 0))
    writer.start()
    assert below.entered.wait(30)
    assert read(storage, 8, 8) == below.data[8:16]
    found = []
    reader = threading.Thread(target=lambda: found.append(read(storage, 4, 8)))
    reader.start()
    eventually(lambda: len(storage._ranges._asked) == 2)
    below.gate.set()
    reader.join(30)
    writer.join(30)
    assert found[0][:4] == b"aaaa"


# Block sizes.


def test_the_larger_of_two_minimum_block_sizes_counts():
    assert BlockSized(MemoryStorage(minimum_block=4096), BlockSizes(512)).minimum_block == 4096
    assert BlockSized(MemoryStorage(minimum_block=512), BlockSizes(4096)).minimum_block == 4096
