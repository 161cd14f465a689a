"""The server's side of the handshake: what it answers to each option.

`Negotiation` decides and does no I/O: bytes in, answers out, so it can be run against the
client's machine in memory. `negotiate` is the small driver that does it over a socket.

The server runs without TLS so far ("NOTLS mode"). It knows all three styles of headers, of
which the client's last choice counts; a client that asks for none gets simple replies.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from nbdlink.errors import RemoteProtocolError
from nbdlink.protocol.constants import (
    MAX_OPTION_DATA,
    MAX_OPTION_REPLIES,
    HandshakeFlag,
    HeaderStyle,
    InfoType,
    Option,
    OptionReply,
    TransmissionFlag,
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
    MetaContext,
    MetaContextRequest,
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
        trailing: bytes that the client has sent behind the handshake already.
        style: which headers the requests and replies have.
        contexts: the metadata contexts that the client selected, by id.
    """

    export: Export
    trailing: bytes = b""
    style: HeaderStyle = HeaderStyle.SIMPLE
    contexts: Mapping[int, str] = field(default_factory=dict)

    @property
    def rules(self) -> RequestRules:
        """What the client's requests must keep to."""
        return self.export.rules(self.style, with_contexts=bool(self.contexts))


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
        # What was selected last: contexts by id, and the export that they were selected for.
        self._contexts: dict[int, str] = {}
        self._contexts_of = ""

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
        return NegotiatedSession(
            self.export,
            self._machine.trailing_data,
            self._machine.style,
            self._selected(self.export),
        )

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
        return self._machine.send(ExportNameAnswer(export.size, self._flags(export)))

    def _replies(self, request: OptionRequest) -> list[Reply]:
        """Decide what to reply to any option but EXPORT_NAME."""
        if request.option == Option.ABORT:  # whatever data it carries
            return [Reply(request.option, OptionReply.ACK)]
        if request.option == Option.SET_META_CONTEXT:
            self._contexts = {}  # replaced even if this fails
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
            case Option.STRUCTURED_REPLY | Option.EXTENDED_HEADERS:
                return self._change_style(request)
            case Option.LIST_META_CONTEXT | Option.SET_META_CONTEXT:
                return self._meta_context(request)
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
        information = [ExportInfo(export.size, self._flags(export)).pack()]
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

    def _change_style(self, request: OptionRequest) -> list[Reply]:
        if request.data:
            words = f"{option_name(request.option)} takes no data"
            return [_refusal(request, OptionReply.ERR_INVALID, words)]
        style = self._machine.style
        if request.option == Option.STRUCTURED_REPLY and style == HeaderStyle.EXTENDED:
            words = "extended headers have been agreed on"
            return [_refusal(request, OptionReply.ERR_EXT_HEADER_REQD, words)]
        # The acknowledgement changes the style.
        return [Reply(request.option, OptionReply.ACK)]

    def _meta_context(self, request: OptionRequest) -> list[Reply]:
        """List or select metadata contexts (specification, "Metadata querying")."""
        selecting = request.option == Option.SET_META_CONTEXT
        if selecting and self._machine.style == HeaderStyle.SIMPLE:
            words = "metadata contexts take structured replies or extended headers"
            return [_refusal(request, OptionReply.ERR_INVALID, words)]
        asked = MetaContextRequest.parse(request.data)
        export = self._catalogue.find(asked.name)
        if export is None:
            words = f"there is no export {_short(asked.name)}"
            return [_refusal(request, OptionReply.ERR_UNKNOWN, words)]
        for query in asked.queries:
            if ":" not in query:
                words = f"the query {_short(query)} names no namespace"
                return [_refusal(request, OptionReply.ERR_INVALID, words)]
        found = {
            number: name
            for number, name in enumerate(export.storage.contexts, 1)
            if (not asked.queries and not selecting)
            or any(_matches(query, name, wildcards=not selecting) for query in asked.queries)
        }
        if selecting:
            self._contexts, self._contexts_of = found, export.name
        replies = [
            # The ids in a list mean nothing and are 0.
            Reply(
                request.option,
                OptionReply.META_CONTEXT,
                MetaContext(number if selecting else 0, name).pack(),
            )
            for number, name in found.items()
        ]
        return [*replies, Reply(request.option, OptionReply.ACK)]

    def _selected(self, export: Export) -> dict[int, str]:
        """Give the contexts that hold for an export: those selected for another do not."""
        return self._contexts if self._contexts_of == export.name else {}

    def _flags(self, export: Export) -> TransmissionFlag:
        return export.flags(self._machine.style, with_contexts=bool(self._selected(export)))


def _matches(query: str, context: str, *, wildcards: bool) -> bool:
    """Tell whether a query means a context; a namespace alone is a wildcard for lists only."""
    if query.endswith(":"):
        return wildcards and context.startswith(query)
    return query == context


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
