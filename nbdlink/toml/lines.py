"""In which line of a TOML file a key is, which `tomllib` does not tell.

Only text that `tomllib` has accepted is looked at, so nothing has to be checked in here. Inline
tables are not looked into: what is said in one counts as said where it begins.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

Path = tuple[str, ...]
"""A key with all the tables around it."""

# No possessive quantifiers: those of groups match wrongly before Python 3.11.5 (gh-106052).
_TOKEN: Final = re.compile(
    r'''
    """ (?: [^"\\] | \\. | "{1,2} (?!") )* "{3,5}
    | \'\'\' (?: [^'] | '{1,2} (?!') )* '{3,5}
    | " (?: [^"\\\n] | \\. )* "
    | ' [^'\n]* '
    | \# [^\n]*
    | [\n\[\]{}=.]
    | [^\s"'\#\[\]{}=.]+
    ''',
    re.VERBOSE | re.DOTALL,
)


@dataclass(slots=True)
class Lines:
    """Where the keys and tables of one file are."""

    _found: dict[Path, int] = field(default_factory=dict)

    def of(self, *path: str) -> int | None:
        """Give the line of a key, or of the innermost table around it that is known."""
        while path:
            if path in self._found:
                return self._found[path]
            path = path[:-1]
        return None

    def add(self, path: Path, line: int) -> None:
        """Keep where a key, and the tables that it opens, were seen first."""
        for length in range(1, len(path) + 1):
            self._found.setdefault(path[:length], line)


def find_lines(text: str) -> Lines:
    """Find the line of each key in valid TOML."""
    lines = Lines()
    table: Path = ()
    tokens = _tokens(text)
    for token, line in tokens:
        if token == "\n" or token.startswith("#"):
            continue
        if token == "[":
            table = _read_key(tokens, "]")
            lines.add(table, line)
        else:
            lines.add(table + _read_key(tokens, "=", token), line)
        _skip_value(tokens)
    return lines


def _tokens(text: str) -> Iterator[tuple[str, int]]:
    line, counted = 1, 0
    for match in _TOKEN.finditer(text):
        line += text.count("\n", counted, match.start())
        counted = match.start()
        yield match[0], line


def _read_key(tokens: Iterator[tuple[str, int]], end: str, first: str = ".") -> Path:
    """Read the parts of a key up to `end`; `first` was read already."""
    parts = []
    token = first
    while token != end:
        if token not in (".", "["):
            parts.append(_unquote(token))
        token, _ = next(tokens, (end, 0))
    return tuple(parts)


def _unquote(token: str) -> str:
    return str(tomllib.loads(f"key = {token}")["key"]) if token[0] in "\"'" else token


def _skip_value(tokens: Iterator[tuple[str, int]]) -> None:
    """Go to the end of the line on which the value, or the table's head, ends."""
    depth = 0
    for token, _ in tokens:
        if token == "\n" and depth <= 0:
            return
        depth += (token in "[{") - (token in "]}")
