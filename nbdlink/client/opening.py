"""From a target to a socket on which requests can be sent: the whole handshake in one call.

`negotiate` is for a socket that will go to the kernel: it never asks for structured replies or
extended headers, which the kernel's driver does not understand (`drivers/block/nbd.c` knows the
simple reply magic only). `negotiate_best` asks for all that this client understands.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from dataclasses import replace

from nbdlink.client.export import NegotiatedExport
from nbdlink.client.negotiate import DEFAULT_TIMEOUT, Negotiation
from nbdlink.client.security import Security
from nbdlink.errors import RemoteProtocolError, TransportError
from nbdlink.protocol.claim import NO_TESTIMONY, Claim
from nbdlink.protocol.constants import ALLOCATION_CONTEXT, HeaderStyle
from nbdlink.transport.stream import Deadline, Wire
from nbdlink.uri import Target


def negotiate(
    target: Target,
    *,
    timeout: float | None = DEFAULT_TIMEOUT,
    security: Security | None = None,
    claim: Claim | None = None,
    claim_needed: bool = False,
) -> tuple[Wire, NegotiatedExport]:
    """Connect to `target`'s export with simple replies, ready for the first request.

    Args:
        target: server and export.
        timeout: seconds for connection and handshake together, or None for ever.
        security: what is demanded of TLS; None for what the target says.
        claim: which channel of a device the connection will be, for servers that understand.
        claim_needed: whether the server is known to understand. If not, and it hangs up on the
            claim, there is a second connection without one.

    Returns:
        The connected, blocking socket, which the caller owns, and what the server said. With
        TLS it is a stream that still receives record by record: hand it over, or release it.

    Raises:
        TransportError, RemoteProtocolError, OptionError, TLSError, ConfigError: see
            `Negotiation`.
    """
    deadline = Deadline(timeout)
    with Negotiation(target, timeout=timeout, security=security) as negotiation:
        testimony = NO_TESTIMONY
        failure: TransportError | RemoteProtocolError | None = None
        if claim is not None and negotiation.fixed:
            try:
                testimony = negotiation.claim(claim)
            except (TransportError, RemoteProtocolError) as error:
                if claim_needed:
                    raise
                failure = error
        if failure is None:
            export = negotiation.go()
            return negotiation.detach_socket(), replace(export, testimony=testimony)
    # As in `Negotiation.best`: it may be that it hangs up on options that it does not know.
    with contextlib.suppress(TimeoutError):
        return negotiate(target, timeout=deadline.left(), security=security)
    raise failure


def negotiate_best(
    target: Target,
    *,
    timeout: float | None = DEFAULT_TIMEOUT,
    contexts: Sequence[str] = (ALLOCATION_CONTEXT,),
    style: HeaderStyle = HeaderStyle.EXTENDED,
    security: Security | None = None,
    claim: Claim | None = None,
) -> tuple[Wire, NegotiatedExport]:
    """Connect to `target`'s export with all that server and client both understand.

    Args:
        target: server and export.
        timeout: seconds for connection and handshake together, or None for ever.
        contexts: the metadata contexts to select, if the export has them.
        style: the richest headers to ask for.
        security: what is demanded of TLS; None for what the target says.
        claim: which channel of what the connection will be, for servers that understand.

    Returns:
        The connected, blocking socket, which the caller owns, and what the server said.

    Raises:
        TransportError, RemoteProtocolError, OptionError, TLSError, ConfigError: see
            `Negotiation`.
    """
    deadline = Deadline(timeout)
    security = security or Security(target)
    with Negotiation.best(target, timeout=timeout, style=style, security=security) as negotiation:
        try:
            if negotiation.style != HeaderStyle.SIMPLE and contexts:
                negotiation.set_meta_contexts(contexts)
            testimony = NO_TESTIMONY
            if claim is not None and negotiation.style != HeaderStyle.SIMPLE:
                testimony = negotiation.claim(claim)
        except (TransportError, RemoteProtocolError) as error:
            failure = error
        else:
            export = negotiation.go()
            wire = _released(negotiation.detach_socket())
            return wire, replace(export, testimony=testimony)
    # As in `Negotiation.best`. If it was something else, the second attempt will say so.
    with contextlib.suppress(TimeoutError):
        wire, export = negotiate(target, timeout=deadline.left(), security=security)
        return _released(wire), export
    raise failure


def _released(wire: Wire) -> Wire:
    if not isinstance(wire, socket.socket):
        wire.release()
    return wire
