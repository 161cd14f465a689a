"""The order of the handshake: one state machine that plays either role.

Both sides of a connection go through the same states, each by what it sends and what it
receives, so one table serves the client and the server, and the two can be run against each
other in memory. In words (specification, "Handshake"):

 1. GREETING: the server speaks first, with its handshake flags.
 2. CLIENT_FLAGS: the client answers with flags that the server offered, and no others.
 3. HAGGLING: the client sends one option. Unless both sides agreed on fixed newstyle, that
    option must be EXPORT_NAME.
 4. REPLYING: the server sends any number of replies and ends with ACK or an error. Then it
    is the client's turn again (HAGGLING), except that
      a. an acknowledged ABORT ends the session (CLOSED);
      b. an acknowledged GO, which must have been preceded by NBD_INFO_EXPORT, begins
         TRANSMISSION;
      c. an acknowledged STARTTLS begins STARTING_TLS: no plain byte may follow. `tls_started`
         goes back to HAGGLING with everything said before forgotten.
 5. NAMING: the server answers EXPORT_NAME, which begins TRANSMISSION, or hangs up. Once
    extended headers were agreed on, EXPORT_NAME may not be sent any more.
 6. The acknowledgements of STRUCTURED_REPLY and EXTENDED_HEADERS set the style of headers that
    transmission will have; the richer one wins, and STARTTLS goes back to simple ones. Without
    either, a client does not send SET_META_CONTEXT.

Sending out of turn raises `LocalProtocolError` and changes nothing. Receiving out of turn, or
anything that breaks a limit, raises `RemoteProtocolError`, after which the machine is CLOSED.
"""

from __future__ import annotations

import enum
from typing import Final

from nbdlink.errors import LocalProtocolError, OldstyleServerError, RemoteProtocolError
from nbdlink.protocol.constants import (
    EXPORT_NAME_ZEROES,
    IHAVEOPT,
    INIT_PASSWD,
    MAX_OPTION_DATA,
    MAX_OPTION_REPLIES,
    MAX_OPTION_REPLY_BYTES,
    MAX_OPTIONS,
    MAX_SKIPPED_OPTION_DATA,
    OLDSTYLE_MAGIC,
    OPTION_REPLY_MAGIC,
    ClientFlag,
    HandshakeFlag,
    HeaderStyle,
    InfoType,
    Option,
    OptionReply,
    option_name,
    reply_name,
)
from nbdlink.protocol.messages import (
    CLIENT_FLAGS,
    EXPORT_NAME_ANSWER,
    GREETING,
    OPTION_HEADER,
    REPLY_HEADER,
    ClientFlags,
    ExportNameAnswer,
    Greeting,
    OptionRequest,
    Reply,
)

Message = Greeting | ClientFlags | OptionRequest | Reply | ExportNameAnswer

_EXPORT_INFO: Final = InfoType.EXPORT.to_bytes(2, "big")

# Which options a known, non-final reply can belong to. Unknown reply types are let through:
# an extension may bring them, and the final reply is what counts.
_REPLY_BELONGS_TO: Final = {
    OptionReply.SERVER: {Option.LIST},
    OptionReply.INFO: {Option.INFO, Option.GO},
    OptionReply.META_CONTEXT: {Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT},
}


class Role(enum.Enum):
    """Which side of the connection a machine is."""

    CLIENT = "client"
    SERVER = "server"


class State(enum.Enum):
    """Where in the handshake a connection is; see the module's docstring."""

    GREETING = enum.auto()
    CLIENT_FLAGS = enum.auto()
    HAGGLING = enum.auto()
    REPLYING = enum.auto()
    NAMING = enum.auto()
    STARTING_TLS = enum.auto()
    TRANSMISSION = enum.auto()
    CLOSED = enum.auto()


# Who speaks in which state, and what kind of message. States that are missing here allow
# neither side to send a handshake message.
_TURN: Final[dict[State, tuple[Role, type[Message]]]] = {
    State.GREETING: (Role.SERVER, Greeting),
    State.CLIENT_FLAGS: (Role.CLIENT, ClientFlags),
    State.HAGGLING: (Role.CLIENT, OptionRequest),
    State.REPLYING: (Role.SERVER, Reply),
    State.NAMING: (Role.SERVER, ExportNameAnswer),
}


class _BrokenRuleError(Exception):
    """A rule was broken; `send` and `next_message` say by whom."""


class Handshake:
    """One connection's handshake, seen from one side.

    Feed received bytes to `receive_data`, take messages out with `next_message` until it gives
    None, and write the bytes that `send` returns to the peer. Once `state` is TRANSMISSION,
    `trailing_data` has what came behind the handshake.

    Attributes:
        role: this side.
        state: where the handshake stands.
        fixed: whether both sides agreed on fixed newstyle.
        zeroes: whether the answer to EXPORT_NAME ends in 124 zeroes.
        option: the option being answered, or None.
        style: which headers transmission will have, as far as agreed on.
    """

    def __init__(self, role: Role) -> None:
        self.role = role
        self.state = State.GREETING
        self.fixed = False
        self.zeroes = True
        self.option: int | None = None
        self.style = HeaderStyle.SIMPLE
        self._offered = HandshakeFlag(0)
        self._options = 0
        self._replies = 0
        self._reply_bytes = 0
        self._info_export_seen = False
        self._buffer = bytearray()
        self._skip = 0
        self._oversized: OptionRequest | None = None

    @property
    def trailing_data(self) -> bytes:
        """Bytes received and not part of any message yet."""
        return bytes(self._buffer)

    def send(self, message: Message) -> bytes:
        """Give the bytes that say `message`, and go to the state that follows it.

        Raises:
            LocalProtocolError: it is not this side's turn to say that; nothing has changed.
        """
        try:
            self._check_turn(self.role, message)
        except _BrokenRuleError as error:
            raise LocalProtocolError(f"cannot send: {error}") from None
        data = (
            message.pack(zeroes=self.zeroes)
            if isinstance(message, ExportNameAnswer)
            else message.pack()
        )
        self._advance(message)
        return data

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        """Take bytes from the peer; an empty `data` says that the peer hung up.

        Raises:
            RemoteProtocolError: the peer hung up in the middle of the handshake.
        """
        if data:
            self._buffer += data
        elif self.state not in (State.CLOSED, State.TRANSMISSION):
            raise self._dead(self._cut_off())

    def next_message(self) -> Message | None:
        """Take the next complete message of the peer, or None if more bytes are needed.

        Raises:
            RemoteProtocolError: what came breaks the protocol; the machine is closed.
        """
        if self._skip and not self._skip_data():
            return None
        if self._oversized:
            message: Message | None = self._oversized
            self._oversized = None
        else:
            try:
                message = self._parse()
            except RemoteProtocolError as error:
                raise self._dead(error) from None
        if message is None:
            return None
        try:
            self._check_turn(_other(self.role), message)
        except _BrokenRuleError as error:
            raise self._dead(
                RemoteProtocolError(f"the {_other(self.role).value} {error}")
            ) from None
        self._advance(message)
        return message

    def tls_started(self) -> None:
        """Say that the TLS handshake is done: haggling begins anew over the secure stream.

        Raises:
            LocalProtocolError: TLS was not agreed on.
            RemoteProtocolError: plain bytes came behind the agreement, as an attacker would
                inject them (specification, "Protocol downgrade attacks").
        """
        if self.state is not State.STARTING_TLS:
            raise LocalProtocolError("TLS has not been agreed on")
        if self._buffer:
            raise self._dead(RemoteProtocolError("plain bytes were received behind STARTTLS"))
        self.state = State.HAGGLING

    def close(self) -> None:
        """Give the handshake up."""
        self.state = State.CLOSED

    # The rules.

    def _check_turn(self, speaker: Role, message: Message) -> None:
        """Check that `speaker` may say `message` now; changes nothing."""
        who, kind = _TURN.get(self.state, (None, None))
        if who is not speaker or not isinstance(message, kind or ()):
            raise _BrokenRuleError(
                f"sent {_describe(message)} in the state {self.state.name.lower()}"
            )
        if isinstance(message, ClientFlags):
            if extra := int(message.flags) & ~int(self._offered):
                raise _BrokenRuleError(f"set client flags that were not offered: {extra:#x}")
        elif isinstance(message, OptionRequest):
            if not self.fixed and message.option != Option.EXPORT_NAME:
                raise _BrokenRuleError(f"sent {option_name(message.option)} without fixed newstyle")
            if self._options >= MAX_OPTIONS:
                raise _BrokenRuleError(f"sent more than {MAX_OPTIONS} options")
            if message.option == Option.EXPORT_NAME and self.style == HeaderStyle.EXTENDED:
                raise _BrokenRuleError("sent NBD_OPT_EXPORT_NAME after extended headers")
            # A server answers it with an error, and goes on.
            if (
                message.option == Option.SET_META_CONTEXT
                and self.role is Role.CLIENT
                and self.style == HeaderStyle.SIMPLE
            ):
                raise _BrokenRuleError("sent NBD_OPT_SET_META_CONTEXT before structured replies")
        elif isinstance(message, Reply):
            self._check_reply(message)

    def _check_reply(self, message: Reply) -> None:
        if message.option != self.option:
            asked = option_name(self.option or 0)
            raise _BrokenRuleError(f"replied to {option_name(message.option)} instead of {asked}")
        belongs = _REPLY_BELONGS_TO.get(OptionReply(message.reply)) if _known(message) else None
        if belongs and message.option not in belongs:
            raise _BrokenRuleError(
                f"sent {reply_name(message.reply)} in reply to {option_name(message.option)}"
            )
        if self._reply_bytes + len(message.data) > MAX_OPTION_REPLY_BYTES:
            raise _BrokenRuleError(
                f"sent more than {MAX_OPTION_REPLY_BYTES} bytes of replies to "
                f"{option_name(message.option)}"
            )
        if self._replies >= MAX_OPTION_REPLIES:
            raise _BrokenRuleError(
                f"sent more than {MAX_OPTION_REPLIES} replies to {option_name(message.option)}"
            )
        if (
            message.reply == OptionReply.ACK
            and message.option == Option.GO
            and not self._info_export_seen
        ):
            raise _BrokenRuleError("acknowledged NBD_OPT_GO without telling the export's size")

    def _advance(self, message: Message) -> None:
        """Go to the state that follows `message`, whoever said it."""
        if isinstance(message, Greeting):
            self._offered = message.flags
            self.state = State.CLIENT_FLAGS
        elif isinstance(message, ClientFlags):
            self.fixed = bool(message.flags & ClientFlag.FIXED_NEWSTYLE)
            self.zeroes = not message.flags & ClientFlag.NO_ZEROES
            self.state = State.HAGGLING
        elif isinstance(message, OptionRequest):
            self.option = message.option
            self._options += 1
            self._replies = self._reply_bytes = 0
            self._info_export_seen = False
            naming = message.option == Option.EXPORT_NAME
            self.state = State.NAMING if naming else State.REPLYING
        elif isinstance(message, Reply):
            self._replies += 1
            self._reply_bytes += len(message.data)
            if message.reply == OptionReply.INFO and message.data[:2] == _EXPORT_INFO:
                self._info_export_seen = True
            if message.is_final:
                self.option = None
                self.state = self._state_after(message)
        else:
            self.option = None
            self.state = State.TRANSMISSION

    def _state_after(self, final: Reply) -> State:
        if not final.is_error:
            match final.option:
                case Option.GO:
                    return State.TRANSMISSION
                case Option.ABORT:
                    return State.CLOSED
                case Option.STARTTLS:
                    self.style = HeaderStyle.SIMPLE
                    return State.STARTING_TLS
                case Option.STRUCTURED_REPLY:
                    self.style = max(self.style, HeaderStyle.STRUCTURED)
                case Option.EXTENDED_HEADERS:
                    self.style = HeaderStyle.EXTENDED
        return State.HAGGLING

    # Parsing. Nothing is taken out of the buffer before a message is there in whole.

    def _parse(self) -> Message | None:
        if _TURN.get(self.state, (None,))[0] is not _other(self.role):
            if self._buffer and self.state in (State.GREETING, State.CLIENT_FLAGS):
                raise RemoteProtocolError(f"the {_other(self.role).value} spoke out of turn")
            return None
        match self.state:
            case State.GREETING:
                return self._parse_greeting()
            case State.CLIENT_FLAGS:
                return self._parse_client_flags()
            case State.HAGGLING:
                return self._parse_option()
            case State.REPLYING:
                return self._parse_reply()
        return self._parse_export_name_answer()

    def _take(self, length: int) -> bytes:
        data = bytes(self._buffer[:length])
        del self._buffer[:length]
        return data

    def _parse_greeting(self) -> Greeting | None:
        # Compared as it arrives, so that something that is no NBD server is told from one that
        # is slow even if it says less than a greeting's worth of bytes.
        expected = GREETING.pack(INIT_PASSWD, IHAVEOPT, 0)[:16]
        oldstyle = GREETING.pack(INIT_PASSWD, OLDSTYLE_MAGIC, 0)[:16]
        start = bytes(self._buffer[:16])
        if not expected.startswith(start):
            if len(start) == 16 and start == oldstyle:
                raise OldstyleServerError(
                    "the server speaks only the oldstyle negotiation, which nbdlink does not",
                    hint="use a server newer than nbd 2.9.17, or its newstyle port (10809)",
                )
            if not oldstyle.startswith(start):
                raise RemoteProtocolError(
                    "this is not an NBD server: it does not begin with NBDMAGIC",
                    hint="check host and port; another service may be listening there",
                )
            return None
        if len(self._buffer) < GREETING.size:
            return None
        flags = GREETING.unpack(self._take(GREETING.size))[2]
        return Greeting(HandshakeFlag(flags))

    def _parse_client_flags(self) -> ClientFlags | None:
        if len(self._buffer) < CLIENT_FLAGS.size:
            return None
        return ClientFlags(ClientFlag(CLIENT_FLAGS.unpack(self._take(CLIENT_FLAGS.size))[0]))

    def _parse_option(self) -> OptionRequest | None:
        if len(self._buffer) < OPTION_HEADER.size:
            return None
        magic, option, length = OPTION_HEADER.unpack_from(self._buffer)
        if magic != IHAVEOPT:
            raise RemoteProtocolError(f"an option begins with {magic:#x} instead of IHAVEOPT")
        if length > MAX_OPTION_DATA:
            if length > MAX_SKIPPED_OPTION_DATA:
                raise RemoteProtocolError(f"{option_name(option)} announces {length} bytes of data")
            self._take(OPTION_HEADER.size)
            self._skip = length
            self._oversized = OptionRequest(option, b"", length)
            if not self._skip_data():
                return None
            message, self._oversized = self._oversized, None
            return message
        if len(self._buffer) < OPTION_HEADER.size + length:
            return None
        self._take(OPTION_HEADER.size)
        return OptionRequest(option, self._take(length))

    def _skip_data(self) -> bool:
        skipped = len(self._take(min(self._skip, len(self._buffer))))
        self._skip -= skipped
        return not self._skip

    def _parse_reply(self) -> Reply | None:
        if len(self._buffer) < REPLY_HEADER.size:
            return None
        magic, option, reply, length = REPLY_HEADER.unpack_from(self._buffer)
        if magic != OPTION_REPLY_MAGIC:
            raise RemoteProtocolError(f"an option reply begins with the wrong magic {magic:#x}")
        if length > MAX_OPTION_DATA:
            raise RemoteProtocolError(
                f"{reply_name(reply)} announces {length} bytes; {MAX_OPTION_DATA} are the limit"
            )
        if len(self._buffer) < REPLY_HEADER.size + length:
            return None
        self._take(REPLY_HEADER.size)
        return Reply(option, reply, self._take(length))

    def _parse_export_name_answer(self) -> ExportNameAnswer | None:
        length = EXPORT_NAME_ANSWER.size + (EXPORT_NAME_ZEROES if self.zeroes else 0)
        if len(self._buffer) < length:
            return None
        return ExportNameAnswer.parse(self._take(length))

    def _cut_off(self) -> RemoteProtocolError:
        peer = _other(self.role).value
        if self.state is State.NAMING:
            return RemoteProtocolError(
                f"the {peer} hung up on NBD_OPT_EXPORT_NAME: it does not offer that export"
            )
        if self.option is not None:
            return RemoteProtocolError(f"the {peer} hung up during {option_name(self.option)}")
        return RemoteProtocolError(f"the {peer} hung up during the handshake")

    def _dead(self, error: RemoteProtocolError) -> RemoteProtocolError:
        self.state = State.CLOSED
        return error


def _other(role: Role) -> Role:
    return Role.SERVER if role is Role.CLIENT else Role.CLIENT


def _known(message: Reply) -> bool:
    return message.reply in OptionReply._value2member_map_


def _describe(message: Message) -> str:
    match message:
        case OptionRequest(option):
            return option_name(option)
        case Reply(_, reply):
            return reply_name(reply)
    return type(message).__name__
