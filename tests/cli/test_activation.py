"""`nbdlink serve` on sockets that somebody else has opened, and what it tells that somebody."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

import nbdlink
from nbdlink.transport.stream import listen_tcp, listen_unix
from nbdlink.uri import Target

from .programs import run

SERVE = [sys.executable, "-m", "nbdlink", "serve", "-f", "raw"]
TIMEOUT = 20


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(1 << 20))
    return path


def activate(*words, sockets, count=None, pid="$$", environment=(), **options):
    """Start `nbdlink serve` as a service manager does, with `sockets` as descriptors from 3 on."""

    def hand_over():
        descriptors = [os.dup(sock.fileno()) for sock in sockets]
        # Copied out of the way first, since one of them may be in the place of another.
        high = [os.dup2(number, 200 + index) for index, number in enumerate(descriptors)]
        for number in descriptors:
            os.close(number)
        for index, number in enumerate(high):
            os.dup2(number, 3 + index)
            os.close(number)

    fds = len(sockets) if count is None else count
    script = f'LISTEN_PID={pid} LISTEN_FDS={fds} LISTEN_FDNAMES=unknown exec "$@"'
    return subprocess.Popen(
        ["sh", "-c", script, "sh", *SERVE, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        close_fds=False,
        preexec_fn=hand_over,
        env={**os.environ, **dict(environment)},
        **options,
    )


@contextlib.contextmanager
def activated(*words, **options):
    with activate(*words, **options) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def ends(process):
    """Wait for the end; give the exit status and what was said on stdout and stderr."""
    out, err = process.communicate(timeout=TIMEOUT)
    return process.returncode, out, err


# Real starters.


@pytest.mark.interop
def test_nbdinfo_starts_a_server_itself(image):
    done = run("nbdinfo", "--size", "--", "[", *SERVE, image, "]")
    assert (done.stdout, done.stderr) == (f"{1 << 20}\n", "")


@pytest.mark.interop
def test_stdout_is_left_to_the_starter(image):
    done = run("nbdinfo", "--json", "--", "[", *SERVE, "-r", image, "]")
    (export,) = json.loads(done.stdout)["exports"]
    assert export["is_read_only"]


@pytest.mark.interop
def test_nbdcopy_copies_from_and_to_servers_that_it_starts(image, tmp_path):
    copy = tmp_path / "copy.img"
    copy.write_bytes(bytes(1 << 20))
    done = run("nbdcopy", "--", "[", *SERVE, image, "]", "[", *SERVE, copy, "]")
    assert done.returncode == 0, done.stderr
    assert copy.read_bytes() == image.read_bytes()


@pytest.mark.interop
def test_systemd_starts_a_server_when_a_client_comes(image, tmp_path):
    path = tmp_path / "socket"
    starter = "systemd-socket-activate"
    run(starter, "--version")
    with subprocess.Popen(
        [starter, "-l", path, *SERVE, str(image)], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert any("Listening on" in line for line in process.stderr)
            with nbdlink.connect(Target(socket=str(path))) as nbd:
                assert nbd.pread(512, 0) == image.read_bytes()[:512]
        finally:
            process.terminate()
        assert process.wait(TIMEOUT) == 0
    assert path.is_socket(), "the socket's file is its maker's"


# What is handed over.


def test_several_sockets_are_served(image, tmp_path):
    path = tmp_path / "socket"
    with (
        listen_unix(str(path)) as one,
        listen_tcp("127.0.0.1", 0)[0] as two,
        activated(image, sockets=[one, two]) as process,
    ):
        host, port = two.getsockname()
        for target in (Target(socket=str(path)), Target(host=host, port=port)):
            with nbdlink.connect(target) as nbd:
                assert nbd.size == 1 << 20
        process.terminate()
        assert ends(process) == (0, "", "")


def test_who_comes_while_no_server_runs_is_served_by_the_next(image, tmp_path):
    path = tmp_path / "socket"
    with listen_unix(str(path)) as listener, socket.socket(socket.AF_UNIX) as client:
        with activated(image, sockets=[listener]) as process:
            nbdlink.connect(Target(socket=str(path))).close()
            process.terminate()
            assert ends(process)[0] == 0
        client.settimeout(TIMEOUT)
        client.connect(str(path))
        with activated(image, sockets=[listener]):
            assert client.recv(18).startswith(b"NBDMAGIC")


@pytest.mark.parametrize("words", [["-p", "0"], ["-b", "127.0.0.1"], ["-k", "other"]])
def test_sockets_to_make_are_refused_beside_sockets_that_are_given(image, tmp_path, words):
    with (
        listen_unix(str(tmp_path / "socket")) as listener,
        activated(*words, image, sockets=[listener], cwd=tmp_path) as process,
    ):
        status, _, err = ends(process)
    assert status == 2
    assert err.startswith("nbdlink: LISTEN_FDS hands over sockets to listen on, so --port")
    assert not (tmp_path / "other").exists()


def closed(_):
    return contextlib.nullcontext()


def plain_file(folder):
    return (folder / "disk.img").open("rb")


def datagram_socket(_):
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)


def silent_socket(_):
    return socket.socket(socket.AF_INET)


def foreign_socket(_):
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        (closed, "is not open"),
        (plain_file, "is not a socket"),
        (datagram_socket, "is not a stream socket"),
        (silent_socket, "is a socket that does not listen"),
        (foreign_socket, "is a socket, but neither TCP nor Unix"),
    ],
)
def test_what_cannot_be_accepted_on_is_named(image, tmp_path, what, says):
    with listen_unix(str(tmp_path / "socket")) as listener, what(tmp_path) as other:
        sockets = [listener] if other is None else [listener, other]
        with activated(image, sockets=sockets, count=2) as process:
            status, _, err = ends(process)
    assert status == 2
    first, second = err.splitlines()
    assert first == f"nbdlink: descriptor 4, handed over by LISTEN_FDS, {says}"
    assert second.startswith("  hint: ")


def test_a_number_that_is_none_is_named(image):
    with activated(image, sockets=[], count="many") as process:
        status, _, err = ends(process)
    assert (status, err.splitlines()[0]) == (2, "nbdlink: LISTEN_FDS='many' is not a number")


def test_what_was_meant_for_another_process_is_ignored(image, tmp_path):
    path = tmp_path / "socket"
    with activated("-k", path, image, sockets=[], count=1, pid=1) as process:
        assert process.stdout.readline().startswith("nbd+unix://")


def test_neither_variables_nor_sockets_reach_a_child(image, tmp_path):
    with listen_unix(str(tmp_path / "socket")) as listener:
        code = (
            "import os; from nbdlink.transport.activation import inherited_sockets;"
            "sockets = inherited_sockets();"
            "print(len(sockets), os.get_inheritable(3), [n for n in os.environ if 'LISTEN' in n])"
        )
        script = 'LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=x exec "$@"'
        done = subprocess.run(
            ["sh", "-c", script, "sh", sys.executable, "-c", code],
            capture_output=True,
            text=True,
            close_fds=False,
            preexec_fn=lambda: os.dup2(listener.fileno(), 3),
        )
    assert done.stdout == "1 False []\n"


# What is told.


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path):
    """A socket for notices, and the name of it."""
    name = str(tmp_path / "notify")
    if request.param == "abstract":
        name = f"@nbdlink-test-{os.getpid()}-{time.monotonic_ns()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(name.replace("@", "\0"))
        sock.settimeout(TIMEOUT)
        yield sock, name


def test_the_service_manager_is_told_of_the_beginning_and_the_end(image, tmp_path, manager):
    sock, name = manager
    with listen_unix(str(tmp_path / "socket")) as listener:
        environment = {"NOTIFY_SOCKET": name}
        with activated(image, sockets=[listener], environment=environment) as process:
            assert sock.recv(1000).decode().splitlines() == ["READY=1", f"MAINPID={process.pid}"]
            process.send_signal(signal.SIGTERM)
            assert sock.recv(1000) == b"STOPPING=1"
            assert ends(process)[0] == 0


@pytest.mark.parametrize("name", ["/nonexistent/socket", "@nbdlink-nobody", "vsock:2:1", "", "x"])
def test_a_service_manager_that_cannot_be_told_is_no_matter(image, tmp_path, name):
    with listen_unix(str(tmp_path / "socket")) as listener:
        environment = {"NOTIFY_SOCKET": name}
        with activated(image, sockets=[listener], environment=environment) as process:
            nbdlink.connect(Target(socket=str(tmp_path / "socket"))).close()
            process.terminate()
            assert ends(process) == (0, "", "")
