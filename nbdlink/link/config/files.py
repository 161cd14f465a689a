"""Reading what links there shall be: `/etc/nbdlink.toml`, `/etc/nbdlink.d/*.toml`, `/etc/nbdtab`.

A `[link.NAME]` table describes a link with the keys of `settings.SETTINGS`. `[defaults]` holds
what is not said there: that of the first file for the links of all TOML files, that of a file in
the folder for the links of this file only, where it counts more. Lines of an nbdtab have no
defaults, because they shall mean what they mean to nbd-client. `[export.NAME]` tables are a
server's and are not looked at.

Who can write such a file can have any block device appear on this machine, so files that
anybody may write are refused.
"""

from __future__ import annotations

import os
import re
import stat
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from nbdlink.errors import ConfigError
from nbdlink.link.config.configured import ConfiguredLink, configure
from nbdlink.link.config.nbdtab import read_nbdtab
from nbdlink.link.config.settings import SETTINGS, Values, nearest, read_value
from nbdlink.link.config.tomllines import find_lines
from nbdlink.transport.stream import reason
from nbdlink.transport.tlsfiles import printable, read_file

__all__ = ["Configuration", "ConfiguredLink", "load"]

CONFIGURATION: Final = Path("/etc/nbdlink.toml")
DIRECTORY: Final = Path("/etc/nbdlink.d")
NBDTAB: Final = Path("/etc/nbdtab")

_TABLES: Final = ("link", "defaults", "export")


@dataclass(frozen=True, slots=True)
class Configuration:
    """All that the files say.

    Attributes:
        links: each link by its name, in the order in which they were read.
    """

    links: Mapping[str, ConfiguredLink] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class _Document:
    """A TOML file that was read.

    Attributes:
        path: the file.
        content: what `tomllib` made of it.
        place: gives `file:line` of a key, as well as it is known.
    """

    path: Path
    content: dict[str, Any]
    place: Callable[..., str]


def load(
    path: Path = CONFIGURATION, directory: Path = DIRECTORY, nbdtab: Path = NBDTAB
) -> Configuration:
    """Read the configuration; what does not exist says nothing.

    Args:
        path: the first file.
        directory: where further files are, read in the order of their names.
        nbdtab: nbd-client's table.

    Raises:
        ConfigError: a file may not be read, may be written by others, or has a mistake in it. The
            message begins with `file:line`.
    """
    links: dict[str, ConfiguredLink] = {}
    for link in _read_all(path.absolute(), directory.absolute(), nbdtab.absolute()):
        name = str(link.spec.name)
        if name in links:
            raise ConfigError(
                f"{printable(link.source)}: the link {name!r} is defined already, in "
                f"{printable(links[name].source)}",
                hint="rename one of them, or remove it",
            )
        links[name] = link
    return Configuration(MappingProxyType(links))


def _read_all(path: Path, directory: Path, nbdtab: Path) -> Iterator[ConfiguredLink]:
    defaults: Values = {}
    if _exists(path):
        document = _parse(path)
        defaults = _read_defaults(document)
        yield from _read_links(document, defaults)
    for each in _files(directory) if _exists(directory) else ():
        document = _parse(each)
        yield from _read_links(document, {**defaults, **_read_defaults(document)})
    if _exists(nbdtab):
        yield from read_nbdtab(_read_text(nbdtab), nbdtab)


def _read_defaults(document: _Document) -> Values:
    table = document.content.get("defaults", {})
    values = _read_table(document, table, "defaults")
    for key in values:
        if not SETTINGS[key].everywhere:
            raise ConfigError(
                f"{document.place('defaults', key)}: {key} cannot be a default",
                hint="say it in each [link.NAME]",
            )
    return values


def _read_links(document: _Document, defaults: Values) -> Iterator[ConfiguredLink]:
    for key in document.content:
        if key not in _TABLES:
            raise ConfigError(
                f"{document.place(key)}: unknown table [{printable(key)}]",
                hint=f"say {key} in [link.NAME] or [defaults]"
                if key in SETTINGS
                else nearest(key, _TABLES),
            )
    for kind in ("link", "export"):
        if not isinstance(document.content.get(kind, {}), dict):
            raise ConfigError(
                f"{document.place(kind)}: {kind} is not a table", hint=f"say [{kind}.NAME]"
            )
    for name, table in document.content.get("link", {}).items():
        said = _read_table(document, table, "link", name)
        yield configure(name, said, document.place("link", name), defaults=defaults)


def _read_table(document: _Document, table: Any, *path: str) -> Values:
    """Read a table of settings."""
    title = printable(".".join(path))
    if not isinstance(table, dict):
        raise ConfigError(
            f"{document.place(*path)}: {title} is not a table", hint=f"say [{title}] once"
        )
    values = {}
    for key, value in table.items():
        source = document.place(*path, key)
        if key not in SETTINGS:
            raise ConfigError(
                f"{source}: unknown key {printable(key)!r} in [{title}]",
                hint=nearest(key, SETTINGS),
            )
        values[key] = read_value(key, value, document.path.parent, source)
    return values


def _parse(path: Path) -> _Document:
    text = _read_text(path)
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

    return _Document(path, content, place)


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


def _read_text(path: Path) -> str:
    content = read_file(str(path), "the configuration")
    _refuse_foreign(path, content.mode, content.owner)
    try:
        return content.data.decode()
    except UnicodeDecodeError as error:
        line = content.data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{printable(str(path))}:{line}: not valid UTF-8",
            hint="save the file in the encoding UTF-8",
        ) from None


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


def _exists(path: Path) -> bool:
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
