"""What is done at once: the same as in the long way, or nothing.

That both ways go together is for test_model.py, test_threads.py and test_crash.py to say.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from nbdlink.storage.open import CACHE_MODES, Part, StorageSpec, open_storage
from nbdlink.storage.qcow2 import Qcow2Storage

from . import qemu
from .ways import read, read_at_once, write, write_at_once

K = 1024
CLUSTER = 64 * K
SIZE = 4 * K * K


@pytest.fixture
def opened(folder):
    """Open images that are closed and sound when the test ends."""
    storages = []

    def start(path, **options):
        storages.append((path, Qcow2Storage.open(path, **options)))
        return storages[-1][1]

    yield start
    for path, storage in storages:
        storage.close()
        qemu.check(path)


@pytest.fixture
def path(folder):
    return qemu.create(folder / "disk.qcow2", SIZE)


def on(folder, form, content):
    """Make an image on a backing file with some content."""
    base = folder / f"base.{form}"
    (folder / "base.raw").write_bytes(content)
    if form == "qcow2":
        qemu.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", folder / "base.raw", base)
    return qemu.create(folder / "top.qcow2", SIZE, backing=base.name, backing_format=form)


# Reading.


def test_data_is_read_once_its_table_is_in_memory(path, opened):
    qemu.io(path, "write -P 7 0 1M")
    storage = opened(path)
    assert read_at_once(storage, 512, 4 * K) is None
    read(storage, 0, 1)
    assert read_at_once(storage, 512, 4 * K) == b"\x07" * (4 * K)
    assert read_at_once(storage, CLUSTER - 5, 3 * CLUSTER) == b"\x07" * (3 * CLUSTER)


def test_zeroes_are_read_unless_they_are_worth_an_answer_of_their_own(path, opened):
    qemu.io(path, "write -P 7 0 64k", "write -z 64k 64k")
    storage = opened(path)
    read(storage, 0, 1)
    for offset in (CLUSTER, 2 * CLUSTER):
        assert read_at_once(storage, offset, 16 * K) == bytes(16 * K)
        assert read_at_once(storage, offset, 32 * K) is None
    assert read_at_once(storage, CLUSTER - K, 2 * K) == b"\x07" * K + bytes(K)


def test_what_no_table_tells_of_is_zeroes(path, opened):
    assert read_at_once(opened(path), 5, 4 * K) == bytes(4 * K)


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_what_lies_behind_is_read_through(form, folder, opened):
    content = os.urandom(SIZE // 2 + 100)
    storage = opened(on(folder, form, content))
    read(storage)
    for offset in (0, CLUSTER - 1, len(content) - 2 * K):
        expected = content[offset : offset + 4 * K].ljust(4 * K, b"\0")
        assert read_at_once(storage, offset, 4 * K) == expected
    write(storage, b"n" * CLUSTER, CLUSTER)
    assert read_at_once(storage, 2 * CLUSTER - 1, 2) == b"n" + content[2 * CLUSTER :][:1]


def test_compressed_clusters_are_left_to_others(folder, opened):
    (folder / "raw").write_bytes(b"c" * SIZE)
    path = folder / "disk.qcow2"
    qemu.run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", folder / "raw", path)
    storage = opened(path)
    read(storage, 0, 1)
    assert read_at_once(storage, 0, 512) is None


@pytest.mark.parametrize("options", ["extended_l2=on", "data_file=data.raw", "cluster_size=512"])
def test_other_kinds_of_images_are_read_too(options, folder, opened):
    path = qemu.create(folder / "disk.qcow2", SIZE, options=options)
    qemu.io(path, "write -P 9 0 128k")
    storage = opened(path)
    read(storage)
    assert read_at_once(storage, 64 * K, 4 * K) == b"\x09" * (4 * K)


# Writing.


def test_a_cluster_of_its_own_is_overwritten(path, opened):
    storage = opened(path)
    write(storage, b"x" * CLUSTER, 0)
    end = path.stat().st_size
    assert write_at_once(storage, b"y" * K, 512)
    assert path.stat().st_size == end
    assert read(storage, 0, 2 * K) == b"x" * 512 + b"y" * K + b"x" * 512


def test_subclusters_that_are_there_are_overwritten(folder, opened):
    storage = opened(qemu.create(folder / "disk.qcow2", SIZE, options="extended_l2=on"))
    write(storage, b"x" * 4 * K, 8 * K)
    assert write_at_once(storage, b"y" * 4 * K, 8 * K)
    assert read(storage, 8 * K, 4 * K) == b"y" * 4 * K
    assert not write_at_once(storage, b"y" * 5 * K, 8 * K)
    assert not write_at_once(storage, b"y" * 4 * K, 6 * K)


@pytest.mark.parametrize(("offset", "length"), [(0, 512), (CLUSTER - 5, 10), (100, 3 * CLUSTER)])
def test_new_clusters_are_taken_and_are_zeroes_around(offset, length, path, opened):
    storage = opened(path)
    assert not write_at_once(storage, b"?", SIZE - 1)  # nothing of the refcounts is in memory
    write(storage, b"!", SIZE - 1)
    assert write_at_once(storage, b"n" * length, offset)
    expected = bytearray(SIZE)
    expected[offset : offset + length] = b"n" * length
    expected[-1:] = b"!"
    assert read(storage) == expected
    storage.close()
    assert qemu.content(path) == expected


def test_a_cluster_that_was_used_before_shows_nothing_of_that(path, opened):
    storage = opened(path)
    write(storage, b"s" * (4 * CLUSTER), 0)
    storage.flush()
    storage.trim(0, 4 * CLUSTER, False)
    storage.flush()
    storage.flush()
    end = path.stat().st_size
    assert write_at_once(storage, b"n", CLUSTER + 9)
    assert path.stat().st_size == end
    assert read(storage, CLUSTER, CLUSTER) == bytes(9) + b"n" + bytes(CLUSTER - 10)


def test_what_a_snapshot_has_too_is_not_touched(path, opened):
    qemu.io(path, "write -P 1 0 1M")
    qemu.run("qemu-img", "snapshot", "-c", "s", path)
    storage = opened(path)
    read(storage)
    assert not write_at_once(storage, b"n" * 512, 0)
    write(storage, b"n" * 512, 0)  # from here on the table is the disk's own
    assert write_at_once(storage, b"n" * 512, 0)
    assert not write_at_once(storage, b"n" * 512, CLUSTER)
    assert write_at_once(storage, b"n" * CLUSTER, CLUSTER)  # nothing has to be copied
    storage.close()
    assert qemu.content(path, snapshot=1)[: K * K] == b"\x01" * (K * K)


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_what_would_have_to_be_copied_from_behind_is_left_to_others(form, folder, opened):
    content = os.urandom(SIZE // 2)
    storage = opened(on(folder, form, content))
    write(storage, b"n", SIZE - 1)
    assert not write_at_once(storage, b"n" * 512, 0)
    assert not write_at_once(storage, b"n" * CLUSTER, 1)
    assert write_at_once(storage, b"n" * CLUSTER, CLUSTER)
    assert write_at_once(storage, b"n" * 512, SIZE // 2)
    assert read(storage, 0, CLUSTER) == content[:CLUSTER]
    assert (folder / "base.raw").read_bytes() == content


def test_nothing_is_written_that_a_bitmap_follows(path, opened):
    qemu.io(path, "write 0 1M")
    qemu.run("qemu-img", "bitmap", "--add", "-f", "qcow2", path, "b")
    storage = opened(path)
    read(storage)
    assert not write_at_once(storage, b"n" * 512, 0)


def test_nobody_waits_for_whoever_changes_tables(path, opened):
    storage = opened(path)
    write(storage, b"o" * CLUSTER, 0)
    answers = []
    with storage._image.lock:
        # In a thread of its own, as it would never come back if it waited.
        thread = threading.Thread(
            target=lambda: answers.extend(
                [
                    write_at_once(storage, b"n" * 512, CLUSTER),
                    write_at_once(storage, b"n" * 512, 512),
                    read_at_once(storage, 0, K),
                    read_at_once(storage, CLUSTER, K),
                ]
            )
        )
        thread.start()
        thread.join(30)
        assert not thread.is_alive()
    assert answers == [False, True, b"o" * 512 + b"n" * 512, bytes(K)]


def test_an_image_that_is_only_read_is_not_written(path, opened):
    assert opened(path, read_only=True).at_once.write is None


# Layers.


@pytest.mark.parametrize(
    ("options", "reads", "writes"),
    [
        ({}, True, True),
        ({"cache": CACHE_MODES["unsafe"]}, True, True),
        ({"cache": CACHE_MODES["writethrough"]}, True, False),
        ({"detect_zeroes": "on"}, True, False),
        ({"discard": "ignore"}, True, True),
        ({"overlay": True}, False, False),
        ({"parts": (Part(512),)}, False, False),
    ],
    ids=str,
)
def test_no_layer_is_passed_by(options, reads, writes, path):
    storage = open_storage(StorageSpec(str(path), "qcow2", **options))
    at_once = storage.at_once
    storage.close()
    assert bool(at_once) == reads
    assert bool(at_once and at_once.write) == writes


def test_without_the_page_cache_nothing_is_at_once(tmp_path):
    path = qemu.create(tmp_path / "disk.qcow2", SIZE)
    try:
        storage = open_storage(StorageSpec(str(path), "qcow2", cache=CACHE_MODES["none"]))
    except OSError:
        pytest.skip(f"no O_DIRECT in {Path(tmp_path)}")
    assert storage.at_once is None
    storage.close()
