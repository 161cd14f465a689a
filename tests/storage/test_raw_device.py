"""Raw storages on block devices, with and without the page cache: loop devices need root."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess

import pytest

from nbdlink.errors import StorageError
from nbdlink.storage.direct import DirectStorage
from nbdlink.storage.raw import RawStorage

SIZE = 4 << 20


def _attach(path, *options):
    command = ["losetup", "--show", "-f", *options, str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


@contextlib.contextmanager
def loop_device(path, *options):
    if os.geteuid() or shutil.which("losetup") is None:
        pytest.skip("loop devices need root and losetup")
    done = _attach(path, *options)
    if done.returncode:
        pytest.skip(f"the kernel gives no loop device: {done.stderr.strip()}")
    device = done.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "-d", device], check=True, timeout=30)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture(params=[RawStorage, DirectStorage])
def kind(request):
    return request.param


@pytest.fixture(params=[512, 4096])
def device(request, image, kind):
    with loop_device(image, "--sector-size", str(request.param)) as path:
        storage = kind.open(path)
        yield storage
        storage.close()


def read(storage, offset=0, length=SIZE):
    buffer = bytearray(length)
    storage.read_into(memoryview(buffer), offset)
    return bytes(buffer)


def test_a_device_has_its_size(device):
    assert device.size == SIZE


def test_unaligned_requests_are_served(device, image):
    data = os.urandom(1000)
    device.write(memoryview(data), 77, True)
    assert read(device, 77, 1000) == data
    assert image.read_bytes()[77:1077] == data


@pytest.mark.parametrize("may_trim", [True, False])
def test_zeroes_reach_the_unaligned_edges_and_no_further(device, image, may_trim):
    model = bytearray(image.read_bytes())
    begin, end = 1001, 1_000_003
    device.zero(begin, end - begin, may_trim=may_trim, fast=False, fua=True)
    model[begin:end] = bytes(end - begin)
    assert read(device) == model


def test_trim_leaves_what_lies_outside_alone(device, image):
    model = image.read_bytes()
    begin, end = 1001, 1_000_003
    device.trim(begin, end - begin, True)
    data = read(device)
    assert device.can_trim
    assert data[:begin] + data[end:] == model[:begin] + model[end:]
    assert data != model


def test_a_window_must_begin_and_end_with_a_sector(image):
    with loop_device(image) as path:
        for window in ({"offset": 100}, {"size": 1000}):
            with pytest.raises(StorageError, match="not a multiple") as caught:
                RawStorage.open(path, **window)
            assert "512" in caught.value.hint


def test_a_read_only_device_says_how_it_can_be_served(image):
    with loop_device(image, "-r") as path:
        with pytest.raises(StorageError, match=r"read-only|cannot be written") as caught:
            RawStorage.open(path)
        assert "-r" in caught.value.hint
        storage = RawStorage.open(path, read_only=True)
        assert read(storage) == image.read_bytes()
        storage.close()


def test_a_device_that_grows_is_noticed(image):
    with loop_device(image) as path:
        storage = RawStorage.open(path)
        os.truncate(image, 2 * SIZE)
        subprocess.run(["losetup", "-c", path], check=True, timeout=30)
        storage.notice_growth()
        assert storage.size == 2 * SIZE
        assert read(storage, SIZE) == bytes(SIZE)
        storage.close()


def test_a_device_has_no_signature(device):
    assert device.signature is None
