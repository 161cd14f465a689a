"""A client in bytes that speaks all three styles of headers, and reads whatever chunks come.

Like `RawClient` it does its own packing, so that no mistake of nbdlink's codec can hide itself.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from .fakes import BLOCK_STATUS, OPT_GO, READ, REP_ACK, RawClient, export_request, request

SIMPLE, STRUCTURED, EXTENDED = range(3)
STYLES = {"simple": SIMPLE, "structured": STRUCTURED, "extended": EXTENDED}

OPT_STRUCTURED_REPLY, OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT, OPT_EXTENDED_HEADERS = (
    8,
    9,
    10,
    11,
)
REP_META_CONTEXT = 4
REP_ERR_UNSUP, REP_ERR_INVALID, REP_ERR_UNKNOWN, REP_ERR_TOO_BIG, REP_ERR_EXT_HEADER_REQD = (
    (1 << 31) + number for number in (1, 3, 6, 9, 10)
)
PAYLOAD_LEN = 32
NONE, OFFSET_DATA, OFFSET_HOLE, STATUS, STATUS_EXT, ERROR, ERROR_OFFSET = (
    0, 1, 2, 5, 6, 0x8001, 0x8002,
)  # fmt: skip
ALLOCATION = b"base:allocation"


class Chunk(NamedTuple):
    """A piece of a reply; a simple reply counts as one of type NONE or ERROR."""

    kind: int
    cookie: int
    payload: bytes
    done: bool = True
    offset: int | None = None  # of the request, where the style repeats it
    simple: bool = False


def meta_query(name=b"", queries=()):
    packed = struct.pack(">I", len(name)) + name + struct.pack(">I", len(queries))
    return packed + b"".join(struct.pack(">I", len(query)) + query for query in queries)


def error_of(chunk):
    """Give (error, message, offset) of an error chunk."""
    error, length = struct.unpack_from(">IH", chunk.payload)
    rest = chunk.payload[6 + length :]
    assert len(rest) == (8 if chunk.kind == ERROR_OFFSET else 0)
    at = struct.unpack(">Q", rest)[0] if rest else None
    return error, chunk.payload[6 : 6 + length].decode(), at


def extents_of(chunk):
    """Give (context id, [(length, flags), ...]) of a status chunk."""
    if chunk.kind == STATUS_EXT:
        number, count = struct.unpack_from(">II", chunk.payload)
        extents = list(struct.iter_unpack(">QQ", chunk.payload[8:]))
        assert len(extents) == count
    else:
        assert chunk.kind == STATUS
        (number,) = struct.unpack_from(">I", chunk.payload)
        extents = list(struct.iter_unpack(">II", chunk.payload[4:]))
    assert extents
    assert all(length for length, _ in extents)
    return number, extents


class Answer(NamedTuple):
    """A whole reply, put together; `data` has what a read gave."""

    cookie: int
    error: int
    data: bytes
    chunks: list[Chunk]


class StyledClient(RawClient):
    """A client in one of the styles.

    Attributes:
        flags: the export's transmission flags.
        size: the export's.
        contexts: id by name of the metadata contexts that were selected.
    """

    def __init__(self, service, style, *, contexts=(), before_go=(), **options):
        self.style = style
        self._wanted = contexts
        self._before_go = before_go  # further options, as (number, data)
        self.contexts = {}
        self._open = {}  # requests without their whole answer: (command, offset, length, chunks)
        super().__init__(service, **options)

    def _negotiate(self, name, block_size):
        assert self.receive(18) == b"NBDMAGICIHAVEOPT\x00\x03"
        self.send(struct.pack(">I", 3))
        if self.style:
            option = OPT_EXTENDED_HEADERS if self.style == EXTENDED else OPT_STRUCTURED_REPLY
            assert self.option(option) == [(REP_ACK, b"")]
        if self._wanted:
            replies = self.option(OPT_SET_META_CONTEXT, meta_query(name, self._wanted))
            self.contexts = {
                data[4:]: struct.unpack_from(">I", data)[0] for _, data in replies[:-1]
            }
        for number, data in self._before_go:
            self.option(number, data)
        replies = self.option(OPT_GO, export_request(name, [3] if block_size else []))
        assert replies[-1][0] == REP_ACK, replies
        self.size, self.flags = struct.unpack(">QH", replies[0][1][2:])

    # Requests.

    def pack(self, command, offset=0, length=0, *, flags=0, data=b"", cookie=7):
        """Give a request; a write's length is its data's."""
        length = len(data) or length
        if self.style == EXTENDED:
            flags |= PAYLOAD_LEN if data or command == 1 else 0
            header = struct.pack(">IHHQQQ", 0x21E41C71, flags, command, cookie, offset, length)
        else:
            header = request(command, offset, length, flags=flags, cookie=cookie)
        return header + data

    def expect(self, command, offset, length, cookie):
        """Take note that an answer will come."""
        assert cookie not in self._open
        self._open[cookie] = (command, offset, length, [])

    def submit(self, command, offset=0, length=0, *, flags=0, data=b"", cookie=7):
        """Send a request whose answer `answer` will read."""
        self.expect(command, offset, len(data) or length, cookie)
        self.send(self.pack(command, offset, length, flags=flags, data=data, cookie=cookie))

    # Replies.

    def chunk(self):
        """Read one simple reply or chunk."""
        magic = self.receive(4)
        if magic == b"\x67\x44\x66\x98":
            assert self.style != EXTENDED
            error, cookie = struct.unpack(">IQ", self.receive(12))
            command, _, length, _ = self._open[cookie]
            assert not (self.style and command in (READ, BLOCK_STATUS))
            if error:
                return Chunk(ERROR, cookie, struct.pack(">IH", error, 0), simple=True)
            data = self.receive(length) if command == READ else b""
            return Chunk(NONE, cookie, data, simple=True)
        if magic == b"\x66\x8e\x33\xef":
            assert self.style == STRUCTURED
            flags, kind, cookie, length = struct.unpack(">HHQI", self.receive(16))
            offset = None
        else:
            assert magic == b"\x6e\x8a\x27\x8c"
            assert self.style == EXTENDED
            flags, kind, cookie, offset, length = struct.unpack(">HHQQQ", self.receive(28))
        assert flags in (0, 1)
        assert kind != NONE or (length == 0 and flags)
        return Chunk(kind, cookie, self.receive(length), bool(flags), offset)

    def answer(self):
        """Read until some request is answered as a whole; check it, and give the `Answer`."""
        while True:
            chunk = self.chunk()
            command, offset, length, chunks = self._open[chunk.cookie]
            assert chunk.offset in (None, offset), "the request's offset is repeated"
            chunks.append(chunk)
            if chunk.done:
                del self._open[chunk.cookie]
                return put_together(command, offset, length, chunks)

    def ask(self, command, offset=0, length=0, *, flags=0, data=b"", cookie=7):
        """Send a request and give (error, data) of its reply, as `RawClient` does."""
        answer = self.whole(command, offset, length, flags=flags, data=data, cookie=cookie)
        return answer.error, answer.data

    def whole(self, command, offset=0, length=0, *, flags=0, data=b"", cookie=7):
        """Send a request and give its `Answer`."""
        self.submit(command, offset, length, flags=flags, data=data, cookie=cookie)
        answer = self.answer()
        assert answer.cookie == cookie
        return answer

    def status(self, offset, length, flags=0):
        """Ask for the block status; give the extents of the only context."""
        (chunk,) = self.whole(BLOCK_STATUS, offset, length, flags=flags).chunks
        number, extents = extents_of(chunk)
        assert number in self.contexts.values()
        return extents


def put_together(command, offset, length, chunks):
    """Check the chunks of a reply against each other and the request."""
    cookie, error, data = chunks[0].cookie, 0, b""
    seen = set()
    has_content = any(chunk.kind in (OFFSET_DATA, OFFSET_HOLE) for chunk in chunks)
    buffer, covered = bytearray(length if has_content else 0), 0
    for chunk in chunks:
        if chunk.kind >> 15:
            error, _, at = error_of(chunk)
            assert error
            assert at is None or offset <= at < offset + length
        elif chunk.simple:
            data = chunk.payload
        elif chunk.kind in (OFFSET_DATA, OFFSET_HOLE):
            assert command == READ
            (at,) = struct.unpack_from(">Q", chunk.payload)
            if chunk.kind == OFFSET_HOLE:
                (count,) = struct.unpack(">I", chunk.payload[8:])
            else:
                count = len(chunk.payload) - 8
                buffer[at - offset : at - offset + count] = chunk.payload[8:]
            assert count > 0
            assert offset <= at
            assert at + count <= offset + length
            assert at not in seen
            seen.add(at)
            covered += count
    if command == READ and seen and not error:
        assert covered == length == len(buffer)
        data = bytes(buffer)
    elif command == READ and not error:
        assert len(data) == length
    return Answer(cookie, error, data, chunks)
