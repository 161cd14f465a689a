"""Devices that are left free after each test, servers that end with it, and udevd on and off.

These run as root on a kernel with the module nbd, in a virtual machine as a rule, and under
emulation that is 20 times slower: deadlines are generous and cost nothing when all is well.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nbdlink import kernel
from nbdlink.errors import KernelError
from nbdlink.kernel import module, netlink, sysfs, udev
from nbdlink.link import record

from .peer import Peer

PATIENCE = 60.0
"""Seconds that nothing here takes, on any machine."""

SIZE = 8 << 20


@pytest.fixture
def runtime_directory(tmp_path, monkeypatch):
    """Have records of this test's own."""
    monkeypatch.setattr(record, "DIRECTORY", tmp_path / "run")


@pytest.fixture
def image(tmp_path):
    """Make a disk's image, full of noise."""
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture
def peer():
    """Serve 8 MiB on as many connections as the test asks for."""
    server = Peer(SIZE)
    yield server
    server.close()


@pytest.fixture(params=["netlink", "ioctl"])
def road(request):
    return request.param


@pytest.fixture
def attach(peer):
    """Attach `connections` of the peer, closing our ends; detach by force after the test."""
    sockets = []

    def attach(
        *, connections=1, flags=0, road="auto", wait=PATIENCE, family=None, server=peer, **fields
    ):
        fields.setdefault("size", len(server.data))
        # The unit of the partition tables that are used here.
        fields.setdefault("block_size", 512)
        flags |= server.flags
        for attempt in range(3):
            mine = [server.connect() for _ in range(connections)]
            sockets.extend(mine)
            numbers = tuple(sock.fileno() for sock in mine)
            binding = kernel.Binding(sockets=numbers, transmission_flags=flags, **fields)
            try:
                return kernel.attach(binding, road=road, wait=wait)
            except KernelError as error:
                # The machine is busy, which the tests are not about.
                if error.errno != errno.EAGAIN or attempt == 2:
                    raise
            finally:
                for sock in mine:
                    sock.close()
        raise AssertionError

    yield attach
    for sock in sockets:
        sock.close()
    free_all()


def free_all():
    for index in sysfs.indices():
        if sysfs.pid(index) is not None:
            with contextlib.suppress(KernelError):
                netlink.disconnect(index)
    until(lambda: all(sysfs.pid(index) is None for index in sysfs.indices()))


def until(condition, seconds=PATIENCE):
    """Wait for what the kernel gives no event for; fail if it does not come."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)
    return result


def run_python(code, *, descriptors=(), wrapper=(), **options):
    """Run `code` in a Python of its own that finds this nbdlink; give what it printed."""
    done = subprocess.run(
        [*wrapper, sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=PATIENCE * 2,
        pass_fds=descriptors,
        env={**os.environ, "PYTHONPATH": str(Path(kernel.__file__).parents[2])},
        check=False,
        **options,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def with_udevd():
    """Have a udevd run."""
    started = not udev.runs()
    if started:
        _start_udevd()
    yield
    if started:
        _stop_udevd()


@pytest.fixture
def without_udevd():
    """Have no udevd run, for a while."""
    stopped = udev.runs()
    if stopped:
        _stop_udevd()
    yield
    if stopped:
        _start_udevd()


# Those of udevd where systemd is process 1, which holds udevd's sockets, and starts another one for
# whoever speaks to them.
_UDEVD_UNITS = [
    f"systemd-udevd{name}" for name in ("-control.socket", "-kernel.socket", ".service")
]


def _has_systemd():
    return Path("/run/systemd/system").exists()


def _start_udevd():
    if _has_systemd():
        # Or it is started too often.
        subprocess.run(["systemctl", "reset-failed", *_UDEVD_UNITS], check=False)
        subprocess.run(["systemctl", "start", *_UDEVD_UNITS], check=True)
    else:
        Path("/run/udev").mkdir(exist_ok=True)
        subprocess.run(["/lib/systemd/systemd-udevd", "--daemon"], check=True, capture_output=True)
    until(udev.runs)
    subprocess.run(["udevadm", "settle"], check=True)


def _stop_udevd():
    subprocess.run(["udevadm", "settle"], check=True)
    if _has_systemd():
        subprocess.run(["systemctl", "stop", *_UDEVD_UNITS], check=True)
        until(lambda: not udev.runs())
        return
    for _ in range(6):
        # Now and then one is lost, without a word, when the machine is busy.
        subprocess.run(["udevadm", "control", "--exit"], check=False, capture_output=True)
        with contextlib.suppress(AssertionError):
            until(lambda: not udev.runs(), PATIENCE / 6)
            return
    pytest.fail("udevd does not end")


@pytest.fixture
def unloaded(monkeypatch, tmp_path):
    """Take the module away; give a function that has our modprobe load it again."""
    found = subprocess.run(["/sbin/modinfo", "-n", "nbd"], capture_output=True, text=True)
    path = found.stdout.strip() or next(
        map(str, Path("/usr/lib/uml/modules").glob("*/kernel/drivers/block/nbd.ko"))
    )
    script = tmp_path / "modprobe"
    setting = tmp_path / "setting"
    monkeypatch.setattr(module, "_MODPROBE", setting)
    setting.write_text(f"{tmp_path}/absent\n")
    until(
        lambda: (
            subprocess.run(["/sbin/rmmod", "nbd"], capture_output=True, check=False).returncode == 0
        )
    )

    def allow():
        script.write_text(f'#!/bin/sh\ntest "$*" = nbd && exec /sbin/insmod {path}\n')
        script.chmod(0o755)
        setting.write_text(f"{script}\n")

    yield allow
    if not module.loaded():
        subprocess.run(["/sbin/insmod", path], check=True)


@pytest.fixture
def open_descriptors():
    """Give a function that counts this process's open descriptors."""
    return lambda: len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def in_thread():
    """Run functions aside and join them at the end."""
    threads = []

    def start(call):
        thread = threading.Thread(target=call)
        thread.start()
        threads.append(thread)

    yield start
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()


@pytest.fixture
def opened_elsewhere():
    """Have another process hold a device open; it ends with the test, or when told to."""
    holders = []

    def hold(path):
        code = "import os,sys; os.open(sys.argv[1], 0); print('open', flush=True); input()"
        process = subprocess.Popen(
            [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        holders.append(process)
        assert process.stdout.readline() == b"open\n"
        return process

    yield hold
    for process in holders:
        process.send_signal(signal.SIGKILL)
        process.communicate()
