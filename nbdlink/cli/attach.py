"""`nbdlink attach` and `nbdlink detach`."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from nbdlink.cli.tls import add_client_arguments, client_options
from nbdlink.errors import ConfigError, KernelError, NBDError
from nbdlink.sizes import parse_size

if TYPE_CHECKING:
    from nbdlink.link.spec import LinkSpec


def add_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """Fill the parser of `verb`."""
    if verb == "attach":
        _add_attach(parser)
    else:
        _add_detach(parser)


def _add_attach(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "target",
        metavar="TARGET",
        nargs="?",
        help="host[:port][/export] or an NBD URI; without it, the configured link --name",
    )
    add("device", metavar="/dev/nbdN", nargs="?", help="which device (default: a free one)")
    add("-x", "--export", metavar="NAME", help="the export's name, if not in TARGET")
    add(
        "--path",
        metavar="TARGET",
        dest="paths",
        action="append",
        default=[],
        help="another way to the same export, over which connections are spread; repeatable",
    )
    add("--name", help="name the link; attaching the same link again changes nothing")
    add("-C", "--connections", metavar="N", type=int, help="connections (1)")
    add("-r", "--read-only", action="store_true", help="bind it read-only")
    add("--block-size", metavar="SIZE", help="logical block size: 512 to 4096 (512)")
    add("--timeout", metavar="S", type=int, help="seconds a request may take (30)")
    add(
        "--dead-timeout",
        metavar="S",
        type=int,
        help="seconds that I/O waits for a renewal once no connection is left (0; supervised: 300)",
    )
    add("--ioctl", action="store_true", help="use the ioctl interface, never netlink")
    add("--supervise", action="store_true", help="stay, and renew what breaks")
    add("--no-wait", action="store_true", help="do not wait for the partitions")
    add("--json", action="store_true", help="print the device as JSON")
    add_client_arguments(parser, road=True)
    parser.set_defaults(run=run_attach, instead={}, printed="{}")


def _add_detach(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("device", metavar="DEVICE|NAME", nargs="*", help="what to detach")
    parser.add_argument("--all", action="store_true", help="everything that is attached")
    parser.add_argument(
        "--force", action="store_true", help="even if mounted or held: unwritten data is lost"
    )
    parser.set_defaults(run=run_detach)


def run_attach(arguments: argparse.Namespace, attached: Callable[[], None] = lambda: None) -> int:
    """Attach and print the device; call `attached` before going on to supervise it."""
    from nbdlink.link.attach import attach_spec

    spec = _configured(arguments) if arguments.target is None else _asked_for(arguments)
    if arguments.supervise and spec.name is None:
        raise ConfigError("--supervise takes a link with a name", hint="add --name NAME")
    device = attach_spec(spec)
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
        print(arguments.printed.format(device.path))
    if arguments.supervise:
        from functools import partial

        from nbdlink.cli.supervise import supervise
        from nbdlink.link.config.files import Configuration, ConfiguredLink

        sys.stdout.flush()  # whoever waits for the device has it
        attached()
        link = ConfiguredLink(spec, "the command line")
        load = partial(Configuration, {str(spec.name): link})
        supervise(load, [str(spec.name)], until_detached=True)
    return 0


def _asked_for(arguments: argparse.Namespace) -> LinkSpec:
    """Give what the command line describes."""
    from dataclasses import replace

    from nbdlink.link.config.configured import DEAD_TIMEOUT
    from nbdlink.link.spec import LinkSpec
    from nbdlink.uri import Target

    if arguments.target.startswith("/dev/nbd"):
        raise ConfigError(
            f"{arguments.target} is a device, and the TARGET comes before it",
            hint=f"nbdlink attach {arguments.device or 'TARGET'} {arguments.target}",
        )
    target = Target.parse(arguments.target)
    paths = tuple(Target.parse(path) for path in arguments.paths)
    if arguments.export is not None:
        if target.export:
            raise ConfigError(
                f"the export is named twice: {target.export!r} and {arguments.export!r}"
            )
        target = replace(target, export=arguments.export)
    if target.export:
        paths = tuple(p if p.export else replace(p, export=target.export) for p in paths)
    if len({target, *paths}) <= len(paths):
        raise ConfigError(
            "the same way to the export is named twice",
            hint="more connections over one way are --connections",
        )
    dead_timeout = arguments.dead_timeout
    if dead_timeout is None:
        dead_timeout = DEAD_TIMEOUT if arguments.supervise else 0
    return LinkSpec(
        target=target,
        paths=paths,
        device=arguments.device,
        name=arguments.name,
        connections=_or(arguments.connections, 1),
        read_only=arguments.read_only,
        block_size=parse_size(arguments.block_size) if arguments.block_size else None,
        timeout=_or(arguments.timeout, 30),
        dead_timeout=dead_timeout,
        road="ioctl" if arguments.ioctl else "auto",
        wait=None if arguments.no_wait else 30.0,
        tls=client_options(arguments),
        tls_road=arguments.tls_road,
    )


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _configured(arguments: argparse.Namespace) -> LinkSpec:
    """Give the configured link that is named."""
    from dataclasses import replace

    from nbdlink.client.security import NO_OPTIONS
    from nbdlink.link.config import files

    if arguments.name is None:
        raise ConfigError(
            "name a TARGET, or a configured link with --name", hint="nbdlink attach --help"
        )
    said = [
        f"--{key.replace('_', '-')}"
        for key in ("export", "connections", "block_size", "timeout", "dead_timeout")
        if getattr(arguments, key) is not None
    ]
    said += [
        f"--{key.replace('_', '-')}" for key in ("read_only", "ioctl") if arguments.__dict__[key]
    ]
    said += ["--path"] if arguments.paths else []
    if client_options(arguments) != NO_OPTIONS or arguments.tls_road != "auto":
        said.append("an option for TLS")
    if said:
        raise ConfigError(
            f"{said[0]} goes with a TARGET; a configured link is attached as it is configured",
            hint="say it in the file",
        )
    link = files.load().links.get(arguments.name)
    if link is None:
        raise ConfigError(
            f"there is no configured link named {arguments.name!r}",
            hint="name a TARGET, or say [link.NAME] in /etc/nbdlink.toml",
        )
    device = arguments.device or link.spec.device
    wait = None if arguments.no_wait else 30.0
    # What nbd-client's command line can say of a line of nbdtab, which has no words for it.
    return replace(link.spec, **{"device": device, "wait": wait} | arguments.instead)


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


def run_detach_of(device: str, arguments: argparse.Namespace) -> int:
    """Detach a device as nbd-client and qemu-nbd do: it is no failure that it is not attached."""
    from nbdlink.kernel import sysfs

    with contextlib.suppress(KernelError):
        if sysfs.pid(sysfs.index_of(device)) is None:
            return 0
    return run_detach(
        argparse.Namespace(device=[device], all=False, force=False, verbose=arguments.verbose)
    )
