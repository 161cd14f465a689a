"""QEMU's own tools: they make the images, and say whether ours are sound."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

TOOLS = ("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo")
MISSING = [name for name in TOOLS if shutil.which(name) is None]


def run(*words, **options):
    """Run a program that has to succeed; give what it says."""
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, timeout=60, **options
    )
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def create(path, size, *, options="", backing=None, backing_format=None):
    """Make an image."""
    words = ["qemu-img", "create", "-q", "-f", "qcow2"]
    if options:
        # QEMU looks for a data file in the working folder, not beside the image.
        words += ["-o", options.replace("data_file=", f"data_file={Path(path).parent}/")]
    if backing is not None:
        words += ["-b", backing]
        words += ["-F", backing_format] if backing_format else []
    # Relative names are relative to the image's folder.
    run(*words, Path(path).name, *([] if size is None else [size]), cwd=Path(path).parent)
    return path


def io(path, *commands, image_format="qcow2"):
    """Have qemu-io do something with an image."""
    words = [word for command in commands for word in ("-c", command)]
    said = run("qemu-io", "-f", image_format, *words, path)
    assert "failed" not in said.lower(), said
    return said


def check(path, *, leaks=False):
    """See that an image is sound; leaks are only allowed where that is said."""
    done = subprocess.run(
        ["qemu-img", "check", "-f", "qcow2", str(path)], capture_output=True, text=True, timeout=60
    )
    good = (0, 3) if leaks else (0,)
    assert done.returncode in good, f"{path}: {done.stdout}{done.stderr}"


def content(path, *, snapshot=None):
    """Give the bytes of the virtual disk as QEMU reads them."""
    out = Path(f"{path}.content")
    words = ["-l", f"snapshot.id={snapshot}"] if snapshot else []
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", *words, path, out)
    try:
        return out.read_bytes()
    finally:
        out.unlink()


def mapping(path):
    """Give the extents as QEMU sees them: (length, data, zero), neighbours joined."""
    extents = []
    for item in json.loads(run("qemu-img", "map", "--output=json", "-f", "qcow2", path)):
        _append(extents, item["length"], item["data"], item["zero"])
    return extents


def ours(storage):
    """Give our extents in the same form."""
    extents = []
    for length, flags in storage.extents("base:allocation", 0, storage.size):
        _append(extents, length, not flags & 1, bool(flags & 2))
    return extents


def _append(extents, length, data, zero):
    if extents and extents[-1][1:] == (data, zero):
        length += extents.pop()[0]
    extents.append((length, data, zero))


def info(path):
    """Give what qemu-img tells of an image."""
    return json.loads(run("qemu-img", "info", "--output=json", "-f", "qcow2", path))
