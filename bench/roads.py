"""A device's TLS, by road: in the kernel, through nbdlink's relay, through nbd-client's proxy.

Needs root and a kernel with nbd and tls: `make bench-roads` runs it in a virtual machine. All
are attached to the same nbdkit over TCP, in turn, and read and written past the page cache by
fio. The processor time is that of the whole machine, server and load included, as a part of it
is spent in the kernel on nobody's account; a device without TLS is there to tell how much of it
is not for TLS. Prints medians and ratios.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench import pki
from bench.attach import DEVICE, command, listening, quietly

ROUNDS = 3
SECONDS = 4
SIZE_MIB = 128
PLAIN, SECURED = 10809, 10810
WORK = {
    "4 KiB random read, depth 1": ("randread", "4k", 1),
    "4 KiB random read, depth 16": ("randread", "4k", 16),
    "64 KiB random read, depth 16": ("randread", "64k", 16),
    "64 KiB random write, depth 16": ("randwrite", "64k", 16),
    "1 MiB read in sequence, depth 4": ("read", "1m", 4),
    "1 MiB write in sequence, depth 4": ("write", "1m", 4),
}
KERNEL, RELAY, PROXY, NONE = "kernel", "relay", "nbd-client's proxy", "without TLS"


@dataclass(frozen=True)
class Load:
    """What one run of fio came to: bytes per second, and processor seconds per GiB."""

    rate: float
    cost: float


def busy_seconds() -> float:
    """Give the seconds that the processors have worked since the machine started."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    ticks = sum(map(int, fields)) - int(fields[3]) - int(fields[4])  # idle, waiting for disks
    return ticks / os.sysconf("SC_CLK_TCK")


def load(rw: str, block: str, depth: int) -> Load:
    words = ["fio", "--name=road", f"--filename={DEVICE}", "--direct=1", "--ioengine=libaio"]
    words += [f"--rw={rw}", f"--bs={block}", f"--iodepth={depth}", "--time_based"]
    words += [f"--runtime={SECONDS}", "--norandommap", "--output-format=json"]
    before = busy_seconds()
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    spent = busy_seconds() - before
    job = json.loads(done.stdout)["jobs"][0]["read" if "read" in rw else "write"]
    return Load(job["bw_bytes"], spent / (job["io_bytes"] / (1 << 30)))


@contextlib.contextmanager
def nbdkit(image: Path, port: int, *options: str) -> Iterator[None]:
    words = ["nbdkit", "-f", "-i", "127.0.0.1", "-p", str(port), *options, "file", str(image)]
    server = subprocess.Popen(words)
    try:
        end = time.monotonic() + 60
        while not listening(port):
            if time.monotonic() > end:
                sys.exit("nbdkit does not listen")
            time.sleep(0.02)
        yield
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    nbdlink, nbd_client = command("nbdlink"), command("nbd-client")
    results: dict[str, dict[str, list[Load]]] = {work: {} for work in WORK}
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        image, keys = folder / "disk.img", pki.make(folder / "pki")
        image.write_bytes(os.urandom(1 << 20) * SIZE_MIB)
        stack.enter_context(nbdkit(image, PLAIN))
        tls = ("--tls=require", f"--tls-certificates={keys}")
        stack.enter_context(nbdkit(image, SECURED, *tls))

        def attach(road: str) -> Callable[[], object]:
            words = [nbdlink, "attach", f"nbds://localhost:{SECURED}", DEVICE]
            words += ["--tls-certificates", str(keys), "--tls-road", road]
            return lambda: subprocess.run(words, check=True, stdout=subprocess.DEVNULL)

        plain = [nbdlink, "attach", f"127.0.0.1:{PLAIN}", DEVICE]
        proxy = [nbd_client, "localhost", str(SECURED), DEVICE, "-enable-tls"]
        proxy += ["-cacertfile", str(keys / "ca-cert.pem"), "-tlshostname", "localhost"]
        proxy += ["-certfile", str(keys / "client-cert.pem")]
        proxy += ["-keyfile", str(keys / "client-key.pem")]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        roads: dict[str, tuple[Callable[[], object], list[str]]] = {
            KERNEL: (attach("kernel"), [nbdlink, "detach", DEVICE]),
            RELAY: (attach("relay"), [nbdlink, "detach", DEVICE]),
            PROXY: (
                lambda: subprocess.run(proxy, check=True, **quiet),  # type: ignore[call-overload]
                [nbd_client, "-d", DEVICE],
            ),
            NONE: (
                lambda: subprocess.run(plain, check=True, stdout=subprocess.DEVNULL),
                [nbdlink, "detach", DEVICE],
            ),
        }
        for _ in range(ROUNDS):
            for road, (begin, end) in roads.items():
                begin()
                for work, words in WORK.items():
                    results[work].setdefault(road, []).append(load(*words))
                quietly(end)
    report = table(results)
    print(report)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(f"{HEAD}{report}")


HEAD = """\
# A device's TLS, by road

`make bench-roads` writes this page. The same export of the same nbdkit is attached over TCP by
`nbdlink attach --tls-road kernel`, `--tls-road relay`, nbd-client (whose TLS is done by a proxy
process), and without TLS; fio reads and writes past the page cache, in a virtual machine.
Processor time is the whole machine's: kernel, server and fio included.
The ciphers differ: nbdlink prefers ChaCha20-Poly1305 where the kernel is to do TLS, AES-128-GCM for
its relay, and nbd-client what GnuTLS prefers. So the ratios are those of the programs as they come,
under emulation, and not of the roads alone.
"""


def table(results: dict[str, dict[str, list[Load]]]) -> str:
    """Lay out rates and processor time, and both as ratios to nbd-client's, as Markdown."""
    machine = f"{os.cpu_count()} processors, Linux {os.uname().release}"
    how = os.environ.get("NBDLINK_MACHINE", "as it is")
    roads = [KERNEL, RELAY, PROXY, NONE]
    columns = ["work", *roads]
    columns += [f"{road} beside nbd-client: rate, CPU" for road in (KERNEL, RELAY)]
    lines = ["", f"Machine: {machine}, {how}; medians of {ROUNDS} rounds.", ""]
    lines += [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for work, loads in results.items():
        rate = {road: statistics.median(one.rate for one in loads[road]) for road in roads}
        cost = {road: statistics.median(one.cost for one in loads[road]) for road in roads}
        cells = [work]
        cells += [f"{rate[road] / (1 << 20):.1f} MiB/s, {cost[road]:.1f} s/GiB" for road in roads]
        cells += [
            f"{rate[road] / rate[PROXY]:.2f}, {cost[road] / cost[PROXY]:.2f}"
            for road in (KERNEL, RELAY)
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
