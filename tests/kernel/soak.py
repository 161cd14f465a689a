"""The faults of `test_faults.py`, for as long as one likes: `python -m tests.kernel.soak --help`.

To be run as root on a machine that may be thrown away: it takes devices and, for some faults, the
whole network. A device with ext4 would hide half of what happens, so the area is the oracle's, and
fio has another one beside it. Prints a line for each fault with its rounds, the requests that were
answered and the longest that one of them took; ends at the first thing that is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from nbdlink.link import record
from tests.certificates import Authority

from . import oracle
from .faults import FAULTS, suffer, world
from .oracle import Oracle
from .workloads import Fio

_USUAL = ["crash", "crash-alone", "orphan", "interrupt", "stutter"]


def main() -> int:
    """Run it; 0 if nothing was wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.kernel.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("faults", nargs="*", choices=[*FAULTS, []], metavar="FAULT")
    parser.add_argument("--rounds", type=int, default=100, help="of all faults together")
    parser.add_argument("--server", default="nbdlink", choices=["nbdlink", "nbdkit", "qemu-nbd"])
    parser.add_argument("--connections", type=int, default=2)
    parser.add_argument("--timeout", type=int, default=2, help="seconds for a request")
    parser.add_argument("--tls", choices=["kernel", "relay"], help="who does TLS, if there is any")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 16))
    parser.add_argument("--fio", action="store_true", help="have fio use the device as well")
    options = parser.parse_args()
    print(f"faults: {' '.join(options.faults or _USUAL)}; seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        record.DIRECTORY = folder / "run"
        credentials = None
        if options.tls:
            authority = Authority()
            credentials = authority.write_directory(
                folder / "pki", server=authority.issue(), client=authority.issue(role="client")
            )
        here = stack.enter_context(
            world(
                folder,
                options.server,
                connections=options.connections,
                timeout=options.timeout,
                seed=options.seed,
                credentials=credentials,
                road=options.tls or "auto",
            )
        )
        seer = Oracle(here.device, seed=options.seed).start()
        loads = [seer]
        if options.fio:
            loads.append(Fio(here.device, oracle.SIZE, 4 << 20).start())
        rounds: dict[str, list[float]] = {}
        requests: dict[str, int] = {}
        slowest: dict[str, float] = {}
        try:
            for _ in range(options.rounds):
                fault = here.dice.choice(options.faults or _USUAL)
                begun, before, seer.slowest = time.monotonic(), seer.requests, 0.0
                suffer(here, FAULTS[fault], 1, *loads)
                rounds.setdefault(fault, []).append(time.monotonic() - begun)
                requests[fault] = requests.get(fault, 0) + seer.requests - before
                slowest[fault] = max(slowest.get(fault, 0.0), seer.slowest)
            for load in reversed(loads):
                load.check(*([here.server.image] if load is seer else []))
        except AssertionError as error:
            print(f"WRONG during {fault}: {error}", flush=True)
            status = 1
        else:
            status = 0
        for fault, times in rounds.items():
            print(
                f"{fault}: {len(times)} rounds in {sum(times):.0f} s, {requests[fault]} requests, "
                f"the slowest took {slowest[fault]:.2f} s"
            )
        print(f"{seer.requests} requests, {len(seer.failed)} failed, {len(seer.wrong)} wrong")
        sys.stdout.flush()
        if status:
            os._exit(status)  # a thread may hang in the kernel
    return status


if __name__ == "__main__":
    sys.exit(main())
