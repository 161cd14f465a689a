"""How results reach the screen: tables, key-value sheets, JSON. The only importer of rich.

Values go to stdout and talk to stderr. rich is imported only where a terminal is there to be
drawn on; a pipe gets plain aligned columns, without colour.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.segment import Segment

# What a state looks like at a glance.
STATE_STYLES = {
    "attached": "green",
    "ok": "green",
    "good": "green",
    "warning": "yellow",
    "unknown": "yellow",
    "rebuilding": "yellow",
    "failed": "red",
    "stale": "red",
}


def print_json(value: Any) -> None:
    """Print `value` as indented JSON."""
    # On a terminal nothing but ASCII: a server's words might steer it otherwise.
    ascii_only = sys.stdout is not None and sys.stdout.isatty()
    print(json.dumps(value, indent=2, ensure_ascii=ascii_only, default=str))


def printable(value: object) -> str:
    """Make one cell: nothing for None, no control characters."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows under headings; a cell that names a state is coloured on a terminal."""
    cells = [[printable(value) for value in row] for row in rows]
    if sys.stdout.isatty():
        _print_rich_table(columns, cells)
        return
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for row in [[name.upper() for name in columns], *cells]:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print(line.rstrip())


_SHORT = 12
"""Characters of a column that stays one, however narrow the screen."""


def _print_rich_table(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    longest = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    if sum(longest) + 2 * (len(longest) - 1) > console.width:
        _print_folded(console, columns, cells, longest)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name.upper(), no_wrap=True)
    for row in cells:
        table.add_row(*(Text(cell, style=STATE_STYLES.get(cell, "")) for cell in row))
    console.print(table)


def _print_folded(
    console: Console,
    columns: Sequence[str],
    cells: Sequence[Sequence[str]],
    longest: Sequence[int],
) -> None:
    """Print a table that is wider than the screen: what is long comes in lines of its own."""
    import textwrap

    from rich.text import Text

    kept = [n for n in range(1, len(columns)) if longest[n] <= _SHORT]
    below = [n for n in range(1, len(columns)) if n not in kept]
    # What the next command will be typed with stands first, and alone if it has to.
    room = console.width - sum(longest[n] + 2 for n in kept)
    first = min(longest[0], max(_SHORT, room))
    heading = [name.upper() for name in columns]
    for row in [heading, *cells]:
        line = Text(row[0].ljust(first))
        if len(row[0]) > first:
            line = Text(row[0] + "\n" + " " * first)
        for n in kept:
            line.append("  ")
            line.append(row[n].ljust(longest[n]), style=STATE_STYLES.get(row[n], ""))
        line.rstrip()
        if row is heading:
            line.stylize("bold")
        console.print(line, soft_wrap=True)
        for n in () if row is heading else below:
            for words in textwrap.wrap(f"{columns[n]}: {row[n]}", console.width - 4):
                console.print(Text("    " + words), soft_wrap=True)


_STATUS_WIDTH, _CHECK_WIDTH = 9, 19


def print_finding(status: str, check: str, found: str, remedy: str | None) -> None:
    """Print one thing that was looked at, with its remedy in lines of its own, at once.

    On a terminal what does not fit into a line goes on below, under the words; a pipe gets one
    line each.
    """
    import textwrap

    indent = " " * (_STATUS_WIDTH + _CHECK_WIDTH)
    lines = [printable(found)] + ([f"-> {printable(remedy)}"] if remedy else [])
    if sys.stdout.isatty():
        width = max(24, screen_size()[0] - len(indent))
        lines = [
            line
            for text in lines
            for line in textwrap.wrap(
                text,
                width,
                subsequent_indent="   " if text.startswith("-> ") else "",
                break_on_hyphens=False,
            )
        ]
    rest = f"{check.ljust(_CHECK_WIDTH - 1)} {lines[0]}"
    _print_styled((status.ljust(_STATUS_WIDTH), STATE_STYLES.get(status, "")), (rest, ""))
    for line in lines[1:]:
        print(indent + line)
    sys.stdout.flush()


def _print_styled(*words: tuple[str, str]) -> None:
    """Print a line of words in their styles, if a terminal is there to show them."""
    if not sys.stdout.isatty():
        print("".join(text for text, _ in words))
        return
    from rich.console import Console
    from rich.text import Text

    Console().print(Text.assemble(*words), soft_wrap=True)


def print_sheet(title: str, values: Mapping[str, object]) -> None:
    """Print one thing's values, a line each, under a title."""
    print(f"{printable(title)}:")
    for key, value in values.items():
        if isinstance(value, list | tuple) and value:
            print(f"\t{key}:")
            for item in value:
                print(f"\t\t{printable(item)}")
        else:
            print(f"\t{key}: {printable(None if value == [] else value)}")


def can_print(text: str) -> bool:
    """Tell whether stdout's encoding has all of these characters."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def print_coloured(
    text: str, styles: Mapping[str, str], replacements: Mapping[int, str | int | None]
) -> None:
    """Print a line, each character in the style it has, if a terminal is there to show it.

    Args:
        text: the line.
        styles: the style of each character.
        replacements: what is printed instead, as `str.translate` takes it.
    """
    if not sys.stdout.isatty():
        print(text.translate(replacements))
        return
    from itertools import groupby

    from rich.console import Console
    from rich.text import Text

    line = Text()
    for character, group in groupby(text):
        shown = character.translate(replacements)
        line.append(shown * len(list(group)), style=styles.get(character, ""))
    Console().print(line, soft_wrap=True)


class ProgressBar:
    """A bar on stderr with rate and time left; made by `progress`."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def begin(self, what: str, total: int | None) -> Callable[[int], None]:
        """Begin a line of `total` bytes (None: not known); give who is told of the progress."""
        task = self._bar.add_task(what, total=total)
        return lambda done: self._bar.update(task, completed=done)


def progress() -> ProgressBar:
    """Give a progress bar, to be used in a `with` block."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return ProgressBar(Progress(*columns, console=Console(stderr=True)))


# Full-screen pictures.


def print_json_line(value: Mapping[str, Any]) -> None:
    """Print `value` as JSON in one line, which is on its way when this returns."""
    print(json.dumps(value, ensure_ascii=sys.stdout.isatty(), default=str), flush=True)


def can_paint() -> bool:
    """Tell whether stdout is a terminal on which a picture can be kept up to date."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


def screen_size() -> tuple[int, int]:
    """Give columns and lines of the terminal on stdout."""
    try:
        size = os.get_terminal_size(sys.stdout.fileno())
    except OSError:
        return 80, 24
    # A terminal that does not know its size (a serial line) says 0.
    return size.columns or 80, size.lines or 24


_NOTHING: Sequence[tuple[str, str]] = []


class Screen:
    """The terminal's other screen, painted line by line; what was there comes back at the end.

    Only the lines that have changed are written, so that nothing flickers.
    """

    def __init__(self) -> None:
        from rich.console import Console

        self._console: Console = Console()
        self._painted: list[Sequence[tuple[str, str]]] = []

    def __enter__(self) -> Self:
        self._console.set_alt_screen(True)
        self._console.show_cursor(False)
        self.forget()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._console.show_cursor(True)
        self._console.set_alt_screen(False)

    def forget(self) -> None:
        """Paint everything anew the next time: the terminal may show something else."""
        self._painted = []

    def paint(self, lines: Sequence[Sequence[tuple[str, str]]]) -> None:
        """Show these lines of styled text, each no wider than the screen, from the top."""
        from rich.control import Control
        from rich.segment import Segment, Segments

        segments: list[Segment] = []
        if not self._painted:
            segments += [Control.clear().segment, Control.home().segment]
        for number, (line, before) in enumerate(
            zip_longest(lines, self._painted, fillvalue=_NOTHING)
        ):
            if line == before:
                continue
            segments.append(Control.move_to(0, number).segment)
            segments += _segments(self._console, line)
            lacking = sum(_cells(before)) - sum(_cells(line))
            segments.append(Segment(" " * max(0, lacking)))
        self._painted = list(lines)
        if segments:
            self._console.print(Segments(segments), end="", soft_wrap=True)


def _segments(console: Console, line: Sequence[tuple[str, str]]) -> list[Segment]:
    from rich.segment import Segment

    return [Segment(text, console.get_style(style) if style else None) for text, style in line]


def _cells(line: Sequence[tuple[str, str]]) -> list[int]:
    from rich.cells import cell_len

    return [cell_len(text) for text, _ in line]


def picture_as_svg(lines: Sequence[Sequence[tuple[str, str]]], columns: int, title: str) -> str:
    """Give a picture of a terminal that shows these lines, for documents."""
    import io
    import re

    from rich.console import Console
    from rich.segment import Segment, Segments

    console = Console(
        record=True, width=columns, file=io.StringIO(), force_terminal=True,
        color_system="truecolor", legacy_windows=False,
    )  # fmt: skip
    for line in lines:
        console.print(Segments([*_segments(console, line), Segment("\n")]), end="", soft_wrap=True)
    svg = console.export_svg(title=title)
    # It would fetch fonts from elsewhere, which no page should, and most would not let it.
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
