"""`nbdlink nbd-client`: the command line of nbd-client, done by the other verbs.

What is typed becomes a command line of `attach`. What is not needed here is taken, and a line on
stderr says why nothing has to be done.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
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
    "identifier": "-identifier: a device is known by one that is made up for it",
    "priority": "-priority: the ciphers are chosen by what the kernel can do",
}
"""What need not be done, by the name of the option that asks for it, and why."""

_REFUSED: Final = {
    "sdp": ("the Socket Direct Protocol is gone from Linux", "leave -sdp out: this is TCP"),
    "preinit": ("nbdlink negotiates with every server", "leave -preinit out"),
    "size": ("the size of a device is what its server says", "leave -size out"),
}

NAMES_IN_HINTS: Final = {
    "nbds:// or --tls require": "-x, or -A FILE",
    "--tls-certificates DIR": "-F FILE",
    "--tls-cert": "-F",
    "--tls-key": "-K",
    "--tls-ca": "-A",
    "--tls-hostname": "-H",
    "--block-size": "-b",
}
"""Options of other verbs that hints name, and what they are called here; longer ones first."""

_TLS: Final = ("enable_tls", "certfile", "keyfile", "cacertfile", "tlshostname")

_OF_NBDTAB: Final = re.compile(r"(?:/dev/)?(nbd\d+)\Z")
"""What a word looks like, if it stands alone, that is looked up in /etc/nbdtab."""
_PARTITION: Final = re.compile(r"(.*/)?(nbd\d+)p\d+\Z")


def add_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """Fill the parser of `nbd-client`."""

    def add(*names: str, **settings: Any) -> None:
        # With one hyphen or two, as with getopt_long_only.
        long = names[0]
        parser.add_argument(f"-{long}", f"--{long}", *names[1:], **settings)

    parser.add_argument(
        "words", metavar="HOST|PATH [PORT] [DEVICE]", nargs="*", help="or a device of /etc/nbdtab"
    )
    add("name", "-N", metavar="NAME", default="", help="the export's name (empty)")
    add("unix", "-u", action="store_true", help="HOST is the path of a Unix socket")
    add("connections", "-C", metavar="N", help="connections (1)")
    add("block-size", "-b", metavar="SIZE", help="512, 1024, 2048 or 4096 (512)")
    add("timeout", "-t", metavar="S", help="seconds a request may take (30)")
    add("dead-timeout", "-T", metavar="S", help="seconds to wait for a renewal (0; persist: 300)")
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
    add("identifier", "-i", metavar="TEXT", help="not needed")
    add("priority", "-y", metavar="TEXT", help="not needed")
    add("sdp", "-S", action="store_true", help="not available")
    add("preinit", "-P", action="store_true", help="not available")
    add("size", "-B", metavar="BYTES", help="not available")
    parser.add_argument("-V", "-version", "--version", action=_Version, nargs=0)
    parser.set_defaults(run=run)


def prepare(words: Sequence[str]) -> list[str]:
    """Write every option out in the way that argparse cannot misunderstand.

    nbd-client reads its options by getopt_long_only(3): long ones may be cut short (`-block 512`),
    and short ones stand together (`-pn`) or before their values (`-C4`).
    """
    parser = argparse.ArgumentParser()
    add_arguments(parser, "nbd-client")
    options = parser._option_string_actions
    written: list[str] = []
    given = iter(words)
    for word in given:
        if word == "--":
            written += [word, *given]
        elif option := _long_option(word, options):
            _, equals, value = word.partition("=")
            if options[option].nargs != 0 and not equals:
                written.append(_with_value(option, next(given, None)))
            else:
                written.append(f"{option}{equals}{value}")
        else:
            written += _short_options(word, options, given)
    return written


def _long_option(word: str, options: dict[str, argparse.Action]) -> str | None:
    """Give the long option that a word names, whole or cut short; None if it names none."""
    if not word.startswith("-") or len(word) < 3:
        return None
    name = "--" + word.lstrip("-").partition("=")[0]
    found = [name] if name in options else [each for each in options if each.startswith(name)]
    return found[0] if len(found) == 1 else None


def _short_options(
    word: str, options: dict[str, argparse.Action], further: Iterator[str]
) -> Iterator[str]:
    """Take short options apart; what is none of them is left as it is, to be refused."""
    if word[:1] != "-" or word[:2] not in options:
        yield word
        return
    for place, letter in enumerate(word[1:], 2):
        action = options.get(f"-{letter}")
        if action is None:
            yield f"-{letter}"
        elif action.nargs == 0:
            yield action.option_strings[0]
        else:
            yield _with_value(action.option_strings[0], word[place:] or next(further, None))
            return


def _with_value(option: str, value: str | None) -> str:
    return option if value is None else f"{option}={value}"  # argparse says what is missing


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
        if arguments.check is not None:
            return _check(arguments.check)
        from nbdlink.cli.attach import run_detach_of

        return run_detach_of(arguments.disconnect, arguments)
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
    if device := _nbdtab_device(arguments):
        return [f"--name=nbdtab-{device}", *persist]
    target, device = _place(arguments, with_device=True)
    words = [*_target_options(arguments)]
    for name in ("connections", "block_size", "timeout", "dead_timeout"):
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
        if not device:
            raise ConfigError(
                "-persist looks after a device that is named", hint="say which: /dev/nbd0"
            )
        words += [*persist, f"--name=nbd-client-{device.rpartition('/')[2]}"]
    return [*words, "--", str(target), *([device] if device else [])]


def _nbdtab_device(arguments: argparse.Namespace) -> str | None:
    """Give the device that is to be attached as /etc/nbdtab says, or None if a host is named.

    Raises:
        ConfigError: TLS is asked for besides, which must not be lost.
    """
    match = _OF_NBDTAB.match(arguments.words[0]) if len(arguments.words) == 1 else None
    if match is None or arguments.unix:
        return None
    for name in _TLS:
        if getattr(arguments, name):
            raise ConfigError(
                f"-{_hyphened(name)} goes with a host; {match[1]} is attached as /etc/nbdtab says",
                hint="say it there",
            )
    return match[1]


def _look_up(device: str, arguments: argparse.Namespace) -> dict[str, object]:
    """Give what is said besides of a device of /etc/nbdtab and is not in the table.

    As with nbd-client the table is stronger, but it has no words for -readonly and -nonetlink. Its
    `persist` becomes that of `arguments`.

    Raises:
        ConfigError: the table has no such device.
    """
    from nbdlink.link.config import files

    link = files.load().links.get(f"nbdtab-{device}")
    if link is None:
        raise ConfigError(
            f"/etc/nbdtab has no line for {device}",
            hint="add one, or say HOST [PORT] DEVICE; see nbdtab(5)",
        )
    for name in ("name", "connections", "block_size", "timeout", "dead_timeout"):
        if getattr(arguments, name):
            print(
                f"nbdlink: -{_hyphened(name)} has no effect: {device} is attached as "
                "/etc/nbdtab says",
                file=sys.stderr,
            )
    # Elsewhere the supervisor does it for every link, so what was read does not tell.
    path, _, number = link.source.rpartition(":")
    fields = Path(path).read_text().split("\n")[int(number) - 1].split()
    if len(fields) > 3 and "persist" in fields[3].split(","):
        arguments.persist = True
    said: dict[str, object] = {"read_only": True} if arguments.readonly else {}
    return said | ({"road": "ioctl"} if arguments.nonetlink else {})


def _hyphened(name: str) -> str:
    return name.replace("_", "-")


def _take_old_style(arguments: argparse.Namespace) -> None:
    """Take `bs=1024` and `timeout=30`, which old scripts have among the operands."""
    for word in list(arguments.words):
        name, equals, value = word.partition("=")
        if equals and name in ("bs", "timeout"):
            arguments.words.remove(word)
            setattr(arguments, "block_size" if name == "bs" else "timeout", value)


def _place(arguments: argparse.Namespace, *, with_device: bool) -> tuple[Target, str]:
    """Tell where the export is, and the device; without one, which is a free one, an empty word."""
    from nbdlink.uri import Target

    words = list(arguments.words)
    wanted = "PATH" if arguments.unix else "HOST [PORT]"
    if not words:
        raise ConfigError(
            f"0 words, where there should be {wanted}" + (" DEVICE" if with_device else ""),
            hint="nbdlink nbd-client --help",
        )
    place, *rest = words
    port = DEFAULT_PORT
    if rest and rest[0].isascii() and rest[0].isdigit():
        port = int(rest.pop(0))
        if not 0 < port < 65536:
            raise ConfigError(f"{port} is not a port", hint="use 1 to 65535")
    elif len(rest) > 1 and not arguments.unix:
        raise ConfigError(f"{rest[0]!r} is not a port", hint="say HOST PORT DEVICE")
    if len(rest) > (1 if with_device else 0):
        raise ConfigError(
            f"{len(words)} words, where there should be {wanted}"
            + (" DEVICE" if with_device else ""),
            hint="nbdlink nbd-client --help",
        )
    device = rest[0] if rest else ""
    if arguments.unix:
        return Target(socket=place, export=arguments.name), device
    return Target(host=place, port=port, export=arguments.name), device


def _has_tls(arguments: argparse.Namespace) -> bool:
    return any(getattr(arguments, name) for name in _TLS)


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

    parser = argparse.ArgumentParser(prog="nbdlink nbd-client")
    attach.add_arguments(parser, "attach")
    device = _nbdtab_device(arguments)
    said = _look_up(device, arguments) if device else {}
    wanted = parser.parse_intermixed_args(attach_words(arguments))
    wanted.verbose = arguments.verbose
    wanted.printed = "Connected {}"  # from which scripts take which one was free
    wanted.instead = said
    if not arguments.persist or arguments.nofork:
        return attach.run_attach(wanted)
    from nbdlink.server.daemon import fork_to_background, log_to_syslog

    background = fork_to_background()

    def attached() -> None:
        background()
        log_to_syslog()

    return attach.run_attach(wanted, attached)


def _check(device: str) -> int:
    """Print who attached a device, or the one that a partition is on; 1 if nobody has."""
    from nbdlink.errors import KernelError
    from nbdlink.kernel import sysfs

    try:
        pid = sysfs.pid(sysfs.index_of(_PARTITION.sub(r"\1\2", device)))
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
