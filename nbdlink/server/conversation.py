"""What a client and the service have to do with each other, from its first byte to its last.

Each client has a thread of its own, in which nothing that goes wrong can reach another one:
the handshake, with TLS if there is any, and then the transmission, here or in another process.
However that ends, it is told in the log in one line.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import socket
from collections.abc import Callable

from nbdlink.errors import NBDError, RemoteProtocolError, TLSError, TransportError
from nbdlink.protocol.claim import Claim
from nbdlink.protocol.handshake import Handshake
from nbdlink.server import handshake, negotiate
from nbdlink.server.engine import DISCONNECTED
from nbdlink.server.export import Catalogue
from nbdlink.server.fencing import Fences, Refusal
from nbdlink.server.notices import Notices
from nbdlink.server.processes import Processes
from nbdlink.server.security import ServerSecurity
from nbdlink.server.sessions import Phase, Session, Sessions
from nbdlink.transport import stream
from nbdlink.transport.stream import Deadline

_log = logging.getLogger("nbdlink.server")


class Conversations:
    """What all conversations of a service have in common.

    Attributes:
        fences: which connection has which channel.
        any_served: whether a client that came to transmission has left again.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        sessions: Sessions,
        processes: Processes,
        *,
        security: ServerSecurity | None,
        notices: Notices | None,
        negotiation_timeout: float,
        is_closing: Callable[[], bool],
        on_chosen: Callable[[], None],
        on_left: Callable[[], None],
    ) -> None:
        """Prepare for clients.

        Args:
            catalogue: what is served.
            sessions: the book of who is here, which a session leaves at its end.
            processes: where transmission may take place.
            security: whether there is TLS, and for whom; None for none.
            notices: who is to be told of a restart; None for nobody.
            negotiation_timeout: seconds that a client has for its handshake.
            is_closing: tells whether the service is about to stop.
            on_chosen: called when a client has chosen an export, and so uses no other one; it
                must not wait for anything.
            on_left: called when a client has left, and its socket is closed.
        """
        self.fences = Fences()
        self.any_served = False
        self._catalogue = catalogue
        self._sessions = sessions
        self._processes = processes
        self._security = security
        self._notices = notices
        self._negotiation_timeout = negotiation_timeout
        self._is_closing = is_closing
        self._on_chosen = on_chosen
        self._on_left = on_left

    def hold(self, session: Session) -> None:
        """Serve a client until it leaves, whatever it does; close its socket."""
        try:
            self._converse(session)
        except RemoteProtocolError as error:
            _log.warning("%s: hung up on: %s", session.peer, error)
            if session.phase is Phase.TRANSMISSION:
                session.take_leave()  # there may be an answer under way that tells why
        except TransportError as error:
            where = "" if session.phase is Phase.TRANSMISSION else " in the handshake"
            _log.info("%s: lost%s: %s", session.peer, where, error)
        except TLSError as error:
            did = "hung up" if session.phase is Phase.TRANSMISSION else "refused"
            _log.warning("%s: %s: %s", session.peer, did, error)
            if session.is_bare:
                # A client's first option may come already. Were it left unread, a reset would
                # overtake the alert, and the client never learn what is wrong.
                session.take_leave()
        except NBDError as error:
            _log.error("%s: hung up: %s", session.peer, error)
        except OSError as error:
            _log.debug("%s: lost: %s", session.peer, error.strerror or error)
        except Exception as error:
            # A bug, here or in a storage, costs this client its connection and nobody else's.
            _log.error(
                "%s: hung up: unexpected %s: %s",
                session.peer,
                type(error).__name__,
                error,
                exc_info=_log.isEnabledFor(logging.DEBUG),
            )
        finally:
            if session.phase is Phase.TRANSMISSION:
                self.any_served = True
            self._processes.forget(session)
            self._sessions.remove(session)
            if not session.is_bare:
                with contextlib.suppress(OSError):  # the kernel does not announce the end
                    session.sock.shutdown(socket.SHUT_WR)
            session.sock.close()
            self._on_left()

    def _converse(self, session: Session) -> None:
        how = None
        try:
            how = self._negotiate_and_serve(session)
        except (RemoteProtocolError, TLSError):
            session.refused = session.phase is Phase.HANDSHAKE
            raise
        finally:
            # Nothing of it can reach the storage any more.
            self.fences.release(session)
            if self._notices:
                self._notices.left(session, properly=how == DISCONNECTED)
        if not how:
            _log.debug("%s: left without choosing an export", session.peer)
            return
        _log.info("%s: %s after %d requests", session.peer, how, session.progress[0])
        if session.ending:
            session.take_leave()

    def _negotiate_and_serve(self, session: Session) -> str | None:
        """Give the words for how the client left; none if it chose no export."""
        assert isinstance(session.sock, socket.socket)
        stream.tune(session.sock)
        deadline = Deadline(self._negotiation_timeout)
        how: str | None = None

        def admit(export: str, claim: Claim) -> Refusal | None:
            left = 0.0
            with contextlib.suppress(TimeoutError):
                left = deadline.left() or 0.0
            refusal = self.fences.admit(session, export, claim, left)
            session.is_supervised = claim.notice is not None
            if self._notices and refusal is None:
                self._notices.arrived(session, claim)
            return refusal

        negotiation = negotiate.Negotiation(
            self._catalogue, self._is_closing, self._security, admit=admit
        )

        def move(machine: Handshake) -> bool:
            nonlocal how
            try:
                left = deadline.left()
            except TimeoutError:
                return False  # which is found out and told there
            begun = functools.partial(self._begin_transmission, session)
            how = self._processes.secure(session, machine, left, begun, admit)
            return how is not None

        negotiated = handshake.negotiate(session, negotiation, deadline, move)
        if negotiated is not None:
            self._begin_transmission(session, negotiated.export.name)
            how = self._processes.serve(session, negotiated)
        return how

    def _begin_transmission(self, session: Session, export: str) -> None:
        self._sessions.begin_transmission(session, export)
        _log.info("%s: connected to export %r", session.peer, export)
        self._on_chosen()
