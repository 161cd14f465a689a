"""qcow2 on a block device, which cannot grow."""

from __future__ import annotations

import errno
import random

import pytest

from nbdlink.storage.open import CACHE_MODES, StorageSpec, open_storage

from ..arrays import play, read, told, write
from ..test_raw_device import loop_device
from . import qemu
from .test_places import scripted

SIZE = 1 << 20


@pytest.fixture(params=["writeback", "none"])
def opened(request, tmp_path):
    """Give a device with room for an image and little more, and a way to open the image."""
    backing = tmp_path / "device.img"
    backing.write_bytes(random.Random(1).randbytes(2 << 20))  # nothing of it reads as zeroes
    with loop_device(backing) as path:
        qemu.run("qemu-img", "create", "-q", "-f", "qcow2", path, "4M")

        def open_it(**more):
            return open_storage(StorageSpec(path, cache=CACHE_MODES[request.param], **more))

        yield path, open_it


def test_an_image_on_a_device_is_read_and_written(opened):
    path, open_it = opened
    storage = open_it(format="qcow2")
    assert told(storage) == [(0, 4 << 20, 3)]
    model = bytearray(SIZE)
    play(storage, model, scripted("device"))
    assert read(storage, 0, SIZE) == model
    storage.flush()
    storage.close()
    qemu.check(path, leaks=True)
    assert qemu.run("qemu-io", "-r", "-f", "qcow2", "-c", "read 0 4M", path)
    again = open_it(read_only=True)  # its format is found out
    assert read(again, 0, SIZE) == model
    again.close()


def test_a_device_that_is_full_says_so_and_keeps_what_it_has(opened):
    path, open_it = opened
    storage = open_it(format="qcow2")
    written = []

    def fill():
        for number in range(64):
            write(storage, bytes([number + 1]) * 65536, number << 16)
            written.append(number)

    with pytest.raises(OSError, match=r"[Nn]o space") as caught:
        fill()
    assert caught.value.errno == errno.ENOSPC
    assert written
    storage.flush()
    assert all(read(storage, number << 16, 1) == bytes([number + 1]) for number in written)
    storage.close()
    qemu.check(path, leaks=True)
    looks = (f"read -P {number + 1} {number << 16} 64k" for number in written)
    assert "verification" not in qemu.io(path, *looks)
