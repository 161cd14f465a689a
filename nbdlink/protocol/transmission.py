"""The transmission phase: request and reply headers, and the rules that requests obey.

The `Struct`s are public because loops that serve a hundred thousand requests a second use
them directly. Replies are read by `replies`.

Sizes and offsets are in bytes. Cookies are opaque 64-bit numbers that the client chooses
(specification, "Ordering of messages and writes").
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from nbdlink.errors import LocalProtocolError, RemoteProtocolError
from nbdlink.protocol.constants import (
    EXTENDED_REQUEST_MAGIC,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    Command,
    CommandFlag,
    Error,
    HeaderStyle,
    TransmissionFlag,
    command_name,
)

REQUEST: Final = struct.Struct(">IHHQQI")
"""Magic, command flags, type, cookie, offset, length."""

EXTENDED_REQUEST: Final = struct.Struct(">IHHQQQ")
"""Magic, command flags, type, cookie, offset, payload or effect length."""

SIMPLE_REPLY: Final = struct.Struct(">IIQ")
"""Magic, error, cookie."""

_FLAGS_OF_COMMAND: Final[dict[int, CommandFlag]] = {
    # FUA is allowed on every command once it was offered, though it means something only on
    # those that write (specification, "Command flags").
    Command.READ: CommandFlag.FUA | CommandFlag.DF,
    Command.WRITE: CommandFlag.FUA,
    Command.DISC: CommandFlag.FUA,
    Command.FLUSH: CommandFlag.FUA,
    Command.TRIM: CommandFlag.FUA,
    Command.CACHE: CommandFlag.FUA,
    Command.WRITE_ZEROES: CommandFlag.FUA | CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO,
    Command.BLOCK_STATUS: CommandFlag.FUA | CommandFlag.REQ_ONE,
}

# Plain integers, here and below: an operator of IntFlag is a Python function, which takes a
# microsecond.
_NEEDS: Final[dict[int, int]] = {
    Command.FLUSH: int(TransmissionFlag.SEND_FLUSH),
    Command.TRIM: int(TransmissionFlag.SEND_TRIM),
    Command.WRITE_ZEROES: int(TransmissionFlag.SEND_WRITE_ZEROES),
    Command.CACHE: int(TransmissionFlag.SEND_CACHE),
}

_OFFERED_BY: Final = (
    (int(CommandFlag.FUA), int(TransmissionFlag.SEND_FUA)),
    (int(CommandFlag.FAST_ZERO), int(TransmissionFlag.SEND_FAST_ZERO)),
    (int(CommandFlag.DF), int(TransmissionFlag.SEND_DF)),
)
_READ_ONLY: Final = int(TransmissionFlag.READ_ONLY)

_WRITES: Final = frozenset({Command.WRITE, Command.TRIM, Command.WRITE_ZEROES})
_HAS_PAYLOAD_LENGTH: Final = frozenset({Command.READ, Command.WRITE})


@dataclass(frozen=True, slots=True)
class RequestHeader:
    """One request, without its payload.

    Attributes:
        command: the type; an unknown number is kept as it came.
        cookie: what the reply will carry.
        offset: bytes from the export's start.
        length: bytes of the export that it is about, or of the payload where it has one.
        flags: command flags; unknown bits are kept.
    """

    command: int
    cookie: int
    offset: int = 0
    length: int = 0
    flags: int = 0

    @property
    def payload_length(self) -> int:
        """Bytes that follow the header in the simple style."""
        return self.length if self.command == Command.WRITE else 0

    def pack(self, style: HeaderStyle = HeaderStyle.SIMPLE) -> bytes:
        """Give the 28 bytes of the header, or the 32 of the extended style.

        There a write says that it has a payload (PAYLOAD_LEN).

        Raises:
            LocalProtocolError: a number does not fit into its field.
        """
        magic, form, flags = REQUEST_MAGIC, REQUEST, self.flags
        if style == HeaderStyle.EXTENDED:
            magic, form = EXTENDED_REQUEST_MAGIC, EXTENDED_REQUEST
            if self.command == Command.WRITE:
                flags |= CommandFlag.PAYLOAD_LEN
        try:
            return form.pack(magic, flags, self.command, self.cookie, self.offset, self.length)
        except struct.error:
            raise LocalProtocolError(
                f"{command_name(self.command)} at {self.offset} for {self.length} bytes "
                "does not fit into a request"
            ) from None

    @classmethod
    def parse(
        cls, data: bytes | bytearray | memoryview, style: HeaderStyle = HeaderStyle.SIMPLE
    ) -> RequestHeader:
        """Read the header at the beginning of `data`.

        Raises:
            RemoteProtocolError: the magic is wrong; nothing that follows can be trusted.
        """
        wanted, form = REQUEST_MAGIC, REQUEST
        if style == HeaderStyle.EXTENDED:
            wanted, form = EXTENDED_REQUEST_MAGIC, EXTENDED_REQUEST
        magic, flags, command, cookie, offset, length = form.unpack_from(data)
        if magic != wanted:
            raise RemoteProtocolError(f"a request begins with the wrong magic {magic:#010x}")
        return cls(command, cookie, offset, length, flags)


@dataclass(frozen=True, slots=True)
class RequestRules:
    """What an export allows a request to be; both sides check against the same rules.

    Attributes:
        size: the export's size in bytes.
        flags: its transmission flags.
        minimum_block: alignment that the client promised to keep; 1 if it promised nothing.
        maximum_payload: the longest read or write in bytes.
        has_contexts: whether metadata contexts were selected, so that BLOCK_STATUS may be asked.
    """

    size: int
    flags: TransmissionFlag
    minimum_block: int
    maximum_payload: int
    has_contexts: bool = False

    def check(self, command: int, flags: int, offset: int, length: int) -> int:
        """Say which `Error` a request deserves, or 0 if it is fine.

        The errors are those of the specification's "Error values": EPERM for a write to a
        read-only export, ENOSPC for a write past the end, EINVAL for the rest. PAYLOAD_LEN
        belongs to the header and not to the command: it must have been taken out of `flags`.
        """
        if command not in _FLAGS_OF_COMMAND:
            return Error.EINVAL
        if command == Command.BLOCK_STATUS and not (self.has_contexts and length):
            return Error.EINVAL
        # Plain integers: the complement of an IntFlag would leave unknown bits out.
        allowed = int(_FLAGS_OF_COMMAND[command])
        has = int(self.flags)
        for flag, offered in _OFFERED_BY:
            if not has & offered:
                allowed &= ~flag
        if flags & ~allowed or _NEEDS.get(command, 0) & ~has:
            # A read-only export offers neither trim nor zeroes; the error a person can act on
            # is the one about writing.
            if command in _WRITES and has & _READ_ONLY:
                return Error.EPERM
            return Error.EINVAL
        if command == Command.FLUSH:
            return 0 if offset == 0 and length == 0 else Error.EINVAL
        if command in _WRITES and has & _READ_ONLY:
            return Error.EPERM
        if offset + length > self.size:
            return Error.EINVAL if command not in _GROWS else Error.ENOSPC
        if (offset | length) & (self.minimum_block - 1):
            return Error.EINVAL
        if command in _HAS_PAYLOAD_LENGTH and length > self.maximum_payload:
            return Error.EINVAL
        return 0


_GROWS: Final = frozenset({Command.WRITE, Command.WRITE_ZEROES})


def pack_simple_reply(error: int, cookie: int) -> bytes:
    """Give the 16 bytes of a simple reply's header."""
    return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie)


def known_error(value: int) -> int:
    """Give a reply's error as one of `Error`, or 0: unknown values count as EINVAL."""
    return value if value in _ERRORS else Error.EINVAL


_ERRORS: Final = frozenset({0, *Error})
