"""What `nbdlink serve` is to serve: from the words of its command line to plans of exports."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nbdlink.cli.several import check_several, one_of_several
from nbdlink.cli.storage import further_contexts, storage_spec
from nbdlink.errors import ConfigError
from nbdlink.uri import Target, is_uri

if TYPE_CHECKING:
    from nbdlink.server.offer import ExportPlan


def planned_exports(arguments: argparse.Namespace) -> list[ExportPlan]:
    """Plan the exports of a command line.

    Raises:
        ConfigError: its words do not go together.
    """
    check_several(arguments)
    several = len(arguments.storage) > 1 and arguments.several is None
    if several and (arguments.export_name is not None or arguments.description):
        raise ConfigError(
            "--export-name and --description are for a single storage",
            hint="name several as NAME=STORAGE",
        )
    if several and arguments.image_opts:
        raise ConfigError(
            "--image-opts is for a single storage", hint="serve each by a server of its own"
        )
    clients = _clients(arguments)
    signatures = given_signatures(arguments)
    plans = []
    for word in arguments.storage if arguments.several is None else ("",):
        name, path = _split(word, several) if not arguments.image_opts else ("", word)
        if arguments.export_name is not None:
            name = arguments.export_name
        may = clients.get(name, []) + clients.get(None, [])
        plans.append(plan_export(arguments, name, path, may, signatures.get(name)))
    return plans


def plan_export(
    arguments: argparse.Namespace,
    name: str,
    word: str,
    clients: Iterable[str],
    signature: str | None,
    source: str = "",
) -> ExportPlan:
    """Plan one export.

    Args:
        arguments: what was said of it; of several storages, `arguments.storage` names all.
        name: the export's.
        word: names its storage, if it is a single one.
        clients: who may use it; empty for everybody.
        signature: what tells its data from other data, if that is given.
        source: where all this was said, `file:line`; empty for the command line.

    Raises:
        ConfigError: what was said does not go together.
    """
    from nbdlink.server.offer import ExportPlan
    from nbdlink.storage.composite.opening import open_several
    from nbdlink.storage.open import open_storage

    facts = {
        "description": arguments.description,
        "read_only": arguments.read_only,
        # A second connection of the one client that is let in would wait for ever.
        "multi_conn": arguments.shared != 1,
        "clients": frozenset(clients),
        "given_signature": signature,
        "further_contexts": further_contexts(arguments),
    }
    if arguments.several is None:
        spec = storage_spec(arguments, word)
        return ExportPlan(name, spec, facts, partial(open_storage, spec), source)
    arrangement, specs = one_of_several(arguments)
    opening = partial(open_several, arrangement, specs)
    return ExportPlan(name, (arrangement, specs), facts, opening, source)


def _names(arguments: argparse.Namespace) -> set[str]:
    """Give the names of all exports."""
    if arguments.export_name is not None:
        return {arguments.export_name}
    if arguments.image_opts or arguments.several is not None:
        return {""}
    return {_split(word, len(arguments.storage) > 1)[0] for word in arguments.storage}


def given_signatures(arguments: argparse.Namespace) -> dict[str, str]:
    """Tell the signatures of the exports that are given one.

    Raises:
        ConfigError: an export is given two, or several have to share one.
    """
    names = _names(arguments)
    signatures: dict[str, str] = {}
    for word in arguments.signature:
        name, equals, text = word.partition("=")
        if not equals or name not in names:
            if len(names) > 1:
                raise ConfigError(
                    f"--signature {word} does not say which of the {len(names)} exports it is for",
                    hint="say NAME=TEXT: each export has other data, and so another signature",
                )
            (name,), text = names, word
        if name in signatures:
            raise ConfigError(f"two signatures for the export {name!r}", hint="give it one")
        signatures[name] = text
    return signatures


def _clients(arguments: argparse.Namespace) -> dict[str | None, list[str]]:
    """Tell who may use which export; those under None may use all.

    Raises:
        ConfigError: a word begins neither with an export's name nor as a distinguished name.
    """
    names = _names(arguments)
    if arguments.client:
        from nbdlink.transport.identity import ATTRIBUTES
    clients: dict[str | None, list[str]] = {}
    for word in arguments.client:
        # A distinguished name has "=" in it as well: CN=web1.
        name, equals, rest = word.partition("=")
        if equals and name in names and name in ATTRIBUTES:
            raise ConfigError(
                f"--client {word}: {name!r} is an export, and the beginning of a "
                "distinguished name as well",
                hint="give the export another name",
            )
        if equals and name in names and rest:
            clients.setdefault(name, []).append(rest)
        elif not equals or name in ATTRIBUTES or name.replace(".", "").isdigit():
            clients.setdefault(None, []).append(word)
        else:
            raise ConfigError(
                f"--client {word}: there is no export {name!r}",
                hint="say NAME=DN for one export, or DN for all: CN=web1",
            )
    return clients


def _split(word: str, several: bool) -> tuple[str, str]:
    """Tell NAME=STORAGE from a storage; without a name, several are named after their files."""
    name, equals, path = word.partition("=")
    if equals and "/" not in name and not is_uri(name):
        if not path:
            raise ConfigError(f"{word!r} names no storage", hint="say NAME=PATH")
        return name, path
    if is_uri(word):
        return Target.parse(word).export if several else "", word
    return Path(word).name if several else "", word
