"""What an administrator types about devices, and what the screen says."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nbdlink
from nbdlink.cli.candidates import candidates
from nbdlink.cli.main import main
from nbdlink.link import record
from nbdlink.server import serve_in_thread

from .conftest import until

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("runtime_directory")]

SIZE = 16 << 20
MAN = Path(__file__).parents[2] / "man"


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture
def server(image):
    with serve_in_thread({"data": image, "other": image}) as service:
        yield service


@pytest.fixture
def run(capsys):
    """Type a command; give its status and both outputs. Whatever is attached goes at the end."""

    def typed(*words):
        status = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return status, out.strip(), err.strip()

    yield typed
    main(["detach", "--all", "--force"])


def listed(run, device):
    _, out, _ = run("list", "--json")
    return next((d for d in json.loads(out) if d["device"] == device), None)


def test_the_kernel_picks_a_free_device(run, server):
    status, device, err = run("attach", server.uri("data"))
    assert (status, err) == (0, "")
    assert Path(device).is_block_device()


def test_the_device_that_was_named_is_taken(run, server):
    assert run("attach", server.uri("data"), "/dev/nbd5") == (0, "/dev/nbd5", "")


def test_the_same_name_and_target_change_nothing(run, server):
    first = run("attach", "--name", "link", server.uri("data"))
    assert run("attach", "--name", "link", server.uri("data")) == first
    assert len(json.loads(run("list", "--json")[1])) == 1


def test_two_at_once_of_one_name_are_one_device(run, server):
    words = [sys.executable, "-m", "nbdlink", "attach", "--name", "twin", server.uri("data")]
    environment = {**os.environ, "NBDLINK_RUNTIME_DIRECTORY": str(record.DIRECTORY)}
    both = [
        subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    printed = {process.communicate(timeout=100)[0] for process in both}
    assert len(printed) == 1


def test_a_link_is_found_by_a_name_that_looks_like_a_host(run, server):
    run("attach", "--name", "data.1", server.uri("data"))
    assert json.loads(run("info", "--json", "data.1")[1])["name"] == "data.1"


def test_a_long_name_of_an_export_does_not_overrun_the_kernels_page(run, image, tmp_path):
    name = "\u0436" * 2000
    with serve_in_thread({name: image}, unix=tmp_path / "socket") as service:
        status, device, _ = run("attach", service.uri(name))
        assert status == 0
        backend = Path(f"/sys/block/{Path(device).name}/backend").read_text()
        assert backend.startswith("nbdlink:sha256:")
        assert listed(run, device)["target"] == service.uri(name)


def test_a_name_in_use_for_another_target_is_refused(run, server):
    _, device, _ = run("attach", "--name", "link", server.uri("data"))
    status, out, err = run("attach", "--name", "link", server.uri("other"))
    assert (status, out) == (1, "")
    assert f"the link 'link' is already {device}" in err
    assert len(err.splitlines()) == 2


def test_a_link_is_detached_by_its_name(run, server):
    _, device, _ = run("attach", "--name", "link", server.uri("data"))
    assert run("detach", "link") == (0, "", "")
    assert listed(run, device) is None


def test_a_busy_device_is_refused_and_named(run, server):
    run("attach", server.uri("data"), "/dev/nbd5")
    status, out, err = run("attach", server.uri("other"), "/dev/nbd5")
    assert (status, out) == (1, "")
    assert "/dev/nbd5" in err.splitlines()[0]
    assert listed(run, "/dev/nbd5")["target"] == server.uri("data")


def test_several_connections_are_bound(run, server):
    assert run("attach", "-C", 4, server.uri("data"), "/dev/nbd5")[0] == 0
    # The kernel starts the receivers one after the other, after it has answered.
    until(lambda: listed(run, "/dev/nbd5")["connections"] == {"live": 4, "total": 4})


def test_read_only_is_read_only(run, server):
    run("attach", "-r", server.uri("data"), "/dev/nbd5")
    assert listed(run, "/dev/nbd5")["read_only"] is True
    with Path("/dev/nbd5").open("r+b", buffering=0) as device, pytest.raises(OSError, match="perm"):
        device.write(bytes(512))


def test_the_block_size_is_the_devices(run, server):
    run("attach", "--block-size", "4K", server.uri("data"), "/dev/nbd5")
    assert listed(run, "/dev/nbd5")["block_size"] == 4096


@pytest.mark.parametrize("size", ["256", "3000", "1M"])
def test_an_impossible_block_size_is_refused(run, server, size):
    status, _, err = run("attach", "--block-size", size, server.uri("data"))
    assert status == 2
    assert "block size" in err.splitlines()[0]


def test_the_ioctl_road_does_the_same_job(run, server, image):
    assert run("attach", "--ioctl", server.uri("data"), "/dev/nbd5") == (0, "/dev/nbd5", "")
    assert listed(run, "/dev/nbd5")["road"] == "ioctl"
    assert Path("/dev/nbd5").read_bytes() == image.read_bytes()
    assert run("detach", "/dev/nbd5") == (0, "", "")


@pytest.mark.parametrize("road", [(), ("--ioctl",)], ids=["netlink", "ioctl"])
def test_a_dead_device_is_never_called_attached(run, image, road):
    with serve_in_thread({"": image}) as service:
        run("attach", *road, service.uri(), "/dev/nbd5")
        assert listed(run, "/dev/nbd5")["state"] == "attached"
    device = listed(run, "/dev/nbd5")
    assert device is None or device["state"] != "attached"


@contextlib.contextmanager
def mounted(device, folder):
    folder.mkdir()
    subprocess.run(["mkfs.ext4", "-q", device], check=True)
    subprocess.run(["mount", device, folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_mounted_device_is_not_detached_and_the_mount_is_named(run, server, tmp_path):
    run("attach", server.uri("data"), "/dev/nbd5")
    with mounted("/dev/nbd5", tmp_path / "mnt") as mountpoint:
        status, _, err = run("detach", "/dev/nbd5")
        assert status == 1
        assert str(mountpoint) in err
        assert listed(run, "/dev/nbd5")["mounts"] == [str(mountpoint)]
        (mountpoint / "still").write_text("works")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["detach", "/dev/nbd7"], "/dev/nbd7"),
        (["detach", "/dev/null"], "is not an nbd device"),
        (["detach", "/dev/nbd7p1"], "is a partition of /dev/nbd7"),
        (["attach", "127.0.0.1:1", "/dev/null"], "is not an nbd device"),
        (["attach", "127.0.0.1:1", "/nonexistent"], "no such file"),
        (["info", "/dev/nbd777"], "/dev/nbd777 does not exist"),
    ],
)
def test_a_device_that_makes_no_sense_is_named(run, words, says):
    status, out, err = run(*words)
    assert (status, out) == (1, "")
    assert says in err.splitlines()[0]


def test_info_shows_one_device(run, server):
    run("attach", "--name", "link", server.uri("data"), "/dev/nbd5")
    by_path = json.loads(run("info", "--json", "/dev/nbd5")[1])
    assert by_path["name"] == "link"
    assert json.loads(run("info", "--json", "link")[1]) == by_path


def test_every_json_key_of_a_device_is_in_the_manual(run, server):
    run("attach", server.uri("data"), "/dev/nbd5")
    page = (MAN / "nbdlink-list.8").read_text()
    documented = {
        key for line in re.findall(r"^\.It Li (.+)$", page, re.M) for key in line.split(" , ")
    }
    assert set(listed(run, "/dev/nbd5")) == documented


def test_without_rights_there_is_one_clear_line(server):
    # Not as another user, who may have no way to where the tests and their interpreter lie.
    rights = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
    words = [sys.executable, "-m", "nbdlink", "attach", server.uri("data"), "/dev/nbd5"]
    done = subprocess.run([*rights, *words], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "not permitted" in done.stderr.splitlines()[0]
    assert len(done.stderr.splitlines()) <= 2


def test_doctor_finds_this_machine_fit(run):
    status, out, _ = run("doctor", "--json")
    found = json.loads(out)
    assert status == 0
    assert not [finding for finding in found if finding["status"] == "failed"]


def test_the_python_interface_does_the_same(server, image):
    device = nbdlink.attach(server.uri("data"), connections=2)
    try:
        assert Path(device.path).read_bytes() == image.read_bytes()
    finally:
        assert nbdlink.detach(device.path) == device.path


def test_attaching_leaves_no_descriptor_behind(run, server):
    run("attach", server.uri("data"), "/dev/nbd5")
    run("detach", "/dev/nbd5")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        run("attach", server.uri("data"), "/dev/nbd5")
        run("detach", "/dev/nbd5")
    # The server's end of a connection is closed by its own thread, a little later.
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1


def test_completion_knows_devices_and_names(run, server):
    _, device, _ = run("attach", "--name", "data", server.uri("data"))
    assert [value for value, _ in candidates(["detach"], "").values] == [device, "data"]
    free = [value for value, _ in candidates(["attach", "host"], "").values]
    assert free
    assert device not in free
