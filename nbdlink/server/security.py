"""The server's TLS: whether it is offered or demanded, and whom it lets in.

The specification's three modes ("Server-side requirements"): "off" is NOTLS, "require" is
FORCEDTLS, and "allow" is SELECTIVETLS, where single exports may be for TLS only.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection
from typing import TYPE_CHECKING, NamedTuple

from nbdlink.errors import ConfigError
from nbdlink.transport.tlsfiles import CredentialFiles, Policy

if TYPE_CHECKING:
    import socket

    from nbdlink.transport.tls import TLSStream
    from nbdlink.transport.tlscontext import TLSContext


class Rule(NamedTuple):
    """What becomes of clients of some name.

    Attributes:
        match: the name; if `is_glob`, with * for anything and ? for one character.
        allow: whether they may come.
        is_glob: see `match`.
    """

    match: str
    allow: bool
    is_glob: bool = False

    def fits(self, peer: str) -> bool:
        """Tell whether the rule is about a client."""
        if not self.is_glob:
            return peer == self.match
        return fnmatch.fnmatchcase(peer, self.match.replace("[", "[[]"))


class RuleList(NamedTuple):
    """Rules about who may come, of which the first that fits counts: QEMU's authz-list.

    Attributes:
        rules: the rules.
        otherwise: whether those may come that no rule is about.
    """

    rules: tuple[Rule, ...]
    otherwise: bool = False

    def admits(self, peer: str) -> bool:
        """Tell whether a client may come."""
        return next((rule.allow for rule in self.rules if rule.fits(peer)), self.otherwise)


class ServerSecurity:
    """What the server's connections need of TLS.

    Attributes:
        mode: "off", "allow" or "require".
        allowed: who may use the server: subjects of certificates, or users of pre-shared keys,
            or rules about these; empty for everybody who has come so far.
        knows_peers: whether clients have to prove who they are.
    """

    def __init__(
        self,
        mode: Policy,
        files: CredentialFiles,
        *,
        verify_peer: bool = False,
        allowed: Collection[str | RuleList] = (),
    ) -> None:
        """Load the credentials, unless TLS is off.

        Args:
            mode: whether TLS is offered or demanded.
            files: credentials.
            verify_peer: whether clients must show a certificate that is trusted. Without that
                nobody would know who they are, so who is `allowed` cannot be told.
            allowed: who may use the server.

        Raises:
            ConfigError: what was said makes no sense together.
            TLSError: the credentials are of no use.
        """
        self.mode: Policy = mode
        self.allowed = frozenset(allowed)
        self._files = files
        self._verify_peer = verify_peer
        if mode == "allow" and self.allowed:
            raise ConfigError(
                "--tls-authz says who may come, and --tls allow lets anybody in without TLS",
                hint="say --tls require, or keep single exports for some with --client",
            )
        self._context: TLSContext | None = None
        self.knows_peers = False
        if mode != "off":
            self.reload()
            # A daemon changes its directory, and may be told to load them anew there.
            self._files = self._files.absolute()

    def reload(self) -> None:
        """Load the credentials anew, for clients that come from now on.

        Raises:
            ConfigError, TLSError: they cannot be used; those of before stay.
        """
        from nbdlink.transport.credentials import PSKCredentials, load_server
        from nbdlink.transport.ktls import missing
        from nbdlink.transport.tlscontext import LASTING_SUITE, TLSContext

        credentials = load_server(self._files)
        knows_peers = self._verify_peer or isinstance(credentials, PSKCredentials)
        if self.allowed and not knows_peers:
            raise ConfigError(
                "--tls-authz takes clients that have to show a certificate",
                hint="add --tls-verify-peer",
            )
        if (
            self._verify_peer
            and not isinstance(credentials, PSKCredentials)
            and credentials.authorities is None
        ):
            # The system's authorities would let in whoever has any certificate at all.
            raise ConfigError(
                "--tls-verify-peer takes the authority that signed the clients' certificates",
                hint="put ca-cert.pem into the directory, or say --tls-ca FILE",
            )
        self._context = TLSContext(
            credentials,
            server=True,
            verify_peer=self._verify_peer,
            lasting=missing(LASTING_SUITE) is None,
        )
        self.knows_peers = knows_peers

    @property
    def has_keys(self) -> bool:
        """Whether clients come with pre-shared keys."""
        return self._context is not None and self._context.has_keys

    def stream(self, sock: socket.socket) -> TLSStream:
        """Put TLS on a client's socket; `TLSStream.handshake` is next."""
        assert self._context is not None
        return self._context.stream(sock)

    def admits(self, peer: str | None) -> bool:
        """Tell whether a client may use the server at all."""
        if not self.allowed:
            return True
        return peer is not None and any(
            each.admits(peer) if isinstance(each, RuleList) else peer == each
            for each in self.allowed
        )
