"""`nbdlink map` from the command line: the drawing, the tables, the JSON."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdlink.cli.main import main
from nbdlink.cli.map import Drawing, Row, _print_drawing, describe
from nbdlink.server import serve_in_thread

from .programs import nbdlink

MIB = 1 << 20
PAGE = Path(__file__).parents[2] / "man" / "nbdlink-map.8"


@pytest.fixture
def uri(tmp_path):
    """Serve 16 MiB: one of data, a hole, half a MiB of data."""
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.write(os.urandom(MIB))
        file.seek(8 * MIB)
        file.write(os.urandom(MIB // 2))
        file.truncate(16 * MIB)
    with serve_in_thread({"": path}, unix=tmp_path / "socket") as service:
        yield service.uri()


EXTENTS = [
    (0, MIB, 0, "data"),
    (MIB, 7 * MIB, 3, "hole,zero"),
    (8 * MIB, MIB // 2, 0, "data"),
    (8 * MIB + MIB // 2, 8 * MIB - MIB // 2, 3, "hole,zero"),
]


def test_json_lists_the_extents_in_documented_keys(uri, capsys):
    assert main(["map", "--json", uri]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [tuple(extent.values()) for extent in listed] == EXTENTS
    documented = re.findall(r"^\.It Li (.+)$", PAGE.read_text(), re.M)
    assert set(listed[0]) <= set(documented)


def test_totals_add_up(uri, capsys):
    assert main(["map", "--json", "--totals", uri]) == 0
    totals = json.loads(capsys.readouterr().out)
    assert [(t["size"], t["type"]) for t in totals] == [
        (3 * MIB // 2, 0),
        (29 * MIB // 2, 3),
    ]
    assert sum(t["percent"] for t in totals) == pytest.approx(100)
    lines = [
        key
        for line in re.findall(r"^\.It Li (.+)$", PAGE.read_text(), re.M)
        for key in line.split(" , ")
    ]
    assert set(totals[0]) <= set(lines)


def test_the_bar_is_as_wide_as_the_terminal_and_has_no_colours_in_a_pipe(uri):
    done = nbdlink("map", uri, env={**os.environ, "COLUMNS": "32", "PYTHONIOENCODING": "utf-8"})
    title, bar, *rest = done.stdout.splitlines()
    assert title.endswith(": 16M")
    full, half, none = "\N{FULL BLOCK}", "\N{FULL BLOCK}", "\N{MIDDLE DOT}"
    assert bar == full * 2 + none * 14 + half + none * 15
    assert "\x1b" not in done.stdout
    assert any(line.split() == ["0", str(MIB), "0", "data"] for line in rest)


def test_a_terminal_without_such_characters_gets_plain_ones(uri):
    done = nbdlink("map", uri, env={**os.environ, "COLUMNS": "32", "PYTHONIOENCODING": "ascii"})
    assert done.stdout.splitlines()[1] == "##" + "." * 14 + "#" + "." * 15


def test_many_extents_are_listed_only_if_asked_for(tmp_path, capsys):
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        for at in range(0, 60, 2):
            file.seek(at * 65536)
            file.write(b"x" * 65536)
    with serve_in_thread({"": path}, unix=tmp_path / "socket") as service:
        assert main(["map", service.uri()]) == 0
        assert "OFFSET" not in capsys.readouterr().out
        assert main(["map", "--extents", service.uri()]) == 0
        assert f"{58 * 65536} " in capsys.readouterr().out


def test_a_context_that_the_export_lacks_is_an_error_that_says_what_it_has(uri, capsys):
    assert main(["map", "--context", "qemu:nothing", uri]) == 2
    what, hint = capsys.readouterr().err.splitlines()
    assert "no metadata context 'qemu:nothing'" in what
    assert "base:allocation" in hint


sizes = st.lists(st.tuples(st.integers(1, 1 << 33), st.integers(0, 3)), min_size=1, max_size=30)


@given(extents=sizes, width=st.integers(1, 200))
def test_every_byte_is_drawn_once(extents, width):
    size = sum(length for length, _ in extents)
    drawing = Drawing(size, "base:allocation", width)
    at = 0
    for length, kind in extents:
        drawing.add(Row(at, length, kind))
        at += length
    assert len(drawing.cells()) == min(width, size)
    assert sum(drawing.totals.values()) == size
    drawn = [sum(cell.values()) for cell in drawing._cells]
    assert sum(drawn) == size
    assert max(drawn) - min(drawn) <= 1


def test_a_cell_is_shaded_by_how_much_of_it_is_data():
    drawing = Drawing(400, "base:allocation", 4)
    at = 0
    for data in (1, 40, 99, 100):
        drawing.add(Row(at, data, 0))
        if data < 100:
            drawing.add(Row(at + data, 100 - data, 2))
        at += 100
    assert drawing.cells() == ("\N{LIGHT SHADE}\N{MEDIUM SHADE}\N{DARK SHADE}\N{FULL BLOCK}")


def test_each_backing_file_has_its_number():
    drawing = Drawing(13, "qemu:allocation-depth", 13)
    for depth in range(13):
        drawing.add(Row(depth, 1, depth))
    assert drawing.cells() == "\N{MIDDLE DOT}\N{FULL BLOCK}23456789+++"


@pytest.mark.parametrize(
    ("context", "kinds", "says"),
    [
        ("base:allocation", (3, 0), "partly data"),
        ("qemu:dirty-bitmap:x", (0, 1), "partly dirty"),
        ("qemu:allocation-depth", (2, 1), "partly local"),
    ],
)
def test_the_legend_says_what_is_shaded(context, kinds, says, capsys):
    drawing = Drawing(100, context, 10)
    for at, kind in enumerate(kinds):
        drawing.add(Row(50 * at, 50, kind))
    _print_drawing(drawing, "disk")
    assert capsys.readouterr().out.splitlines()[-1].endswith(says)


def test_the_legend_has_no_shades_where_nothing_is_shaded(capsys):
    drawing = Drawing(100, "base:allocation", 10)
    drawing.add(Row(0, 100, 3))
    _print_drawing(drawing, "disk")
    assert "partly" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("context", "kind", "words"),
    [
        ("base:allocation", 2, "zero"),
        ("base:allocation", 9, None),
        ("qemu:allocation-depth", 0, "absent"),
        ("qemu:allocation-depth", 3, "backing depth 3"),
        ("qemu:dirty-bitmap:x", 1, "dirty"),
        ("x-other:y", 1, None),
    ],
)
def test_kinds_have_nbdinfos_names(context, kind, words):
    assert describe(context, kind) == words
