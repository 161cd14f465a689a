"""`nbdlink setup`: tell udev, systemd and man of an installation by pip or pipx."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from nbdlink.errors import ConfigError, NBDError


def add_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """Fill the parser of `setup`."""
    add = parser.add_argument
    add("--undo", action="store_true", help="remove what was installed")
    add("--root", metavar="DIR", help="another root than /, whose daemons are left alone")
    add("--executable", metavar="PATH", help="the program that the units start (this one)")
    add("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Install or remove, and tell each file that was written or removed."""
    from dataclasses import asdict

    from nbdlink.link import installation

    if arguments.undo and arguments.executable:
        raise ConfigError("--executable is for installing, not for --undo")
    if not arguments.undo and installation.is_packaged():
        if arguments.json:
            from nbdlink.cli.output import print_json

            print_json({"files": [], "reloaded": []})
        words = "nothing to do: the package that brought nbdlink has installed all of it"
        print(f"nbdlink: {words}", file=sys.stderr)
        return 0
    root = Path(arguments.root or "/").absolute()
    if not root.is_dir():
        raise ConfigError(f"{root} is no directory", hint="--root takes one that exists")
    if arguments.root is None and os.geteuid() != 0:
        words = f"{installation.executable()} setup{' --undo' if arguments.undo else ''}"
        raise NBDError("setup writes below /usr/local and /var/lib", hint=f"as root: {words}")
    if arguments.undo:
        changes = installation.uninstall(root)
    else:
        program = arguments.executable or str(installation.executable())
        changes = installation.install(root, program)
    reloaded = installation.reload(changes) if arguments.root is None else []
    if arguments.json:
        from nbdlink.cli.output import print_json

        print_json({"files": [asdict(change) for change in changes], "reloaded": reloaded})
        return 0
    for change in changes:
        if change.action != "unchanged" or arguments.verbose:
            print(f"{change.action} {change.path}")
    if all(change.action == "unchanged" for change in changes):
        print("nbdlink: nothing to do", file=sys.stderr)
    elif reloaded:
        print(f"nbdlink: {' and '.join(reloaded)} took the change over", file=sys.stderr)
    if any(change.action == "kept" for change in changes):
        print("nbdlink: what was kept has been changed since it was installed", file=sys.stderr)
    return 0
