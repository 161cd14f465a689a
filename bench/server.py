"""`nbdlink serve` beside Debian's servers and a minimal one in C; see `--help`.

Everything runs in turn on this machine: round after round, in each round every server does the
same work. Results are written after each row, so that what was measured survives an end that
comes early.
"""

from __future__ import annotations

import argparse
import contextlib
import filecmp
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NoReturn, TypeVar

from bench import clients, idle, images, latency, machine, pki, report, table
from bench.book import Book
from bench.contestants import (
    CONTESTANTS,
    OURS,
    ROOT,
    Contestant,
    Post,
    another_nbdlink,
    client_versions,
)
from bench.processes import Server, free_port, pin
from bench.results import Result, Sample
from bench.rows import COPIES, MIB, QUICK, QUICK_COPIES, ROWS, CopyRow, Row, matches

T = TypeVar("T")
NEUTRAL = "nbdkit"
"""The server that copying programs are compared with."""
BIG = 4
"""How many times longer files are where programs start, one of which is a Python program."""


@dataclass
class Field:
    """Where it all takes place: folders, files, and the servers that run at the moment."""

    folder: Path
    disk: Path
    size: int
    contestants: list[Contestant]
    undo: contextlib.ExitStack
    processors: list[int] = field(default_factory=lambda: sorted(os.sched_getaffinity(0)))
    _servers: dict[tuple[str, str, str], Server] = field(default_factory=dict)
    _images: dict[str, Path] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @functools.cached_property
    def credentials(self) -> Path:
        return pki.make(self.folder / "pki")

    def image(self, place: str) -> Path:
        """Give the served file: random bytes, of which none can be left out as zeroes."""
        if place not in self._images:
            parent = Path("/dev/shm") if place != "disk" else self.disk
            parent.mkdir(parents=True, exist_ok=True)
            path = Path(tempfile.mkdtemp(prefix="nbdlink-bench-", dir=parent)) / "image"
            self.undo.callback(shutil.rmtree, path.parent, ignore_errors=True)
            images.make_raw(path, self.size * (BIG if place.startswith("big") else 1))
            self._images[place] = path
        return self._images[place]

    def qcow2(self, kind: str, contestant: Contestant) -> Path:
        """Give a server's qcow2 image: each has its own, as whoever serves one keeps it locked."""
        source = self.image("tmpfs")
        path = source.with_name(f"{contestant.name.replace(' ', '')}-{kind}.qcow2")
        if kind == "growing" or not path.exists():
            images.make_qcow2(path, kind, source)
        return path

    def server(self, contestant: Contestant, transport: str, place: str) -> Server | None:
        """Give a running server; it stays up until those of another place are asked for."""
        key = (contestant.name, transport, place)
        # What has grown will not grow again: that server gets a new image.
        if place == "qcow2-growing" or any(other[1:] != key[1:] for other in self._servers):
            self.stop_servers()
        if key not in self._servers and contestant.name not in self.failed:
            try:
                self._servers[key] = contestant.start(self.post(contestant, transport, place))
            except (RuntimeError, OSError) as error:
                self.failed[contestant.name] = str(error).strip()
                print(f"  {contestant.name} does not take part: {error}", file=sys.stderr)
        return self._servers.get(key)

    def post(self, contestant: Contestant, transport: str, place: str) -> Post:
        socket = self.folder / f"{contestant.name.replace(' ', '')}.sock"
        address = str(socket) if transport == "unix" else ("127.0.0.1", free_port())
        credentials = self.credentials if transport == "tls" else None
        if kind := place.partition("qcow2-")[2]:
            image = self.qcow2(kind, contestant)
            return Post(image, transport, self.folder, address, credentials, "qcow2")
        return Post(self.image(place), transport, self.folder, address, credentials)

    def taking_part(self, transport: str, place: str = "tmpfs") -> dict[str, Contestant]:
        return {
            each.name: each
            for each in self.contestants
            if (each.has_tls or transport != "tls")
            and (each.has_qcow2 or not place.startswith("qcow2-"))
        }

    def stop_servers(self) -> None:
        while self._servers:
            self._servers.popitem()[1].stop()
        for path in self.folder.glob("*.sock"):
            path.unlink()


def measure_row(place: Field, row: Row, rounds: int, seconds: float, result: Result) -> None:
    """Let every server do one row's work, in turn."""
    cores = place.processors[-1:] if row.cores == "one" else place.processors

    def once(contestant: Contestant) -> Sample | None:
        server = place.server(contestant, row.transport, row.place)
        if server is None:
            return None
        if row.place == "disk" and row.rw == "write":
            # Else one server's measurement would pay for what another one wrote.
            _settle_disk(place.image("disk"))
        pin(server.pid, cores)
        return clients.fio(row, server, seconds, cores, place.folder)

    in_turn(place.taking_part(row.transport, row.place), rounds, result, once)


def measure_copy(place: Field, row: CopyRow, rounds: int, result: Result) -> None:
    """Let a program copy from or to every server; or let both programs use one server."""

    def with_server(contestant: Contestant) -> Sample | None:
        server = place.server(contestant, row.transport, "tmpfs")
        if server is None:
            return None
        pin(server.pid, place.processors)
        return clients.copy(row, server, place.image("source"), "nbdcopy", ROOT)

    def with_program(program: str) -> Sample | None:
        server = place.server(CONTESTANTS[NEUTRAL], row.transport, "big")
        if server is None:
            return None
        return clients.copy(row, server, place.image("big source"), program, ROOT)

    if row.client == "nbdcopy":
        in_turn(place.taking_part(row.transport), rounds, result, with_server)
    else:
        result.ours = "nbdlink copy"
        in_turn({name: name for name in ("nbdlink copy", "nbdcopy")}, rounds, result, with_program)


def in_turn(
    contestants: Mapping[str, T],
    rounds: int,
    result: Result,
    once: Callable[[T], Sample | None],
) -> None:
    """Measure everyone once per round; who is first changes from round to round."""
    names = list(contestants)
    result.rounds = {name: [None] * rounds for name in names}
    for number in range(rounds):
        shift = number % len(names)
        for name in [*names[shift:], *names[:shift]]:
            with complaining(name):
                result.rounds[name][number] = once(contestants[name])


@contextlib.contextmanager
def complaining(name: str) -> Iterator[None]:
    """Go on without a measurement that failed, but do not keep silent about it."""
    try:
        yield
    except (clients.ClientError, ValueError, KeyError) as error:  # the latter: no sense in its JSON
        print(f"  {name}: {error}", file=sys.stderr)


def verify(place: Field) -> None:
    """Make sure that nbdlink's server stores and gives back what it is sent.

    Raises:
        SystemExit: it does not, so its speed is of no interest.
    """
    server = place.server(CONTESTANTS[OURS], "unix", "tmpfs")
    if server is None:
        return
    image, source = place.image("tmpfs"), place.image("source")
    with image.open("r+b") as file:
        file.truncate(0)
        file.truncate(source.stat().st_size)
    back = place.folder / "back"
    for ends in ([str(source), server.uri], [server.uri, str(back)]):
        if subprocess.run(["nbdcopy", "--connections=4", *ends], timeout=120).returncode:
            sys.exit("nbdcopy through nbdlink fails")
    if not filecmp.cmp(source, image, shallow=False) or not filecmp.cmp(source, back, False):
        sys.exit("nbdcopy through nbdlink changes the data")
    back.unlink()


def _settle_disk(image: Path) -> None:
    descriptor = os.open(image, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.server", description=__doc__.partition(";")[0].replace("`", "")
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a few rows in a few rounds: about four minutes")
    add("--only", metavar="PATTERN", nargs="+", default=[], help="rows whose name has or matches")
    add("--list", action="store_true", help="list the rows and the servers")
    add("--rounds", metavar="N", type=int, help="how often each server is measured (5; quick: 3)")
    add("--seconds", metavar="S", type=float, default=0.5, help="of load for a measurement (0.5)")
    add("--peers", metavar="NAME", nargs="+", default=[], help="only these besides nbdlink")
    add("--against", metavar="DIR", type=Path, help="another checkout of nbdlink, to compare")
    add("--size", metavar="MIB", type=int, default=256, help="of the served files (256)")
    add("--disk", metavar="DIR", type=Path, default=ROOT / "build", help="on a disk (build/)")
    add("--output", metavar="DIR", type=Path, help="write table, numbers and plots there")
    return parser.parse_args(words)


def choose(arguments: argparse.Namespace) -> list[Contestant]:
    wanted = [CONTESTANTS[OURS]]
    if arguments.against:
        wanted.append(another_nbdlink(arguments.against.resolve()))
    for name, contestant in CONTESTANTS.items():
        if name == OURS or (arguments.peers and not matches(name, arguments.peers)):
            continue
        if contestant.is_there:
            wanted.append(contestant)
        else:
            print(f"no {contestant.program} here: {name} does not take part", file=sys.stderr)
    return wanted


def main() -> int:
    arguments = parse()
    wanted = functools.partial(matches, patterns=arguments.only)
    rows = [row for row in (QUICK if arguments.quick else ROWS) if wanted(row.name)]
    copies = [row for row in (QUICK_COPIES if arguments.quick else COPIES) if wanted(row.name)]
    if any(row.client == "copy" for row in copies) and not clients.can_copy(ROOT):
        copies = [row for row in copies if row.client != "copy"]
    if not shutil.which("qemu-img"):
        print("no qemu-img here: there are no rows with images", file=sys.stderr)
        rows = [row for row in rows if not row.place.startswith("qcow2-")]
    contestants = choose(arguments)
    names = [contestant.name for contestant in contestants]
    if arguments.list:
        others = filter(wanted, [*latency.NAMES, "idle"])
        print(*(r.name for r in rows), *(r.name for r in copies), *others, sep="\n")
        print("servers:", ", ".join(names))
        return 0
    signal.signal(signal.SIGTERM, _ended)
    rounds = arguments.rounds or (3 if arguments.quick else 5)
    arguments.disk.mkdir(parents=True, exist_ok=True)
    book = Book(
        date=time.strftime("%Y-%m-%d"),
        machine=machine.describe(arguments.disk),
        servers={contestant.name: contestant.describe() for contestant in contestants},
        clients=client_versions(),
        rounds=rounds,
        seconds=arguments.seconds,
        size=arguments.size * MIB,
        output=arguments.output,
    )
    start = time.monotonic()
    try:
        with contextlib.ExitStack() as undo:
            folder = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="nbdlink-bench-")))
            place = Field(folder, arguments.disk, arguments.size * MIB, contestants, undo)
            undo.callback(place.stop_servers)
            print(table.heading(names))
            for row in rows:
                result = Result(row.name, row.block, row.depth, row.transport)
                with noting(book, result):
                    measure_row(place, row, rounds, arguments.seconds, result)
            if any(row.client == "nbdcopy" for row in copies):
                verify(place)
            for copy in copies:
                result = Result(copy.name, 0, 0, copy.transport, goals=copy.client == "nbdcopy")
                with noting(book, result):
                    measure_copy(place, copy, rounds, result)
            place.stop_servers()
            for one in latency.measure(contestants, folder, wanted):
                print(table.latency_line(one, names), flush=True)
                book.latency.append(one)
                book.save()
            if wanted("idle"):
                servers = [place.server(each, "unix", "tmpfs") for each in contestants]
                book.idle = idle.measure([server for server in servers if server])
                print(table.idle_line(book.idle, names))
                book.save()
    except KeyboardInterrupt:
        print("interrupted; what was measured is kept", file=sys.stderr)
        return 130
    finally:
        print(f"took {time.monotonic() - start:.0f} s", file=sys.stderr)
        if book.output is not None and (book.results or book.latency or book.idle):
            report.write(book)
    return 0


@contextlib.contextmanager
def noting(book: Book, result: Result) -> Iterator[None]:
    """Keep what was measured, even if it ends before all of it was."""
    try:
        yield
    finally:
        if any(any(samples) for samples in result.rounds.values()):
            print(table.line(result), flush=True)
            book.results.append(result)
            book.save()


def _ended(number: int, _: FrameType | None) -> NoReturn:
    # As an exception, so that servers are ended and files removed.
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
