"""Files of pre-shared keys, in the form of GnuTLS' psktool, which nbdkit, qemu and libnbd read."""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Mapping
from typing import Final

from nbdlink.errors import ConfigError, TLSError
from nbdlink.transport.tlsfiles import printable

LONGEST_KEY: Final = 512
"""Bytes of a pre-shared key: PSK_MAX_PSK_LEN of OpenSSL 3, and the most that psktool makes."""

LONGEST_USERNAME: Final = 128
"""Bytes of a user name. OpenSSL 3 takes 256 (PSK_MAX_IDENTITY_LEN), but OpenSSL 1.1 and GnuTLS
(MAX_USERNAME_SIZE) take no more than this."""


def parse_keys(data: bytes, path: str) -> dict[str, bytes]:
    """Read the lines `user:hex` of a file of pre-shared keys.

    Empty lines and lines that begin with # are passed over. (Later versions of GnuTLS write a
    user name that is not text as # and hex; such a user cannot be had here.)

    Args:
        data: the file's content.
        path: its name, for messages; they name the line, never the key.

    Raises:
        TLSError: a line cannot be understood, a user has two keys, or there is no key at all.
    """
    keys: dict[str, bytes] = {}
    places: dict[str, int] = {}
    for number, line in enumerate(data.split(b"\n"), 1):
        line = line.removesuffix(b"\r")
        if not line.strip() or line.startswith(b"#"):
            continue
        where = f"{printable(path)}, line {number}"
        name, colon, digits = line.partition(b":")
        if not colon:
            raise TLSError(f"{where}: there is no colon", hint="lines are USER:HEX")
        user = _username(name, where)
        if user in places:
            raise TLSError(f"{where}: {user} has a key already, in line {places[user]}")
        keys[user] = _key(digits, where)
        places[user] = number
    if not keys:
        raise TLSError(
            f"{printable(path)} holds no pre-shared key",
            hint=f"psktool -u USER -p {printable(path)} adds one",
        )
    return keys


def _username(name: bytes, where: str) -> str:
    try:
        user = name.decode()
    except UnicodeDecodeError:
        raise TLSError(f"{where}: the user name is not UTF-8") from None
    # No NUL either: OpenSSL takes the name as a C string.
    if not user or user != user.strip() or not user.isprintable():
        raise TLSError(
            f"{where}: the user name is empty, or has unprintable characters or spaces around it"
        )
    if len(name) > LONGEST_USERNAME:
        raise TLSError(
            f"{where}: the user name has {len(name)} bytes, {LONGEST_USERNAME} are possible"
        )
    return user


def _key(digits: bytes, where: str) -> bytes:
    digits = digits.strip()
    # bytes.fromhex would take spaces between the digits, which other readers do not.
    if not re.fullmatch(rb"(?:[0-9A-Fa-f]{2})*", digits):
        raise TLSError(f"{where}: the key is not an even number of hexadecimal digits")
    if not digits:
        raise TLSError(f"{where}: the key is empty")
    if len(digits) > 2 * LONGEST_KEY:
        raise TLSError(f"{where}: the key has {len(digits) // 2} bytes, {LONGEST_KEY} are possible")
    return bytes.fromhex(digits.decode())


def choose_user(keys: Mapping[str, bytes], username: str | None, path: str) -> str:
    """Find out which of the users a client is.

    In this order: the one that was asked for, the only one that there is, and the one with the
    login name of whoever runs the program, as libnbd has it.

    Args:
        keys: the keys of `parse_keys`.
        username: who was asked for, or None.
        path: the keys' file, for messages.

    Raises:
        ConfigError: there is no such user, or no way to choose.
    """
    path = printable(path)
    if username is not None:
        if username not in keys:
            raise ConfigError(
                f"{path} has no key for {printable(username)}", hint=f"it has: {_users(keys)}"
            )
        return username
    if len(keys) == 1:
        return next(iter(keys))
    try:
        login = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        login = ""
    if login not in keys:
        raise ConfigError(
            f"{path} has keys for {len(keys)} users, and none of them is yours",
            hint=f"choose with --tls-username: {_users(keys)}",
        )
    return login


def _users(keys: Mapping[str, bytes]) -> str:
    first = list(keys)[:5]
    return ", ".join(first) + (", ..." if len(keys) > len(first) else "")
