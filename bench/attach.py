"""Time from typing the command to a usable device: `nbdlink attach` beside `nbd-client`.

Needs root and a kernel with nbd: `make bench-attach` runs it in the virtual machine. Both bind
the same export of the same server over TCP, in turn, so that a machine that gets slower is
slower for both. What counts is the whole command, from its start to its end, after which the
node can be read; reading a block from it is part of the time. Prints medians and the ratio.
"""

from __future__ import annotations

import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DEVICE = "/dev/nbd0"
ROUNDS = 7


def command(name: str) -> str:
    # The guest has nbdlink where this interpreter lives; others are on the PATH.
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else shutil.which(name) or sys.exit(f"no {name}")


def timed(words: list[str]) -> tuple[float, float]:
    """Run a command and read a block of the device; give (seconds, CPU seconds)."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with Path(DEVICE).open("rb", buffering=0) as device:
        assert len(device.read(4096)) == 4096
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def quietly(words: list[str]) -> None:
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    pid = Path(f"/sys/block/{Path(DEVICE).name}/pid")
    end = time.monotonic() + 60
    while pid.exists():
        if time.monotonic() > end:
            sys.exit(f"{DEVICE} does not go away")
        time.sleep(0.01)


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def main() -> None:
    port = 10809
    nbdlink, nbd_client = command("nbdlink"), command("nbd-client")
    interpreter = [sys.executable, "-c", "pass"]
    contestants = {
        "nbdlink attach": (
            [nbdlink, "attach", f"127.0.0.1:{port}", DEVICE],
            [nbdlink, "detach", DEVICE],
        ),
        "nbdlink attach --no-wait": (
            [nbdlink, "attach", "--no-wait", f"127.0.0.1:{port}", DEVICE],
            [nbdlink, "detach", DEVICE],
        ),
        "nbd-client": (
            [nbd_client, "127.0.0.1", str(port), DEVICE],
            [nbd_client, "-d", DEVICE],
        ),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    bare: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "disk.img"
        image.touch()
        with image.open("r+b") as file:
            file.truncate(64 << 20)
        server = subprocess.Popen(["nbdkit", "-f", "-p", str(port), "file", str(image)])
        try:
            end = time.monotonic() + 60
            while not listening(port):
                if time.monotonic() > end:
                    sys.exit("nbdkit does not listen")
                time.sleep(0.02)
            for number in range(ROUNDS + 1):
                for name, (attach, detach) in contestants.items():
                    result = timed(attach)
                    if number:  # the first round warms the caches
                        times[name].append(result)
                    quietly(detach)
                start = time.perf_counter()
                subprocess.run(interpreter, check=True)
                bare.append(time.perf_counter() - start)
        finally:
            server.terminate()
            server.wait()
    report = table(times, statistics.median(bare[1:]))
    print(report)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(f"{HEAD}{report}")


HEAD = """\
# Time to attach

`make bench-attach` writes this page. Each command is timed from its start until a block of the
device has been read; all are run in turn, against the same nbdkit over TCP, in a virtual machine.
"""


def table(times: dict[str, list[tuple[float, float]]], bare: float) -> str:
    """Lay out medians and ratios as a Markdown table."""
    medians = {
        name: tuple(statistics.median(column) for column in zip(*results, strict=True))
        for name, results in times.items()
    }
    base_seconds, base_cpu = medians["nbd-client"]
    machine = f"{os.cpu_count()} processors, Linux {os.uname().release}"
    # Said by tests.vm.boot; no program in the guest can tell emulation from a processor.
    how = os.environ.get("NBDLINK_MACHINE", "as it is")
    lines = [
        "",
        f"Machine: {machine}, {how}; medians of {ROUNDS} rounds.",
        "",
        "| command | seconds | CPU seconds | seconds beside nbd-client | CPU beside nbd-client |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, (seconds, cpu) in medians.items():
        lines.append(
            f"| {name} | {seconds:.3f} | {cpu:.3f} | {seconds / base_seconds:.2f} "
            f"| {cpu / base_cpu:.2f} |"
        )
    lines += [
        "",
        f"A bare Python interpreter takes {bare:.3f} seconds to start and end here; most of the "
        "rest is imports, which emulation makes about twenty times slower than a processor would. "
        "nbd-client neither reads the partition table nor waits for udev, as `--no-wait` does not.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
