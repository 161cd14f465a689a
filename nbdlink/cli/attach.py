"""`nbdlink attach` and `nbdlink detach`."""

from __future__ import annotations

import argparse
import sys

from nbdlink.cli.tls import add_client_arguments, client_options
from nbdlink.errors import ConfigError, NBDError
from nbdlink.sizes import parse_size


def add_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """Fill the parser of `verb`."""
    if verb == "attach":
        _add_attach(parser)
    else:
        _add_detach(parser)


def _add_attach(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("target", metavar="TARGET", help="host[:port][/export] or an NBD URI")
    add("device", metavar="/dev/nbdN", nargs="?", help="which device (default: a free one)")
    add("-x", "--export", metavar="NAME", help="the export's name, if not in TARGET")
    add("--name", help="name the link; attaching the same link again changes nothing")
    add("-C", "--connections", metavar="N", type=int, default=1, help="connections (1)")
    add("-r", "--read-only", action="store_true", help="bind it read-only")
    add("--block-size", metavar="SIZE", help="logical block size: 512 to 4096 (512)")
    add("--timeout", metavar="S", type=int, default=30, help="seconds a request may take (30)")
    add(
        "--dead-timeout",
        metavar="S",
        type=int,
        default=0,
        help="seconds that I/O waits for a renewal once no connection is left (0)",
    )
    add("--ioctl", action="store_true", help="use the ioctl interface, never netlink")
    add("--no-wait", action="store_true", help="do not wait for the partitions")
    add("--json", action="store_true", help="print the device as JSON")
    add_client_arguments(parser, road=True)
    parser.set_defaults(run=run_attach)


def _add_detach(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("device", metavar="DEVICE|NAME", nargs="*", help="what to detach")
    parser.add_argument("--all", action="store_true", help="everything that is attached")
    parser.add_argument(
        "--force", action="store_true", help="even if mounted or held: unwritten data is lost"
    )
    parser.set_defaults(run=run_detach)


def run_attach(arguments: argparse.Namespace) -> int:
    """Attach and print the device."""
    from dataclasses import replace

    from nbdlink.link.attach import LinkSpec, attach_spec
    from nbdlink.uri import Target

    target = Target.parse(arguments.target)
    if arguments.export is not None:
        if target.export:
            raise ConfigError(
                f"the export is named twice: {target.export!r} and {arguments.export!r}"
            )
        target = replace(target, export=arguments.export)
    device = attach_spec(
        LinkSpec(
            target=target,
            device=arguments.device,
            name=arguments.name,
            connections=arguments.connections,
            read_only=arguments.read_only,
            block_size=parse_size(arguments.block_size) if arguments.block_size else None,
            timeout=arguments.timeout,
            dead_timeout=arguments.dead_timeout,
            road="ioctl" if arguments.ioctl else "auto",
            wait=None if arguments.no_wait else 30.0,
            tls=client_options(arguments),
            tls_road=arguments.tls_road,
        )
    )
    if device.reason:
        print(f"nbdlink: {device.path} is on the ioctl road: {device.reason}", file=sys.stderr)
    if device.missing:
        late = ", ".join(f"/dev/{name}" for name in device.missing)
        print(f"nbdlink: udev has not finished with {late} yet", file=sys.stderr)
    if arguments.json:
        from nbdlink.cli.output import print_json
        from nbdlink.cli.show import device_as_json

        print_json(device_as_json(device.index))
    else:
        print(device.path)
    return 0


def run_detach(arguments: argparse.Namespace) -> int:
    """Detach each device; one that fails does not keep the others."""
    from nbdlink.cli.main import complain
    from nbdlink.link.attach import attached, detach

    if bool(arguments.device) == arguments.all:
        raise ConfigError("name what to detach, or say --all", hint="`nbdlink list` shows it")
    names = [state.path for state in attached()] if arguments.all else arguments.device
    status = 0
    for name in names:
        try:
            path = detach(name, force=arguments.force)
        except NBDError as error:
            complain(error)
            status = 2 if isinstance(error, ConfigError) else 1
        else:
            if arguments.verbose:
                print(f"{path} is detached", file=sys.stderr)
    return status
