"""`nbdlink serve`: the reference server, from the command line."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nbdlink.cli.devices import ServedDevice
from nbdlink.cli.listening import listeners, parse_ports, pid_files
from nbdlink.cli.objects import add_object_arguments, apply_objects
from nbdlink.cli.several import (
    add_several_arguments,
    check_several,
    join_sizes,
    open_one_of_several,
)
from nbdlink.cli.storage import add_storage_arguments, further_contexts, storage_spec
from nbdlink.cli.tls import add_server_arguments, server_security
from nbdlink.errors import ConfigError, StorageError
from nbdlink.protocol.constants import BITMAP_CONTEXT
from nbdlink.sizes import format_size, parse_seconds
from nbdlink.uri import DEFAULT_PORT, Target, is_uri

if TYPE_CHECKING:
    from nbdlink.server import Catalogue, Service
    from nbdlink.storage.base import Storage


def add_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """Fill the parser of `serve`."""
    add = parser.add_argument
    add(
        "storage",
        metavar="[NAME=]STORAGE",
        nargs="+",
        help="an image, a block device, or the URI of another server's export",
    )
    add(
        "-p",
        "--port",
        metavar="PORT[-LAST]",
        type=parse_ports,
        help=f"TCP port, or the first free one of several ({DEFAULT_PORT}; 0: any)",
    )
    add(
        "-b",
        "--bind",
        metavar="ADDRESS",
        action="append",
        default=[],
        help="listen on this address; may be repeated (all addresses)",
    )
    add("-k", "--socket", metavar="PATH", help="listen on a Unix socket")
    add("-x", "--export-name", metavar="NAME", help="the export's name, for a single storage")
    add("-D", "--description", metavar="TEXT", default="", help="words for people")
    add("-r", "--read-only", action="store_true", help="refuse writes")
    add(
        "--signature",
        metavar="[NAME=]TEXT",
        action="append",
        default=[],
        help="what tells the export's data from other data; may be repeated (by the file)",
    )
    add("-e", "--shared", metavar="N", type=int, default=0, help="clients at once (0: any number)")
    lifetime = parser.add_mutually_exclusive_group()
    lifetime.add_argument(
        "-t", "--persistent", action="store_true", help="stay when the last client leaves (default)"
    )
    lifetime.add_argument("--once", action="store_true", help="end when the last client leaves")
    add(
        "--negotiation-timeout",
        metavar="S",
        type=parse_seconds,
        default=10.0,
        help="seconds a client has to choose an export (10)",
    )
    add(
        "--processes",
        metavar="N",
        type=int,
        help="processes besides this one that serve connections (by the processors)",
    )
    add("--fork", action="store_true", help="go to the background once clients can come")
    add("--pid-file", metavar="PATH", help="a file for the process's number (by --signature)")
    add(
        "--remember-clients",
        metavar="FILE",
        help="keep who is connected here, and tell them when the server is back",
    )
    add("--metrics", metavar="ADDRESS", help="serve Prometheus metrics at [HOST]:PORT or a path")
    add(
        "-c",
        "--attach",
        metavar="/dev/nbdN",
        help="bind the export to this device as well, for as long as the server runs",
    )
    add(
        "-T",
        "--trace",
        metavar="PATTERN",
        action="append",
        default=[],
        help="log in full what has this name: nbd_server, nbd_*, ...; also events=FILE, file=FILE",
    )
    add_storage_arguments(parser)
    add_several_arguments(parser)
    add_server_arguments(parser)
    add_object_arguments(parser)
    parser.set_defaults(run=run, announce=True)


def prepare(words: list[str]) -> list[str]:
    """Make words of a command line such that argparse takes them as they are meant."""
    return join_sizes(words)


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal comes, or until the last client has gone with `--once`."""
    from nbdlink.cli.main import set_up_logging
    from nbdlink.server import Service
    from nbdlink.server.daemon import (
        fork_to_background,
        leave_terminal,
        log_to_syslog,
        raise_descriptor_limit,
    )
    from nbdlink.server.mirrors import MirrorControl, mirrors
    from nbdlink.server.notices import Notices
    from nbdlink.transport.activation import inherited_sockets, notify
    from nbdlink.transport.exposition import check_address, serve_metrics

    if arguments.metrics is not None:
        check_address(arguments.metrics)
    if arguments.shared < 0:
        raise ConfigError("the number of clients cannot be negative", hint="0 is any number")
    apply_objects(arguments, "server")
    set_up_logging(arguments.verbose)
    if arguments.trace:
        from nbdlink.cli.trace import set_up_trace

        set_up_trace(arguments.trace)
    device = ServedDevice.planned(arguments)
    raise_descriptor_limit()
    inherited = inherited_sockets()  # before a fork, since they are meant for this process
    if inherited and (arguments.socket or arguments.bind or arguments.port is not None):
        raise ConfigError(
            "LISTEN_FDS hands over sockets to listen on, so --port, --bind and --socket cannot",
            hint="leave them out, or unset LISTEN_FDS",
        )
    background = fork_to_background() if arguments.fork else None
    own_files = pid_files(arguments, _signatures(arguments).values())
    security = server_security(arguments)
    notices = Notices(arguments.remember_clients) if arguments.remember_clients else None
    catalogue = _catalogue(arguments)
    with contextlib.ExitStack() as undo:
        for storage in catalogue.storages:
            undo.callback(storage.close)
        if device is not None:
            undo.push(device)
        sockets = inherited or listeners(arguments, device)
        undo.pop_all()

    def detach() -> None:
        # The further processes would keep the starter's pipes open, and its `$(...)` waiting.
        leave_terminal()
        log_to_syslog()

    service = Service(
        catalogue,
        sockets,
        once=arguments.once or (device is not None and not arguments.persistent),
        shared=arguments.shared,
        negotiation_timeout=arguments.negotiation_timeout,
        inherited=bool(inherited),
        on_stopping=lambda: notify("STOPPING=1"),
        processes=_processes(arguments.processes),
        on_fork=detach if background is not None else lambda: None,
        security=security,
        notices=notices,
    )

    running = contextlib.ExitStack()

    def ready() -> None:
        if arguments.metrics is not None:  # in a thread, so after all forks
            running.enter_context(serve_metrics(arguments.metrics, service.metrics))
        for mirror in mirrors(catalogue).values():
            running.enter_context(MirrorControl(mirror))
        for file in own_files:
            file.publish()
        # Who has made the sockets knows where they are, and may want our stdout for itself:
        # `nbdinfo --json [ nbdlink serve disk.img ]`.
        if not inherited and arguments.announce:
            _print_uris(service)
        if device is not None:
            device.attach(service)
        if background is not None:
            background()
            log_to_syslog()
        notify(f"READY=1\nMAINPID={os.getpid()}")

    try:
        with running:
            if device is None:
                return service.run(ready)
            with device:
                return service.run(ready, before_stop=device.detach)
    finally:
        for file in own_files:
            file.remove()


def _print_uris(service: Service) -> None:
    from nbdlink.cli.output import printable

    for export in service.catalogue:
        access = ", read-only" if export.is_read_only else ""
        size = format_size(export.size)
        name = printable(export.storage.name)
        print(f"{service.uri(export.name)} is {name} ({size}{access})")
    # Scripts wait for these lines: they say that clients can come.
    if sys.stdout is not None:
        sys.stdout.flush()


def _processes(wanted: int | None) -> int:
    """Give how many processes shall serve beside this one."""
    if wanted is not None:
        if wanted < 0:
            raise ConfigError("the number of processes cannot be negative", hint="0 is none")
        if wanted > 256:
            raise ConfigError(f"{wanted} processes are too many", hint="use up to 256")
        return wanted
    processors = len(os.sched_getaffinity(0))
    # Two for each, as they sleep half of the time; more than eight no network feeds.
    return min(2 * processors, 8) - 1 if processors > 1 else 0


def _catalogue(arguments: argparse.Namespace) -> Catalogue:
    """Open every storage, or none."""
    from nbdlink.server import Catalogue, Export
    from nbdlink.storage.open import open_storage

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
    contexts = further_contexts(arguments)
    clients = _clients(arguments)
    signatures = _signatures(arguments)
    with contextlib.ExitStack() as undo:
        exports = []
        for word in arguments.storage if arguments.several is None else ("",):
            name, path = _split(word, several) if not arguments.image_opts else ("", word)
            if arguments.export_name is not None:
                name = arguments.export_name
            if arguments.several is not None:
                storage = open_one_of_several(arguments)
            else:
                storage = open_storage(storage_spec(arguments, path))
            undo.callback(storage.close)
            for context in contexts:
                if context not in storage.contexts:
                    raise _no_context(storage, context)
            exports.append(
                Export(
                    name,
                    storage,
                    description=arguments.description,
                    read_only=arguments.read_only,
                    # A second connection of the one client that is let in would wait for ever.
                    multi_conn=arguments.shared != 1,
                    clients=frozenset(clients.get(name, []) + clients.get(None, [])),
                    given_signature=signatures.get(name),
                    further_contexts=contexts,
                )
            )
        catalogue = Catalogue(exports)
        undo.pop_all()
        return catalogue


def _no_context(storage: Storage, context: str) -> StorageError:
    """Say that a storage lacks what was asked for by `--bitmap` or `--allocation-depth`."""
    if not context.startswith(BITMAP_CONTEXT):
        return StorageError(f"{storage.name} cannot tell how deep data lies ({context})")
    names = [n.removeprefix(BITMAP_CONTEXT) for n in storage.contexts if BITMAP_CONTEXT in n]
    return StorageError(
        f"{storage.name} has no bitmap {context.removeprefix(BITMAP_CONTEXT)!r} that can be used",
        hint=f"it has {', '.join(names)}" if names else "qemu-img info lists what an image has",
    )


def _names(arguments: argparse.Namespace) -> set[str]:
    """Give the names of all exports."""
    if arguments.export_name is not None:
        return {arguments.export_name}
    if arguments.image_opts or arguments.several is not None:
        return {""}
    return {_split(word, len(arguments.storage) > 1)[0] for word in arguments.storage}


def _signatures(arguments: argparse.Namespace) -> dict[str, str]:
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
