"""Certificates for tests: authorities that sign, revoke, and write directories as qemu has them."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes

NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)

_PURPOSES = {
    "server": ExtendedKeyUsageOID.SERVER_AUTH,
    "client": ExtendedKeyUsageOID.CLIENT_AUTH,
}


@dataclass(frozen=True)
class Identity:
    """A certificate, its key, and the intermediate authorities that go with it."""

    certificate: x509.Certificate
    key: CertificateIssuerPrivateKeyTypes
    intermediates: tuple[x509.Certificate, ...] = ()

    @property
    def chain_pem(self) -> bytes:
        return pem(self.certificate, *self.intermediates)

    def key_pem(
        self,
        passphrase: bytes | None = None,
        form: PrivateFormat = PrivateFormat.PKCS8,
    ) -> bytes:
        encryption = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
        return self.key.private_bytes(Encoding.PEM, form, encryption)


class Authority:
    """Signs certificates; without a parent its own certificate is a root."""

    def __init__(
        self,
        name: str = "Test CA",
        *,
        parent: Authority | None = None,
        path_length: int | None = None,
        not_before: datetime = NOW - 30 * DAY,
        not_after: datetime = NOW + 30 * DAY,
    ) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.parent = parent
        self.revoked: list[x509.RevokedCertificate] = []
        subject = common_name(name)
        usage = x509.KeyUsage(
            digital_signature=True,
            key_cert_sign=True,
            crl_sign=True,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            encipher_only=False,
            decipher_only=False,
        )
        self.certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(parent.certificate.subject if parent else subject)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(not_before)
            .not_valid_after(not_after)
            .add_extension(x509.BasicConstraints(True, path_length), critical=True)
            .add_extension(usage, critical=True)
            .sign(parent.key if parent else self.key, hashes.SHA256())
        )

    @property
    def intermediates(self) -> tuple[x509.Certificate, ...]:
        """Itself and the authorities above it, up to the root but without it."""
        return (self.certificate, *self.parent.intermediates) if self.parent else ()

    def issue(
        self,
        name: str | x509.Name = "localhost",
        *,
        names: tuple[str, ...] = ("localhost", "127.0.0.1", "::1"),
        role: str | None = "server",
        not_before: datetime = NOW - 7 * DAY,
        not_after: datetime = NOW + 7 * DAY,
        key: CertificateIssuerPrivateKeyTypes | None = None,
    ) -> Identity:
        """Sign a certificate.

        Args:
            name: the common name, or the whole subject.
            names: host names and addresses.
            role: "server" or "client", or None for a certificate that does not say.
            not_before: when it begins to be valid.
            not_after: when it expires.
            key: its key, or None for a new one.
        """
        key = key or ec.generate_private_key(ec.SECP256R1())
        builder = (
            x509.CertificateBuilder()
            .subject_name(common_name(name) if isinstance(name, str) else name)
            .issuer_name(self.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(not_before)
            .not_valid_after(not_after)
            .add_extension(x509.BasicConstraints(False, None), critical=True)
        )
        if names:
            alternatives = x509.SubjectAlternativeName(map(_general_name, names))
            builder = builder.add_extension(alternatives, critical=False)
        if role:
            usage = x509.ExtendedKeyUsage([_PURPOSES[role]])
            builder = builder.add_extension(usage, critical=False)
        return Identity(builder.sign(self.key, hashes.SHA256()), key, self.intermediates)

    def revoke(self, *identities: Identity) -> None:
        """Put certificates onto the list that `revocations` signs."""
        self.revoked += [
            x509.RevokedCertificateBuilder()
            .serial_number(each.certificate.serial_number)
            .revocation_date(NOW - DAY)
            .build()
            for each in identities
        ]

    def revocations(
        self, *, last_update: datetime = NOW - DAY, next_update: datetime = NOW + DAY
    ) -> x509.CertificateRevocationList:
        """Sign the list of what was revoked."""
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(last_update)
            .next_update(next_update)
        )
        for each in self.revoked:
            builder = builder.add_revoked_certificate(each)
        return builder.sign(self.key, hashes.SHA256())

    def write_directory(
        self,
        path: Path,
        *,
        server: Identity | None = None,
        client: Identity | None = None,
        revocations: x509.CertificateRevocationList | None = None,
    ) -> Path:
        """Write a directory in the layout of qemu: this authority, and who is given."""
        path.mkdir(parents=True, exist_ok=True)
        (path / "ca-cert.pem").write_bytes(pem(self.certificate))
        if revocations is not None:  # an empty list is false
            (path / "ca-crl.pem").write_bytes(pem(revocations))
        for role, identity in {"server": server, "client": client}.items():
            if identity:
                (path / f"{role}-cert.pem").write_bytes(identity.chain_pem)
                write_secret(path / f"{role}-key.pem", identity.key_pem())
        return path


def common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def pem(*things: x509.Certificate | x509.CertificateRevocationList) -> bytes:
    return b"".join(each.public_bytes(Encoding.PEM) for each in things)


def write_secret(path: Path, data: bytes) -> Path:
    """Write a file that only its owner may read."""
    path.touch(mode=0o600)
    path.chmod(0o600)
    path.write_bytes(data)
    return path


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
