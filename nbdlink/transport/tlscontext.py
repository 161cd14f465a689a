"""Credentials made ready for OpenSSL, and the judgement of a peer's.

TLS 1.3 is preferred and 1.2 accepted. There is no renegotiation, no resumption, no early data,
no compression.

pyOpenSSL has no public call for pre-shared keys; its own binding has, and is used here, in
`_use_keys`, and nowhere else for that purpose.
"""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from cryptography import x509
from OpenSSL import SSL, crypto

from nbdlink.errors import TLSError
from nbdlink.transport import bindings, verification
from nbdlink.transport.credentials import Credentials, PSKCredentials, X509Credentials
from nbdlink.transport.tlsfiles import printable

if TYPE_CHECKING:
    from nbdlink.transport.tls import TLSStream

_lib: Any = SSL._lib  # type: ignore[attr-defined]
_ffi: Any = SSL._ffi  # type: ignore[attr-defined]

# AES with 128 bits first: nobody breaks it either, and it takes a fifth less time.
_SUITES: Final = b"TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256"
_CIPHERS: Final = b"ECDHE+AESGCM:ECDHE+CHACHA20:DHE+AESGCM:DHE+CHACHA20:!aNULL:!eNULL:!PSK"
# OpenSSL takes keys from callbacks for SHA-256 only (SSL_CTX_set_psk_client_callback(3)).
_PSK_SUITES: Final = b"TLS_AES_128_GCM_SHA256:TLS_CHACHA20_POLY1305_SHA256"
# TLS 1.2, with forward secrecy only: who gets the file later cannot read what was recorded.
_PSK_CIPHERS: Final = (
    b"ECDHE-PSK-CHACHA20-POLY1305:DHE-PSK-AES128-GCM-SHA256:DHE-PSK-AES256-GCM-SHA384:"
    b"DHE-PSK-CHACHA20-POLY1305"
)

LASTING_SUITE: Final = "TLS_CHACHA20_POLY1305_SHA256"

_SECRETS: Final = (b"CLIENT_TRAFFIC_SECRET_0", b"SERVER_TRAFFIC_SECRET_0")


@dataclass(slots=True)
class Judgement:
    """What the callbacks of one connection need and find.

    Attributes:
        host: the name that the peer's certificate must have, or None for any.
        role: the peer's: "server" or "client".
        revocations: the lists of revoked certificates, to name one that has expired.
        failure: why the peer is not believed: what, and what to do next.
        secrets: the traffic secrets (RFC 8446, section 7.1) by their names in a key log.
        user: whose pre-shared key was used.
        host_matches: whether the certificate has been found to have that name.
        has_keys: whether a pre-shared key has to be used.
        own_user: who we are there, for a client with such a key.
        unknown_user: whom the peer named, who has no key here.
        kept: what OpenSSL calls back; the context may be gone before the connection.
    """

    host: str | None
    role: Literal["client", "server"]
    revocations: tuple[x509.CertificateRevocationList, ...] = ()
    failure: tuple[str, str | None] | None = None
    secrets: dict[str, bytes] = field(default_factory=dict, repr=False)
    user: str | None = None
    host_matches: bool = False
    has_keys: bool = False
    own_user: str | None = None
    unknown_user: str | None = None
    kept: object = field(default=None, repr=False)


class TLSContext:
    """One side's credentials, for any number of connections.

    Attributes:
        server: whether it is the server's side.
        verifies: whether the peer has to show a certificate that is trusted.
        has_keys: whether it is a matter of pre-shared keys.
        has_certificate: whether there is a certificate to show.
    """

    def __init__(
        self,
        credentials: Credentials,
        *,
        server: bool,
        verify_peer: bool | None = None,
        lasting: bool = False,
    ) -> None:
        """Prepare.

        Args:
            credentials: what was loaded for that side.
            server: which side.
            verify_peer: whether the peer must prove who it is; None for what is usual: a
                server must, a client need not. Pre-shared keys always prove it.
            lasting: whether to prefer the cipher whose keys need not be changed, however much
                they encrypt (RFC 8446, section 5.5).

        Raises:
            TLSError: OpenSSL does not take the credentials.
        """
        self.server = server
        self._lasting = lasting
        self.has_keys = isinstance(credentials, PSKCredentials)
        self.verifies = not self.has_keys and (not server if verify_peer is None else verify_peer)
        self.has_certificate = not isinstance(credentials, PSKCredentials) and bool(
            credentials.chain
        )
        self._own_user: str | None = None
        self._kept: list[Any] = []  # callbacks, of which OpenSSL knows no more than the address
        self._revocations: tuple[x509.CertificateRevocationList, ...] = ()
        self._context = SSL.Context(SSL.TLS_SERVER_METHOD if server else SSL.TLS_CLIENT_METHOD)
        try:
            self._prepare(credentials)
        except (SSL.Error, crypto.Error) as error:
            words = reasons(error)
            hint = "RSA keys need 2048 bits or more" if "key too small" in words else None
            named = "the credentials"
            if isinstance(credentials, X509Credentials) and credentials.sources.certificate:
                named = printable(credentials.sources.certificate)
            raise TLSError(f"OpenSSL does not take {named}: {words}", hint=hint) from None

    def stream(self, sock: socket.socket, *, host: str | None = None) -> TLSStream:
        """Put TLS on a connected socket, which the stream takes over; `handshake` is next.

        Args:
            sock: the connection.
            host: for a client, the name or address that the certificate must have; None for
                any that is trusted.
        """
        from nbdlink.transport.tls import TLSStream

        judgement = Judgement(
            host if self.verifies else None,
            "client" if self.server else "server",
            self._revocations,
            has_keys=self.has_keys,
            own_user=self._own_user,
            kept=self._kept,
        )
        connection = SSL.Connection(self._context, None)
        connection.set_app_data(judgement)
        if self.server:
            connection.set_accept_state()
        else:
            connection.set_connect_state()
            if host is not None and not _is_address(host):
                # The server may choose its certificate by the name (RFC 6066).
                connection.set_tlsext_host_name(_ascii(host))
        return TLSStream(sock, connection, judgement)

    def _prepare(self, credentials: Credentials) -> None:
        context = self._context
        context.set_min_proto_version(SSL.TLS1_2_VERSION)
        context.set_options(SSL.OP_NO_COMPRESSION | SSL.OP_NO_TICKET | _OP_NO_RENEGOTIATION)
        if self.server:
            # Clients put AES with 256 bits, or ChaCha20, first, whatever their processor does best.
            context.set_options(SSL.OP_CIPHER_SERVER_PREFERENCE)
        context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
        context.set_keylog_callback(_note_secret)
        if isinstance(credentials, PSKCredentials):
            self._use_keys(credentials)
        else:
            self._use_certificates(credentials)

    def _ordered(self, suites: bytes) -> bytes:
        first = LASTING_SUITE.encode()
        if not self._lasting or first not in suites:
            return suites
        return b":".join([first, *(suite for suite in suites.split(b":") if suite != first)])

    def _use_certificates(self, credentials: X509Credentials) -> None:
        context = self._context
        bindings.set_suites(context, self._ordered(_SUITES))
        context.set_cipher_list(_CIPHERS)
        if credentials.chain:
            assert credentials.key is not None
            bindings.use_certificates(context, credentials.chain, credentials.key)
        if not self.verifies:
            context.set_verify(SSL.VERIFY_NONE)
            return
        store = context.get_cert_store()
        assert store is not None
        # What is trusted need not be a root: an intermediate authority will do, as it does
        # with GnuTLS.
        flags = crypto.X509StoreFlags.PARTIAL_CHAIN
        if credentials.authorities is None:
            context.set_default_verify_paths()
        else:
            for authority in credentials.authorities:
                store.add_cert(crypto.X509.from_cryptography(authority))
        self._revocations = credentials.revocations
        for revocations in credentials.revocations:
            bindings.add_revocations(store, revocations)
            flags |= crypto.X509StoreFlags.CRL_CHECK | crypto.X509StoreFlags.CRL_CHECK_ALL
        store.set_flags(flags)
        if credentials.verify_depth is not None:
            context.set_verify_depth(credentials.verify_depth)
        context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, _judge)

    def _use_keys(self, credentials: PSKCredentials) -> None:
        if not getattr(_lib, "Cryptography_HAS_PSK", 0):
            raise TLSError(
                "this build of OpenSSL has no pre-shared keys", hint="use certificates instead"
            )
        context = self._context
        bindings.set_suites(context, self._ordered(_PSK_SUITES))
        context.set_cipher_list(_PSK_CIPHERS)
        if self.server:
            keys = {user.encode(): key for user, key in credentials.keys.items()}

            def find(ssl: Any, identity: Any, place: Any, room: int) -> int:
                user = b"" if identity == _ffi.NULL else _ffi.string(identity)
                key = keys.get(user, b"")
                if len(key) > room:
                    return 0
                _ffi.memmove(place, key, len(key))
                connection = SSL.Connection._reverse_mapping.get(ssl)
                if connection is not None:
                    judgement = connection.get_app_data()
                    if key:
                        judgement.user = user.decode()
                    else:
                        judgement.unknown_user = user.decode(errors="replace")
                return len(key)

            kind = "unsigned int(SSL *, const char *, unsigned char *, unsigned int)"
            self._kept.append(_ffi.callback(kind, find))
            _lib.SSL_CTX_set_psk_server_callback(context._context, self._kept[-1])
            return

        assert credentials.username is not None
        # A server that does not use the key can show a certificate in TLS 1.3, and has proved
        # nothing with that.
        context.set_verify(SSL.VERIFY_PEER, _refuse_certificate)
        self._own_user = credentials.username
        user, own = credentials.username.encode(), credentials.keys[credentials.username]

        def tell(_: Any, hint: Any, identity: Any, most: int, place: Any, room: int) -> int:
            if len(user) >= most or len(own) > room:
                return 0
            _ffi.memmove(identity, user + b"\0", len(user) + 1)
            _ffi.memmove(place, own, len(own))
            return len(own)

        kind = (
            "unsigned int(SSL *, const char *, char *, unsigned int, unsigned char *, unsigned int)"
        )
        self._kept.append(_ffi.callback(kind, tell))
        _lib.SSL_CTX_set_psk_client_callback(context._context, self._kept[-1])


_OP_NO_RENEGOTIATION: Final = getattr(SSL, "OP_NO_RENEGOTIATION", 1 << 30)


def _note_secret(connection: SSL.Connection, line: bytes) -> None:
    """Keep what the final keys are made from (NSS key log format): the kernel will need it."""
    label, _, secret = line.split(b" ")
    if label in _SECRETS:
        connection.get_app_data().secrets[label.decode()] = bytes.fromhex(secret.decode())


def _judge(
    connection: SSL.Connection, certificate: crypto.X509, code: int, depth: int, believed: int
) -> bool:
    """Keep the first reason not to believe a peer; OpenSSL would tell its number only.

    A list of revoked certificates must be there from the authority that signed the peer's own
    certificate. Those in between are looked up in the lists that there are, as with GnuTLS.
    """
    judgement: Judgement = connection.get_app_data()
    if judgement.failure:
        return False
    host, role = judgement.host, judgement.role
    try:
        known = certificate.to_cryptography()
        if not believed and not (depth and code == verification.VerifyError.UNABLE_TO_GET_CRL):
            judgement.failure = verification.explain(
                code, depth, known, host=host, role=role, revocations=judgement.revocations
            )
        elif depth == 0 and host is not None:
            judgement.host_matches = verification.matches_host(known, host)
            if not judgement.host_matches:
                judgement.failure = verification.explain_host(known, host)
    except Exception as error:
        # OpenSSL can read it, and cryptography cannot. Whatever came out of here would come up in
        # another connection's handshake: pyOpenSSL keeps it with the context.
        judgement.failure = f"the {role}'s certificate is malformed: {error}", None
    return judgement.failure is None


def _refuse_certificate(connection: SSL.Connection, *_: object) -> bool:
    """Refuse whatever a server shows in place of using the pre-shared key."""
    judgement: Judgement = connection.get_app_data()
    judgement.failure = (
        f"the server does not use the pre-shared key of {judgement.own_user}, but shows a "
        "certificate",
        "if it has no keys, say --tls-certificates DIR or --tls-ca FILE instead of --tls-psk",
    )
    return False


def reasons(error: Exception) -> str:
    """Give OpenSSL's words for an error."""
    queue = error.args[0] if error.args and isinstance(error.args[0], list | tuple) else []
    words = [entry[-1] for entry in queue if entry and entry[-1]]
    return words[-1] if words else str(error) or "no reason given"


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def _ascii(host: str) -> bytes:
    host = host.rstrip(".")
    try:
        return host.encode("ascii" if host.isascii() else "idna")
    except UnicodeError:
        raise TLSError(f"{host!r} cannot be a host name") from None
