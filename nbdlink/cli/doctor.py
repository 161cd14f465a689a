"""`nbdlink doctor`: can this machine do it, and if not, why not?"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Final

from nbdlink.cli.tls import add_client_arguments, client_options
from nbdlink.errors import ConfigError
from nbdlink.sizes import parse_seconds

if TYPE_CHECKING:
    from nbdlink.client.security import TLSOptions
    from nbdlink.link.checkup import Finding
    from nbdlink.uri import Target

_TRIAL_BYTES: Final = 1 << 20


def add_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """Fill the parser of `doctor`."""
    parser.add_argument(
        "what",
        metavar="TARGET|DEVICE|NAME",
        nargs="?",
        help="a TARGET, /dev/nbdN or a link's name, to which the way is walked step by step "
        "(default: this machine)",
    )
    parser.add_argument(
        "--attach",
        action="store_true",
        help="then attach the TARGET (or a small file) read-only for a moment, and read it there",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--timeout", metavar="S", type=parse_seconds, default=5.0, help="seconds for a step (5)"
    )
    add_client_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print every finding as it is made; fail if one of them says that it does not work."""
    from dataclasses import asdict

    from nbdlink.cli import output

    has_failed = False
    made = []
    for finding in _findings(arguments):
        has_failed |= finding.status == "failed"
        if arguments.json:
            made.append(asdict(finding))
        else:
            output.print_finding(finding.status, finding.check, finding.found, finding.remedy)
    if arguments.json:
        output.print_json(made)
    return 1 if has_failed else 0


def _findings(arguments: argparse.Namespace) -> Iterator[Finding]:
    """Find out what is asked about, and look at it."""
    from nbdlink.client.security import NO_OPTIONS

    options = client_options(arguments)
    what: str | None = arguments.what
    seconds = arguments.timeout
    if what is None:
        if options != NO_OPTIONS:
            raise ConfigError(
                "there are options for TLS, and yet no TARGET", hint="nbdlink doctor TARGET"
            )
        from nbdlink.link.checkup.machine import examine

        return chain(examine(), _try_a_file(seconds) if arguments.attach else ())
    from nbdlink.cli.show import device_index
    from nbdlink.link.checkup.device import examine_device, examine_link

    if (index := device_index(what)) is not None:
        _refuse_trial(arguments)
        return examine_device(index, seconds=seconds)
    from nbdlink.link.config import files

    # What can only be a target is one, whatever the configuration has in it.
    if not any(sign in what for sign in "/:[") and (link := files.load().links.get(what)):
        _refuse_trial(arguments)
        return examine_link(link.spec, seconds=seconds)
    from nbdlink.link.checkup.route import walk
    from nbdlink.uri import Target

    target = Target.parse(what)
    trial = _try(target, options, seconds) if arguments.attach else ()
    return chain(walk(target, options, seconds=seconds), trial)


def _refuse_trial(arguments: argparse.Namespace) -> None:
    if arguments.attach:
        raise ConfigError(
            f"{arguments.what} is a link or a device, and --attach takes a TARGET",
            hint="say host[:port][/export] or an NBD URI",
        )


def _try(target: Target, options: TLSOptions, seconds: float) -> Iterator[Finding]:
    from nbdlink.link.checkup.trial import try_out

    return try_out(target, options, seconds=seconds)


def _try_a_file(seconds: float) -> Iterator[Finding]:
    """Attach a file that is served for this purpose."""
    import tempfile
    from pathlib import Path

    from nbdlink.client.security import NO_OPTIONS
    from nbdlink.server import serve_in_thread
    from nbdlink.uri import Target

    with tempfile.TemporaryDirectory(prefix="nbdlink-doctor-") as folder:
        image = Path(folder, "disk.img")
        image.write_bytes(bytes(_TRIAL_BYTES))
        with serve_in_thread({"": image}, unix=Path(folder, "socket")) as service:
            yield from _try(Target.parse(service.uri("")), NO_OPTIONS, seconds)
