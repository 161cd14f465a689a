"""Credentials in files for tests of TLS: directories as qemu has them, and keys as psktool does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.certificates import Authority, write_secret

USERS = {"alice": b"a" * 32, "bob": b"b" * 32}


@dataclass(frozen=True)
class Files:
    """One authority, and what it signed.

    Attributes:
        authority: signs everything in here.
        folder: room for further files.
        server: directory of a server, whose certificate is for localhost, 127.0.0.1 and ::1.
        trust: directory of a client that has no certificate.
        client: directory of a client with a certificate, `CN=me`.
        other: directory of another client, `CN=other`.
        keys: file of pre-shared keys: alice and bob, of `USERS`.
    """

    authority: Authority
    folder: Path
    server: Path
    trust: Path
    client: Path
    other: Path
    keys: Path


def make(folder: Path) -> Files:
    """Write all of it."""
    authority = Authority()

    def directory(name: str, **who: object) -> Path:
        return authority.write_directory(folder / name, **who)  # type: ignore[arg-type]

    return Files(
        authority,
        folder,
        server=directory("server", server=authority.issue()),
        trust=directory("trust"),
        client=directory("client", client=authority.issue("me", role="client")),
        other=directory("other", client=authority.issue("other", role="client")),
        # In a directory of its own, which is what qemu is told.
        keys=write_keys(folder / "psk" / "keys.psk", **USERS),
    )


def write_keys(path: Path, **users: bytes) -> Path:
    """Write a file of pre-shared keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(f"{user}:{key.hex()}\n" for user, key in users.items())
    return write_secret(path, lines.encode())
