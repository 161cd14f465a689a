"""The blocks of a page, and what their marks say."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

# The pages that are typed from, by where that is done.
TYPED = {
    "host": ("README.md", "docs/administration.md", "docs/serving.md"),
    "guest": ("README.md", "docs/administration.md"),
}
PAGES = (*TYPED["host"], "CONTRIBUTING.md")

# What these sections tell to type installs things, which other tests do.
NOT_HERE = {("README.md", title) for title in ("Try it", "Install", "Installation")}

_MARK = re.compile(r"<!-- (run|file|not run): (.+?) -->")
_LANGUAGES = ("console", "sh", "python", "toml", "text")


class UnmarkedError(Exception):
    """A block says neither how it is run nor why not."""


@dataclass(frozen=True)
class Block:
    """A block of a page.

    Attributes:
        place: page:line.
        language: what the fence says.
        mark: "run", "file" or "not run".
        said: where it is run or written, or why not.
        needs: what has to be prepared.
        lines: its content.
    """

    place: str
    language: str
    mark: str
    said: str
    needs: tuple[str, ...]
    lines: tuple[str, ...]


@dataclass
class Command:
    """A command that is typed, and what is printed then.

    Attributes:
        place: page:line.
        text: the command, of one line or several.
        shown: the lines that it prints, or None if nothing is said of them.
        fails: whether it has to fail.
    """

    place: str
    text: str
    shown: list[str] | None = None
    fails: bool = False


def blocks(page: str) -> list[Block]:
    """Give all blocks of a page.

    Raises:
        UnmarkedError: one of them has no mark, or is not fenced.
    """
    return parse(page, (ROOT / page).read_text())


def parse(page: str, text: str) -> list[Block]:
    """Give all blocks of a page's text."""
    found: list[Block] = []
    lines = text.splitlines()
    section, number = "", 0
    while number < len(lines):
        line = lines[number]
        number += 1
        place = f"{page}:{number}"
        skipped = (page, section) in NOT_HERE
        if line.startswith("## "):
            section = line[3:].strip()
        elif line.startswith("    ") and not lines[number - 2].strip() and not skipped:
            raise UnmarkedError(f"{place}: a block without a fence cannot be marked")
        elif line.startswith("```"):
            end = lines.index("```", number)
            content = tuple(lines[number:end])
            before = lines[number - 2]
            number = end + 1
            if skipped:
                continue
            mark = _MARK.fullmatch(before)
            if mark is None or line[3:] not in _LANGUAGES:
                raise UnmarkedError(f"{place}: a block without a mark, or of no known language")
            said, _, needed = (
                mark[2].partition(", with ") if mark[1] == "run" else (mark[2], "", "")
            )
            needs = tuple(needed.split(" and ")) if needed else ()
            found.append(Block(place, line[3:], mark[1], said, needs, content))
    return found


def commands(block: Block) -> list[Command]:
    """Give the commands of a block."""
    page, _, first = block.place.partition(":")
    if block.language != "console":
        return [Command(block.place, "\n".join(block.lines))]
    found: list[Command] = []
    for number, line in enumerate(block.lines, int(first) + 1):
        if line[:2] in ("$ ", "# "):
            found.append(Command(f"{page}:{number}", line[2:]))
        elif line.startswith("> "):
            found[-1].text += "\n" + line[2:]
        elif line == "(it fails)":
            found[-1].fails = True
        else:
            found[-1].shown = [*(found[-1].shown or []), line]
    # Who shows what one command prints shows it of all of them.
    if any(each.shown for each in found):
        for each in found:
            each.shown = each.shown or []
    return found


def matches(shown: list[str], printed: list[str]) -> bool:
    """Tell whether a page shows what was printed; `...` stands for anything."""
    words = []
    for line in shown:
        if line.strip() == "...":
            words.append(r"(?:.*\n)*")
        else:
            words.append(".*".join(map(re.escape, line.rstrip().split("..."))) + r"\n")
    return (
        re.fullmatch("".join(words), "".join(f"{line.rstrip()}\n" for line in printed)) is not None
    )
