"""Detaching: what it refuses, what it flushes, and that nothing holds it up for ever."""

from __future__ import annotations

import os
import subprocess
import time

import pytest

from nbdlink import kernel
from nbdlink.errors import DeviceBusyError, DeviceInUseError, KernelError
from nbdlink.kernel import netlink, sysfs
from nbdlink.kernel.flush import Guard
from nbdlink.kernel.probe import read_a_block

from .conftest import SIZE, run_python, until
from .images import with_filesystem, with_partitions, with_swap
from .peer import FLUSH

pytestmark = pytest.mark.kernel

FREE, DEAD = kernel.DeviceState.FREE, kernel.DeviceState.DEAD


@pytest.fixture
def mounted(attach, peer, tmp_path):
    """Attach a file system as /dev/nbd0 and mount it."""
    peer.data[:] = with_filesystem(SIZE, tmp_path)
    device = attach(index=0)
    point = tmp_path / "mnt with space"
    point.mkdir()
    subprocess.run(["mount", device.path, str(point)], check=True)
    yield point
    subprocess.run(["umount", "-l", str(point)], check=False, capture_output=True)


def test_the_device_is_free_when_detach_returns(attach, road):
    device = attach(road=road)
    kernel.detach(device.index)
    assert kernel.status(device.index).state is FREE


def test_the_server_is_told_goodbye_after_a_flush(attach, peer):
    device = attach()
    kernel.detach(device.index)
    until(lambda: peer.requests[-2:] == [FLUSH, 2])


def test_what_an_opener_has_not_synced_is_written(attach, peer):
    device = attach(index=0)
    fd = os.open(device.path, os.O_WRONLY)
    try:
        os.pwrite(fd, b"late" * 1024, 0)
        with pytest.raises(DeviceBusyError):
            kernel.detach(0, wait=0.5)
        assert peer.data[:4] == b"late"
    finally:
        os.close(fd)


def test_what_an_opener_of_a_partition_has_not_synced_is_written(attach, peer):
    peer.data[:] = with_partitions(SIZE, (2048, 8192))
    attach(index=0)
    fd = os.open("/dev/nbd0p1", os.O_WRONLY)
    try:
        os.pwrite(fd, b"late" * 1024, 0)
        with pytest.raises(DeviceBusyError):
            kernel.detach(0, wait=0.5)
        assert peer.data[2048 * 512 :][:4] == b"late"
    finally:
        os.close(fd)


def test_what_nbd_client_or_another_attached_is_detached_too(attach):
    # Nothing of ours but the kernel knows this device.
    device = attach(road="ioctl")
    pid = kernel.status(device.index).pid
    kernel.detach(device.index)
    assert os.waitpid(pid, 0) == (pid, 0)


def test_a_device_that_is_not_attached():
    with pytest.raises(KernelError, match="/dev/nbd0 is not attached"):
        kernel.detach(0)


def test_a_device_that_does_not_exist():
    with pytest.raises(KernelError, match="/dev/nbd9999 does not exist"):
        kernel.detach(9999)


def test_a_mounted_device_is_refused_and_the_mount_point_named(mounted):
    with pytest.raises(DeviceInUseError, match=f"/dev/nbd0 is mounted on {mounted}") as caught:
        kernel.detach(0)
    assert caught.value.hint == f"umount {mounted}"


def test_a_refused_device_goes_on_working(mounted):
    with pytest.raises(DeviceInUseError):
        kernel.detach(0)
    (mounted / "file").write_text("x")
    assert kernel.status(0).mounts == (str(mounted),)


@pytest.fixture
def mounted_elsewhere(attach, peer, tmp_path):
    """Attach a file system as /dev/nbd0, and have it mounted in another mount namespace."""
    peer.data[:] = with_filesystem(SIZE, tmp_path)
    device = attach(index=0, dead_timeout=600)
    command = f"mount {device.path} {tmp_path} && echo mounted && read x"
    with subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as elsewhere:
        assert elsewhere.stdout.readline() == b"mounted\n"
        yield
        netlink.disconnect(0)
        elsewhere.communicate(b"\n")


@pytest.mark.usefixtures("mounted_elsewhere")
def test_a_mount_of_another_namespace_is_refused():
    with pytest.raises(DeviceInUseError, match="in exclusive use"):
        kernel.detach(0)


@pytest.mark.usefixtures("mounted_elsewhere")
def test_so_it_is_while_the_server_is_away(peer):
    peer.kill()
    until(lambda: kernel.status(0).state is DEAD)
    with pytest.raises(DeviceInUseError, match="in exclusive use"):
        kernel.detach(0)


def test_a_mounted_partition_is_refused(attach, peer, tmp_path):
    peer.data[:] = with_partitions(SIZE, (2048, 8192))
    peer.data[2048 * 512 : 2048 * 512 + 8192 * 512] = with_filesystem(8192 * 512, tmp_path)
    attach(index=0)
    subprocess.run(["mount", "/dev/nbd0p1", str(tmp_path)], check=True)
    try:
        with pytest.raises(DeviceInUseError, match="/dev/nbd0p1 is mounted on"):
            kernel.detach(0)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_swapped_device_is_refused(attach, peer, tmp_path):
    peer.data[:] = with_swap(SIZE, tmp_path)
    attach(index=0)
    subprocess.run(["swapon", "/dev/nbd0"], check=True)
    try:
        with pytest.raises(DeviceInUseError, match="/dev/nbd0 is swapped on"):
            kernel.detach(0)
    finally:
        subprocess.run(["swapoff", "/dev/nbd0"], check=True)


def test_a_device_under_a_loop_device_is_refused_and_the_loop_named(attach):
    attach(index=0)
    subprocess.run(["/sbin/modprobe", "-q", "loop"], check=False)  # it may be built in
    loop = subprocess.run(
        ["losetup", "--find", "--show", "/dev/nbd0"], check=True, capture_output=True, text=True
    ).stdout.strip()
    try:
        with pytest.raises(DeviceInUseError, match=f"/dev/nbd0 is held by {loop}"):
            kernel.detach(0)
    finally:
        subprocess.run(["losetup", "--detach", loop], check=True)


def test_force_disconnects_a_mounted_device_and_says_what_remains(mounted):
    with pytest.raises(DeviceInUseError, match="is disconnected, but stays occupied"):
        kernel.detach(0, force=True, wait=1.0)
    assert kernel.status(0).state is DEAD


def test_a_forced_device_is_free_after_the_unmount(mounted):
    with pytest.raises(DeviceInUseError):
        kernel.detach(0, force=True, wait=1.0)
    subprocess.run(["umount", "-l", str(mounted)], check=True)
    until(lambda: kernel.status(0).state is FREE)


def test_an_opener_is_named_after_the_disconnect(attach, opened_elsewhere):
    attach(index=0)
    holder = opened_elsewhere("/dev/nbd0")
    with pytest.raises(DeviceBusyError, match=rf"\(process {holder.pid}\) has /dev/nbd0 open"):
        kernel.detach(0, wait=1.0)
    assert kernel.status(0).state is DEAD


def test_an_opener_that_closes_is_waited_for(attach, opened_elsewhere, in_thread):
    attach(index=0)
    holder = opened_elsewhere("/dev/nbd0")
    in_thread(lambda: (time.sleep(0.3), holder.kill()))
    kernel.detach(0)
    assert sysfs.pid(0) is None


def test_a_dead_device_does_not_hold_it_up(attach, peer):
    attach(index=0, dead_timeout=600)
    peer.kill()
    until(lambda: kernel.status(0).state is DEAD)
    kernel.detach(0)
    assert kernel.status(0).state is FREE


def test_io_that_waits_for_a_renewal_does_not_hold_it_up(attach, peer):
    attach(index=0, dead_timeout=600)
    peer.kill()
    until(lambda: kernel.status(0).state is DEAD)
    assert read_a_block([0], 0.5) == {0: None}
    kernel.detach(0)
    assert kernel.status(0).state is FREE


def test_a_silent_server_is_said_to_be_one(attach, peer):
    attach(index=0, timeout=600)
    peer.answering.clear()
    with pytest.raises(KernelError, match="could not be flushed: the server does not answer"):
        kernel.detach(0, wait=1.0)


def test_a_second_try_says_that_the_first_is_not_over(attach, peer):
    attach(index=0, timeout=600)
    peer.answering.clear()
    for why in ("could not be flushed", "the flush of an earlier detach still waits"):
        with pytest.raises(KernelError, match=why):
            kernel.detach(0, wait=1.0)


def test_once_the_server_is_dead_an_earlier_flush_stands_in_nobodys_way(attach, peer):
    attach(index=0, timeout=600, dead_timeout=600)
    peer.answering.clear()
    with pytest.raises(KernelError, match="could not be flushed"):
        kernel.detach(0, wait=1.0)
    peer.kill()
    until(lambda: kernel.status(0).state is DEAD)
    kernel.detach(0)
    assert kernel.status(0).state is FREE


def test_a_slow_server_is_given_the_time_it_takes(attach, peer):
    attach(index=0)
    peer.write_seconds = 0.5
    data = os.urandom(1 << 20)
    # Held open, as a last close would flush by itself.
    fd = os.open("/dev/nbd0", os.O_RDWR)
    try:
        os.pwrite(fd, data, 0)
        # Eight requests, one after the other: far longer than `wait` in all.
        with pytest.raises(DeviceBusyError, match="is disconnected"):
            kernel.detach(0, wait=1.5)
    finally:
        os.close(fd)
    assert bytes(peer.data[: len(data)]) == data


def test_a_silent_server_does_not_keep_the_caller_from_ending(attach, peer):
    attach(index=0, timeout=600)
    peer.answering.clear()
    started = time.monotonic()
    run_python(
        """if True:
        from nbdlink import kernel
        from nbdlink.errors import KernelError
        try: kernel.detach(0, wait=1.0)
        except KernelError: pass"""
    )
    assert time.monotonic() - started < 60


def test_nothing_can_be_mounted_while_it_goes_on(attach, peer):
    attach(index=0)
    with Guard("/dev/nbd0", 60, lambda: 0, []), pytest.raises(OSError, match="busy"):
        os.open("/dev/nbd0", os.O_RDONLY | os.O_EXCL)


def test_a_silent_server_does_not_hold_up_force(attach, peer):
    attach(index=0, timeout=600)
    peer.answering.clear()
    kernel.detach(0, force=True)
    assert kernel.status(0).state is FREE
