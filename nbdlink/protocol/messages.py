"""Messages of the handshake: how each is packed and parsed, for both roles.

`pack` gives the bytes on the wire and raises `LocalProtocolError` for what the protocol
cannot express; `parse` takes the message's whole data and raises `RemoteProtocolError` for
what the protocol forbids. Strings are Unicode here and UTF-8 on the wire (specification,
"Values"), at most `MAX_STRING` bytes long.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final, Self

from nbdlink.errors import LocalProtocolError, RemoteProtocolError
from nbdlink.protocol.constants import (
    EXPORT_NAME_ZEROES,
    IHAVEOPT,
    INIT_PASSWD,
    MAX_EXPORT_SIZE,
    MAX_MINIMUM_BLOCK,
    MAX_OPTION_DATA,
    MAX_STRING,
    OPTION_REPLY_ERROR,
    OPTION_REPLY_MAGIC,
    ClientFlag,
    HandshakeFlag,
    InfoType,
    OptionReply,
    TransmissionFlag,
    option_name,
    reply_name,
)

GREETING: Final = struct.Struct(">QQH")
CLIENT_FLAGS: Final = struct.Struct(">I")
OPTION_HEADER: Final = struct.Struct(">QII")
REPLY_HEADER: Final = struct.Struct(">QIII")
EXPORT_NAME_ANSWER: Final = struct.Struct(">QH")
_INFO_EXPORT: Final = struct.Struct(">HQH")
_INFO_BLOCK_SIZE: Final = struct.Struct(">HIII")
_U16: Final = struct.Struct(">H")
_U32: Final = struct.Struct(">I")


def _encode(text: str, what: str) -> bytes:
    if "\0" in text:
        raise LocalProtocolError(f"{what} contains a NUL character")
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise LocalProtocolError(f"{what} is not valid Unicode: {error.reason}") from None
    if len(data) > MAX_STRING:
        raise LocalProtocolError(
            f"{what} is {len(data)} bytes long; the protocol allows {MAX_STRING}"
        )
    return data


def _decode(data: bytes, what: str) -> str:
    if len(data) > MAX_STRING:
        raise RemoteProtocolError(
            f"{what} is {len(data)} bytes long; the protocol allows {MAX_STRING}"
        )
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise RemoteProtocolError(f"{what} is not valid UTF-8") from None
    if "\0" in text:
        raise RemoteProtocolError(f"{what} contains a NUL character")
    return text


def printable(data: bytes) -> str:
    """Make a peer's words fit for a terminal: no control characters, `MAX_STRING` bytes at most."""
    text = data[:MAX_STRING].decode(errors="replace")
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


@dataclass(frozen=True, slots=True)
class Greeting:
    """The server's first words: it speaks newstyle, with these handshake flags."""

    flags: HandshakeFlag

    def pack(self) -> bytes:
        """Give the 18 bytes of the greeting."""
        return GREETING.pack(INIT_PASSWD, IHAVEOPT, self.flags)


@dataclass(frozen=True, slots=True)
class ClientFlags:
    """The client's answer to the greeting."""

    flags: ClientFlag

    def pack(self) -> bytes:
        """Give the 4 bytes of the flags."""
        return CLIENT_FLAGS.pack(self.flags)


@dataclass(frozen=True, slots=True)
class OptionRequest:
    """An option as the client sends it.

    Attributes:
        option: the number; one this program does not know is kept as it came.
        data: the option's data.
        oversized: only on the receiving side: the length that was announced for data that was
            too long to keep and has been skipped; 0 otherwise.
    """

    option: int
    data: bytes = b""
    oversized: int = 0

    def pack(self) -> bytes:
        """Give header and data.

        Raises:
            LocalProtocolError: the data is longer than `MAX_OPTION_DATA` bytes.
        """
        if len(self.data) > MAX_OPTION_DATA:
            raise LocalProtocolError(
                f"{len(self.data)} bytes of data are too many for {option_name(self.option)}"
            )
        return OPTION_HEADER.pack(IHAVEOPT, self.option, len(self.data)) + self.data


@dataclass(frozen=True, slots=True)
class Reply:
    """A server's reply to an option (not to EXPORT_NAME, which has an answer of its own)."""

    option: int
    reply: int
    data: bytes = b""

    @property
    def is_error(self) -> bool:
        """Whether the reply says that the option failed."""
        return bool(self.reply & OPTION_REPLY_ERROR)

    @property
    def is_final(self) -> bool:
        """Whether no further reply to the same option follows."""
        return self.is_error or self.reply == OptionReply.ACK

    def pack(self) -> bytes:
        """Give header and data.

        Raises:
            LocalProtocolError: the data is longer than `MAX_OPTION_DATA` bytes.
        """
        if len(self.data) > MAX_OPTION_DATA:
            raise LocalProtocolError(
                f"{len(self.data)} bytes of data are too many for {reply_name(self.reply)}"
            )
        header = REPLY_HEADER.pack(OPTION_REPLY_MAGIC, self.option, self.reply, len(self.data))
        return header + self.data


@dataclass(frozen=True, slots=True)
class ExportNameAnswer:
    """The answer to EXPORT_NAME: size and flags, after which transmission begins."""

    size: int
    flags: TransmissionFlag

    def pack(self, *, zeroes: bool) -> bytes:
        """Give the answer, with the 124 trailing zeroes unless they were negotiated away."""
        answer = EXPORT_NAME_ANSWER.pack(_checked_size(self.size), self.flags)
        return answer + bytes(EXPORT_NAME_ZEROES if zeroes else 0)

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read the first 10 bytes of the answer."""
        size, flags = EXPORT_NAME_ANSWER.unpack_from(data)
        return cls(_believable_size(size), TransmissionFlag(flags))


def _checked_size(size: int) -> int:
    if not 0 <= size <= MAX_EXPORT_SIZE:
        raise LocalProtocolError(f"an export cannot have {size} bytes")
    return size


def _believable_size(size: int) -> int:
    if size > MAX_EXPORT_SIZE:
        raise RemoteProtocolError(
            f"the server claims an export of {size} bytes; nothing can be larger than 2^63 - 1"
        )
    return size


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """The data of INFO and GO: an export's name, and what is asked about it."""

    name: str
    requests: tuple[int, ...] = ()

    def pack(self) -> bytes:
        """Give the option's data."""
        name = _encode(self.name, "the export's name")
        if len(set(self.requests)) != len(self.requests):
            raise LocalProtocolError("an information request may appear only once")
        return b"".join(
            (
                _U32.pack(len(name)),
                name,
                _U16.pack(len(self.requests)),
                *map(_U16.pack, self.requests),
            )
        )

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read the option's data.

        Raises:
            RemoteProtocolError: lengths that contradict each other, or a bad name.
        """
        if len(data) < 6:
            raise RemoteProtocolError(f"{len(data)} bytes are too few for an export request")
        (length,) = _U32.unpack_from(data)
        if length > len(data) - 6:
            raise RemoteProtocolError("the export's name is longer than the option that holds it")
        name = _decode(data[4 : 4 + length], "the export's name")
        (count,) = _U16.unpack_from(data, 4 + length)
        if len(data) != 6 + length + 2 * count:
            raise RemoteProtocolError(
                f"an export request announces {count} information requests, "
                f"but holds {len(data) - 6 - length} bytes of them"
            )
        return cls(name, struct.unpack_from(f">{count}H", data, 6 + length))


def parse_export_name(data: bytes) -> str:
    """Read the data of EXPORT_NAME, which is nothing but the name."""
    return _decode(data, "the export's name")


def pack_export_name(name: str) -> bytes:
    """Give the data of EXPORT_NAME."""
    return _encode(name, "the export's name")


@dataclass(frozen=True, slots=True)
class ExportListing:
    """The data of a SERVER reply: one export of a list.

    Attributes:
        name: what EXPORT_NAME, INFO and GO take.
        description: for people; empty where the server has none.
    """

    name: str
    description: str = ""

    def pack(self) -> bytes:
        """Give the reply's data."""
        name = _encode(self.name, "the export's name")
        return _U32.pack(len(name)) + name + _encode(self.description, "the export's description")

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read the reply's data."""
        if len(data) < 4:
            raise RemoteProtocolError(f"{len(data)} bytes are too few for an export in a list")
        (length,) = _U32.unpack_from(data)
        if length > len(data) - 4:
            raise RemoteProtocolError("an export's name is longer than the reply that holds it")
        return cls(
            _decode(data[4 : 4 + length], "an export's name"),
            printable(data[4 + length :]),
        )


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """Size in bytes and transmission flags of an export (NBD_INFO_EXPORT)."""

    size: int
    flags: TransmissionFlag

    def pack(self) -> bytes:
        """Give the reply's data."""
        return _INFO_EXPORT.pack(InfoType.EXPORT, _checked_size(self.size), self.flags)


@dataclass(frozen=True, slots=True)
class NameInfo:
    """The server's own name for the export (NBD_INFO_NAME)."""

    name: str

    def pack(self) -> bytes:
        """Give the reply's data."""
        return _U16.pack(InfoType.NAME) + _encode(self.name, "the export's name")


@dataclass(frozen=True, slots=True)
class DescriptionInfo:
    """What the export is, in words for people (NBD_INFO_DESCRIPTION)."""

    description: str

    def pack(self) -> bytes:
        """Give the reply's data."""
        text = _encode(self.description, "the export's description")
        return _U16.pack(InfoType.DESCRIPTION) + text


@dataclass(frozen=True, slots=True)
class BlockSizeInfo:
    """Size constraints of an export in bytes (NBD_INFO_BLOCK_SIZE; "Size constraints").

    Attributes:
        minimum: alignment and smallest length of a request; a power of two up to 64 KiB.
        preferred: what is efficient; a power of two, at least `minimum` and 512.
        maximum: the longest payload; at least `preferred`.
    """

    minimum: int
    preferred: int
    maximum: int

    def problem(self) -> str:
        """Say which rule of the specification the three break, or nothing if none."""
        if not _is_power_of_two(self.minimum) or self.minimum > MAX_MINIMUM_BLOCK:
            return f"a minimum block size of {self.minimum} (a power of two up to 65536)"
        if not _is_power_of_two(self.preferred) or self.preferred < max(512, self.minimum):
            return f"a preferred block size of {self.preferred} (a power of two, at least 512)"
        if self.maximum < self.preferred:
            return f"a maximum payload of {self.maximum} (at least the preferred block size)"
        return ""

    def pack(self) -> bytes:
        """Give the reply's data.

        Raises:
            LocalProtocolError: the constraints break the specification's rules.
        """
        if problem := self.problem():
            raise LocalProtocolError(f"the protocol does not allow {problem}")
        return _INFO_BLOCK_SIZE.pack(
            InfoType.BLOCK_SIZE, self.minimum, self.preferred, self.maximum
        )


@dataclass(frozen=True, slots=True)
class UnknownInfo:
    """A kind of information this program does not know; to be ignored."""

    type: int
    data: bytes


Info = ExportInfo | NameInfo | DescriptionInfo | BlockSizeInfo | UnknownInfo


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def parse_info(data: bytes) -> Info:
    """Read the data of an INFO reply.

    Raises:
        RemoteProtocolError: a known kind of the wrong length or with impossible values.
    """
    if len(data) < 2:
        raise RemoteProtocolError(f"{len(data)} bytes are too few for information on an export")
    (kind,) = _U16.unpack_from(data)
    match kind:
        case InfoType.EXPORT:
            if len(data) != _INFO_EXPORT.size:
                raise RemoteProtocolError(f"NBD_INFO_EXPORT has {len(data)} bytes, not 12")
            _, size, flags = _INFO_EXPORT.unpack(data)
            return ExportInfo(_believable_size(size), TransmissionFlag(flags))
        case InfoType.NAME:
            return NameInfo(_decode(data[2:], "the export's name"))
        case InfoType.DESCRIPTION:
            return DescriptionInfo(printable(data[2:]))
        case InfoType.BLOCK_SIZE:
            if len(data) != _INFO_BLOCK_SIZE.size:
                raise RemoteProtocolError(f"NBD_INFO_BLOCK_SIZE has {len(data)} bytes, not 14")
            info = BlockSizeInfo(*_INFO_BLOCK_SIZE.unpack(data)[1:])
            if problem := info.problem():
                raise RemoteProtocolError(f"the server announces {problem}")
            return info
    return UnknownInfo(kind, data[2:])


@dataclass(frozen=True, slots=True)
class MetaContextRequest:
    """The data of LIST_META_CONTEXT and SET_META_CONTEXT: an export and queries about it."""

    name: str
    queries: tuple[str, ...] = ()

    def pack(self) -> bytes:
        """Give the option's data."""
        name = _encode(self.name, "the export's name")
        parts = [_U32.pack(len(name)), name, _U32.pack(len(self.queries))]
        for query in self.queries:
            data = _encode(query, "a metadata query")
            parts += (_U32.pack(len(data)), data)
        return b"".join(parts)

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read the option's data."""
        name, position = _counted_string(data, 0, "the export's name")
        if len(data) - position < 4:
            raise RemoteProtocolError("a metadata request ends before its number of queries")
        (count,) = _U32.unpack_from(data, position)
        position += 4
        # Each query takes four bytes at least: a huge count is refused before any loop runs.
        if count > (len(data) - position) // 4:
            raise RemoteProtocolError(f"a metadata request announces {count} queries it lacks")
        queries = []
        for _ in range(count):
            query, position = _counted_string(data, position, "a metadata query")
            queries.append(query)
        if position != len(data):
            raise RemoteProtocolError("a metadata request has bytes behind its last query")
        return cls(name, tuple(queries))


def _counted_string(data: bytes, position: int, what: str) -> tuple[str, int]:
    if len(data) - position < 4:
        raise RemoteProtocolError(f"{what} is cut off")
    (length,) = _U32.unpack_from(data, position)
    start, end = position + 4, position + 4 + length
    if end > len(data):
        raise RemoteProtocolError(f"{what} is longer than the message that holds it")
    return _decode(data[start:end], what), end


@dataclass(frozen=True, slots=True)
class MetaContext:
    """The data of a META_CONTEXT reply: a context's id on this connection, and its name."""

    id: int
    name: str

    def pack(self) -> bytes:
        """Give the reply's data."""
        return _U32.pack(self.id) + _encode(self.name, "a metadata context's name")

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read the reply's data."""
        if len(data) < 4:
            raise RemoteProtocolError(f"{len(data)} bytes are too few for a metadata context")
        (number,) = _U32.unpack_from(data)
        return cls(number, _decode(data[4:], "a metadata context's name"))
