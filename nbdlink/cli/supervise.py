"""`nbdlink supervise`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbdlink.link.config import Configuration


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
    parser.set_defaults(run=run_supervise)


def _port(text: str) -> int:
    number = int(text)
    if not 0 <= number <= 65535:
        raise ValueError(text)
    return number


def run_supervise(arguments: argparse.Namespace) -> int:
    """Look after links until a signal comes."""
    from nbdlink.link import config

    return supervise(config.load, arguments.names, arguments.notice_port, arguments.verbose)


def supervise(
    load: Callable[[], Configuration],
    names: Sequence[str],
    notice_port: int | None = None,
    verbose: int = 0,
) -> int:
    """Be the daemon, in the foreground.

    Raises:
        ConfigError: the configuration has a mistake, or there is no such link.
        KernelError: the kernel's events cannot be heard.
    """
    from nbdlink.cli.main import set_up_logging
    from nbdlink.link.notice import DEFAULT_PORT
    from nbdlink.link.supervisor import Supervisor

    set_up_logging(max(verbose, 1))  # what a daemon does is what its log is for
    port = DEFAULT_PORT if notice_port is None else notice_port or None
    Supervisor(load, names, notice_port=port).run()
    return 0
