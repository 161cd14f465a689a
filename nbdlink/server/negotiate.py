"""The server's side of the handshake: what it answers to each option.

`Negotiation` decides and does no I/O: bytes in, answers out, so it can be run against the
client's machine in memory. `negotiate` is the small driver that does it over a socket.

The server runs without TLS so far ("NOTLS mode"), and with simple replies only: options that
belong to later extensions are answered "unsupported", which clients must be ready for.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from nbdlink.errors import RemoteProtocolError
from nbdlink.protocol.constants import (
    MAX_OPTION_DATA,
    MAX_OPTION_REPLIES,
    HandshakeFlag,
    InfoType,
    Option,
    OptionReply,
    option_name,
)
from nbdlink.protocol.handshake import Handshake, Role, State
from nbdlink.protocol.messages import (
    DescriptionInfo,
    ExportInfo,
    ExportListing,
    ExportNameAnswer,
    ExportRequest,
    Greeting,
    NameInfo,
    OptionRequest,
    Reply,
    parse_export_name,
)
from nbdlink.protocol.transmission import RequestRules
from nbdlink.server.export import Catalogue, Export
from nbdlink.transport import stream
from nbdlink.transport.stream import Deadline

DEFAULT_TIMEOUT: Final = 10.0
"""Seconds that a client has for the whole handshake."""


@dataclass(frozen=True, slots=True)
class NegotiatedSession:
    """What a client and the server agreed on.

    Attributes:
        export: what the client chose.
        rules: what its requests must keep to.
        trailing: bytes that the client has sent behind the handshake already.
    """

    export: Export
    rules: RequestRules
    trailing: bytes


class Negotiation:
    """One client's handshake without its socket.

    Attributes:
        export: what the client chose, once transmission begins.
    """

    def __init__(
        self, catalogue: Catalogue, is_closing: Callable[[], bool] = lambda: False
    ) -> None:
        """Begin a handshake.

        Args:
            catalogue: the exports to offer.
            is_closing: tells whether the server is about to stop; from then on every option
                that would lead to transmission is answered ERR_SHUTDOWN.
        """
        self._machine = Handshake(Role.SERVER)
        self._catalogue = catalogue
        self._is_closing = is_closing
        self.export: Export | None = None

    def greeting(self) -> bytes:
        """Give the server's first words."""
        flags = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
        return self._machine.send(Greeting(flags))

    def answers(self, data: bytes) -> Iterator[bytes]:
        """Take bytes of the client; give what to send, one piece for each option.

        The pieces are made as they are asked for: a client that asks for a thousand lists and
        reads none of them costs the memory of one.

        Raises:
            RemoteProtocolError: the client broke the protocol, or asked by EXPORT_NAME (which
                has no error reply) for something that cannot be served.
        """
        machine = self._machine
        machine.receive_data(data)
        while (message := machine.next_message()) is not None:
            if isinstance(message, OptionRequest):
                yield self._answer(message)

    def session(self) -> NegotiatedSession | None:
        """Give the result, or None as long as there is none."""
        if self.export is None:
            return None
        return NegotiatedSession(self.export, self.export.rules, self._machine.trailing_data)

    @property
    def ended(self) -> bool:
        """Whether the client has ended the session (NBD_OPT_ABORT)."""
        return self._machine.state is State.CLOSED

    def _answer(self, request: OptionRequest) -> bytes:
        if request.option == Option.EXPORT_NAME:
            return self._answer_export_name(request)
        try:
            replies = self._replies(request)
        except RemoteProtocolError as error:
            # Nothing is broken but this option's data, whose length is known: go on.
            replies = [_refusal(request, OptionReply.ERR_INVALID, str(error))]
        return b"".join([self._machine.send(reply) for reply in replies])

    def _answer_export_name(self, request: OptionRequest) -> bytes:
        if request.oversized:
            raise RemoteProtocolError(f"an export's name of {request.oversized} bytes")
        if self._is_closing():
            raise RemoteProtocolError("it came while the server is shutting down")
        name = parse_export_name(request.data)
        export = self._catalogue.find(name)
        if export is None:
            raise RemoteProtocolError(f"there is no export {_short(name)}")
        self.export = export
        return self._machine.send(ExportNameAnswer(export.size, export.flags))

    def _replies(self, request: OptionRequest) -> list[Reply]:
        """Decide what to reply to any option but EXPORT_NAME."""
        if request.option == Option.ABORT:  # whatever data it carries
            return [Reply(request.option, OptionReply.ACK)]
        if request.oversized:
            words = f"{request.oversized} bytes of data; at most {MAX_OPTION_DATA} are read"
            return [_refusal(request, OptionReply.ERR_TOO_BIG, words)]
        if self._is_closing():
            return [_refusal(request, OptionReply.ERR_SHUTDOWN, "the server is shutting down")]
        match request.option:
            case Option.LIST:
                return self._list(request)
            case Option.INFO | Option.GO:
                return self._describe(request)
            case Option.STARTTLS if request.data:
                return [_refusal(request, OptionReply.ERR_INVALID, "STARTTLS takes no data")]
        words = f"{option_name(request.option)} is not supported"
        return [_refusal(request, OptionReply.ERR_UNSUP, words)]

    def _list(self, request: OptionRequest) -> list[Reply]:
        if request.data:
            return [_refusal(request, OptionReply.ERR_INVALID, "LIST takes no data")]
        if len(self._catalogue) >= MAX_OPTION_REPLIES:
            return [_refusal(request, OptionReply.ERR_TOO_BIG, "too many exports to list")]
        replies = [
            Reply(
                request.option,
                OptionReply.SERVER,
                ExportListing(export.name, export.description).pack(),
            )
            for export in self._catalogue
        ]
        return [*replies, Reply(request.option, OptionReply.ACK)]

    def _describe(self, request: OptionRequest) -> list[Reply]:
        asked = ExportRequest.parse(request.data)
        export = self._catalogue.find(asked.name)
        if export is None:
            words = f"there is no export {_short(asked.name)}"
            return [_refusal(request, OptionReply.ERR_UNKNOWN, words)]
        information = [ExportInfo(export.size, export.flags).pack()]
        if InfoType.NAME in asked.requests:
            information.append(NameInfo(export.name).pack())
        if InfoType.DESCRIPTION in asked.requests and export.description:
            information.append(DescriptionInfo(export.description).pack())
        # Told to those too who did not ask: it costs 34 bytes, and they may heed it.
        information.append(export.block_size.pack())
        if request.option == Option.GO:
            self.export = export
        replies = [Reply(request.option, OptionReply.INFO, data) for data in information]
        return [*replies, Reply(request.option, OptionReply.ACK)]


def _refusal(request: OptionRequest, reply: OptionReply, words: str) -> Reply:
    return Reply(request.option, reply, words.encode())


def _short(name: str) -> str:
    """Quote a client's word so that it is harmless in a log and of bearable length."""
    return ascii(name if len(name) <= 80 else name[:77] + "...")


def negotiate(
    sock: socket.socket,
    catalogue: Catalogue,
    deadline: Deadline,
    is_closing: Callable[[], bool] = lambda: False,
) -> NegotiatedSession | None:
    """Do the handshake over `sock`; None if the client left without choosing an export.

    The socket is left blocking, without a timeout. For `is_closing` see `Negotiation`.

    Raises:
        TransportError: the deadline passed, or the connection broke.
        RemoteProtocolError: the client broke the protocol.
    """
    negotiation = Negotiation(catalogue, is_closing)
    stream.send(sock, negotiation.greeting(), deadline)
    while (session := negotiation.session()) is None:
        data = stream.receive(sock, deadline)
        if not data:
            return None
        for answer in negotiation.answers(data):
            stream.send(sock, answer, deadline)
        if negotiation.ended:
            return None
    sock.settimeout(None)
    return session
