"""Reply chunks: what structured and extended replies are made of.

A reply is a series of chunks with the request's cookie, the last one marked DONE. The two
styles differ in the header only, and in one payload: extended replies tell block status in 64
bits (BLOCK_STATUS_EXT) where structured ones have 32 (BLOCK_STATUS).

The `Struct`s are public for the loops that send or take a hundred thousand chunks a second.
Offsets and lengths are in bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from nbdlink.errors import LocalProtocolError, RemoteProtocolError
from nbdlink.protocol.constants import (
    EXTENDED_REPLY_MAGIC,
    MAX_EXTENTS,
    MAX_STRING,
    REPLY_TYPE_ERROR,
    STRUCTURED_REPLY_MAGIC,
    HeaderStyle,
    ReplyFlag,
    ReplyType,
)
from nbdlink.protocol.messages import printable

STRUCTURED_REPLY: Final = struct.Struct(">IHHQI")
"""Magic, reply flags, type, cookie, payload length."""

EXTENDED_REPLY: Final = struct.Struct(">IHHQQQ")
"""Magic, reply flags, type, cookie, the request's offset, payload length."""

STRUCTURED_DATA: Final = struct.Struct(">IHHQIQ")
"""A structured OFFSET_DATA chunk before its data: the header and the data's offset."""

EXTENDED_DATA: Final = struct.Struct(">IHHQQQQ")
"""An extended OFFSET_DATA chunk before its data: the header and the data's offset."""

OFFSET: Final = struct.Struct(">Q")
"""What an OFFSET_DATA payload begins with."""

HOLE: Final = struct.Struct(">QI")
"""The payload of OFFSET_HOLE: offset and length."""

_ERROR: Final = struct.Struct(">IH")
_STATUS: Final = struct.Struct(">I")
_STATUS_EXT: Final = struct.Struct(">II")
_EXTENT: Final = struct.Struct(">II")
_EXTENT_EXT: Final = struct.Struct(">QQ")

MAX_CONTROL_PAYLOAD: Final = _STATUS_EXT.size + MAX_EXTENTS * _EXTENT_EXT.size
"""Bytes in the longest payload that is not a read's data."""


class Extent(NamedTuple):
    """A run of bytes of the same status in one metadata context.

    Attributes:
        length: bytes, more than 0.
        flags: what the context says of them; for `base:allocation` see `AllocationFlag`.
    """

    length: int
    flags: int


@dataclass(frozen=True, slots=True)
class ChunkHeader:
    """One chunk without its payload.

    Attributes:
        type: a `ReplyType`; an unknown number is kept as it came.
        cookie: the request's.
        length: bytes of payload that follow.
        done: whether it is the reply's last chunk.
        offset: the request's offset; only the extended style carries it.
    """

    type: int
    cookie: int
    length: int
    done: bool = False
    offset: int = 0

    @property
    def is_error(self) -> bool:
        """Whether the chunk says that the request failed."""
        return bool(self.type & REPLY_TYPE_ERROR)

    def pack(self, style: HeaderStyle) -> bytes:
        """Give the header in the structured (20 bytes) or extended (32 bytes) style."""
        flags = ReplyFlag.DONE if self.done else 0
        if style == HeaderStyle.EXTENDED:
            return EXTENDED_REPLY.pack(
                EXTENDED_REPLY_MAGIC, flags, self.type, self.cookie, self.offset, self.length
            )
        return STRUCTURED_REPLY.pack(
            STRUCTURED_REPLY_MAGIC, flags, self.type, self.cookie, self.length
        )

    @classmethod
    def parse(cls, data: bytes | bytearray | memoryview, style: HeaderStyle) -> ChunkHeader:
        """Read the first 20 or 32 bytes of `data`; unknown flags are ignored.

        Raises:
            RemoteProtocolError: the magic is wrong; nothing that follows can be trusted.
        """
        offset = 0
        if style == HeaderStyle.EXTENDED:
            expected = EXTENDED_REPLY_MAGIC
            magic, flags, kind, cookie, offset, length = EXTENDED_REPLY.unpack_from(data)
        else:
            expected = STRUCTURED_REPLY_MAGIC
            magic, flags, kind, cookie, length = STRUCTURED_REPLY.unpack_from(data)
        if magic != expected:
            raise RemoteProtocolError(f"a reply begins with the wrong magic {magic:#010x}")
        return cls(kind, cookie, length, bool(flags & ReplyFlag.DONE), offset)


def pack_chunk(
    style: HeaderStyle,
    kind: int,
    cookie: int,
    payload: bytes = b"",
    *,
    done: bool = True,
    offset: int = 0,
) -> bytes:
    """Give a whole chunk; `offset` is the request's."""
    return ChunkHeader(kind, cookie, len(payload), done, offset).pack(style) + payload


def parse_hole(payload: bytes | bytearray | memoryview) -> tuple[int, int]:
    """Read the payload of OFFSET_HOLE: offset and length.

    Raises:
        RemoteProtocolError: it has another length, or the hole is empty.
    """
    if len(payload) != HOLE.size:
        raise RemoteProtocolError(f"a hole of a reply has {len(payload)} bytes, not {HOLE.size}")
    offset, length = HOLE.unpack(payload)
    if not length:
        raise RemoteProtocolError("a hole of a reply is empty")
    return offset, length


@dataclass(frozen=True, slots=True)
class ErrorPayload:
    """The payload of an error chunk.

    Attributes:
        error: as it came; a value the specification does not know counts as EINVAL.
        message: words for people; empty where there are none.
        offset: where it failed (ERROR_OFFSET), or None.
    """

    error: int
    message: str = ""
    offset: int | None = None

    @property
    def type(self) -> ReplyType:
        """The chunk type that carries it."""
        return ReplyType.ERROR if self.offset is None else ReplyType.ERROR_OFFSET

    def pack(self) -> bytes:
        """Give the payload; words beyond the limit of strings are cut off."""
        words = self.message.encode(errors="replace")[:MAX_STRING]
        words = words.decode(errors="ignore").encode()  # no half character at the cut
        end = b"" if self.offset is None else OFFSET.pack(self.offset)
        return _ERROR.pack(self.error, len(words)) + words + end

    @classmethod
    def parse(cls, kind: int, payload: bytes | bytearray | memoryview) -> ErrorPayload:
        """Read the payload of any error chunk, known or not.

        Raises:
            RemoteProtocolError: lengths that contradict each other, or an error of 0.
        """
        if len(payload) < _ERROR.size:
            raise RemoteProtocolError(f"{len(payload)} bytes are too few for an error chunk")
        error, length = _ERROR.unpack_from(payload)
        end = _ERROR.size + length
        if end > len(payload) or length > MAX_STRING:
            raise RemoteProtocolError("an error's message is longer than the chunk that holds it")
        if not error:
            raise RemoteProtocolError("an error chunk says that there is no error")
        offset = None
        if kind == ReplyType.ERROR_OFFSET:
            if len(payload) != end + OFFSET.size:
                raise RemoteProtocolError("an error chunk with an offset has the wrong length")
            (offset,) = OFFSET.unpack_from(payload, end)
        return cls(error, printable(bytes(payload[_ERROR.size : end])), offset)


@dataclass(frozen=True, slots=True)
class BlockStatus:
    """The payload of a block status chunk: extents of one metadata context, one after another.

    Attributes:
        context: the id that SET_META_CONTEXT gave the context.
        extents: from the request's offset on; at least one.
    """

    context: int
    extents: tuple[Extent, ...]

    def pack(self, style: HeaderStyle) -> bytes:
        """Give the payload for the style's chunk type.

        Raises:
            LocalProtocolError: there is no extent, or a number does not fit.
        """
        if not self.extents:
            raise LocalProtocolError("a block status without extents")
        try:
            if style == HeaderStyle.EXTENDED:
                head = _STATUS_EXT.pack(self.context, len(self.extents))
                return head + b"".join(_EXTENT_EXT.pack(*extent) for extent in self.extents)
            head = _STATUS.pack(self.context)
            return head + b"".join(_EXTENT.pack(*extent) for extent in self.extents)
        except struct.error:
            raise LocalProtocolError("an extent does not fit into a block status") from None

    @classmethod
    def parse(cls, kind: int, payload: bytes | bytearray | memoryview) -> BlockStatus:
        """Read the payload of BLOCK_STATUS or BLOCK_STATUS_EXT.

        Raises:
            RemoteProtocolError: lengths that contradict each other, or an empty extent.
        """
        wide = kind == ReplyType.BLOCK_STATUS_EXT
        head, each = (_STATUS_EXT, _EXTENT_EXT) if wide else (_STATUS, _EXTENT)
        count, rest = divmod(len(payload) - head.size, each.size)
        if rest or not 0 < count <= MAX_EXTENTS:
            raise RemoteProtocolError(f"a block status of {len(payload)} bytes")
        context, *announced = head.unpack_from(payload)
        if announced and announced[0] != count:
            raise RemoteProtocolError(
                f"a block status announces {announced[0]} extents and holds {count}"
            )
        extents = tuple(map(Extent._make, each.iter_unpack(payload[head.size :])))
        if not all(extent.length for extent in extents):
            raise RemoteProtocolError("a block status has an empty extent")
        return cls(context, extents)


def status_type(style: HeaderStyle) -> ReplyType:
    """Give the type that block status chunks of a style have."""
    wide = style == HeaderStyle.EXTENDED
    return ReplyType.BLOCK_STATUS_EXT if wide else ReplyType.BLOCK_STATUS


STATUS_FILTER: Final = struct.Struct(">Q")
"""What the payload of a BLOCK_STATUS request begins with: the effect length; ids follow."""


def pack_status_filter(length: int, contexts: Sequence[int]) -> bytes:
    """Give the payload of a BLOCK_STATUS request that asks about some contexts only."""
    return STATUS_FILTER.pack(length) + b"".join(map(_STATUS.pack, contexts))


def parse_status_filter(payload: bytes | bytearray | memoryview) -> tuple[int, tuple[int, ...]]:
    """Read the payload of a BLOCK_STATUS request: effect length and context ids.

    Raises:
        RemoteProtocolError: it has no such length.
    """
    if len(payload) < STATUS_FILTER.size or len(payload) % _STATUS.size:
        raise RemoteProtocolError(f"a block status request with {len(payload)} bytes of payload")
    (length,) = STATUS_FILTER.unpack_from(payload)
    ids = struct.unpack_from(f">{(len(payload) - 8) // 4}I", payload, STATUS_FILTER.size)
    return length, ids
