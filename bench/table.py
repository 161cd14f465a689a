"""The results as a compact table on a terminal, a line per row as soon as it is measured."""

from __future__ import annotations

from collections.abc import Sequence

from bench.contestants import YARDSTICK
from bench.idle import Idle
from bench.latency import Latency
from bench.results import GIB, Result

_NAME, _COLUMN = 31, 15
NOISE = 0.05
"""Share of the processors that strangers may take before it is worth a word."""


def figures(result: Result, name: str) -> tuple[str, str]:
    """Give a contestant's rate and its processor time, with the units that fit the row."""
    rate, cost = result.rate(name), result.cost(name)
    if rate is None or cost is None:
        return "-", "-"
    if result.counts_requests:
        return f"{rate / result.block / 1000:.1f} k/s", f"{cost * result.block * 1e6:.1f} µs"
    return f"{rate / GIB:.2f} GiB/s", f"{cost * GIB:.3f} s/GiB"


def heading(names: Sequence[str]) -> str:
    columns = "".join(f"{name[-_COLUMN + 1 :]:>{_COLUMN}}" for name in names)
    return (
        f"{'':{_NAME}}{columns}   rate    CPU  rate/C\n"
        "k/s and server CPU µs per request, or GiB/s and CPU s per GiB; medians. Ratios: ours to "
        "the best\npeer's rate, to the most frugal peer's CPU, to the C yardstick's rate; medians "
        "of the rounds' ratios."
    )


def line(result: Result) -> str:
    """Lay out a row: every contestant, the ratios, and which goals are missed."""
    columns = ""
    for name in result.rounds:
        rate, cost = figures(result, name)
        columns += f"{f'{rate.split()[0]} {cost.split()[0]}':>{_COLUMN}}"
    for ratio in (result.rate_ratio(), result.cost_ratio(), result.rate_ratio(YARDSTICK)):
        columns += f"{ratio.median:7.2f}" if ratio else f"{'-':>7}"
    missed = ", ".join(goal for goal, _ in result.missed())
    words = f"  missed: {missed}" if missed else ""
    if result.others > NOISE:
        words += f"  (others took {result.others:.0%} of the processors)"
    return f"{result.name:{_NAME}}{columns}{words}"


def latency_line(latency: Latency, names: Sequence[str]) -> str:
    """Lay out a scenario: median and 99th percentile in milliseconds."""
    columns = ""
    for name in names:
        if name in latency.seconds:
            cell = f"{latency.median(name) * 1000:.2f} {latency.p99(name) * 1000:.2f}"
        else:
            cell = "failed" if name in latency.failed else "-"
        columns += f"{cell:>{_COLUMN}}"
    return f"{latency.name:{_NAME}}{columns}  ms, median and p99"


def idle_line(idle: dict[str, Idle], names: Sequence[str]) -> str:
    """Lay out what idle connections cost: KiB for each, and CPU milliseconds for all."""
    columns = ""
    for name in names:
        one = idle.get(name)
        cell = f"{one.per_connection / 1024:.1f} {one.cpu * 1000:.1f}" if one else "-"
        columns += f"{cell:>{_COLUMN}}"
    return f"{'idle':{_NAME}}{columns}  KiB per connection, CPU ms in all"
