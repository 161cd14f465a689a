"""`nbdlink completion`: print what teaches a shell to complete command lines of nbdlink."""

from __future__ import annotations

import argparse

SHELLS = ("bash", "zsh", "fish")


def add_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """Fill the parser of `completion`."""
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help="bash, zsh or fish")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the script, which the shell is to read."""
    from nbdlink.link.installation import sources

    print(
        (sources() / "completions" / f"nbdlink.{arguments.shell}").read_text(), end="", flush=True
    )
    return 0
