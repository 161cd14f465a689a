"""Images that QEMU made read the same here, and are told of in the same way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from nbdlink.errors import StorageError
from nbdlink.storage.chain import Chain
from nbdlink.storage.qcow2 import Qcow2Storage, image
from nbdlink.storage.qcow2.backing import MAX_DEPTH
from tests.listening import is_listening

from . import qemu

K = 1024
SIZE = 3 * K * K + 512

OPTIONS = [
    "cluster_size=512",
    "cluster_size=4k",
    "cluster_size=64k",
    "cluster_size=2M",
    "compat=0.10",
    "compat=0.10,cluster_size=512",
    "refcount_bits=1",
    "refcount_bits=64",
    "extended_l2=on",
    "extended_l2=on,cluster_size=16k",
    "lazy_refcounts=on",
    "preallocation=metadata",
    "preallocation=falloc",
    "preallocation=full",
    "data_file=data.raw",
    "data_file=data.raw,data_file_raw=on",
    "data_file=data.raw,extended_l2=on",
    "compression_type=zstd",
]
# QEMU writes compressed clusters as a whole, and only where there are none.
COMPRESSED = ("cluster_size=4k", "cluster_size=64k", "extended_l2=on", "compression_type=zstd")
WRITES = (
    "write -P 1 0 4k",
    "write -P 2 700k 300k",
    "write -P 3 1500k 3k",
    "write -P 4 3145728 512",
    "write -z 720k 100k",
    "write -z -u 2M 256k",
    "discard 832k 64k",
)


@pytest.fixture
def opened(folder):
    """Open images that are closed when the test ends."""
    storages = []

    def start(path, **options):
        storages.append(Qcow2Storage.open(path, read_only=True, **options))
        return storages[-1]

    yield start
    for storage in storages:
        storage.close()


def read(storage, offset=0, length=None):
    buffer = bytearray(storage.size - offset if length is None else length)
    storage.read_into(memoryview(buffer), offset)
    return bytes(buffer)


def written(path, *, compressed=False):
    """Make an image have some of everything."""
    version_3 = qemu.info(path)["format-specific"]["data"]["compat"] == "1.1"
    qemu.io(path, *(w for w in WRITES if version_3 or "-z" not in w))
    if compressed:
        qemu.io(path, "write -c -P 7 1M 256k", "write -c -P 8 2560k 64k")
    return path


@pytest.mark.parametrize("options", OPTIONS)
def test_an_image_reads_as_it_does_with_qemu(options, folder, opened):
    path = qemu.create(folder / "disk.qcow2", SIZE, options=options)
    written(path, compressed=options in COMPRESSED)
    storage = opened(path)
    assert storage.size == SIZE
    assert read(storage) == qemu.content(path)


@pytest.mark.parametrize("options", OPTIONS)
def test_extents_are_the_ones_that_qemu_tells(options, folder, opened):
    path = written(qemu.create(folder / "disk.qcow2", SIZE, options=options))
    assert qemu.ours(opened(path)) == qemu.mapping(path)


@pytest.mark.parametrize("method", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster", ["512", "4k", "64k", "2M"])
def test_compressed_images_read_as_they_do_with_qemu(method, cluster, folder, opened):
    source = folder / "source.raw"
    noise = os.urandom(100 * K)
    source.write_bytes((b"text " * 300 * K)[: 700 * K] + noise + bytes(300 * K) + noise)
    path = folder / "disk.qcow2"
    qemu.run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2",
             "-o", f"compression_type={method},cluster_size={cluster}", source, path)  # fmt: skip
    storage = opened(path)
    assert read(storage) == source.read_bytes()
    assert qemu.ours(storage) == qemu.mapping(path)


def test_a_missing_zstd_package_is_named(folder, opened, monkeypatch):
    source = folder / "source.raw"
    source.write_bytes(b"text " * 20 * K)
    path = folder / "disk.qcow2"
    qemu.run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2",
             "-o", "compression_type=zstd", source, path)  # fmt: skip
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(OSError, match="Python package zstandard"):
        read(opened(path))


def test_a_few_bytes_anywhere_read_right(folder, opened):
    path = written(qemu.create(folder / "disk.qcow2", SIZE, options="cluster_size=4k"))
    whole, storage = qemu.content(path), opened(path)
    for offset in range(0, SIZE - 9000, 7919):
        assert read(storage, offset, 9000) == whole[offset : offset + 9000]


@pytest.mark.parametrize("options", ["cluster_size=4k", "", "extended_l2=on"])
def test_extents_of_a_short_range_are_those_of_the_whole(options, folder, opened):
    path = written(qemu.create(folder / "disk.qcow2", SIZE, options=options))
    storage = opened(path)
    for context in ("base:allocation", "qemu:allocation-depth"):
        whole = bytearray()
        for length, flags in storage.extents(context, 0, SIZE):
            whole += bytes([flags]) * (length // 512)
        for _ in range(2):  # the second time the tables are in memory
            parts = bytearray()
            for offset in range(0, SIZE, 5 * 512):
                for length, flags in storage.extents(context, offset, min(2560, SIZE - offset)):
                    parts += bytes([flags]) * (length // 512)
            assert parts == whole


# What lies behind.


def chain(folder, sizes, formats, options=""):
    """Make a chain of images, each with some writes of its own; give the path of the top."""
    before = None
    for number, (size, form) in enumerate(zip(sizes, formats, strict=True)):
        path = folder / f"layer{number}"
        if form == "raw":
            path.write_bytes(bytes([0xEE]) * size)
        else:
            qemu.create(
                path,
                size,
                options=options,
                backing=before and before[0],
                backing_format=before and before[1],
            )
            at = number * 300
            qemu.io(path, f"write -P {number + 1} {at}k 200k", f"write -z {at + 100}k 50k")
        before = path.name, form
    return path


CHAINS = {
    "raw": ([SIZE, SIZE], ["raw", "qcow2"]),
    "shorter raw": ([700 * K + 100, SIZE], ["raw", "qcow2"]),
    "longer raw": ([2 * SIZE, SIZE], ["raw", "qcow2"]),
    "qcow2": ([SIZE, SIZE], ["qcow2", "qcow2"]),
    "three": ([SIZE, 1024 * K, 2 * SIZE], ["qcow2", "qcow2", "qcow2"]),
    "four": ([2 * SIZE, SIZE, 1024 * K, SIZE], ["raw", "qcow2", "qcow2", "qcow2"]),
}


@pytest.mark.parametrize("options", ["", "cluster_size=512", "extended_l2=on"])
@pytest.mark.parametrize("kind", CHAINS)
def test_a_chain_reads_as_it_does_with_qemu(kind, options, folder, opened):
    path = chain(folder, *CHAINS[kind], options)
    storage = opened(path)
    assert read(storage) == qemu.content(path)
    assert qemu.ours(storage) == qemu.mapping(path)


def nbdinfo_map(folder, path, context, *options):
    """Give what qemu-nbd tells of a context: lengths and flags, neighbours joined."""
    sock = folder / "qemu.sock"
    words = ["qemu-nbd", "-r", "-t", "-f", "qcow2", "-k", str(sock), *options, str(path)]
    server = subprocess.Popen(words)
    try:
        end = time.monotonic() + 30
        while not is_listening(sock):  # there is no event for it
            assert time.monotonic() < end
            assert server.poll() is None
            time.sleep(0.005)
        said = qemu.run("nbdinfo", "--json", f"--map={context}", f"nbd+unix:///?socket={sock}")
    finally:
        server.terminate()
        server.wait()
    found = []
    for item in json.loads(said):
        if found and found[-1][1] == item["type"]:
            found[-1] = (found[-1][0] + item["length"], item["type"])
        else:
            found.append((item["length"], item["type"]))
    return found


@pytest.mark.parametrize("kind", CHAINS)
@pytest.mark.parametrize("context", ["qemu:allocation-depth", "base:allocation"])
def test_contexts_of_a_chain_are_the_ones_of_qemu_nbd(kind, context, folder, opened):
    path = chain(folder, *CHAINS[kind])
    storage = opened(path)
    size = storage.size // 512 * 512
    ours = [tuple(extent) for extent in storage.extents(context, 0, size)]
    assert ours == clipped(nbdinfo_map(folder, path, context, "-A"), size)


def clipped(extents, size):
    found = []
    for length, flags in extents:
        if size:
            found.append((min(length, size), flags))
            size -= found[-1][0]
    return found


def test_a_backing_file_is_looked_for_beside_the_image(folder, opened, monkeypatch):
    (folder / "images").mkdir()
    path = chain(folder / "images", [K * K, K * K], ["raw", "qcow2"])
    monkeypatch.chdir("/")
    assert read(opened(path), 900 * K, 1) == b"\xee"


@pytest.mark.parametrize(
    "name",
    [
        'json:{"driver": "qcow2", "file": {"driver": "file", "filename": "layer0"}}',
        'json:{"driver": "qcow2", "file.filename": "layer0"}',
        "file:layer0",
    ],
)
def test_other_ways_to_name_a_backing_file(name, folder, opened):
    path = chain(folder, [K * K, K * K], ["qcow2", "qcow2"])
    qemu.run("qemu-img", "rebase", "-u", "-b", name, "-F", "qcow2", path, cwd=folder)
    assert read(opened(path), 0, 1) == b"\x01"


@pytest.mark.parametrize(
    "name",
    [
        'json:{"driver": "qcow2", "file": {"driver": "nbd", "host": "localhost"}}',
        'json:{"driver": "raw", "offset": 512, "file": {"driver": "file", "filename": "layer0"}}',
        "json:{",
        "nbd://localhost/",
    ],
)
def test_a_backing_file_that_cannot_be_opened_here_is_refused_by_name(name, folder):
    path = chain(folder, [K * K, K * K], ["qcow2", "qcow2"])
    qemu.run("qemu-img", "rebase", "-u", "-b", name, "-F", "qcow2", path, cwd=folder)
    with pytest.raises(StorageError, match=r"layer1: its backing file") as caught:
        Qcow2Storage.open(path, read_only=True)
    assert name in str(caught.value)


def test_a_backing_format_that_is_not_known_is_refused_by_name(folder):
    path = chain(folder, [K * K, K * K], ["qcow2", "qcow2"])
    qemu.run("qemu-img", "rebase", "-u", "-b", "layer0", "-F", "vmdk", path, cwd=folder)
    with pytest.raises(StorageError, match="in the format vmdk"):
        Qcow2Storage.open(path, read_only=True)


def forget_backing_format(path):
    content = bytearray(path.read_bytes())
    at = content.index((0xE2792ACA).to_bytes(4, "big"))
    content[at : at + 4] = (0x12345678).to_bytes(4, "big")  # an extension that nobody knows
    path.write_bytes(content)


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_a_format_that_is_not_recorded_is_found_out_and_warned_of(form, folder, opened):
    path = chain(folder, [K * K, K * K], [form, "qcow2"])
    forget_backing_format(path)
    storage = opened(path)
    assert f"taken for {form}" in storage.warnings[0]
    assert read(storage, 0, 1) == (b"\xee" if form == "raw" else b"\x01")


def test_a_probed_file_of_another_format_is_refused(folder):
    path = chain(folder, [K * K, K * K], ["raw", "qcow2"])
    (folder / "layer0").write_bytes(b"KDMV" + bytes(K))
    forget_backing_format(path)
    with pytest.raises(StorageError, match="in the format vmdk"):
        Qcow2Storage.open(path, read_only=True)


def test_a_missing_backing_file_is_named(folder):
    path = chain(folder, [K * K, K * K], ["raw", "qcow2"])
    (folder / "layer0").unlink()
    with pytest.raises(StorageError, match="layer0 cannot be opened"):
        Qcow2Storage.open(path, read_only=True)


def test_an_image_that_backs_itself_is_refused(folder):
    path = chain(folder, [K * K, K * K, K * K], ["qcow2"] * 3)
    qemu.run("qemu-img", "rebase", "-u", "-b", "layer2", "-F", "qcow2", folder / "layer0")
    with pytest.raises(StorageError, match="its own backing file"):
        Qcow2Storage.open(path, read_only=True)


def test_an_empty_raw_file_may_back_an_image(folder, opened):
    path = chain(folder, [K * K, K * K], ["raw", "qcow2"])
    (folder / "layer0").write_bytes(b"")
    assert read(opened(path), 0, 4) == bytes(4)


# External data files.


def test_a_data_file_may_be_named(folder, opened):
    path = written(qemu.create(folder / "disk.qcow2", SIZE, options="data_file=data.raw"))
    content = qemu.content(path)
    (folder / "data.raw").rename(folder / "moved.raw")
    with pytest.raises(StorageError, match=r"data\.raw cannot be opened"):
        Qcow2Storage.open(path, read_only=True)
    assert read(opened(path, chain=Chain(folder / "moved.raw"))) == content


def test_a_data_file_for_an_image_that_has_none_is_refused(folder):
    path = qemu.create(folder / "disk.qcow2", SIZE)
    with pytest.raises(StorageError, match="no external data file"):
        Qcow2Storage.open(path, read_only=True, chain=Chain(path))


# Snapshots.


@pytest.fixture
def with_snapshots(folder):
    path = qemu.create(folder / "disk.qcow2", SIZE, options="cluster_size=4k")
    for number in (1, 2, 3):
        qemu.io(path, f"write -P {number} {number * 100}k 250k")
        qemu.run("qemu-img", "snapshot", "-c", f"state {number}", path)
    qemu.io(path, "write -P 9 0 500k")
    return path


@pytest.mark.parametrize("number", ["1", "2", "3"])
def test_a_snapshot_reads_as_it_does_with_qemu(number, with_snapshots, opened):
    expected = qemu.content(with_snapshots, snapshot=number)
    assert read(opened(with_snapshots, snapshot=number)) == expected
    assert read(opened(with_snapshots, snapshot=f"state {number}")) == expected


def test_an_id_goes_before_a_name(with_snapshots, opened):
    qemu.run("qemu-img", "snapshot", "-c", "1", with_snapshots)
    storage = opened(with_snapshots, snapshot="1")
    assert read(storage) == qemu.content(with_snapshots, snapshot="1")


def test_an_unknown_snapshot_is_refused_and_the_known_ones_are_told(with_snapshots):
    with pytest.raises(StorageError, match="no snapshot 'state 4'") as caught:
        Qcow2Storage.open(with_snapshots, read_only=True, snapshot="state 4")
    assert "2 (state 2)" in caught.value.hint


def test_a_snapshot_of_another_size_has_its_own(with_snapshots, opened):
    qemu.run("qemu-img", "resize", with_snapshots, "8M")
    assert opened(with_snapshots).size == 8 * K * K
    assert opened(with_snapshots, snapshot="1").size == SIZE


def test_a_snapshot_cannot_be_written_to(with_snapshots):
    with pytest.raises(StorageError, match="snapshot cannot be written"):
        Qcow2Storage.open(with_snapshots, snapshot="1")


# Tables in memory.


@pytest.mark.parametrize(("limit", "most"), [(4 * K, 8), (1 << 30, SIZE // (32 * K) + 1)])
def test_tables_in_memory_are_bounded_and_no_more_than_there_are(
    limit, most, folder, opened, monkeypatch
):
    monkeypatch.setattr(image, "L2_LIMIT", limit)
    path = qemu.create(folder / "disk.qcow2", SIZE, options="cluster_size=512")
    # A byte in each range that a table covers.
    qemu.io(path, *(f"write -P {1 + at // (32 * K)} {at} 512" for at in range(0, SIZE, 32 * K)))
    storage = opened(path)
    tables = set()
    for turn in range(2):
        for at in range(0, SIZE, 32 * K):
            assert read(storage, at, 512) == bytes([1 + at // (32 * K)]) * 512, turn
            tables.add(len(storage._image.tables))
    assert max(tables) == most


# Hints, and processes.


def test_a_range_is_read_ahead_through_the_whole_chain(folder, opened, monkeypatch):
    storage = opened(chain(folder, *CHAINS["three"]))
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *rest: asked.append((fd, *rest)))
    storage.cache(0, storage.size)
    assert len({fd for fd, *_ in asked}) == 3
    assert storage.can_cache


def test_a_reader_may_be_served_by_several_processes(folder, opened):
    path = qemu.create(folder / "disk.qcow2", SIZE)
    assert opened(path).may_fork


def test_a_chain_may_be_long_but_not_endless(folder, opened):
    bottom = qemu.create(folder / "layer000", SIZE)
    qemu.io(bottom, "write -P 1 0 4k")
    overlay = folder / "layer001"
    qemu.create(overlay, SIZE, backing="layer000", backing_format="qcow2")
    image = bytearray(overlay.read_bytes())
    at = int.from_bytes(image[8:16], "big")
    for number in range(2, MAX_DEPTH + 1):
        image[at : at + 8] = f"layer{number - 1:03}".encode()
        (folder / f"layer{number:03}").write_bytes(image)
    storage = opened(folder / f"layer{MAX_DEPTH - 1:03}")
    assert read(storage, 0, 4096) == b"\x01" * 4096
    depths = list(storage.extents("qemu:allocation-depth", 0, 4096))
    assert depths == [(4096, MAX_DEPTH)]
    assert list(storage.extents("base:allocation", 0, 4096)) == [(4096, 0)]
    with pytest.raises(StorageError, match="more than 200 images"):
        Qcow2Storage.open(folder / f"layer{MAX_DEPTH:03}", read_only=True)
