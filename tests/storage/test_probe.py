"""What format an image has: the same answer as QEMU's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import pytest

from nbdlink.storage.probe import format_of, probe

FORMATS = ["qcow2", "qcow", "vmdk", "vdi", "vhdx", "qed", "parallels"]


def qemu_img(*words):
    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img is not installed")
    done = subprocess.run(["qemu-img", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def guess(path):
    return json.loads(qemu_img("info", "--output=json", path))["format"]


@pytest.mark.interop
@pytest.mark.parametrize("kind", FORMATS)
def test_an_image_of_qemus_is_known(tmp_path, kind):
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", kind, path, "8M")
    assert probe(path) == kind == guess(path)


@pytest.mark.interop
@pytest.mark.parametrize("subformat", ["dynamic", "fixed"])
def test_a_vhd_is_known_as_far_as_qemu_knows_it(tmp_path, subformat):
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "vpc", "-o", f"subformat={subformat}", path, "8M")
    assert probe(path) == guess(path) == ("vpc" if subformat == "dynamic" else "raw")


@pytest.mark.interop
def test_a_vmdk_that_begins_with_text_is_known(tmp_path):
    path = tmp_path / "image.vmdk"
    qemu_img("create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat", path, "8M")
    assert probe(path) == guess(path) == "vmdk"


@pytest.mark.interop
@pytest.mark.parametrize(
    "head",
    [
        b"",
        bytes(512),
        b"QFI\xfb\0\0\0\x04",
        b"QFI\xfa\0\0\0\x03",
        b"\n \n# a comment\nversion=1\r\n",
        b"# a comment\nversion=4\n",
        b"#version=1\n",
        b"Bochs Virtual HD Image",
        b"\x55\xaa" * 256,
    ],
)
def test_doubtful_beginnings_are_judged_as_qemu_does(tmp_path, head):
    path = tmp_path / "image"
    path.write_bytes(head.ljust(4096, b"\0"))
    with_bounds = guess(path) if not head.startswith(b"QFI\xfb\0\0\0\x04") else "raw"
    assert format_of(head) == with_bounds


@pytest.mark.parametrize(("version", "kind"), [(1, "luks"), (2, "raw")])
def test_luks_is_known_in_the_version_that_qemu_has(version, kind):
    # Made by hand: to have qemu-img make one it must measure how fast the machine is.
    assert format_of(b"LUKS\xba\xbe\0" + bytes([version])) == kind


def test_what_cannot_be_read_counts_as_raw(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    assert probe(tmp_path) == probe(tmp_path / "fifo") == probe(tmp_path / "nothing") == "raw"
