"""What the verbs print fits on a screen of 80 columns; colours are for terminals that want them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from nbdlink.cli.main import VERBS, build_parser
from nbdlink.server import serve_in_thread

COLUMNS = 80
LONG = "an-export-whose-name-is-rather-long-and-still-what-the-next-command-is-typed-with"

_COLOUR = re.compile(r"\x1b\[[0-9;]*(3[0-8]|9[0-7]|4[0-8])m")
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")

_TABLE = """
from nbdlink.cli import output
columns = ("device", "name", "size", "state", "target", "connections", "TLS", "mounted on")
output.print_table(columns, [
    ("/dev/nbd0", "data", "1T", "attached", "nbds://store1.example.com/data", "4/4", "kernel",
     "/srv/data"),
    ("/dev/nbd12", "backup-of-everything", "64G", "dead",
     "nbd+unix:///data?socket=/run/nbdkit/sockets/backup.sock", "0/1", "none", "/srv/backup/daily"),
])
"""


def on_terminal(*words, **environment):
    """Run Python on a terminal of 80 columns; give what it printed, control sequences and all."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    kept = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, *map(str, words)],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        env={**kept, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8", **environment},
    )
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # EIO: it has closed its side
        while data := os.read(ours, 65536):
            seen += data
    os.close(ours)
    process.wait(100)
    return seen.decode().replace("\r", "")


def plain(seen):
    return _CONTROL.sub("", seen)


def longest(seen):
    return max(map(len, plain(seen).split("\n")))


@pytest.fixture
def server(tmp_path):
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    with serve_in_thread({"data": image, LONG: image}) as service:
        yield service


@pytest.mark.parametrize(
    "words", [["info"], ["map"], ["map", "--extents"], ["doctor"]], ids=" ".join
)
def test_what_is_said_of_an_export_fits(server, words):
    seen = on_terminal("-m", "nbdlink", *words, server.uri("data"))
    assert "data" in seen
    assert longest(seen) <= COLUMNS


def test_what_is_said_of_a_wrong_name_fits(server):
    seen = on_terminal("-m", "nbdlink", "doctor", server.uri(LONG[:-3]))
    assert "did you mean" in seen
    assert longest(seen) <= COLUMNS + len(LONG)  # a name is not torn apart


def test_what_is_said_of_this_machine_fits():
    seen = on_terminal("-m", "nbdlink", "doctor")
    assert "kernel module" in seen
    assert longest(seen) <= COLUMNS


def test_a_name_that_is_too_long_loses_no_column(server):
    lines = plain(on_terminal("-m", "nbdlink", "exports", server.uri())).split("\n")
    row = lines.index(LONG)
    assert lines[row + 1].split() == ["1M", "read-write", "several", "-"]
    assert max(len(line) for line in lines if line != LONG) <= COLUMNS


def test_a_table_that_is_too_wide_loses_nothing():
    seen = on_terminal("-c", _TABLE)
    assert longest(seen) <= COLUMNS
    lines = plain(seen).split("\n")
    assert lines[0].split() == ["DEVICE", "SIZE", "STATE", "CONNECTIONS", "TLS"]
    assert lines[1].split() == ["/dev/nbd0", "1T", "attached", "4/4", "kernel"]
    assert lines[2:5] == [
        "    name: data",
        "    target: nbds://store1.example.com/data",
        "    mounted on: /srv/data",
    ]


@pytest.mark.parametrize("verb", [*VERBS, None])
def test_the_help_fits(verb, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    parser = build_parser()
    if verb:
        parser = next(each for each in parser._actions if each.dest == "verb").choices[verb]
    assert longest(parser.format_help()) <= COLUMNS


@pytest.mark.parametrize("words", [["map"], ["doctor"]], ids=" ".join)
def test_colours_are_there_on_a_terminal_unless_they_are_not_wanted(server, words):
    command = ["-m", "nbdlink", *words, server.uri("data")]
    assert _COLOUR.search(on_terminal(*command))
    assert not _COLOUR.search(on_terminal(*command, NO_COLOR="1"))


@pytest.mark.parametrize("words", [["exports"], ["info"], ["map"], ["doctor"]], ids=" ".join)
def test_a_pipe_gets_neither_colours_nor_folded_lines(server, words):
    command = [sys.executable, "-m", "nbdlink", *words, server.uri("data")]
    environment = {**os.environ, "COLUMNS": "20", "FORCE_COLOR": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0
    assert "\x1b" not in done.stdout + done.stderr


def test_a_table_in_a_pipe_is_not_folded():
    environment = {**os.environ, "COLUMNS": "40"}
    command = [sys.executable, "-c", _TABLE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    assert len(done.stdout.splitlines()) == 3
