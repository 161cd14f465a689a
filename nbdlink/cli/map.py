"""`nbdlink map`: what is allocated, drawn as a bar, and told as extents.

The JSON is that of `nbdinfo --map --json`, so that scripts can read either.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from nbdlink.cli.tls import add_client_arguments, client_options
from nbdlink.errors import ConfigError
from nbdlink.protocol.constants import ALLOCATION_CONTEXT, AllocationFlag
from nbdlink.sizes import format_size, parse_seconds

if TYPE_CHECKING:
    from nbdlink.client.connection import Connection
    from nbdlink.client.security import Security
    from nbdlink.protocol.chunks import Extent
    from nbdlink.uri import Target

_DEPTH = "qemu:allocation-depth"
_BITMAP = "qemu:dirty-bitmap:"
_FEW = 24
"""Extents that are listed without being asked for."""

# From a cell with hardly any data to one that is all data; and what a cell without any shows.
_SHADES = "\N{LIGHT SHADE}\N{MEDIUM SHADE}\N{DARK SHADE}\N{FULL BLOCK}"
_ZERO = "\N{BOX DRAWINGS LIGHT HORIZONTAL}"
_HOLE = "\N{MIDDLE DOT}"
_DEEPER = "+"  # than nine backing files; the others have their number
_ASCII = str.maketrans(dict(zip(_SHADES + _ZERO + _HOLE, ":=x#-.", strict=True)))

_STYLES = {**dict.fromkeys(_SHADES, "green"), _ZERO: "yellow", _HOLE: "bright_black"}


class Row(NamedTuple):
    """An extent, as it is told."""

    offset: int
    length: int
    type: int


def add_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """Fill the parser of `map`."""
    add = parser.add_argument
    add("target", metavar="TARGET", help="host[:port][/export] or an NBD URI")
    add("--json", action="store_true", help="print JSON")
    add("--extents", action="store_true", help=f"list the extents, even more than {_FEW}")
    add("--totals", action="store_true", help="tell how much there is of each kind, no more")
    add(
        "--context",
        metavar="NAME",
        default=ALLOCATION_CONTEXT,
        help=f"another metadata context than {ALLOCATION_CONTEXT}",
    )
    add(
        "--timeout",
        metavar="S",
        type=parse_seconds,
        default=15.0,
        help="seconds for the negotiation (15)",
    )
    add_client_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the map of an export."""
    from nbdlink.cli import output
    from nbdlink.client.connection import connect
    from nbdlink.client.security import Security
    from nbdlink.uri import Target

    target, context = Target.parse(arguments.target), arguments.context
    security = Security(target, client_options(arguments))
    with connect(target, timeout=arguments.timeout, contexts=(context,), security=security) as nbd:
        if context not in nbd.contexts:
            _cannot_tell(target, context, arguments.timeout, security)
        size = nbd.size
        if arguments.json and not arguments.totals:
            output.print_json([_sheet(row, context) for row in _rows(nbd, context)])
            return 0
        drawing = Drawing(size, context, shutil.get_terminal_size().columns)
        listed: list[Row] = []
        for row in _rows(nbd, context):
            drawing.add(row)
            if arguments.extents or len(listed) <= _FEW:
                listed.append(row)
    if arguments.json:
        output.print_json(list(_totals(drawing.totals, size, context)))
    elif arguments.totals:
        for total in _totals(drawing.totals, size, context):
            words = total.get("description", "")
            line = f"{total['size']:10}  {total['percent']:5.1f}% {total['type']:3} {words}"
            print(line.rstrip())
    else:
        _print_drawing(drawing, str(target))
        if listed and (arguments.extents or len(listed) <= _FEW):
            print()
            columns = ("offset", "length", "type", "description")
            rows = [(*row, describe(context, row.type)) for row in listed]
            output.print_table(columns, rows)
    return 0


def _cannot_tell(target: Target, context: str, timeout: float, security: Security) -> None:
    """Say that the server cannot tell what is allocated; any other context is an error."""
    if context == ALLOCATION_CONTEXT:
        print(
            f"nbdlink: {target.address} cannot tell what is allocated: all is shown as data",
            file=sys.stderr,
        )
        return
    from nbdlink.client.negotiate import Negotiation

    with Negotiation.best(target, timeout=timeout, security=security) as negotiation:
        has = negotiation.list_meta_contexts()
    raise ConfigError(
        f"{target.address}: the export has no metadata context {context!r}",
        hint=f"it has {', '.join(has)}" if has else "it has none at all",
    )


def _rows(nbd: Connection, context: str) -> Iterator[Row]:
    offset = 0
    extents: Iterable[Extent] = nbd.extents(context=context)
    for extent in extents:
        yield Row(offset, extent.length, extent.flags)
        offset += extent.length


def describe(context: str, kind: int) -> str | None:
    """Give the words for an extent's flags in a context, as nbdinfo does; None if unknown."""
    if context == ALLOCATION_CONTEXT:
        return {0: "data", 1: "hole", 2: "zero", 3: "hole,zero"}.get(kind)
    if context == _DEPTH:
        return {0: "absent", 1: "local"}.get(kind, f"backing depth {kind}")
    if context.startswith(_BITMAP):
        return {0: "clean", 1: "dirty"}.get(kind)
    return None


def _sheet(row: Row, context: str) -> dict[str, Any]:
    sheet: dict[str, Any] = {"offset": row.offset, "length": row.length, "type": row.type}
    if words := describe(context, row.type):
        sheet["description"] = words
    return sheet


def _totals(totals: dict[int, int], size: int, context: str) -> Iterator[dict[str, Any]]:
    for kind, amount in sorted(totals.items()):
        share = 100 * amount / size if size else 0.0
        total: dict[str, Any] = {"size": amount, "percent": round(share, 4), "type": kind}
        if words := describe(context, kind):
            total["description"] = words
        yield total


def _sign(context: str, kind: int) -> str:
    """Say what stands for a kind: data, zeroes that take space, or nothing there."""
    if context == ALLOCATION_CONTEXT:
        if not kind & AllocationFlag.ZERO:
            return _SHADES[-1]
        return _HOLE if kind & AllocationFlag.HOLE else _ZERO
    if context == _DEPTH and kind > 1:
        return str(kind) if kind < 10 else _DEEPER
    return _SHADES[-1] if kind else _HOLE


class Drawing:
    """An export as a row of cells, each of which stands for as many bytes as the others.

    Attributes:
        context: which metadata context is drawn.
        size: bytes in the export.
        totals: bytes of each kind.
    """

    def __init__(self, size: int, context: str, width: int) -> None:
        self.context = context
        self.size = size
        self.totals: dict[int, int] = {}
        self._width = max(1, min(width, size))
        self._cells: list[dict[str, int]] = [{} for _ in range(self._width)]

    def add(self, row: Row) -> None:
        """Draw an extent."""
        self.totals[row.type] = self.totals.get(row.type, 0) + row.length
        sign, size, width = _sign(self.context, row.type), self.size, self._width
        at, end = row.offset, row.offset + row.length
        while at < end:
            cell = at * width // size
            edge = min(end, -(-(cell + 1) * size // width))  # where the next cell begins
            self._cells[cell][sign] = self._cells[cell].get(sign, 0) + edge - at
            at = edge

    def cells(self) -> str:
        """Give the row: shades for data, by how much of it there is, and what else there is."""
        return "".join(map(self._cell, self._cells))

    def _cell(self, cell: dict[str, int]) -> str:
        data, total = cell.get(_SHADES[-1], 0), sum(cell.values())
        if data:
            # All data is the full block, and anything at all can be seen.
            return _SHADES[data * (len(_SHADES) - 1) // total]
        return max(cell, key=cell.__getitem__, default=_HOLE)


def _print_drawing(drawing: Drawing, title: str) -> None:
    from nbdlink.cli import output

    signs = _SHADES + _ZERO + _HOLE
    plain = _ASCII if not output.can_print(signs) else {}
    print(f"{output.printable(title)}: {format_size(drawing.size)}")
    output.print_coloured(drawing.cells(), _STYLES, plain)
    print()
    columns = ("", "kind", "bytes", "share")
    rows = [
        (
            _sign(drawing.context, total["type"]).translate(plain),
            total.get("description", total["type"]),
            total["size"],
            f"{total['percent']:.1f}%",
        )
        for total in _totals(drawing.totals, drawing.size, drawing.context)
    ]
    output.print_table(columns, rows)
    full = _SHADES[-1].translate(plain)
    if word := next((row[1] for row in rows if row[0] == full), None):
        print(f"{' '.join(_SHADES[:-1]).translate(plain)}  partly {word}")
