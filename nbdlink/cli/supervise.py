"""`nbdlink supervise`."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbdlink.link.config.files import Configuration


def add_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """Fill the parser of `verb`."""
    parser.add_argument(
        "names",
        metavar="NAME",
        nargs="*",
        help="the only links to look after (default: all that are configured or attached)",
    )
    parser.add_argument(
        "--notice-port",
        metavar="PORT",
        type=_port,
        help="UDP port on which servers may say that they are back (10809); 0 for none",
    )
    parser.add_argument(
        "--metrics",
        metavar="ADDRESS",
        help="serve Prometheus metrics at HOST:PORT, :PORT or a Unix socket's path",
    )
    parser.set_defaults(run=run_supervise)


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or not int(text[:6]) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port (0 to 65535)")
    return int(text)


def run_supervise(arguments: argparse.Namespace) -> int:
    """Look after links until a signal comes."""
    from nbdlink.link.config import files

    return supervise(
        files.load,
        arguments.names,
        arguments.notice_port,
        metrics=arguments.metrics,
        verbose=arguments.verbose,
    )


def supervise(
    load: Callable[[], Configuration],
    names: Sequence[str],
    notice_port: int | None = None,
    *,
    metrics: str | None = None,
    until_detached: bool = False,
    verbose: int = 0,
) -> int:
    """Be the daemon, in the foreground.

    Args:
        load: reads the configuration.
        names: the only links to look after; none for all.
        notice_port: UDP port for servers that are back; None for the usual one, 0 for none.
        metrics: where metrics are served, or None.
        until_detached: whether to end when all links have been detached on purpose.
        verbose: how much is said; what a daemon does is always.

    Raises:
        ConfigError: the configuration has a mistake, or there is no such link.
        KernelError: the kernel's events cannot be heard.
    """
    from nbdlink.cli.main import set_up_logging
    from nbdlink.link.supervisor.loop import Supervisor
    from nbdlink.link.supervisor.notices import DEFAULT_PORT

    set_up_logging(max(verbose, 1))
    port = DEFAULT_PORT if notice_port is None else notice_port or None
    supervisor = Supervisor(load, names, notice_port=port, until_detached=until_detached)
    with contextlib.ExitStack() as stack:
        if metrics is not None:
            from nbdlink.link.metrics import DeviceMetrics
            from nbdlink.transport.exposition import serve_metrics

            stack.enter_context(serve_metrics(metrics, DeviceMetrics()))
        supervisor.run()
    return 0
