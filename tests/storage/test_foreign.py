"""Images of other hypervisors, made by qemu-img, byte for byte."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import subprocess
import sys

import pytest

from nbdlink.errors import StorageError
from nbdlink.storage.extras import installation
from nbdlink.storage.foreign import ForeignStorage
from nbdlink.storage.open import StorageSpec, open_storage

from .arrays import read

pytest.importorskip("dissect.hypervisor", reason="the extra `images` is not installed")
pytestmark = pytest.mark.interop

SIZE = 20 << 20

KINDS = [
    ("vmdk", "monolithicSparse"),
    ("vmdk", "monolithicFlat"),
    ("vmdk", "twoGbMaxExtentSparse"),
    ("vmdk", "streamOptimized"),
    ("vdi", None),
    ("vpc", "dynamic"),
    ("vhdx", "dynamic"),
    ("vhdx", "fixed"),
]


def qemu_img(*words):
    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img is not installed")
    subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A disk with data here and there."""
    path = tmp_path_factory.mktemp("disk") / "disk.img"
    with path.open("wb") as file:
        file.truncate(SIZE)
        for seed, (offset, length) in enumerate(
            [(0, 4096), (1 << 20, 300_000), (19 << 20, 1 << 20)]
        ):
            file.seek(offset)
            file.write(random.Random(seed).randbytes(length))
    return path


def convert(disk, folder, kind, subformat):
    path = folder / f"disk.{kind}"
    options = ["-o", f"subformat={subformat}"] if subformat else []
    qemu_img("convert", "-f", "raw", "-O", kind, *options, disk, path)
    return path


@pytest.mark.parametrize(("kind", "subformat"), KINDS)
def test_an_image_has_the_bytes_of_the_disk(disk, tmp_path, kind, subformat):
    path = convert(disk, tmp_path, kind, subformat)
    storage = open_storage(StorageSpec(str(path), read_only=True))
    content = disk.read_bytes()
    try:
        # VHD has whole cylinders.
        assert read(storage)[:SIZE] == content
        assert storage.size - SIZE < 1 << 20 if kind == "vpc" else storage.size == SIZE
        for offset, length in [(0, 1), (1 << 20 | 77, 3), ((19 << 20) - 1000, 5000)]:
            assert read(storage, offset, length) == content[offset : offset + length]
    finally:
        storage.close()


@pytest.mark.parametrize("kind", ["vmdk", "vdi", "vpc", "vhdx"])
def test_blocks_that_lie_in_another_order_are_found(tmp_path, kind):
    # Written from the back, so that no block has its neighbour behind it.
    path, raw = tmp_path / "image", tmp_path / "raw"
    qemu_img("create", "-q", "-f", kind, path, SIZE)
    for number in reversed(range(40)):
        command = f"write -q -P {number + 1} {number * 512 + 100}k 300k"
        subprocess.run(["qemu-io", "-f", kind, "-c", command, path], check=True)
    qemu_img("convert", "-f", kind, "-O", "raw", path, raw)
    storage = ForeignStorage.open(str(path), kind)
    assert read(storage) == raw.read_bytes()
    storage.close()


def test_a_fixed_vhd_takes_its_formats_name(disk, tmp_path):
    path = convert(disk, tmp_path, "vpc", "fixed")
    storage = open_storage(StorageSpec(str(path), format="vpc", read_only=True))
    assert read(storage)[:SIZE] == disk.read_bytes()
    storage.close()


def test_it_is_not_for_writing(disk, tmp_path):
    path = convert(disk, tmp_path, "vdi", None)
    with pytest.raises(StorageError, match="can only be read") as caught:
        open_storage(StorageSpec(str(path)))
    assert "-r" in caught.value.hint


def test_it_can_be_written_over_for_a_while(disk, tmp_path):
    path = convert(disk, tmp_path, "vdi", None)
    storage = open_storage(StorageSpec(str(path), overlay=True))
    storage.write(memoryview(b"x" * 100), 50, False)
    assert read(storage, 0, 200) == (
        disk.read_bytes()[:50] + b"x" * 100 + disk.read_bytes()[150:200]
    )
    storage.close()


def test_one_that_is_based_on_another_is_refused(disk, tmp_path):
    base = convert(disk, tmp_path, "vmdk", "monolithicSparse")
    path = tmp_path / "top.vmdk"
    qemu_img("create", "-q", "-f", "vmdk", "-b", base, "-F", "vmdk", path)
    with pytest.raises(StorageError, match="based on another image"):
        ForeignStorage.open(str(path), "vmdk")


@pytest.mark.parametrize("kind", ["vmdk", "vdi", "vpc", "vhdx"])
def test_garbage_is_refused_in_a_line(tmp_path, kind):
    path = tmp_path / "garbage"
    path.write_bytes(random.Random(kind).randbytes(100_000))
    if kind == "vmdk":
        path.write_bytes(b"KDMV" + path.read_bytes())
    with pytest.raises(StorageError) as caught:
        ForeignStorage.open(str(path), kind)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("kind", "subformat"), KINDS)
def test_whatever_a_damaged_image_does_is_an_error_of_ours(tmp_path, kind, subformat):
    disk, dice = tmp_path / "disk", random.Random(f"{kind} {subformat}")
    disk.write_bytes(dice.randbytes(300_000) + bytes(1 << 20))
    path = convert(disk, tmp_path, kind, subformat)
    content = path.read_bytes()
    for _ in range(25):
        data = bytearray(content)
        for _ in range(dice.choice([1, 2, 5])):
            at = dice.randrange(min(dice.choice([512, 4096, 70_000]), len(data) - 8))
            data[at : at + 8] = dice.choice([bytes(8), b"\xff" * 8, dice.randbytes(8)])
        path.write_bytes(data)
        with contextlib.suppress(StorageError):
            storage = ForeignStorage.open(str(path), kind)
            with contextlib.suppress(OSError):
                read(storage, 0, min(storage.size, 1 << 20))
            storage.close()


@pytest.mark.parametrize(("kind", "subformat"), [("vdi", None), ("vmdk", "streamOptimized")])
def test_an_image_that_is_cut_off_is_an_error_where_it_is(disk, tmp_path, kind, subformat):
    path = convert(disk, tmp_path, kind, subformat)
    storage = ForeignStorage.open(str(path), kind)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(OSError, match="disk") as caught:
        read(storage)
    assert caught.value.errno == errno.EIO
    storage.close()


def test_the_extra_is_named_if_it_is_missing(disk, tmp_path, monkeypatch):
    path = convert(disk, tmp_path, "vdi", None)
    monkeypatch.setitem(sys.modules, "dissect.hypervisor.disk.vdi", None)
    with pytest.raises(StorageError, match=r"dissect\.hypervisor") as caught:
        ForeignStorage.open(str(path), "vdi")
    assert caught.value.hint.endswith("pip install 'nbdlink[images]'")


def test_an_extra_goes_where_nbdlink_is(monkeypatch):
    monkeypatch.setattr(sys, "prefix", "/home/me/.local/pipx/venvs/nbdlink")
    monkeypatch.setattr(sys, "executable", sys.prefix + "/bin/python")
    assert installation("x").startswith("/home/me/.local/pipx/venvs/nbdlink/bin/python -m pip ")
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    assert installation("x") == "pip install 'x'"
