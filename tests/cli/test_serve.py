"""`nbdlink serve` as a program: what it says, what it serves, how it ends."""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

import nbdlink
from nbdlink.client.negotiate import Negotiation
from nbdlink.errors import LocalProtocolError
from nbdlink.uri import Target

from ..server.fakes import RawClient
from ..server.gated import claim, introduced
from .programs import end, run, serving

SIZE = 1 << 20


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture(autouse=True)
def no_pid_files(tmp_path, monkeypatch):
    """Keep the pid files that are named after signatures to each test."""
    monkeypatch.setenv("NBDLINK_RUNTIME_DIRECTORY", str(tmp_path / "run"))


def test_a_file_is_the_default_export_and_its_uri_is_printed(image):
    with serving("-p", 0, "-b", "127.0.0.1", image) as (_, (line,)):
        uri, rest = line.split(" is ")
        assert rest == f"{image} (1M)"
        with nbdlink.connect(uri) as nbd:
            assert nbd.pread(SIZE, 0) == image.read_bytes()


def test_several_files_are_named_after_themselves_or_as_told(image, tmp_path):
    other = tmp_path / "other.img"
    other.write_bytes(bytes(512))
    with serving("-p", 0, image, f"second={other}", lines=2) as (_, printed):
        target = Target.parse(printed[0].split(" is ")[0])
        with Negotiation(target) as negotiation:
            assert [e.name for e in negotiation.list_exports()] == ["disk.img", "second"]


def test_a_name_and_a_description_are_told(image, tmp_path):
    path = tmp_path / "socket"
    with serving("-k", path, "-x", "data", "-D", "words", image) as (_, (line,)):
        with Negotiation(Target.parse(line.split(" is ")[0])) as negotiation:
            export = negotiation.info()
        assert (export.name, export.description) == ("data", "words")


def test_a_window_of_a_file_is_served(image, tmp_path):
    path = tmp_path / "socket"
    with (
        serving("-k", path, "-o", "4K", "--size", "8K", image) as (_, (line,)),
        nbdlink.connect(line.split(" is ")[0]) as nbd,
    ):
        assert nbd.pread(nbd.size, 0) == image.read_bytes()[4096 : 4096 + 8192]


def _signature(uri, name=""):
    """Give what the server says to a claim."""
    service = types.SimpleNamespace(addresses=[Target.parse(uri).socket])
    with RawClient(service, handshake=False) as client:
        _, signature = claim(introduced(client), 0, name=name.encode())
    return signature.removeprefix("x-nbdlink:signature=")


def test_a_signature_is_told(image, tmp_path):
    with serving("-k", tmp_path / "socket", "--signature", "a=b c", image) as (_, (line,)):
        assert _signature(line.split(" is ")[0]) == "a=b c"


def test_each_of_several_exports_has_its_own_signature(image, tmp_path):
    words = ["--signature", "one=1", "--signature", "two=2"]
    with serving(
        "-k", tmp_path / "socket", *words, *(f"{n}={image}" for n in ("one", "two")), lines=2
    ) as (_, (line, _)):
        uri = line.split(" is ")[0]
        assert (_signature(uri, "one"), _signature(uri, "two")) == ("1", "2")


def test_a_file_keeps_its_own_signature_across_restarts(image, tmp_path):
    seen = set()
    for _ in range(2):
        with serving("-k", tmp_path / "socket", image) as (_, (line,)):
            seen.add(_signature(line.split(" is ")[0]))
    assert len(seen) == 1
    assert seen.pop().startswith("auto:")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--signature", ""], "its signature has 0 characters"),
        (["--signature", "a" * 201], "its signature has 201 characters"),
        (["--signature", "\t"], "not printable ASCII"),
        (["--signature", "auto:x"], "begins with 'auto:'"),
        (["--signature", "a", "--signature", "b"], "two signatures for the export ''"),
    ],
)
def test_a_signature_of_no_use_is_refused(image, words, said):
    done = run(sys.executable, "-m", "nbdlink", "serve", *words, image)
    assert done.returncode == 2
    assert said in done.stderr


def test_several_exports_cannot_share_a_signature(image):
    done = run(
        sys.executable, "-m", "nbdlink", "serve", "--signature", "x=1", f"a={image}", f"b={image}"
    )
    assert done.returncode == 2
    assert "--signature x=1 does not say which of the 2 exports it is for" in done.stderr


def test_a_read_only_export_says_so(image, tmp_path):
    with serving("-r", "-k", tmp_path / "socket", image) as (_, (line,)):
        assert line.endswith("(1M, read-only)")
        with (
            nbdlink.connect(line.split(" is ")[0]) as nbd,
            pytest.raises(LocalProtocolError, match="read-only"),
        ):
            nbd.pwrite(b"x", 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_ends_it_gracefully_and_the_socket_is_gone(image, tmp_path, number):
    path = tmp_path / "socket"
    with serving("-f", "raw", "-k", path, image) as (process, _):
        assert end(process, number) == (0, "")
    assert not path.exists()


def test_a_connected_client_does_not_keep_it_from_ending(image, tmp_path):
    with (
        serving("-f", "raw", "-k", tmp_path / "socket", image) as (process, (line,)),
        nbdlink.connect(line.split(" is ")[0]) as nbd,
    ):
        nbd.pwrite(b"acknowledged", 0)
        assert end(process) == (0, "")
    assert image.read_bytes().startswith(b"acknowledged")


def test_once_ends_with_the_last_client(image, tmp_path):
    with serving("--once", "-k", tmp_path / "socket", image) as (process, (line,)):
        uri = line.split(" is ")[0]
        Negotiation(Target.parse(uri)).close()  # only looks around, so it does not count
        with nbdlink.connect(uri) as first, nbdlink.connect(uri) as second:
            first.close()
            assert second.pread(1, 0)
        assert process.wait(60) == 0


def test_a_second_server_on_the_same_socket_is_refused(image, tmp_path):
    path = tmp_path / "socket"
    with serving("-k", path, image):
        again = subprocess.run(
            [sys.executable, "-m", "nbdlink", "serve", "-k", str(path), str(image)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert again.returncode == 1
        assert "another server listens there" in again.stderr
        with nbdlink.connect(Target(socket=str(path))) as nbd:
            assert nbd.pread(1, 0)


def test_a_socket_that_a_dead_server_left_is_replaced(image, tmp_path):
    path = tmp_path / "socket"
    with serving("-k", path, image) as (process, _):
        process.kill()
        process.wait()
    assert path.exists()
    with serving("-k", path, image), nbdlink.connect(Target(socket=str(path))) as nbd:
        assert nbd.pread(1, 0)


def test_a_port_in_use_is_named(image):
    with serving("-p", 0, "-b", "127.0.0.1", image) as (_, (line,)):
        port = Target.parse(line.split(" is ")[0]).port
        words = ["serve", "-p", str(port), "-b", "127.0.0.1", str(image)]
        again = subprocess.run(
            [sys.executable, "-m", "nbdlink", *words], capture_output=True, text=True, timeout=60
        )
    assert again.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}: address already in use" in again.stderr


def test_clients_are_reported_on_request(image, tmp_path):
    with serving("-v", "-k", tmp_path / "socket", image) as (process, (line,)):
        nbdlink.connect(line.split(" is ")[0]).close()
        status, log = end(process)
    assert status == 0
    assert "connected to export ''" in log


# Who asks while it stops, and who waits to get in: real clients.


@contextlib.contextmanager
def slow_client(path):
    """Be in the middle of a write, for which a stop waits; give the way to finish it."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        sock.sendall(b"\0\0\0\3" + b"IHAVEOPT" + struct.pack(">IIIH", 7, 6, 0, 0))
        received = b""
        while not received.endswith(struct.pack(">QIII", 0x0003E889045565A9, 7, 1, 0)):
            received += sock.recv(4096)
        flush = struct.pack(">IHHQQI", 0x25609513, 0, 3, 6, 0, 0)
        sock.sendall(flush + struct.pack(">IHHQQI", 0x25609513, 0, 1, 7, 0, 4096) + b"half")
        # The answer to the one tells that the server has heard of the other.
        assert sock.recv(16) == struct.pack(">IIQ", 0x67446698, 0, 6)

        def finish():
            sock.sendall(bytes(4092))
            assert sock.recv(16) == struct.pack(">IIQ", 0x67446698, 0, 7)

        yield finish


@pytest.mark.interop
@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["nbdinfo"], "after transport endpoint shutdown"),  # libnbd's words for ESHUTDOWN
        (["qemu-img", "info"], "server reported: the server is shutting down"),
        ([sys.executable, "-m", "nbdlink", "info"], "the server is shutting down"),
    ],
    ids=["nbdinfo", "qemu-img", "nbdlink"],
)
def test_a_newcomer_is_told_that_the_server_is_stopping(image, tmp_path, command, says):
    path = tmp_path / "socket"
    with serving("-v", "-k", path, image) as (process, (line,)):
        with slow_client(path) as finish:
            process.send_signal(signal.SIGTERM)
            assert any("told to stop" in said for said in process.stderr)
            done = run(*command, line.split(" is ")[0])
            assert process.poll() is None
            finish()
        assert process.wait(60) == 0
    assert done.returncode != 0
    assert says in done.stderr


LIBNBD_CLIENT = """
import sys, nbd
h = nbd.NBD()
h.connect_uri(sys.argv[1])
print(len(h.pread(512, 0)), flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def libnbd_client(uri):
    """Connect with libnbd, and stay until the end of the block or until told to go."""
    python = "/usr/bin/python3"  # where distributions put libnbd's module
    if run(python, "-c", "import nbd").returncode:
        pytest.skip("libnbd's Python module is not installed")
    process = subprocess.Popen(
        [python, "-c", LIBNBD_CLIENT, uri],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def said_within(process, seconds):
    return bool(select.select([process.stdout], [], [], seconds)[0])


@pytest.mark.interop
def test_a_client_beyond_the_limit_gets_in_when_another_leaves(image, tmp_path):
    with serving("-e", 2, "-k", tmp_path / "socket", image) as (_, (line,)):
        uri = line.split(" is ")[0]
        with libnbd_client(uri) as one, libnbd_client(uri) as two:
            assert one.stdout.readline() == two.stdout.readline() == "512\n"
            with libnbd_client(uri) as three:
                assert not said_within(three, 0.3), "the third of two clients was let in"
                one.stdin.close()
                assert three.stdout.readline() == "512\n"


@pytest.mark.interop
def test_once_with_a_limit_ends_with_its_client_whoever_waits(image, tmp_path):
    # As with qemu-nbd, which does not look at its queue again either.
    words = ["--once", "-e", 1, "-k", tmp_path / "socket", image]
    with serving(*words) as (process, (line,)):
        uri = line.split(" is ")[0]
        with libnbd_client(uri) as one:
            assert one.stdout.readline() == "512\n"
            with libnbd_client(uri) as two:
                assert not said_within(two, 0.3), "the second of one client was let in"
                one.stdin.close()
                assert process.wait(60) == 0
                assert two.stdout.readline() == ""


@pytest.mark.interop
def test_connections_that_never_speak_lock_nobody_out(image):
    limits = (50, 200)
    words = ["-p", 0, "-b", "127.0.0.1", "--negotiation-timeout", 3600, image]
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
    with (
        serving(*words, preexec_fn=limit) as (process, (line,)),
        contextlib.ExitStack() as stack,
    ):
        uri = line.split(" is ")[0]
        assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE) == (200, 200)
        address = ("127.0.0.1", Target.parse(uri).port)
        for _ in range(300):
            stack.enter_context(socket.create_connection(address))
        done = run("nbdinfo", "--size", uri)
        assert done.stdout.strip() == str(SIZE), done.stderr


# What it is started with.


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o117])
def test_a_sockets_permissions_are_the_umasks(image, tmp_path, umask):
    # As with qemu-nbd: who may write to the socket may connect.
    path = tmp_path / "socket"
    with serving("-k", path, image, umask=umask):
        assert stat.S_IMODE(path.stat().st_mode) == 0o777 & ~umask


def test_closed_standard_streams_do_no_harm(image, tmp_path):
    path = tmp_path / "socket"
    content = image.read_bytes()
    words = [sys.executable, "-m", "nbdlink", "serve", "-vv", "-k", str(path), str(image)]
    with subprocess.Popen(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *words]) as process:
        try:
            with nbdlink.connect(connectable(path)) as nbd:
                assert nbd.pread(SIZE, 0) == content
            for number in range(3):
                assert Path(f"/proc/{process.pid}/fd/{number}").readlink() == Path("/dev/null")
        finally:
            process.terminate()
        assert process.wait(60) == 0
    assert image.read_bytes() == content


def connectable(path):
    """Wait until somebody listens on a Unix socket; nothing else tells it here."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
            return Target(socket=str(path))
        time.sleep(0.01)
    raise AssertionError(f"nobody listens on {path}")
