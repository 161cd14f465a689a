"""`nbdlink nbd-client`: the command line of nbd-client, done by the other verbs.

What is typed becomes a command line of `attach`. What is not needed here is taken, and a line on
stderr says why nothing has to be done.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final, NoReturn

from nbdlink.errors import ConfigError
from nbdlink.uri import DEFAULT_PORT
from nbdlink.version import __version__

if TYPE_CHECKING:
    from nbdlink.uri import Target

_NEEDLESS: Final = {
    "swap": "-swap: with a device that is attached no process stands in the data path; with TLS, "
    "see the relay in nbdlink-tls(7)",
    "systemd_mark": "-systemd-mark: the device does not depend on a process that could be ended",
    "no_optgo": "-no-optgo: what the server can do is found out",
    "priority": "-priority: the ciphers are chosen by what the kernel can do",
}
"""What need not be done, by the name of the option that asks for it, and why."""

_REFUSED: Final = {
    "sdp": ("the Socket Direct Protocol is gone from Linux", "leave -sdp out: this is TCP"),
    "preinit": ("nbdlink negotiates with every server", "leave -preinit out"),
    "size": ("the size of a device is what its server says", "leave -size out"),
}


def add_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """Fill the parser of `nbd-client`."""

    def add(*names: str, **settings: Any) -> None:
        # With one hyphen or two, as with getopt_long_only.
        long = names[0]
        parser.add_argument(f"-{long}", f"--{long}", *names[1:], **settings)

    parser.add_argument(
        "words", metavar="HOST|PATH [PORT] DEVICE", nargs="*", help="or a device of /etc/nbdtab"
    )
    add("name", "-N", metavar="NAME", default="", help="the export's name (empty)")
    add("unix", "-u", action="store_true", help="HOST is the path of a Unix socket")
    add("connections", "-C", metavar="N", help="connections (1)")
    add("block-size", "-b", metavar="SIZE", help="512, 1024, 2048 or 4096 (512)")
    add("timeout", "-t", metavar="S", help="seconds a request may take (30)")
    add("readonly", "-R", action="store_true", help="bind it read-only")
    add("persist", "-p", action="store_true", help="stay, and renew what breaks")
    add("nofork", "-n", action="store_true", help="with -persist: in the foreground")
    add("nonetlink", "-L", action="store_true", help="use the ioctl interface")
    add("netlink", action="store_true", help="use netlink, as is done if there is it")
    add("disconnect", "-d", metavar="DEVICE", help="detach this device")
    add("check", "-c", metavar="DEVICE", help="tell by the exit status whether it is attached")
    add("list", "-l", action="store_true", help="list what a server exports")
    add("enable-tls", "-x", action="store_true", help="demand TLS")
    add("certfile", "-F", metavar="FILE", help="our certificate")
    add("keyfile", "-K", metavar="FILE", help="its key (in the same file)")
    add("cacertfile", "-A", metavar="FILE", help="who signed the server's certificate")
    add("tlshostname", "-H", metavar="NAME", help="the name in the server's certificate")
    add("swap", "-s", action="store_true", help="not needed")
    add("systemd-mark", "-m", action="store_true", help="not needed")
    add("no-optgo", "-g", action="store_true", help="not needed")
    add("priority", "-y", metavar="TEXT", help="not needed")
    add("sdp", "-S", action="store_true", help="not available")
    add("preinit", "-P", action="store_true", help="not available")
    add("size", "-B", metavar="BYTES", help="not available")
    parser.add_argument("-V", "-version", "--version", action=_Version, nargs=0)
    parser.set_defaults(run=run)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> NoReturn:
        print(f"nbdlink {__version__}, called as nbd-client")
        parser.exit()


def run(arguments: argparse.Namespace) -> int:
    """Attach, detach, check or list."""
    if sum((arguments.disconnect is not None, arguments.check is not None, arguments.list)) > 1:
        raise ConfigError("-d, -c and -l exclude each other")
    if arguments.disconnect is not None or arguments.check is not None:
        if arguments.words:
            raise ConfigError(f"{arguments.words[0]!r} is too much: -d and -c take a device only")
        return _check(arguments.check) if arguments.check is not None else _detach(arguments)
    for name, (why, hint) in _REFUSED.items():
        if getattr(arguments, name):
            raise ConfigError(f"-{name} is not available: {why}", hint=hint)
    _take_old_style(arguments)
    for name, why in _NEEDLESS.items():
        if getattr(arguments, name):
            print(f"nbdlink: not needed: {why}", file=sys.stderr)
    if _has_tls(arguments) and arguments.cacertfile is None:
        print(
            "nbdlink: without -A FILE the server is not verified: whoever is in between can read",
            file=sys.stderr,
        )
    return _list(arguments) if arguments.list else _attach(arguments)


def attach_words(arguments: argparse.Namespace) -> list[str]:
    """Give the command line of `attach` that does the same.

    Raises:
        ConfigError: it cannot be done.
    """
    persist = ["--supervise"] if arguments.persist else []
    if len(arguments.words) == 1:
        if options := _said(arguments):
            raise ConfigError(
                f"-{options[0]} goes with a host; {arguments.words[0]} is attached as "
                "/etc/nbdtab says",
                hint="say it there",
            )
        device = arguments.words[0].removeprefix("/dev/")
        return [f"--name=nbdtab-{device}", *persist]
    target, device = _place(arguments, with_device=True)
    words = [*_target_options(arguments)]
    for name in ("connections", "block_size", "timeout"):
        if (value := getattr(arguments, name)) is not None:
            if not value.isdecimal():
                raise ConfigError(f"-{name.replace('_', '-')} takes a number, not {value!r}")
            if name != "timeout" or int(value):  # 0 leaves it to the kernel
                words.append(f"--{name.replace('_', '-')}={value}")
    if arguments.readonly:
        words.append("--read-only")
    if arguments.nonetlink:
        words.append("--ioctl")
    if persist:
        words += [*persist, f"--name=nbd-client-{device.rpartition('/')[2]}"]
    return [*words, "--", str(target), device]


def _said(arguments: argparse.Namespace) -> list[str]:
    """Tell which options describe an export that is to be attached."""
    names = ("name", "unix", "connections", "block_size", "timeout", "readonly", "nonetlink")
    tls = ("enable_tls", "certfile", "keyfile", "cacertfile", "tlshostname")
    return [name.replace("_", "-") for name in (*names, *tls) if getattr(arguments, name)]


def _take_old_style(arguments: argparse.Namespace) -> None:
    """Take `bs=1024` and `timeout=30`, which old scripts have among the operands."""
    for word in list(arguments.words):
        name, equals, value = word.partition("=")
        if equals and name in ("bs", "timeout"):
            arguments.words.remove(word)
            setattr(arguments, "block_size" if name == "bs" else "timeout", value)


def _place(arguments: argparse.Namespace, *, with_device: bool) -> tuple[Target, str]:
    """Tell where the export is, and the device; without one an empty word."""
    from nbdlink.uri import Target

    words = list(arguments.words)
    device = words.pop() if with_device and len(words) > 1 else ""
    if not words or len(words) > (1 if arguments.unix else 2):
        wanted = "PATH" if arguments.unix else "HOST [PORT]"
        raise ConfigError(
            f"{len(arguments.words)} words, where there should be {wanted}"
            + (" DEVICE" if with_device else ""),
            hint="nbdlink nbd-client --help",
        )
    if arguments.unix:
        return Target(socket=words[0], export=arguments.name), device
    port = words[1] if len(words) > 1 else str(DEFAULT_PORT)
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ConfigError(f"{port!r} is not a port", hint="say HOST PORT DEVICE")
    return Target(host=words[0], port=int(port), export=arguments.name), device


def _has_tls(arguments: argparse.Namespace) -> bool:
    names = ("enable_tls", "certfile", "keyfile", "cacertfile", "tlshostname")
    return any(getattr(arguments, name) for name in names)


def _target_options(arguments: argparse.Namespace) -> Iterator[str]:
    """Give what TLS takes, in the words of those verbs that ask a server."""
    if not _has_tls(arguments):
        return
    yield "--tls=require"
    certificate = arguments.certfile
    for word, value in (
        ("cert", certificate),
        ("key", arguments.keyfile or certificate),
        ("ca", arguments.cacertfile),
        ("hostname", arguments.tlshostname),
    ):
        if value is not None:
            yield f"--tls-{word}={value}"
    if arguments.cacertfile is None:
        yield "--tls-no-verify-peer"


# What is done.


def _attach(arguments: argparse.Namespace) -> int:
    from nbdlink.cli import attach
    from nbdlink.link.config import files

    parser = argparse.ArgumentParser(prog="nbdlink nbd-client")
    attach.add_arguments(parser, "attach")
    wanted = parser.parse_intermixed_args(attach_words(arguments))
    if wanted.target is None and wanted.name not in files.load().links:
        raise ConfigError(
            f"/etc/nbdtab has no line for {arguments.words[0]}",
            hint="what is not in there is attached with HOST [PORT] DEVICE",
        )
    wanted.verbose = arguments.verbose
    if not arguments.persist or arguments.nofork:
        return attach.run_attach(wanted)
    from nbdlink.server.daemon import fork_to_background, log_to_syslog

    background = fork_to_background()

    def attached() -> None:
        background()
        log_to_syslog()

    return attach.run_attach(wanted, attached)


def _detach(arguments: argparse.Namespace) -> int:
    from nbdlink.cli.attach import run_detach

    detached = argparse.Namespace(
        device=[arguments.disconnect], all=False, force=False, verbose=arguments.verbose
    )
    return run_detach(detached)


def _check(device: str) -> int:
    """Print who attached a device; 1 if nobody has."""
    from nbdlink.errors import KernelError
    from nbdlink.kernel import sysfs

    try:
        pid = sysfs.pid(sysfs.index_of(device))
    except KernelError:
        return 1
    if pid is None:
        return 1
    print(pid)
    return 0


def _list(arguments: argparse.Namespace) -> int:
    """Print what a server exports, in nbd-client's form."""
    from nbdlink.cli.output import printable
    from nbdlink.cli.tls import add_client_arguments, client_options
    from nbdlink.client.negotiate import Negotiation
    from nbdlink.client.security import Security

    target, _ = _place(arguments, with_device=False)
    parser = argparse.ArgumentParser(prog="nbdlink nbd-client")
    add_client_arguments(parser)
    options = client_options(parser.parse_args([*_target_options(arguments)]))
    with Negotiation.best(target, security=Security(target, options)) as negotiation:
        print("Negotiation: ..")
        for export in negotiation.list_exports():
            print(printable(export.name))
    return 0
