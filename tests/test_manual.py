"""The manual pages: complete, true to the parser, and well set.

The parser knows what a command takes, the pages say it to people, and each of them is checked
against the other: whoever adds an option is told which page lacks it.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
from pathlib import Path

import pytest

from nbdlink.cli.main import VERBS, build_parser
from nbdlink.cli.serveconfig import EXPORT_KEYS, OWN_KEYS, SERVER_KEYS
from nbdlink.link.config.settings import SETTINGS

MAN = Path(__file__).parents[1] / "man"
PAGES = sorted(MAN.iterdir())
OVERVIEWS = ("nbdlink.8", "nbdlink-concepts.7", "nbdlink-tls.7", "nbdlink.service.8")

# Between an option and the next one on a line that begins with `.It Fl`.
_NEXT = re.compile(r" ?, Fl ")


def parser_of(verb):
    (subparsers,) = (a for a in build_parser(verb)._actions if a.dest == "verb")
    return subparsers.choices[verb]


def page_of(verb):
    return (MAN / f"nbdlink-{verb}.8").read_text()


def options_of(verb):
    """Give the actions with option strings, but for the help, which every verb has."""
    return [
        action
        for action in parser_of(verb)._actions
        if action.option_strings and not isinstance(action, argparse._HelpAction)
    ]


def names_of(action):
    """Give an option's strings; what may begin with one hyphen or two is described with one."""
    strings = action.option_strings
    return [name for name in strings if not (name.startswith("--") and name[1:] in strings)]


def described(verb):
    """Give the options that a page has an item for, each with whether a value follows."""
    found = {}
    for line in re.findall(r"^\.It Fl (.*)$", page_of(verb), re.M):
        waiting = []
        for part in _NEXT.split(line):
            name, _, value = part.partition(" ")
            waiting.append(f"-{name}")
            if value:
                found.update(dict.fromkeys(waiting, True))
                waiting = []
        found.update(dict.fromkeys(waiting, False))
    return found


def section(page, title):
    text = re.search(rf"^\.Sh {title}$(.*?)(?=^\.Sh |\Z)", page, re.M | re.S)
    return text[1] if text else ""


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_of_the_parser_is_described(verb):
    """Ask for one of its names: those of another program may come with one dash or two."""
    found = set(described(verb))
    missing = [action for action in options_of(verb) if found.isdisjoint(action.option_strings)]
    assert [action.option_strings for action in missing] == []


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_described_is_one_of_the_parser(verb):
    known = {name for action in options_of(verb) for name in names_of(action)}
    assert set(described(verb)) - known == set()


@pytest.mark.parametrize("verb", VERBS)
def test_no_page_speaks_of_an_option_that_does_not_exist(verb):
    known = {name for action in options_of(verb) for name in names_of(action)}
    mentioned = {f"-{name}" for name in re.findall(r"\bFl (-?[a-zA-Z0-9][\w-]*)", page_of(verb))}
    assert mentioned - known - {"-h", "--help"} == set()


@pytest.mark.parametrize("verb", VERBS)
def test_a_value_is_described_where_one_is_taken(verb):
    takes = {name: action.nargs != 0 for action in options_of(verb) for name in names_of(action)}
    found = described(verb)
    assert {name: found[name] for name in takes.keys() & found.keys()} == {
        name: takes[name] for name in takes.keys() & found.keys()
    }


@pytest.mark.parametrize("verb", VERBS)
def test_every_choice_is_described(verb):
    words = set(re.findall(r"[\w+-]+", page_of(verb)))
    missing = {
        f"{action.option_strings or action.dest}: {choice}"
        for action in parser_of(verb)._actions
        for choice in action.choices or ()
        if str(choice) not in words
    }
    assert missing == set()


@pytest.mark.parametrize("verb", VERBS)
def test_every_operand_is_in_the_synopsis(verb):
    synopsis = section(page_of(verb), "SYNOPSIS")
    for action in parser_of(verb)._actions:
        if not action.option_strings and isinstance(action.metavar, str):
            for word in re.findall(r"[A-Z]{2,}|/dev/\w+", action.metavar):
                assert word in synopsis


def test_the_overview_leads_to_every_verb():
    page = (MAN / "nbdlink.8").read_text()
    missing = [
        verb
        for verb in VERBS
        if f".It Cm {verb}\n" not in page or f".Xr nbdlink-{verb} 8" not in page
    ]
    assert missing == []


def test_every_page_of_a_verb_has_its_verb():
    pages = {path.name for path in PAGES if path.suffix == ".8"} - set(OVERVIEWS)
    assert pages == {f"nbdlink-{verb}.8" for verb in VERBS}


@pytest.mark.parametrize(
    ("title", "keys"),
    [("KEYS", SETTINGS), ("EXPORTS", (*OWN_KEYS, *EXPORT_KEYS)), ("SERVER", SERVER_KEYS)],
)
def test_every_key_of_a_file_is_described(title, keys):
    text = section((MAN / "nbdlink.toml.5").read_text(), title)
    items = " ".join(re.findall(r"^\.It Li (.*?) No", text, re.M))
    assert set(re.findall(r"[a-z][a-z-]+", items)) == set(keys)


def test_every_reference_leads_to_a_page():
    names = {path.name for path in PAGES}
    missing = {
        f"{path.name}: {name}.{number}"
        for path in PAGES
        for name, number in re.findall(r"^\.Xr (nbdlink\S*) (\d)", path.read_text(), re.M)
        if f"{name}.{number}" not in names
    }
    assert missing == set()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_mandoc_has_nothing_to_say(path):
    done = subprocess.run(
        ["mandoc", "-T", "lint", "-W", "warning", path], capture_output=True, text=True
    )
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_page_fits_a_terminal_of_80_columns(path):
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "MANWIDTH": "80", "MANPAGER": "cat"}
    done = subprocess.run(
        ["man", "--warnings", "--local-file", path],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert done.stderr == ""
    text = re.sub("\x1b\\[[0-9;]*m|.\b", "", done.stdout)
    # A line of /etc/fstab cannot be broken.
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("/dev/disk/")]
    assert [line for line in lines if len(line) > 80] == []
