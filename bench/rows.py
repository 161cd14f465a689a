"""What is measured: one table of work, all of it done on every server.

A row's name says it all: `unix/tmpfs/4k-read-d16-c1-one` is 4 KiB random reads at depth 16 over
one connection on a Unix socket, from a file on tmpfs, with server and client on one core.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

KIB, MIB = 1 << 10, 1 << 20
_SHORT = {4 * KIB: "4k", 64 * KIB: "64k", MIB: "1m"}


@dataclass(frozen=True)
class Row:
    """One kind of work.

    Attributes:
        transport: "unix", "tcp", or "tls" for TLS on TCP.
        place: "tmpfs" or "disk": where the served file is; or "qcow2-" and the kind of a qcow2
            image on tmpfs, see `bench.images`.
        rw: "read" or "write"; small blocks at random offsets, blocks of 1 MiB in sequence.
        block: bytes per request.
        depth: requests in flight on each connection.
        connections: how many, each with a client process of its own.
        cores: "one" keeps server and client together on one processor, so that the rate
            measures what both spend; "both" leaves them all that the machine has.
    """

    transport: str
    place: str
    rw: str
    block: int
    depth: int
    connections: int
    cores: str

    @property
    def name(self) -> str:
        work = f"{_SHORT[self.block]}-{self.rw}-d{self.depth}-c{self.connections}-{self.cores}"
        return f"{self.transport}/{self.place}/{work}"

    @property
    def is_sequential(self) -> bool:
        return self.block >= MIB

    @property
    def is_small(self) -> bool:
        """Whether requests count, rather than bytes."""
        return self.block <= 4 * KIB


@dataclass(frozen=True)
class CopyRow:
    """A whole file, copied by nbdcopy or `nbdlink copy`.

    Attributes:
        transport: "unix", "tcp" or "tls".
        direction: "upload" (from a file), "download" (to nowhere), "tofile" (on tmpfs).
        connections: how many the copying program may use.
        client: whose copying program: "nbdcopy" is run against every server, and "copy"
            compares the two programs against one server, a neutral one.
    """

    transport: str
    direction: str
    connections: int
    client: str = "nbdcopy"

    @property
    def name(self) -> str:
        return f"{self.client}/{self.transport}/{self.direction}-c{self.connections}"


_WORK = [(KIB * 4, 1), (KIB * 4, 16), (KIB * 4, 64), (KIB * 64, 16), (MIB, 4)]
_SOME = [(KIB * 4, 16), (KIB * 64, 16), (MIB, 4)]


def _rows(
    transport: str, place: str, work: Sequence[tuple[int, int]], connections: int, cores: str
) -> Iterator[Row]:
    for block, depth in work:
        for rw in ("read", "write"):
            yield Row(transport, place, rw, block, depth, connections, cores)


ROWS: list[Row] = [
    *_rows("unix", "tmpfs", _WORK, 1, "one"),
    *_rows("unix", "tmpfs", _WORK, 4, "one"),
    *_rows("unix", "tmpfs", [(KIB * 4, 16), (KIB * 4, 64), (MIB, 4)], 1, "both"),
    *_rows("unix", "tmpfs", [(KIB * 4, 64)], 4, "both"),
    *_rows("tcp", "tmpfs", _WORK, 1, "one"),
    *_rows("tcp", "tmpfs", [(KIB * 4, 16), (MIB, 4)], 4, "one"),
    *_rows("tcp", "tmpfs", [(KIB * 4, 64), (MIB, 4)], 1, "both"),
    *_rows("unix", "disk", _SOME, 1, "one"),
    *_rows("tcp", "disk", [(KIB * 4, 16), (MIB, 4)], 1, "one"),
    *_rows("tls", "tmpfs", _WORK, 1, "one"),
    *_rows("tls", "tmpfs", _SOME, 4, "both"),
    *_rows("unix", "qcow2-preallocated", _SOME, 1, "one"),
    *_rows("unix", "qcow2-preallocated", [(KIB * 4, 16)], 1, "both"),
    *(Row("unix", "qcow2-grown", "read", block, depth, 1, "one") for block, depth in _SOME),
    *(Row("unix", "qcow2-growing", "write", block, depth, 1, "one") for block, depth in _SOME),
    *(Row("unix", "qcow2-chain", "read", block, depth, 1, "one") for block, depth in _SOME),
]

QUICK: list[Row] = [
    *_rows("unix", "tmpfs", [(KIB * 4, 1), (KIB * 4, 16), (KIB * 64, 16), (MIB, 4)], 1, "one"),
    Row("unix", "tmpfs", "read", KIB * 4, 64, 4, "one"),
    *_rows("tcp", "tmpfs", [(KIB * 4, 16), (MIB, 4)], 1, "one"),
    Row("unix", "disk", "read", KIB * 4, 16, 1, "one"),
    *_rows("tls", "tmpfs", [(KIB * 4, 16), (KIB * 64, 16)], 1, "one"),
    *_rows("unix", "qcow2-preallocated", [(KIB * 4, 16)], 1, "one"),
    Row("unix", "qcow2-growing", "write", KIB * 4, 16, 1, "one"),
    Row("unix", "qcow2-chain", "read", KIB * 4, 16, 1, "one"),
]

COPIES: list[CopyRow] = [
    *(
        CopyRow(transport, direction, connections)
        for transport in ("unix", "tcp")
        for direction in ("download", "upload")
        for connections in (1, 4)
    ),
    *(CopyRow("tls", direction, 4) for direction in ("download", "upload")),
    *(
        CopyRow("unix", direction, connections, "copy")
        for direction in ("download", "tofile", "upload")
        for connections in (1, 4)
    ),
]

QUICK_COPIES = [row for row in COPIES if row.transport == "unix" and row.connections == 1]


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Tell whether a name contains one of the words, or matches one of the patterns."""
    return not patterns or any(fnmatch.fnmatchcase(name, f"*{pattern}*") for pattern in patterns)


def in_words(name: str, *, short: bool = False) -> str:
    """Say a row's name in words; the short form leaves out transport and place."""
    where, _, work = name.rpartition("/")
    parts = work.split("-")
    if len(parts) == 2:
        words = {
            "download": "download to nowhere",
            "tofile": "download to a file on tmpfs",
            "upload": "upload",
        }[parts[0]]
        words += f", {_connections(parts[1])}"
    else:
        size, rw, depth, connections, cores = parts
        size = {"4k": "4 KiB random", "64k": "64 KiB random", "1m": "1 MiB sequential"}[size]
        words = f"{size} {rw}, depth {depth[1:]}, {_connections(connections)}, {cores} core"
        words += "s" if cores == "both" else ""
    where = where.replace("/", ", ").replace("unix", "Unix").replace("tcp", "TCP")
    where = where.replace("tls", "TLS").replace("qcow2-", "qcow2 ")
    return words if short else f"{where}: {words}"


def _connections(word: str) -> str:
    return f"{word[1:]} connection" + ("s" if word != "c1" else "")
