"""What `nbdlink serve --config` is to serve: from TOML files to plans of exports.

`[server]` and `[export.NAME]` say what options of `serve` say, by the same names: a key is looked
up among the parser's options, which know what it takes. `SERVER_KEYS` and `EXPORT_KEYS` tell which
of them may be said where.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nbdlink.cli.exports import plan_export
from nbdlink.cli.several import check_several
from nbdlink.errors import ConfigError
from nbdlink.toml.document import (
    CONFIGURATION,
    DIRECTORY,
    Document,
    read_document,
    read_documents,
)
from nbdlink.toml.words import at, expected, of_key, read_text
from nbdlink.transport.tlsfiles import printable
from nbdlink.uri import is_uri

if TYPE_CHECKING:
    from nbdlink.server.offer import ExportPlan
    from nbdlink.server.security import ServerSecurity

_log = logging.getLogger("nbdlink.server")

SERVER_KEYS: Final = (
    "port",
    "bind",
    "socket",
    "shared",
    "negotiation-timeout",
    "processes",
    "pid-file",
    "remember-clients",
    "metrics",
    "tls",
    "tls-certificates",
    "tls-cert",
    "tls-key",
    "tls-passphrase",
    "tls-ca",
    "tls-crl",
    "tls-verify-depth",
    "tls-psk",
    "tls-verify-peer",
    "tls-authz",
)
"""What `[server]` may say."""

EXPORT_KEYS: Final = (
    "description",
    "read-only",
    "format",
    "image-opts",
    "offset",
    "size",
    "snapshot",
    "load-snapshot",
    "cache",
    "aio",
    "discard",
    "detect-zeroes",
    "allocation-depth",
    "bitmap",
    "block-size",
    "write-behind",
    "write-behind-memory",
    "lock-ranges",
    "stripe-unit",
    "degraded",
)
"""What `[export.NAME]` may say beside `OWN_KEYS`."""

_KINDS: Final = ("linear", "stripe", "mirror")
OWN_KEYS: Final = ("storage", *_KINDS, "clients", "signature")
"""What `[export.NAME]` says in another way than the command line."""

_OF_ONE_EXPORT: Final = (
    "storage",
    "export_name",
    "description",
    "signature",
    "client",
    "several",
    "image_opts",
    "load_snapshot",
    "bitmap",
    "size",
    "attach",
)
"""What a command line says of a single export, by the parser's names."""

_PATHS: Final = ("PATH", "FILE", "DIR", "FILE|DIR")


@dataclass(frozen=True, slots=True)
class _Said:
    """What was said for a key: as the parser would have it, and where (`file:line`)."""

    value: Any
    source: str


@dataclass(frozen=True, slots=True)
class _Table:
    """What `[export.NAME]` says, by key, and where it begins.

    Attributes:
        source: `file:line`.
        folder: that of the file, where relative paths begin.
    """

    name: str
    said: dict[str, _Said]
    source: str
    folder: Path


class ServerConfiguration:
    """The files of a server, which are read when it starts, and at every SIGHUP.

    Attributes:
        arguments: the command line, and what `[server]` says where that says nothing.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        """Read the files for the first time.

        Args:
            arguments: the command line; its `parser` is who has read it.

        Raises:
            ConfigError: there is a mistake in it or in a file.
        """
        parser: argparse.ArgumentParser = arguments.parser
        for name in _OF_ONE_EXPORT:
            if getattr(arguments, name) not in (parser.get_default(name), []):
                option = arguments.several if name == "several" else name.replace("_", "-")
                said = "a STORAGE" if name == "storage" else f"--{option}"
                raise ConfigError(
                    f"{said} and --config: the exports are in the configuration",
                    hint="say it there, in [export.NAME], or leave --config out",
                )
        self._options = parser._option_string_actions
        # A daemon changes its directory, and may be told to read it anew there.
        self._path = Path(arguments.config).absolute() if arguments.config else None
        self._server, self._tables = self._read()
        values = vars(arguments).copy()
        for key, each in self._server.items():
            name = self._options[f"--{key}"].dest
            # What was said on the command line is another object than the default.
            if values[name] is parser.get_default(name):
                values[name] = each.value
        self.arguments = argparse.Namespace(**values)

    def plans(self, security: ServerSecurity | None) -> list[ExportPlan]:
        """Plan the exports, as the files were read last.

        Args:
            security: the server's, which has to know its clients if an export is for some only.

        Raises:
            ConfigError: what a table says does not go together.
        """
        knows_peers = security is not None and security.knows_peers
        for table in self._tables:
            if "clients" in table.said and not knows_peers:
                raise ConfigError(
                    f"{table.said['clients'].source}: clients do not have to show who they are",
                    hint="say tls-certificates and tls-verify-peer = true, or tls-psk, in [server]",
                )
        return [self._plan(table) for table in self._tables]

    def reread(self, security: ServerSecurity | None) -> list[ExportPlan]:
        """Read the files anew, and plan the exports of now.

        Raises:
            ConfigError: there is a mistake in them.
        """
        server, self._tables = self._read()
        if {k: s.value for k, s in server.items()} != {k: s.value for k, s in self._server.items()}:
            _log.warning("[server] says something else now, which takes a restart")
        return self.plans(security)

    # Reading.

    def _read(self) -> tuple[dict[str, _Said], list[_Table]]:
        """Give what `[server]` says, and what there is for each export."""
        server: dict[str, _Said] = {}
        server_at = ""
        tables: dict[str, _Table] = {}
        for document in self._documents():
            document.check_tables(
                (*SERVER_KEYS, *EXPORT_KEYS, *OWN_KEYS), "[server] or [export.NAME]"
            )
            if "server" in document.content:
                place = document.place("server")
                if server_at:
                    raise ConfigError(
                        f"{place}: there is a [server] already, in {server_at}",
                        hint="say all of it in one of them",
                    )
                server_at = place
                server = self._table(document, SERVER_KEYS, "server")
            for name in document.content.get("export", {}):
                place = document.place("export", name)
                if name in tables:
                    raise ConfigError(
                        f"{place}: the export {name!r} is defined already, in "
                        f"{tables[name].source}",
                        hint="rename one of them, or remove it",
                    )
                said = self._table(document, (*OWN_KEYS, *EXPORT_KEYS), "export", name)
                tables[name] = _Table(name, said, place, document.path.parent)
        if not tables:
            where = self._path or f"{CONFIGURATION} and {DIRECTORY}"
            raise ConfigError(
                f"{printable(str(where))}: there is no export to serve",
                hint='say [export.NAME] and storage = "PATH"',
            )
        return server, list(tables.values())

    def _documents(self) -> Iterator[Document]:
        if self._path is None:
            return read_documents(CONFIGURATION, DIRECTORY)
        return iter([read_document(self._path)])

    def _table(self, document: Document, known: tuple[str, ...], *path: str) -> dict[str, _Said]:
        def read(key: str, value: Any, source: str) -> _Said:
            try:
                if key in OWN_KEYS:
                    converted = _own(key, value)
                else:
                    converted = _convert(self._options[f"--{key}"], value, document.path.parent)
            except ConfigError as error:
                raise at(source, of_key(key, error)) from None
            return _Said(converted, source)

        table = document.content
        for name in path:
            table = table[name]
        return document.read_table(table, known, read, *path)

    # Planning.

    def _plan(self, table: _Table) -> ExportPlan:
        said = {key: each.value for key, each in table.said.items()}
        kinds = [key for key in ("storage", *_KINDS) if key in said]
        if len(kinds) != 1:
            what = f"has {' and '.join(kinds)}" if kinds else "has no storage"
            raise ConfigError(
                f"{table.source}: the export {table.name!r} {what}",
                hint='say one of storage = "PATH", linear, stripe or mirror = ["PATH", ...]',
            )
        values = vars(self.arguments).copy()
        for key, value in said.items():
            if key not in OWN_KEYS:
                values[self._options[f"--{key}"].dest] = value
        words = [said["storage"]] if "storage" in said else said[kinds[0]]
        if not values["image_opts"]:
            # So that they hold wherever the process goes.
            words = [word if is_uri(word) else str(table.folder / word) for word in words]
        values["storage"] = words
        values["several"] = None if "storage" in said else kinds[0]
        arguments = argparse.Namespace(**values)
        try:
            check_several(arguments)
            return plan_export(
                arguments,
                table.name,
                words[0],
                said.get("clients", ()),
                said.get("signature"),
                table.source,
            )
        except ConfigError as error:
            raise at(table.source, error) from None


def _own(key: str, value: Any) -> str | list[str]:
    if key in ("storage", "signature"):
        return read_text(value)
    if texts := _texts(value):
        return texts
    raise ConfigError("is empty", hint="leave it out, or name one")


def _convert(option: argparse.Action, value: Any, folder: Path) -> Any:
    """Make of what was written what the parser would make of words."""
    if option.nargs == 0:
        if not isinstance(value, bool):
            raise expected("true or false", value)
        return value
    if isinstance(option, argparse._AppendAction):
        return _texts(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise expected("a text or a number", value)
    if not isinstance(value, str) and abs(value) >= 1 << 63:
        raise ConfigError("takes a number, and not one that large")
    text = str(value)
    if option.choices is not None and text not in option.choices:
        raise expected("one of " + ", ".join(f'"{each}"' for each in option.choices), value)
    if option.metavar in _PATHS:
        return str(folder / read_text(value, "a path"))
    if not callable(option.type):
        return text
    try:
        return option.type(text)
    except ValueError:
        kind = "a whole number" if option.type is int else "a number"
        raise expected(kind, value) from None


def _texts(value: Any) -> list[str]:
    """Read a list of texts, or one that stands for itself."""
    values = value if isinstance(value, list) else [value]
    return [read_text(each, "a text or a list of texts") for each in values]
