"""`nbdlink list`, `nbdlink exports` and `nbdlink info`: looking without touching.

The JSON keys are documented in nbdlink-list(8), nbdlink-exports(8) and nbdlink-info(8); the
keys of an export are those of nbdinfo, so that scripts can read either.
"""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from nbdlink.cli.tls import add_client_arguments, client_options
from nbdlink.errors import KernelError, OptionError
from nbdlink.sizes import format_size, parse_seconds

if TYPE_CHECKING:
    from nbdlink import kernel
    from nbdlink.client.export import NegotiatedExport
    from nbdlink.client.negotiate import Negotiation
    from nbdlink.client.security import Security
    from nbdlink.link.record import Record
    from nbdlink.protocol.messages import ExportListing
    from nbdlink.uri import Target


def add_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """Fill the parser of `verb`."""
    parser.add_argument("--json", action="store_true", help="print JSON")
    if verb == "list":
        parser.add_argument(
            "--probe", action="store_true", help="read a block of each device to see if it lives"
        )
        parser.set_defaults(run=run_list)
        return
    what = (
        "host[:port] or an NBD URI" if verb == "exports" else "TARGET, /dev/nbdN or a link's name"
    )
    parser.add_argument("target", metavar="TARGET" if verb == "exports" else "WHAT", help=what)
    parser.add_argument(
        "--timeout",
        metavar="S",
        type=parse_seconds,
        default=15.0,
        help="seconds for the negotiation (15)",
    )
    add_client_arguments(parser)
    parser.set_defaults(run=run_exports if verb == "exports" else run_info)


# Devices.


def run_list(arguments: argparse.Namespace) -> int:
    """Print every attached device."""
    from nbdlink.cli import output
    from nbdlink.link.attach import attached, attached_records

    devices = attached(probe=arguments.probe)
    if any(device.probe_errno in (errno.EPERM, errno.EACCES) for device in devices):
        print("nbdlink: --probe reads the devices, which takes root", file=sys.stderr)
    records = {known.index: known for known, _ in attached_records()}
    sheets = [_device_sheet(device, records.get(device.index)) for device in devices]
    if arguments.json:
        output.print_json(sheets)
    elif not sheets:
        print("nothing is attached", file=sys.stderr)
    else:
        columns = ("device", "name", "size", "state", "target", "connections", "TLS", "mounted on")
        output.print_table(columns, [_device_row(sheet) for sheet in sheets])
    return 0


def _device_row(sheet: dict[str, Any]) -> list[object]:
    mounts = [point for part in (sheet, *sheet["partitions"]) for point in part["mounts"]]
    return [
        sheet["device"],
        sheet["name"],
        format_size(sheet["size"]),
        sheet["state"],
        sheet["target"] or sheet["backend"],
        _live_of_total(sheet["connections"]),
        sheet["tls"],
        ", ".join(mounts) or None,
    ]


def _partition_line(partition: dict[str, Any]) -> str:
    mounted = "".join(f", mounted on {point}" for point in partition["mounts"])
    return f"{partition['device']} ({format_size(partition['size'])}{mounted})"


def _live_of_total(connections: dict[str, int | None]) -> str | None:
    live, total = connections["live"], connections["total"]
    if live is None and total is None:
        return None
    return f"{'?' if live is None else live}/{'?' if total is None else total}"


def device_as_json(index: int) -> dict[str, Any]:
    """Give everything known of one device, as `list --json` and `info --json` print it."""
    from nbdlink import kernel
    from nbdlink.link import record

    state = kernel.status(index)
    known = record.read(index)
    return _device_sheet(
        state, known if known and known.describes(state.backend, state.pid) else None
    )


def _device_sheet(state: kernel.DeviceStatus, known: Record | None) -> dict[str, Any]:
    from nbdlink.link.health import count_live

    live = count_live(known) if known else None
    if live is None:
        live = state.live_links
    return {
        "device": state.path,
        "name": known.name if known else None,
        "size": state.size,
        "state": str(state.state),
        "read_only": state.read_only,
        "block_size": state.block_size,
        "target": known.target if known else None,
        "connections": {"live": live, "total": known.connections if known else None},
        "timeout": known.timeout if known else None,
        "dead_timeout": known.dead_timeout if known else None,
        "road": state.road,
        "tls": _tls_road(known) if known else None,
        "channels": _channels(known) if known else [],
        "relay": _relay(known) if known else None,
        "backend": state.backend,
        "pid": state.pid,
        "mounts": list(state.mounts),
        "partitions": [
            {"device": part.path, "size": part.size, "mounts": list(part.mounts)}
            for part in state.partitions
        ],
    }


def _channels(known: Record) -> list[dict[str, Any]]:
    from nbdlink.kernel import sockets

    alive = sockets.connected([each.cookie for each in known.channels if each.cookie])
    return [
        {
            "tls": each.tls,
            "version": each.version,
            "cipher": each.cipher,
            "reason": each.reason,
            "route": each.route,
            "alive": None if alive is None or each.cookie is None else each.cookie in alive,
            "renewals": each.renewals,
            "relay": each.relay,
        }
        for each in known.channels
    ]


def _relay(known: Record) -> int | None:
    return next((each.relay for each in known.channels if each.relay), None)


def _tls_road(known: Record) -> str:
    """Tell who does TLS, for all the connections of a device."""
    roads = {each.tls for each in known.channels} or {"none"}
    return roads.pop() if len(roads) == 1 else "mixed"


def _channel_line(channel: dict[str, Any]) -> str:
    words = [] if channel["route"] is None else [str(channel["route"])]
    if channel["alive"] is False:
        words.append("dead")
    if channel["tls"] == "none":
        words.append("without TLS")
    else:
        road = "TLS in the kernel" if channel["tls"] == "kernel" else "TLS through the relay"
        why = f" ({channel['reason']})" if channel["reason"] else ""
        words.append(f"{road}{why}, {channel['version']}, {channel['cipher']}")
    if renewals := channel["renewals"]:
        words.append("renewed once" if renewals == 1 else f"renewed {renewals} times")
    return ", ".join(words)


# Exports.


def run_exports(arguments: argparse.Namespace) -> int:
    """Print what a server offers."""
    from nbdlink.cli import output
    from nbdlink.client.negotiate import Negotiation
    from nbdlink.client.security import Security
    from nbdlink.protocol.constants import HeaderStyle, TransmissionFlag
    from nbdlink.uri import Target

    target = Target.parse(arguments.target)
    security = Security(target, client_options(arguments))
    with Negotiation.best(target, timeout=arguments.timeout, security=security) as negotiation:
        listings = negotiation.list_exports()
        has_contexts = negotiation.style > HeaderStyle.SIMPLE
        found: list[tuple[ExportListing, NegotiatedExport | None]] = []
        for listing in listings[:_MAX_ASKED]:
            try:
                found.append((listing, _believable(negotiation, listing.name, arguments.timeout)))
            except OptionError:
                found.append((listing, None))
        found += [(listing, None) for listing in listings[_MAX_ASKED:]]
        if arguments.json:
            sheets = [
                {"export-name": listing.name, "description": listing.description}
                if export is None
                else _export_sheet(
                    target,
                    export,
                    listing.description,
                    negotiation.list_meta_contexts(listing.name) if has_contexts else [],
                )
                for listing, export in found
            ]
            output.print_json(_server_sheet(negotiation, sheets))
            return 0
    columns = ("export", "size", "access", "connections", "description")
    several = TransmissionFlag.CAN_MULTI_CONN
    rows = [
        (
            listing.name or "(default)",
            format_size(export.size) if export else "?",
            ("read-only" if export.read_only else "read-write") if export else "?",
            ("several" if export.flags & several else "one") if export else "?",
            listing.description or (export.description if export else "") or "-",
        )
        for listing, export in found
    ]
    output.print_table(columns, rows)
    return 0


_MAX_ASKED = 250
"""Exports asked about one by one; servers bound the options of a connection (ours at 1024)."""


def run_info(arguments: argparse.Namespace) -> int:
    """Print everything known of one export or one device."""
    from nbdlink.cli import output

    if (index := device_index(arguments.target)) is not None:
        sheet = device_as_json(index)
        if arguments.json:
            output.print_json(sheet)
        else:
            sheet["size"] = f"{sheet['size']} ({format_size(sheet['size'])})"
            sheet["partitions"] = [_partition_line(part) for part in sheet["partitions"]]
            sheet["connections"] = _live_of_total(sheet["connections"])
            sheet["channels"] = [_channel_line(each) for each in sheet["channels"]]
            output.print_sheet(sheet.pop("device"), sheet)
        return 0
    from nbdlink.client.security import Security
    from nbdlink.uri import Target

    target = Target.parse(arguments.target)
    security = Security(target, client_options(arguments))
    server = _ask_about(target, arguments.timeout, security)
    if arguments.json:
        output.print_json(server)
        return 0
    packets = "extended" if server["extended"] else "simple"
    if server["structured"] and not server["extended"]:
        packets = "structured"
    tls = "with" if server["TLS"] else "without"
    print(f"protocol: {server['protocol']} {tls} TLS, using {packets} packets")
    if server["TLS"]:
        # Who has the pre-shared key is who is meant, and has no other name.
        peer = output.printable(server["TLS-peer"] or "by a pre-shared key")
        if not security.verifies:
            peer += " (not verified)"
        print(f"TLS: {server['TLS-version']}, {server['TLS-cipher']}, {peer}")
    for export in server["exports"]:
        export["export-size"] = f"{export['export-size']} ({export.pop('export-size-str')})"
        output.print_sheet(f'export="{export.pop("export-name")}"', export)
    return 0


def device_index(what: str) -> int | None:
    """Tell a device (or an attached link's name) from a server."""
    from nbdlink.link.attach import attached_records, find

    if what.startswith("/dev/") or any(known.name == what for known, _ in attached_records()):
        return find(what)
    if any(c in what for c in "/:.[") and not what.removeprefix("nbd").isdigit():
        return None
    try:
        return find(what)
    except KernelError:
        if what.startswith("nbd") and what[3:].isdigit():
            raise
        return None


def _ask_about(target: Target, timeout: float, security: Security) -> dict[str, Any]:
    from nbdlink.client.negotiate import Negotiation
    from nbdlink.protocol.constants import HeaderStyle, OptionReply

    with Negotiation.best(target, timeout=timeout, security=security) as negotiation:
        has_contexts = negotiation.style > HeaderStyle.SIMPLE
        contexts = negotiation.list_meta_contexts() if has_contexts else []
        try:
            export = _believable(negotiation, target.export, timeout)
        except OptionError as error:
            if error.reply != OptionReply.ERR_UNSUP:
                raise
            export = negotiation.go()
        sheet = _export_sheet(target, export, None, contexts)
        return _server_sheet(negotiation, [sheet])


def _believable(negotiation: Negotiation, name: str, timeout: float) -> NegotiatedExport:
    """Ask about an export, and ask again if it is said to be empty.

    nbd-server (seen with 3.24) answers INFO with a size of 0 and tells the real one on GO only,
    which takes a connection for each export.
    """
    export = negotiation.info(name)
    if export.size:
        return export
    again = type(negotiation)
    with again(negotiation.target, timeout=timeout, security=negotiation.security) as another:
        return another.go(name)


def _server_sheet(negotiation: Negotiation, exports: list[dict[str, Any]]) -> dict[str, Any]:
    from nbdlink.protocol.constants import HeaderStyle

    tls = negotiation.tls
    return {
        "protocol": "newstyle-fixed" if negotiation.fixed else "newstyle",
        "TLS": tls is not None,
        **({"TLS-version": tls.version, "TLS-cipher": tls.cipher} if tls else {}),
        **({"TLS-peer": tls.peer, "TLS-verified": negotiation.security.verifies} if tls else {}),
        "structured": negotiation.style >= HeaderStyle.STRUCTURED,
        "extended": negotiation.style >= HeaderStyle.EXTENDED,
        "exports": exports,
    }


def _export_sheet(
    target: Target, export: NegotiatedExport, description: str | None, contexts: list[str]
) -> dict[str, Any]:
    from dataclasses import replace

    sheet: dict[str, Any] = {"export-name": export.canonical_name or export.name}
    if text := description or export.description:
        sheet["description"] = text
    sheet["uri"] = str(replace(target, export=export.name))
    if contexts:
        sheet["contexts"] = contexts
    sheet.update(_capabilities(export))
    if export.block_size:
        sheet["block_size_minimum"] = export.block_size.minimum
        sheet["block_size_preferred"] = export.block_size.preferred
        sheet["block_size_maximum"] = export.block_size.maximum
    sheet["export-size"] = export.size
    sheet["export-size-str"] = format_size(export.size)
    return sheet


def _capabilities(export: NegotiatedExport) -> Iterator[tuple[str, bool]]:
    from nbdlink.protocol.constants import TransmissionFlag as Flag

    for key, flag in (
        ("is_rotational", Flag.ROTATIONAL),
        ("is_read_only", Flag.READ_ONLY),
        ("can_cache", Flag.SEND_CACHE),
        ("can_df", Flag.SEND_DF),
        ("can_fast_zero", Flag.SEND_FAST_ZERO),
        ("can_flush", Flag.SEND_FLUSH),
        ("can_fua", Flag.SEND_FUA),
        ("can_multi_conn", Flag.CAN_MULTI_CONN),
        ("can_trim", Flag.SEND_TRIM),
        ("can_zero", Flag.SEND_WRITE_ZEROES),
    ):
        yield key, bool(export.flags & flag)
