"""What pyOpenSSL calls things, in all versions of it that nbdlink runs with.

Those are today's and that of Debian 12 (23.0), which does not take certificates and keys of
cryptography yet. Whether a version has something is tried, never looked up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from OpenSSL import SSL, crypto

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

_lib: Any = SSL._lib  # type: ignore[attr-defined]


def set_suites(context: SSL.Context, suites: bytes) -> None:
    """Choose the suites of TLS 1.3, by OpenSSL's names with colons in between."""
    try:
        choose = context.set_tls13_ciphersuites  # since pyOpenSSL 25.2
    except AttributeError:
        if _lib.SSL_CTX_set_ciphersuites(context._context, suites) != 1:
            raise SSL.Error from None
        return
    choose(suites)


def use_certificates(
    context: SSL.Context, chain: tuple[x509.Certificate, ...], key: PrivateKeyTypes
) -> None:
    """Have a context show a certificate, the first one of `chain`, whose private key is `key`."""
    own, *others = chain
    try:
        context.use_certificate(own)
    except TypeError:  # before pyOpenSSL 24.3
        context.use_certificate(crypto.X509.from_cryptography(own))
        for other in others:
            context.add_extra_chain_cert(crypto.X509.from_cryptography(other))
        context.use_privatekey(crypto.PKey.from_cryptography_key(key))  # type: ignore[arg-type]
        return
    for other in others:
        context.add_extra_chain_cert(other)
    context.use_privatekey(key)  # type: ignore[arg-type]


def add_revocations(store: crypto.X509Store, revocations: x509.CertificateRevocationList) -> None:
    """Have a store of authorities know which certificates are revoked."""
    try:
        store.add_crl(revocations)
    except (TypeError, AttributeError):  # before pyOpenSSL 24.3
        old: Any = crypto
        encoded = revocations.public_bytes(Encoding.DER)
        store.add_crl(old.load_crl(crypto.FILETYPE_ASN1, encoded))


def peer_certificate(connection: SSL.Connection) -> x509.Certificate | None:
    """Give the certificate that the peer has shown."""
    try:
        return connection.get_peer_certificate(as_cryptography=True)
    except TypeError:  # before pyOpenSSL 24.3
        certificate = connection.get_peer_certificate()
        return None if certificate is None else certificate.to_cryptography()
