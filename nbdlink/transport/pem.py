"""What files in PEM hold: private keys, certificates, authorities, lists of what was revoked.

Messages name the file and what it holds instead. They never contain a secret.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from nbdlink.errors import ConfigError, TLSError
from nbdlink.transport.identity import valid_until
from nbdlink.transport.stream import reason
from nbdlink.transport.tlsfiles import (
    FileContent,
    is_directory,
    printable,
    read_file,
    read_secret,
)

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

_HASHED: Final = re.compile(r"[0-9a-f]{8}\.[0-9]+")  # how c_rehash names an authority's file


def has_private_key(content: FileContent) -> bool:
    """Tell whether a file holds a private key, whatever else it holds.

    Raises:
        TLSError: it is not PEM.
    """
    return any(label.endswith("PRIVATE KEY") for label, _ in _blocks(content))


def private_key(content: FileContent, passphrase: str | None) -> PrivateKeyTypes:
    """Give the private key in a file.

    Args:
        content: of the file.
        passphrase: the path of a file whose first line is the key's passphrase.

    Raises:
        ConfigError: the key is protected, and no passphrase was given.
        TLSError: there is no key, or none that TLS has a use for, or the passphrase is wrong.
    """
    path = printable(content.path)
    # Read even if the key will turn out to need none: a name that is wrong is told now.
    phrase = None if passphrase is None else _passphrase(passphrase)
    blocks = [block for block in _blocks(content) if block[0].endswith("PRIVATE KEY")]
    if not blocks:
        raise TLSError(f"{path} holds no private key, but {_listing(content)}")
    label, pem = blocks[0]
    if label == "OPENSSH PRIVATE KEY":
        raise TLSError(
            f"{path} is a key of OpenSSH, which TLS has no use for",
            hint="give the key that the certificate was made with",
        )
    protected = label == "ENCRYPTED PRIVATE KEY" or b"\nProc-Type: 4,ENCRYPTED" in pem
    if protected and phrase is None:
        raise ConfigError(
            f"{path} is protected by a passphrase", hint="give it with --tls-passphrase FILE"
        )
    try:
        key = load_pem_private_key(pem, phrase if protected else None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        if protected:
            raise TLSError(
                f"{path} cannot be decrypted: the passphrase in {printable(passphrase or '')} is "
                "wrong, or the key is damaged"
            ) from None
        raise TLSError(f"{path}: the private key in it is damaged or of an unknown kind") from None
    kinds = (
        rsa.RSAPrivateKey,
        ec.EllipticCurvePrivateKey,
        ed25519.Ed25519PrivateKey,
        ed448.Ed448PrivateKey,
    )
    if not isinstance(key, kinds):
        kind = type(key).__name__.removesuffix("PrivateKey").lstrip("_")
        raise TLSError(
            f"{path} is a key of the kind {kind}, which cannot prove an identity in TLS",
            hint="make one of RSA, ECDSA, Ed25519 or Ed448",
        )
    return key


def _passphrase(path: str) -> bytes:
    content = read_secret(path, "the passphrase")
    phrase = content.data.partition(b"\n")[0].removesuffix(b"\r")
    if not phrase:
        raise TLSError(
            f"{printable(path)} holds no passphrase", hint="its first line has to be the passphrase"
        )
    return phrase


def authorities(path: str) -> tuple[x509.Certificate, ...]:
    """Give all certificates of a file, or of a directory's files.

    Raises:
        ConfigError: the directory cannot be read, or holds none.
        TLSError: one of them is damaged.
    """
    if not is_directory(path):
        return certificates(read_file(path, "the authorities"))
    try:
        names = sorted(
            each.name
            for each in Path(path).iterdir()
            # A directory of c_rehash is full of links, some of which lead nowhere.
            if (each.suffix in (".pem", ".crt") or _HASHED.fullmatch(each.name)) and each.is_file()
        )
    except OSError as error:
        raise ConfigError(f"the authorities {printable(path)}: {reason(error)}") from None
    found: dict[x509.Certificate, None] = {}
    for name in names:
        content = read_file(str(Path(path, name)), "the authorities")
        # A key may lie beside its authority.
        if any(label.endswith("CERTIFICATE") for label, _ in _blocks(content)):
            found.update(dict.fromkeys(certificates(content)))
    if not found:
        raise ConfigError(
            f"{printable(path)} holds no authority",
            hint="the directory has to hold certificates in files named *.pem or *.crt",
        )
    return tuple(found)


def revocations(path: str) -> tuple[x509.CertificateRevocationList, ...]:
    """Give the lists of revoked certificates in a file.

    Raises:
        TLSError: there is none, or one is damaged.
    """
    content = read_file(path, "the list of revoked certificates")
    blocks = [pem for label, pem in _blocks(content) if label == "X509 CRL"]
    if not blocks:
        raise TLSError(
            f"{printable(path)} holds no list of revoked certificates, but {_listing(content)}"
        )
    lists = []
    for number, pem in enumerate(blocks, 1):
        try:
            lists.append(x509.load_pem_x509_crl(pem))
        except (ValueError, UnsupportedAlgorithm):
            raise TLSError(
                f"{printable(path)}: the list of revoked certificates number {number} is damaged"
            ) from None
    return tuple(lists)


def certificates(content: FileContent) -> tuple[x509.Certificate, ...]:
    """Give the certificates in a file, in their order.

    Raises:
        TLSError: there is none, or one is damaged.
    """
    labels = ("CERTIFICATE", "X509 CERTIFICATE")
    blocks = [pem for label, pem in _blocks(content) if label in labels]
    if not blocks:
        raise TLSError(f"{printable(content.path)} holds no certificate, but {_listing(content)}")
    certificates = []
    for number, pem in enumerate(blocks, 1):
        try:
            certificate = x509.load_pem_x509_certificate(pem)
            # These are parsed when they are asked for; what is damaged has to show now.
            _ = certificate.subject, certificate.issuer, valid_until(certificate)
        except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion):
            raise TLSError(
                f"{printable(content.path)}: certificate number {number} is damaged"
            ) from None
        certificates.append(certificate)
    return tuple(certificates)


def _listing(content: FileContent) -> str:
    return ", ".join(dict.fromkeys(label for label, _ in _blocks(content)))


def _blocks(content: FileContent) -> list[tuple[str, bytes]]:
    """Split PEM into its blocks, each with its label; text around them is nobody's business.

    Raises:
        TLSError: there are none, or one has no end.
    """
    blocks: list[tuple[str, bytes]] = []
    label = b""
    lines: list[bytes] = []
    for line in map(bytes.strip, content.data.splitlines()):
        if line.startswith(b"-----BEGIN ") and line.endswith(b"-----"):
            if label:
                break
            label = line[11:-5]
            lines = [line]
        elif label:
            lines.append(line)
            if line == b"-----END " + label + b"-----":
                name = printable(label.decode("latin-1"))
                blocks.append((name, b"\n".join(lines) + b"\n"))
                label = b""
    path = printable(content.path)
    if label:
        raise TLSError(
            f"{path}: a block of {printable(label.decode('latin-1'))} has no end",
            hint="the file is cut off or damaged; copy it again",
        )
    if not blocks:
        # A DER structure begins with the tag of a SEQUENCE.
        der = content.data.startswith(b"\x30\x82")
        raise TLSError(
            f"{path} is not PEM",
            hint="it looks like DER; `openssl x509`, `pkey` or `crl` with -inform DER converts it"
            if der
            else "the file has to hold lines like -----BEGIN CERTIFICATE-----",
        )
    return blocks
