"""`nbdlink enbd-server`: the command line of enbd-server, done by `serve`.

What is typed becomes a command line of `serve`, with enbd-server's defaults. What the modern
protocol makes needless is taken, and a line on stderr says why nothing has to be done.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from nbdlink.errors import ConfigError

_LONGEST_SIGNATURE: Final = 128
_NEGOTIATION: Final = 90.0
"""Seconds, if nothing is said."""
_FOR_EVER: Final = 86400
_SIZES: Final = re.compile(r"(-|\d+[kmg]?)(,(-|\d+[kmg]?))*\Z", re.IGNORECASE)
_STATE: Final = Path("/var/lib/nbdlink")
"""Where clients are kept, beyond a reboot; with enbd-server it was /var/state/nbd."""
_PROBED: Final = re.compile(r"[^\d,]*\Z")
"""What stands for a size that is to be found out: "-" as a rule, or any other word."""

_BLOCK_SIZE: Final = 1024
"""Bytes in a stripe, if nothing is said."""

_MODES: Final = {"linear": "linear", "stripe": "striping", "mirror": "mirroring"}

NAMES_IN_HINTS: Final = {
    "choose another path": "choose another -i ID",
    "choose one with --port": "choose another CTRLPORT",
    "--tls-certificates DIR": "-cert FILE",
    "--tls-cert": "-cert",
    "--tls-key": "-keyfile",
    "--tls-ca": "-CAfile",
    "--tls-verify-depth": "-verify",
}
"""Options of `serve` that hints name, and what they are called here; longer ones first."""

_NEEDLESS: Final = {
    "write_order": "-w: a flush waits for every write before it, on all channels, so that a file "
    "system's journal is in order on the disk at any time",
    "port_range": "-F: all connections come to the one port",
    "reply_cache": "-h: a request that is sent again is served only when nothing is left of the "
    "connection that it was first sent on",
}
"""What need not be done, by the name of the option that asks for it, and why."""


def add_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """Fill the parser of `enbd-server`."""
    add = parser.add_argument
    # What asks for help elsewhere limits the reply cache here.
    replace = parser.add_argument_group(conflict_handler="resolve").add_argument
    add("port", metavar="CTRLPORT", help="TCP port")
    add("storage", metavar="FILE", nargs="+", help="files or devices; the last word may be a size")
    add("-s", dest="size", metavar="SIZE[,SIZE...]", help="bytes of each, with K, M or G; - probes")
    mode = parser.add_mutually_exclusive_group()
    for letter, name in zip("l01", _MODES, strict=True):
        mode.add_argument(
            f"-{letter}", dest="mode", action="store_const", const=name, help=f"RAID {_MODES[name]}"
        )
    add("-r", dest="read_only", action="store_true", help="refuse writes")
    add("-y", dest="synchronous", action="store_true", help="write through")
    add("-n", dest="direct", action="store_true", help="without the page cache (O_DIRECT)")
    add("-a", dest="asynchronous", action="store_true", help="acknowledge writes before done")
    add("-K", dest="lock_ranges", action="store_true", help="lock the ranges of requests")
    add("-b", dest="block_size", metavar="SIZE", help="1024, 2048 or 4096 (what a client needs)")
    add("-i", dest="signature", metavar="ID", help="what identifies the server and its data")
    add("-t", dest="timeout", metavar="S", help="seconds to negotiate; 0: any time (90)")
    add("-w", dest="write_order", metavar="MS", help="not needed")
    add("-F", dest="port_range", metavar="MIN[-MAX]", help="not needed")
    replace("-h", dest="reply_cache", metavar="LIMIT", help="not needed")
    add("-cert", dest="certificate", metavar="FILE", help="our certificate; there is TLS then")
    add("-keyfile", dest="key", metavar="FILE", help="its key (in the same file)")
    add("-CAfile", dest="authority", metavar="FILE", help="who signed the clients' certificates")
    add("-CApath", dest="authorities", metavar="DIR", help="the same, as a directory")
    add("-verify", dest="verify", metavar="DEPTH", help="clients must have a certificate; 0: not")
    parser.set_defaults(run=run)


def prepare(words: Sequence[str]) -> list[str]:
    """Join options with values that look like options themselves: `-F -4020`, `-s -,2G`."""
    joined: list[str] = []
    given = iter(words)
    for word in given:
        value = next(given, None) if word in ("-F", "-s") else None
        joined.append(word if value is None else f"{word}={value}")
    return joined


def run(arguments: argparse.Namespace) -> int:
    """Serve, in the background if nobody asks for words."""
    from nbdlink.cli import serve

    parser = argparse.ArgumentParser(prog="nbdlink enbd-server")
    serve.add_arguments(parser, "serve")
    words = serve_words(arguments)
    for name, why in _NEEDLESS.items():
        if getattr(arguments, name) is not None:
            print(f"nbdlink: not needed: {why}", file=sys.stderr)
    if arguments.asynchronous and arguments.synchronous:
        print(
            "nbdlink: not done: -a: with -y no write is acknowledged before it is on the disk",
            file=sys.stderr,
        )
    served = parser.parse_intermixed_args(words)
    served.verbose = arguments.verbose
    served.announce = arguments.verbose > 0
    if served.remember_clients is not None:
        _STATE.mkdir(exist_ok=True)
    return serve.run(served)


def serve_words(arguments: argparse.Namespace) -> list[str]:
    """Give the command line of `serve` that does the same.

    Raises:
        ConfigError: it cannot be done.
    """
    storages, size = _storages(arguments)
    words = ["--format=raw", f"--port={_port(arguments.port)}", *_negotiation(arguments.timeout)]
    words += [*_caching(arguments), *_security(arguments)]
    if size is not None:
        words.append(f"--size={size}")
    for name in ("read_only", "lock_ranges"):
        if getattr(arguments, name):
            words.append(f"--{name.replace('_', '-')}")
    if arguments.asynchronous and not arguments.synchronous:
        words.append("--write-behind")
    if arguments.block_size is not None:
        if arguments.block_size not in ("1024", "2048", "4096"):
            raise ConfigError(
                f"-b {arguments.block_size} is not a block size", hint="use 1024, 2048 or 4096"
            )
        words.append(f"--block-size={arguments.block_size}")
    words += _identity(arguments.signature)
    if not arguments.verbose:
        words.append("--fork")
    # In a place where they are neither options nor NAME=STORAGE.
    paths = [path if path.startswith("/") else f"./{path}" for path in storages]
    if len(paths) > 1:
        if arguments.mode == "stripe":
            words.append(f"--stripe-unit={arguments.block_size or _BLOCK_SIZE}")
        return [*words, f"--{arguments.mode or 'linear'}", *paths]
    return [*words, *paths]


def _storages(arguments: argparse.Namespace) -> tuple[list[str], str | None]:
    """Tell the files from the size, which may be the last operand as well."""
    storages, size = list(arguments.storage), arguments.size
    last = storages[-1]
    if len(storages) > 1 and size is None and _SIZES.match(last) and not Path(last).exists():
        size = storages.pop()
    if size is None:
        return storages, None
    size = ",".join("-" if _PROBED.match(each) else each for each in size.split(","))
    if not _SIZES.match(size):
        raise ConfigError(f"-s {size} is no size, nor a list", hint="say for example 2G,-,512M")
    if size.count(",") >= len(storages):
        raise ConfigError(f"-s {size} has more sizes than there are files")
    return storages, None if set(size) <= set("-,") else size


def _port(text: str) -> str:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 65536):
        raise ConfigError(f"{text!r} is not a port", hint="use 1 to 65535")
    return text


def _negotiation(text: str | None) -> Iterator[str]:
    from nbdlink.sizes import parse_seconds

    never = text is not None and text.isdigit() and not int(text)
    seconds = _NEGOTIATION if text is None else _FOR_EVER if never else parse_seconds(text)
    yield f"--negotiation-timeout={seconds:g}"


def _caching(arguments: argparse.Namespace) -> Iterator[str]:
    modes = {(True, True): "directsync", (True, False): "none", (False, True): "writethrough"}
    if mode := modes.get((arguments.direct, arguments.synchronous)):
        yield f"--cache={mode}"


def _identity(signature: str | None) -> Iterator[str]:
    """Name the signature, the pid file where enbd-server has it, and who is to be told."""
    if signature is None:
        return
    if not 0 < len(signature) <= _LONGEST_SIGNATURE:
        raise ConfigError(
            f"-i: the signature has {len(signature)} characters",
            hint=f"use 1 to {_LONGEST_SIGNATURE}",
        )
    yield f"--signature={signature}"
    folder = Path("/var/run")
    if "/" in signature:
        return
    if os.access(folder, os.W_OK):  # or else where `serve` has it
        yield f"--pid-file={folder}/nbd-server-{signature}.pid"
    if os.access(_STATE if _STATE.exists() else _STATE.parent, os.W_OK):
        yield f"--remember-clients={_STATE}/server-{signature}.clients"


def _security(arguments: argparse.Namespace) -> Iterator[str]:
    certificate, depth = arguments.certificate, arguments.verify
    authority = arguments.authority or arguments.authorities
    if not any((certificate, arguments.key, authority, depth)):
        return
    if certificate is None:
        raise ConfigError("TLS is asked for without a certificate", hint="say -cert FILE as well")
    if arguments.authority and arguments.authorities:
        raise ConfigError("-CAfile and -CApath exclude each other", hint="leave one of them out")
    yield "--tls=require"
    yield f"--tls-cert={certificate}"
    yield f"--tls-key={arguments.key or certificate}"
    if authority:
        yield f"--tls-ca={authority}"
    if depth is None:
        return
    if not (depth.isascii() and depth.isdigit()):
        raise ConfigError(f"-verify {depth} is not a depth", hint="use 0, 1, 2, ...")
    if int(depth):
        yield "--tls-verify-peer"
        yield f"--tls-verify-depth={depth}"
