"""What a server counts, for Prometheus.

Everything is counted in the sessions anyway; here it is only put together. Sessions that another
process serves are asked for (`Processes.progress`) at each scrape, so that their numbers are those
of this moment; a process that does not answer in time (`_REPORT_SECONDS`) has those that it told
last, and what it adds is there at the next scrape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from time import time

from nbdlink.server.export import Catalogue
from nbdlink.server.mirrors import mirrors
from nbdlink.server.processes import Progress
from nbdlink.server.sessions import Books, SessionInfo, Tally
from nbdlink.transport.exposition import Family
from nbdlink.version import __version__

_STARTED = time()


def families(
    catalogue: Catalogue, books: Books, progress: Mapping[int, Progress], processes: int
) -> list[Family]:
    """Put everything together.

    Args:
        catalogue: what is served; exports that nobody has used yet are counted with zeroes.
        books: what the first process knows.
        progress: what other processes know of their sessions, by number; older than the books.
        processes: how many other processes there are.
    """
    tallies = {export.name: Tally() for export in catalogue} | books.tallies
    here = dict.fromkeys(tallies, 0)
    handshaking = 0
    for info in books.sessions:
        if info.export is None:
            handshaking += 1
            continue
        tallies.setdefault(info.export, Tally()).add(_told(info, progress))
        here[info.export] = here.get(info.export, 0) + 1
    return [
        *_server(books, tallies, handshaking, processes),
        *_exports(catalogue, tallies, here),
        *_mirrors(catalogue),
    ]


def _told(info: SessionInfo, progress: Mapping[int, Progress]) -> SessionInfo:
    """Give what the process that serves a session knows of it."""
    if info.number not in progress:
        return info
    requests, bytes_read, bytes_written, errors = progress[info.number]
    return replace(
        info,
        requests=max(info.requests, requests),
        bytes_read=max(info.bytes_read, bytes_read),
        bytes_written=max(info.bytes_written, bytes_written),
        errors=max(info.errors, errors),
    )


def _server(
    books: Books, tallies: Mapping[str, Tally], handshaking: int, processes: int
) -> list[Family]:
    information = Family("nbdlink_server_info", "gauge", "1; the version is in the label.")
    information.add(1, version=__version__)
    started = Family("nbdlink_server_start_time_seconds", "gauge", "When it was started (Unix).")
    started.add(_STARTED)
    running = Family("nbdlink_server_processes", "gauge", "Processes that serve connections.")
    running.add(processes + 1)
    greeting = Family("nbdlink_server_handshaking", "gauge", "Clients in their handshake now.")
    greeting.add(handshaking)
    ended = Family(
        "nbdlink_server_handshakes_total",
        "counter",
        "Handshakes by how they ended: with an export chosen (transmission), with the client "
        "hung up on for what it sent or for want of TLS (refused), or without a choice (left).",
    )
    ended.add(sum(tally.connections for tally in tallies.values()), outcome="transmission")
    ended.add(books.refused, outcome="refused")
    ended.add(books.left - books.refused, outcome="left")
    return [information, started, running, greeting, ended]


def _exports(
    catalogue: Catalogue, tallies: Mapping[str, Tally], here: Mapping[str, int]
) -> list[Family]:
    size = Family("nbdlink_export_size_bytes", "gauge", "Size of the export.")
    for export in catalogue:
        size.add(export.size, export=export.name)
    sessions = Family("nbdlink_export_sessions", "gauge", "Clients in transmission now.")
    for name, count in here.items():
        sessions.add(count, export=name)
    found = [size, sessions]
    for what, words in (
        ("connections", "Clients that have come to transmission."),
        ("requests", "Requests answered, those with an error included."),
        ("errors", "Requests that were refused or failed."),
        ("bytes_read", "Bytes that clients have read."),
        ("bytes_written", "Bytes that clients have written."),
    ):
        name = {"bytes_read": "read_bytes", "bytes_written": "written_bytes"}.get(what, what)
        family = Family(f"nbdlink_export_{name}_total", "counter", words)
        for export_name, tally in tallies.items():
            family.add(getattr(tally, what), export=export_name)
        found.append(family)
    return found


def _mirrors(catalogue: Catalogue) -> list[Family]:
    good = Family(
        "nbdlink_mirror_member_good",
        "gauge",
        "1 for a mirror's member that has everything.",
    )
    behind = Family(
        "nbdlink_mirror_member_behind_bytes", "gauge", "Bytes that it is still to be given."
    )
    for name, mirror in mirrors(catalogue).items():
        for member in mirror.status()["members"]:
            is_good = member["state"] == "good"
            good.add(is_good, export=name, member=member["address"])
            behind.add(member["behind"], export=name, member=member["address"])
    return [good, behind]
