"""`nbdlink watch` as a program: it takes the terminal and gives it back, however it ends."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from nbdlink.kernel import sysfs

from .programs import nbdlink

COMMAND = [sys.executable, "-m", "nbdlink", "watch"]
ENTERED, LEFT = b"\x1b[?1049h", b"\x1b[?1049l"
SECONDS = 60

attached = any(sysfs.pid(index) for index in sysfs.indices())
pytestmark = pytest.mark.skipif(attached, reason="nbd devices of this machine are attached")


class Terminal:
    """A terminal with `nbdlink watch` on it, as a shell would have started it."""

    def __init__(self, *words, columns=80, lines=24, **environment):
        self.seen = b""
        self.ours, theirs = pty.openpty()
        self.resize(columns, lines)
        self.before = termios.tcgetattr(self.ours)
        environment = {**os.environ, "TERM": "xterm-256color", **environment}
        environment.pop("COLUMNS", None)
        # A shell that is not told to go away when the terminal's first process does.
        script = "import os, sys; os.setsid(); import fcntl, termios; "
        script += "fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, *COMMAND, *words],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
        )
        os.close(theirs)

    def resize(self, columns, lines):
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def until(self, *wanted):
        """Read until all of it was shown since the last time."""
        seen = b""
        deadline = time.monotonic() + SECONDS
        while not all(text in seen for text in wanted):
            assert time.monotonic() < deadline, f"{wanted} not in {seen}"
            if select.select([self.ours], [], [], 1)[0]:
                try:
                    seen += os.read(self.ours, 65536)
                except OSError:
                    pytest.fail(f"it ended after {seen.decode(errors='replace')}")
        self.seen += seen
        return seen

    def type(self, keys):
        os.write(self.ours, keys)

    def ends(self):
        """Wait for the end; give the status."""
        self.until(LEFT)
        return self.process.wait(SECONDS)

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.ours)


@pytest.fixture
def terminal():
    opened = []

    def start(*words, **options):
        opened.append(Terminal(*words, **options))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


@pytest.mark.parametrize("key", [b"q", b"Q", b"\x03"], ids=["q", "Q", "Ctrl-C"])
def test_a_key_ends_it(terminal, key):
    screen = terminal()
    screen.until(ENTERED, b"nothing is attached", b"quits")
    screen.type(key)
    assert screen.ends() == 0
    assert b"\x1b[?25h" in screen.seen, "the cursor stays hidden"
    assert b"Traceback" not in screen.seen


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it(terminal, number):
    screen = terminal()
    screen.until(b"quits")
    screen.process.send_signal(number)
    assert screen.ends() == 0


def test_the_terminal_is_as_it_was(terminal):
    screen = terminal()
    screen.until(b"quits")
    assert termios.tcgetattr(screen.ours) != screen.before
    screen.type(b"q")
    screen.ends()
    assert termios.tcgetattr(screen.ours) == screen.before


def test_other_keys_do_nothing(terminal):
    screen = terminal()
    screen.until(b"quits")
    screen.type(b"x\x1b[A ")
    screen.type(b"q")
    assert screen.ends() == 0


def test_another_size_is_followed(terminal):
    screen = terminal("nbd4711", lines=24)
    screen.until(b"nbd4711 is not attached", b"\x1b[24;1H")
    screen.resize(100, 40)
    screen.process.send_signal(signal.SIGWINCH)
    screen.until(b"\x1b[2J", b"\x1b[40;1H", b"quits")


def test_it_can_be_stopped_and_goes_on(terminal):
    screen = terminal()
    screen.until(b"quits")
    screen.process.send_signal(signal.SIGTSTP)
    screen.until(LEFT)
    # Without a shell there is nobody to continue it but us; an orphan is not stopped at all.
    screen.process.send_signal(signal.SIGCONT)
    screen.until(ENTERED, b"quits")
    screen.type(b"q")
    assert screen.ends() == 0


def test_a_terminal_that_goes_away_ends_it(terminal):
    screen = terminal()
    screen.until(b"quits")
    os.close(screen.ours)
    screen.ours = os.open(os.devnull, os.O_RDONLY)
    assert screen.process.wait(SECONDS) == 0


def test_it_ends_after_the_last_measurement(terminal):
    screen = terminal("--count", "2", "--interval", "0.1")
    assert screen.ends() == 0


@pytest.mark.parametrize(("environment", "is_red"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_colours_are_left_out_on_request(environment, is_red):
    code = "from nbdlink.cli.output import Screen\n"
    code += "with Screen() as screen: screen.paint([[('dead', 'red')]])"
    ours, theirs = pty.openpty()
    kept = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    kept |= {"TERM": "xterm", **environment}
    subprocess.run([sys.executable, "-c", code], stdout=theirs, env=kept, check=True)
    os.close(theirs)
    seen = os.read(ours, 4096)
    os.close(ours)
    assert b"dead" in seen
    assert (b"\x1b[31m" in seen) == is_red


def test_a_terminal_without_abilities_gets_lines(terminal):
    screen = terminal("nbd4711", "-n", "1", "-i", "0.1", TERM="dumb")
    seen = screen.until(b"nbd4711")
    assert b"\x1b" not in seen
    assert screen.process.wait(SECONDS) == 0


# Without a terminal.


def test_a_pipe_gets_a_table_for_each_measurement():
    done = nbdlink("watch", "-n", "2", "-i", "0.1", "data")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines if line].count("DEVICE") == 2
    assert any(line.split()[:3] == ["data", "-", "absent"] for line in lines)


def test_json_tells_what_is_missing():
    done = nbdlink("watch", "--json", "-n", "1", "-i", "0.1", "data", "nbd4711")
    device, name = map(json.loads, done.stdout.splitlines())
    assert (device["device"], device["name"], device["state"]) == ("/dev/nbd4711", None, "absent")
    assert (name["device"], name["name"], name["state"]) == (None, "data", "absent")


def test_a_reader_that_leaves_ends_it():
    process = subprocess.Popen(
        [*COMMAND, "-i", "0.1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(SECONDS) == 0
    assert process.stderr.read() == b""
    process.stderr.close()


def test_it_does_nothing_while_nothing_happens():
    process = subprocess.Popen([*COMMAND, "-i", "0.2"], stdout=subprocess.PIPE)
    process.stdout.readline()
    before = _cpu(process.pid)
    for _ in range(30):
        process.stdout.readline()
    spent = _cpu(process.pid) - before
    process.terminate()
    process.stdout.close()
    assert process.wait(SECONDS) == 0
    assert spent < 0.5, "in two seconds or more"


def _cpu(pid):
    """Give the seconds of CPU that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-i", "0"], "'0' is not a time in seconds"),
        (["-i", "0.01"], "'0.01' is too short"),
        (["-n", "0"], "'0' is not a number of measurements"),
        (["a b"], "'a b' is neither a device nor a link's name"),
    ],
)
def test_a_wrong_command_line_is_told(words, message):
    done = nbdlink("watch", *words)
    assert done.returncode == 2
    assert message in done.stderr
