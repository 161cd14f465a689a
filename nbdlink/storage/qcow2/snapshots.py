"""The snapshot table: pure, no I/O (Snapshots)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from nbdlink.errors import StorageError
from nbdlink.storage.chain import Exactly, Wanted
from nbdlink.storage.qcow2.header import MAX_L1_SIZE, Header, check_area

_ENTRY: Final = struct.Struct(">QIHHIIQII")
_DISK_SIZE_AT: Final = 8
MAX_EXTRA: Final = 1024
"""Bytes of extra data that an entry may have; QEMU's limit."""
MAX_TABLE: Final = 64 << 20
"""Bytes of the longest snapshot table; QEMU's limit."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One internal snapshot.

    Attributes:
        id: unique; usually a number.
        name: what a person called it.
        l1_offset: where its L1 table is.
        l1_size: entries of it.
        disk_size: bytes of the virtual disk when it was taken.
    """

    id: str
    name: str
    l1_offset: int
    l1_size: int
    disk_size: int


def parse_snapshots(
    name: str, header: Header, data: bytes, file_size: int
) -> tuple[list[Snapshot], int]:
    """Read the snapshot table.

    Args:
        name: for messages.
        header: of the image; it says how many there are.
        data: the file from where the table starts; more than it or its beginning.
        file_size: bytes of the whole file.

    Returns:
        The snapshots, and the bytes of the table.

    Raises:
        StorageError: it is damaged.
    """
    snapshots = []
    clusters = -(-file_size // header.cluster_size)
    position = tables = 0
    for number in range(header.snapshot_count):
        what = f"snapshot {number + 1}"
        if position + _ENTRY.size > len(data):
            raise StorageError(f"{name}: the snapshot table ends within {what}")
        l1_offset, l1_size, id_length, name_length, *_, extra = _ENTRY.unpack_from(data, position)
        at = position + _ENTRY.size
        if extra > MAX_EXTRA:
            raise StorageError(f"{name}: {what} has {extra} bytes of extra data")
        end = at + extra + id_length + name_length
        if end > len(data):
            raise StorageError(f"{name}: the snapshot table ends within {what}")
        disk_size = header.size
        if extra >= _DISK_SIZE_AT + 8:
            (disk_size,) = struct.unpack_from(">Q", data, at + _DISK_SIZE_AT)
        at += extra
        check_area(
            name,
            f"L1 table of {what}",
            l1_offset,
            l1_size * 8,
            MAX_L1_SIZE,
            header.cluster_size,
            clusters,
        )
        # Each has its own, so that who looks at them all has no more to do than the file is long.
        tables += l1_size * 8
        if tables > file_size:
            raise StorageError(f"{name}: the L1 tables of the snapshots overlap")
        snapshots.append(
            Snapshot(
                id=data[at : at + id_length].decode(errors="replace"),
                name=data[at + id_length : end].decode(errors="replace"),
                l1_offset=l1_offset,
                l1_size=l1_size,
                disk_size=disk_size,
            )
        )
        position += -(-(end - position) // 8) * 8
    return snapshots, position


def find_snapshot(image: str, snapshots: list[Snapshot], wanted: Wanted) -> Snapshot:
    """Give the snapshot that is wanted, the first if there are several of that name.

    Raises:
        StorageError: there is none.
    """
    if isinstance(wanted, str):
        tries = [Exactly(id=wanted), Exactly(name=wanted)]
        word = repr(wanted)
    else:
        tries = [wanted]
        told = wanted._asdict().items()
        word = "with " + " and ".join(
            f"the {key} {each!r}" for key, each in told if each is not None
        )
    for each in tries:
        for snapshot in snapshots:
            if each.id in (None, snapshot.id) and each.name in (None, snapshot.name):
                return snapshot
    known = ", ".join(f"{s.id} ({s.name})" for s in snapshots) or "none"
    raise StorageError(f"{image} has no snapshot {word}", hint=f"its snapshots: {known}")
