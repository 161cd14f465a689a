"""A file system that has no room for a moment: whatever was refused, the image stays sound."""

from __future__ import annotations

import contextlib
import errno
import random
import struct

import pytest

from nbdlink.storage.qcow2 import Qcow2Storage, refcounts

from ..arrays import read, write
from . import qemu
from .crash import Recorder

SIZE = 3 << 20


class Refusing(Recorder):
    """Refuses writes of some kind every other time, as if there were no room for a moment.

    Attributes:
        kind: "header", "table" or "block" of the refcounts, or "any".
        refused: how many were.
    """

    kind = None
    refused = 0
    seen = 0

    def _is_of_kind(self, position):
        table, clusters = struct.unpack_from(">QI", self.now, 48)
        if self.kind == "header":
            return position < 104
        if self.kind == "table":
            return table <= position < table + clusters * 512
        if self.kind == "block":
            entries = struct.unpack_from(f">{clusters * 64}Q", self.now, table)
            return any(entry and entry <= position < entry + 512 for entry in entries)
        return self.kind == "any" and self.seen % 5 == 0

    def write_at(self, buffer, position):
        self.seen += 1
        if self._is_of_kind(position):
            self.refused += 1
            if self.refused % 2:
                raise OSError(errno.ENOSPC, "no room")
        super().write_at(buffer, position)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["header", "table", "block", "any"])
def test_a_refused_write_leaves_no_damage(folder, monkeypatch, kind, seed):
    monkeypatch.setattr(refcounts, "_KEPT", 0)  # as few refcount blocks in memory as can be
    options = "cluster_size=512,refcount_bits=64"
    path = qemu.create(folder / "disk.qcow2", SIZE, options=options)
    file = Refusing.of(path)
    storage = Qcow2Storage.open(path, open_file=lambda p, _: file)
    chance = random.Random(seed)
    model = {}
    file.kind = kind
    for round_ in range(12):
        for _ in range(60):
            at = chance.randrange(SIZE // 512 - 40) * 512
            data = chance.randbytes(chance.randrange(1, 41) * 512)
            pieces = {at + n: data[n : n + 512] for n in range(0, len(data), 512)}
            try:
                write(storage, data, at)
                model |= pieces
            except OSError:
                for place in pieces:  # either is right there
                    model.pop(place, None)
        with contextlib.suppress(OSError):
            storage.flush()
        if round_ == 6:
            with contextlib.suppress(OSError):
                storage.trim(0, SIZE // 4, False)
            model = {at: data for at, data in model.items() if at >= SIZE // 4}
    assert file.refused
    file.kind = None
    storage.flush()
    assert all(read(storage, at, 512) == data for at, data in model.items())
    storage.close()
    path.write_bytes(file.now)
    qemu.check(path, leaks=True)
    content = qemu.content(path)
    assert all(content[at : at + 512] == data for at, data in model.items())


class Full(Recorder):
    """Has no room behind some place, for good.

    Attributes:
        room: bytes.
    """

    room = 0

    def write_at(self, buffer, position):
        if position + len(buffer) > self.room:
            raise OSError(errno.ENOSPC, "no room")
        super().write_at(buffer, position)


@pytest.mark.parametrize("room", range(40 * 512, 44 * 512, 512))
def test_a_write_without_room_does_not_keep_others_from_the_disk(folder, room):
    path = qemu.create(folder / "disk.qcow2", SIZE, options="cluster_size=512")
    file = Full.of(path)
    file.room = len(file.now) + room
    storage = Qcow2Storage.open(path, open_file=lambda p, _: file)
    written = []

    def fill():
        for at in range(0, SIZE, 64 * 512):  # each needs a table of its own
            write(storage, b"x" * 512, at)
            written.append(at)

    with pytest.raises(OSError, match="no room"):
        fill()
    storage.flush()
    storage.close()
    path.write_bytes(file.now)
    qemu.check(path, leaks=True)
    content = qemu.content(path)
    assert all(content[at : at + 512] == b"x" * 512 for at in written)
