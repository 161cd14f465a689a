"""`nbdlink copy`: image <-> export, sparse and pipelined."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING

from nbdlink.cli.tls import add_client_arguments, client_options
from nbdlink.errors import ConfigError, StorageError
from nbdlink.sizes import format_size, parse_size

if TYPE_CHECKING:
    from nbdlink.copy.image import Summary


def add_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """Fill the parser of `copy`."""
    add = parser.add_argument
    add("source", metavar="SRC", help="a file, a block device, an export, or - for stdin")
    add("destination", metavar="DST", help="the same, - for stdout, or null: to read only")
    add(
        "-C",
        "--connections",
        metavar="N",
        type=int,
        help="connections to each export (4 where the server allows it)",
    )
    add("-R", "--requests", metavar="N", type=int, default=8, help="requests in flight on each (8)")
    add("--request-size", metavar="SIZE", default="512K", help="data in a request (512K)")
    add(
        "-S",
        "--sparse",
        metavar="SIZE",
        default="4K",
        help="blocks of so many zeroes become holes (4K; 0: none)",
    )
    add("--allocated", action="store_true", help="make no holes: allocate all of DST")
    add("--no-flush", action="store_true", help="do not wait until all is on stable storage")
    add("--verify", action="store_true", help="read both again afterwards and compare them")
    add(
        "--progress",
        action=argparse.BooleanOptionalAction,
        help="show a bar (if stderr is a terminal)",
    )
    add("--json", action="store_true", help="print what was done as JSON")
    add_client_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Copy, and say what was done."""
    from nbdlink.cli import output
    from nbdlink.copy.engine import Tuning
    from nbdlink.copy.image import CopySpec, copy

    if arguments.json and arguments.destination == "-":
        raise ConfigError(
            "stdout cannot take both the data and --json", hint="copy to a file, or leave it out"
        )
    # What is read from or written to in their place (`main`) would take it for done.
    for word, stream, name in (
        (arguments.source, sys.__stdin__, "stdin"),
        (arguments.destination, sys.__stdout__, "stdout"),
    ):
        if word == "-" and stream is None:
            raise StorageError(f"{name} is closed", hint="open it, or name a file")
    spec = CopySpec(
        source=arguments.source,
        destination=arguments.destination,
        connections=arguments.connections,
        tuning=Tuning(
            requests=arguments.requests,
            request_size=parse_size(arguments.request_size),
            sparse=parse_size(arguments.sparse),
            allocate=arguments.allocated,
        ),
        flush=not arguments.no_flush,
        verify=arguments.verify,
        tls=client_options(arguments),
    )
    visible = sys.stderr is not None and sys.stderr.isatty()
    if arguments.progress is not None:
        visible = arguments.progress
    if visible:
        with contextlib.suppress(OSError):  # said better by who opens them
            _tell_of_format(spec.source, spec.destination)
    with contextlib.ExitStack() as stack:
        watch = None
        if visible:
            watch = stack.enter_context(output.progress()).begin
        try:
            summary = copy(spec, watch)
        except KeyboardInterrupt:
            stack.close()
            print(f"nbdlink: {spec.destination} is incomplete", file=sys.stderr)
            raise
    if summary.unflushed and sys.stderr is not None:
        print(
            f"nbdlink: {spec.destination}: its server cannot flush; what was copied becomes "
            "durable when it likes",
            file=sys.stderr,
        )
    if arguments.json:
        output.print_json(_sheet(summary))
    elif visible:
        print(_line(summary), file=sys.stderr)
    return 0


def _tell_of_format(source: str, destination: str) -> None:
    """Say so if it is an image's file that becomes a disk, and not what is in the image."""
    from pathlib import Path

    from nbdlink.copy.image import export_of
    from nbdlink.storage.probe import RAW, probe

    if not (export_of(destination) or Path(destination).is_block_device()):
        return  # a file of the image's, which remains one
    if Path(source).is_file() and (kind := probe(source)) != RAW:
        words = f"{source} is a {kind} image, which is copied as it is: for the disk that is in it"
        print(f"nbdlink: {words}, serve it and copy the export", file=sys.stderr)


def _sheet(summary: Summary) -> dict[str, object]:
    return {
        "bytes": summary.size,
        "data": summary.data,
        "zeroes": summary.zeroes,
        "seconds": round(summary.seconds, 6),
        "rate": round(summary.size / summary.seconds) if summary.seconds else 0,
        "connections": summary.connections,
        "verified": summary.verified,
    }


def _line(summary: Summary) -> str:
    rate = summary.size / summary.seconds / (1 << 20) if summary.seconds else 0.0
    verified = ", verified" if summary.verified else ""
    return (
        f"copied {format_size(summary.size)} ({format_size(summary.data)} data, "
        f"{format_size(summary.zeroes)} zeroes) in {summary.seconds:.2f} s, "
        f"{rate:.0f} MiB/s{verified}"
    )
