"""The server's side of the handshake: what it answers to each option.

`Negotiation` decides and does no I/O: bytes in, answers out, so it can be run against the
client's machine in memory. `nbdlink.server.handshake` does it over a socket.

It knows all three styles of headers, of which the client's last choice counts; a client that
asks for none gets simple replies. With TLS all that was said before is forgotten, and who the
client is counts: exports that it may not use are not listed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from nbdlink.errors import RemoteProtocolError
from nbdlink.protocol.claim import Claim, Testimony
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
from nbdlink.server.fencing import Admit, Refusal
from nbdlink.server.security import ServerSecurity

_log = logging.getLogger("nbdlink.server")


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
        security: whether there is TLS, and for whom; None for none.
        denial: why the client may not have what it asked for last, or None.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        is_closing: Callable[[], bool] = lambda: False,
        security: ServerSecurity | None = None,
        machine: Handshake | None = None,
        admit: Admit | None = None,
    ) -> None:
        """Begin a handshake.

        Args:
            catalogue: the exports to offer.
            is_closing: tells whether the server is about to stop; from then on every option
                that would lead to transmission is answered ERR_SHUTDOWN.
            security: whether there is TLS, and for whom; None for none.
            machine: where another negotiation has come to when TLS was about to begin, which
                forgets all else.
            admit: called when a client that claimed a channel of an export chooses that one,
                and may wait; None if claims are not listened to.
        """
        self._machine = machine or Handshake(Role.SERVER)
        self._catalogue = catalogue
        self._is_closing = is_closing
        self.security = security
        self._mode = security.mode if security else "off"
        self._has_tls = False
        self._peer: str | None = None
        self.export: Export | None = None
        self.denial: str | None = None
        # What was selected last: contexts by id, and the export that they were selected for.
        self._contexts: dict[int, str] = {}
        self._contexts_of = ""
        self._admit = admit
        # What was claimed last, and of which export.
        self._claim: Claim | None = None
        self._claim_of = ""

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
    def is_closing(self) -> bool:
        """Whether the server is about to stop."""
        return self._is_closing()

    @property
    def machine(self) -> Handshake:
        """Where the handshake stands."""
        return self._machine

    @property
    def wants_tls(self) -> bool:
        """Whether the TLS handshake is next."""
        return self._machine.state is State.STARTING_TLS

    def tls_started(self, peer: str | None) -> None:
        """Say that it is done: haggling begins anew.

        Args:
            peer: who the client is, if it has proved it.

        Raises:
            RemoteProtocolError: the client sent plain bytes behind its request for TLS.
        """
        self._machine.tls_started()
        self._has_tls, self._peer = True, peer
        self._contexts, self._contexts_of = {}, ""
        self._claim = None
        self.denial = None

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
        if self._mode == "require" and not self._has_tls:
            raise RemoteProtocolError("it asked for an export without TLS, which is demanded here")
        if not self._is_admitted():
            raise RemoteProtocolError(self._stranger())
        export = self._catalogue.find(name)
        if export is None:
            raise RemoteProtocolError(f"there is no export {_short(name)}")
        if denial := self._denial(export):
            raise RemoteProtocolError(denial[1])
        if refusal := self._refusal(export):
            raise RemoteProtocolError(refusal.words)
        export.storage.notice_growth()
        self.export = export
        return self._machine.send(ExportNameAnswer(export.size, self._flags(export)))

    def _replies(self, request: OptionRequest) -> list[Reply]:
        """Decide what to reply to any option but EXPORT_NAME."""
        if request.option == Option.ABORT:  # whatever data it carries
            return [Reply(request.option, OptionReply.ACK)]
        if request.option == Option.SET_META_CONTEXT:
            self._contexts = {}  # replaced even if this fails
        if self._mode == "require" and not self._has_tls and request.option != Option.STARTTLS:
            self.denial = "it came without TLS, which is demanded here"
            return [_refusal(request, OptionReply.ERR_TLS_REQD, "TLS is demanded here")]
        if request.oversized:
            words = f"{request.oversized} bytes of data; at most {MAX_OPTION_DATA} are read"
            return [_refusal(request, OptionReply.ERR_TOO_BIG, words)]
        if self._is_closing():
            return [_refusal(request, OptionReply.ERR_SHUTDOWN, "the server is shutting down")]
        if not self._is_admitted():
            self.denial = self._stranger()
            return [_refusal(request, OptionReply.ERR_POLICY, self._stranger())]
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
            case Option.STARTTLS if self._has_tls:
                return [_refusal(request, OptionReply.ERR_INVALID, "TLS has begun already")]
            case Option.STARTTLS if self._mode != "off" and self._machine.fixed:
                return [Reply(request.option, OptionReply.ACK)]
        words = f"{option_name(request.option)} is not supported"
        return [_refusal(request, OptionReply.ERR_UNSUP, words)]

    def _list(self, request: OptionRequest) -> list[Reply]:
        if request.data:
            return [_refusal(request, OptionReply.ERR_INVALID, "LIST takes no data")]
        exports = [export for export in self._catalogue if not self._denial(export)]
        if len(exports) >= MAX_OPTION_REPLIES:
            return [_refusal(request, OptionReply.ERR_TOO_BIG, "too many exports to list")]
        replies = [
            Reply(
                request.option,
                OptionReply.SERVER,
                ExportListing(export.name, export.description).pack(),
            )
            for export in exports
        ]
        return [*replies, Reply(request.option, OptionReply.ACK)]

    def _describe(self, request: OptionRequest) -> list[Reply]:
        asked = ExportRequest.parse(request.data)
        export = self._catalogue.find(asked.name)
        if export is None:
            words = f"there is no export {_short(asked.name)}"
            return [_refusal(request, OptionReply.ERR_UNKNOWN, words)]
        if denial := self._denial(export):
            self.denial = denial[1]
            return [_refusal(request, *denial)]
        if request.option == Option.GO and (refusal := self._refusal(export)):
            # Clients come again after the one, and not after the other.
            kind = OptionReply.ERR_SHUTDOWN if refusal.is_passing else OptionReply.ERR_POLICY
            return [_refusal(request, kind, refusal.words)]
        export.storage.notice_growth()
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
        if denial := self._denial(export):
            # ERR_TLS_REQD is for INFO and GO only ("SELECTIVETLS mode").
            return [_refusal(request, OptionReply.ERR_POLICY, denial[1])]
        for query in asked.queries:
            if ":" not in query:
                words = f"the query {_short(query)} names no namespace"
                return [_refusal(request, OptionReply.ERR_INVALID, words)]
        if not selecting and (testimony := self._testimony(export, asked.queries)):
            return [
                *(
                    Reply(request.option, OptionReply.META_CONTEXT, MetaContext(0, name).pack())
                    for name in testimony.contexts
                ),
                Reply(request.option, OptionReply.ACK),
            ]
        found = {
            number: name
            for number, name in enumerate(export.contexts, 1)
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

    # Channels.

    def _testimony(self, export: Export, queries: tuple[str, ...]) -> Testimony | None:
        """Hear a claim, and give what is said to it; None if it is none."""
        if self._admit is None or len(queries) != 1:
            return None
        try:
            self._claim = Claim.parse(queries[0])
        except ValueError:
            return None
        self._claim_of = export.name
        return Testimony(fences=True, signature=export.signature)

    def _refusal(self, export: Export) -> Refusal | None:
        """Say why a client that chooses an export cannot have the channel that it has claimed."""
        if self._claim is None or self._claim_of != export.name:
            return None
        assert self._admit is not None
        return self._admit(export.name, self._claim)

    # Who may do what.

    def _is_admitted(self) -> bool:
        return not self._has_tls or self.security is None or self.security.admits(self._peer)

    def _stranger(self) -> str:
        return f"{self._peer or 'a client without a certificate'} may not use this server"

    def _denial(self, export: Export) -> tuple[OptionReply, str] | None:
        """Say why the client may not use an export, or None if it may."""
        if export.is_secured and not self._has_tls:
            return OptionReply.ERR_TLS_REQD, f"the export {_short(export.name)} is for TLS only"
        if export.clients and self._peer not in export.clients:
            who = self._peer or "a client without a certificate"
            return OptionReply.ERR_POLICY, f"{who} may not use the export {_short(export.name)}"
        return None

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
