"""How results reach the screen: tables, key-value sheets, JSON. The only importer of rich.

Values go to stdout and talk to stderr. rich is imported only where a terminal is there to be
drawn on; a pipe gets plain aligned columns, without colour.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

# What a state looks like at a glance.
STATE_STYLES = {"attached": "green", "ok": "green", "warning": "yellow", "unknown": "yellow"}


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


def _print_rich_table(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, name in enumerate(columns):
        # The first column is what the next command will be typed with: never folded.
        table.add_column(name.upper(), no_wrap=number == 0, overflow="fold")
    for row in cells:
        table.add_row(*(Text(cell, style=STATE_STYLES.get(cell, "")) for cell in row))
    Console().print(table)


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
