"""Draw the plots of a run: `python -m bench.plot docs/benchmarks` draws them again."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.book import Book
from bench.contestants import OURS, YARDSTICK
from bench.results import Result
from bench.rows import in_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What the picture of the README shows; the page has them all.
_SHOWN = {
    "unix/tmpfs/4k-read-d1-c1-one": "4 KiB read, depth 1",
    "unix/tmpfs/4k-read-d16-c1-one": "4 KiB read, depth 16",
    "unix/tmpfs/4k-write-d16-c1-one": "4 KiB write, depth 16",
    "unix/tmpfs/4k-read-d64-c4-one": "4 KiB read, depth 64,\n4 connections",
    "unix/tmpfs/64k-read-d16-c1-one": "64 KiB read, depth 16",
    "unix/tmpfs/1m-write-d4-c1-one": "1 MiB write, in sequence",
    "tcp/tmpfs/4k-read-d16-c1-one": "TCP: 4 KiB read,\ndepth 16",
    "tcp/tmpfs/1m-read-d4-c1-one": "TCP: 1 MiB read,\nin sequence",
    "tls/tmpfs/4k-read-d16-c1-one": "TLS: 4 KiB read,\ndepth 16",
    "tls/tmpfs/64k-write-d16-c1-one": "TLS: 64 KiB write,\ndepth 16",
}
# The peers stay in the background. The order is the same everywhere, for whoever sees no colours.
_COLOURS = {
    OURS: "#1a66c2",
    "nbdkit -t 1": "#7fa08d",
    "nbdkit": "#b3cbbd",
    "nbd-server": "#c8aca8",
    "qemu-nbd": "#e2d3bd",
    YARDSTICK: "#ffffff",
}
_INK, _GREY, _LINE, _LOSS = "#1f2933", "#5a6773", "#e3e7ec", "#c2410c"
_LABELS = {YARDSTICK: "minimal server in C"}


def draw(book: Book) -> list[tuple[str, str]]:
    """Draw what the numbers allow; give what each picture shows, and the file's name."""
    try:
        import matplotlib
    except ImportError:
        print("no matplotlib: no plots", file=sys.stderr)
        return []
    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {
            "font.family": ["DejaVu Sans"],
            "font.size": 10,
            "text.color": _INK,
            "axes.labelcolor": _GREY,
            "xtick.color": _GREY,
            "ytick.color": _INK,
            "axes.edgecolor": _LINE,
            "figure.facecolor": "white",  # readable where a page is dark
            "svg.hashsalt": "nbdlink",  # so that the same numbers make the same file
        }
    )
    drawn = []
    shown = [one for one in book.results if one.name in _SHOWN and one.rate(OURS)]
    if shown:
        _save(_compare(shown), book, "server")
        drawn.append(("Rates and processor time of nbdlink and other servers", "server.svg"))
    judged = [one for one in book.results if one.goals and one.rate_ratio()]
    if judged:
        _save(_ratios(judged), book, "server-ratios")
        drawn.append(("Every row's rate beside the best peer's", "server-ratios.svg"))
    return drawn


def _save(figure: Figure, book: Book, name: str) -> None:
    assert book.output is not None
    for kind, metadata in (("svg", {"Date": None}), ("png", {})):
        figure.savefig(
            book.output / f"{name}.{kind}",
            dpi=160,
            bbox_inches="tight",
            pad_inches=0.2,
            metadata=metadata,
        )


def _compare(results: Sequence[Result]) -> Figure:
    """Draw rate and CPU of every server side by side, for some rows."""
    from matplotlib.figure import Figure

    results = sorted(results, key=lambda one: list(_SHOWN).index(one.name))
    names = [name for name in _COLOURS if any(one.rate(name) for one in results)]
    height = 1.75 + 0.86 * len(results)
    figure = Figure(figsize=(11, height))
    left, right = figure.subplots(1, 2, sharey=True)
    figure.subplots_adjust(wspace=0.07, top=1 - 1.35 / height, bottom=0.3 / height)
    _bars(left, results, names, "rate", [_best(one, "rate", max) for one in results])
    _bars(right, results, names, "cost", [_best(one, "cost", min) for one in results])
    titles = {
        left: "Rate: best peer = 1, longer is better",
        right: "Server CPU for the same work: most frugal peer = 1, shorter is better",
    }
    for axes, words in titles.items():
        axes.set_title(words, loc="left", fontsize=10, color=_INK, pad=8)
    left.set_yticks(range(len(results)), [_SHOWN[one.name] for one in results])
    left.set_ylim(len(results) - 0.5, -0.5)
    figure.text(0, 1 - 0.2 / height, "nbdlink beside other NBD servers", fontsize=16, weight="bold")
    figure.text(
        0,
        1 - 0.5 / height,
        "A file on tmpfs, over a Unix socket unless it says TCP; random access unless it says in "
        "sequence; server and client share one core.",
        color=_GREY,
        fontsize=9.5,
    )
    figure.legend(
        *left.get_legend_handles_labels(),
        loc="upper left",
        bbox_to_anchor=(-0.008, 1 - 0.57 / height),
        ncols=len(names),
        frameon=False,
        handlelength=1.2,
        columnspacing=1.8,
    )
    return figure


def _best(result: Result, what: str, choose: Any) -> float:
    values: list[float] = [v for name in result.peers if (v := getattr(result, what)(name))]
    best: float = choose(values) if values else getattr(result, what)(OURS)
    return best


def _bars(
    axes: Axes, results: Sequence[Result], names: Sequence[str], what: str, unit: Sequence[float]
) -> None:
    height = 0.8 / len(names)
    for place, name in enumerate(names):
        offset = (place - (len(names) - 1) / 2) * height
        values = [getattr(one, what)(name) or 0.0 for one in results]
        ratios = [value / one for value, one in zip(values, unit, strict=True)]
        axes.barh(
            [row + offset for row in range(len(results))],
            ratios,
            height * 0.9,
            label=_LABELS.get(name, name),
            color=_COLOURS[name],
            edgecolor=_GREY if name == YARDSTICK else _COLOURS[name],
            linewidth=0.8 if name == YARDSTICK else 0,
            zorder=3,
        )
        for row, ratio in enumerate(ratios):
            if ratio > _limit(what):
                axes.text(
                    _limit(what) * 0.99,
                    row + offset,
                    f"{ratio:.1f} →",
                    ha="right",
                    va="center",
                    fontsize=7,
                    color=_INK,
                    zorder=6,
                )
        if name == OURS:
            for row, (ratio, one) in enumerate(zip(ratios, results, strict=True)):
                axes.text(
                    min(ratio, _limit(what)) + 0.025,
                    row + offset,
                    _absolute(one, what),
                    va="center",
                    fontsize=8.5,
                    color=_COLOURS[OURS],
                    weight="bold",
                    zorder=5,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.1},
                )
    axes.axvline(1, color=_INK, linewidth=0.9, zorder=4)
    axes.set_xlim(0, _limit(what))
    _tidy(axes)


def _limit(what: str) -> float:
    # qemu-nbd takes many times the CPU: its bars leave the picture, whose point is elsewhere.
    return 2.4 if what == "rate" else 3.0


def _absolute(result: Result, what: str) -> str:
    from bench.table import figures

    return figures(result, OURS)[0 if what == "rate" else 1]


def _ratios(results: Sequence[Result]) -> Figure:
    """Draw every row's rate beside the best peer's and the yardstick's: a dot each."""
    from matplotlib.figure import Figure

    height = 1.2 + 0.235 * len(results)
    figure = Figure(figsize=(11, height))
    axes = figure.subplots()
    figure.subplots_adjust(top=1 - 0.85 / height, bottom=0.3 / height, left=0.39, right=1)
    hollow: dict[str, Any] = {
        "markerfacecolor": "white",
        "markeredgecolor": _GREY,
        "linestyle": "none",
    }
    for row, one in enumerate(results):
        rate, yardstick = one.rate_ratio(), one.rate_ratio(YARDSTICK)
        if rate is None:
            continue
        colour = _COLOURS[OURS] if round(rate.median, 2) >= 1 else _LOSS
        axes.plot([1, rate.median], [row, row], color=colour, linewidth=2.5, alpha=0.3, zorder=3)
        axes.plot([rate.low, rate.high], [row, row], color=colour, linewidth=0.9, zorder=3)
        axes.plot(rate.median, row, "o", color=colour, markersize=6, zorder=5)
        if yardstick:
            axes.plot(yardstick.median, row, marker="D", markersize=4.5, zorder=4, **hollow)
    axes.plot([], [], "o", color=_COLOURS[OURS], label="the best peer's: not below it")
    axes.plot([], [], "o", color=_LOSS, label="the best peer's: below it")
    axes.plot([], [], marker="D", markersize=4.5, label="the C yardstick's", **hollow)
    axes.axvline(1, color=_INK, linewidth=0.9, zorder=2)
    axes.set_yticks(range(len(results)), [in_words(one.name) for one in results], fontsize=8)
    axes.set_ylim(len(results) - 0.4, -0.6)
    axes.set_xlim(0, min(3.0, max(2.0, axes.get_xlim()[1])))
    figure.text(
        0, 1 - 0.2 / height, "nbdlink's rate as a multiple of others'", fontsize=14, weight="bold"
    )
    figure.text(
        0,
        1 - 0.42 / height,
        "Dots are medians; thin lines reach from the lowest round to the highest.",
        color=_GREY,
        fontsize=9.5,
    )
    figure.legend(
        loc="upper left",
        bbox_to_anchor=(-0.01, 1 - 0.48 / height),
        ncols=3,
        frameon=False,
        fontsize=9.5,
        handletextpad=0.2,
    )
    _tidy(axes)
    return figure


def _tidy(axes: Axes) -> None:
    axes.grid(axis="x", color=_LINE, linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    for side in ("top", "right", "bottom", "left"):
        axes.spines[side].set_visible(False)
    axes.xaxis.set_major_formatter("{x:g}")


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        draw(Book.load(Path(folder) / "server.json"))
