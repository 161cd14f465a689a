"""Draw docs/watch.svg: what `nbdlink watch` shows, from links that were made up for it.

python docs/draw_watch.py > docs/watch.svg
"""

from __future__ import annotations

import math
import os
import time
from collections import deque

from nbdlink.cli import output, screen
from nbdlink.kernel.statistics import Operations, Rate, Rates, Sample
from nbdlink.link.watch import Activity, Link, Notice

COLUMNS, LINES = 92, 24
NOON = 1_750_000_000.0


def activity(reads: float, size: int, latency: float, *, writes: float = 0.0) -> Activity:
    """Give a link's activity: requests a second, bytes of each, milliseconds of each."""
    zero = Operations()
    depth = (reads + writes) * latency / 1000
    rates = Rates(
        1.0,
        Rate(reads, reads * size, latency if reads else None),
        Rate(writes, writes * size, latency if writes else None),
        Rate(),
        Rate(),
        depth,
        round(depth),
        min(1.0, depth),
    )
    total = (reads + writes) * size
    history = deque(total * (0.6 + 0.4 * math.sin(n / 2.6 + total)) for n in range(20))
    return Activity(Sample(0.0, zero, zero, zero, zero, 0, 0, 0), rates, history)


def view() -> screen.View:
    """Give three links, one of which has lost a connection."""
    data = Link(0, "data", "attached", 1 << 40, 4, 4, "nbds://store1/data",
                ("store1:10809", "store2:10809"), "kernel", 1)  # fmt: skip
    media = Link(1, "media", "attached", 8 << 40, 1, 2, "nbds://store2/media",
                 ("store2:10809",), "relay")  # fmt: skip
    build = Link(2, "build", "attached", 64 << 30, 2, 2, "nbd://10.0.0.7/build",
                 ("10.0.0.7:10809",), "none")  # fmt: skip
    backup = Link(3, "backup", "dead", 2 << 40, 0, 1, "nbd://vault/backup",
                  ("vault:10809",), "none")  # fmt: skip
    idle = activity(0, 0, 0)
    return screen.View(
        [
            (data, activity(9200, 12288, 0.41, writes=1800)),
            (media, activity(118, 1 << 20, 8.3)),
            (build, activity(0, 4096, 0.19, writes=640)),
            (backup, idle),
        ],
        notices=[
            Notice(NOON - 312, "attached", 2, "build",
                   "attached to nbd://10.0.0.7/build, 2/2 connections"),
            Notice(NOON - 96, "connection-died", 0, "data", "a connection died, 3/4 up"),
            Notice(NOON - 96, "connection-renewed", 0, "data", "a connection renewed, 4/4 up"),
            Notice(NOON - 95, "moved", 0, "data", "now over store1:10809, store2:10809"),
            Notice(NOON - 41, "resized", 1, "media", "resized from 4T to 8T"),
            Notice(NOON - 17, "connection-died", 3, "backup", "a connection died, 0/1 up"),
            Notice(NOON - 17, "state", 3, "backup", "dead: no connection is left"),
            Notice(NOON - 2, "connection-died", 1, "media", "a connection died, 1/2 up"),
        ],
        moment=NOON,
        machine="web1",
    )  # fmt: skip


def main() -> None:
    """Print the picture."""
    os.environ["TZ"] = "UTC"
    time.tzset()
    lines = screen.picture(view(), COLUMNS, LINES, screen.UNICODE)
    print(output.picture_as_svg(lines, COLUMNS, "nbdlink watch"))


if __name__ == "__main__":
    main()
