"""`nbdlink reconnect` and `nbdlink resize`."""

from __future__ import annotations

import argparse
import sys

from nbdlink.sizes import format_size, parse_size


def add_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """Fill the parser of `verb`."""
    parser.add_argument("device", metavar="DEVICE|NAME", help="which device or link")
    if verb == "reconnect":
        parser.add_argument(
            "target",
            metavar="TARGET",
            nargs="?",
            help="another server of the same export, for all connections from now on",
        )
        parser.set_defaults(run=run_reconnect)
    else:
        parser.add_argument(
            "size", metavar="SIZE", nargs="?", help="bytes, or with K, M, G, T (all of the export)"
        )
        parser.set_defaults(run=run_resize)
    parser.add_argument("--json", action="store_true", help="print the device as JSON")


def run_reconnect(arguments: argparse.Namespace) -> int:
    """Renew all connections of a device."""
    from nbdlink.link.attach import find
    from nbdlink.link.renew import renew
    from nbdlink.uri import Target

    index = find(arguments.device)
    target = Target.parse(arguments.target) if arguments.target else None
    # A supervisor that tries to reach a server which does not answer takes up to 15 seconds.
    renewal = renew(index, everything=True, target=target, wait=20.0)
    for route, error in renewal.failures:
        print(f"nbdlink: {route} was left out: {error}", file=sys.stderr)
    if arguments.json:
        _print_device(index)
    else:
        total = len(renewal.health.live) + len(renewal.health.dead)
        print(f"/dev/nbd{index}: {len(renewal.health.live)} of {total} connections are live")
    return 0


def run_resize(arguments: argparse.Namespace) -> int:
    """Take over an export's size."""
    from nbdlink.link.attach import find
    from nbdlink.link.resize import resize

    index = find(arguments.device)
    size = resize(index, parse_size(arguments.size) if arguments.size else None)
    if arguments.json:
        _print_device(index)
    else:
        print(f"/dev/nbd{index}: {size} bytes ({format_size(size)})")
    return 0


def _print_device(index: int) -> None:
    from nbdlink.cli.output import print_json
    from nbdlink.cli.show import device_as_json

    print_json(device_as_json(index))
