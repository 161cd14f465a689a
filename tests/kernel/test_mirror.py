"""Block devices that are put together: loop devices, RAM disks, and disks that fail and grow."""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
from pathlib import Path

import pytest

import nbdlink
from nbdlink.cli.main import main
from nbdlink.errors import StorageError
from nbdlink.server import serve_in_thread
from nbdlink.server.mirrors import MirrorControl
from nbdlink.storage.composite.opening import Arrangement, open_several
from nbdlink.storage.mirror.opening import open_mirror
from nbdlink.storage.open import StorageSpec

from .conftest import PATIENCE

pytestmark = pytest.mark.kernel

SIZE = 1 << 20
REGION = SIZE // 2
RAM_DISKS = 2


def run(*words):
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert not done.returncode, done.stderr
    return done.stdout.strip()


def on_disk(path, offset=0, length=SIZE):
    """Read from a device what is there, not what a page cache has."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        buffer = mmap.mmap(-1, length)  # aligned
        assert os.preadv(fd, [buffer], offset) == length
        return bytes(buffer)
    finally:
        os.close(fd)


def read(storage, offset=0, length=None):
    buffer = bytearray(storage.size - offset if length is None else length)
    storage.read_into(memoryview(buffer), offset)
    return bytes(buffer)


def write(storage, data, offset=0):
    storage.write(memoryview(data), offset, False)


class Disk:
    """A device mapper's device on a RAM disk, that fails and grows when told to.

    Attributes:
        path: its node.
        below: the RAM disk.
    """

    def __init__(self, name, below):
        self.below = below
        self._name = name
        self._is = self._table("linear", SIZE)
        run("dmsetup", "create", "--noudevsync", name, "--table", self._table("linear", SIZE))
        self.path = "/dev/" + run("dmsetup", "info", "-c", "--noheadings", "-o", "blkdevname", name)

    def _table(self, kind, size):
        return f"0 {size // 512} {kind}" + f" {self.below} 0" * (kind == "linear")

    def fill(self, byte, offset, length):
        """Write below, past the device and its page cache."""
        with Path(self.below).open("r+b", buffering=0) as disk:
            disk.seek(offset)
            disk.write(byte * length)
            os.fsync(disk.fileno())

    def become(self, kind, size=SIZE):
        """Be `linear` or fail all requests with `error`, at once."""
        self._is = self._table(kind, size)
        run("dmsetup", "load", self._name, "--table", self._is)
        run("dmsetup", "suspend", "--noflush", "--nolockfs", "--noudevsync", self._name)
        run("dmsetup", "resume", "--noudevsync", self._name)

    def renew(self):
        """Be empty, and as at first."""
        self.fill(b"\0", 0, 2 * SIZE)
        if self._is != self._table("linear", SIZE):
            self.become("linear")

    def remove(self):
        run("dmsetup", "remove", "--noudevsync", "--retry", self._name)


@pytest.fixture(scope="module", autouse=True)
def _modules():
    for words in (["loop"], ["brd", f"rd_nr={RAM_DISKS}", "rd_size=4096"], ["dm-mod"]):
        done = subprocess.run(["modprobe", *words], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"this kernel has no module {words[0]}: {done.stderr.strip()}")
    yield
    run("modprobe", "-r", "brd")


@pytest.fixture(autouse=True)
def _directories(tmp_path, monkeypatch):
    monkeypatch.setenv("NBDLINK_STATE_DIRECTORY", str(tmp_path / "state"))
    monkeypatch.setenv("NBDLINK_RUNTIME_DIRECTORY", str(tmp_path / "run"))


@pytest.fixture(scope="module")
def made():
    with contextlib.ExitStack() as stack:
        disks = []
        for number in range(RAM_DISKS):
            disks.append(Disk(f"nbdlink-{number}", f"/dev/ram{number}"))
            stack.callback(disks[-1].remove)
        yield disks


@pytest.fixture
def disks(made):
    for disk in made:
        disk.renew()
    return made


@pytest.fixture
def loop(tmp_path):
    """A loop device, and its file."""
    path = tmp_path / "loop.img"
    path.write_bytes(bytes(SIZE))
    device = run("losetup", "--show", "-f", path)
    yield device, path
    run("losetup", "-d", device)


@pytest.fixture
def mirror():
    """Give a function that opens mirrors, with members that are alike."""
    with contextlib.ExitStack() as stack:

        def opened(*paths, **options):
            specs = [StorageSpec(str(path), format="raw") for path in paths]
            mirror = open_mirror(specs, region=REGION, **options)
            stack.callback(mirror.close)
            mirror.wait_until_built(lambda _: None, 1.0)
            return mirror

        yield opened


def states(mirror):
    return [each["state"] for each in mirror.status()["members"]]


def test_a_loop_device_and_a_file_are_alike_and_grow(tmp_path, loop, mirror):
    device, below = loop
    file = tmp_path / "file"
    file.write_bytes(bytes(SIZE))
    both = mirror(device, file)
    with serve_in_thread({"": both}) as service:
        for path in (below, file):
            os.truncate(path, 2 * SIZE)
        run("losetup", "-c", device)
        with nbdlink.connect(service.uri()) as nbd:
            assert nbd.size == 2 * SIZE
            nbd.pwrite(b"x" * SIZE, SIZE // 2 + 1)
            nbd.trim(4096, SIZE)
            nbd.flush()
            content = bytes(nbd.pread(nbd.size, 0))
    assert on_disk(device, 0, 2 * SIZE) == below.read_bytes() == file.read_bytes() == content
    assert content.count(b"x") == SIZE - 4096


def test_what_a_failing_device_has_lost_is_there_again(disks, mirror, capsys):
    good, failing = disks
    both = mirror(good.path, failing.path)
    # A second user keeps the page cache, with pages that count as clean though they are lost.
    with Path(failing.path).open("rb"):
        write(both, b"x" * SIZE)
        failing.become("error")
        both.flush()
        assert states(both) == ["good", "stale"]
        both.close()
        failing.become("linear")
        both = mirror(good.path, failing.path)
        assert states(both) == ["good", "stale"]
        assert on_disk(failing.below) == bytes(SIZE)
        with MirrorControl(both):
            assert main(["mirror", "status", good.path]) == 0
            assert "flushing failed: input/output error" in capsys.readouterr().out
            assert main(["mirror", "rebuild", "--no-progress", failing.path]) == 0
        assert states(both) == ["good", "good"]
        assert on_disk(failing.below) == b"x" * SIZE


def test_a_device_that_cannot_be_read_is_dropped(disks, mirror):
    both = mirror(*(disk.path for disk in disks))
    write(both, b"x" * SIZE)
    both.close()
    both = mirror(*(disk.path for disk in disks))
    disks[1].become("error")
    with both.lock:
        both.members[0].in_flight += 1  # so that the other one is asked
    assert read(both) == b"x" * SIZE
    assert states(both) == ["good", "stale"]


def test_of_devices_that_have_grown_the_first_ones_content_counts(disks, mirror):
    both = mirror(*(disk.path for disk in disks))
    write(both, b"x" * SIZE)
    for disk, byte in zip(disks, (b"a", b"b"), strict=True):
        disk.fill(byte, SIZE, SIZE)
        disk.become("linear", 2 * SIZE)
    both.notice_growth()
    both.wait_until_built(lambda _: None, 1.0)
    both.flush()
    for disk in disks:
        assert on_disk(disk.below, 0, 2 * SIZE) == b"x" * SIZE + b"a" * SIZE


def test_another_device_at_the_path_of_a_member_is_refused(tmp_path, loop, disks, mirror):
    path = tmp_path / "disk"
    path.symlink_to(loop[0])
    mirror(disks[0].path, path).close()
    path.unlink()
    path.symlink_to(disks[1].below)  # which has nothing that would tell it from others
    with pytest.raises(StorageError, match="it is another file or device than it was"):
        mirror(disks[0].path, path)


@pytest.mark.parametrize("kind", ["linear", "stripe"])
def test_bytes_are_spread_over_devices(disks, kind):
    specs = [StorageSpec(disk.path, format="raw") for disk in disks]
    storage = open_several(Arrangement(kind, unit=512), specs)
    try:
        data = bytes(range(256)) * (storage.size // 256)
        write(storage, data[100:], 100)
        storage.zero(0, 512, may_trim=True, fast=False, fua=False)
        storage.flush()
        assert read(storage) == bytes(512) + data[512:]
        one, other = map(on_disk, (disk.below for disk in disks))
        if kind == "linear":
            assert one + other == bytes(512) + data[512:]
        else:
            assert one[:1024] + other[:512] == bytes(512) + data[:512] * 2
    finally:
        storage.close()
