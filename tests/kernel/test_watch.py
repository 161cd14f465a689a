"""`nbdlink watch` on real devices: what happens to them is told, and what they do is right."""

from __future__ import annotations

import json
import mmap
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nbdlink import kernel
from nbdlink.kernel import statistics

from .conftest import PATIENCE, SIZE
from .peer import MULTI_CONN

pytestmark = pytest.mark.kernel

_COMMAND = [sys.executable, "-m", "nbdlink", "watch"]


class Watch:
    """A running `nbdlink watch --json`."""

    def __init__(self, *arguments):
        self.seen = []
        self._unread = b""
        self.process = subprocess.Popen(
            [*_COMMAND, "--json", *arguments], stdout=subprocess.PIPE, bufsize=0
        )

    def until(self, **wanted):
        """Read until an object has these values; give it."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            line, newline, rest = self._unread.partition(b"\n")
            if not newline:
                if select.select([self.process.stdout], [], [], 1)[0]:
                    more = self.process.stdout.read(65536)
                    assert more, f"it ended without {wanted}, after {self.seen}"
                    self._unread += more
                continue
            self._unread = rest
            found = json.loads(line)
            self.seen.append(found)
            if all(found.get(key) == value for key, value in wanted.items()):
                return found
        pytest.fail(f"{wanted} was not told, but {self.seen}")

    def close(self):
        self.process.terminate()
        self.process.stdout.close()
        assert self.process.wait(PATIENCE) == 0


@pytest.fixture
def watch():
    running = []

    def start(*arguments):
        running.append(Watch("--interval", "0.5", *arguments))
        return running[-1]

    yield start
    for each in running:
        each.close()


def test_a_device_that_is_there_is_told_at_once(attach, watch):
    attach(index=1, identifier="there")
    link = watch().until(type="link")
    assert (link["device"], link["state"], link["size"]) == ("/dev/nbd1", "attached", SIZE)
    assert (link["connections"]["live"], link["target"]) == (1, "there")


def test_attaching_and_detaching_are_told(attach, watch):
    watching = watch("/dev/nbd2")
    watching.until(state="absent", device="/dev/nbd2")
    attach(index=2)
    watching.until(type="event", event="attached", device="/dev/nbd2")
    watching.until(type="link", device="/dev/nbd2", state="attached")
    kernel.detach(2)
    watching.until(type="event", event="detached", device="/dev/nbd2")


def test_dying_and_renewing_are_told(attach, peer, watch):
    device = attach(connections=2, flags=MULTI_CONN, dead_timeout=600, identifier="x")
    watching = watch()
    watching.until(type="sample")
    peer.kill(0)
    died = watching.until(type="event", event="connection-died")
    assert died["message"] == "a connection died, 1/? up"
    with peer.connect() as sock:
        kernel.reconfigure(device.index, [sock.fileno()])
    renewed = watching.until(type="event", event="connection-renewed")
    assert renewed["message"] == "a connection renewed, 2/? up"
    watching.until(type="sample")
    watching.until(type="sample")
    told = [each["event"] for each in watching.seen if each["type"] == "event"]
    assert told == ["connection-died", "connection-renewed"]


def test_a_server_that_goes_away_is_told_once(attach, peer, watch):
    attach(connections=4, flags=MULTI_CONN, dead_timeout=600)
    watching = watch()
    watching.until(type="sample")
    peer.kill()
    watching.until(type="event", event="state")
    for _ in range(3):
        watching.until(type="sample", state="dead")
    told = [each for each in watching.seen if each["type"] == "event"]
    assert {each["event"] for each in told} == {"connection-died", "state"}
    assert told[-1]["message"] == "dead: no connection is left"


def test_another_size_is_told(attach, peer, watch):
    device = attach()
    watching = watch()
    watching.until(type="sample")
    peer.data.extend(bytes(SIZE))
    kernel.resize(device.index, 2 * SIZE)
    resized = watching.until(type="event", event="resized")
    assert resized["message"] == "resized from 8M to 16M"
    watching.until(type="link", size=2 * SIZE)


def test_a_device_that_hangs_is_told(attach, peer, watch, in_thread):
    device = attach(timeout=600)
    watching = watch()
    watching.until(type="sample")
    peer.answering.clear()
    in_thread(lambda: _read_directly(device.path, 0, 4096))
    stalled = watching.until(type="event", event="state")
    assert stalled["message"].startswith("stalled")
    assert watching.until(type="sample", state="stalled")["in_flight"] == 1
    peer.answering.set()
    watching.until(type="event", event="state", message="in order again")


def test_what_was_read_is_counted(attach):
    device = attach()
    before = statistics.sample(device.index)
    _read_directly(device.path, 0, 1 << 20)
    after = statistics.sample(device.index)
    rates = statistics.rates(before, after)
    assert round(rates.read.bytes_per_second * rates.seconds) == 1 << 20
    assert rates.read.per_second > 0
    assert 0 < rates.read.latency < 60_000
    assert (rates.write.per_second, rates.in_flight) == (0.0, 0)


def test_a_device_that_is_not_there_has_no_counters():
    assert statistics.sample(4711) is None


def test_the_screen_shows_it(attach, peer):
    attach(index=3, dead_timeout=600)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        _COMMAND, stdin=theirs, stdout=theirs, env={**os.environ, "TERM": "xterm"}
    )
    os.close(theirs)
    try:
        seen = _seen(ours, b"nbd3", b"attached")
        peer.kill()
        seen += _seen(ours, b"a connection died", b"no connection is left")
        os.write(ours, b"q")
        seen += _seen(ours, b"\x1b[?1049l")
        assert process.wait(PATIENCE) == 0, seen.decode()
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_nobody_may_watch(attach):
    attach(index=0, identifier="seen")
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *_COMMAND, "--json",
         "--count=1", "--interval=0.2"],
        capture_output=True,
        text=True,
        timeout=PATIENCE * 2,
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(Path(kernel.__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    link, sample = map(json.loads, done.stdout.splitlines())
    assert (link["state"], link["target"], sample["type"]) == ("attached", "seen", "sample")


def _read_directly(path, offset, length):
    """Read past the page cache."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, length) as buffer:
            assert os.preadv(fd, [buffer], offset) == length
    finally:
        os.close(fd)


def _seen(terminal, *wanted):
    """Read from a terminal until all of it was there."""
    seen = b""
    deadline = time.monotonic() + PATIENCE
    while not all(text in seen for text in wanted):
        assert time.monotonic() < deadline, seen.decode(errors="replace")
        if select.select([terminal], [], [], 1)[0]:
            seen += os.read(terminal, 65536)
    return seen
