"""`nbdlink mirror`: what a mirror's members are worth, and rebuilding them."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nbdlink.errors import ConfigError, StorageError
from nbdlink.sizes import format_size

if TYPE_CHECKING:
    from nbdlink.storage.mirror.record import State

_GLANCE = 0.2
"""Seconds between two looks at a rebuild in a server."""

Sheet = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """Fill the parser of `mirror`."""
    add = parser.add_argument
    add("action", metavar="status|rebuild", choices=("status", "rebuild"), help="what to do")
    add(
        "members",
        metavar="MEMBER",
        nargs="*",
        help="a member, by its path or URI (status: all mirrors that are served here)",
    )
    add(
        "--replace",
        metavar=("OLD", "NEW"),
        nargs=2,
        help="put NEW in the place of the member OLD, and rebuild it",
    )
    add("--no-wait", action="store_true", help="leave the rebuild to the server")
    add(
        "--progress",
        action=argparse.BooleanOptionalAction,
        help="show a bar (if stderr is a terminal)",
    )
    add("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Show mirrors, or rebuild members."""
    if arguments.action == "status":
        if arguments.replace or arguments.no_wait:
            raise ConfigError("--replace and --no-wait are for `nbdlink mirror rebuild`")
        return _status(arguments)
    if bool(arguments.members) == bool(arguments.replace):
        raise ConfigError(
            "it is not said what is to be rebuilt",
            hint="say nbdlink mirror rebuild MEMBER, or nbdlink mirror rebuild --replace OLD NEW",
        )
    return _rebuild(arguments)


# Status.


def _status(arguments: argparse.Namespace) -> int:
    from nbdlink.cli.output import print_json
    from nbdlink.server.mirrors import ask
    from nbdlink.storage.mirror.places import known_mirrors

    sheets: list[Sheet] = []
    if arguments.members:
        states = {state.mirror: state for state in map(_state, arguments.members)}
        sheets = [_sheet(state) for state in states.values()]
    else:
        for mirror, state in known_mirrors().items():
            if answer := ask(mirror, do="status"):
                sheets.append(answer)
            elif state is not None:
                sheets.append(_recorded(state))
    if arguments.json:
        print_json(sheets)
        return 0
    for number, sheet in enumerate(sheets):
        if number:
            print()
        _print(sheet)
    if not sheets:
        print("nbdlink: no mirror is served here; name a member of one", file=sys.stderr)
    return 0


def _state(word: str) -> State:
    """Give what is recorded of the mirror that a member belongs to.

    Raises:
        StorageError: nothing is.
    """
    from nbdlink.storage.mirror.places import canonical, copies_that_name
    from nbdlink.storage.mirror.record import peek

    address = canonical(word)
    found = [state for path in copies_that_name({address}) if (state := peek(path))]
    if not found:
        raise StorageError(
            f"{address} belongs to no mirror that is known here",
            hint="the record of a mirror lies beside its files, as FILE.mirror",
        )
    return max(found, key=lambda state: state.generation)


def _sheet(state: State) -> Sheet:
    """Give the status of a mirror, from its server if there is one."""
    from nbdlink.server.mirrors import ask

    return ask(state.mirror, do="status") or _recorded(state)


def _recorded(state: State) -> Sheet:
    from nbdlink.storage.mirror.storage import health

    members: list[Sheet] = [
        {
            "address": entry.address,
            "state": entry.state,
            "since": entry.since,
            "reason": entry.reason,
            "behind": 0 if entry.state == "good" else state.size,
            "progress": 1.0 if entry.state == "good" else None,
        }
        for entry in state.members
    ]
    return {
        "mirror": state.mirror,
        "size": state.size,
        "generation": state.generation,
        "health": health(members),
        "members": members,
        "server": None,
    }


def _print(sheet: Sheet) -> None:
    from nbdlink.cli.output import print_table

    server = f"served by process {sheet['server']}" if sheet["server"] else "not served"
    print(f"mirror {sheet['mirror']}: {format_size(sheet['size'])}, {sheet['health']}, {server}")
    rows = []
    for member in sheet["members"]:
        has = member.get("progress")  # a server leaves it out for a stale member
        since = member["since"] and time.strftime("%Y-%m-%d %H:%M", time.localtime(member["since"]))
        rows.append(
            [
                member["address"],
                member["state"],
                f"{100 * has:.0f}%" if has is not None else None,
                since or None,
                member["reason"] or None,
            ]
        )
    print_table(["member", "state", "has", "since", "why"], rows)


# Rebuilding.


def _rebuild(arguments: argparse.Namespace) -> int:
    from nbdlink.cli.output import print_json, progress
    from nbdlink.server.mirrors import ask
    from nbdlink.storage.mirror.places import canonical

    old = arguments.replace[0] if arguments.replace else None
    words = [arguments.replace[1]] if arguments.replace else list(arguments.members)
    mirrors = {state.mirror: state for state in map(_state, [old] if old else words)}
    if len(mirrors) > 1:
        raise ConfigError("these are members of several mirrors", hint="rebuild one at a time")
    (state,) = mirrors.values()
    wanted = [canonical(word) for word in words]
    visible = arguments.progress
    if visible is None:
        visible = sys.stderr is not None and sys.stderr.isatty()
    with contextlib.ExitStack() as stack:
        shows: dict[str, Callable[[int], None]] = {}
        if visible and not arguments.no_wait:
            begin = stack.enter_context(progress()).begin
            shows = {each: begin(each, state.size) for each in wanted}

        def show(sheet: Sheet) -> None:
            for address, member in _members(sheet, list(shows)).items():
                shows[address](sheet["size"] - member["behind"])

        sheet: Sheet | None = None
        for address in wanted:
            request = {"do": "rebuild", "member": address}
            if old is not None:
                request = {"do": "rebuild", "member": canonical(old), "replace": address}
            sheet = ask(state.mirror, **request)
            if sheet is None:
                break
        if sheet is None:
            sheet = _rebuild_here(state, wanted, old, show)
        elif not arguments.no_wait:
            sheet = _follow(state.mirror, sheet, wanted, show)
    if arguments.json:
        print_json(sheet)
    elif not arguments.no_wait:
        for address, member in _members(sheet, wanted).items():
            print(f"{address} is {member['state']}")
    for address, member in _members(sheet, wanted).items():
        if member["state"] == "stale":
            raise StorageError(f"{address} is not rebuilt: {member['reason']}")
    return 0


def _members(sheet: Sheet, wanted: list[str]) -> dict[str, Sheet]:
    return {each["address"]: each for each in sheet["members"] if each["address"] in wanted}


def _follow(mirror: str, sheet: Sheet, wanted: list[str], show: Callable[[Sheet], None]) -> Sheet:
    """Look at a server's rebuild until it has ended."""
    from nbdlink.server.mirrors import ask

    try:
        while any(each["state"] == "rebuilding" for each in _members(sheet, wanted).values()):
            show(sheet)
            time.sleep(_GLANCE)
            answer = ask(mirror, do="status")
            if answer is None:
                raise StorageError(
                    "the mirror's server has ended before the rebuild has",
                    hint="it goes on when the server is started again",
                )
            sheet = answer
    except KeyboardInterrupt:
        print("nbdlink: the server goes on with the rebuild", file=sys.stderr)
        raise
    show(sheet)
    return sheet


def _rebuild_here(
    state: State, wanted: list[str], old: str | None, show: Callable[[Sheet], None]
) -> Sheet:
    """Rebuild members of a mirror that nobody serves."""
    from nbdlink.storage.mirror.opening import described, open_mirror
    from nbdlink.storage.open import StorageSpec

    specs = [
        described(entry.address, StorageSpec(entry.address, format=entry.format))
        for entry in state.members
        if entry.state != "stale" or entry.address in wanted
    ]
    mirror = open_mirror(specs)
    try:
        for address in wanted:
            if old is None:
                mirror.rebuild(address)
            else:
                mirror.replace(old, address)
        mirror.wait_until_built(show, _GLANCE)
        show(mirror.status())
        return mirror.status() | {"server": None}
    finally:
        mirror.close()
