"""`nbdlink attach` against every server, ours and others', as an administrator would type it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from pathlib import Path

import pytest

from nbdlink.cli.main import main
from nbdlink.server import serve_in_thread
from nbdlink.uri import Target
from tests.interop.peers import MISSING, PEERS

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

SIZE = 16 << 20


@contextlib.contextmanager
def ours(image, folder):
    with serve_in_thread({"data": image}) as service:
        yield Target.parse(service.uri("data"))


@contextlib.contextmanager
def ours_on_a_unix_socket(image, folder):
    with serve_in_thread({"": image}, unix=folder / "ours.sock") as service:
        yield Target.parse(service.uri())


SERVERS = {**PEERS, "nbdlink-tcp": ours, "nbdlink-unix": ours_on_a_unix_socket}


@pytest.fixture
def image(tmp_path):
    """A disk with a partition table of one partition, and random data in it."""
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SIZE))
    subprocess.run(["sfdisk", "-q", path], input=b"label: gpt\nstart=2048\n", check=True)
    return path


@pytest.fixture(params=list(SERVERS))
def server(request, image, tmp_path):
    with SERVERS[request.param](image, tmp_path) as target:
        yield target


@pytest.fixture
def attached(server, capsys):
    """Attach `server` and give the device, as `nbdlink attach` printed it."""
    assert main(["attach", str(server)]) == 0
    device = capsys.readouterr().out.strip()
    yield device
    main(["detach", "--force", device])


def test_the_disk_is_all_there(attached, image):
    assert Path(attached).read_bytes() == image.read_bytes()


def test_the_partition_is_there_at_once(attached, image):
    assert Path(f"{attached}p1").exists()


def test_what_is_written_arrives(attached, image):
    data = os.urandom(1 << 20)
    with Path(f"{attached}p1").open("r+b") as partition:
        partition.write(data)
    assert main(["detach", attached]) == 0
    assert image.read_bytes()[1 << 20 : 2 << 20] == data


def test_a_file_system_survives_detaching(attached, server, tmp_path, capsys):
    partition, mountpoint = f"{attached}p1", tmp_path / "mnt"
    mountpoint.mkdir()
    subprocess.run(["mkfs.ext4", "-q", partition], check=True)
    subprocess.run(["mount", partition, mountpoint], check=True)
    data = os.urandom(2 << 20)
    (mountpoint / "file").write_bytes(data)
    subprocess.run(["umount", mountpoint], check=True)
    assert main(["detach", attached]) == 0
    assert main(["attach", str(server), attached]) == 0
    capsys.readouterr()
    subprocess.run(["mount", partition, mountpoint], check=True)
    try:
        assert (mountpoint / "file").read_bytes() == data
    finally:
        subprocess.run(["umount", mountpoint], check=True)


def test_list_tells_the_truth(attached, server, capsys):
    assert main(["list", "--json"]) == 0
    (device,) = (d for d in json.loads(capsys.readouterr().out) if d["device"] == attached)
    assert (device["size"], device["state"], device["target"]) == (SIZE, "attached", str(server))
    assert [p["device"] for p in device["partitions"]] == [f"{attached}p1"]
