"""A server and its device in one command: `serve --attach`, and qemu-nbd's -c and -d."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nbdlink.kernel import sysfs

from .conftest import PATIENCE, free_all, until

pytestmark = pytest.mark.kernel

SIZE = 16 << 20
DEVICE = "/dev/nbd0"
NBDLINK = [sys.executable, "-m", "nbdlink"]


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture(autouse=True)
def free():
    yield
    free_all()


def is_free():
    return sysfs.pid(0) is None


def run(*words):
    return subprocess.run(
        [*NBDLINK, *map(str, words)], capture_output=True, text=True, timeout=2 * PATIENCE
    )


@pytest.fixture
def serving(image):
    """Serve the image at the device in the foreground; give the process once it is there."""
    process = subprocess.Popen(
        [*NBDLINK, "serve", "-f", "raw", "--attach", DEVICE, str(image)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline()
    until(lambda: Path(DEVICE).exists() and not is_free())
    yield process
    if process.poll() is None:
        process.kill()
    process.communicate()


def read_device():
    # Not from the page cache, which may have it from before.
    return subprocess.run(
        ["dd", f"if={DEVICE}", "bs=1M", "iflag=direct", "status=none"],
        check=True,
        capture_output=True,
        timeout=PATIENCE,
    ).stdout


def test_the_device_is_the_image(serving, image):
    assert read_device() == image.read_bytes()


def test_a_device_that_is_attached_is_called_so(serving, tmp_path):
    (tmp_path / "other.img").write_bytes(bytes(SIZE))
    done = run("qemu-nbd", "-f", "raw", "-c", DEVICE, tmp_path / "other.img")
    assert (done.returncode, f"{DEVICE} is attached already" in done.stderr) == (1, True)


def test_a_detached_device_ends_the_server(serving):
    assert run("detach", DEVICE).returncode == 0
    assert serving.wait(PATIENCE) == 0


def test_a_server_that_is_stopped_detaches_its_device_first(serving, image):
    data = os.urandom(1 << 20)
    with Path(DEVICE).open("r+b") as device:
        device.write(data)  # in the page cache; detaching flushes it
    serving.send_signal(signal.SIGTERM)
    assert serving.wait(PATIENCE) == 0
    until(is_free)
    assert image.read_bytes()[: 1 << 20] == data


def test_a_device_in_use_is_refused_and_the_server_ends(serving, image, tmp_path):
    done = run("serve", "-r", "--attach", DEVICE, "-k", tmp_path / "other", image)
    assert done.returncode == 1
    assert DEVICE in done.stderr
    assert not (tmp_path / "other").exists()


def test_qemu_nbds_way_there_and_back(image):
    done = run("qemu-nbd", "-c", DEVICE, "-f", "raw", image)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert read_device() == image.read_bytes()
    assert run("qemu-nbd", "-d", DEVICE).returncode == 0
    until(is_free)
    until(lambda: not Path("/var/lock/qemu-nbd-nbd0").exists())
