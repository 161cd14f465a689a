"""`nbdlink serve` in the background, and its pid file."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import select
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import nbdlink
from nbdlink.errors import DaemonError
from nbdlink.server.daemon import PidFile, log_to_syslog
from nbdlink.uri import Target

from .programs import end, serving
from .programs import nbdlink as program


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(1 << 20))
    return path


@pytest.fixture
def pid_file(tmp_path):
    return tmp_path / "server.pid"


class Daemon:
    """A daemon, known by its pid file, and the way to wait for its end."""

    def __init__(self, pid_file):
        self.pid = int(pid_file.read_text())
        self.handle = os.pidfd_open(self.pid)

    def end(self):
        """Stop it and wait until it is gone, which it tells nobody who is not its parent."""
        signal.pidfd_send_signal(self.handle, signal.SIGTERM)
        self.wait()

    def forget(self):
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.handle, signal.SIGKILL)
        os.close(self.handle)

    def wait(self):
        assert select.select([self.handle], [], [], 20)[0], "the daemon does not end"

    def proc(self, name):
        return Path(f"/proc/{self.pid}/{name}")


@pytest.fixture
def fork(tmp_path, image, pid_file):
    """Start a daemon in `tmp_path`; give what the parent said, and the daemon."""
    with contextlib.ExitStack() as stack:

        def start(*words):
            options = ["-f", "raw", "--fork", "--pid-file", pid_file, "-k", "socket"]
            done = program("serve", *options, *words, image, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            daemon = Daemon(pid_file)
            stack.callback(daemon.forget)
            return done, daemon

        yield start


# In the background.


def test_the_parent_ends_when_clients_can_come(fork, tmp_path, image):
    done, daemon = fork()
    assert done.stdout == f"nbd+unix:///?socket=socket is {image} (1M)\n"
    assert done.stderr == ""
    with nbdlink.connect(Target(socket=str(tmp_path / "socket"))) as nbd:
        assert nbd.pread(512, 0) == image.read_bytes()[:512]
    daemon.end()


def test_a_daemon_is_detached_from_what_it_was_started_from(fork):
    _, daemon = fork("-vv")
    for number in range(3):
        assert daemon.proc(f"fd/{number}").readlink() == Path("/dev/null")
    assert daemon.proc("cwd").readlink() == Path("/")
    assert os.getsid(daemon.pid) == daemon.pid
    daemon.end()


def test_a_daemon_removes_its_socket_and_its_pid_file(fork, tmp_path, pid_file):
    _, daemon = fork()
    daemon.end()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk.img"]


def test_a_daemon_finishes_what_its_clients_have_asked_for(fork, tmp_path, image):
    _, daemon = fork("--once")
    with nbdlink.connect(Target(socket=str(tmp_path / "socket"))) as nbd:
        nbd.pwrite(b"kept", 0)
    daemon.wait()
    assert image.read_bytes()[:4] == b"kept"


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["/nonexistent"], 1, "/nonexistent cannot be opened"),
        (["-p", "70000", "x"], 2, "'70000' is not a port"),
        (["a", "b", "-x", "c"], 2, "for a single storage"),
    ],
)
def test_what_is_wrong_is_said_by_the_parent(words, status, says):
    done = program("serve", "--fork", *words)
    assert done.returncode == status
    assert says in done.stderr.splitlines()[0]
    assert len(done.stderr.splitlines()) <= 2


def test_a_daemon_that_is_killed_as_it_starts_is_missed():
    code = (
        "import os, signal; from nbdlink.cli import main, serve\n"
        "serve.planned_exports = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "raise SystemExit(main.main(['serve', '--fork', 'x']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "nbdlink: the server was killed by SIGKILL as it started\n"


def test_a_daemons_log_goes_to_the_system_log(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslog:
        syslog.bind(str(tmp_path / "log"))
        syslog.settimeout(20)
        root = logging.getLogger()
        before = root.handlers[:]
        try:
            log_to_syslog(str(tmp_path / "log"))
            logging.getLogger("nbdlink.server").warning("trouble")
            assert syslog.recv(1000) == b"<28>nbdlink[%d]: trouble\0" % os.getpid()
        finally:
            for handler in set(root.handlers) - set(before):
                handler.close()
            root.handlers[:] = before


# The pid file.


def test_the_pid_file_tells_the_process_while_it_serves(image, tmp_path, pid_file):
    with serving("-f", "raw", "--pid-file", pid_file, "-k", tmp_path / "socket", image) as (
        process,
        _,
    ):
        assert pid_file.read_text() == f"{process.pid}\n"
        assert stat.S_IMODE(pid_file.stat().st_mode) == 0o644
        assert end(process) == (0, "")
    assert not pid_file.exists()


def test_a_second_server_with_the_same_pid_file_is_refused(image, tmp_path, pid_file):
    with serving("-f", "raw", "--pid-file", pid_file, "-k", tmp_path / "socket", image) as (
        process,
        _,
    ):
        again = program("serve", "--pid-file", pid_file, "-k", tmp_path / "other", image)
        assert again.returncode == 1
        assert again.stderr.startswith(f"nbdlink: {pid_file} belongs to process {process.pid}\n")
        assert pid_file.read_text() == f"{process.pid}\n"
        assert not (tmp_path / "other").exists()


def test_what_a_killed_server_left_is_replaced(image, tmp_path, pid_file):
    with serving("--pid-file", pid_file, "-k", tmp_path / "socket", image) as (first, _):
        first.kill()
        first.wait()
    assert pid_file.read_text() == f"{first.pid}\n"
    with serving("--pid-file", pid_file, "-k", tmp_path / "socket", image) as (second, _):
        assert pid_file.read_text() == f"{second.pid}\n"


def test_a_server_that_does_not_start_leaves_no_pid_file(pid_file):
    assert program("serve", "--pid-file", pid_file, "/nonexistent").returncode == 1
    assert not pid_file.exists()


@pytest.mark.parametrize("content", [b"root:x:0:0\n", b"\0" * 4096, b"12 34\n"])
def test_a_file_that_is_something_else_is_not_overwritten(pid_file, content):
    pid_file.write_bytes(content)
    with pytest.raises(DaemonError, match="exists and is not a pid file"):
        PidFile(pid_file)
    assert pid_file.read_bytes() == content


@pytest.mark.parametrize("kind", ["directory", "pipe", "symlink", "socket", "device"])
def test_what_is_no_file_is_not_replaced(pid_file, kind):
    with socket.socket(socket.AF_UNIX) as sock:
        match kind:
            case "directory":
                pid_file.mkdir()
            case "pipe":
                os.mkfifo(pid_file)
            case "symlink":
                pid_file.symlink_to("elsewhere")
            case "socket":
                sock.bind(str(pid_file))
            case "device":
                pid_file = Path("/dev/null")
        with pytest.raises(DaemonError, match="exists and is not a pid file"):
            PidFile(pid_file)


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(DaemonError, match=r"there is no directory .*missing"):
        PidFile(tmp_path / "missing" / "pid")


def test_the_slower_of_two_that_start_at_once_is_refused(pid_file):
    one, two = PidFile(pid_file), PidFile(pid_file)  # both have seen that it is free
    one.publish()
    with pytest.raises(DaemonError, match=f"belongs to process {os.getpid()}"):
        two.publish()
    two.remove()
    assert pid_file.read_text() == f"{os.getpid()}\n"
    one.remove()
    assert list(pid_file.parent.iterdir()) == []


def test_a_pid_file_that_is_somebody_elses_by_now_is_left(pid_file):
    ours = PidFile(pid_file)
    ours.publish()
    pid_file.unlink()
    pid_file.write_text("1\n")
    ours.remove()
    assert pid_file.read_text() == "1\n"


def test_a_file_that_a_server_is_about_to_replace_is_not_taken(pid_file):
    pid_file.touch()
    with pid_file.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DaemonError, match="belongs to a server that starts just now"):
            PidFile(pid_file)
