"""The files that TLS credentials come from: which ones were named, and how such a file is read.

Nothing here needs a library for cryptography, so that a command line can be parsed and a mistake
in it be told without waiting for one to be imported. What the files mean is told by `credentials`.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final, Literal

from nbdlink.errors import ConfigError
from nbdlink.transport.stream import reason

Policy = Literal["off", "allow", "require"]
POLICIES: Final = ("off", "allow", "require")
"""Whether there is TLS: never, if both sides want it, or never without."""

LARGEST_FILE: Final = 1 << 20
"""Bytes that a file of credentials may have; all authorities of a Debian system have a quarter
of that."""


@dataclass(frozen=True, slots=True)
class CredentialFiles:
    """What was said about TLS credentials; every field is a path but for two.

    Attributes:
        directory: holds `ca-cert.pem`, `client-cert.pem` or `server-cert.pem`, the `-key.pem` to
            each, and `ca-crl.pem`: the layout of qemu, libvirt, libnbd and nbdkit.
        certificate: PEM, the own certificate first, then its intermediate authorities.
        key: PEM, the private key of that certificate.
        authority: PEM with the trusted authorities, or a directory of such files.
        revocation: PEM with lists of revoked certificates.
        passphrase: its first line is the passphrase of the private key.
        psk: lines of `user:hex`, or a directory that holds `keys.psk`.
        username: the user of that file that a client is; not a path.
        verify_depth: intermediate authorities that may stand between a peer's certificate and a
            trusted one, as OpenSSL counts them, or None for OpenSSL's default; not a path.
    """

    directory: str | None = None
    certificate: str | None = None
    key: str | None = None
    authority: str | None = None
    revocation: str | None = None
    passphrase: str | None = None
    psk: str | None = None
    username: str | None = None
    verify_depth: int | None = None

    @property
    def given(self) -> bool:
        """Whether anything was said at all."""
        return any(getattr(self, each.name) is not None for each in fields(self))

    def absolute(self) -> CredentialFiles:
        """Give the same with paths that hold wherever the process goes."""
        paths = ("directory", "certificate", "key", "authority", "revocation", "passphrase", "psk")
        said = {name: getattr(self, name) for name in paths}
        absolute: dict[str, Any] = {
            name: str(Path(path).absolute()) for name, path in said.items() if path is not None
        }
        return replace(self, **absolute)


@dataclass(frozen=True, slots=True)
class FileContent:
    """A file as it was when it was open.

    Attributes:
        path: as the person wrote it.
        data: all of it.
        mode: the permission bits.
        owner: the user id of its owner.
    """

    path: str
    data: bytes = field(repr=False)
    mode: int
    owner: int


def read_file(
    path: str, what: str, hint: str | None = "`man nbdlink-tls` tells how to make one"
) -> FileContent:
    """Read a file of credentials, of at most `LARGEST_FILE` bytes.

    Args:
        path: the file; links are followed.
        what: what it should hold, for messages ("the certificate").
        hint: what to do if there is no such file.

    Raises:
        ConfigError: it is missing, may not be read, is not a regular file or is too large.
    """
    named = f"{what} {printable(path)}"
    try:
        # A FIFO without a writer must not hold up the program, nor a terminal become its own.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise ConfigError(f"{named}: {reason(error)}", hint=hint) from None
    except OSError as error:
        hint = "try it as its owner, or as root" if error.errno == errno.EACCES else None
        raise ConfigError(f"{named}: {reason(error)}", hint=hint) from None
    except ValueError:
        raise ConfigError(f"{named}: a path cannot contain NUL") from None
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise ConfigError(f"{named}: is a directory", hint="name a file in it")
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(
                f"{named}: is not a regular file",
                hint="pipes and devices are not read; put it into a file of mode 0600",
            )
        with open(descriptor, "rb", closefd=False) as stream:
            data = stream.read(LARGEST_FILE + 1)
    except OSError as error:
        raise ConfigError(f"{named}: {reason(error)}") from None
    finally:
        os.close(descriptor)
    if len(data) > LARGEST_FILE:
        raise ConfigError(
            f"{named}: is larger than {LARGEST_FILE >> 20} MiB",
            hint="is that the right file?",
        )
    return FileContent(path, data, stat.S_IMODE(status.st_mode), status.st_uid)


def read_secret(path: str, what: str) -> FileContent:
    """Read a file that only its owner may know.

    Raises:
        ConfigError: as `read_file`, and if others may read or write it.
    """
    content = read_file(path, what)
    refuse_exposed(content, what)
    return content


def refuse_exposed(content: FileContent, what: str) -> None:
    """Refuse a secret that somebody else can know, or can have put there.

    The mode is the one that the open file had, so nobody can swap the file behind the check.

    Raises:
        ConfigError: others may read or write the file.
    """
    others = content.mode & 0o066
    # Debian's package ssl-cert keeps keys as root:ssl-cert with mode 0640, for services that do
    # not run as root. Root has chosen who is in that group; anybody else's group may be everyone.
    if not others or (others == 0o040 and content.owner == 0):
        return
    path = printable(content.path)
    raise ConfigError(
        f"{what} {path}: others may {'write' if others & 0o022 else 'read'} it "
        f"(its mode is {content.mode:04o})",
        hint=f"chmod 600 {path}",
    )


def printable(text: str) -> str:
    r"""Give `text` so that it cannot steer a terminal or forge a line of a log.

    Whatever is not printable becomes an escape as Python writes it (`\n`, `\x1b`, `\u202e`).
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def is_directory(path: str) -> bool:
    """Tell whether a path is a directory; not what is wrong with it if it cannot be told."""
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):
        return False  # reading it will tell why
