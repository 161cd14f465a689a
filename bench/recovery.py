"""From a server that is back to a device that answers: how long it takes.

Needs root and a kernel with nbd: `make bench-recovery` runs it in a virtual machine. A device is
attached to `nbdlink serve` or nbdkit over TCP, a supervisor looks after it, and the server is
killed. Some time later it is started again. What counts is the time from the moment at which it
greets a client to the answer of a request that a program made meanwhile. A request
that was on its way when the server was killed is timed from then to its answer, as is what
`nbdlink reconnect` does to a device that is well. nbd-client -persist is tried beside it.

    python -m bench.recovery [--rounds N] [--output FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import math
import mmap
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench.attach import DEVICE, command, quietly

PORT, NOTICE_PORT = 10809, 10819
SIZE = 64 << 20
TIMEOUT = 2
CALM = 1.3
"""Seconds between two rounds; a connection that lasted less does not count as a success."""
PATIENCE = 90.0
OUTAGES = {0.2: 1.0, 1.0: 1.0, 5.0: 0.5, 15.0: 0.2}
"""Seconds that the server is away, and the share of the rounds that are made so."""
PERSIST_PATIENCE = 15.0


@dataclass
class Server:
    """A server of one file on one port.

    Attributes:
        words: its command line.
    """

    words: list[str]
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def start(self) -> None:
        """Start it, without waiting."""
        self.process = subprocess.Popen(
            self.words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )

    def greet(self) -> float:
        """Wait until it greets; give the moment. Some listen long before they can."""
        end = time.monotonic() + PATIENCE
        while not _listens():
            if time.monotonic() > end:
                sys.exit(f"{self.words[0]} does not listen")
            time.sleep(0.0005)
        with socket.create_connection(("127.0.0.1", PORT), PATIENCE) as probe:
            probe.recv(8)
            return time.monotonic()

    def freeze(self) -> None:
        """Have it read nothing any more."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGSTOP)

    def kill(self) -> None:
        """End it as a crash does."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def _listens() -> bool:
    mark = f"0100007F:{PORT:04X} 00000000:0000 0A"
    return mark in Path("/proc/net/tcp").read_text()


def read_block(fd: int) -> float:
    """Read a block past the page cache; give the moment at which it was there."""
    with mmap.mmap(-1, 4096) as buffer:
        os.preadv(fd, [buffer], 4096 * random.randrange(SIZE // 4096))
    return time.monotonic()


class Reading:
    """A read in a thread of its own, as it may have to wait."""

    def __init__(self, fd: int) -> None:
        self._ended: list[float] = []
        self._thread = threading.Thread(target=lambda: self._ended.append(read_block(fd)))
        self._thread.start()

    def ended(self) -> float:
        """Wait for it; give the moment at which it ended."""
        self._thread.join(PATIENCE)
        if not self._ended:
            print("a read did not come back", file=sys.stderr)
            os._exit(1)
        return self._ended[0]


def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            sys.exit("what was waited for never happened")
        time.sleep(0.002)


@contextlib.contextmanager
def supervised(server: Server, *, notice: bool, folder: Path) -> Iterator[int]:
    """Have a device attached and looked after; give its descriptor."""
    nbdlink = command("nbdlink")
    server.start()
    server.greet()
    words = [nbdlink, "attach", f"127.0.0.1:{PORT}", DEVICE]
    words += ["--timeout", str(TIMEOUT), "--dead-timeout", "600"]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    log = folder / "supervisor.log"
    with log.open("w") as sink:
        supervisor = subprocess.Popen(
            [nbdlink, "supervise", "--notice-port", str(NOTICE_PORT if notice else 0)], stderr=sink
        )
    fd = os.open(DEVICE, os.O_RDONLY | os.O_DIRECT)
    try:
        _until(lambda: "ready" in log.read_text())
        # With its first renewal it tells the server where it listens.
        server.kill()
        server.start()
        read_block(fd)
        time.sleep(CALM)
        yield fd
    finally:
        os.close(fd)
        supervisor.terminate()
        supervisor.wait()
        quietly([nbdlink, "detach", "--force", DEVICE])
        server.kill()


def recoveries(server: Server, fd: int, outage: float, rounds: int) -> list[float]:
    """Give the seconds from a server that greets to the answer of a request."""
    found = []
    for _ in range(rounds):
        server.kill()
        killed = time.monotonic()
        # Nothing is on its way now, so this one waits for a connection and for nothing else.
        time.sleep(min(0.1, outage / 2))
        reading = Reading(fd)
        time.sleep(max(0.0, outage - (time.monotonic() - killed)))
        server.start()
        greets = server.greet()
        found.append(max(0.0, reading.ended() - greets))
        time.sleep(CALM)
    return found


def stalls(server: Server, fd: int, rounds: int) -> list[float]:
    """Give the seconds that a request took whose server was killed with it."""
    found = []
    for _ in range(rounds):
        server.freeze()
        begun = time.monotonic()
        reading = Reading(fd)
        time.sleep(0.2)
        server.kill()
        server.start()
        found.append(reading.ended() - begun)
        time.sleep(CALM)
    return found


def moves(fd: int, rounds: int) -> tuple[list[float], list[float]]:
    """Give the seconds that `nbdlink reconnect` takes, and the longest pause of a reader."""
    commands, pauses = [], []
    for _ in range(rounds):
        stopping = threading.Event()
        longest = [0.0]

        def read(stopping: threading.Event = stopping, longest: list[float] = longest) -> None:
            last = time.monotonic()
            while not stopping.is_set():
                now = read_block(fd)
                longest[0] = max(longest[0], now - last)
                time.sleep(0.005)  # the command needs a processor, too
                last = time.monotonic()

        reader = threading.Thread(target=read)
        reader.start()
        begun = time.monotonic()
        try:
            subprocess.run(
                [command("nbdlink"), "reconnect", DEVICE], check=True, stdout=subprocess.DEVNULL
            )
        finally:
            stopping.set()
            reader.join()
        commands.append(time.monotonic() - begun)
        pauses.append(longest[0])
        time.sleep(CALM)
    return commands, pauses


def persist(server: Server, *options: str) -> str:
    """Say what nbd-client -persist does when its server comes back."""
    nbd_client = command("nbd-client")
    server.start()
    server.greet()
    words = [nbd_client, "127.0.0.1", str(PORT), DEVICE, "-persist", "-timeout", str(TIMEOUT)]
    quiet = subprocess.DEVNULL
    subprocess.run([*words, *options], check=True, stdout=quiet, stderr=quiet)
    fd = os.open(DEVICE, os.O_RDONLY | os.O_DIRECT)
    try:
        read_block(fd)
        server.kill()
        time.sleep(1.0)
        server.start()
        greets = server.greet()
        while time.monotonic() < greets + PERSIST_PATIENCE:
            try:
                return f"{(read_block(fd) - greets) * 1000:.0f} ms, after failed requests"
            except OSError:
                time.sleep(0.05)
        return f"never: every request fails, also {PERSIST_PATIENCE:g} s after the return"
    finally:
        os.close(fd)
        server.kill()
        subprocess.run([nbd_client, "-d", DEVICE], stdout=quiet, stderr=quiet, check=False)
        _until(lambda: not Path(f"/sys/block/{Path(DEVICE).name}/pid").exists())


def row(name: str, times: list[float]) -> str:
    """Lay out milliseconds as a row: how many, median, 95th percentile, longest."""
    ordered = sorted(times)
    high = ordered[min(len(ordered) - 1, math.ceil(0.95 * len(ordered)) - 1)]
    numbers = (statistics.median(ordered), high, ordered[-1])
    return f"| {name} | {len(ordered)} | " + " | ".join(f"{n * 1000:.0f}" for n in numbers) + " |"


def main() -> None:
    """Measure, print the page, and write it."""
    parser = argparse.ArgumentParser(prog="python -m bench.recovery")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, help="where the page is to be written")
    options = parser.parse_args()
    rounds: int = options.rounds
    few = max(2, rounds // 5)
    table = ["| | rounds | median | 95 % | longest |", "| --- | --- | --- | --- | --- |"]
    others = list(table)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        image = folder / "disk.img"
        image.touch()
        os.truncate(image, SIZE)
        serve = [command("nbdlink"), "serve", "-b", "127.0.0.1", "-p", str(PORT)]
        told = [*serve, "--remember-clients", str(folder / "clients"), str(image)]
        nbdkit = Server(
            [command("nbdkit"), "-f", "-p", str(PORT), "-i", "127.0.0.1", "file", str(image)]
        )
        contestants = {
            "nbdkit": (nbdkit, False),
            "nbdlink serve": (Server([*serve, str(image)]), False),
            "nbdlink serve --remember-clients": (Server(told), True),
        }
        for title, (server, notice) in contestants.items():
            with supervised(server, notice=notice, folder=folder) as fd:
                for outage, share in OUTAGES.items():
                    times = recoveries(server, fd, outage, max(2, round(rounds * share)))
                    table.append(row(f"{title}, away for {outage:g} s", times))
                    print(table[-1], flush=True)
                if not notice:
                    others.append(row(f"{title}: on its way", stalls(server, fd, few)))
                    print(others[-1], flush=True)
                    try:
                        commands, pauses = moves(fd, few)
                    except subprocess.CalledProcessError:
                        continue  # a kernel without CONFIG_INET_DIAG_DESTROY
                    others.append(row(f"{title}: `nbdlink reconnect`", commands))
                    others.append(row(f"{title}: longest pause of a reader meanwhile", pauses))
                    print("\n".join(others[-2:]), flush=True)
        persisted = [
            f"| `-persist` (netlink) | {persist(nbdkit)} |",
            f"| `-persist -nonetlink` | {persist(nbdkit, '-nonetlink')} |",
        ]
        print("\n".join(persisted), flush=True)
    if options.output:
        options.output.write_text(page(table, others, persisted))


def page(table: list[str], others: list[str], persisted: list[str]) -> str:
    """Put the page together."""
    machine = f"{os.cpu_count()} processors, Linux {os.uname().release}"
    how = os.environ.get("NBDLINK_MACHINE", "as it is")
    return "\n".join(
        [
            HEAD,
            f"Machine: {machine}, {how}. All numbers are milliseconds.",
            "",
            "## New requests",
            "",
            "From the greeting of the server, which has been started again, to the answer.",
            "",
            *table,
            "",
            "## Requests on their way, and moves",
            "",
            f"The device has `--timeout {TIMEOUT}`. A request that was on its way when its server "
            "was killed is sent again",
            "when its time is up; the block layer looks at that once a second or so.",
            "",
            *others,
            "",
            "## nbd-client -persist, with nbdkit, away for 1 s",
            "",
            "| | from the greeting of the server to the first answer |",
            "| --- | --- |",
            *persisted,
            "",
        ]
    )


HEAD = """\
# From a server that is back to a device that answers

`make bench-recovery` writes this page, in a virtual machine. The server of an attached device is
killed and started again; `nbdlink supervise` looks after the device. While the server is away a
supervisor tries twenty times a second for five seconds, then once a second; one that the
server tells of its return (`serve --remember-clients`) tries at once.
"""


if __name__ == "__main__":
    main()
