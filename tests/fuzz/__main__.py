"""Fuzz the server for as long as you like: `python -m tests.fuzz [SECONDS [SEED]]`.

A failure prints the seed that leads to it; `python -m tests.fuzz 0 SEED` repeats it.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from .target import Target, seed_from_system, silence


def main(seconds="60", seed=None):
    silence()
    first = seed_from_system() if seed is None else int(seed)
    end = time.monotonic() + float(seconds)
    with tempfile.TemporaryDirectory() as folder:
        target = Target(Path(folder))
        number = first
        while True:
            try:
                target.converse(number)
            except BaseException:
                print(f"seed {number}", file=sys.stderr)
                raise
            number += 1
            if time.monotonic() >= end:
                break
        target.close()
    print(f"{number - first} conversations, from the seed {first} on")


if __name__ == "__main__":
    main(*sys.argv[1:])
