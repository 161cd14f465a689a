"""What the kernel accounts to a server, and how servers are started, pinned and ended.

A server is a tree of processes: some fork per connection, so the processor time of a server is
the sum over its tree, and of the children that have ended. The clock of a process counts
nanoseconds and keeps what its ended threads have used; the time of ended children is only
known in ticks of 10 ms, which is exact enough for a measurement of a second.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")
_CPUCLOCK_SCHED = 2
"""Low bits of the id of a process's clock (include/linux/posix-timers_types.h)."""

START_SECONDS = 60.0
"""nbd-server looks for a large prime number before it accepts anybody."""


def _stat(pid: int) -> list[str]:
    # The name, in brackets, may hold spaces: what follows its end is plain words, from field 3.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def tree(root: int) -> list[int]:
    """Give the ids of a process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                children.setdefault(int(_stat(int(entry.name))[1]), []).append(int(entry.name))
    found = [root]
    for pid in found:
        found.extend(children.get(pid, ()))
    return found


def _clock(pid: int) -> float:
    return time.clock_gettime((~pid << 3) | _CPUCLOCK_SCHED)


def cpu_seconds(root: int) -> float:
    """Give what a tree of processes and its ended children have used of processors so far."""
    total = 0.0
    for pid in tree(root):
        with contextlib.suppress(OSError):
            cutime, cstime = _stat(pid)[13:15]
            total += _clock(pid) + (int(cutime) + int(cstime)) / _TICK
    return total


def busy_seconds(processors: Iterable[int]) -> float:
    """Give what some processors have worked so far, for anybody, with what a host took away."""
    names = {f"cpu{number}" for number in processors}
    total = 0.0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *ticks = line.split()
        if name in names:
            user, nice, system, _idle, _wait, irq, softirq, steal = map(int, ticks[:8])
            total += (user + nice + system + irq + softirq + steal) / _TICK
    return total


def memory(root: int) -> int:
    """Give the bytes of memory that a tree of processes takes (PSS: shared pages in shares)."""
    total = 0
    for pid in tree(root):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


def pin(root: int, processors: Iterable[int]) -> None:
    """Keep every thread of a tree on some processors; those started later inherit it."""
    wanted = set(processors)
    for pid in tree(root):
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{pid}/task").iterdir():
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(int(task.name), wanted)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def greets(address: str | tuple[str, int]) -> bool:
    """Tell whether a server greets as NBD does; False if it does not listen yet.

    Listening is not enough: nbd-server listens seconds before it accepts.
    """
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family) as probe:
        probe.settimeout(START_SECONDS)
        try:
            probe.connect(address)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        return probe.recv(8) == b"NBDMAGIC"


@dataclass
class Server:
    """A server that runs, and how to reach and end it."""

    name: str
    uri: str
    address: str | tuple[str, int]
    pid: int
    export: str = ""
    process: subprocess.Popen[bytes] | None = None
    processes: int = field(default=1, init=False)
    """How many processes it is while nobody is connected."""

    def settle(self) -> None:
        """Wait until the processes of connections that have ended are gone and accounted for."""
        end = time.monotonic() + 2
        while len(tree(self.pid)) > self.processes and time.monotonic() < end:
            time.sleep(0.005)

    def stop(self) -> None:
        pids = tree(self.pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)
        end = time.monotonic() + 10
        while time.monotonic() < end and any(map(_is_alive, pids)):
            if self.process is not None:
                self.process.poll()
            time.sleep(0.01)
        for pid in filter(_is_alive, pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.process is not None:
            self.process.wait()


def _is_alive(pid: int) -> bool:
    try:
        return _stat(pid)[0] != "Z"
    except OSError:
        return False


def launch(
    name: str,
    command: list[str],
    uri: str,
    address: str | tuple[str, int],
    *,
    cwd: Path,
    log: Path,
    export: str = "",
    pid_file: Path | None = None,
) -> Server:
    """Start a server and wait until it greets.

    Args:
        name: what the results call it.
        command: what to run.
        uri: where clients find it.
        address: the same, for a probe.
        cwd: where to run it.
        log: takes what it says.
        export: the export's name.
        pid_file: where it writes its id, if it leaves the foreground.

    Raises:
        RuntimeError: it ended, or does not greet within a minute.
    """
    # A session of its own, so that Ctrl-C reaches only the benchmark, which then ends it; the
    # kernel ends it if the benchmark is killed.
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", "--", *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=cwd,
            start_new_session=True,
        )
    server = Server(name, uri, address, process.pid, export, process)
    try:
        end = time.monotonic() + START_SECONDS
        if pid_file is not None:
            process.wait(START_SECONDS)
            while not (pid_file.exists() and pid_file.read_text().strip()):
                if process.returncode or time.monotonic() > end:
                    raise RuntimeError(f"{name} does not start: {log.read_text()}")
                time.sleep(0.01)
            server.pid, server.process = int(pid_file.read_text()), None
        while not greets(address):
            if not _is_alive(server.pid) or time.monotonic() > end:
                raise RuntimeError(f"{name} does not listen: {log.read_text()}")
            time.sleep(0.01)
        time.sleep(0.05)  # for the process of the probe's connection to end
        server.processes = 1 if pid_file is not None else len(tree(server.pid))
    except BaseException:
        server.stop()
        raise
    return server
