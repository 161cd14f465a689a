"""A unit for each link, and an fstab that requires it: from boot to power-off."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.systemd, pytest.mark.timeout(900)]

LINKS = "/dev/disk/by-nbdlink"


@pytest.fixture(scope="module")
def guest(site, request):
    """Boot with a disk that has a partition, and one that is a file system."""
    site.add("data", options=",x-systemd.requires=nbdlink@data.service", partition=True)
    requires = ",x-systemd.requires=nbdlink@my-disk.service"
    site.add("my-disk", options=requires, tls_road="kernel")
    return request.getfixturevalue("booted")


def test_what_is_in_fstab_is_mounted_at_boot(guest):
    found = guest.check("findmnt -no SOURCE /mnt/data; findmnt -no SOURCE /mnt/my-disk")
    assert sorted(found.replace("nbd1", "nbd0").split()) == ["/dev/nbd0", "/dev/nbd0p1"]


def test_it_is_mounted_after_it_was_attached(guest):
    attached = guest.moment(r"Finished nbdlink@data\.service")
    assert attached < guest.moment(r"Mounting mnt-data\.mount")


def test_the_unit_of_a_link_is_active(guest):
    assert guest.run("systemctl is-active nbdlink@data nbdlink@my-disk").said == "active\nactive\n"


def test_its_supervisor_runs(guest):
    guest.until("systemctl is-active nbdlink-supervise@data nbdlink-supervise@my-disk")


def test_the_kernel_does_tls_for_a_hardened_unit(guest):
    assert '"tls": "kernel"' in guest.check("nbdlink list --json")


def test_nothing_has_failed(guest):
    assert guest.check("systemctl --failed --no-legend") == ""


def test_the_links_lead_to_the_disk_and_its_partition(guest):
    device = guest.check(f"readlink -f {LINKS}/data")
    partition = guest.check(f"readlink -f {LINKS}/data-part1")
    assert partition == f"{device.strip()}p1\n"


def test_systemd_knows_the_link_as_a_unit(guest):
    guest.check("systemctl is-active 'dev-disk-by\\x2dnbdlink-data\\x2dpart1.device'")


def test_the_name_is_a_property(guest):
    said = guest.check(f"udevadm info -q property --property=NBDLINK_NAME --value {LINKS}/my-disk")
    assert said == "my-disk\n"


def test_the_links_go_when_the_device_is_detached(guest):
    guest.check("systemctl stop nbdlink@data")
    assert guest.check(f"udevadm settle; ls {LINKS}") == "my-disk\n"


def test_a_stop_unmounts_before_it_detaches(guest):
    unmounted = guest.moment(r"Unmounted mnt-data\.mount")
    assert unmounted < guest.moment(r"Stopping nbdlink@data\.service")


def test_a_stop_leaves_the_supervisor_until_it_is_detached(guest):
    detached = guest.moment(r"Stopped nbdlink@data\.service")
    assert detached < guest.moment(r"Stopping nbdlink-supervise@data\.service")


def test_systemd_notices_that_it_is_gone(guest):
    guest.until("! systemctl -q is-active 'dev-disk-by\\x2dnbdlink-data.device'")


def test_a_stop_stops_the_supervisor(guest):
    said = guest.run("systemctl is-active nbdlink-supervise@data").said
    assert said == "inactive\n"


def test_mounting_attaches_again(guest):
    guest.check("systemctl start mnt-data.mount && findmnt /mnt/data")


def test_a_server_that_comes_late_is_waited_for(guest):
    guest.check("systemctl stop nbdlink@data && systemctl stop server-data")
    guest.check("systemctl start --no-block mnt-data.mount")
    guest.until("systemctl is-active nbdlink-supervise@data")
    guest.check("systemctl start server-data")
    guest.until("findmnt /mnt/data")


def test_a_link_without_a_name_gets_none(guest):
    before = guest.check(f"ls {LINKS}")
    guest.check("truncate -s 8M /run/spare.img")
    guest.check("systemd-run -q -u spare nbdkit -f -U /run/spare.sock file /run/spare.img")
    guest.until("[ -S /run/spare.sock ]")
    device = guest.check("nbdlink attach 'nbd+unix:///?socket=/run/spare.sock'").strip()
    after = guest.check(f"udevadm settle; ls {LINKS}")
    guest.check(f"nbdlink detach {device}; systemctl stop spare")
    assert after == before


def test_a_supervisor_that_is_killed_unmounts_nothing(guest):
    guest.until("systemctl is-active nbdlink-supervise@my-disk")
    mounted = guest.check("findmnt -no ID /mnt/my-disk")
    guest.check("systemctl kill -s KILL nbdlink-supervise@my-disk")
    guest.until("[ $(systemctl show -P NRestarts nbdlink-supervise@my-disk) = 1 ]")
    guest.until("systemctl is-active nbdlink-supervise@my-disk")
    assert guest.check("findmnt -no ID /mnt/my-disk") == mounted


def test_a_restart_of_the_supervisor_leaves_the_device(guest):
    mounted = guest.check("findmnt -no ID /mnt/my-disk")
    guest.check("systemctl restart nbdlink-supervise@my-disk")
    assert guest.check("findmnt -no ID /mnt/my-disk") == mounted


def test_a_reload_is_taken(guest):
    guest.check("systemctl reload nbdlink-supervise@my-disk")
    guest.until("systemctl is-active nbdlink-supervise@my-disk")


def test_doctor_finds_rules_and_units(guest):
    said = guest.run("nbdlink doctor | grep 'rules and units'").said
    assert "the udev rules and units are those of this nbdlink" in said


def test_a_server_is_a_service_too(guest):
    guest.check("truncate -s 8M /srv/own.img")
    guest.check("mkdir -p /etc/nbdlink.d")
    guest.check("printf '[server]\\nport = 10900\\n' >/etc/nbdlink.d/serve.toml")
    guest.check("printf '[export.own]\\nstorage = \"/srv/own.img\"\\n' >>/etc/nbdlink.d/serve.toml")
    guest.check("systemctl start nbdlink-serve")
    assert guest.check("nbdinfo --size nbd://localhost:10900/own") == "8388608\n"


def test_its_reload_adds_an_export(guest):
    guest.check("truncate -s 4M /srv/more.img")
    guest.check("printf '[export.more]\\nstorage = \"/srv/more.img\"\\n' >/etc/nbdlink.d/z.toml")
    guest.check("systemctl reload nbdlink-serve")
    guest.until("nbdinfo --size nbd://localhost:10900/more")


def test_its_stop_is_a_graceful_one(guest):
    guest.check("systemctl stop nbdlink-serve && rm -r /etc/nbdlink.d")
    assert guest.check("systemctl show -P Result nbdlink-serve") == "success\n"


def test_undo_refuses_while_a_unit_is_enabled(guest):
    guest.check("systemctl enable nbdlink@my-disk")
    done = guest.run("nbdlink setup --undo")
    assert (done.status, "nbdlink@my-disk.service is enabled" in done.said) == (1, True)


@pytest.fixture(scope="module")
def off(site, guest):
    """Write without a sync, and have the guest switched off."""
    guest.check("echo kept >/mnt/data/file; echo kept >/mnt/my-disk/file")
    return guest.power_off()


def test_power_off_takes_no_timeout(off, guest):
    assert off < 80


def test_at_power_off_it_is_unmounted_before_it_is_detached(off, guest):
    unmounted = guest.moment(r"Unmounted mnt-my\\x2ddisk\.mount")
    assert unmounted < guest.moment(r"Stopping nbdlink@my-disk\.service")


def test_the_supervisor_is_stopped_after_that(off, guest):
    unmounted = guest.moment(r"Unmounted mnt-my\\x2ddisk\.mount")
    assert unmounted < guest.moment(r"Stopping nbdlink-supervise@my-disk\.service")


def test_the_network_is_there_until_it_is_detached(off, guest):
    detached = guest.moment(r"Stopped nbdlink@my-disk\.service")
    assert detached < guest.moment(r"Stopped target network-online\.target")


def test_what_was_written_reached_the_server(off, site):
    assert site.content("data", "/file", partition=True) == "kept\n"


def test_the_file_systems_are_clean(off, site):
    done = site.fsck("my-disk")
    assert done.returncode == 0, done.stdout
