"""From a description to layers: what is refused, what is found out, and what stays fast."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from nbdlink.errors import ConfigError, StorageError
from nbdlink.storage.blocksize import BlockSized, BlockSizes
from nbdlink.storage.direct import DirectStorage
from nbdlink.storage.firstsector import FirstSector
from nbdlink.storage.open import CACHE_MODES, Cache, Part, StorageSpec, open_storage
from nbdlink.storage.overlay import Overlay
from nbdlink.storage.policy import Policy
from nbdlink.storage.rangelocks import LockedRanges
from nbdlink.storage.raw import RawStorage
from nbdlink.storage.window import Window
from nbdlink.storage.writebehind import WriteBehind

from .arrays import read, write

SIZE = 1 << 20


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture
def opened(image):
    """Open the image; give the layers, and the storage itself."""
    storages = []

    def open_it(path=image, **options):
        storage = open_storage(StorageSpec(str(path), **options))
        storages.append(storage)
        return storage

    yield open_it
    for storage in storages:
        storage.close()


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"format": "raw"}, RawStorage),
        ({"read_only": True}, RawStorage),
        ({}, FirstSector),
        ({"parts": (Part(511),)}, FirstSector),
        ({"parts": (Part(512),)}, RawStorage),
        ({"overlay": True}, Overlay),
        ({"format": "raw", "cache": CACHE_MODES["none"]}, DirectStorage),
        ({"format": "raw", "cache": CACHE_MODES["directsync"]}, Policy),
        ({"format": "raw", "cache": CACHE_MODES["writethrough"]}, Policy),
        ({"format": "raw", "cache": CACHE_MODES["unsafe"]}, Policy),
        ({"format": "raw", "discard": "ignore"}, Policy),
        ({"format": "raw", "detect_zeroes": "on"}, Policy),
        ({"format": "raw", "parts": (Part(512), Part(512))}, Window),
        ({"format": "raw", "write_behind": 1 << 20}, WriteBehind),
        ({"format": "raw", "lock_ranges": True}, LockedRanges),
        ({"format": "raw", "lock_ranges": True, "write_behind": 1 << 20}, LockedRanges),
        ({"format": "raw", "block_sizes": BlockSizes(512, 4096, 4096)}, BlockSized),
    ],
)
def test_a_layer_is_there_if_it_is_needed(opened, options, kind):
    assert type(opened(**options)) is kind


def test_a_part_of_a_part_is_where_it_should_be(opened, image):
    storage = opened(format="raw", parts=(Part(4096, 8192), Part(100, 50)))
    assert read(storage) == image.read_bytes()[4196:4246]


def test_a_window_of_an_overlay_writes_to_the_overlay(opened, image):
    before = image.read_bytes()
    storage = opened(overlay=True, parts=(Part(4096, 8192),))
    write(storage, b"x" * 8192, 0)
    assert read(storage) == b"x" * 8192
    assert image.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "fast"),
    [
        ({}, True),
        ({"format": "raw", "parts": (Part(512, 4096),)}, True),
        ({"format": "raw", "discard": "ignore"}, True),
        ({"format": "raw", "cache": CACHE_MODES["writethrough"]}, True),
        ({"overlay": True}, False),
        ({"format": "raw", "cache": CACHE_MODES["none"]}, False),
    ],
)
def test_a_raw_file_keeps_its_fast_roads(opened, options, fast):
    assert (opened(**options).plain_file is not None) is fast


def test_a_raw_image_that_was_found_out_is_told_of(opened, image, caplog):
    opened()
    assert f"{image}: no format was given" in caplog.text
    assert "-f raw" in caplog.text


@pytest.mark.parametrize("options", [{"format": "raw"}, {"read_only": True}, {"overlay": True}])
def test_nothing_is_told_where_nothing_can_happen(opened, caplog, options):
    opened(**options)
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"format": "nonsense"}, "'nonsense' is not a format"),
        ({"detect_zeroes": "unmap", "discard": "ignore"}, "discard=ignore forbids"),
        ({"aio": "native"}, "without the page cache only"),
        ({"aio": "native", "cache": CACHE_MODES["none"]}, "aio=native is not available"),
        ({"aio": "io_uring"}, "aio=io_uring is not available"),
        ({"snapshot": "1", "format": "raw"}, "raw images have no internal snapshots"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_opened(options, says):
    with pytest.raises(ConfigError, match=says):
        open_storage(StorageSpec("/nonexistent", **options))


@pytest.mark.parametrize(
    ("head", "says"),
    [
        (b"LUKS\xba\xbe\0\x01", "luks images cannot be served"),
        (b"QED\0", "qed images cannot be served"),
        (b"conectix", "vpc images can only be read"),
    ],
)
def test_a_format_that_is_no_use_is_named(tmp_path, head, says):
    path = tmp_path / "image"
    path.write_bytes(head.ljust(4096, b"\0"))
    with pytest.raises(StorageError, match=says):
        open_storage(StorageSpec(str(path)))


@pytest.mark.parametrize("image_format", ["vmdk", "vdi", "vhdx"])
def test_a_file_that_is_no_such_image_is_not_served_as_one(tmp_path, image_format):
    path = tmp_path / "image"
    path.write_bytes(bytes(1 << 20))
    with pytest.raises(StorageError, match="image: it does not begin as one"):
        open_storage(StorageSpec(str(path), image_format, read_only=True))


def test_a_file_too_short_for_a_header_is_told(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(b"QFI\xfb\0\0\0\3".ljust(23, b"\0") + b"\x10")
    with pytest.raises(StorageError, match="has 24 bytes only"):
        open_storage(StorageSpec(str(path)))


def test_a_device_is_asked_for_and_a_file_is_there(image):
    with pytest.raises(StorageError, match="is not a block device"):
        open_storage(StorageSpec(str(image), device=True))


def test_a_failure_on_the_way_up_closes_what_is_below(image):
    before = len(list(Path("/proc/self/fd").iterdir()))
    spec = StorageSpec(str(image), overlay=True, parts=(Part(0), Part(2 * SIZE)))
    with pytest.raises(StorageError, match="behind its end"):
        open_storage(spec)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# qcow2, of which here only the way there is of interest.


@pytest.fixture
def qcow2(image, tmp_path):
    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img is not installed")
    path = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", image, path], check=True)
    return path


@pytest.mark.interop
@pytest.mark.parametrize("cache", ["writeback", "none", "directsync", "unsafe"])
def test_qcow2_is_found_out_and_written_to(qcow2, image, cache):
    model = bytearray(image.read_bytes())
    storage = open_storage(StorageSpec(str(qcow2), cache=CACHE_MODES[cache]))
    for offset, length in [(0, 100), (70_001, 300_000), (SIZE - 5, 5)]:
        model[offset : offset + length] = b"x" * length
        write(storage, b"x" * length, offset)
    storage.flush()
    assert read(storage) == model
    storage.close()
    done = subprocess.run(["qemu-img", "check", qcow2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    subprocess.run(["qemu-img", "convert", "-O", "raw", qcow2, image], check=True)
    assert image.read_bytes() == model


@pytest.mark.interop
def test_many_threads_write_to_qcow2_without_the_page_cache(tmp_path):
    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img is not installed")
    part, threads = 1_000_003, 6
    path, raw = tmp_path / "disk.qcow2", tmp_path / "disk.img"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, "8M"]
    subprocess.run(command, check=True)
    storage = open_storage(StorageSpec(str(path), cache=CACHE_MODES["none"]))
    model = bytearray(storage.size)
    wrong = []

    def work(number):
        dice = random.Random(number)
        try:
            for _ in range(60):
                begin, end = sorted(dice.choices(range(part + 1), k=2))
                end = min(end, begin + 50_000)
                data = dice.randbytes(end - begin)
                model[number * part + begin : number * part + end] = data
                write(storage, data, number * part + begin)
                if not dice.randrange(10):
                    storage.flush()
        except BaseException as error:
            wrong.append(error)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong, wrong[0]
    assert read(storage) == model
    storage.flush()
    storage.close()
    done = subprocess.run(["qemu-img", "check", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    subprocess.run(["qemu-img", "convert", "-O", "raw", path, raw], check=True)
    assert raw.read_bytes() == model


@pytest.mark.interop
@pytest.mark.parametrize(
    ("cache", "syncs"),
    [(CACHE_MODES["unsafe"], False), (Cache(direct=True, flushes=False), False), (Cache(), True)],
)
def test_an_unsafe_qcow2_image_is_written_and_never_synced(qcow2, monkeypatch, cache, syncs):
    synced = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    storage = open_storage(StorageSpec(str(qcow2), cache=cache))
    storage.zero(0, SIZE, may_trim=True, fast=False, fua=True)
    write(storage, b"x" * 70_000, 12345)
    storage.flush()
    storage.close()
    assert bool(synced) is syncs
    done = subprocess.run(["qemu-img", "check", qcow2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.interop
def test_qcow2_is_kept_from_others(opened, qcow2):
    opened(qcow2)
    with pytest.raises(StorageError, match="is in use"):
        open_storage(StorageSpec(str(qcow2), read_only=True))
    done = subprocess.run(["qemu-img", "info", qcow2], capture_output=True, text=True)
    assert "Failed to get shared" in done.stderr


@pytest.mark.interop
def test_what_qcow2_is_based_on_is_locked_as_well(opened, qcow2, tmp_path):
    top = tmp_path / "top.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", qcow2, "-F", "qcow2", top], check=True
    )
    opened(top)
    done = subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "write 0 1", qcow2], capture_output=True, text=True
    )
    assert "Is another process using the image" in done.stderr
