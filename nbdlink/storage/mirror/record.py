"""What is kept of a mirror: which members are good, and where they may differ after a crash.

A record is a small file of a fixed size, all of which is allocated when it is made, so that a
full disk cannot keep a change from being written:

    0       slot 0: header and JSON
    65536   slot 1
    131072  the intent bitmap: a bit a region, 65536 at most

A change goes to the slot that does not hold the newest state, and is then made durable. A slot
that was torn by a crash does not have its checksum, so that the other one counts: whatever part
of a change has come to the disk, what is read is the state before it or the one after it.

The bitmap has no checksum. Regions are added before anything is written to them and taken out
when all members have the same there, so that any mixture of two bitmaps, one written over the
other, has all that is needed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import struct
import time
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, Self

from nbdlink.errors import StorageError

MemberState = Literal["good", "stale", "rebuilding"]
STATES: Final[tuple[MemberState, ...]] = ("good", "stale", "rebuilding")

SLOT: Final = 64 << 10
"""Bytes in a slot."""
REGIONS: Final = 65536
"""Regions that a mirror has at most."""
SMALLEST_REGION: Final = 16 << 20
"""Bytes: each first write to a region costs a sync of the record."""
_BITMAP_AT: Final = 2 * SLOT
_SIZE: Final = _BITMAP_AT + REGIONS // 8
_SECTOR: Final = 512

_HEADER: Final = struct.Struct(">16sQII")  # magic, sequence number, length and CRC of the JSON
_MAGIC: Final = b"nbdlink mirror 1"
_REMEMBERED: Final = 500
"""Changes of membership that are remembered, to tell an old record from a contradicting one."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What is recorded of a member.

    Attributes:
        address: an absolute path, or an NBD URI.
        format: of the image, or None if it was found out.
        identity: what tells it from another under the same address, or None.
        state: "good": it has all that was acknowledged; "stale": it lacks something, and must
            not be read; "rebuilding": stale, and being made good.
        keeps_copy: whether a copy of the record lies beside it, as it does with regular files.
        reason: why it is not good; empty if it is.
        since: when it came to that state, in seconds since the epoch.
        doubted: whether it has failed, so that what is read from it need not be on its disk.
    """

    address: str
    format: str | None = None
    identity: str | None = None
    keeps_copy: bool = True
    state: MemberState = "good"
    reason: str = ""
    since: float = 0.0
    doubted: bool = False

    def become(self, state: MemberState, reason: str = "") -> Entry:
        """Give the entry with another state; one that is good is not doubted any more."""
        doubted = self.doubted and state != "good"
        return replace(
            self, state=state, reason=reason, since=round(time.time(), 3), doubted=doubted
        )


@dataclass(frozen=True, slots=True)
class State:
    """What is recorded of a mirror.

    Attributes:
        mirror: its number, which never changes.
        size: bytes.
        region: bytes that a bit of the intent bitmap stands for.
        generation: how often anything of this has changed.
        token: a random word for this change of it.
        history: those of the changes before, oldest first.
        members: in the order in which they were given first.
    """

    mirror: str
    size: int
    region: int
    generation: int
    token: str
    history: tuple[str, ...]
    members: tuple[Entry, ...]

    @classmethod
    def first(cls, size: int, region: int, members: Iterable[Entry]) -> Self:
        """Give the state of a new mirror."""
        return cls(
            mirror=secrets.token_hex(8),
            size=size,
            region=region,
            generation=1,
            token=secrets.token_hex(4),
            history=(),
            members=tuple(members),
        )

    def changed(self, members: Iterable[Entry], size: int | None = None) -> State:
        """Give the state that follows with other members, other states of theirs, or more bytes."""
        return replace(
            self,
            size=self.size if size is None else size,
            generation=self.generation + 1,
            token=secrets.token_hex(4),
            history=(*self.history, self.token)[-_REMEMBERED:],
            members=tuple(members),
        )

    def has(self, other: State) -> bool:
        """Tell whether `other` is this state or one that came before it."""
        return other.token == self.token or other.token in self.history

    def entry(self, address: str) -> Entry | None:
        """Give the member of that address."""
        return next((each for each in self.members if each.address == address), None)

    def pack(self) -> bytes:
        """Give it as JSON.

        Raises:
            OSError: it is too long for a slot.
        """
        data = json.dumps(asdict(self), separators=(",", ":")).encode()
        if len(data) > SLOT - _HEADER.size:
            raise OSError(errno.EFBIG, "the mirror's record is full: too many or too long names")
        return data

    @classmethod
    def unpack(cls, data: bytes) -> State:
        """Read it again.

        Raises:
            ValueError: it is no such state.
        """
        try:
            found: dict[str, Any] = json.loads(data)
            found["members"] = tuple(Entry(**each) for each in found["members"])
            found["history"] = tuple(found["history"])
            state = cls(**found)
        except (TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(str(error)) from None
        if state.size < 1 or state.region < 1 or any(m.state not in STATES for m in state.members):
            raise ValueError("a value is none")
        return state


def most_bytes(region: int) -> int:
    """Give how large a mirror can be that has regions of that size."""
    return region * REGIONS


def region_size(size: int, region: int = SMALLEST_REGION) -> int:
    """Give how large a mirror's regions are: `region`, or twice as much as often as it takes."""
    while size > most_bytes(region):
        region *= 2
    return region


class RecordFile:
    """One copy of a mirror's record, open.

    Attributes:
        path: where it is.
        state: what it says.
        regions: those of the bitmap.
    """

    def __init__(self, path: Path, fd: int, *, writable: bool) -> None:
        """Read an open record.

        Raises:
            StorageError: there is no state in it that could be read.
        """
        self.path = path
        self.writable = writable
        self._fd = fd
        data = os.pread(fd, _SIZE, 0)
        found = [found for slot in (0, 1) if (found := _parse(data[slot * SLOT :][:SLOT]))]
        if not found:
            raise StorageError(
                f"{path} is no record of a mirror, or is damaged",
                hint="remove it only if you know which member has the newest data: without it "
                "a mirror is made anew from the first member that is named",
            )
        self._sequence, self.state = max(found, key=lambda each: each[0])
        self._bitmap = bytearray(data[_BITMAP_AT:].ljust(REGIONS // 8, b"\xff"))
        self._is_bitmap_known = True  # whether the file has what we have

    @classmethod
    def create(cls, path: Path, state: State, regions: Iterable[int] = ()) -> None:
        """Make a record, durably and as a whole.

        Raises:
            OSError: it cannot be made.
        """
        data = _slot(0, state).ljust(_BITMAP_AT, b"\0") + _bitmap(regions)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            fd = os.open(draft, flags, 0o600)
            try:
                _write(fd, data, 0)
                os.fsync(fd)
            finally:
                os.close(fd)
            draft.rename(path)
        except OSError:
            with contextlib.suppress(OSError):
                draft.unlink()
            raise
        _sync_folder(path.parent)

    @classmethod
    def open(cls, path: Path, *, writable: bool) -> Self:
        """Open a record, and keep others from it: all, or if not `writable` those who write.

        Raises:
            OSError: it is not there, or cannot be opened.
            StorageError: somebody uses it, or it is none.
        """
        mode = os.O_RDWR if writable else os.O_RDONLY
        fd = os.open(path, mode | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
        try:
            try:
                fcntl.flock(fd, (fcntl.LOCK_EX if writable else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StorageError(
                    f"{path} is in use: the mirror is served already",
                    hint="end that server first; `nbdlink mirror status` tells of it",
                ) from None
            return cls(path, fd, writable=writable)
        except BaseException:
            os.close(fd)
            raise

    @property
    def regions(self) -> set[int]:
        """The regions in which members may differ."""
        return {
            8 * at + bit
            for at, byte in enumerate(self._bitmap)
            if byte
            for bit in range(8)
            if byte >> bit & 1
        }

    @property
    def is_in_place(self) -> bool:
        """Whether it still lies where it was opened: it is gone with a disk that was replaced."""
        try:
            return os.path.samestat(os.fstat(self._fd), self.path.lstat())
        except OSError:
            return False

    def write(self, state: State) -> None:
        """Record a state; it is durable when this returns.

        Raises:
            OSError: it may not be.
        """
        # If it fails the same slot is written again the next time: the other one is still good.
        sequence = self._sequence + 1
        _write(self._fd, _slot(sequence, state), sequence % 2 * SLOT)
        os.fdatasync(self._fd)
        self._sequence, self.state = sequence, state

    def write_regions(self, regions: set[int], *, durably: bool) -> None:
        """Record a bitmap.

        Raises:
            OSError: it may not have come to the disk.
        """
        bitmap = _bitmap(regions)
        # If it fails, any sector of it may be in the file or not, so all are written next time.
        was_known, self._is_bitmap_known = self._is_bitmap_known, False
        for at in range(0, len(bitmap), _SECTOR):
            sector = bitmap[at : at + _SECTOR]
            if not was_known or sector != self._bitmap[at : at + _SECTOR]:
                _write(self._fd, sector, _BITMAP_AT + at)
        if durably:
            os.fdatasync(self._fd)
        self._bitmap = bitmap
        self._is_bitmap_known = True

    def close(self) -> None:
        """Let go of it."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def peek(path: Path) -> State | None:
    """Give what a record says, whoever uses it; None if there is none that can be read.

    One that is being changed at the moment is read before or after the change.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        record = RecordFile(path, fd, writable=False)
    except (OSError, StorageError):
        return None
    else:
        return record.state
    finally:
        os.close(fd)


def _bitmap(regions: Iterable[int]) -> bytearray:
    bitmap = bytearray(REGIONS // 8)
    for each in regions:
        bitmap[each // 8] |= 1 << each % 8
    return bitmap


def _slot(sequence: int, state: State) -> bytes:
    data = state.pack()
    return _HEADER.pack(_MAGIC, sequence, len(data), _checksum(sequence, data)) + data


def _checksum(sequence: int, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(sequence.to_bytes(8)))


def _parse(slot: bytes) -> tuple[int, State] | None:
    if len(slot) < _HEADER.size:
        return None
    magic, sequence, length, checksum = _HEADER.unpack_from(slot)
    data = slot[_HEADER.size :][:length]
    if magic != _MAGIC or len(data) != length or _checksum(sequence, data) != checksum:
        return None
    try:
        return sequence, State.unpack(data)
    except ValueError:
        return None


def _write(fd: int, data: bytes | bytearray, position: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, position)
        if not count:
            raise OSError(errno.EIO, "the record takes no more bytes")
        view, position = view[count:], position + count


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
