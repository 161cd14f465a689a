"""Images that were not closed get their refcounts anew before they are written to."""

from __future__ import annotations

import random
import subprocess

import pytest

from nbdlink.errors import StorageError
from nbdlink.storage.qcow2 import Qcow2Storage

from . import qemu
from .crash import Recorder

K = 1024
SIZE = 8 * K * K


def left_dirty(path, *commands):
    """Have qemu-io write to an image with lazy refcounts, and end badly."""
    words = [word for command in (*commands, "flush", "abort") for word in ("-c", command)]
    subprocess.run(["qemu-io", "-f", "qcow2", *words, str(path)], capture_output=True, timeout=60)
    assert qemu.info(path)["dirty-flag"]
    return path


def is_dirty(path):
    return bool(path.read_bytes()[79] & 1)


@pytest.fixture(
    params=[
        "",
        "cluster_size=512",
        "cluster_size=512,refcount_bits=64",
        "cluster_size=1k,refcount_bits=1",
        "extended_l2=on",
    ],
    ids=lambda options: options or "default",
)
def image(request, folder):
    options = ",".join(["lazy_refcounts=on", *([request.param] if request.param else [])])
    path = qemu.create(folder / "disk.qcow2", SIZE, options=options)
    qemu.io(path, "write -P 1 1M 300k")
    if "refcount_bits=1" not in options:
        qemu.run("qemu-img", "snapshot", "-c", "s", path)
    return left_dirty(path, "write -P 2 0 3M", "write -P 3 4M 100k", "discard 2M 512k")


def test_writing_repairs_first(image):
    content = bytearray(qemu.content(image))
    storage = Qcow2Storage.open(image)
    assert not is_dirty(image)
    storage.write(memoryview(b"x" * 100 * K), 6 * K * K, False)
    content[6 * K * K : 6 * K * K + 100 * K] = b"x" * 100 * K
    storage.close()
    qemu.check(image)
    assert qemu.content(image) == content


def test_reading_does_not_need_it(image):
    before = image.read_bytes()
    storage = Qcow2Storage.open(image, read_only=True)
    assert "not closed" in storage.warnings[0]
    buffer = bytearray(SIZE)
    storage.read_into(memoryview(buffer), 0)
    storage.close()
    assert image.read_bytes() == before
    assert buffer == qemu.content(image)


def test_a_repair_that_was_cut_off_can_be_done_again(image, folder):
    rnd = random.Random(1)
    content = qemu.content(image)
    recorder = Recorder.of(image)
    Qcow2Storage.open(image, open_file=lambda p, _: recorder).close()
    cut = folder / "cut.qcow2"
    for _ in range(6):
        cut.write_bytes(recorder.state(rnd.randrange(len(recorder.log) + 1), rnd))
        Qcow2Storage.open(cut).close()
        qemu.check(cut)
        assert qemu.content(cut) == content


def test_bitmaps_and_snapshots_are_counted(folder):
    path = qemu.create(folder / "disk.qcow2", SIZE, options="lazy_refcounts=on")
    qemu.io(path, "write 0 1M")
    qemu.run("qemu-img", "snapshot", "-c", "s", path)
    qemu.run("qemu-img", "bitmap", "--add", "-g", "512", "-f", "qcow2", path, "b")
    qemu.io(path, "write 2M 1M")
    left_dirty(path, "write 0 200k", "write 5M 1M")
    Qcow2Storage.open(path).close()
    qemu.check(path)


def test_compressed_clusters_are_counted(folder):
    (folder / "source.raw").write_bytes((b"text " * SIZE)[:SIZE])
    path = folder / "disk.qcow2"
    qemu.run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "lazy_refcounts=on",
             folder / "source.raw", path)  # fmt: skip
    left_dirty(path, "write 0 200k")
    Qcow2Storage.open(path).close()
    qemu.check(path)


@pytest.mark.parametrize("kind", ["blocks", "table"])
@pytest.mark.parametrize("options", ["cluster_size=512,refcount_bits=64", "cluster_size=512"])
def test_refcount_blocks_and_a_longer_table_are_made_where_they_are_missing(kind, options, folder):
    path = qemu.create(folder / "disk.qcow2", SIZE, options=options)
    qemu.io(path, "write -P 1 0 5M")
    content = bytearray(path.read_bytes())
    table, clusters = int.from_bytes(content[48:56], "big"), int.from_bytes(content[56:60], "big")
    if kind == "blocks":
        content[table + 8 : table + 8 * 64] = bytes(8 * 63)
    else:
        assert clusters > 1 or options == "cluster_size=512"
        content[table : table + clusters * 512] = bytes(clusters * 512)
        content[56:60] = (1).to_bytes(4, "big")
    content[79] |= 1
    path.write_bytes(content)
    storage = Qcow2Storage.open(path)
    storage.write(memoryview(b"x" * K), 6 * K * K, False)
    storage.close()
    qemu.check(path)
    assert qemu.content(path)[: 5 * K * K] == b"\x01" * 5 * K * K


def test_wrong_copied_flags_are_put_right(folder):
    path = qemu.create(folder / "disk.qcow2", SIZE)
    qemu.io(path, "write -P 1 0 1M")
    content = bytearray(path.read_bytes())
    l1 = int.from_bytes(content[40:48], "big")
    content[l1] ^= 0x80
    l2 = int.from_bytes(content[l1 : l1 + 8], "big") & (1 << 56) - 1
    content[l2] ^= 0x80
    content[79] |= 1
    path.write_bytes(content)
    Qcow2Storage.open(path).close()
    qemu.check(path)


def test_a_table_that_leads_nowhere_is_not_repaired(image):
    content = bytearray(image.read_bytes())
    l1 = int.from_bytes(content[40:48], "big")
    content[l1 : l1 + 8] = (1 << 63 | 1 << 40).to_bytes(8, "big")
    image.write_bytes(content)
    with pytest.raises(StorageError, match="behind the end of the file"):
        Qcow2Storage.open(image)
    assert is_dirty(image)
