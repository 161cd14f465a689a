"""How long a slow request holds up the others of its connection.

The storage is slow in one block of sixteen, and in flushes. Two such storages: one that a server
knows as its own kind (a plugin for nbdkit, a class for nbdlink), and a file that every server
serves as it serves any file, on a file system that is slow, as on a bad disk.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench import wire
from bench.contestants import OURS, ROOT, Contestant, Post, compiled
from bench.processes import Server, launch

DELAY = 0.05
EVERY = 16
DEPTH = 16
_WORDS = [f"{DELAY * 1000:.0f}", str(EVERY)]
# Far apart, and not from the start, so that no file system reads ahead into slow blocks.
_STRIDE = 4 * EVERY * wire.BLOCK
_SLOW = [(wire.READ, number * _STRIDE) for number in range(1, DEPTH + 1)]
_QUICK = [(wire.READ, offset + EVERY // 2 * wire.BLOCK) for _, offset in _SLOW[1:]]

SCENARIOS: dict[str, tuple[str, list[tuple[int, int]]]] = {
    "all-slow": (f"{DEPTH} slow reads at once, until all are answered", _SLOW),
    "slow-read": (f"{DEPTH - 1} quick reads behind a slow one", [_SLOW[0], *_QUICK]),
    "slow-flush": (f"{DEPTH - 1} quick reads behind a slow flush", [(wire.FLUSH, 0), *_QUICK]),
}
NAMES = [f"latency/{kind}/{scenario}" for kind in ("storage", "file") for scenario in SCENARIOS]
_TIMES = {"all-slow": 3, "slow-read": 12, "slow-flush": 12}


@dataclass
class Latency:
    """What one scenario gave.

    Attributes:
        name: the scenario's, and the kind of storage.
        words: what is measured.
        seconds: by server: for "all-slow" the time of each repetition until all was answered,
            else the time until each quick read was answered.
        failed: by server: why it could not be measured.
    """

    name: str
    words: str
    seconds: dict[str, list[float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def median(self, server: str) -> float:
        return statistics.median(self.seconds[server])

    def p99(self, server: str) -> float:
        times = sorted(self.seconds[server])
        return times[min(len(times) - 1, len(times) * 99 // 100)]


def _nbdkit(name: str, options: Sequence[str], folder: Path) -> Server:
    socket = folder / f"slow-storage-{name.replace(' ', '')}.sock"
    plugin = compiled("slow_plugin.so", ROOT / "build" / "bench")
    command = ["nbdkit", "-f", *options, "-U", str(socket), str(plugin)]
    command += [f"milliseconds={_WORDS[0]}", f"every={_WORDS[1]}"]
    uri = f"nbd+unix:///?socket={socket}"
    return launch(name, command, uri, str(socket), cwd=folder, log=socket.with_suffix(".log"))


def _ours(folder: Path) -> Server:
    socket = folder / "slow-storage-nbdlink.sock"
    command = [sys.executable, "-m", "bench.slow", str(socket), *_WORDS]
    uri = f"nbd+unix:///?socket={socket}"
    return launch(OURS, command, uri, str(socket), cwd=ROOT, log=socket.with_suffix(".log"))


@contextlib.contextmanager
def slow_file(folder: Path) -> Iterator[Path]:
    """Mount a slow file for the duration of a `with` block.

    Raises:
        RuntimeError: it cannot be mounted here, as that takes root and FUSE.
    """
    path = Path(tempfile.mkdtemp(prefix="slow-", dir=folder)) / "image"
    path.touch()
    program = compiled("slowfs", ROOT / "build" / "bench")
    log = path.with_name("log")
    with log.open("wb") as output:
        mount = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", "--", str(program), str(path), *_WORDS],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + 10
        while not os.path.ismount(path):
            if mount.poll() is not None or time.monotonic() > end:
                raise RuntimeError(log.read_text().strip() or "it does not mount")
            time.sleep(0.01)
        yield path
    finally:
        mount.terminate()  # which unmounts
        try:
            mount.wait(10)
        except subprocess.TimeoutExpired:
            mount.kill()
            mount.wait()


def _probe(server: Server, scenario: str, result: Latency, image: Path | None) -> None:
    """Measure a scenario on one server, on a file with nothing of it in the page cache."""
    requests = SCENARIOS[scenario][1]
    with wire.connected(server) as sock:
        # The first time, threads and buffers are made.
        wire.at_once(sock, _QUICK)
        times: list[float] = []
        for _ in range(_TIMES[scenario]):
            if image is not None:
                _forget(image)
            answered = wire.at_once(sock, requests)
            times += [max(answered)] if scenario == "all-slow" else answered[1:]
        result.seconds[server.name] = times


def _forget(image: Path) -> None:
    """Empty the page cache of a file."""
    descriptor = os.open(image, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def measure(
    contestants: Sequence[Contestant], folder: Path, wanted: Callable[[str], bool]
) -> Iterator[Latency]:
    """Measure every wanted scenario with both storages; yield each as it is done.

    The scenarios are run one after the other on each server: what they show are factors.
    """
    own: dict[str, Callable[[], Server]] = {
        OURS: lambda: _ours(folder),
        "nbdkit": lambda: _nbdkit("nbdkit", [], folder),
        "nbdkit -t 1": lambda: _nbdkit("nbdkit -t 1", ["-t", "1"], folder),
    }
    names = [contestant.name for contestant in contestants]
    yield from _measure({n: own[n] for n in names if n in own}, "storage", wanted, None)
    if not any(wanted(f"latency/file/{scenario}") for scenario in SCENARIOS):
        return
    try:
        with slow_file(folder) as image:
            starts = {
                contestant.name: _start_on(contestant, image, folder) for contestant in contestants
            }
            yield from _measure(starts, "file", wanted, image)
    except RuntimeError as error:
        print(f"  no slow file: {error}", file=sys.stderr)


def _start_on(contestant: Contestant, image: Path, folder: Path) -> Callable[[], Server]:
    socket = folder / f"slow-file-{contestant.name.replace(' ', '')}.sock"
    return lambda: contestant.start(Post(image, "unix", folder, str(socket)))


def _measure(
    starts: dict[str, Callable[[], Server]],
    kind: str,
    wanted: Callable[[str], bool],
    image: Path | None,
) -> Iterator[Latency]:
    results = {
        scenario: Latency(f"latency/{kind}/{scenario}", words)
        for scenario, (words, _) in SCENARIOS.items()
        if wanted(f"latency/{kind}/{scenario}")
    }
    for name, start in starts.items() if results else ():
        try:
            server = start()
        except (RuntimeError, OSError) as error:
            for result in results.values():
                result.failed[name] = str(error)
            continue
        try:
            for scenario, result in results.items():
                try:
                    _probe(server, scenario, result, image)
                except OSError as error:
                    result.failed[name] = str(error)
        finally:
            server.stop()
    yield from results.values()
