"""Damaged images: refused or told of, in bounded time and memory, and never made worse.

NBDLINK_FUZZ_CASES sets how many images with noise in them are tried, of each kind.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import struct

import pytest

from nbdlink.errors import StorageError
from nbdlink.storage.qcow2 import Qcow2Storage, opening, references
from nbdlink.storage.qcow2.header import parse_header

from . import qemu

K = 1024
SIZE = 4 * K * K
CASES = int(os.environ.get("NBDLINK_FUZZ_CASES", "120"))


@pytest.fixture
def image(folder):
    path = qemu.create(folder / "disk.qcow2", SIZE)
    qemu.io(path, "write -P 1 0 1M")
    return path


def patch(path, at, data):
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def number(path, at, length=8):
    return int.from_bytes(path.read_bytes()[at : at + length], "big")


def l2_of(path):
    return number(path, number(path, 40)) & ~(1 << 63)


def read(storage, offset=0, length=4096):
    buffer = bytearray(length)
    storage.read_into(memoryview(buffer), offset)
    return bytes(buffer)


# Headers.

HEADERS = {
    "another magic": (0, b"QFI\xfa", "not a qcow2 image"),
    "version 1": (4, struct.pack(">I", 1), "version 1"),
    "version 4": (4, struct.pack(">I", 4), "version 4"),
    "tiny clusters": (20, struct.pack(">I", 8), r"2\^8"),
    "huge clusters": (20, struct.pack(">I", 22), r"2\^22"),
    "absurd clusters": (20, struct.pack(">I", 0xFFFFFFFF), r"2\^4294967295"),
    "AES": (32, struct.pack(">I", 1), r"encrypted \(AES\)"),
    "LUKS": (32, struct.pack(">I", 2), r"encrypted \(LUKS\)"),
    "other encryption": (32, struct.pack(">I", 9), r"encrypted \(method 9\)"),
    "huge L1 table": (36, struct.pack(">I", 0xFFFFFFFF), "L1 table has"),
    "short L1 table": (36, struct.pack(">I", 0), "too short"),
    "crooked L1 table": (40, struct.pack(">Q", 0x30001), "does not begin at a cluster"),
    "L1 table at the header": (40, struct.pack(">Q", 0), "not inside of the file"),
    "L1 table far away": (40, struct.pack(">Q", 1 << 50), "not inside of the file"),
    "huge disk": (24, struct.pack(">Q", 1 << 62), "too short"),
    "crooked refcount table": (48, struct.pack(">Q", 0x10200), "does not begin at a cluster"),
    "refcount table far away": (48, struct.pack(">Q", 1 << 60), "not inside of the file"),
    "huge refcount table": (56, struct.pack(">I", 1 << 20), "refcount table has"),
    "no refcount table": (56, struct.pack(">I", 0), "no refcount table"),
    "too many snapshots": (60, struct.pack(">I", 1 << 30), "snapshots are too many"),
    "snapshots nowhere": (60, struct.pack(">I", 1), "snapshot table"),
    "wide refcounts": (96, struct.pack(">I", 7), r"2\^7 bits"),
    "short header": (100, struct.pack(">I", 96), "96 bytes"),
    "odd header": (100, struct.pack(">I", 113), "113 bytes"),
    "long header": (100, struct.pack(">I", 1 << 30), "bytes"),
    "compression contradicts": (104, b"\1", "contradicts itself"),
    "compression is missing": (79, b"\x08", "contradicts itself"),
    "long backing name": (8, struct.pack(">QI", 60000, 5000), "5000 bytes"),
    "backing name outside": (8, struct.pack(">QI", 65530, 100), "not in the first cluster"),
    "backing name in the header": (8, struct.pack(">QI", 20, 10), "not in the first cluster"),
    "bitmaps without extension": (95, b"\1", "bitmaps are promised"),
    "raw data file without one": (95, b"\2", "raw external data file"),
    "extension too long": (116, struct.pack(">I", 1 << 20), "too long"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_an_impossible_header_is_refused_by_name_and_reason(kind, image):
    at, data, message = HEADERS[kind]
    patch(image, at, data)
    for read_only in (True, False):
        with pytest.raises(StorageError, match=message) as caught:
            Qcow2Storage.open(image, read_only=read_only)
        assert str(image) in str(caught.value)


def test_an_unknown_feature_is_told_by_its_name(image):
    content = image.read_bytes()
    at = content.index(b"\0\0dirty bit")
    patch(image, at, b"\0\x07time travel".ljust(48, b"\0"))
    patch(image, 72, struct.pack(">Q", 1 << 7 | 1 << 40))
    with pytest.raises(StorageError, match="not known here: time travel, bit 40"):
        Qcow2Storage.open(image, read_only=True)


def test_an_unknown_compatible_feature_is_ignored(image):
    patch(image, 80, struct.pack(">Q", 1 << 33))
    Qcow2Storage.open(image).close()
    assert number(image, 80) == 1 << 33


@pytest.mark.parametrize("length", [0, 3, 71, 103, 511, 5000, 70000])
def test_a_file_that_was_cut_off_is_refused(length, image):
    with image.open("r+b") as file:
        file.truncate(length)
    with pytest.raises(StorageError, match=r"disk\.qcow2"):
        Qcow2Storage.open(image, read_only=True)


def test_a_header_alone_is_parsed_without_io():
    with pytest.raises(StorageError, match="no refcount table"):
        parse_header("x", b"QFI\xfb\0\0\0\2" + bytes(12) + b"\0\0\0\x10" + bytes(65536), 65536)


# Tables.

ENTRIES = {
    "crooked": 1 << 63 | 0x10200,
    "behind the end": 1 << 63 | 1 << 50,
    "the header": 1 << 63,
}


@pytest.mark.parametrize("kind", ["crooked", "behind the end"])
def test_an_l1_entry_that_leads_nowhere_is_an_io_error(kind, image):
    patch(image, number(image, 40), ENTRIES[kind].to_bytes(8, "big"))
    storage = Qcow2Storage.open(image, read_only=True)
    with pytest.raises(OSError, match="L1 entry 0") as caught:
        read(storage)
    assert caught.value.errno == errno.EIO
    storage.close()
    with pytest.raises(StorageError, match="L1 entry 0"):
        Qcow2Storage.open(image)


def test_an_l2_entry_that_is_crooked_stops_writing_and_says_so_on_disk(image):
    patch(image, l2_of(image) + 8, ENTRIES["crooked"].to_bytes(8, "big"))
    storage = Qcow2Storage.open(image)
    assert read(storage) == b"\x01" * 4096
    with pytest.raises(OSError, match="does not begin at a cluster"):
        read(storage, 64 * K)
    with pytest.raises(OSError, match="is damaged") as caught:
        storage.write(memoryview(b"x"), 0, False)
    assert caught.value.errno == errno.EIO
    assert read(storage) == b"\x01" * 4096
    storage.close()
    assert image.read_bytes()[79] & 2


@pytest.mark.parametrize("where", ["header", "L1", "L2", "refcount table", "refcount block", "end"])
def test_data_is_never_written_over_metadata(where, image):
    table = number(image, 48)
    target = {
        "header": 0,
        "L1": number(image, 40),
        "L2": l2_of(image),
        "refcount table": table,
        "refcount block": number(image, table),
        "end": 1 << 40,
    }[where]
    patch(image, l2_of(image), (1 << 63 | target).to_bytes(8, "big"))
    before = bytearray(image.read_bytes())
    storage = Qcow2Storage.open(image)
    if where == "header":  # this is no data at all
        storage.write(memoryview(b"x"), 0, False)
        storage.close()
        assert image.read_bytes()[:72] == before[:72]
        return
    for _ in range(2):
        with pytest.raises(OSError, match="is damaged"):
            storage.write(memoryview(b"x" * K), 512, False)
    with pytest.raises(OSError, match="is damaged"):
        storage.flush()
    storage.close()
    before[79] |= 2
    assert image.read_bytes() == before


def test_metadata_that_counts_as_free_is_not_given_out(image):
    block = number(image, number(image, 48))
    patch(image, block, bytes(2 * 64))  # everything is free
    storage = Qcow2Storage.open(image)
    with pytest.raises(OSError, match="holds metadata"):
        storage.write(memoryview(b"x"), 2 * K * K, False)
    storage.close()
    assert image.read_bytes()[79] & 2


def test_a_cluster_that_is_freed_too_often_is_noticed(image):
    first = number(image, l2_of(image)) & ~(1 << 63)
    block = number(image, number(image, 48))
    patch(image, block + 2 * (first >> 16), bytes(2))
    storage = Qcow2Storage.open(image)
    storage.trim(0, 64 * K, False)
    with pytest.raises(OSError, match="refcount of 0"):
        storage.flush()
    storage.close()


def test_a_refcount_block_that_leads_nowhere_is_refused_for_writing(image):
    patch(image, number(image, 48), (1 << 40).to_bytes(8, "big"))
    with pytest.raises(StorageError, match="refcount block 0"):
        Qcow2Storage.open(image)
    storage = Qcow2Storage.open(image, read_only=True)
    assert read(storage) == b"\x01" * 4096
    storage.close()


def test_a_compressed_cluster_that_is_damaged_is_an_io_error(folder):
    (folder / "source.raw").write_bytes(b"text " * 100 * K)
    path = folder / "disk.qcow2"
    qemu.run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2",
             folder / "source.raw", path)  # fmt: skip
    offset = number(path, l2_of(path)) & (1 << 54) - 1
    patch(path, offset, b"\xff" * 64)
    storage = Qcow2Storage.open(path, read_only=True)
    with pytest.raises(OSError, match="compressed cluster") as caught:
        read(storage)
    assert caught.value.errno == errno.EIO
    storage.close()


def test_an_extended_entry_that_contradicts_itself_is_an_io_error(folder):
    path = qemu.create(folder / "disk.qcow2", SIZE, options="extended_l2=on")
    qemu.io(path, "write 0 64k")
    patch(path, l2_of(path) + 8, b"\xff" * 8)
    storage = Qcow2Storage.open(path, read_only=True)
    with pytest.raises(OSError, match="extended L2 entry"):
        read(storage)
    storage.close()


# Little that means a lot.


def test_snapshots_that_share_an_l1_table_are_refused(image):
    """65536 of them would have to be looked at one after another."""
    with image.open("r+b") as file:
        file.truncate(64 * K * K)
    entry = struct.pack(">QIHHIIQII", number(image, 40), 8192, 0, 0, 0, 0, 0, 0, 0)
    patch(image, 32 * K * K, entry * 65536)
    patch(image, 60, struct.pack(">IQ", 65536, 32 * K * K))
    for read_only in (True, False):
        with pytest.raises(StorageError, match="snapshots overlap"):
            Qcow2Storage.open(image, read_only=read_only)


@pytest.mark.parametrize("options", ["data_file=data.raw", "data_file=data.raw,extended_l2=on"])
def test_a_short_read_of_a_cluster_elsewhere_in_a_data_file_is_an_io_error(options, folder):
    path = qemu.create(folder / "disk.qcow2", SIZE, options=options)
    qemu.io(path, "write -P 1 0 1M")
    place = l2_of(path) + (16 if "extended" in options else 8)
    patch(path, place, (1 << 63 | 128 * K).to_bytes(8, "big"))
    storage = Qcow2Storage.open(path)
    assert read(storage, 0, 512) == b"\1" * 512  # so the table is in memory
    assert not storage.at_once.read(memoryview(bytearray(512)), 64 * K)
    with pytest.raises(OSError, match="elsewhere in the data file"):
        read(storage, 64 * K, 512)
    storage.close()


def test_zeroes_with_a_place_elsewhere_in_a_data_file_are_not_written_over(folder):
    path = qemu.create(folder / "disk.qcow2", SIZE, options="data_file=data.raw")
    qemu.io(path, "write -P 1 0 1M")
    patch(path, l2_of(path) + 8, (1 << 63 | 128 * K | 1).to_bytes(8, "big"))
    storage = Qcow2Storage.open(path)
    with pytest.raises(OSError, match="elsewhere in the data file"):
        storage.write(memoryview(b"2" * 512), 64 * K, False)
    assert read(storage, 128 * K, 512) == b"\1" * 512
    storage.close()


@pytest.mark.parametrize("options", ["data_file=data.raw", "data_file=data.raw,extended_l2=on"])
def test_a_cluster_elsewhere_in_a_data_file_is_an_io_error(options, folder):
    path = qemu.create(folder / "disk.qcow2", SIZE, options=options)
    qemu.io(path, "write -P 1 0 1M")
    patch(path, l2_of(path) + (16 if "extended" in options else 8), (1 << 63).to_bytes(8, "big"))
    storage = Qcow2Storage.open(path)
    with pytest.raises(OSError, match="elsewhere in the data file"):
        read(storage, 64 * K)
    with pytest.raises(OSError, match="elsewhere in the data file"):
        storage.write(memoryview(b"x" * 512), 64 * K, False)
    storage.close()
    assert (folder / "data.raw").read_bytes()[: K * K] == b"\x01" * K * K


def test_an_empty_table_may_be_said_to_be_anywhere(image):
    qemu.run("qemu-img", "snapshot", "-c", "s", image)
    patch(image, number(image, 64), struct.pack(">QI", 1 << 63, 0))
    patch(image, 79, b"\1")
    Qcow2Storage.open(image).close()
    with pytest.raises(StorageError, match="L1 table of snapshot 1 is too short"):
        Qcow2Storage.open(image, read_only=True, snapshot="s")


def test_more_tables_than_can_be_guarded_are_refused_for_writing(image, monkeypatch):
    monkeypatch.setattr(opening, "_MOST_METADATA", 1)
    with pytest.raises(StorageError, match="too many tables"):
        Qcow2Storage.open(image)


def test_a_dirty_image_whose_tables_are_all_the_same_is_repaired_in_time(image):
    # An L1 table of 32 MiB that names one L2 table four million times.
    l2 = l2_of(image)
    patch(image, 2 * K * K, l2.to_bytes(8, "big") * (4 << 20))
    patch(image, 36, struct.pack(">IQ", 4 << 20, 2 * K * K))
    patch(image, 79, b"\1")
    with pytest.raises(StorageError, match="references, more than fit"):
        Qcow2Storage.open(image)


def test_a_repair_that_would_need_too_much_memory_is_refused(image, monkeypatch):
    monkeypatch.setattr(references, "_MAX_COUNTS", 1000)
    patch(image, 79, b"\1")
    with pytest.raises(StorageError, match=r"takes more than .* of memory"):
        Qcow2Storage.open(image)


# Anything at all.

METADATA_OF = {
    "plain": "",
    "small": "cluster_size=512",
    "extended": "extended_l2=on,cluster_size=16k",
    "dirty": "lazy_refcounts=on,cluster_size=4k",
}


@pytest.mark.parametrize("kind", METADATA_OF)
def test_noise_in_the_metadata_hurts_nobody(kind, folder):
    base = qemu.create(folder / "base.qcow2", SIZE, options=METADATA_OF[kind])
    qemu.io(base, "write -P 1 0 300k", "write -z 1M 100k")
    qemu.run("qemu-img", "snapshot", "-c", "s", base)
    qemu.run("qemu-img", "bitmap", "--add", "-f", "qcow2", base, "b")
    qemu.io(base, "write -P 2 100k 300k")
    whole = base.read_bytes()
    cluster = 1 << int.from_bytes(whole[20:24], "big")
    table = int.from_bytes(whole[48:56], "big")
    l1 = int.from_bytes(whole[40:48], "big")
    places = [0, l1, table, int.from_bytes(whole[table : table + 8], "big")]
    places.append(int.from_bytes(whole[l1 : l1 + 8], "big") & ~(1 << 63))
    places.append(int.from_bytes(whole[64:72], "big"))  # snapshots
    # The bitmap directory: its offset ends the bitmaps extension.
    at = whole.index(struct.pack(">II", 0x23852875, 24))
    places.append(int.from_bytes(whole[at + 24 : at + 32], "big"))
    rnd = random.Random(kind)
    path = folder / "noise.qcow2"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(CASES):
        content = bytearray(whole)
        place = rnd.choice(places)
        for _ in range(rnd.choice((1, 1, 2, 8))):
            at = min(place + rnd.randrange(min(cluster, 256)), len(content) - 1)
            content[at] = rnd.choice((0, 0xFF, 1 << rnd.randrange(8), rnd.randrange(256)))
        content[79] |= kind == "dirty"
        path.write_bytes(content)
        use(path)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 100 * K, "KiB"
    assert path.stat().st_size < 64 * K * K


def use(path):
    """Do a little of everything; errors are fine as long as they are of the right kind."""
    try:
        storage = Qcow2Storage.open(path)
    except StorageError:
        return
    try:
        for offset in (0, 200 * K, K * K, SIZE - 8 * K):
            offset = min(offset, max(0, storage.size - 8 * K))
            length = min(8 * K, storage.size)
            for act in (
                lambda o, n: storage.read_into(memoryview(bytearray(n)), o),
                lambda o, n: storage.write(memoryview(b"n" * n), o, False),
                lambda o, n: storage.zero(o, n, may_trim=True, fast=False, fua=False),
                lambda o, n: [
                    list(zip(storage.extents(c, o, n), range(9), strict=False))
                    for c in storage.contexts
                ],
                lambda o, n: storage.trim(o, n, True),
            ):
                attempt(act, offset, length)
    finally:
        attempt(storage.close)


def attempt(act, *arguments):
    try:
        act(*arguments)
    except OSError as error:
        if error.errno not in (errno.EIO, errno.ENOTSUP, errno.EFBIG):
            raise
