"""docs/moving.md: each row of the others' manuals names tests that are there."""

from __future__ import annotations

import ast
import functools
import re

import pytest

from .blocks import ROOT

PAGE = ROOT / "docs" / "moving.md"
NAMED = re.compile(r"`([\w/]+\.py)::(\w+)`")


def rows():
    """Give the rows of the tables of what each program can do: its name, and the row's cells."""
    program = ""
    for line in PAGE.read_text().splitlines():
        if line.startswith("## "):
            program = line.removeprefix("## ")
        elif program and line.startswith("| ") and not line.startswith(("| ---", "| its manual")):
            yield program, [cell.strip() for cell in line.strip("|").split(" | ")]


@functools.cache
def names_of_tests(path):
    tree = ast.parse((ROOT / "tests" / path).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(("program", "cells"), list(rows()), ids=lambda value: str(value)[:40])
def test_each_row_names_tests_that_are_there(program, cells):
    _, _, shown_by = cells
    named = NAMED.findall(shown_by)
    assert named
    assert [f"{path}::{test}" for path, test in named if test not in names_of_tests(path)] == []


def test_no_row_of_enbd_servers_manual_is_missing():
    assert sum(program == "enbd-server" for program, _ in rows()) == 18
