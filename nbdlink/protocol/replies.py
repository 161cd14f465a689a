"""Reading replies, simple or in chunks, off a stream: each payload into its owner's buffer.

How it works: the caller asks `buffer` where the next bytes belong, receives into it, and tells
`received` how many came. Headers and control payloads (a few dozen bytes mostly) go through a
small stage; the data of reads goes straight to where the request wants it. While a large read
is on its way, no more is taken into the stage than the next header, so that its data is never
copied; while there is none, the stage takes whatever has come, so that one system call brings
many replies.

What the specification demands of a server is checked ("Structured reply types", "Request
types"): content within the request, nothing twice, nothing missing, every block status once.
A breach raises `RemoteProtocolError`, and nothing that follows can be trusted.

Memory: a control payload is at most `MAX_CONTROL_PAYLOAD`, one at a time, and all replies that
are being put together have at most `MAX_FRAGMENTS` gaps.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import Final, Generic, TypeVar

from nbdlink.errors import LocalProtocolError, RemoteProtocolError
from nbdlink.protocol.chunks import (
    EXTENDED_REPLY,
    HOLE,
    MAX_CONTROL_PAYLOAD,
    OFFSET,
    STRUCTURED_REPLY,
    BlockStatus,
    ErrorPayload,
    Extent,
    parse_hole,
    status_type,
)
from nbdlink.protocol.constants import (
    EXTENDED_REPLY_MAGIC,
    REPLY_TYPE_ERROR,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Command,
    CommandFlag,
    HeaderStyle,
    ReplyFlag,
    ReplyType,
    command_name,
)
from nbdlink.protocol.transmission import SIMPLE_REPLY, known_error

MAX_FRAGMENTS: Final = 1 << 16
"""Ends of gaps in the replies that are being put together; honest servers leave a few."""

_STAGE: Final = 64 * 1024
_LARGE: Final = 16 * 1024
"""Bytes from which a read's data may not be copied."""

# Plain integers: an operator of IntFlag is a Python function that takes a microsecond.
_DONE: Final = int(ReplyFlag.DONE)
_DF: Final = int(CommandFlag.DF)
_REQ_ONE: Final = int(CommandFlag.REQ_ONE)

_ZEROES: Final = memoryview(bytes(256 * 1024))


class Awaited:
    """A request whose reply is awaited, and what came of it.

    Attributes:
        command: a `Command`.
        cookie: what the reply will carry.
        offset: bytes from the export's start.
        length: bytes of the export that it is about.
        flags: command flags.
        payload: where the data of a read goes, `length` bytes; None for other commands.
        contexts: ids of the metadata contexts that a block status must tell of.
        done: whether the reply is complete. What follows is set by then.
        error: an `Error`, or 0 if the request was carried out.
        message: the server's words on the error, printable; or the empty string.
        error_offset: where it failed, or None if not said.
        status: extents of each metadata context by its id, from `offset` on.
    """

    __slots__ = (
        "command",
        "contexts",
        "cookie",
        "done",
        "edges",
        "error",
        "error_offset",
        "flags",
        "length",
        "message",
        "offset",
        "payload",
        "status",
    )

    def __init__(
        self,
        command: int,
        cookie: int = 0,
        offset: int = 0,
        length: int = 0,
        flags: int = 0,
        payload: memoryview | None = None,
        contexts: tuple[int, ...] = (),
    ) -> None:
        self.command = command
        self.cookie = cookie
        self.offset = offset
        self.length = length
        self.flags = flags
        self.payload = payload
        self.contexts = contexts
        self.done = False
        self.error = 0
        self.message = ""
        self.error_offset: int | None = None
        self.status: dict[int, tuple[Extent, ...]] = {}
        # Where the spans that have come begin and end, in turns; spans that touch are one.
        self.edges: list[int] = []


_Request = TypeVar("_Request", bound=Awaited)


class ReplyReader(Generic[_Request]):
    """Takes simple replies off a stream."""

    _headroom: int = SIMPLE_REPLY.size
    """Bytes from which every step goes forward: the next header, and what belongs to it."""

    def __init__(self) -> None:
        self._stage = bytearray(_STAGE)
        self._view = memoryview(self._stage)
        self._start = 0
        self._end = 0
        self._target: memoryview | None = None
        self._filled = 0
        self._pending: dict[int, _Request] = {}
        self._large = 0
        self._current: _Request | None = None

    def expect(self, request: _Request) -> None:
        """Say that a request is on its way.

        Raises:
            LocalProtocolError: a request with that cookie is on its way already.
        """
        if request.cookie in self._pending:
            raise LocalProtocolError(f"the cookie {request.cookie} is in use")
        self._pending[request.cookie] = request
        if request.payload is not None and len(request.payload) >= _LARGE:
            self._large += 1

    @property
    def outstanding(self) -> int:
        """How many requests have no complete reply yet."""
        return len(self._pending)

    def buffer(self) -> memoryview:
        """Give the place where the next received bytes belong; never empty."""
        if self._target is not None:
            return self._target[self._filled :]
        start, end = self._start, self._end
        if start == end:
            self._start = self._end = start = end = 0
        elif start + self._headroom > _STAGE:
            self._view[: end - start] = self._view[start:end]
            self._start, self._end = 0, end - start
            start, end = 0, end - start
        if self._large:
            return self._view[end : start + self._headroom]
        return self._view[end:]

    def received(self, count: int) -> list[_Request]:
        """Take note of `count` bytes in `buffer()`; give the requests that they complete.

        Raises:
            RemoteProtocolError: the stream ended (`count` is 0), or a reply is malformed or
                answers nothing that was asked.
        """
        if not count:
            if not self._pending:
                raise RemoteProtocolError("the server closed the connection")
            count = self.outstanding
            left = "a request" if count == 1 else f"{count} requests"
            raise RemoteProtocolError(f"the server closed the connection with {left} unanswered")
        done: list[_Request] = []
        if self._target is not None:
            self._filled += count
            if self._filled < len(self._target):
                return done
            self._target = None
            self._payload_is_there(done)
        else:
            self._end += count
        while self._step(done):
            pass
        return done

    def _receive(self, target: memoryview, done: list[_Request]) -> bool:
        """Fill `target` with what the stage has, then from the stream; tell if it is full."""
        there = min(self._end - self._start, len(target))
        if there:
            target[:there] = self._view[self._start : self._start + there]
            self._start += there
        if there < len(target):
            self._target, self._filled = target, there
            return False
        self._payload_is_there(done)
        return True

    def _step(self, done: list[_Request]) -> bool:
        """Take one reply out of the stage; False if more bytes are needed for that."""
        start = self._start
        if self._end - start < SIMPLE_REPLY.size:
            return False
        magic, error, cookie = SIMPLE_REPLY.unpack_from(self._stage, start)
        if magic != SIMPLE_REPLY_MAGIC:
            raise _wrong_magic(magic)
        self._start = start + SIMPLE_REPLY.size
        request = self._asked(cookie)
        if error or not request.payload:
            request.error = known_error(error)
            self._finish(request, done)
            return True
        self._current = request
        return self._receive(request.payload, done)

    def _payload_is_there(self, done: list[_Request]) -> None:
        request, self._current = self._current, None
        assert request is not None
        self._finish(request, done)

    def _asked(self, cookie: int) -> _Request:
        try:
            return self._pending[cookie]
        except KeyError:
            raise RemoteProtocolError(
                f"the server answered a request that was never made (cookie {cookie:#x})"
            ) from None

    def _finish(self, request: _Request, done: list[_Request]) -> None:
        del self._pending[request.cookie]
        if request.payload is not None and len(request.payload) >= _LARGE:
            self._large -= 1
        request.done = True
        done.append(request)


class ChunkReader(ReplyReader[_Request]):
    """Takes structured or extended replies off a stream.

    Chunks come in any order, and those of several replies may be mixed. In the structured
    style a server may also answer simply where there is no data to send.
    """

    def __init__(self, style: HeaderStyle) -> None:
        """Read replies of `style`, which is not SIMPLE."""
        super().__init__()
        self._extended = style == HeaderStyle.EXTENDED
        self._header = EXTENDED_REPLY if self._extended else STRUCTURED_REPLY
        self._headroom = self._header.size + OFFSET.size
        self._status_type = status_type(style)
        self._control: bytearray | None = None
        self._kind = 0
        self._final = False
        self._fragments = 0

    def _step(self, done: list[_Request]) -> bool:
        start, size = self._start, self._header.size
        have = self._end - start
        if self._extended:
            if have < size:
                return False
            magic, flags, kind, cookie, asked, length = EXTENDED_REPLY.unpack_from(
                self._stage, start
            )
            if magic != EXTENDED_REPLY_MAGIC:
                raise _wrong_magic(magic)
        else:
            if have < SIMPLE_REPLY.size:
                return False
            # The two kinds of header have different lengths: the magic says which it is.
            magic = int.from_bytes(self._view[start : start + 4], "big")
            if magic == SIMPLE_REPLY_MAGIC:
                return self._simple_step(done)
            if magic != STRUCTURED_REPLY_MAGIC:
                raise _wrong_magic(magic)
            if have < size:
                return False
            magic, flags, kind, cookie, length = STRUCTURED_REPLY.unpack_from(self._stage, start)
            asked = None
        request = self._asked(cookie)
        if asked not in (None, request.offset):
            raise RemoteProtocolError(
                f"a reply says that the request was at {asked} instead of {request.offset}"
            )
        final = bool(flags & _DONE)
        if kind == ReplyType.OFFSET_DATA:
            if have < size + OFFSET.size:
                if length <= OFFSET.size:
                    raise RemoteProtocolError(f"a data chunk has a payload of {length} bytes")
                return False
            self._start = start + size + OFFSET.size
            (offset,) = OFFSET.unpack_from(self._stage, start + size)
            target = self._place(request, offset, length - OFFSET.size)
            self._current, self._final = request, final
            return self._receive(target, done)
        self._check_control(kind, request, length, final)
        self._start = start + size
        self._current, self._kind, self._final = request, kind, final
        if have - size >= length:
            self._start += length
            self._take_control(self._view[start + size : start + size + length], done)
            return True
        self._control = bytearray(length)
        return self._receive(memoryview(self._control), done)

    def _simple_step(self, done: list[_Request]) -> bool:
        _, error, cookie = SIMPLE_REPLY.unpack_from(self._stage, self._start)
        request = self._asked(cookie)
        if request.command == Command.READ or (
            request.command == Command.BLOCK_STATUS and not error
        ):
            raise RemoteProtocolError(
                f"a simple reply to {command_name(request.command)}, though structured replies "
                "were agreed on"
            )
        self._start += SIMPLE_REPLY.size
        request.error = request.error or known_error(error)
        self._finish(request, done)
        return True

    def _payload_is_there(self, done: list[_Request]) -> None:
        if self._control is None:
            request, self._current = self._current, None
            assert request is not None
            if self._final:
                self._end_of_reply(request, done)
        else:
            payload, self._control = self._control, None
            self._take_control(memoryview(payload), done)

    # Content of reads.

    def _place(self, request: _Request, offset: int, length: int) -> memoryview:
        """Check that the bytes belong to the request and are new; say where they go."""
        if length <= 0:
            raise RemoteProtocolError("a data chunk has no data")
        if request.command != Command.READ or request.payload is None:
            raise RemoteProtocolError(
                f"the server sent data in reply to {command_name(request.command)}"
            )
        if offset < request.offset or offset + length > request.offset + request.length:
            raise RemoteProtocolError(
                f"the server sent {length} bytes at {offset} in reply to a read of "
                f"{request.length} bytes at {request.offset}"
            )
        if request.flags & _DF and request.edges:
            raise RemoteProtocolError("the server split a reply that it was told not to split")
        self._cover(request, offset, offset + length)
        at = offset - request.offset
        return request.payload[at : at + length]

    def _cover(self, request: _Request, begin: int, end: int) -> None:
        edges = request.edges
        i = bisect_right(edges, begin)
        if i % 2 or (i < len(edges) and edges[i] < end):
            raise RemoteProtocolError(f"the server sent the data at {begin} twice")
        before = i > 0 and edges[i - 1] == begin
        behind = i < len(edges) and edges[i] == end
        new = ([] if before else [begin]) + ([] if behind else [end])
        edges[i - before : i + behind] = new
        self._fragments += len(new) - before - behind
        if self._fragments > MAX_FRAGMENTS:
            raise RemoteProtocolError(
                f"the server sends replies in pieces with more than {MAX_FRAGMENTS // 2} gaps"
            )

    # Everything else.

    def _check_control(self, kind: int, request: _Request, length: int, final: bool) -> None:
        """Refuse what need not be received in order to be refused."""
        if length > MAX_CONTROL_PAYLOAD:
            raise RemoteProtocolError(f"a chunk of type {kind:#x} announces {length} bytes")
        if kind & REPLY_TYPE_ERROR:
            return
        if kind == ReplyType.NONE:
            if length or not final:
                raise RemoteProtocolError("an empty chunk has a payload or is not the last one")
        elif kind == ReplyType.OFFSET_HOLE:
            if length != HOLE.size:
                raise RemoteProtocolError(f"a hole of a reply has {length} bytes, not {HOLE.size}")
        elif kind != self._status_type:
            raise RemoteProtocolError(f"a reply chunk has the unknown type {kind:#x}")
        elif request.command != Command.BLOCK_STATUS:
            raise RemoteProtocolError(
                f"the server told block status in reply to {command_name(request.command)}"
            )

    def _take_control(self, payload: memoryview, done: list[_Request]) -> None:
        request, self._current, kind = self._current, None, self._kind
        assert request is not None
        if kind & REPLY_TYPE_ERROR:
            self._take_error(request, ErrorPayload.parse(kind, payload))
        elif kind == ReplyType.OFFSET_HOLE:
            offset, length = parse_hole(payload)
            _fill_with_zeroes(self._place(request, offset, length))
        elif kind == self._status_type:
            self._take_status(request, BlockStatus.parse(kind, payload))
        if self._final:
            self._end_of_reply(request, done)

    def _take_error(self, request: _Request, error: ErrorPayload) -> None:
        if error.offset is not None:
            place = error.offset
            if not request.offset <= place < request.offset + request.length:
                raise RemoteProtocolError(
                    f"the server reports an error at {place}, outside of the request"
                )
            # Content may not come for it any more, though it may have come already.
            if bisect_right(request.edges, place) % 2 == 0:
                self._cover(request, place, place + 1)
        if not request.error:  # the first one tells most
            request.error = known_error(error.error)
            request.message, request.error_offset = error.message, error.offset

    def _take_status(self, request: _Request, status: BlockStatus) -> None:
        if status.context not in request.contexts:
            raise RemoteProtocolError(
                f"the server told the status of a context that was not asked ({status.context})"
            )
        if status.context in request.status:
            raise RemoteProtocolError(f"the server told context {status.context} twice")
        extents = status.extents
        if request.flags & _REQ_ONE:
            if len(extents) > 1 or extents[0].length > request.length:
                raise RemoteProtocolError("the server told more than the one extent asked for")
        elif len(extents) > 1 and _total(extents[:-1]) >= request.length:
            raise RemoteProtocolError("the server told extents beyond what was asked for")
        request.status[status.context] = extents

    def _end_of_reply(self, request: _Request, done: list[_Request]) -> None:
        if not request.error:
            if request.command == Command.READ:
                whole = [request.offset, request.offset + request.length]
                if request.edges != whole and request.length:
                    raise RemoteProtocolError(
                        f"the reply to a read of {request.length} bytes at {request.offset} "
                        "leaves some out"
                    )
            elif len(request.status) < len(request.contexts):
                raise RemoteProtocolError("the server left a metadata context's status out")
        self._finish(request, done)

    def _finish(self, request: _Request, done: list[_Request]) -> None:
        self._fragments -= len(request.edges)
        super()._finish(request, done)


def _wrong_magic(magic: int) -> RemoteProtocolError:
    return RemoteProtocolError(f"a reply begins with the wrong magic {magic:#010x}")


def _total(extents: Iterable[Extent]) -> int:
    return sum(extent.length for extent in extents)


def _fill_with_zeroes(place: memoryview) -> None:
    for at in range(0, len(place), len(_ZEROES)):
        part = place[at : at + len(_ZEROES)]
        part[:] = _ZEROES[: len(part)]
