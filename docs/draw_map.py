"""Draw docs/map.svg: what `nbdlink map` shows, of an image that was made up for it.

python docs/draw_map.py > docs/map.svg
"""

from __future__ import annotations

import random
from itertools import groupby

from nbdlink.cli import output
from nbdlink.cli.map import STYLES, Drawing, Row, describe
from nbdlink.protocol.constants import ALLOCATION_CONTEXT, AllocationFlag
from nbdlink.sizes import format_size

COLUMNS = 92
SIZE = 64 << 30
HOLE = int(AllocationFlag.HOLE | AllocationFlag.ZERO)
ZERO = int(AllocationFlag.ZERO)


def extents() -> list[Row]:
    """Give the extents of a disk of which a fifth is in use, the front most of all."""
    chance = random.Random(7)
    found: list[Row] = []
    at = 0
    while at < SIZE:
        length = min(chance.choice((16 << 20, 64 << 20, 256 << 20)), SIZE - at)
        share = 0.9 if at < SIZE // 16 else 0.35 if at < SIZE // 3 else 0.04
        kind = 0 if chance.random() < share else HOLE
        if SIZE // 2 < at < SIZE // 2 + (3 << 30):
            kind = ZERO
        found.append(Row(at, length, kind))
        at += length
    return found


def main() -> None:
    """Print the picture."""
    drawing = Drawing(SIZE, ALLOCATION_CONTEXT, COLUMNS)
    for row in extents():
        drawing.add(row)
    lines = [
        [("$ nbdlink map nbd://store1/debian", "bold")],
        [(f"nbd://store1/debian: {format_size(SIZE)}", "")],
        [("".join(same), STYLES[sign]) for sign, same in groupby(drawing.cells())],
        [],
        [("   ", ""), ("KIND       BYTES        SHARE", "bold")],
    ]
    signs = {0: "\N{FULL BLOCK}", ZERO: "\N{BOX DRAWINGS LIGHT HORIZONTAL}", HOLE: "\N{MIDDLE DOT}"}
    for kind, sign in signs.items():
        size = drawing.totals.get(kind, 0)
        words = f"{describe(ALLOCATION_CONTEXT, kind):9}  {size:<11}  {100 * size / SIZE:.1f}%"
        lines.append([(f"{sign}  ", STYLES[sign]), (words, "")])
    print(output.picture_as_svg(lines, COLUMNS, "nbdlink map"))


if __name__ == "__main__":
    main()
