"""`nbdlink serve`: the reference server, from the command line."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from nbdlink.cli.devices import ServedDevice
from nbdlink.cli.exports import planned_exports
from nbdlink.cli.listening import listeners, parse_ports, pid_files
from nbdlink.cli.objects import add_object_arguments, apply_objects
from nbdlink.cli.several import add_several_arguments, join_sizes
from nbdlink.cli.storage import add_storage_arguments
from nbdlink.cli.tls import add_server_arguments, server_security
from nbdlink.errors import ConfigError
from nbdlink.sizes import format_size, parse_seconds
from nbdlink.uri import DEFAULT_PORT

if TYPE_CHECKING:
    from nbdlink.server import Export, Service

USUAL_FILES = ""
"""What `--config` alone stands for: /etc/nbdlink.toml and what is in /etc/nbdlink.d."""


def add_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """Fill the parser of `serve`."""
    add = parser.add_argument
    add(
        "storage",
        metavar="[NAME=]STORAGE",
        nargs="*",
        help="an image, a block device, or the URI of another server's export",
    )
    add(
        "--config",
        metavar="FILE",
        nargs="?",
        const=USUAL_FILES,
        help="serve the exports that are in a TOML file instead, or in /etc/nbdlink.toml and "
        "/etc/nbdlink.d",
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
    add("-e", "--shared", metavar="N", type=int, help="clients at once (0: any number)")
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
    parser.set_defaults(run=run, announce=True, parser=parser)


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
    from nbdlink.server.notices import Notices
    from nbdlink.server.offer import Offer
    from nbdlink.transport.activation import inherited_sockets, notify
    from nbdlink.transport.exposition import check_address, serve_metrics

    configuration = None
    if arguments.config is not None:
        from nbdlink.cli.serveconfig import ServerConfiguration

        configuration = ServerConfiguration(arguments)
        arguments = configuration.arguments
    elif not arguments.storage:
        raise ConfigError(
            "there is nothing to serve",
            hint="name a file or a block device, or say --config to serve what is configured",
        )
    if arguments.metrics is not None:
        check_address(arguments.metrics)
    arguments.shared = arguments.shared or 0
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
    security = server_security(arguments)
    notices = Notices(arguments.remember_clients) if arguments.remember_clients else None
    read = None
    if configuration is None:
        plans = planned_exports(arguments)
    else:
        plans = configuration.plans(security)
        read = partial(configuration.reread, security)
    signatures = {plan.signature for plan in plans if plan.signature is not None}
    own_files = pid_files(arguments, signatures)
    offer = Offer(plans, read, partial(_beside, arguments, signatures))
    with contextlib.ExitStack() as undo:
        for storage in offer.storages:
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
        offer.catalogue,
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
        offer=offer,
    )

    running = contextlib.ExitStack()

    def ready() -> None:
        if arguments.metrics is not None:  # in a thread, so after all forks
            running.enter_context(serve_metrics(arguments.metrics, service.metrics))
        running.callback(offer.close)
        offer.begin()
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


@contextlib.contextmanager
def _beside(arguments: argparse.Namespace, signatures: set[str], export: Export) -> Iterator[None]:
    """Do what an export needs besides, as long as it is served.

    Args:
        arguments: the command line.
        signatures: those that have a pid file; an export that came later adds its own.
        export: the export.
    """
    from nbdlink.server.mirrors import MirrorControl, mirror_of

    with contextlib.ExitStack() as stack:
        if (mirror := mirror_of(export.storage)) is not None:
            stack.enter_context(MirrorControl(mirror))
        signature = export.given_signature
        if signature is not None and signature not in signatures and arguments.pid_file is None:
            for file in pid_files(arguments, [signature]):
                file.publish()
                stack.callback(file.remove)
            signatures.add(signature)
            stack.callback(signatures.discard, signature)
        yield


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
