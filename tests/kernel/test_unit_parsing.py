"""What /proc and /sys say, as files made for the purpose."""

from __future__ import annotations

import pytest

from nbdlink.kernel import sysfs, usage

MOUNTINFO = r"""
22 28 0:21 / /sys rw,nosuid shared:7 - sysfs sysfs rw
28 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
90 28 43:0 / /mnt/with\040space rw,relatime shared:50 master:3 - ext4 /dev/nbd0 rw
91 28 43:33 /sub /mnt/sub rw,relatime - xfs /dev/nbd1p1 rw
92 28 0:55 / /mnt/btrfs rw,relatime - btrfs /dev/nbd2 rw,space_cache=v2
broken
93 28 0:56 / /mnt/\134back rw,relatime - tmpfs tmpfs rw
""".strip().splitlines()


@pytest.fixture
def mounts():
    return usage.parse_mountinfo(MOUNTINFO)


def test_every_whole_line_is_a_mount(mounts):
    assert [mount.number for mount in mounts] == ["0:21", "254:0", "43:0", "43:33", "0:55", "0:56"]


def test_escapes_are_undone(mounts):
    points = [mount.point for mount in mounts]
    assert "/mnt/with space" in points
    assert "/mnt/\\back" in points


def test_a_mount_is_found_by_its_source(mounts):
    # btrfs shows an anonymous device number.
    assert usage.mount_points("nbd2", mounts) == ("/mnt/btrfs",)


def test_other_devices_are_not_taken_for_it(mounts):
    assert usage.mount_points("nbd7", mounts) == ()


def test_swap_files_are_not_devices():
    lines = [
        "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority",
        "/dev/nbd0p2                             partition\t1048572\t\t0\t\t-2",
        "/dev/with\\040space                       partition\t4\t\t0\t\t-2",
        "/swapfile                               file\t\t1048572\t\t0\t\t-3",
    ]
    assert usage.parse_swaps(lines) == ["/dev/nbd0p2", "/dev/with space"]


def test_uses_say_what_they_are():
    uses = [
        usage.Use("mount", "/dev/nbd0p1", "/mnt"),
        usage.Use("swap", "/dev/nbd0p2", ""),
        usage.Use("holder", "/dev/nbd0p3", "/dev/mapper/root"),
    ]
    assert [str(use) for use in uses] == [
        "/dev/nbd0p1 is mounted on /mnt",
        "/dev/nbd0p2 is swapped on",
        "/dev/nbd0p3 is held by /dev/mapper/root",
    ]


# Workers, as kernels of different ages call them.


@pytest.fixture
def threads(tmp_path, monkeypatch):
    """Make a /proc; give a function that adds a thread to it."""
    monkeypatch.setattr(sysfs, "_PROC", tmp_path)

    def add(pid, comm, *, kernel=True):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "comm").write_text(comm + "\n")
        flags = 0x4208060 if kernel else 0x400000
        (tmp_path / str(pid) / "stat").write_text(f"{pid} ({comm}) I 2 0 0 0 -1 {flags} 0\n")

    return add


def test_busy_workers_are_live_connections(threads):
    threads(2, "kthreadd")
    threads(10, "nbd0-recv")
    threads(11, "kworker/u5:1+nbd0-recv")
    threads(12, "kworker/u5:2+nbd0-recv")
    threads(13, "kworker/R-nbd11-recv")
    threads(14, "kworker/u8:0-nbd11-recv")
    threads(15, "kworker/0:1-events")
    assert sysfs.live_links() == {0: 2, 11: 0}


@pytest.mark.parametrize("rescuer", ["nbd3-recv", "kworker/R-nbd3-", "kworker/R-nbd3-recv"])
def test_every_name_of_a_rescuer_shows_that_nothing_is_hidden(threads, rescuer):
    threads(2, "kthreadd")
    threads(10, rescuer)
    assert sysfs.live_links() == {3: 0}


def test_a_process_cannot_pass_for_a_worker(threads):
    threads(2, "kthreadd")
    threads(10, "nbd0-recv")
    threads(3000, "x+nbd0-recv", kernel=False)
    assert sysfs.live_links() == {0: 0}


def test_where_kernel_threads_are_hidden_nothing_is_known(threads):
    threads(2, "sh", kernel=False)
    threads(10, "nbd0-recv")
    assert sysfs.live_links() is None


# Stacks of block devices, as /sys/class/block shows them.


@pytest.fixture
def stack(tmp_path, monkeypatch):
    """Put a mapped device upon nbd0p1 and an array upon that; mount the array, swap on nbd0p2."""
    numbers = {"nbd0": "43:0", "nbd0p1": "43:1", "nbd0p2": "43:2", "dm-0": "253:0", "md7": "9:7"}
    for name, number in numbers.items():
        (tmp_path / name / "holders").mkdir(parents=True)
        (tmp_path / name / "dev").write_text(number + "\n")
    (tmp_path / "dm-0" / "dm").mkdir()
    (tmp_path / "dm-0" / "dm" / "name").write_text("vault\n")
    (tmp_path / "nbd0p1" / "holders" / "dm-0").mkdir()
    (tmp_path / "dm-0" / "holders" / "md7").mkdir()
    monkeypatch.setattr(usage, "_BLOCK", tmp_path)
    monkeypatch.setattr(usage, "mounts", lambda: [usage.Mount("9:7", "/dev/md7", "/srv")])
    monkeypatch.setattr(usage, "_swapped_numbers", lambda: {"43:2"})
    monkeypatch.setattr(usage, "_loops", lambda: {"/dev/nbd0": ["loop3"]})
    parts = tuple(sysfs.Partition(f"nbd0p{n}", f"/dev/nbd0p{n}", n, 512) for n in (1, 2))
    monkeypatch.setattr(sysfs, "partitions", lambda index: parts)


def test_uses_are_found_through_what_is_stacked_upon_a_device(stack):
    assert [str(use) for use in usage.uses(0)] == [
        "/dev/nbd0 is held by /dev/loop3",
        "/dev/nbd0p1 is held by /dev/mapper/vault",
        "/dev/mapper/vault is held by /dev/md7",
        "/dev/md7 is mounted on /srv",
        "/dev/nbd0p2 is swapped on",
    ]
