"""What proves who we are, and whom we trust: from files to loaded material.

There are two kinds of credentials, and a side has one of them:

    X.509   an own certificate with its private key, and authorities that vouch for the peer.
            A server has to have a certificate, a client may. Files come from a directory in the
            layout of qemu, libvirt, libnbd and nbdkit, or one by one; one by one wins.
    PSK     keys that both sides know, each with a user name. The file is that of GnuTLS'
            psktool, which nbdkit, qemu and libnbd read.

What was said wrongly (a file that is missing, two words that exclude each other, a secret that
others can read) is a ConfigError; a file whose content is of no use is a TLSError. Neither
message ever contains a secret.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from nbdlink.errors import ConfigError, TLSError
from nbdlink.transport.identity import Role, describe, moment, valid_from, valid_until
from nbdlink.transport.pem import (
    authorities,
    certificates,
    has_private_key,
    private_key,
    revocations,
)
from nbdlink.transport.pskfile import choose_user, parse_keys
from nbdlink.transport.stream import reason
from nbdlink.transport.tlsfiles import (
    CredentialFiles,
    FileContent,
    is_directory,
    printable,
    read_file,
    read_secret,
    refuse_exposed,
)

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes, PublicKeyTypes

__all__ = [
    "Credentials",
    "PSKCredentials",
    "Sources",
    "X509Credentials",
    "describe",
    "load_client",
    "load_server",
]


@dataclass(frozen=True, slots=True)
class Sources:
    """The files that credentials came from, for messages; None where there was none."""

    certificate: str | None = None
    key: str | None = None
    authorities: str | None = None
    revocations: str | None = None


@dataclass(frozen=True, slots=True)
class X509Credentials:
    """Certificates.

    Attributes:
        chain: the own certificate, then its intermediate authorities; empty for a client that
            has none.
        key: the private key of the first of them.
        authorities: who is trusted to vouch for a peer. None: nobody was named; a client then
            trusts whom the system trusts, a server has nothing to verify a client by.
        revocations: lists of certificates that are not to be believed any more.
        verify_depth: OpenSSL's verify depth, or None for its default.
        sources: the files behind all of that.
    """

    chain: tuple[x509.Certificate, ...]
    key: PrivateKeyTypes | None = field(repr=False)
    authorities: tuple[x509.Certificate, ...] | None
    revocations: tuple[x509.CertificateRevocationList, ...]
    verify_depth: int | None
    sources: Sources = Sources()


@dataclass(frozen=True, slots=True)
class PSKCredentials:
    """Pre-shared keys.

    Attributes:
        keys: the keys by user name.
        username: who a client is, one of `keys`; None for a server.
        source: the file behind them.
    """

    keys: Mapping[str, bytes] = field(repr=False)
    username: str | None
    source: str | None = None


Credentials = X509Credentials | PSKCredentials


def load_client(files: CredentialFiles) -> Credentials:
    """Load what a client shows to servers and judges them by.

    If neither X.509 nor PSK files are named, the first of the usual directories that has
    something for a client counts: `pki/nbdlink` below `$XDG_CONFIG_HOME` (`~/.config`),
    `~/.pki/nbdlink`, `/etc/pki/nbdlink`. If none has, the system's authorities are trusted and
    the client has no certificate.

    Raises:
        ConfigError: the files are missing or exposed, or do not go together.
        TLSError: the content of a file is of no use.
    """
    return _load(files, "client")


def load_server(files: CredentialFiles) -> Credentials:
    """Load what a server shows to clients and judges them by.

    If no files are named, the directories of `load_client` are searched for a server's.

    Raises:
        ConfigError: the files are missing or exposed, do not go together, or none are named.
        TLSError: the content of a file is of no use.
    """
    return _load(files, "server")


def _load(files: CredentialFiles, role: Role) -> Credentials:
    words = {
        "--tls-certificates": files.directory,
        "--tls-cert": files.certificate,
        "--tls-key": files.key,
        "--tls-ca": files.authority,
        "--tls-crl": files.revocation,
    }
    others = {
        "--tls-passphrase": files.passphrase,
        "--tls-psk": files.psk,
        "--tls-username": files.username,
    }
    for word, value in (words | others).items():
        if value == "":
            raise ConfigError(f"{word} is empty", hint="leave it out, or give it a value")
    said = [word for word, value in words.items() if value is not None]
    if files.psk is not None:
        if said:
            raise ConfigError(
                f"--tls-psk and {said[0]} exclude each other",
                hint="give either pre-shared keys or certificates",
            )
        return _load_psk(files.psk, files.username, role)
    if files.username is not None:
        # It may have come from a URI (nbds://alice@store1), so the word cannot be named.
        raise ConfigError(
            f"the username {printable(files.username)} belongs to a pre-shared key, and no keys "
            "were given",
            hint="add --tls-psk FILE",
        )
    if files.verify_depth is not None and files.verify_depth < 0:
        raise ConfigError(f"--tls-verify-depth {files.verify_depth} is negative")
    return _load_x509(files, None if said else _usual_directory(role), role)


def _load_x509(files: CredentialFiles, usual: Path | None, role: Role) -> X509Credentials:
    directory = usual
    if files.directory is not None:
        directory = Path(files.directory)
        _check_directory(directory, role)
    certificate, key = _own_files(files, directory, role)
    authority, revocation = files.authority, files.revocation
    if directory is not None:
        if authority is None and (role == "client" or _is_there(directory / "ca-cert.pem")):
            _check_there(directory, "ca-cert.pem", role)
            authority = str(directory / "ca-cert.pem")
        if revocation is None and _is_there(directory / "ca-crl.pem"):
            revocation = str(directory / "ca-crl.pem")
    chain: tuple[x509.Certificate, ...] = ()
    private: PrivateKeyTypes | None = None
    if certificate is not None:
        chain, private = _load_pair(certificate, key, files.passphrase)
    return X509Credentials(
        chain,
        private,
        None if authority is None else authorities(authority),
        () if revocation is None else revocations(revocation),
        files.verify_depth,
        Sources(certificate, key or certificate, authority, revocation),
    )


def _own_files(
    files: CredentialFiles, directory: Path | None, role: Role
) -> tuple[str | None, str | None]:
    """Find the files of the own certificate and of its key; a pair is never torn.

    No file for the key means that it is in the certificate's.
    """
    if files.certificate is not None:
        return files.certificate, files.key
    if files.key is not None:
        raise ConfigError(
            f"--tls-key {printable(files.key)} is given without its certificate",
            hint="add --tls-cert FILE",
        )
    if directory is not None:
        pair = f"{role}-cert.pem", f"{role}-key.pem"
        if role == "server" or any(_is_there(directory / name) for name in pair):
            for name in pair:
                _check_there(directory, name, role)
            return str(directory / pair[0]), str(directory / pair[1])
    elif role == "server":
        raise ConfigError(
            "a server with TLS needs credentials, and none were given",
            hint="give --tls-certificates DIR, --tls-cert FILE with --tls-key FILE, "
            "or --tls-psk FILE",
        )
    return None, None


def _usual_directory(role: Role) -> Path | None:
    """Find the directory that counts when none was named.

    One that has only a part of what it takes is found too, and then complained about: to go on
    to another one would be to use credentials that nobody meant.
    """
    markers = [f"{role}-cert.pem", f"{role}-key.pem"]
    if role == "client":
        markers += ["ca-cert.pem", "ca-crl.pem"]
    for directory in _usual_directories():
        if any(_is_there(directory / name) for name in markers):
            return directory
    return None


def _usual_directories() -> Iterator[Path]:
    home = os.environ.get("HOME")
    configuration = os.environ.get("XDG_CONFIG_HOME")
    # The specification of XDG_CONFIG_HOME has relative paths ignored.
    if configuration and configuration.startswith("/"):
        yield Path(configuration, "pki", "nbdlink")
    elif home:
        yield Path(home, ".config", "pki", "nbdlink")
    if home:
        yield Path(home, ".pki", "nbdlink")
    yield Path("/etc/pki/nbdlink")


def _contents(role: Role) -> str:
    if role == "client":
        return (
            "the directory has to hold ca-cert.pem, and may hold client-cert.pem with "
            "client-key.pem, and ca-crl.pem"
        )
    return (
        "the directory has to hold server-cert.pem and server-key.pem, and may hold ca-cert.pem "
        "and ca-crl.pem"
    )


def _check_directory(directory: Path, role: Role) -> None:
    try:
        if not directory.is_dir():
            problem = "is not a directory" if _is_there(directory) else "no such directory"
            raise ConfigError(f"{printable(str(directory))}: {problem}", hint=_contents(role))
    except OSError as error:
        raise ConfigError(f"{printable(str(directory))}: {reason(error)}") from None
    except ValueError:
        raise ConfigError(
            f"{printable(str(directory))}: a path cannot contain NUL", hint=_contents(role)
        ) from None


def _check_there(directory: Path, name: str, role: Role) -> None:
    if not _is_there(directory / name):
        raise ConfigError(f"{printable(str(directory / name))}: no such file", hint=_contents(role))


def _is_there(path: Path) -> bool:
    """Tell whether there is something to be read, even if it will turn out that it cannot be.

    A link to nowhere counts, or a list of revoked certificates could go missing unnoticed.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError:
        return True
    return True


def _load_pair(
    certificate: str, key: str | None, passphrase: str | None
) -> tuple[tuple[x509.Certificate, ...], PrivateKeyTypes]:
    content = read_file(certificate, "the certificate")
    chain = certificates(content)
    if key is None:
        secret = content
        if not has_private_key(secret):
            raise ConfigError(
                f"{printable(certificate)} holds a certificate, but not its private key",
                hint="give the key with --tls-key FILE",
            )
        refuse_exposed(secret, "the private key in")
    else:
        secret = read_secret(key, "the private key")
    private = private_key(secret, passphrase)
    _check_pair(content, chain, secret, private)
    _check_dates(content, chain[0])
    return chain, private


def _check_pair(
    content: FileContent,
    chain: tuple[x509.Certificate, ...],
    secret: FileContent,
    key: PrivateKeyTypes,
) -> None:
    own = key.public_key()
    places = [place for place, each in enumerate(chain, 1) if _has_key(each, own)]
    if places[:1] == [1]:
        return
    if places:
        raise TLSError(
            f"{printable(content.path)}: the own certificate is not the first but number "
            f"{places[0]}",
            hint="put the own certificate first, then the authority that signed it, and so on",
        )
    raise TLSError(
        f"{printable(secret.path)} is the wrong key: it does not belong to the certificate "
        f"{describe(chain[0])} in {printable(content.path)}",
        hint="give the key that the certificate was made with",
    )


def _has_key(certificate: x509.Certificate, key: PublicKeyTypes) -> bool:
    try:
        return _encoded(certificate.public_key()) == _encoded(key)
    except (ValueError, UnsupportedAlgorithm):
        return False


def _encoded(key: PublicKeyTypes) -> bytes:
    # Before cryptography 40 keys of the same content were not equal.
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _check_dates(content: FileContent, certificate: x509.Certificate) -> None:
    now = datetime.now(UTC)
    named = f"{describe(certificate)} in {printable(content.path)}"
    clock = f"this machine's clock ({now:%Y-%m-%d %H:%M:%S} UTC)"
    if valid_until(certificate) < now:
        raise TLSError(
            f"{named} expired on {moment(valid_until(certificate))}",
            hint=f"renew the certificate, or check {clock}",
        )
    if valid_from(certificate) > now:
        raise TLSError(
            f"{named} is valid only from {moment(valid_from(certificate))} on",
            hint=f"wait, or check {clock}",
        )


def _load_psk(path: str, username: str | None, role: Role) -> PSKCredentials:
    # qemu is given the directory.
    if is_directory(path):
        if not _is_there(Path(path, "keys.psk")):
            raise ConfigError(
                f"{printable(str(Path(path, 'keys.psk')))}: no such file",
                hint="name a file of pre-shared keys, or a directory that holds keys.psk",
            )
        path = str(Path(path, "keys.psk"))
    content = read_secret(path, "the pre-shared keys")
    keys = MappingProxyType(parse_keys(content.data, path))
    return PSKCredentials(
        keys, choose_user(keys, username, path) if role == "client" else None, path
    )
