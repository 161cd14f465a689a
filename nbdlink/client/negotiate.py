"""The client's side of the handshake over a socket, step by step.

`Negotiation` is the conversation, for those who want to look around first. Who wants an export and
nothing else calls `negotiate` or `negotiate_best` of `nbdlink.client.opening`.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Self

from nbdlink.client.export import NegotiatedExport
from nbdlink.client.security import Security, refused
from nbdlink.errors import OptionError, RemoteProtocolError, TLSError, TransportError
from nbdlink.protocol.claim import NO_TESTIMONY, Claim, Testimony
from nbdlink.protocol.constants import (
    ClientFlag,
    Command,
    HandshakeFlag,
    HeaderStyle,
    InfoType,
    Option,
    OptionReply,
    option_name,
    reply_name,
)
from nbdlink.protocol.handshake import Handshake, Message, Role, State
from nbdlink.protocol.messages import (
    BlockSizeInfo,
    ClientFlags,
    DescriptionInfo,
    ExportInfo,
    ExportListing,
    ExportNameAnswer,
    ExportRequest,
    Greeting,
    Info,
    MetaContext,
    MetaContextRequest,
    NameInfo,
    OptionRequest,
    Reply,
    pack_export_name,
    parse_info,
    printable,
)
from nbdlink.protocol.transmission import RequestHeader
from nbdlink.transport import stream
from nbdlink.transport.stream import Deadline, Wire
from nbdlink.uri import Target

if TYPE_CHECKING:
    from nbdlink.transport.tls import TLSSession

DEFAULT_TIMEOUT = 15.0
"""Seconds from the first connect to the end of the handshake."""

_GOODBYE_TIMEOUT = 1.0
"""Seconds for the server to acknowledge that we leave; nothing is lost if it does not."""

_ASKED = (InfoType.EXPORT, InfoType.NAME, InfoType.DESCRIPTION, InfoType.BLOCK_SIZE)

_REFUSALS: dict[int, tuple[str, str | None]] = {
    OptionReply.ERR_POLICY: (
        "the server's policy forbids it",
        "whoever runs the server has to let you in; its log tells why it did not",
    ),
    OptionReply.ERR_TLS_REQD: ("the server demands TLS", "say nbds:// or --tls require"),
    OptionReply.ERR_SHUTDOWN: ("the server is shutting down", "try again when it is back"),
    OptionReply.ERR_UNSUP: ("the server does not know that option", None),
}


class Negotiation:
    """A connection in its handshake. Leaving the `with` block ends it, unless `go` took it over.

    Attributes:
        target: where the connection leads.
        security: what is demanded of TLS.
        fixed: whether the server speaks fixed newstyle, so that options can be asked.
        tls: what the TLS handshake came to, or None without TLS.
    """

    def __init__(
        self,
        target: Target,
        *,
        timeout: float | None = DEFAULT_TIMEOUT,
        security: Security | None = None,
        sock: socket.socket | None = None,
    ) -> None:
        """Connect to `target`, exchange the flags and begin TLS, if that is wanted.

        Args:
            target: the server; its export name is only the default of the methods below.
            timeout: seconds for the whole handshake, or None for ever.
            security: what is demanded of TLS; None for what the target says.
            sock: a connection to it, which is taken over; None to make one.

        Raises:
            TransportError: no connection, or none in time.
            RemoteProtocolError: no NBD server, or not one that follows the protocol.
            TLSError: TLS is demanded, and there is none, or not with this server.
            ConfigError: the credentials cannot be loaded.
        """
        security = security or Security(target)
        if security.policy != "off":
            security.context  # noqa: B018  # before a server is troubled
        self.target = target
        self.security = security
        self._taken = False
        self._suspects = False
        self.tls: TLSSession | None = None
        self._selected: tuple[str, dict[str, int]] = ("", {})
        self._deadline = Deadline(timeout)
        self._machine = Handshake(Role.CLIENT)
        self._socket: Wire = sock or stream.connect(target, self._deadline)
        try:
            greeting = self._receive()
            assert isinstance(greeting, Greeting)
            self.fixed = bool(greeting.flags & HandshakeFlag.FIXED_NEWSTYLE)
            self._send(ClientFlags(ClientFlag(int(greeting.flags) & int(_CLIENT_FLAGS))))
            if security.policy != "off":
                self._start_tls(security)
        except BaseException:
            self._socket.close()
            raise

    @classmethod
    def best(
        cls,
        target: Target,
        *,
        timeout: float | None = DEFAULT_TIMEOUT,
        style: HeaderStyle = HeaderStyle.EXTENDED,
        security: Security | None = None,
    ) -> Self:
        """Connect and agree on the richest headers, up to `style`, that the server knows.

        Some servers hang up on options that they do not know; they are asked for nothing on a
        second connection.

        Raises:
            TransportError, RemoteProtocolError, TLSError, ConfigError: as the constructor.
        """
        deadline = Deadline(timeout)
        security = security or Security(target)
        negotiation = cls(target, timeout=timeout, security=security)
        try:
            negotiation.request_best(style)
        except (TransportError, RemoteProtocolError):
            negotiation.close()
            with contextlib.suppress(TimeoutError):
                return cls(target, timeout=deadline.left(), security=security)
            raise
        except BaseException:
            negotiation.close()
            raise
        return negotiation

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the session as the protocol wants it: ABORT, if an option may be sent now."""
        if self._taken or self._socket.fileno() < 0:
            return
        self._deadline = Deadline(_GOODBYE_TIMEOUT)
        with contextlib.suppress(TransportError, RemoteProtocolError, TLSError):
            if self._machine.state is State.HAGGLING and self.fixed:
                # Some servers hang up instead of acknowledging; either is fine.
                self._send(OptionRequest(Option.ABORT))
                self._receive()
            elif self._machine.state is State.TRANSMISSION:
                self._write(RequestHeader(Command.DISC, 0).pack(self._machine.style))
        self._machine.close()
        self._socket.close()

    def list_exports(self) -> list[ExportListing]:
        """Ask which exports there are.

        Raises:
            OptionError: the server does not tell.
        """
        replies = self._ask(OptionRequest(Option.LIST))
        with self._naming_the_server():
            return [
                ExportListing.parse(reply.data)
                for reply in replies
                if reply.reply == OptionReply.SERVER
            ]

    @property
    def style(self) -> HeaderStyle:
        """Which headers have been agreed on so far."""
        return self._machine.style

    def request_extended_headers(self) -> bool:
        """Agree on extended headers, if the server knows them; never for the kernel."""
        return self._agree(Option.EXTENDED_HEADERS)

    def request_structured_replies(self) -> bool:
        """Agree on structured replies, if the server knows them; never for the kernel."""
        return self._agree(Option.STRUCTURED_REPLY)

    def request_best(self, style: HeaderStyle = HeaderStyle.EXTENDED) -> HeaderStyle:
        """Agree on the richest headers, up to `style`, that the server knows; give them."""
        if style == HeaderStyle.EXTENDED and self.request_extended_headers():
            return style
        if style >= HeaderStyle.STRUCTURED:
            self.request_structured_replies()
        return self.style

    def list_meta_contexts(self, name: str | None = None, queries: Sequence[str] = ()) -> list[str]:
        """Ask which metadata contexts an export has.

        Args:
            name: the export, or None for the target's.
            queries: names or wildcards (`base:`); none of them asks for all there are.

        Returns:
            Their names; none where the server does not tell, as without structured replies.
        """
        request = MetaContextRequest(self._name(name), tuple(queries))
        try:
            found = self._contexts(Option.LIST_META_CONTEXT, request)
        except OptionError:
            return []
        return [context.name for context in found]

    def set_meta_contexts(self, queries: Sequence[str], name: str | None = None) -> dict[str, int]:
        """Select metadata contexts, in place of those selected before.

        They hold if `go` chooses the same export afterwards.

        Args:
            queries: the contexts' names.
            name: the export, or None for the target's.

        Returns:
            The name and the id of each context that the server has.

        Raises:
            LocalProtocolError: neither structured replies nor extended headers were agreed on.
            RemoteProtocolError: the server gave two of them the same id.
        """
        name = self._name(name)
        self._selected = (name, {})
        try:
            found = self._contexts(
                Option.SET_META_CONTEXT, MetaContextRequest(name, tuple(queries))
            )
        except OptionError:
            return {}
        selected = {context.name: context.id for context in found}
        if len({*selected.values()}) < len(found):
            raise self._named(RemoteProtocolError("the server selected a metadata context twice"))
        self._selected = (name, selected)
        return dict(selected)

    def claim(self, claim: Claim) -> Testimony:
        """Say which channel of a device this connection is, before the target is chosen.

        Returns:
            What the server says to that; nothing where it does not understand.

        Raises:
            OptionError: the server is shutting down.
        """
        request = MetaContextRequest(self.target.export, (claim.query,))
        try:
            found = self._contexts(Option.LIST_META_CONTEXT, request)
        except OptionError as error:
            if error.reply == OptionReply.ERR_SHUTDOWN:
                raise
            return NO_TESTIMONY
        return Testimony.parse(context.name for context in found)

    def info(self, name: str | None = None) -> NegotiatedExport:
        """Ask about an export without choosing it.

        Raises:
            OptionError: there is no such export, or the server does not know the option
                (`reply` is ERR_UNSUP then, and `go` still works).
        """
        return self._info_or_go(Option.INFO, self._name(name))

    def go(self, name: str | None = None) -> NegotiatedExport:
        """Choose an export, by EXPORT_NAME where the server does not know GO.

        Raises:
            OptionError: the server refuses, and says why.
            RemoteProtocolError: the server hung up, which is how older ones refuse.
        """
        name = self._name(name)
        if self.fixed:
            try:
                return self._agreed(self._info_or_go(Option.GO, name))
            except OptionError as error:
                # Extended headers come with GO only ("Option types", NBD_OPT_EXTENDED_HEADERS).
                if error.reply != OptionReply.ERR_UNSUP or self.style == HeaderStyle.EXTENDED:
                    raise
        self._send(OptionRequest(Option.EXPORT_NAME, pack_export_name(name)))
        answer = self._receive()
        assert isinstance(answer, ExportNameAnswer)
        return self._agreed(NegotiatedExport(name, answer.size, answer.flags))

    def detach_socket(self) -> Wire:
        """Take the socket over once `go` has begun transmission; it is blocking again.

        With TLS it is a stream that still receives record by record.

        Raises:
            RemoteProtocolError: the server sent something nobody asked for. It would be taken
                for the reply to the first request.
        """
        assert self._machine.state is State.TRANSMISSION
        if self._machine.trailing_data:
            raise self._named(RemoteProtocolError("the server sent bytes that nobody asked for"))
        self._taken = True
        self._socket.settimeout(None)
        return self._socket

    # The conversation.

    def _start_tls(self, security: Security) -> None:
        """Agree on TLS and begin it; without it, go on only if the policy allows that."""
        allowed = security.policy == "allow"
        if not self.fixed:
            if allowed:
                return
            raise refused(self.target.address, "its negotiation is too old")
        try:
            self._ask(OptionRequest(Option.STARTTLS))
        except OptionError as error:
            if allowed and error.reply in (OptionReply.ERR_UNSUP, OptionReply.ERR_POLICY):
                return
            raise refused(self.target.address, error.reason or reply_name(error.reply)) from None
        with self._naming_the_server():
            if self._machine.trailing_data:
                self._machine.tls_started()  # which says what is wrong with that
            assert isinstance(self._socket, socket.socket)
            secured = security.begin(self._socket, self._deadline)
            self._socket, self.tls = secured, secured.session
            self._machine.tls_started()
            self._suspects = True

    def _name(self, name: str | None) -> str:
        return self.target.export if name is None else name

    def _agree(self, option: Option) -> bool:
        try:
            self._ask(OptionRequest(option))
        except OptionError:
            return False
        return True

    def _contexts(self, option: Option, request: MetaContextRequest) -> list[MetaContext]:
        replies = self._ask(OptionRequest(option, request.pack()))
        with self._naming_the_server():
            return [
                MetaContext.parse(reply.data)
                for reply in replies
                if reply.reply == OptionReply.META_CONTEXT
            ]

    def _agreed(self, export: NegotiatedExport) -> NegotiatedExport:
        """Add what was agreed on before the export was chosen."""
        name, contexts = self._selected
        return replace(export, style=self.style, contexts=contexts if name == export.name else {})

    def _info_or_go(self, option: Option, name: str) -> NegotiatedExport:
        request = ExportRequest(name, tuple(_ASKED))
        replies = self._ask(OptionRequest(option, request.pack()), name)
        with self._naming_the_server():
            infos = [parse_info(r.data) for r in replies if r.reply == OptionReply.INFO]
        return self._collect(name, infos)

    def _collect(self, name: str, infos: list[Info]) -> NegotiatedExport:
        export: ExportInfo | None = None
        block_size = canonical = None
        description = ""
        for info in infos:
            match info:
                case ExportInfo():
                    export = info
                case BlockSizeInfo():
                    block_size = info
                case NameInfo(text):
                    canonical = text
                case DescriptionInfo(text):
                    description = text
        if export is None:
            raise self._named(RemoteProtocolError("the server does not tell the export's size"))
        return NegotiatedExport(name, export.size, export.flags, block_size, canonical, description)

    def _ask(self, request: OptionRequest, name: str | None = None) -> list[Reply]:
        """Send an option and give the replies before the acknowledgement."""
        if not self.fixed:
            raise self._named(
                OptionError(
                    "the server's old newstyle negotiation has no options",
                    option=request.option,
                    reply=OptionReply.ERR_UNSUP,
                )
            )
        self._send(request)
        replies: list[Reply] = []
        while True:
            reply = self._receive()
            assert isinstance(reply, Reply)
            if reply.is_error:
                raise self._named(self._refused(reply, name))
            if reply.is_final:
                return replies
            if reply.reply in _KNOWN_REPLIES:
                replies.append(reply)

    def _refused(self, reply: Reply, name: str | None) -> OptionError:
        said = printable(reply.data)[:400]
        if reply.reply == OptionReply.ERR_UNKNOWN and name is not None:
            which = f"the export {name!r}" if name else "a default export"
            message, hint = f"the server does not offer {which}", self._offered()
        else:
            otherwise = f"the server refused {option_name(reply.option)}: {reply_name(reply.reply)}"
            message, hint = _REFUSALS.get(reply.reply, (otherwise, None))
        if said:
            message += f" (it says: {said})"
        return OptionError(message, option=reply.option, reply=reply.reply, reason=said, hint=hint)

    def _offered(self) -> str | None:
        """Say what the server offers instead, if it tells."""
        with contextlib.suppress(OptionError, RemoteProtocolError, TransportError):
            names = [listing.name for listing in self.list_exports()]
            if names:
                more = f" and {len(names) - 8} more" if len(names) > 8 else ""
                return "it offers " + ", ".join(map(repr, names[:8])) + more
            return "it offers no export at all"
        return None

    def _named(self, error: OptionError | RemoteProtocolError) -> OptionError | RemoteProtocolError:
        error.args = (f"{self.target.address}: {error}",)
        return error

    def _send(self, message: Message) -> None:
        self._write(self._machine.send(message))

    def _write(self, data: bytes) -> None:
        with self._naming_the_server():
            try:
                stream.send(self._socket, data, self._deadline)
            except TransportError:
                self._hear_why()
                raise

    def _hear_why(self) -> None:
        """Look for an alert once nothing can be sent any more.

        In TLS 1.3 a server judges our certificate when we are through with the handshake, and
        closes the connection, perhaps before we have sent the first option.

        Raises:
            TLSError: that is why.
        """
        if self.tls is not None:
            with contextlib.suppress(TransportError):
                stream.receive(self._socket, Deadline(_GOODBYE_TIMEOUT))

    def _receive(self) -> Message:
        with self._naming_the_server():
            while (message := self._machine.next_message()) is None:
                self._machine.receive_data(stream.receive(self._socket, self._deadline))
            self._suspects = False
            return message

    @contextlib.contextmanager
    def _naming_the_server(self) -> Iterator[None]:
        try:
            yield
        except (TransportError, RemoteProtocolError, TLSError) as error:
            error.args = (f"{self.target.address}: {error}",)
            is_late = isinstance(error.__context__, TimeoutError)
            if self._suspects and not error.hint and not is_late:
                error.hint = self.security.suspicion()
            if is_late and not error.hint:
                error.hint = stream.ASK_DOCTOR.format(self.target)
            raise


_KNOWN_REPLIES = frozenset(OptionReply)
_CLIENT_FLAGS = ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES
