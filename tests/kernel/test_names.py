"""Which device a name means, where there are devices."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from nbdlink import kernel
from nbdlink.errors import KernelError

from .conftest import SIZE
from .images import with_partitions

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("name", ["/dev/nbd3", "nbd3"])
def test_the_two_spellings(name):
    assert kernel.index_of(name) == 3


def test_a_link(tmp_path):
    link = tmp_path / "by-me"
    link.symlink_to("/dev/nbd3")
    assert kernel.index_of(str(link)) == 3


def test_a_node_of_another_name(tmp_path):
    # Not in tmp_path, which may be mounted nodev; that does not matter to a stat.
    node = tmp_path / "node"
    os.mknod(node, 0o600 | stat.S_IFBLK, Path("/dev/nbd3").stat().st_rdev)
    assert kernel.index_of(str(node)) == 3


def test_a_partition_is_not_its_disk(attach, peer):
    peer.data[:] = with_partitions(SIZE, (2048, 2048))
    attach(index=0)
    with pytest.raises(KernelError, match="/dev/nbd0p1 is a partition of /dev/nbd0"):
        kernel.index_of("/dev/nbd0p1")


def test_a_link_to_a_partition(attach, peer, tmp_path):
    peer.data[:] = with_partitions(SIZE, (2048, 2048))
    attach(index=0)
    link = tmp_path / "link"
    link.symlink_to("/dev/nbd0p1")
    with pytest.raises(KernelError, match="is a partition of /dev/nbd0"):
        kernel.index_of(str(link))


def test_a_device_that_does_not_exist():
    with pytest.raises(KernelError, match="/dev/nbd9999 does not exist") as caught:
        kernel.index_of("nbd9999")
    assert "/dev/nbd0 to /dev/nbd" in caught.value.hint


def test_a_device_that_may_be_made():
    assert kernel.index_of("nbd9999", must_exist=False) == 9999
