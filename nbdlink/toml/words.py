"""What is wrong in a file, in words."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Final

from nbdlink.errors import ConfigError
from nbdlink.transport.tlsfiles import printable

_OPTION: Final = re.compile(r"(?<!\S)--(?=[a-z])")
"""The hyphens of an option, which its key does not have."""


def at(source: str, error: ConfigError) -> ConfigError:
    """Give an error that says where it is; options have the names that they have in files."""
    message, hint = (
        None if text is None else _OPTION.sub("", text) for text in (str(error), error.hint)
    )
    return ConfigError(f"{printable(source)}: {message}", hint=hint)


def of_key(key: str, error: ConfigError) -> ConfigError:
    """Give an error of what was said for a key, with the key in it."""
    # "takes a number" and "is empty" are said of the key; other sentences stand by themselves.
    link = " " if str(error).startswith(("takes ", "is ")) else ": "
    return ConfigError(f"{key}{link}{error}", hint=error.hint)


def read_text(value: object, what: str = "a text", *, empty: bool = False) -> str:
    """Read a text.

    Args:
        value: what was said.
        what: what is taken, for messages.
        empty: whether it may be empty.

    Raises:
        ConfigError: it is none, or one that no path and no name can be; see `of_key`.
    """
    if not isinstance(value, str):
        raise expected(what, value)
    if "\0" in value:
        raise ConfigError(f"takes {what}, and that cannot contain NUL")
    if not value and not empty:
        raise ConfigError("is empty", hint="leave it out, or give it a value")
    return value


def nearest(word: str, known: Iterable[str]) -> str:
    """Give a hint for a word that is not known."""
    known = list(known)
    near = difflib.get_close_matches(word, known, 1)
    return f"did you mean {near[0]}?" if near else "known: " + ", ".join(known)


def expected(what: str, value: object) -> ConfigError:
    """Give an error that begins with "takes", for `at` to say of what."""
    match value:
        case bool():
            said = str(value).lower()
        case int() if abs(value) >= 1 << 63:
            said = "a number that large"  # Python refuses to print one of 5000 digits
        case int() | float():
            said = f"the number {value}"
        case str():
            shown = value if len(value) <= 60 else value[:60] + "..."
            said = f'the text "{printable(shown)}"'
        case list():
            said = "a list"
        case dict():
            said = "a table"
        case _:
            said = "a date or time"
    return ConfigError(f"takes {what}, not {said}")
