"""Attaching, over both roads: what the kernel then shows, and what it refuses."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from nbdlink import kernel
from nbdlink.errors import DeviceBusyError, KernelError
from nbdlink.kernel import netlink, probe, sysfs, udev

from .conftest import PATIENCE, SIZE, run_python, until
from .peer import MULTI_CONN, READ_ONLY, Peer

pytestmark = pytest.mark.kernel


def read(path, count, offset=0):
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.pread(fd, count, offset)
    finally:
        os.close(fd)


def test_what_is_read_is_what_the_server_has(attach, peer, road):
    peer.data[4096:4101] = b"hello"
    assert read(attach(road=road).path, 5, 4096) == b"hello"


def test_what_is_written_arrives_at_the_server(attach, peer, road):
    device = attach(road=road)
    fd = os.open(device.path, os.O_WRONLY)
    os.pwrite(fd, b"w" * 4096, 8192)
    os.fsync(fd)
    os.close(fd)
    assert peer.data[8192:12288] == b"w" * 4096


def test_a_device_on_whose_connections_nobody_listens_is_detached_again(attach, road, monkeypatch):
    monkeypatch.setattr(sysfs, "live_links", lambda: {3: 1})
    with pytest.raises(KernelError, match="listens on 1 of 2 connections") as failure:
        attach(road=road, index=3, connections=2, flags=MULTI_CONN)
    assert failure.value.errno == errno.EAGAIN
    until(lambda: sysfs.pid(3) is None)


def test_the_chosen_device_is_taken(attach, road):
    assert attach(road=road, index=5).path == "/dev/nbd5"


def test_a_free_device_is_found(attach, road):
    first = attach(road=road)
    assert attach(road=road).index != first.index


def test_netlink_makes_a_device_that_does_not_exist(attach):
    index = sysfs.indices()[-1] + 7
    assert attach(road="netlink", index=index).path == f"/dev/nbd{index}"


def test_the_road_is_told(attach, road):
    device = attach(road=road)
    assert (device.road, kernel.status(device.index).road) == (road, road)


def test_size_and_block_size(attach, road):
    device = attach(road=road, block_size=2048)
    state = kernel.status(device.index)
    assert (state.size, state.block_size) == (SIZE, 2048)


def test_a_size_beyond_four_gibibytes(attach, road):
    # Blocks of an ioctl are an unsigned long, of Python's ioctl an int.
    device = attach(road=road, size=(1 << 43) + 4096, block_size=512, wait=None)
    assert kernel.status(device.index).size == (1 << 43) + 4096


def test_read_only(attach, road):
    device = attach(road=road, flags=READ_ONLY)
    assert kernel.status(device.index).read_only


def test_a_device_is_writable_again_after_a_read_only_use(attach, road):
    kernel.detach(attach(road=road, index=0, flags=READ_ONLY).index)
    assert not kernel.status(attach(road=road, index=0).index).read_only


def test_several_connections(attach, road):
    device = attach(road=road, connections=3, flags=MULTI_CONN)
    assert until(lambda: kernel.status(device.index).live_links == 3)


def test_unix_sockets(attach, road):
    server = Peer(SIZE, socket.AF_UNIX)
    server.data[:4] = b"unix"
    try:
        assert read(attach(road=road, server=server).path, 4) == b"unix"
    finally:
        server.close()


def test_the_identifier_shows(attach):
    device = attach(road="netlink", identifier="nbdlink:nbd://store1/data")
    assert kernel.status(device.index).backend == "nbdlink:nbd://store1/data"


def test_a_device_without_an_identifier_shows_none(attach, road):
    assert kernel.status(attach(road=road).index).backend is None


def test_the_request_timeout_ends_a_connection(attach, peer, road):
    device = attach(road=road, timeout=1)
    peer.answering.clear()
    assert probe.read_a_block([device.index], 60) == {device.index: errno.EIO}


def test_the_timeout_of_the_previous_use_is_forgotten(attach, peer):
    kernel.detach(attach(road="netlink", index=0, timeout=60).index)
    attach(road="netlink", index=0, timeout=1)
    peer.answering.clear()
    assert probe.read_a_block([0], 30) == {0: errno.EIO}


def test_the_dead_timeout_has_io_wait(attach, peer):
    device = attach(road="netlink", dead_timeout=600)
    peer.kill()
    until(lambda: kernel.status(device.index).state is kernel.DeviceState.DEAD)
    assert probe.read_a_block([device.index], 1) == {device.index: None}


def test_the_device_survives_the_process_that_attached_it(peer, attach, road):
    peer.data[:5] = b"alive"
    sock = peer.connect()
    path = run_python(
        f"""if True:
        from nbdlink import kernel
        binding = kernel.Binding(({sock.fileno()},), {SIZE}, {peer.flags})
        print(kernel.attach(binding, road="{road}").path)""",
        descriptors=[sock.fileno()],
    )
    sock.close()
    assert read(path.strip(), 5) == b"alive"


def test_nothing_is_left_open(attach, road, open_descriptors):
    kernel.detach(attach(road=road).index)  # loads what loads once
    until(lambda: threading.active_count() == 1)
    before = open_descriptors()
    device = attach(road=road)
    kernel.detach(device.index)
    # The peer's own end of the second connection.
    assert open_descriptors() == before + 1


def test_no_process_is_left_after_an_ioctl_device(attach):
    device = attach(road="ioctl")
    holder = Path(f"/proc/{kernel.status(device.index).pid}")
    kernel.detach(device.index)
    # It is this process's child, and a zombie once it has ended.
    until(lambda: not holder.exists() or "Z (zombie)" in (holder / "status").read_text())


def test_the_holder_is_detached_from_the_session(attach):
    device = attach(road="ioctl")
    pid = kernel.status(device.index).pid
    assert (os.getsid(pid), str(Path(f"/proc/{pid}/cwd").readlink())) == (pid, "/")


def test_systemd_spares_the_holder_at_shutdown(attach):
    device = attach(road="ioctl")
    assert Path(f"/proc/{device.pid}/cmdline").read_bytes().startswith(b"@")


def test_an_ioctl_device_ends_with_its_holder(attach):
    device = attach(road="ioctl")
    os.kill(kernel.status(device.index).pid, 9)
    until(lambda: kernel.status(device.index).state is kernel.DeviceState.FREE)


# Refusals.


def test_several_connections_need_the_servers_promise(attach, road):
    with pytest.raises(KernelError, match="no MULTI_CONN flag"):
        attach(road=road, connections=2)


def test_a_device_in_use_is_refused_and_named(attach, road):
    attach(road="netlink", index=0, identifier="first")
    started = time.monotonic()
    with pytest.raises(DeviceBusyError, match="/dev/nbd0 is attached already to first"):
        attach(road=road, index=0)
    assert time.monotonic() - started < 20


def test_a_glance_of_somebody_else_is_waited_out(attach, road, opened_elsewhere, in_thread):
    holder = opened_elsewhere("/dev/nbd0")
    in_thread(lambda: (time.sleep(0.3), holder.kill()))
    assert attach(road=road, index=0).index == 0


def test_a_free_device_that_is_kept_open_is_refused_and_the_opener_named(attach, opened_elsewhere):
    holder = opened_elsewhere("/dev/nbd0")
    with pytest.raises(DeviceBusyError, match=rf"\(process {holder.pid}\) has /dev/nbd0 open"):
        attach(road="netlink", index=0)


def test_an_index_beyond_the_last_is_refused(attach):
    with pytest.raises(KernelError, match="invalid"):
        attach(road="netlink", index=1 << 30)


def test_ioctls_cannot_make_a_device(attach):
    with pytest.raises(KernelError, match="does not exist"):
        attach(road="ioctl", index=sysfs.indices()[-1] + 1)


def test_what_is_no_socket_is_refused(road):
    reading, writing = os.pipe()
    try:
        with pytest.raises(KernelError):
            kernel.attach(kernel.Binding((reading,), SIZE, 1, index=0), road=road)
    finally:
        os.close(reading)
        os.close(writing)
    assert kernel.status(0).state is kernel.DeviceState.FREE


def test_a_server_that_hangs_up_at_once_is_no_device(attach, peer, road):
    peer.answering.clear()
    sock = peer.connect()
    peer.kill()
    binding = kernel.Binding((sock.fileno(),), SIZE, 1, index=0)
    with pytest.raises(KernelError):
        kernel.attach(binding, road=road)
    sock.close()
    until(lambda: kernel.status(0).state is kernel.DeviceState.FREE)


def test_a_server_that_never_answers_is_no_device(attach, peer, road):
    peer.answering.clear()
    with pytest.raises(KernelError, match="does not answer the first read"):
        attach(road=road, index=0, wait=1.0)
    until(lambda: kernel.status(0).state is kernel.DeviceState.FREE)


# Where netlink is not to be had. What the kernel answers for one missing family it answers for
# another; a network namespace of one's own would do too, but only on kernels like 6.1.


@pytest.fixture
def no_family(monkeypatch):
    monkeypatch.setattr(netlink, "_FAMILY", "no-such-family")


def test_ioctls_are_taken_where_netlink_is_missing(attach, no_family):
    device = attach()
    assert device.road == "ioctl"
    assert device.reason.startswith("the kernel offers no nbd netlink family here")


def test_a_dead_timeout_that_ioctls_cannot_give_is_told(attach, no_family):
    assert "ioctls know no dead timeout" in attach(dead_timeout=5).reason


def test_netlink_is_not_replaced_where_it_was_asked_for(attach, no_family):
    with pytest.raises(netlink.FamilyMissingError):
        attach(road="netlink")


def test_detach_without_netlink(attach, road, no_family, monkeypatch):
    with monkeypatch.context() as there:
        there.setattr(netlink, "_FAMILY", "nbd")
        attach(road=road, index=0)
    kernel.detach(0)
    assert kernel.status(0).state is kernel.DeviceState.FREE


def test_the_kernels_own_list(attach):
    device = attach(road="netlink")
    assert netlink.status()[device.index]
    assert netlink.status(device.index) == {device.index: True}


@pytest.mark.usefixtures("with_udevd", "attach")
def test_words_of_udevd_that_were_lost_are_no_failure():
    with udev.Watch() as watch:
        watch._monitor.set_receive_buffer_size(1)  # the kernel makes it 2304
        for _ in range(4):
            Path("/sys/block/nbd1/uevent").write_text("change")
            subprocess.run(["udevadm", "settle"], check=True)
        # Of the other one nothing was heard, and udevd has nothing to do any more.
        assert watch.wait(["nbd1", "nbd2"], time.monotonic() + PATIENCE) == set()
