"""Certificates for servers and clients that measure TLS, in the directory layout of qemu."""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID


def make(folder: Path) -> Path:
    """Make an authority, and a certificate for each side; give the folder."""
    folder.mkdir(parents=True)
    root_key, root = _signed("bench CA", None)
    (folder / "ca-cert.pem").write_bytes(root.public_bytes(Encoding.PEM))
    for side in ("server", "client"):
        key, certificate = _signed(side, (root_key, root))
        (folder / f"{side}-cert.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
        path = folder / f"{side}-key.pem"
        path.touch(0o600)
        path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return folder


def _signed(
    name: str, authority: tuple[ec.EllipticCurvePrivateKey, x509.Certificate] | None
) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    signer, issuer = (authority[0], authority[1].subject) if authority else (key, subject)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=2))
        .add_extension(x509.BasicConstraints(authority is None, None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
    )
    return key, builder.sign(signer, hashes.SHA256())
