"""`nbdlink qemu-nbd`: the command line of qemu-nbd, done by the other verbs.

What is typed becomes a command line of `serve`, with qemu-nbd's defaults: one client, and the end
when it has left; all IPv4 addresses; and space is given back only if that is asked for.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from nbdlink.errors import ConfigError, OptionError
from nbdlink.uri import Target, is_uri
from nbdlink.version import __version__

if TYPE_CHECKING:
    from nbdlink.client.negotiate import Negotiation

_OLD_NAME = re.compile(
    r"nbd:(?:unix:(?P<socket>[^:]+)|(?P<host>[^:\[\]]+|\[[^\]]+\]):(?P<port>[0-9]{1,5}))"
    r"(?::exportname=(?P<export>.*))?"
)
"""How exports were called before there were URIs: nbd:HOST:PORT, nbd:unix:PATH, ..."""

_SOCKET = "/var/lock/qemu-nbd-{}"
"""Where qemu-nbd listens for a device, if nothing else is said."""

# As options of `serve` that take a value, and that do not.
_VALUES = (
    *("port", "bind", "socket", "export_name", "description", "offset", "pid_file", "format"),
    *("load_snapshot", "cache", "discard", "detect_zeroes", "tls_creds", "tls_authz"),
)
_AIO_MODES = ("threads", "native", "io_uring")
_SWITCHES = ("read_only", "snapshot", "nocache", "allocation_depth", "image_opts", "fork")


def add_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """Fill the parser of `qemu-nbd`."""
    add = parser.add_argument
    add("filename", metavar="FILE|DEV", nargs="?", help="an image or a URI, or with -d a device")
    add("-V", "--version", action=_Version, nargs=0, help="print the version")
    add("-p", "--port", metavar="PORT", help="TCP port (10809)")
    add("-b", "--bind", metavar="ADDRESS", help="listen on, or with -L ask, this address (0.0.0.0)")
    add("-k", "--socket", metavar="PATH", help="a Unix socket instead")
    add("-e", "--shared", metavar="N", type=int, default=1, help="clients at once (1; 0: any)")
    add("-t", "--persistent", action="store_true", help="stay when the last client leaves")
    add("-x", "--export-name", metavar="NAME", help="the export's name (empty)")
    add("-D", "--description", metavar="TEXT", help="words for people")
    add("-o", "--offset", metavar="SIZE", help="begin this far into the image")
    add("-f", "--format", metavar="FORMAT", help="raw, qcow2, ... (found out)")
    add("-r", "--read-only", action="store_true", help="refuse writes")
    add("-s", "--snapshot", action="store_true", help="writes go to a temporary file")
    add("-l", "--load-snapshot", metavar="ID|NAME", help="serve an internal snapshot")
    add("-n", "--nocache", action="store_true", help="the same as --cache none")
    add("--cache", metavar="MODE", help="none, writeback (default), writethrough, ...")
    add("--aio", metavar="MODE", choices=_AIO_MODES, help="threads (always), native or io_uring")
    add("--discard", metavar="MODE", help="ignore (default) or unmap")
    add("--detect-zeroes", metavar="MODE", help="off (default), on or unmap")
    add("--image-opts", action="store_true", help="FILE is driver=...,file.filename=...")
    add("-A", "--allocation-depth", action="store_true", help="offer qemu:allocation-depth")
    add("-B", "--bitmap", metavar="NAME", action="append", default=[], help="offer a bitmap")
    add("-L", "--list", action="store_true", help="list what another server exports")
    add("-c", "--connect", metavar="DEV", help="bind the image to this device")
    add("-d", "--disconnect", action="store_true", help="detach the device DEV")
    add("--object", metavar="TYPE,id=ID,...", action="append", default=[], help="credentials")
    add("--tls-creds", metavar="ID", help="have TLS, with these credentials")
    add("--tls-authz", metavar="ID", help="let only this one in")
    add("--tls-hostname", metavar="NAME", help="with -L: the name in the certificate")
    add("--fork", action="store_true", help="go to the background once clients can come")
    add("--pid-file", metavar="PATH", help="a file for the process's number")
    add("-T", "--trace", metavar="PATTERN", action="append", default=[], help="log in full")
    add("--selinux-label", metavar="LABEL", help="not available")
    parser.set_defaults(run=run)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> NoReturn:
        print(f"nbdlink {__version__}, called as qemu-nbd")
        parser.exit()


def run(arguments: argparse.Namespace) -> int:
    """Serve, attach, detach or list."""
    if arguments.selinux_label is not None:
        if not Path("/sys/fs/selinux/enforce").exists():
            why = "SELinux is not enabled on this machine"
        else:
            why = "sockets get the label that the policy has for them, and no other"
        raise ConfigError(f"--selinux-label is not available: {why}", hint="leave it out")
    if arguments.list:
        return _list(arguments)
    if arguments.tls_hostname is not None:
        raise ConfigError("--tls-hostname is for --list only")
    if arguments.filename is None:
        raise ConfigError("an image is missing", hint="name a file, or say -L or -d")
    if arguments.disconnect:
        from nbdlink.cli.attach import run_detach_of

        return run_detach_of(arguments.filename, arguments)
    from nbdlink.cli import serve
    from nbdlink.cli.main import Parser

    _explain(arguments)
    parser = Parser(prog="nbdlink qemu-nbd")
    serve.add_arguments(parser, "serve")
    served = parser.parse_intermixed_args(serve_words(arguments))
    served.verbose = arguments.verbose
    served.announce = False
    return serve.run(served)


def _explain(arguments: argparse.Namespace) -> None:
    """Say why something that is asked for is not needed.

    Raises:
        ConfigError: qemu-nbd would not do it either.
    """
    if arguments.aio == "native" and not (
        arguments.nocache or arguments.cache in ("none", "directsync")
    ):
        raise ConfigError("--aio native goes without the page cache only", hint="say --cache none")
    if arguments.aio not in (None, "threads"):
        print(
            f"nbdlink: not needed: --aio {arguments.aio}: requests are done in threads here, "
            "which writes the same to the disk",
            file=sys.stderr,
        )
    if arguments.socket is not None and (arguments.port or arguments.bind):
        print(
            "nbdlink: not done: --port and --bind: with --socket there is only that",
            file=sys.stderr,
        )


def serve_words(arguments: argparse.Namespace) -> list[str]:
    """Give the command line of `serve` that does the same.

    Raises:
        ConfigError: it cannot be done.
    """
    words = [f"--shared={arguments.shared}"]
    words.append("--persistent" if arguments.persistent else "--once")
    for name in _VALUES:
        if arguments.socket is not None and name in ("port", "bind"):
            continue  # as with qemu-nbd
        if (value := getattr(arguments, name)) is not None:
            words.append(f"--{name.replace('_', '-')}={value}")
    words += [f"--{name.replace('_', '-')}" for name in _SWITCHES if getattr(arguments, name)]
    words += [f"--bitmap={name}" for name in arguments.bitmap]
    words += [f"--object={text}" for text in arguments.object]
    words += [f"--trace={text}" for text in map(_traced, arguments.trace) if text]
    if arguments.discard is None:
        words.append("--discard=ignore")
    device = arguments.connect
    if device is not None:
        words.append(f"--attach={device}")
        if not arguments.verbose and not arguments.fork:
            words.append("--fork")
    if device is not None and not (arguments.socket or arguments.port or arguments.bind):
        words.append(f"--socket={_SOCKET.format(device.rpartition('/')[2])}")
    elif not (arguments.socket or arguments.bind or os.environ.get("LISTEN_FDS")):
        words.append("--bind=0.0.0.0")
    name = arguments.filename if arguments.image_opts else _path(arguments.filename)
    return [*words, "--", name]


def _traced(text: str) -> str:
    """Give what is to be traced by our names; nothing if QEMU's have no like here.

    As with qemu-nbd it is not an error that there is no such event.
    """
    from nbdlink.cli.trace import EVENTS

    known: list[str] = []
    missing: list[str] = []
    for piece in text.split(","):
        key, equals, value = piece.partition("=")
        pattern = value if equals else key
        if (equals and key != "enable") or any(fnmatchcase(each, pattern) for each in EVENTS):
            known.append(piece)
        elif pattern.startswith("nbd_"):
            known.append("enable=nbd_server")  # nbd_negotiate_begin, nbd_co_send_iov ...
        else:
            missing.append(pattern)
    if missing:
        print(
            f"nbdlink: not done: --trace {missing[0]}: nothing of that name can be traced here; "
            f"there are {', '.join(EVENTS)}",
            file=sys.stderr,
        )
        if not any(piece.startswith(("enable=", "events=", "nbd_")) for piece in known):
            return ""
    return ",".join(known)


def _path(filename: str) -> str:
    """Give the path of an image, in a way that it cannot be taken for something else, or a URI.

    Raises:
        ConfigError: it names something that is neither a file nor an export.
    """
    if is_uri(filename):
        return filename
    if old := _OLD_NAME.fullmatch(filename):
        host, port = old["host"], old["port"]
        target = Target(host=host and host.strip("[]"), socket=old["socket"])
        if port:
            target = replace(target, port=int(port))
        return str(replace(target, export=old["export"] or ""))
    protocol = re.match(r"([^/:]*):", filename)
    if protocol and protocol[1] == "file":
        filename = filename.removeprefix("file:")
    elif protocol:
        raise ConfigError(
            f"{filename}: {protocol[1]}: is no file, and nothing else can be served",
            hint="a file with a colon in its name is ./NAME",
        )
    # Not an option, and not NAME=STORAGE.
    return filename if filename.startswith("/") else f"./{filename}"


# Listing.


def _list(arguments: argparse.Namespace) -> int:
    """Tell what another server exports, in qemu-nbd's form."""
    from nbdlink.cli.objects import client_tls
    from nbdlink.cli.output import printable
    from nbdlink.client.negotiate import Negotiation
    from nbdlink.client.security import Security

    said = ("export_name", "offset", "format", "connect", "load_snapshot", "cache", "aio")
    if arguments.filename is not None or arguments.disconnect or arguments.bitmap:
        raise ConfigError("--list asks another server, and takes no image or device")
    for name in said:
        if getattr(arguments, name) is not None:
            raise ConfigError(f"--list goes without --{name.replace('_', '-')}")
    if arguments.socket is not None:
        target = Target(socket=arguments.socket)
    else:
        target = Target(host=arguments.bind or "127.0.0.1", port=int(arguments.port or 10809))
    options = client_tls(arguments.object, arguments.tls_creds, arguments.tls_hostname)
    with Negotiation.best(target, security=Security(target, options)) as negotiation:
        exports = negotiation.list_exports()
        print(f"exports available: {len(exports)}")
        for export in exports:
            print(f" export: '{printable(export.name)}'")
            if export.description:
                print(f"  description: {printable(export.description)}")
            _describe(negotiation, export.name)
    return 0


def _describe(negotiation: Negotiation, name: str) -> None:
    from nbdlink.cli.output import printable
    from nbdlink.protocol.constants import TransmissionFlag

    try:
        export = negotiation.info(name)
    except OptionError:
        return
    print(f"  size:  {export.size}")
    words = [
        word
        for flag, word in (
            (TransmissionFlag.READ_ONLY, "readonly"),
            (TransmissionFlag.SEND_FLUSH, "flush"),
            (TransmissionFlag.SEND_FUA, "fua"),
            (TransmissionFlag.ROTATIONAL, "rotational"),
            (TransmissionFlag.SEND_TRIM, "trim"),
            (TransmissionFlag.SEND_WRITE_ZEROES, "zeroes"),
            (TransmissionFlag.SEND_DF, "df"),
            (TransmissionFlag.CAN_MULTI_CONN, "multi"),
            (TransmissionFlag.SEND_RESIZE, "resize"),
            (TransmissionFlag.SEND_CACHE, "cache"),
            (TransmissionFlag.SEND_FAST_ZERO, "fast-zero"),
        )
        if export.flags & flag
    ]
    print(f"  flags: {int(export.flags):#x} ( {' '.join(words)} )")
    if export.block_size:
        print(f"  min block: {export.minimum_block}")
        print(f"  opt block: {export.preferred_block}")
        print(f"  max block: {export.maximum_payload}")
    if contexts := negotiation.list_meta_contexts(name):
        print(f"  available meta contexts: {len(contexts)}")
        for context in contexts:
            print(f"   {printable(context)}")
