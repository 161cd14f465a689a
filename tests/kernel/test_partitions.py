"""Partitions: there when attach returns, with udevd and without; gone with their device."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from nbdlink import kernel
from nbdlink.kernel import netlink, sysfs

from .conftest import SIZE
from .images import with_partitions

pytestmark = pytest.mark.kernel

TWO = ((2048, 2048), (4096, 4096))


@pytest.fixture(params=["with_udevd", "without_udevd"])
def udevd(request):
    request.getfixturevalue(request.param)
    return request.param == "with_udevd"


def test_partitions_are_there_when_attach_returns(attach, peer, road, udevd):
    peer.data[:] = with_partitions(SIZE, *TWO)
    device = attach(road=road)
    assert [(part.number, part.size) for part in device.partitions] == [
        (1, 2048 * 512),
        (2, 4096 * 512),
    ]
    assert device.missing == ()


def test_their_nodes_can_be_read(attach, peer, udevd):
    peer.data[:] = with_partitions(SIZE, *TWO)
    peer.data[2048 * 512 : 2048 * 512 + 4] = b"part"
    (first, _) = attach().partitions
    assert Path(first.path).read_bytes()[:4] == b"part"


def test_udevd_has_processed_them(attach, peer, with_udevd):
    peer.data[:] = with_partitions(SIZE, *TWO)
    for part in attach().partitions:
        number = sysfs.device_number(part.name)
        assert Path(f"/run/udev/data/b{number}").exists()


def test_those_of_the_previous_use_do_not_linger(attach, peer, road, udevd):
    peer.data[:] = with_partitions(SIZE, *TWO)
    kernel.detach(attach(road=road, index=0).index)
    peer.data[:] = with_partitions(SIZE, TWO[0])
    assert [part.name for part in attach(road=road, index=0).partitions] == ["nbd0p1"]


def test_those_of_a_use_that_ended_badly_do_not_linger(attach, peer, without_udevd):
    peer.data[:] = with_partitions(SIZE, *TWO)
    attach(index=0)
    netlink.disconnect(0)  # as nbd-client does: nobody opens the device afterwards
    peer.data[:] = bytes(SIZE)
    assert attach(index=0).partitions == ()


def test_they_go_with_the_device(attach, peer, road, udevd):
    peer.data[:] = with_partitions(SIZE, *TWO)
    kernel.detach(attach(road=road, index=0).index)
    assert kernel.status(0).partitions == ()


def test_a_device_without_any_costs_no_wait(attach, udevd):
    started = time.monotonic()
    assert attach(wait=100.0).partitions == ()
    assert time.monotonic() - started < 50


def test_a_busy_udevd_is_waited_for_until_the_deadline_and_named(attach, peer, with_udevd):
    peer.data[:] = with_partitions(SIZE, *TWO)
    subprocess.run(["udevadm", "control", "--stop-exec-queue"], check=True)
    try:
        device = attach(index=0, wait=3.0)
    finally:
        subprocess.run(["udevadm", "control", "--start-exec-queue"], check=True)
        subprocess.run(["udevadm", "settle"], check=True)
    assert device.missing == ("nbd0", "nbd0p1", "nbd0p2")
