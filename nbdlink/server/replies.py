"""Replies as bytes, in whichever style of headers the handshake agreed on.

Simple replies have 16 bytes before a read's data, structured ones 28, extended ones 40. A
request without data in its reply is answered by a simple reply in the structured style too:
the specification allows it, and it is what every client knows. Errors are told in chunks
there, as those have room for words and for the offset at which it went wrong.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from typing import Final

from nbdlink.protocol.chunks import (
    EXTENDED_DATA,
    EXTENDED_REPLY,
    HOLE,
    STRUCTURED_DATA,
    BlockStatus,
    ErrorPayload,
    pack_chunk,
    status_type,
)
from nbdlink.protocol.constants import (
    EXTENDED_REPLY_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    HeaderStyle,
    ReplyFlag,
    ReplyType,
)
from nbdlink.protocol.transmission import SIMPLE_REPLY

_DONE: Final = int(ReplyFlag.DONE)
_NONE: Final = int(ReplyType.NONE)
_DATA: Final = int(ReplyType.OFFSET_DATA)
_OFFSET_SIZE: Final = 8


class ReplyFormat:
    """How the replies of one connection look.

    Offsets of requests are taken everywhere, though only the extended style repeats them.

    Attributes:
        style: of the headers.
        data: what comes before a read's data.
    """

    def __init__(self, style: HeaderStyle) -> None:
        """Choose by the style."""
        self.style = style
        self.chunked = style != HeaderStyle.SIMPLE
        self.data: struct.Struct = {
            HeaderStyle.SIMPLE: SIMPLE_REPLY,
            HeaderStyle.STRUCTURED: STRUCTURED_DATA,
            HeaderStyle.EXTENDED: EXTENDED_DATA,
        }[style]

    def success(self, cookie: int, offset: int) -> bytes:
        """Give the reply to a request that has no data to tell."""
        if self.style == HeaderStyle.EXTENDED:
            return EXTENDED_REPLY.pack(EXTENDED_REPLY_MAGIC, _DONE, _NONE, cookie, offset, 0)
        return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie)

    def nothing_read(self, cookie: int, offset: int) -> bytes:
        """Give the reply to a read of no bytes."""
        if self.chunked:
            return pack_chunk(self.style, _NONE, cookie, offset=offset)
        return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie)

    def data_header(
        self, cookie: int, offset: int, length: int, *, at: int | None = None, done: bool = True
    ) -> bytes:
        """Give what comes before a read's data.

        Args:
            cookie: the request's.
            offset: the request's.
            length: bytes of data in this chunk; all of the request in the simple style.
            at: where the data begins, if not at `offset`.
            done: whether it is the last chunk.
        """
        at = offset if at is None else at
        if self.style == HeaderStyle.SIMPLE:
            return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie)
        size = length + _OFFSET_SIZE
        if self.style == HeaderStyle.STRUCTURED:
            return STRUCTURED_DATA.pack(STRUCTURED_REPLY_MAGIC, done, _DATA, cookie, size, at)
        return EXTENDED_DATA.pack(EXTENDED_REPLY_MAGIC, done, _DATA, cookie, offset, size, at)

    def hole(self, cookie: int, offset: int, at: int, length: int, *, done: bool) -> bytes:
        """Give the chunk that says that a part of a read is zeroes."""
        payload = HOLE.pack(at, length)
        return pack_chunk(
            self.style, ReplyType.OFFSET_HOLE, cookie, payload, done=done, offset=offset
        )

    def status(self, cookie: int, offset: int, statuses: Sequence[BlockStatus]) -> bytes:
        """Give the reply to BLOCK_STATUS: a chunk for each context."""
        last = len(statuses) - 1
        kind = status_type(self.style)
        return b"".join(
            pack_chunk(
                self.style, kind, cookie, one.pack(self.style), done=number == last, offset=offset
            )
            for number, one in enumerate(statuses)
        )

    def failure(self, cookie: int, offset: int, error: int, *, at: int | None = None) -> bytes:
        """Give the reply that says that a request failed; in chunks it says why and where."""
        if not self.chunked:
            return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie)
        said = ErrorPayload(error, os.strerror(error), at)
        return pack_chunk(self.style, said.type, cookie, said.pack(), offset=offset)
