"""What `nbdlink watch` draws: it fits, says the important, and keeps the terminal from harm."""

from __future__ import annotations

import importlib.util
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest

from nbdlink.cli import output, screen
from nbdlink.link.watch import Link, Notice

spec = importlib.util.spec_from_file_location(
    "draw_watch", Path(__file__).parents[2] / "docs/draw_watch.py"
)
draw_watch = importlib.util.module_from_spec(spec)
spec.loader.exec_module(draw_watch)

VIEW = draw_watch.view()
LINK, ACTIVITY = VIEW.links[0]


def drawn(view=VIEW, width=80, height=24, glyphs=screen.UNICODE):
    lines = screen.picture(view, width, height, glyphs)
    return ["".join(text for text, _ in line) for line in lines]


def columns(text):
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


@pytest.mark.parametrize("width", [1, 2, 10, 40, 79, 80, 91, 100, 117, 118, 130, 250])
@pytest.mark.parametrize("height", [1, 2, 7, 8, 9, 12, 24, 60])
@pytest.mark.parametrize("links", [0, 1, 4, 40])
def test_it_fits(width, height, links):
    some = [(replace(LINK, index=n, name=f"link{n}"), ACTIVITY) for n in range(links)]
    lines = drawn(replace(VIEW, links=some, missing=["other"]), width, height)
    assert len(lines) <= height
    assert max(map(columns, lines)) <= width


def test_eighty_columns_show_every_number():
    text = "\n".join(drawn())
    for word in ("nbd0", "data", "attached", "4/4", "kernel", "108M", "21M", "11k", "0.41ms"):
        assert word in text
    assert screen.UNICODE.more not in text


def test_more_columns_show_more():
    wide = "\n".join(drawn(width=140))
    assert "ROUTE" in wide
    assert "BUSY" in wide


def test_what_is_in_trouble_is_shown_before_what_is_well():
    good = [(replace(LINK, index=n), ACTIVITY) for n in range(30)]
    bad = (replace(LINK, index=30, name="bad", state="dead", live=0), None)
    lines = drawn(replace(VIEW, links=[*good, bad]))
    assert any("nbd30" in line and "dead" in line for line in lines)
    shown = sum("nbd" in line and "/4" in line for line in lines)
    assert any(f"and {31 - shown} more" in line for line in lines)


def test_what_is_not_attached_is_shown():
    assert any("lost is not attached" in line for line in drawn(replace(VIEW, missing=["lost"])))


def test_nothing_is_shown_as_nothing():
    assert "nothing is attached" in drawn(screen.View([]))


def test_events_are_shown_newest_first():
    lines = drawn()
    first, second = (n for n, line in enumerate(lines) if "connection died" in line and n > 8
                     and ("nbd1" in line or "nbd3" in line))  # fmt: skip
    assert "1/2 up" in lines[first]
    assert "0/1 up" in lines[second]


def test_many_devices_at_once_are_one_event():
    notices = [Notice(5.0, "appeared", n, None, "the kernel made the device") for n in range(16)]
    lines = drawn(replace(VIEW, notices=notices))
    (line,) = (line for line in lines if "the kernel made" in line)
    assert "nbd0 and 15 more" in line


def test_a_hanging_device_shows_its_queue():
    activity = draw_watch.activity(0, 0, 0)
    activity.rates = replace(activity.rates, in_flight=7)
    lines = drawn(replace(VIEW, links=[(LINK, activity)], notices=[]))
    (line,) = (line for line in lines if "4/4" in line)
    assert "7.0" in line


def test_names_cannot_steer_the_terminal():
    nasty = replace(LINK, name="a\x1b[2Jb", target="nbd://h/\x1b]0;x", routes=("h\x07",))
    notice = Notice(1.0, "moved", 0, "n\x1b", "now\x9b over")
    for width in (80, 140):
        for line in drawn(replace(VIEW, links=[(nasty, ACTIVITY)], notices=[notice]), width):
            assert line.isprintable()


def test_wide_characters_keep_columns_straight():
    wide = replace(LINK, name="データ")
    lines = drawn(replace(VIEW, links=[(LINK, ACTIVITY), (wide, ACTIVITY)], notices=[]))
    ends = {columns(line[: line.index("4/4")]) for line in lines if "4/4" in line}
    assert len(ends) == 1


def test_ascii_will_do():
    text = "".join(drawn(glyphs=screen.ASCII))
    assert text.isascii()


@pytest.mark.parametrize(
    ("value", "base", "text"),
    [
        (0, 1024, "0"),
        (0.4, 1000, "0"),
        (87, 1000, "87"),
        (999, 1000, "999"),
        (999.7, 1000, "1.0k"),
        (1000, 1024, "1.0K"),
        (1536, 1024, "1.5K"),
        (112 << 20, 1024, "112M"),
        (1 << 50, 1024, "1.0P"),
    ],
)
def test_numbers_are_short(value, base, text):
    assert screen.amount(value, base) == text


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [(None, "-"), (0.0, "0.00ms"), (9.994, "9.99ms"), (12.34, "12.3ms"), (250, "250ms"),
     (1200, "1.2s"), (250_000, "250s")],
)  # fmt: skip
def test_times_are_short(milliseconds, text):
    assert screen.latency(milliseconds) == text


def test_the_picture_in_the_documents_is_what_is_drawn():
    svg = output.picture_as_svg(
        screen.picture(VIEW, draw_watch.COLUMNS, draw_watch.LINES, screen.UNICODE),
        draw_watch.COLUMNS,
        "nbdlink watch",
    )
    assert svg.startswith("<svg")
    assert "url(http" not in svg
    for word in ("nbd0", "backup", "store1:10809"):
        assert word in svg


def test_a_link_that_was_never_measured_has_no_numbers():
    lines = drawn(replace(VIEW, links=[(Link(0, None, "unknown", 0, None, None), None)]))
    assert any("unknown" in line and "?/?" in line for line in lines)
