"""Dirty bitmaps: told of as qemu-nbd tells of them, and kept true by writing."""

from __future__ import annotations

import pytest

from nbdlink.errors import StorageError
from nbdlink.storage.qcow2 import Qcow2Storage, bitmaps

from . import qemu
from .crash import Recorder
from .test_reading import nbdinfo_map

K = 1024
SIZE = 8 * K * K


def bitmap(path, *words, name="b0"):
    qemu.run("qemu-img", "bitmap", *words, "-f", "qcow2", path, name)


@pytest.fixture
def image(folder):
    """Give an image with an enabled bitmap that has seen some writes."""
    path = qemu.create(folder / "disk.qcow2", SIZE)
    bitmap(path, "--add", "-g", "64k")
    qemu.io(path, "write -P 1 0 100k", "write -P 1 3M 1M")
    return path


def dirty(path, name="b0", **options):
    """Give the dirty ranges: begin and end."""
    storage = Qcow2Storage.open(path, read_only=True, **options)
    try:
        return ranges(storage, name)
    finally:
        storage.close()


def ranges(storage, name="b0"):
    found, at = [], 0
    for length, flags in storage.extents(f"qemu:dirty-bitmap:{name}", 0, storage.size):
        if flags:
            found.append((at, at + length))
        at += length
    assert at == storage.size
    return found


def flags_of(path, name="b0"):
    for entry in qemu.info(path)["format-specific"]["data"].get("bitmaps", []):
        if entry["name"] == name:
            return set(entry["flags"])
    return None


def write(storage, offset, length):
    storage.write(memoryview(b"w" * length), offset, False)


def test_a_bitmap_is_told_of(image):
    assert dirty(image) == [(0, 128 * K), (3 * K * K, 4 * K * K)]


@pytest.mark.parametrize("granularity", ["512", "4k", "64k", "1M"])
@pytest.mark.parametrize("options", ["cluster_size=512", "cluster_size=64k"])
def test_a_bitmap_is_told_of_as_qemu_nbd_does(options, granularity, folder):
    path = qemu.create(folder / "disk.qcow2", SIZE, options=options)
    bitmap(path, "--add", "-g", granularity)
    qemu.io(path, "write 0 1k", "write 700k 9k", "write 3M 1M", "write 8388096 512")
    storage = Qcow2Storage.open(path, read_only=True)
    context = "qemu:dirty-bitmap:b0"
    ours = [tuple(extent) for extent in storage.extents(context, 0, SIZE)]
    storage.close()
    assert ours == nbdinfo_map(folder, path, context, "-B", "b0")


def test_only_consistent_bitmaps_are_contexts(image):
    bitmap(image, "--add", name="b1")
    in_use(image, "b1")
    storage = Qcow2Storage.open(image, read_only=True)
    assert [c for c in storage.contexts if "bitmap" in c] == ["qemu:dirty-bitmap:b0"]
    storage.close()


def test_a_snapshot_has_no_bitmaps(image):
    qemu.run("qemu-img", "snapshot", "-c", "s", image)
    storage = Qcow2Storage.open(image, read_only=True, snapshot="s")
    assert not [c for c in storage.contexts if "bitmap" in c]
    storage.close()


def in_use(path, name):
    """Mark a bitmap as a program that has ended badly leaves it."""
    content = bytearray(path.read_bytes())
    at = content.rindex(name.encode() + bytes(8 - len(name))) - 24
    content[at + 15] |= 1
    path.write_bytes(content)
    assert "in-use" in flags_of(path, name)


@pytest.mark.parametrize("options", ["", "cluster_size=512", "extended_l2=on"])
@pytest.mark.parametrize("granularity", ["512", "64k"])
def test_an_enabled_bitmap_follows_what_is_written(options, granularity, folder):
    path = qemu.create(folder / "disk.qcow2", SIZE, options=options)
    bitmap(path, "--add", "-g", granularity)
    twin = folder / "twin.qcow2"
    twin.write_bytes(path.read_bytes())
    qemu.io(twin, "write 5k 3k", "write 1000k 300k", "write -z 2M 1M", "write 7M 1M")
    storage = Qcow2Storage.open(path)
    write(storage, 5 * K, 3 * K)
    write(storage, 1000 * K, 300 * K)
    storage.zero(2 * K * K, K * K, may_trim=False, fast=False, fua=False)
    write(storage, 7 * K * K, K * K)
    live = ranges(storage)
    storage.close()
    assert live == dirty(path) == dirty(twin)
    assert flags_of(path) == {"auto"}
    qemu.check(path)


def test_a_bitmap_keeps_what_it_knew(image):
    storage = Qcow2Storage.open(image)
    write(storage, 6 * K * K, 1)
    storage.close()
    at = 6 * K * K
    assert dirty(image) == [(0, 128 * K), (3 * K * K, 4 * K * K), (at, at + 64 * K)]


def test_trimming_is_writing(image):
    storage = Qcow2Storage.open(image)
    storage.trim(6 * K * K, K * K, False)
    storage.close()
    assert dirty(image)[-1] == (6 * K * K, 7 * K * K)


def test_a_disabled_bitmap_does_not_follow(image):
    bitmap(image, "--disable")
    before = dirty(image)
    storage = Qcow2Storage.open(image)
    write(storage, 6 * K * K, 1)
    storage.close()
    assert dirty(image) == before
    assert flags_of(image) == set()


def test_a_bitmap_is_in_use_until_the_image_is_closed(image):
    recorder = Recorder.of(image)
    storage = Qcow2Storage.open(image, open_file=lambda p, _: recorder)
    write(storage, 6 * K * K, 1)
    storage.flush()
    cut = image.with_name("cut.qcow2")
    cut.write_bytes(recorder.now)
    assert flags_of(cut) == {"auto", "in-use"}
    qemu.check(cut)
    storage.close()


def test_reading_marks_nothing(image):
    before = image.read_bytes()
    dirty(image)
    assert image.read_bytes() == before


def test_a_bitmap_that_was_in_use_stays_so(image):
    in_use(image, "b0")
    storage = Qcow2Storage.open(image)
    write(storage, 6 * K * K, 1)
    storage.close()
    assert "in-use" in flags_of(image)
    qemu.check(image)


def test_qemu_goes_on_with_a_bitmap_that_was_written_here(image):
    storage = Qcow2Storage.open(image)
    write(storage, 6 * K * K, 1)
    storage.close()
    qemu.io(image, "write 7M 64k")
    assert dirty(image)[-2:] == [
        (6 * K * K, 6 * K * K + 64 * K),
        (7 * K * K, 7 * K * K + 64 * K),
    ]
    qemu.check(image)


def test_several_bitmaps_of_different_granularity(image):
    bitmap(image, "--add", "-g", "4k", name="fine")
    bitmap(image, "--add", "-g", "2M", name="coarse")
    storage = Qcow2Storage.open(image)
    write(storage, 5 * K * K + 5 * K, 4 * K)
    storage.close()
    assert dirty(image, "fine") == [(5 * K * K + 4 * K, 5 * K * K + 12 * K)]
    assert dirty(image, "coarse") == [(4 * K * K, 6 * K * K)]
    qemu.check(image)


def test_bitmaps_that_somebody_wrote_past_are_not_told_of(image):
    content = bytearray(image.read_bytes())
    content[95] &= ~1  # the autoclear bit: a writer that does not know bitmaps has cleared it
    image.write_bytes(content)
    storage = Qcow2Storage.open(image, read_only=True)
    assert not [c for c in storage.contexts if "bitmap" in c]
    storage.close()


def test_a_damaged_directory_is_refused_for_writing_only(image):
    content = bytearray(image.read_bytes())
    at = content.rindex(b"b0\0\0\0\0\0\0") - 24
    content[at + 16] = 9  # a type that there is not
    image.write_bytes(content)
    with pytest.raises(StorageError, match="bitmap 1 is damaged"):
        Qcow2Storage.open(image)
    storage = Qcow2Storage.open(image, read_only=True)
    assert "bitmap 1 is damaged" in storage.warnings[0]
    storage.close()


def test_bitmaps_cannot_take_up_all_memory(image, monkeypatch):
    for number in range(1, 4):
        bitmap(image, "--add", "-g", "64k", name=f"b{number}")
    monkeypatch.setattr(bitmaps, "_MAX_TABLES", 4 * 8)
    Qcow2Storage.open(image, read_only=True).close()
    monkeypatch.setattr(bitmaps, "_MAX_TABLES", 3 * 8)
    storage = Qcow2Storage.open(image, read_only=True)
    assert not any("bitmap" in context for context in storage.contexts)
    assert "too large" in storage.warnings[0]
    storage.close()
    with pytest.raises(StorageError, match="too large"):
        Qcow2Storage.open(image)


def test_marks_that_many_threads_make_are_all_there(image):
    from concurrent.futures import ThreadPoolExecutor

    qemu.run("qemu-img", "bitmap", "--add", "-g", "512", "-f", "qcow2", image, "fine")
    storage = Qcow2Storage.open(image)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: write(storage, n * K, 512), range(4096)))
    storage.close()
    assert dirty(image, "fine") == [(n * K, n * K + 512) for n in range(4096)]
