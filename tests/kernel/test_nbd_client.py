"""`nbdlink nbd-client`: devices come, are checked, outlive their server, and go."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from nbdlink.cli.main import main
from nbdlink.kernel import sysfs
from nbdlink.link import record
from nbdlink.link.config import files

from .conftest import free_all, until
from .forked import Forked
from .restarts import Restartable

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("runtime_directory")]

SIZE = 8 << 20


@pytest.fixture
def server(image, tmp_path):
    server = Restartable("nbdlink", image, tmp_path).start()
    yield server
    server.kill()
    free_all()


def typed(*words):
    return main(["nbd-client", *map(str, words)])


def head(device):
    """Read the first bytes of a device, and not of the page cache."""
    words = ["dd", f"if={device}", "bs=4096", "count=1", "iflag=direct", "status=none"]
    return subprocess.run(words, check=True, capture_output=True).stdout


def test_a_device_comes_is_checked_as_by_nbd_client_and_goes(server, image, capfd):
    words = ["-N", "data", "127.0.0.1", server.port, "/dev/nbd3", "-C", 2, "-b", 4096, "-swap"]
    assert typed(*words) == 0
    out, err = capfd.readouterr()
    assert out == "Connected /dev/nbd3\n"
    assert err.startswith("nbdlink: not needed: -swap")
    assert sysfs.size(3) == SIZE
    assert head("/dev/nbd3") == image.read_bytes()[:4096]
    assert typed("-c", "/dev/nbd3") == 0
    ours = capfd.readouterr().out
    theirs = subprocess.run(["nbd-client", "-c", "/dev/nbd3"], capture_output=True, text=True)
    assert (theirs.returncode, theirs.stdout.strip()) == (0, ours.strip())
    assert typed("-c", "/dev/nbd3p1") == 0
    assert capfd.readouterr().out == ours
    assert typed("-d", "/dev/nbd3") == 0
    assert typed("-c", "/dev/nbd3") == 1
    assert capfd.readouterr().out == ""


def test_what_is_not_attached_is_detached_already(capfd):
    assert typed("-d", "/dev/nbd3") == 0
    assert capfd.readouterr() == ("", "")


def test_a_free_device_is_found(server, capfd):
    assert typed("-N", "data", "127.0.0.1", server.port) == 0
    said, device = capfd.readouterr().out.split()
    assert said == "Connected"
    assert sysfs.pid(sysfs.index_of(device)) is not None


def test_a_device_of_nbdtab_is_attached_by_its_name(server, tmp_path, monkeypatch, capfd):
    table = tmp_path / "nbdtab"
    table.write_text(f"nbd4 127.0.0.1 data port={server.port},bs=1024\n")
    nothing = tmp_path / "none"
    monkeypatch.setattr(files.load, "__defaults__", (nothing, nothing, table))
    # What the table has no words for is said beside it.
    assert typed("nbd4", "-R", "-L", "-t", 7) == 0
    assert record.read(4).name == "nbdtab-nbd4"
    assert Path("/sys/block/nbd4/queue/logical_block_size").read_text() == "1024\n"
    assert sysfs.read_only(4)
    assert record.read(4).road == "ioctl"
    assert "-timeout has no effect" in capfd.readouterr().err


def test_a_device_that_persists_outlives_its_server_and_ends_with_detach(server, image, tmp_path):
    words = ["nbd-client", "127.0.0.1", str(server.port), "-N", "data", "/dev/nbd5"]
    environment = {"NBDLINK_RUNTIME_DIRECTORY": str(record.DIRECTORY)}
    log = tmp_path / "client.log"
    client = Forked(
        _main, ([*words, "-persist"], str(record.DIRECTORY)), stderr=log, environment=environment
    )
    assert client.wait(100) == 0, log.read_text()
    server.kill()
    reader = subprocess.Popen(
        ["dd", "if=/dev/nbd5", "bs=4096", "count=1", "iflag=direct", "status=none"],
        stdout=subprocess.PIPE,
    )
    server.start()
    assert reader.communicate(timeout=100)[0] == image.read_bytes()[:4096]
    assert typed("-d", "/dev/nbd5") == 0
    until(lambda: sysfs.pid(5) is None)


def _main(words, directory):
    # Read from the environment when it was imported, which was before there was this one.
    record.DIRECTORY = Path(directory)
    return main(words)
