"""Reading what links there shall be: `/etc/nbdlink.toml`, `/etc/nbdlink.d/*.toml`, `/etc/nbdtab`.

A `[link.NAME]` table describes a link with the keys of `settings.SETTINGS`. `[defaults]` holds
what is not said there: that of the first file for the links of all TOML files, that of a file in
the folder for the links of this file only, where it counts more. Lines of an nbdtab have no
defaults, because they shall mean what they mean to nbd-client. `[export.NAME]` and `[server]` are a
server's and are not looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from nbdlink.errors import ConfigError
from nbdlink.link.config.configured import ConfiguredLink, configure
from nbdlink.link.config.nbdtab import read_nbdtab
from nbdlink.link.config.settings import SETTINGS, Value, Values, read_value
from nbdlink.toml.document import (
    CONFIGURATION,
    DIRECTORY,
    Document,
    exists,
    read_documents,
    read_text,
)
from nbdlink.transport.tlsfiles import printable

__all__ = ["Configuration", "ConfiguredLink", "load"]

NBDTAB: Final = Path("/etc/nbdtab")


@dataclass(frozen=True, slots=True)
class Configuration:
    """All that the files say.

    Attributes:
        links: each link by its name, in the order in which they were read.
    """

    links: Mapping[str, ConfiguredLink] = field(default_factory=lambda: MappingProxyType({}))


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
    for document in read_documents(path, directory):
        own = _read_defaults(document)
        if document.path == path:
            defaults = own
        yield from _read_links(document, {**defaults, **own})
    if exists(nbdtab):
        yield from read_nbdtab(read_text(nbdtab), nbdtab)


def _read_defaults(document: Document) -> Values:
    table = document.content.get("defaults", {})
    values = _read_table(document, table, "defaults")
    for key in values:
        if not SETTINGS[key].everywhere:
            raise ConfigError(
                f"{document.place('defaults', key)}: {key} cannot be a default",
                hint="say it in each [link.NAME]",
            )
    return values


def _read_links(document: Document, defaults: Values) -> Iterator[ConfiguredLink]:
    document.check_tables(SETTINGS, "[link.NAME] or [defaults]")
    for name, table in document.content.get("link", {}).items():
        said = _read_table(document, table, "link", name)
        yield configure(name, said, document.place("link", name), defaults=defaults)


def _read_table(document: Document, table: Any, *path: str) -> Values:
    """Read a table of settings."""

    def read(key: str, value: Any, source: str) -> Value:
        return read_value(key, value, document.path.parent, source)

    return document.read_table(table, SETTINGS, read, *path)
