"""A TOML file of nbdlink: its tables, where each key of them is, and who may have written it.

Whoever can write such a file can have any block device appear on this machine, or any file of it
served, so files that anybody may write are refused.
"""

from __future__ import annotations

import os
import re
import stat
import tomllib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from nbdlink.errors import ConfigError
from nbdlink.toml.lines import find_lines
from nbdlink.toml.words import nearest
from nbdlink.transport.stream import reason
from nbdlink.transport.tlsfiles import printable, read_file

CONFIGURATION: Final = Path("/etc/nbdlink.toml")
DIRECTORY: Final = Path("/etc/nbdlink.d")

TABLES: Final = ("link", "defaults", "export", "server")
"""What a file may have: whoever reads one kind of them leaves the others alone."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Document:
    """A TOML file that was read.

    Attributes:
        path: the file.
        content: what `tomllib` made of it.
        place: gives `file:line` of a key, as well as it is known.
    """

    path: Path
    content: dict[str, Any]
    place: Callable[..., str]

    def check_tables(self, keys: Collection[str], where: str) -> None:
        """Look whether there is anything but known tables.

        Args:
            keys: what may be said in these, for a hint to who has said it outside.
            where: the tables in which it can be said.

        Raises:
            ConfigError: there is.
        """
        for key in self.content:
            if key not in TABLES:
                raise ConfigError(
                    f"{self.place(key)}: unknown table [{printable(key)}]",
                    hint=f"say {key} in {where}" if key in keys else nearest(key, TABLES),
                )
        for kind in ("link", "export"):
            if not isinstance(self.content.get(kind, {}), dict):
                raise ConfigError(
                    f"{self.place(kind)}: {kind} is not a table", hint=f"say [{kind}.NAME]"
                )

    def read_table(
        self, table: Any, known: Collection[str], read: Callable[[str, Any, str], T], *path: str
    ) -> dict[str, T]:
        """Read all that a table says.

        Args:
            table: what `content` has there.
            known: the keys that may be said in it.
            read: makes of a key, its value and its place what is meant; raises ConfigError.
            path: the table's name, and those of the tables around it.

        Raises:
            ConfigError: it is no table, a key is not known, or what `read` raises.
        """
        title = printable(".".join(path))
        if not isinstance(table, dict):
            raise ConfigError(
                f"{self.place(*path)}: {title} is not a table", hint=f"say [{title}] once"
            )
        values = {}
        for key, value in table.items():
            source = self.place(*path, key)
            if key not in known:
                raise ConfigError(
                    f"{source}: unknown key {printable(key)!r} in [{title}]",
                    hint=nearest(key, known),
                )
            values[key] = read(key, value, source)
        return values


def read_documents(path: Path, directory: Path) -> Iterator[Document]:
    """Read a file, and those of a folder in the order of their names; what is missing is none.

    Raises:
        ConfigError: a file may not be read, may be written by others, or is not TOML.
    """
    if exists(path):
        yield read_document(path)
    for each in _files(directory) if exists(directory) else ():
        yield read_document(each)


def read_document(path: Path) -> Document:
    """Read one file, which has to exist.

    Raises:
        ConfigError: it may not be read, may be written by others, or is not TOML.
    """
    text = read_text(path)
    try:
        content = tomllib.loads(text)
    except RecursionError:
        raise ConfigError(f"{printable(str(path))}: lists or tables nest too deeply") from None
    except ValueError as error:  # a number of 5000 digits is not a TOMLDecodeError
        raise _syntax_error(path, text, str(error)) from None
    lines = find_lines(text)

    def place(*keys: str) -> str:
        line = lines.of(*keys)
        return printable(str(path)) + ("" if line is None else f":{line}")

    return Document(path, content, place)


def read_text(path: Path) -> str:
    """Read a file that says what there shall be.

    Raises:
        ConfigError: it may not be read, may be written by others, or is no text.
    """
    content = read_file(str(path), "the configuration", "`man nbdlink.toml` tells what it may say")
    _refuse_foreign(path, content.mode, content.owner)
    try:
        return content.data.decode()
    except UnicodeDecodeError as error:
        line = content.data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{printable(str(path))}:{line}: not valid UTF-8",
            hint="save the file in the encoding UTF-8",
        ) from None


def exists(path: Path) -> bool:
    """Tell whether there is something, be it a link to nowhere, which `read_file` tells."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise ConfigError(f"{printable(str(path))}: {reason(error)}") from None
    except ValueError:
        raise ConfigError(f"{printable(str(path))}: a path cannot contain NUL") from None
    return True


def _refuse_foreign(path: Path, mode: int, owner: int) -> None:
    """Refuse what somebody else can have written: by mode, or because it is theirs."""
    name = printable(str(path))
    if owner not in (0, os.geteuid()):
        raise ConfigError(
            f"{name}: belongs to user {owner}, who is neither root nor the one who reads it",
            hint=f"if you trust its content: chown root {name}",
        )
    if mode & stat.S_IWOTH:
        raise ConfigError(
            f"{name}: anybody may write it (its mode is {mode:04o})", hint=f"chmod o-w {name}"
        )


def _syntax_error(path: Path, text: str, words: str) -> ConfigError:
    """Put what `tomllib` said, with the line that it hides in its words, as others put it."""
    place = printable(str(path))
    if match := re.search(r" \(at line (\d+), column (\d+)\)$", words):
        place, words = f"{place}:{match[1]}", f"{words[: match.start()]} (column {match[2]})"
    elif words.endswith(" (at end of document)"):
        place = f"{place}:{text.count(chr(10), 0, -1) + 1}"
    return ConfigError(
        f"{place}: not valid TOML: {printable(words)}", hint="texts have quotes, tables [brackets]"
    )


def _files(directory: Path) -> list[Path]:
    """Give the TOML files of a folder; those that editors hide are none."""
    try:
        status = directory.stat()
        names = sorted(os.listdir(directory))  # noqa: PTH208 (iterdir is the same, with objects)
    except OSError as error:
        raise ConfigError(f"{printable(str(directory))}: {reason(error)}") from None
    _refuse_foreign(directory, stat.S_IMODE(status.st_mode), status.st_uid)
    return [
        directory / name for name in names if name.endswith(".toml") and not name.startswith(".")
    ]
