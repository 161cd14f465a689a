"""`nbdlink copy` and `nbdlink map` against other implementations' servers and tools."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess

import pytest

import nbdlink
from nbdlink.cli.main import main
from nbdlink.copy.image import CopySpec, copy
from nbdlink.protocol.constants import HeaderStyle
from nbdlink.uri import Target

from .peers import MISSING, PEERS, _running

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

MIB = 1 << 20
SIZE = 16 * MIB


def said(*command):
    return subprocess.run(
        list(map(str, command)), capture_output=True, check=True, timeout=60
    ).stdout


def sparse(path, pattern):
    """Make a file of SIZE bytes with data where `pattern` says, as (offset, length)."""
    with path.open("wb") as file:
        file.truncate(SIZE)
        for offset, length in pattern:
            file.seek(offset)
            file.write(os.urandom(length))
    return path


PATTERNS = {
    "empty": [],
    "full": [(0, SIZE)],
    "ends": [(0, MIB), (SIZE - MIB, MIB)],
    "middle": [(5 * MIB, 3 * MIB)],
    "comb": [(at, 65536) for at in range(0, SIZE, 131072)],
}


@pytest.fixture(params=list(PATTERNS))
def image(request, tmp_path):
    return sparse(tmp_path / "disk.img", PATTERNS[request.param])


@pytest.fixture(params=list(PEERS))
def peer(request, tmp_path):
    """A peer's server of a file with holes; gives the file, too."""
    path = sparse(tmp_path / "served.img", PATTERNS["comb"])
    with PEERS[request.param](path, tmp_path) as target:
        yield path, target


@contextlib.contextmanager
def qemu_nbd_of(image, folder, *options):
    """Serve an image in qemu's own format."""
    target = Target(socket=str(folder / "qcow2.sock"), export="data")
    command = ["qemu-nbd", "-k", str(target.socket), "-t", "-e", "0", "-f", "qcow2", *options]
    with _running([*command, "-x", "data", str(image)], target):
        yield target


@pytest.fixture
def qcow2(tmp_path):
    """Serve an image with a backing file, zero clusters and a dirty bitmap."""
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    said("qemu-img", "create", "-q", "-f", "qcow2", base, SIZE)
    said("qemu-io", "-f", "qcow2", "-c", "write 1M 3M", "-c", "write -z 10M 1M", base)
    said("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    said("qemu-img", "bitmap", "--add", top, "b0")
    said("qemu-io", "-f", "qcow2", "-c", "write 5M 64k", "-c", "write -z 2M 64k", top)
    with qemu_nbd_of(top, tmp_path, "-A", "-B", "b0") as target:
        yield top, target


# Copying.


def test_a_peers_export_is_copied_to_a_file(peer, tmp_path):
    path, target = peer
    copy(CopySpec(str(target), str(tmp_path / "new"), verify=True))
    assert (tmp_path / "new").read_bytes() == path.read_bytes()


def test_a_file_is_copied_to_a_peers_export(peer, tmp_path):
    path, target = peer
    source = sparse(tmp_path / "source.img", PATTERNS["ends"])
    copy(CopySpec(str(source), str(target), verify=True))
    assert path.read_bytes() == source.read_bytes()


def test_what_we_copy_is_what_nbdcopy_copies(image, tmp_path):
    with PEERS["nbdkit"](image, tmp_path) as target:
        said("nbdcopy", target, tmp_path / "theirs")
        copy(CopySpec(str(target), str(tmp_path / "ours")))
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    assert ours.read_bytes() == theirs.read_bytes() == image.read_bytes()
    assert ours.stat().st_blocks <= theirs.stat().st_blocks


def test_a_qcow2_image_is_filled_and_is_found_in_order(image, tmp_path):
    made = tmp_path / "made.qcow2"
    said("qemu-img", "create", "-q", "-f", "qcow2", made, SIZE)
    with qemu_nbd_of(made, tmp_path) as target:
        copy(CopySpec(str(image), str(target), verify=True))
    said("qemu-img", "check", "-q", made)
    said("qemu-img", "compare", "-f", "raw", "-F", "qcow2", image, made)


def test_one_peer_is_copied_to_another(image, tmp_path):
    other = sparse(tmp_path / "other.img", PATTERNS["full"])
    with (
        PEERS["nbdkit"](image, tmp_path) as source,
        PEERS["qemu-nbd"](other, tmp_path) as destination,
    ):
        copy(CopySpec(str(source), str(destination), verify=True))
    assert other.read_bytes() == image.read_bytes()


def test_it_is_said_that_a_server_cannot_flush(tmp_path, capsys):
    image = sparse(tmp_path / "disk.img", PATTERNS["middle"])
    target = Target(socket=str(tmp_path / "nbdkit.sock"))
    # Its plugin has no word for it.
    command = ["nbdkit", "-f", "-U", str(target.socket), "eval", f"get_size=echo {SIZE}"]
    command += ["pread=exit 1", "pwrite=cat >/dev/null", "can_write=exit 0"]
    with _running(command, target):
        assert main(["copy", str(image), str(target)]) == 0
    assert "its server cannot flush" in capsys.readouterr().err


# What the connection learns.


@pytest.mark.parametrize(
    ("name", "style"),
    [("nbdkit", HeaderStyle.STRUCTURED), ("qemu-nbd", HeaderStyle.STRUCTURED)],
)
def test_peers_agree_to_structured_replies_and_tell_what_is_allocated(name, style, tmp_path):
    image = sparse(tmp_path / "disk.img", PATTERNS["ends"])
    with PEERS[name](image, tmp_path) as target, nbdlink.connect(target) as nbd:
        assert nbd.export.style >= style
        assert [extent.flags for extent in nbd.extents()] == [0, 3, 0]
        assert nbd.pread(SIZE, 0) == image.read_bytes()


def test_an_export_of_large_blocks_whose_holes_end_anywhere_is_copied(tmp_path):
    # What is asked first reaches to 1 GiB, and nbdkit's answer into a block behind it.
    image, copied = tmp_path / "disk.img", tmp_path / "copied.img"
    with image.open("wb") as file:
        file.truncate(1025 * MIB)
        file.seek(1024 * MIB + 5 * 4096)
        file.write(b"x" * 4096)
    target = Target(socket=str(tmp_path / "nbdkit.sock"))
    command = ["nbdkit", "-f", "-U", str(target.socket), "--filter=blocksize-policy", "file"]
    command += [str(image), "blocksize-minimum=64K", "blocksize-preferred=64K"]
    command += ["blocksize-maximum=1M", "blocksize-error-policy=error"]
    with _running(command, target):
        copy(CopySpec(str(target), str(copied)))
    subprocess.run(["cmp", image, copied], check=True, timeout=60)


def test_nbdkit_may_be_told_to_send_errors_in_words(tmp_path):
    target = Target(socket=str(tmp_path / "nbdkit.sock"))
    command = ["nbdkit", "-f", "-U", str(target.socket), "--filter=error", "memory", "1M"]
    with (
        _running([*command, "error-pread-rate=100%", "error=EIO"], target),
        nbdlink.connect(target) as nbd,
    ):
        with pytest.raises(OSError, match="input/output error"):
            nbd.pread(512, 0)
        nbd.pwrite(b"x", 0)


# Maps.


def mapped(target, *words):
    return ["map", "--json", *words, str(target)]


@pytest.mark.parametrize("name", ["nbdkit", "qemu-nbd"])
def test_the_map_is_nbdinfos_and_qemu_imgs(name, image, tmp_path, capsys):
    with PEERS[name](image, tmp_path) as target:
        theirs = json.loads(said("nbdinfo", "--map", "--json", target))
        totals = json.loads(said("nbdinfo", "--map", "--totals", "--json", target))
        qemus = json.loads(said("qemu-img", "map", "--output=json", "-f", "raw", target))
        assert main(mapped(target)) == 0
        ours = json.loads(capsys.readouterr().out)
        assert main(mapped(target, "--totals")) == 0
        our_totals = json.loads(capsys.readouterr().out)
    assert ours == theirs
    zeroes = [(e["offset"], e["length"], bool(e["type"] & 2)) for e in ours]
    assert zeroes == [(e["start"], e["length"], e["zero"]) for e in qemus]
    for total in totals + our_totals:
        total["percent"] = pytest.approx(total["percent"], abs=1e-3)
    assert our_totals == totals


def test_the_text_of_totals_is_nbdinfos(image, tmp_path, capsys):
    with PEERS["nbdkit"](image, tmp_path) as target:
        theirs = said("nbdinfo", "--map", "--totals", target).decode()
        assert main(["map", "--totals", str(target)]) == 0
    assert capsys.readouterr().out.split() == theirs.split()


@pytest.mark.parametrize(
    "context", ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b0"]
)
def test_qemus_contexts_are_nbdinfos(qcow2, context, capsys):
    _, target = qcow2
    theirs = json.loads(said("nbdinfo", f"--map={context}", "--json", target))
    assert main(mapped(target, "--context", context)) == 0
    assert json.loads(capsys.readouterr().out) == theirs


def test_several_contexts_are_told_at_once(qcow2):
    _, target = qcow2
    names = ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b0"]
    with nbdlink.connect(target, contexts=names) as nbd:
        assert set(nbd.contexts) == set(names)
        told = nbd.block_status(SIZE, 0)
    assert set(told) == set(names)


def test_a_server_that_cannot_tell_is_said_to_and_shown_as_data(tmp_path, capsys):
    image = sparse(tmp_path / "disk.img", PATTERNS["ends"])
    with PEERS["nbd-server"](image, tmp_path) as target:
        assert main(mapped(target)) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == [{"offset": 0, "length": SIZE, "type": 0, "description": "data"}]
    assert "cannot tell what is allocated" in err
