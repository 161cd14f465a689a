"""What the documents tell to type works, and prints what they show."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from .blocks import PAGES, TYPED, Block, Command, UnmarkedError, blocks, commands, matches, parse
from .shell import PREPARATIONS
from .typed import type_page

NEEDED = ("unshare", "ip", "ss", "qemu-img")


def test_every_block_is_run_or_says_why_not():
    reasons = [
        f"{block.place}: {block.said}"
        for page in PAGES
        for block in blocks(page)
        if block.mark == "not run"
    ]
    print("\n".join(["not run:", *reasons]))
    assert all(len(reason.partition(": ")[2]) > 10 for reason in reasons)


@pytest.mark.parametrize("page", PAGES)
def test_the_marks_make_sense(page):
    for block in blocks(page):
        if block.mark == "run":
            assert page in TYPED[block.said], block.place
        assert set(block.needs) <= set(PREPARATIONS), block.place


@pytest.mark.timeout(600)  # a page's commands one after the other, beside other tests
@pytest.mark.parametrize("page", TYPED["host"])
def test_what_is_told_to_type_works(page, tmp_path):
    for program in NEEDED:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    if subprocess.run(["unshare", "-mnr", "true"], capture_output=True).returncode:
        pytest.skip("no namespaces here")
    assert type_page(page, "host", tmp_path)


# The test's own parts.


def test_a_block_without_a_mark_is_found():
    with pytest.raises(UnmarkedError, match="page:2"):
        parse("page", "text\n```console\n$ true\n```\n")


def test_a_block_without_a_fence_is_found():
    with pytest.raises(UnmarkedError, match="page:3"):
        parse("page", "text\n\n    $ true\n")


def test_commands_and_what_they_print():
    lines = ("$ one", "> more", "prints", "$ two", "$ three", "fails", "(it fails)")
    block = Block("page:1", "console", "run", "host", (), lines)
    assert commands(block) == [
        Command("page:2", "one\nmore", ["prints"]),
        Command("page:5", "two", []),
        Command("page:6", "three", ["fails"], fails=True),
    ]


@pytest.mark.parametrize(
    ("shown", "printed", "matched"),
    [
        (["a"], ["a"], True),
        (["a"], ["b"], False),
        (["a"], ["a", "b"], False),
        (["in ... ms"], ["in 0.3 ms"], True),
        (["in ... ms"], ["in 0.3 s"], False),
        (["a", "..."], ["a", "b", "c"], True),
        (["...", "c"], ["a", "b"], False),
        ([], [], True),
        ([], ["a"], False),
    ],
)
def test_what_is_shown_and_what_is_printed(shown, printed, matched):
    assert matches(shown, printed) is matched
