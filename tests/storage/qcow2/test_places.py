"""Where an image and its files may be: within an export, and elsewhere than the image says."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest

from nbdlink.errors import ConfigError, StorageError
from nbdlink.server import serve_in_thread
from nbdlink.storage.chain import Backing, Chain, Exactly
from nbdlink.storage.open import CACHE_MODES, StorageSpec, open_storage
from nbdlink.uri import Target

from ...server.fakes import MemoryStorage
from ..arrays import play, read, told, write
from . import qemu

SIZE = 1 << 20


@pytest.fixture
def opened():
    """Open what a description says, until the test ends."""
    storages = []

    def open_it(path, **options):
        options.setdefault("format", "qcow2")
        storage = open_storage(StorageSpec(str(path), **options))
        storages.append(storage)
        return storage

    yield open_it
    for storage in storages:
        storage.close()


# Within an export.


class Disk(MemoryStorage):
    """An export that has the bytes of a file, and more behind them."""

    def __init__(self, path, room, minimum_block):
        super().__init__(path.stat().st_size + room, minimum_block=minimum_block)
        data = path.read_bytes()
        self.data[: len(data)] = data


@pytest.fixture
def exported(folder):
    """Serve an image of qemu-img from an export with room behind it."""
    running = []

    def serve(image, room=4 << 20, minimum_block=1):
        disk = Disk(image, room // 65536 * 65536, minimum_block)
        service = serve_in_thread({"": disk}, unix=folder / "socket")
        service.__enter__()
        running.append(service)
        return disk, Target(socket=str(folder / "socket"))

    yield serve
    for service in running:
        service.__exit__(None, None, None)


def scripted(seed):
    chance = random.Random(seed)
    for _ in range(80):
        begin = chance.randrange(SIZE)
        end = min(SIZE, begin + chance.choice([1, 700, 5000, 70000, 300000]))
        what = chance.choice(["write", "write", "zero", "trim"])
        detail = chance.randrange(256) if what == "write" else chance.random() < 0.3
        yield what, (begin, end), chance.random() < 0.3, detail


@pytest.mark.parametrize("block", [1, 512, 4096])
@pytest.mark.parametrize("options", ["", "cluster_size=512", "extended_l2=on,cluster_size=16k"])
def test_an_image_within_an_export_is_read_and_written(folder, exported, options, block):
    image = qemu.create(folder / "disk.qcow2", SIZE, options=options)
    qemu.io(image, "write -P 7 100k 300k")
    disk, target = exported(image, minimum_block=block)
    model = bytearray(qemu.content(image))
    storage = open_storage(StorageSpec(str(target), "qcow2", target=target))
    play(storage, model, scripted(f"{options}{block}"))
    assert read(storage) == model
    storage.flush()
    storage.close()
    image.write_bytes(disk.data)
    qemu.check(image)
    assert qemu.content(image) == model


def test_an_image_within_an_export_is_found_out(folder, exported):
    image = qemu.create(folder / "disk.qcow2", SIZE)
    _, target = exported(image)
    storage = open_storage(StorageSpec(str(target), target=target, read_only=True))
    assert (storage.size, told(storage)) == (SIZE, [(0, SIZE, 3)])
    storage.close()


def test_an_image_that_has_to_grow_out_of_its_export_has_no_room(folder, exported):
    image = qemu.create(folder / "disk.qcow2", SIZE)
    _, target = exported(image, room=2 << 16)
    storage = open_storage(StorageSpec(str(target), "qcow2", target=target))
    with pytest.raises(OSError, match="cannot grow") as caught:
        write(storage, b"x" * SIZE, 0)
    assert caught.value.errno == errno.ENOSPC
    storage.close()


def test_an_image_within_an_export_is_durable_when_its_flush_returns(folder, exported):
    disk, target = exported(qemu.create(folder / "disk.qcow2", SIZE))
    storage = open_storage(StorageSpec(str(target), "qcow2", target=target))
    write(storage, b"x", 0)
    storage.flush()
    assert disk.calls[-1] == ("flush",)
    disk.failing["flush"] = errno.EIO
    write(storage, b"x", 0)
    for _ in range(2):
        with pytest.raises(OSError, match=r"error|lost"):
            storage.flush()
        disk.failing.clear()
    with pytest.raises(OSError, match="lost"):
        storage.close()


def test_nothing_is_flushed_where_that_is_unsafe(folder, exported):
    disk, target = exported(qemu.create(folder / "disk.qcow2", SIZE))
    spec = StorageSpec(str(target), "qcow2", target=target, cache=CACHE_MODES["unsafe"])
    storage = open_storage(spec)
    write(storage, b"x", 0, fua=True)
    storage.flush()
    storage.close()
    assert ("flush",) not in disk.calls


@pytest.mark.parametrize("how", ["absolute", "said", "relative"])
def test_what_lies_behind_an_image_within_an_export_is_a_file(folder, exported, how):
    base = qemu.create(folder / "base.qcow2", SIZE)
    qemu.io(base, "write -P 9 0 4k")
    name = base if how == "absolute" else "base.qcow2"
    image = qemu.create(folder / "disk.qcow2", None, backing=name, backing_format="qcow2")
    _, target = exported(image)
    chain = Chain(backing=Backing(base, None, Chain())) if how == "said" else Chain()
    spec = StorageSpec(str(target), "qcow2", target=target, chain=chain)
    if how == "relative":
        with pytest.raises(StorageError, match="recorded without a folder"):
            open_storage(spec)
        return
    storage = open_storage(spec)
    assert read(storage, 0, 4096) == b"\x09" * 4096
    storage.close()


# Elsewhere than the image says.


@pytest.fixture
def layered(folder):
    """An image on a raw file of twos, and another one of threes to be put there instead."""
    for name, byte in (("two.raw", 2), ("three.raw", 3)):
        (folder / name).write_bytes(bytes([byte]) * SIZE)
    return qemu.create(folder / "top.qcow2", None, backing="two.raw", backing_format="raw")


def test_the_backing_file_that_is_said_counts(layered, folder, opened):
    said = Backing(folder / "three.raw", None, Chain())
    assert read(opened(layered, chain=Chain(backing=said)), 0, 3) == b"\3\3\3"


def test_an_image_can_be_had_without_its_backing_file(layered, opened):
    assert read(opened(layered, chain=Chain(has_backing=False)), 0, 3) == bytes(3)


def test_a_backing_file_can_be_given_to_an_image_without(folder, layered, opened):
    image = qemu.create(folder / "alone.qcow2", SIZE)
    said = Backing(folder / "three.raw", "raw", Chain())
    assert read(opened(image, chain=Chain(backing=said)), 0, 3) == b"\3\3\3"


def test_what_lies_behind_the_backing_file_can_be_said_too(folder, layered, opened):
    image = qemu.create(folder / "above.qcow2", None, backing=layered, backing_format="qcow2")
    three = Backing(folder / "three.raw", "raw", Chain())
    said = Backing(None, None, Chain(backing=three))
    assert read(opened(image, chain=Chain(backing=said)), 0, 3) == b"\3\3\3"


def test_a_format_alone_is_for_the_recorded_backing_file(folder, layered, opened):
    image = qemu.create(folder / "above.qcow2", None, backing=layered, backing_format="qcow2")
    size = layered.stat().st_size
    storage = opened(image, chain=Chain(backing=Backing(None, "raw", Chain())))
    assert read(storage, 0, 4) == b"QFI\xfb"
    assert read(storage, size, 1) == b"\0"
    lone = qemu.create(folder / "alone.qcow2", SIZE)
    with pytest.raises(StorageError, match="records no backing file"):
        opened(lone, chain=Chain(backing=Backing(None, "raw", Chain())))


def test_only_qcow2_images_have_something_behind(layered, opened):
    with pytest.raises(ConfigError, match="are for qcow2"):
        opened(layered, format="raw", chain=Chain(has_backing=False))


def test_a_data_file_is_looked_for_where_qemu_looks(folder, opened, monkeypatch):
    (folder / "sub").mkdir()
    monkeypatch.chdir(folder)
    words = "data_file=sub/data.raw"
    qemu.run("qemu-img", "create", "-q", "-f", "qcow2", "-o", words, "sub/disk.qcow2", SIZE)
    qemu.io("sub/disk.qcow2", "write -P 5 0 64k")
    assert read(opened("sub/disk.qcow2", read_only=True), 0, 2) == b"\5\5"
    monkeypatch.chdir(folder / "sub")
    with pytest.raises(StorageError, match=r"its data file sub/data\.raw cannot be opened") as said:
        opened("disk.qcow2", read_only=True)
    assert "relative to the current directory" in said.value.hint
    chain = Chain(Path("data.raw"))
    assert read(opened("disk.qcow2", read_only=True, chain=chain), 0, 2) == b"\5\5"


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (Exactly("1", "2"), b"\1"),
        (Exactly("2"), b"\2"),
        (Exactly(name="2"), b"\1"),
        (Exactly("1", "x"), None),
        (Exactly("x", "2"), None),
        (Exactly(name="1"), None),
        ("2", b"\2"),
        ("other", b"\2"),
    ],
)
def test_a_snapshot_can_be_named_exactly(folder, opened, wanted, found):
    image = qemu.create(folder / "disk.qcow2", SIZE)
    for number, name in ((1, "2"), (2, "other")):
        qemu.io(image, f"write -P {number} 0 4k")
        qemu.run("qemu-img", "snapshot", "-c", name, image)
    if found is None:
        with pytest.raises(StorageError, match="has no snapshot with the"):
            opened(image, snapshot=wanted)
    else:
        assert read(opened(image, snapshot=wanted), 0, 1) == found


# How they are opened.


def opened_files(folder):
    """Tell which files of a folder this process has open, and which of them without the cache."""
    found = {}
    for link in Path("/proc/self/fd").iterdir():
        try:
            path = link.readlink()
            words = Path(f"/proc/self/fdinfo/{link.name}").read_text()
        except OSError:
            continue
        if path.parent == folder:
            flags = int(words.split("flags:")[1].split()[0], 8)
            found.setdefault(path.name, set()).add(bool(flags & os.O_DIRECT))
    return found


def test_a_raw_backing_file_goes_without_the_page_cache_too(tmp_path, opened):
    (tmp_path / "base.raw").write_bytes(bytes(range(256)) * 4096)
    image = qemu.create(tmp_path / "top.qcow2", None, backing="base.raw", backing_format="raw")
    storage = opened(image, cache=CACHE_MODES["none"])
    assert opened_files(tmp_path)["base.raw"] == {True}
    assert read(storage, 1000, 3000) == (bytes(range(256)) * 4096)[1000:4000]


@pytest.mark.parametrize("locking", [True, False])
def test_a_raw_backing_file_is_locked_as_qemu_locks_it(tmp_path, opened, locking):
    (tmp_path / "base.raw").write_bytes(bytes(SIZE))
    image = qemu.create(tmp_path / "top.qcow2", None, backing="base.raw", backing_format="raw")
    opened(image, locking=locking, read_only=True)
    inode = (tmp_path / "base.raw").stat().st_ino
    held = [
        line.split()[-2:]
        for line in Path("/proc/locks").read_text().splitlines()
        if f":{inode} " in line
    ]
    assert held == ([["100", "100"]] if locking else [])
