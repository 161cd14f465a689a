"""States: a device whose server is gone is never called attached, and asking never hangs."""

from __future__ import annotations

import errno
import time

import pytest

from nbdlink import kernel
from nbdlink.errors import KernelError, ModuleMissingError
from nbdlink.kernel import netlink, sysfs

from .conftest import SIZE, run_python, until
from .peer import MULTI_CONN

pytestmark = pytest.mark.kernel

ATTACHED, DEAD, FREE, STALLED = (
    kernel.DeviceState.ATTACHED,
    kernel.DeviceState.DEAD,
    kernel.DeviceState.FREE,
    kernel.DeviceState.STALLED,
)


def test_an_attached_device_is_attached_from_the_first_moment(attach, road):
    for _ in range(5):
        device = attach(road=road, wait=None)
        assert kernel.status(device.index).state is ATTACHED


def test_every_device_is_listed(attach):
    device = attach(index=3)
    states = {status.index: status.state for status in kernel.devices()}
    assert states == dict.fromkeys(sysfs.indices(), FREE) | {device.index: ATTACHED}


def test_a_device_whose_server_was_killed_is_dead(attach, peer, road):
    device = attach(road=road, index=0)
    peer.kill()
    # An ioctl device ends with its last connection.
    until(lambda: kernel.status(device.index).state is (DEAD if road == "netlink" else FREE))


def test_the_kernels_own_word_is_not_believed(attach, peer):
    attach(index=0)
    peer.kill()
    until(lambda: kernel.status(0).state is DEAD)
    assert netlink.status(0) == {0: True}


def test_an_open_unused_device_is_free(opened_elsewhere):
    opened_elsewhere("/dev/nbd0")
    assert netlink.status(0) == {0: True}
    assert kernel.status(0).state is FREE


def test_each_lost_connection_is_counted(attach, peer):
    device = attach(connections=2, flags=MULTI_CONN, dead_timeout=600)
    until(lambda: kernel.status(device.index).live_links == 2)
    peer.kill(0)
    until(lambda: kernel.status(device.index).live_links == 1)
    assert kernel.status(device.index).state is ATTACHED


def test_a_renewed_device_is_attached_again(attach, peer):
    device = attach(identifier="data", dead_timeout=600)
    peer.kill()
    until(lambda: kernel.status(device.index).state is DEAD)
    with peer.connect() as sock:
        kernel.reconfigure(device.index, [sock.fileno()])
    assert kernel.status(device.index, probe=True, deadline=60).probe_errno == 0


def test_the_probe_reads(attach, road):
    attach(road=road, index=0)
    status = kernel.status(0, probe=True, deadline=60)
    assert (status.state, status.probe_errno) == (ATTACHED, 0)


def test_the_probe_finds_a_silent_server_within_its_deadline(attach, peer):
    attach(index=0, timeout=600)
    peer.answering.clear()
    started = time.monotonic()
    status = kernel.status(0, probe=True, deadline=0.5)
    assert status.state is STALLED
    assert time.monotonic() - started < 30


def test_one_silent_server_does_not_make_others_late(attach, peer):
    attach(index=0)
    kernel.detach(0)
    attach(index=0, timeout=600)
    attach(index=1, timeout=600)
    peer.answering.clear()
    states = {s.index: s.state for s in kernel.devices(probe=True, deadline=0.5)}
    assert (states[0], states[1]) == (STALLED, STALLED)


def test_nobody_may_look(attach):
    attach(index=0, identifier="seen")
    told = run_python(
        """if True:
        import os
        from nbdlink.kernel import state, usage, sysfs
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
        status = state.status(0)
        print(status.state, status.backend, status.size, status.live_links)"""
    )
    assert told.split() == ["attached", "seen", str(SIZE), "1"]


def test_nobody_may_not_attach(peer, road):
    sock = peer.connect()
    told = run_python(
        f"""if True:
        import os
        from nbdlink import kernel
        from nbdlink.errors import RightsError
        from nbdlink.kernel import device, ioctl, netlink, udev, bounded, usage, holder
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
        try:
            kernel.attach(kernel.Binding(({sock.fileno()},), {SIZE}, 1, index=0), road="{road}")
        except RightsError as error:
            print(error, "|", error.hint)""",
        descriptors=[sock.fileno()],
    )
    sock.close()
    assert "not permitted | run it as root" in told
    assert told.count("\n") == 1


def test_resize_over_both_roads(attach, peer, road):
    device = attach(road=road)
    peer.data.extend(bytes(SIZE))
    kernel.resize(device.index, 2 * SIZE)
    assert kernel.status(device.index).size == 2 * SIZE


def test_a_dead_device_is_not_resized(attach, peer):
    device = attach(dead_timeout=600)
    peer.kill()
    until(lambda: kernel.status(device.index).state is DEAD)
    with pytest.raises(KernelError, match="no live connection"):
        kernel.resize(device.index, 2 * SIZE)


def test_an_unattached_device_is_not_reconfigured():
    with pytest.raises(KernelError, match="is not attached") as caught:
        kernel.reconfigure(0, [0])
    assert caught.value.errno == errno.ENOTCONN


# Without the module.


def test_a_missing_module_is_named(unloaded, peer):
    with peer.connect() as sock, pytest.raises(ModuleMissingError, match="no modprobe"):
        kernel.attach(kernel.Binding((sock.fileno(),), SIZE, 1))


def test_a_missing_module_is_loaded(unloaded, attach):
    unloaded()
    assert attach(index=0).index == 0


def test_no_module_no_devices(unloaded):
    assert kernel.devices() == []


@pytest.mark.parametrize("call", [lambda: kernel.status(0), lambda: kernel.detach(0)])
def test_looking_does_not_load_the_module(unloaded, call):
    unloaded()
    with pytest.raises(ModuleMissingError) as caught:
        call()
    assert "modprobe nbd" in caught.value.hint
