"""The server's side of the handshake over a socket, until a client is ready for transmission.

What is answered is decided by `nbdlink.server.negotiate`. Here are the deadline, the beginning of
TLS, and its hand-over to the kernel.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from typing import Final

from nbdlink.errors import NBDError, TLSError, TransportError
from nbdlink.protocol.handshake import Handshake
from nbdlink.server.negotiate import NegotiatedSession, Negotiation
from nbdlink.server.sessions import Session
from nbdlink.transport import stream
from nbdlink.transport.stream import Deadline

_log = logging.getLogger("nbdlink.server")

DEFAULT_TIMEOUT: Final = 10.0
"""Seconds that a client has for the whole handshake."""


def negotiate(
    session: Session,
    negotiation: Negotiation,
    deadline: Deadline,
    move: Callable[[Handshake], bool] = lambda _: False,
) -> NegotiatedSession | None:
    """Do the handshake with a client; None if it left without choosing an export.

    The session's socket, which may be one with TLS now, is left blocking, without a timeout.

    Args:
        session: the client's.
        negotiation: what decides; just begun, or with TLS about to begin.
        deadline: when the client must have chosen.
        move: called when TLS is about to begin; if it gives True, somebody else has gone on
            from there with the client, and it is None that is returned.

    Raises:
        TransportError: the deadline passed, or the connection broke.
        RemoteProtocolError: the client broke the protocol.
        TLSError: the client and we do not come to terms.
    """
    if not negotiation.wants_tls:
        stream.send(session.sock, negotiation.greeting(), deadline)
    is_fresh = False  # whether TLS has just begun
    while (negotiated := negotiation.session()) is None and not negotiation.ended:
        try:
            if negotiation.wants_tls:
                if move(negotiation.machine):
                    return None
                is_fresh = True
                _begin_tls(session, negotiation, deadline)
            data = stream.receive(session.sock, deadline)
        except TransportError as error:
            if is_fresh and not negotiation.is_closing:
                raise _broken_off(session, error, negotiation) from None
            raise
        is_fresh = False
        if not data:
            break
        for answer in negotiation.answers(data):
            stream.send(session.sock, answer, deadline)
    if negotiated is None:
        if negotiation.denial:
            _log.warning("%s: refused: %s", session.peer, negotiation.denial)
        return None
    session.sock.settimeout(None)
    _hand_over(session)
    return negotiated


def _begin_tls(session: Session, negotiation: Negotiation, deadline: Deadline) -> None:
    sock = session.sock
    assert isinstance(sock, socket.socket)
    assert negotiation.security is not None
    secured = negotiation.security.stream(sock)
    session.adopt(secured)
    try:
        agreed = secured.handshake(deadline)
    except TLSError:
        session.adopt(secured.detach_socket())  # with what tells why still under way
        raise
    negotiation.tls_started(agreed.peer)
    _log.info(
        "%s: %s with %s, %s", session.peer, agreed.version, agreed.cipher, agreed.peer or "no name"
    )


def _broken_off(session: Session, error: TransportError, negotiation: Negotiation) -> NBDError:
    """Say what it may be if a client breaks TLS off at its beginning.

    Programs with GnuTLS close the connection without an alert, in the handshake or behind it.
    """
    if session.ending or isinstance(error.__context__, TimeoutError):
        return error
    security = negotiation.security
    what = "does not believe our certificate"
    if security is not None and security.has_keys:
        what = "has another key than we have"
    return TLSError(f"it broke TLS off; perhaps it {what} ({error})")


def _hand_over(session: Session) -> None:
    """Let the kernel go on with TLS if it can.

    It cannot follow a client that changes its keys, as those with GnuTLS do after 2^24 records
    of any cipher but one; so only that one is handed over.
    """
    sock = session.sock
    if isinstance(sock, socket.socket):
        return
    from nbdlink.transport import ktls  # for TLS only: a plain server never loads OpenSSL
    from nbdlink.transport.tlscontext import LASTING_SUITE

    assert sock.session is not None
    if sock.session.cipher != LASTING_SUITE:
        why: str | None = f"the client may change the keys of {sock.session.cipher}"
    else:
        why = ktls.obstacle(sock)
    if why:
        _log.debug("%s: TLS stays in this process: %s", session.peer, why)
        sock.release()
    else:
        session.adopt(ktls.hand_over(sock))
