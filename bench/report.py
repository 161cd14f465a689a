"""The page that people read: docs/benchmarks/server.md, and the plots on it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator

from bench import plot
from bench.book import Book
from bench.contestants import OURS, YARDSTICK
from bench.idle import Idle
from bench.latency import DELAY, EVERY, Latency
from bench.results import Ratio, Result
from bench.rows import in_words
from bench.table import figures

_GROUPS = {
    "unix/tmpfs": "Unix socket, file on tmpfs",
    "tcp/tmpfs": "TCP, file on tmpfs",
    "unix/disk": "Unix socket, file on disk",
    "tcp/disk": "TCP, file on disk",
    "tls/tmpfs": "TLS on TCP, file on tmpfs",
    "unix/qcow2-preallocated": "qcow2, all of it allocated, Unix socket",
    "unix/qcow2-grown": "qcow2, allocated in random order, Unix socket",
    "unix/qcow2-growing": "qcow2, growing, Unix socket",
    "unix/qcow2-chain": "qcow2 on a raw backing file, Unix socket",
    "nbdcopy/unix": "nbdcopy, Unix socket",
    "nbdcopy/tcp": "nbdcopy, TCP",
    "nbdcopy/tls": "nbdcopy, TLS on TCP",
}
_OUR_COPIES = "copy/unix"
_GOALS = {
    "rate": "rate",
    "CPU": "CPU",
    "1.5": "1.5 times the IOPS",
    "yardstick": "0.95 of the yardstick",
}


def write(book: Book) -> None:
    """Write the page and draw the plots, beside the numbers."""
    if book.output is None:
        return
    plots = plot.draw(book)
    lines = [*_head(book, plots), *_verdicts(book)]
    for prefix, title in _GROUPS.items():
        lines += _results(title, [one for one in book.results if one.name.startswith(prefix)])
    lines += _our_copies([one for one in book.results if one.name.startswith(_OUR_COPIES)])
    lines += [*_latency(book.latency), *_idle(book.idle), *_method(book)]
    (book.output / "server.md").write_text("\n".join(lines) + "\n")


def _head(book: Book, plots: Iterable[tuple[str, str]]) -> Iterator[str]:
    yield "# `nbdlink serve` beside other servers"
    yield ""
    yield "`make bench` writes this page, the plots and [the raw numbers](server.json)."
    yield ""
    for words, file in plots:
        yield f"![{words}]({file})"
        yield ""
    yield "| | |"
    yield "| --- | --- |"
    yield f"| date | {book.date} |"
    for heading, words in book.machine.items():
        yield f"| {heading} | {words} |"
    for name, words in book.servers.items():
        yield f"| {name} | {words} |"
    yield f"| clients | {', '.join(book.clients.values())} |"
    strangers = [one.others for one in book.results if one.block]
    if strangers:
        yield f"| processor time that other programs took | {statistics.median(strangers):.0%} |"
    yield ""


def _verdicts(book: Book) -> Iterator[str]:
    judged = [one for one in book.results if one.goals and one.rate_ratio()]
    missed = {one.name: one.missed() for one in judged}
    losing = {name: words for name, words in missed.items() if words}
    yield "## Where it loses"
    yield ""
    if not judged:
        yield "Nothing was compared."
    elif not losing:
        yield f"Nowhere in {len(judged)} rows."
    else:
        yield f"In {len(losing)} of {len(judged)} rows a goal is missed:"
        yield ""
        for name, words in losing.items():
            yield f"- {in_words(name)}: {'; '.join(text for _, text in words)}"
    for sentence in (*_copied_slower(book.results), *_held_up(book.latency)):
        yield f"- {sentence}"
    yield ""
    yield "## Where it wins"
    yield ""
    won = [one for one in judged if not missed[one.name]]
    yield f"In {len(won)} of {len(judged)} rows every goal is met. By kind of work:"
    yield ""
    yield from _by_kind(judged)
    yield ""


def _by_kind(judged: list[Result]) -> Iterator[str]:
    """Sum up, by kind of work: the ratios from the lowest to the highest row."""
    kinds: dict[str, Callable[[Result], bool]] = {
        "4 KiB at depth 1": lambda one: one.block == 4096 and one.depth == 1,
        "4 KiB at depth 16 and 64": lambda one: one.block == 4096 and one.depth >= 16,
        "64 KiB": lambda one: one.block == 1 << 16,
        "1 MiB in sequence": lambda one: one.block == 1 << 20,
        "nbdcopy": lambda one: one.block == 0,
        "qcow2": lambda one: one.is_image,
    }
    yield (
        "| work | rows | rate beside the best peer | not below it "
        "| CPU beside the most frugal peer | rate beside the C yardstick |"
    )
    yield "| --- | --- | --- | --- | --- | --- |"
    for title, belongs in kinds.items():
        rows = [one for one in judged if belongs(one) and one.is_image == (title == "qcow2")]
        rates = [ratio.median for one in rows if (ratio := one.rate_ratio())]
        costs = [ratio.median for one in rows if (ratio := one.cost_ratio())]
        yardsticks = [ratio.median for one in rows if (ratio := one.rate_ratio(YARDSTICK))]
        if rates and costs:
            won = sum(round(rate, 2) >= 1 for rate in rates)
            yield (
                f"| {title} | {len(rows)} | {_range(rates)} | {won} of {len(rates)} rows "
                f"| {_range(costs)} | {_range(yardsticks)} |"
            )


def _range(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}" if values else "-"


def _results(title: str, results: list[Result]) -> Iterator[str]:
    if not results:
        return
    names = list(results[0].rounds)
    yield f"## {title}"
    yield ""
    if results[0].name.startswith("tls/"):
        yield _CIPHERS
        yield ""
    columns = ["work", *names, "rate / best peer", "CPU / best peer", "rate / yardstick", "goals"]
    yield f"| {' | '.join(columns)} |"
    yield "| --- " * len(columns) + "|"
    for one in results:
        cells = [in_words(one.name, short=True)]
        for name in names:
            rate, cost = figures(one, name)
            cells.append(f"{rate}, {cost}" if rate != "-" else "-")
        cells += [_ratio(one.rate_ratio()), _ratio(one.cost_ratio())]
        cells += [_ratio(one.rate_ratio(YARDSTICK), named=False), _goals(one)]
        yield f"| {' | '.join(cells)} |"
    yield ""


_CIPHERS = (
    "The ciphers are what each pair agrees on by itself, and not the same: with fio's client "
    "nbdlink chooses AES-128-GCM, and nbdkit and qemu-nbd take AES-256-GCM, its first wish."
)


def _ratio(ratio: Ratio | None, *, named: bool = True) -> str:
    if ratio is None:
        return "-"
    return f"{ratio.median:.2f} ({ratio.other})" if named else f"{ratio.median:.2f}"


def _goals(result: Result) -> str:
    missed = [_GOALS[goal] for goal, _ in result.missed()]
    if result.rate_ratio() is None:
        return "not measured"
    words = f"**missed: {', '.join(missed)}**" if missed else "met"
    if result.wants_factor and not result.has_room:
        words += " (no room for 1.5)"
    return words


def _our_copies(results: list[Result]) -> Iterator[str]:
    if not results:
        return
    yield "## `nbdlink copy` beside nbdcopy"
    yield ""
    yield (
        "Both copy the same file of 1 GiB from or to nbdkit on a Unix socket; the times include "
        "starting the program, and the CPU is the program's own."
    )
    yield ""
    yield "| work | nbdlink copy | nbdcopy | rate | CPU |"
    yield "| --- | --- | --- | --- | --- |"
    for one in results:
        cells = [in_words(one.name, short=True)]
        cells += [", ".join(figures(one, name)) for name in ("nbdlink copy", "nbdcopy")]
        cells += [_ratio(one.rate_ratio("nbdcopy"), named=False)]
        cells += [_ratio(one.cost_ratio("nbdcopy"), named=False)]
        yield f"| {' | '.join(cells)} |"
    yield ""


def _copied_slower(results: list[Result]) -> Iterator[str]:
    for one in results:
        rate = one.rate_ratio("nbdcopy") if one.name.startswith(_OUR_COPIES) else None
        if rate and round(rate.median, 2) < 1:
            yield f"`nbdlink copy`, {in_words(one.name, short=True)}: {rate.median:.2f} of nbdcopy"


def _held_up(latencies: list[Latency]) -> Iterator[str]:
    """Say in which scenarios ours lets a slow request hold up others more than the best does."""
    for one in latencies:
        if OURS in one.failed:
            yield f"{one.words} ({_kind(one)}): failed: {one.failed[OURS]}"
        elif OURS in one.seconds:
            best = min(one.seconds, key=one.p99)
            if one.p99(OURS) > 2 * one.p99(best) and one.p99(OURS) > DELAY / 5:
                yield (
                    f"{one.words} ({_kind(one)}): 99 of 100 within {one.p99(OURS) * 1000:.1f} ms, "
                    f"with {best} within {one.p99(best) * 1000:.1f} ms"
                )


def _kind(latency: Latency) -> str:
    return "slow file" if "/file/" in latency.name else "slow storage of the server's own kind"


def _latency(latencies: list[Latency]) -> Iterator[str]:
    if not latencies:
        return
    yield "## Slow storage"
    yield ""
    yield (
        f"One connection, requests sent in one go. One block of 4 KiB in {EVERY} takes "
        f"{DELAY * 1000:.0f} ms to read, and so does a flush; all others are there at once, and "
        "the storage lets no request wait for another. The slow file is on a FUSE file system "
        "(bench/slowfs.c), with nothing in the page cache; the storage of the server's own kind "
        "is a plugin for nbdkit and a storage class for nbdlink. "
        "Milliseconds until the answer came, median and 99th percentile; where all are slow, "
        f"until the last came ({DELAY * 1000:.0f} would be ideal)."
    )
    yield ""
    names = list(dict.fromkeys(name for one in latencies for name in (*one.seconds, *one.failed)))
    yield f"| requests | storage | {' | '.join(names)} |"
    yield "| --- " * (len(names) + 2) + "|"
    for one in latencies:
        cells = [one.words, "file" if "/file/" in one.name else "own kind"]
        for name in names:
            if name in one.seconds:
                cells.append(f"{one.median(name) * 1000:.2f}, {one.p99(name) * 1000:.2f}")
            else:
                cells.append("failed" if name in one.failed else "")
        yield f"| {' | '.join(cells)} |"
    yield ""


def _idle(idle: dict[str, Idle]) -> Iterator[str]:
    if not idle:
        return
    some = next(iter(idle.values()))
    yield f"## {some.connections} idle connections"
    yield ""
    yield (
        "Each has read one block, and then does nothing. Memory is the proportional set size of "
        "the server's processes, with what they share counted once."
    )
    yield ""
    yield f"| server | memory per connection | server itself | CPU in {some.seconds:.0f} s |"
    yield "| --- | --- | --- | --- |"
    for name, one in idle.items():
        yield (
            f"| {name} | {one.per_connection / 1024:.0f} KiB | {one.memory_before / 2**20:.1f} MiB "
            f"| {one.cpu * 1000:.1f} ms |"
        )
    yield ""


def _method(book: Book) -> Iterator[str]:
    yield "## How it is measured"
    yield ""
    yield (
        f"Every server serves the same file of {book.size >> 20} MiB of random bytes, on loopback "
        "TCP or a Unix socket, with its defaults. Files, those on disk too, are in the page cache, "
        "as no server opens them for direct access; before each write to disk, what others wrote "
        "is made durable. The client is fio's nbd engine, with one process per connection, or "
        f"nbdcopy. All servers are measured in turn, {book.seconds:g} s at a time in "
        f"{book.rounds} rounds, each round beginning with another one. A figure is the median of "
        "the rounds; a ratio is the median of the ratios within rounds, as a noisy machine is "
        "noisy for both sides. The best peer is the one with the highest median rate, or the least "
        "CPU. The CPU time is the kernel's account of all of the server's processes and threads "
        "over the whole measurement, with connecting and leaving."
    )
    yield ""
    yield (
        "qcow2 images lie on tmpfs and have clusters of 64 KiB. All of it allocated: made with "
        "`preallocation=metadata`, and then the file's bytes were put in. In random order: written "
        "cluster by cluster, as guests do. Growing: 16 GiB of which nothing is allocated, a new "
        "image and server for each measurement, so that nearly each request at a random offset "
        "takes a new cluster. Each server has an image of its own."
    )
    yield ""
    yield (
        "On one core, server and client share one processor, so that the rate measures what both "
        "spend; on both cores, the client can be what limits the rate. nbdkit takes part twice, as "
        "one thread is often faster than its default of sixteen. The yardstick is a server in C "
        "that does nothing but the work: one thread per connection, one receive and one send for "
        "all requests that have arrived, large reads sent from the page cache without a copy "
        "where that pays. It shows what the kernel's "
        "share of the work costs."
    )
    yield ""
    yield (
        "The goals: no rate below the best peer's; for 4 KiB at depth 16 and more at most two "
        "thirds of the CPU of the most frugal peer, and on Unix sockets 1.5 times the best peer's "
        "IOPS where the client leaves room (it does if the yardstick gets there); for larger "
        "blocks no more CPU per GiB than any peer; and nowhere less than 0.95 of the yardstick's "
        "rate. For TLS and qcow2 the goal is the rate alone."
    )
