"""`serve --attach` with a kernel that is made up: what is asked of it, and when.

`tests/kernel/test_serve_attach.py` has a real one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import pytest

SIZE = 1 << 20

PROGRAM = """
import os, sys, types
import nbdlink
from nbdlink.cli.main import main
from nbdlink.link import attach as link

def attach(target, device, *, read_only):
    # The device's connection, which lives until it is detached.
    link.nbd = nbdlink.connect(target)
    if os.environ.get("FAILS"):
        from nbdlink.errors import DeviceBusyError
        raise DeviceBusyError(f"{device} is in use")
    print("attach", device, read_only, len(link.nbd.pread(512, 0)), flush=True)
    print(target, flush=True)
    return types.SimpleNamespace(path=device)

def detach(device, force=False):
    link.nbd.pwrite(b"flushed", 0)
    link.nbd.flush()
    link.nbd.close()
    print("detach", device, force, flush=True)

link.attach, link.detach = attach, detach
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SIZE))
    return path


@contextlib.contextmanager
def program(*words, **environment):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_the_device_comes_by_a_socket_of_its_own_and_leaves_before_the_server(image):
    with program("serve", "-f", "raw", "--attach", "/dev/nbd7", image) as process:
        uri = process.stdout.readline().split(" is ")[0]
        assert process.stdout.readline() == "attach /dev/nbd7 False 512\n"
        assert process.stdout.readline().strip() == uri
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "detach /dev/nbd7 False\n", "")
    assert image.read_bytes().startswith(b"flushed")
    path = uri.partition("=")[2]
    assert not os.path.exists(os.path.dirname(path))  # noqa: PTH110, PTH120 - it is a URI's


def test_a_path_that_is_relative_holds_everywhere(image, tmp_path):
    words = ["serve", "-r", "-k", os.path.relpath(tmp_path / "socket"), "--attach", "/dev/nbd7"]
    with program(*words, image) as process:
        process.stdout.readline()
        assert process.stdout.readline() == "attach /dev/nbd7 True 512\n"
        assert process.stdout.readline() == f"nbd+unix:///?socket={tmp_path}/socket\n"


def test_a_device_that_cannot_be_had_ends_the_server(image, tmp_path):
    words = ["serve", "-f", "raw", "-k", tmp_path / "socket", "--attach", "/dev/nbd7", image]
    with program(*words, FAILS="1") as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err == "nbdlink: /dev/nbd7 is in use\n"
    assert not (tmp_path / "socket").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["a", "b"], "for a single storage"),
        (["--tls-certificates", "d", "a"], "goes without TLS"),
        (
            ["--object", "tls-creds-psk,id=t,dir=d,endpoint=server", "--tls-creds", "t", "a"],
            "goes without TLS",
        ),
    ],
)
def test_what_does_not_go_together_is_said(words, says):
    with program("serve", "--attach", "/dev/nbd7", *words) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert says in err
