"""One supervisor for all links; and a power-off at which one of the servers is gone."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.systemd, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def guest(site, request):
    """Boot with two links that nothing but the supervisor brings up."""
    site.add("alive", tls_road="relay")
    site.add("doomed")
    site.enable("nbdlink.service")
    return request.getfixturevalue("booted")


def test_what_is_in_fstab_is_mounted_at_boot(guest):
    guest.check("findmnt /mnt/alive && findmnt /mnt/doomed")


def test_it_is_mounted_after_the_supervisor_was_ready(guest):
    ready = guest.moment(r"Started nbdlink\.service")
    assert ready < guest.moment(r"Mounting mnt-alive\.mount")


def test_a_stop_leaves_the_devices(guest):
    guest.check("systemctl stop nbdlink.service")
    guest.check("findmnt /mnt/alive && test $(nbdlink list --json | grep -c attached) = 2")
    guest.check("systemctl start nbdlink.service")


def test_a_relay_outlives_the_supervisor(guest):
    relay = guest.check("pgrep -x nbdlink-relay")
    guest.check("systemctl restart nbdlink.service")
    assert guest.check("pgrep -x nbdlink-relay") == relay
    guest.check("dd if=/dev/disk/by-nbdlink/alive of=/dev/null bs=4k count=1 iflag=direct")


def test_links_come_back_with_the_module(guest):
    guest.check("umount /mnt/doomed && systemctl stop server-doomed")
    device = guest.check("readlink -f /dev/disk/by-nbdlink/doomed").strip()
    guest.check("umount /mnt/alive && systemctl stop server-alive")
    guest.check(f"for n in 0 1; do nbd-client -d /dev/nbd$n; done; test -n {device}")
    guest.until("modprobe -r nbd")
    guest.check("systemctl start server-alive server-doomed; modprobe nbd")
    guest.until("nbdlink list --json | grep -c attached | grep -x 2")


@pytest.fixture(scope="module")
def off(site, guest):
    """Write, have one of the servers vanish, and have the guest switched off."""
    guest.until("mountpoint -q /mnt/alive || systemctl start mnt-alive.mount")
    guest.until("mountpoint -q /mnt/doomed || systemctl start mnt-doomed.mount")
    guest.check("echo kept >/mnt/alive/file; echo lost >/mnt/doomed/file")
    guest.check("systemctl kill -s KILL server-doomed")
    return guest.power_off(timeout=300)


def test_a_server_that_is_gone_does_not_hold_up_the_power_off(off):
    assert off < 80


def test_the_other_one_is_unmounted_before_the_supervisor_stops(off, guest):
    unmounted = guest.moment(r"Unmounted mnt-alive\.mount")
    assert unmounted < guest.moment(r"Stopping nbdlink\.service")


def test_what_was_written_reached_the_other_one(off, site):
    assert site.content("alive", "/file") == "kept\n"


def test_the_other_file_system_is_clean(off, site):
    done = site.fsck("alive")
    assert done.returncode == 0, done.stdout


def test_it_is_told_that_something_was_lost(off, guest):
    guest.moment("doomed: its server is gone and the machine goes down")
