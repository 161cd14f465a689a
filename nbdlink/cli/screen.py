"""What `nbdlink watch` shows: links, what they do, and what happened, as lines of styled text.

Nothing in here touches a terminal. A picture is computed from what was observed and from the
size that there is; `nbdlink.cli.output` paints it.
"""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nbdlink.cli.output import printable
from nbdlink.errors import ConfigError
from nbdlink.kernel.statistics import Rates
from nbdlink.link.watch import Activity, Link, Notice
from nbdlink.uri import Target

Span = tuple[str, str]
"""Text, and a style as rich names them."""

Line = list[Span]

WIDE = 118
"""From so many columns on, a link's route and its history are in the same line."""

_STATES = {
    "attached": "green",
    "stalled": "yellow",
    "dead": "red bold",
    "unknown": "yellow",
    "absent": "dim",
}
_EVENTS = {
    "connection-died": "red",
    "connection-renewed": "green",
    "attached": "green",
    "detached": "yellow",
    "vanished": "yellow",
    "lost": "yellow",
}
_LEAST_EVENTS = 3
_LEAST_ROUTE = 30
_NAME = (4, 24)
_TREND = 20


@dataclass(frozen=True, slots=True)
class View:
    """Everything that is to be seen.

    Attributes:
        links: in order, each with what it does, if that is known yet.
        missing: what was asked for and is not attached.
        notices: what happened, the newest last.
        moment: seconds since the epoch.
        interval: seconds between two measurements.
        machine: whose devices these are.
        unheard: which events cannot be heard, and why.
    """

    links: Sequence[tuple[Link, Activity | None]]
    missing: Sequence[str] = ()
    notices: Sequence[Notice] = ()
    moment: float = 0.0
    interval: float = 1.0
    machine: str = ""
    unheard: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Glyphs:
    """Characters to draw with."""

    dot: str = "●"
    trend: str = "▁▂▃▄▅▆▇█"
    rule: str = "─"
    more: str = "…"


UNICODE = Glyphs()
ASCII = Glyphs("*", "_.-=+*#@", "-", "~")


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the table.

    Attributes:
        title: its heading.
        width: in columns of the terminal.
        right: whether it is a number.
        style: of its cells.
    """

    title: str
    width: int
    right: bool = False
    style: str = ""


def picture(view: View, width: int, height: int, glyphs: Glyphs) -> list[Line]:
    """Draw everything into `height` lines of `width` columns."""
    if height < 8:  # no room for anything but the links
        rows = list(_table(view, width, height - 1, glyphs, heading=False))
        return [_crop(line, width, glyphs) for line in [_title(view, width), *rows][:height]]
    room = height - 5
    rows = list(_table(view, width, room - _LEAST_EVENTS, glyphs))
    lines = [_title(view, width), [], *rows, [], _rule("events", width, glyphs)]
    lines += _told(view, height - len(lines) - 1)
    lines += [[] for _ in range(height - len(lines) - 1)]
    return [_crop(line, width, glyphs) for line in [*lines, _footer(view)]]


def _title(view: View, width: int) -> Line:
    counts: dict[str, int] = {}
    for link, _ in view.links:
        counts[link.state] = counts.get(link.state, 0) + 1
    line: Line = [("nbdlink watch", "bold")]
    if view.machine:
        line.append((f"  {view.machine}", "dim"))
    for state in ("attached", "stalled", "dead", "unknown"):
        if counts.get(state):
            line += [("  ", ""), (f"{counts[state]} {state}", _STATES[state])]
    return _spread(line, [(clock(view.moment), "dim")], width)


def _footer(view: View) -> Line:
    seconds = f"{view.interval:g} s"
    line: Line = [("q", "bold"), (f" quits, measured every {seconds}", "dim")]
    if view.unheard:
        line.append((f"; not heard: {printable('; '.join(view.unheard))}", "yellow"))
    return line


def _rule(title: str, width: int, glyphs: Glyphs) -> Line:
    start = f"{glyphs.rule * 2} {title} "
    return [(start + glyphs.rule * (width - len(start)), "dim")]


# The table.


def _table(
    view: View, width: int, room: int, glyphs: Glyphs, *, heading: bool = True
) -> Iterator[Line]:
    if not view.links and not view.missing:
        yield [("nothing is attached", "dim")]
        return
    columns, gap = _columns(view, width)
    if heading:
        titles = [_cell(column.title, column, glyphs) for column in columns]
        yield [("  ", ""), (gap.join(titles), "dim bold")]
        room -= 1
    links, left_out = _chosen(view, room)
    below = width < WIDE and 2 * len(links) + len(view.missing) <= room and not left_out
    for link, activity in links:
        yield _row(link, activity, columns, gap, glyphs)
        if below:
            across = 2 + sum(column.width for column in columns) + len(gap) * (len(columns) - 1)
            indent = 2 + columns[0].width + len(gap)
            yield _below(link, activity, indent, min(across, width), glyphs)
    if left_out:
        yield [(f"  and {left_out} more: make the window taller, or name those you want", "dim")]
    for name in view.missing:
        yield [(f"{glyphs.dot} ", "dim"), (f"{printable(name)} is not attached", "dim")]


def _chosen(view: View, room: int) -> tuple[list[tuple[Link, Activity | None]], int]:
    """Give the links that there is room for, and how many are left out: first what is well."""
    lacking = len(view.links) + len(view.missing) - room
    if lacking <= 0:
        return list(view.links), 0
    lacking += 1  # the line that says so
    well = [link.index for link, _ in view.links if link.state == "attached"]
    dropped = set(well[::-1][:lacking])
    chosen = [each for each in view.links if each[0].index not in dropped]
    chosen = chosen[: max(0, room - 1 - len(view.missing))]
    return chosen, len(view.links) - len(chosen)


def _columns(view: View, width: int) -> tuple[list[Column], str]:
    """Give the columns that fit, and what is between them."""
    device = max([6, *(len(link.device) - 5 for link, _ in view.links)])
    fixed = [
        Column("DEVICE", device),
        Column("NAME", 0),
        Column("STATE", 8),
        Column("CONN", 5, right=True),
        Column("TLS", 6),
        Column("READ/s", 7, right=True),
        Column("WRITE/s", 7, right=True),
        Column("IOPS", 6, right=True),
        Column("QUEUE", 5, right=True),
        Column("LATENCY", 8, right=True),
    ]
    if width >= WIDE:
        fixed += [Column("BUSY", 5, right=True), Column("TREND", _TREND), Column("ROUTE", 0)]
    least, most = _NAME
    longest = max([least, *(_width(link.name or "-") for link, _ in view.links)])
    left = width - 2 - sum(column.width for column in fixed)
    wanted = min(longest, most) + (_LEAST_ROUTE if width >= WIDE else 0)
    gap = "  " if left - 2 * (len(fixed) - 1) >= wanted else " "
    left -= len(gap) * (len(fixed) - 1)
    name = max(least, min(longest, most, left))
    fixed[1] = Column("NAME", name)
    if width >= WIDE:
        fixed[-1] = Column("ROUTE", max(5, left - name), style="dim")
    return fixed, gap


def _row(
    link: Link, activity: Activity | None, columns: list[Column], gap: str, glyphs: Glyphs
) -> Line:
    style = _STATES.get(link.state, "")
    rates = activity.rates if activity else None
    texts: dict[str, Span] = {
        "DEVICE": (link.device.removeprefix("/dev/"), "bold"),
        "NAME": (printable(link.name), ""),
        "STATE": (link.state, style),
        "CONN": (link.connections, _connections_style(link)),
        "TLS": (printable(link.tls), "" if link.tls in ("kernel", "relay") else "dim"),
        "TREND": _trend(activity, glyphs),
        "ROUTE": (_route(link), "dim"),
        **_numbers(rates),
    }
    line: Line = [(f"{glyphs.dot} ", style)]
    for number, column in enumerate(columns):
        text, its_style = texts[column.title]
        line += [(gap if number else "", ""), (_cell(text, column, glyphs), its_style)]
    return line


def _numbers(rates: Rates | None) -> dict[str, Span]:
    titles = ("READ/s", "WRITE/s", "IOPS", "QUEUE", "LATENCY", "BUSY")
    if rates is None:
        return {title: ("-", "dim") for title in titles}
    # A hanging device completes nothing; what waits is its queue.
    queue = rates.queue_depth if rates.per_second else float(rates.in_flight)
    texts = (
        amount(rates.read.bytes_per_second, 1024),
        amount(rates.write.bytes_per_second, 1024),
        amount(rates.per_second, 1000),
        f"{queue:.1f}" if queue < 100 else f"{queue:.0f}",
        latency(rates.latency),
        f"{rates.utilisation:.0%}",
    )
    idle = ("0", "0.0", "0%", "-")
    return {
        title: (text, "dim" if text in idle else "")
        for title, text in zip(titles, texts, strict=True)
    }


def _below(link: Link, activity: Activity | None, indent: int, width: int, glyphs: Glyphs) -> Line:
    """Draw a link's second line, as wide as the table: where it goes, what it did lately."""
    route = _fit(_route(link), max(0, width - indent - 2 - _TREND), glyphs)
    return [(" " * indent, ""), (route, "dim"), ("  ", ""), _trend(activity, glyphs)]


def _connections_style(link: Link) -> str:
    if link.live is None or link.total is None or link.live == link.total:
        return ""
    return "red bold" if link.live == 0 else "yellow"


def _route(link: Link) -> str:
    routes = ", ".join(link.routes)
    try:
        export = Target.parse(link.target or "").export
    except ConfigError:
        return printable(link.target or routes or None)
    return printable(f"{export or '(default)'} at {routes}")


def _trend(activity: Activity | None, glyphs: Glyphs) -> Span:
    """Draw the throughput of the last measurements, the newest to the right."""
    values = list(activity.history)[-_TREND:] if activity else []
    highest = max(values, default=0.0)
    steps = len(glyphs.trend) - 1
    drawn = "".join(
        glyphs.trend[round(value / highest * steps) if highest else 0] for value in values
    )
    return drawn.rjust(_TREND), "cyan" if highest else "dim"


def amount(value: float, base: int) -> str:
    """Write a number in at most five characters: `0`, `87`, `1.4k`, `112M`.

    Args:
        value: the number.
        base: 1024 (K, M, G) or 1000 (k, M, G).
    """
    units = ["", "K" if base == 1024 else "k", "M", "G", "T", "P"]
    while round(value) >= 1000 and len(units) > 1:
        value /= base
        units.pop(0)
    digits = 1 if units[0] and value < 9.95 else 0
    return f"{value:.{digits}f}{units[0]}"


def latency(milliseconds: float | None) -> str:
    """Write a time: `0.42ms`, `12.3ms`, `1.2s`."""
    if milliseconds is None:
        return "-"
    if milliseconds >= 1000:
        seconds = milliseconds / 1000
        return f"{seconds:.1f}s" if seconds < 100 else f"{seconds:.0f}s"
    digits = 2 if milliseconds < 10 else 1 if milliseconds < 100 else 0
    return f"{milliseconds:.{digits}f}ms"


# Events.


def _told(view: View, room: int) -> Iterator[Line]:
    told = list(_grouped(view.notices))[-room:] if room > 0 else []
    if not view.notices:
        yield [("nothing has happened yet", "dim")]
    names = [_who(notice, others) for notice, others in told]
    across = max(map(_width, names), default=0)
    for (notice, _), name in zip(told[::-1], names[::-1], strict=True):
        padding = " " * (across - _width(name) + 2)
        yield [
            (f"{clock(notice.time)}  ", "dim"),
            (name + padding, "bold"),
            (printable(notice.message), _EVENTS.get(notice.event, "")),
        ]


def _who(notice: Notice, others: int) -> str:
    device = "" if notice.index is None else f"nbd{notice.index}"
    name = f" {printable(notice.name)}" if notice.name else ""
    return device + name + (f" and {others} more" if others else "")


def _grouped(notices: Sequence[Notice]) -> Iterator[tuple[Notice, int]]:
    """Take together what was said of many devices at once, as when the module is loaded."""
    first: Notice | None = None
    others = 0
    for notice in notices:
        same = first is not None and (notice.event, notice.message) == (first.event, first.message)
        if first is not None and same and notice.time - first.time < 1.0:
            others += 1
            continue
        if first is not None:
            yield first, others
        first, others = notice, 0
    if first is not None:
        yield first, others


def notice_line(notice: Notice) -> str:
    """Say what happened, where nothing can be painted."""
    who = f"{notice.device} ({notice.name})" if notice.name else notice.device
    return f"{clock(notice.time)}  " + (f"{who}: " if who else "") + printable(notice.message)


def plain_table(view: View) -> tuple[tuple[str, ...], list[list[object]]]:
    """Give headings and rows of the same table, where nothing can be painted."""
    columns = ("device", "name", "state", "conn", "tls", "read/s", "write/s", "iops", "queue",
               "latency", "busy", "route")  # fmt: skip
    rows: list[list[object]] = []
    for link, activity in view.links:
        numbers = _numbers(activity.rates if activity else None)
        row: list[object] = [link.device, link.name, link.state, link.connections, link.tls]
        row += [numbers[title][0] for title in
                ("READ/s", "WRITE/s", "IOPS", "QUEUE", "LATENCY", "BUSY")]  # fmt: skip
        rows.append([*row, _route(link)])
    rows += [[name, None, "absent", *[None] * 9] for name in view.missing]
    return columns, rows


def clock(moment: float) -> str:
    """Give the time of day, here."""
    return time.strftime("%H:%M:%S", time.localtime(moment))


# Width. A character may take two columns of the terminal, or none.


def _width(text: str) -> int:
    return len(text) if text.isascii() else sum(map(_columns_of, text))


def _columns_of(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _fit(text: str, width: int, glyphs: Glyphs) -> str:
    """Make a text exactly `width` columns wide."""
    missing = width - _width(text)
    if missing < 0:
        kept = ""
        for character in text:
            if _width(kept + character) > width - 1:
                break
            kept += character
        text = kept + glyphs.more if width else ""
        missing = width - _width(text)
    return text + " " * missing


def _cell(text: str, column: Column, glyphs: Glyphs) -> str:
    if column.right:
        text = " " * (column.width - _width(text)) + text
    return _fit(text, column.width, glyphs)


def _crop(line: Line, width: int, glyphs: Glyphs) -> Line:
    """Cut a line to `width` columns."""
    cropped: Line = []
    for text, style in line:
        needed = _width(text)
        if needed > width:
            return [*cropped, (_fit(text, width, glyphs).rstrip(), style)] if width else cropped
        cropped.append((text, style))
        width -= needed
    return cropped


def _spread(left: Line, right: Line, width: int) -> Line:
    used = sum(_width(text) for text, _ in (*left, *right))
    return [*left, (" " * max(1, width - used), ""), *right]
