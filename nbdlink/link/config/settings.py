"""What can be said about a link in a file: one table drives it all.

`SETTINGS` names each key with what it takes and where that goes. What a file says is read into
`Values`, which know where each of them was said; `configured` makes links of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from nbdlink import kernel
from nbdlink.errors import ConfigError, KernelError
from nbdlink.link.record import TLS_ROADS
from nbdlink.link.spec import LinkSpec, check
from nbdlink.sizes import parse_size
from nbdlink.toml.words import at, expected, of_key, read_text
from nbdlink.transport.tlsfiles import POLICIES
from nbdlink.uri import Target

Place = Literal["route", "link", "tls", "files"]


@dataclass(frozen=True, slots=True)
class Value:
    """What was said for a key.

    Attributes:
        value: as `Setting.convert` gave it.
        source: `file:line`.
    """

    value: Any
    source: str


Values = Mapping[str, Value]


@dataclass(frozen=True, slots=True)
class Setting:
    """A key and what it means.

    Attributes:
        key: as it is written in the file.
        convert: makes of what was written, with the folder of the file, what is meant; raises
            ConfigError with a sentence that begins with what was expected.
        place: "route" for what makes up targets, else whose field it is: the `LinkSpec`'s, the
            `TLSOptions`' or the `CredentialFiles`'.
        field: the name of that field.
        everywhere: whether `[defaults]` may hold it.
    """

    key: str
    convert: Callable[[Any, Path], Any]
    place: Place
    field: str
    everywhere: bool = True


def _word(value: Any, _folder: Path) -> str:
    return read_text(value)


def _name(value: Any, _folder: Path) -> str:
    return read_text(value, empty=True)


def _file(value: Any, folder: Path) -> str:
    # Not resolved: links may be renewed under a running supervisor.
    return str(folder / read_text(value, "a path"))


def _switch(value: Any, _folder: Path) -> bool:
    if not isinstance(value, bool):
        raise expected("true or false", value)
    return value


def _ioctl(value: Any, folder: Path) -> str:
    return "ioctl" if _switch(value, folder) else "auto"


def _number(value: Any, _folder: Path) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise expected("a number", value)
    if abs(value) >= 1 << 63:
        raise ConfigError("takes a number, and not one that large")
    return value


def _depth(value: Any, folder: Path) -> int:
    if not 0 <= (depth := _number(value, folder)) <= 100:
        raise ConfigError(f"a verification depth of {depth} is not possible", hint="use 0 to 100")
    return depth


def _size(value: Any, folder: Path) -> int:
    if isinstance(value, str):
        return parse_size(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise expected('a number of bytes or a size such as "4K"', value)
    return _number(value, folder)


def _choice(words: tuple[str, ...]) -> Callable[[Any, Path], str]:
    listed = ", ".join(f'"{word}"' for word in words[:-1]) + f' or "{words[-1]}"'

    def convert(value: Any, _folder: Path) -> str:
        if value not in words:  # a list is in no tuple of texts
            raise expected(listed, value)
        return str(value)

    return convert


def _device(value: Any, _folder: Path) -> str:
    text = read_text(value, "a device")
    if not re.fullmatch(r"(/dev/)?nbd[0-9]{1,9}", text):
        raise expected("a device such as /dev/nbd0", value)
    try:
        return f"/dev/nbd{kernel.index_of(text, must_exist=False)}"
    except KernelError as error:
        raise ConfigError(str(error), hint=error.hint) from None


def _target(value: Any, folder: Path) -> Target:
    return _anchored(Target.parse(read_text(value, "a target", empty=True)), folder)


def _targets(value: Any, folder: Path) -> tuple[Target, ...]:
    if not isinstance(value, list):
        raise expected('a list such as ["nbd://store2/data"]', value)
    return tuple(_target(each, folder) for each in value)


def _anchored(target: Target, folder: Path) -> Target:
    """Give the target with paths that hold wherever the process goes."""

    def anchor(path: str | None) -> str | None:
        return str(folder / path) if path and not path.startswith("\0") else path

    return replace(
        target,
        socket=anchor(target.socket),
        tls_certificates=anchor(target.tls_certificates),
        tls_psk_file=anchor(target.tls_psk_file),
    )


SETTINGS: Final = {
    setting.key: setting
    for setting in (
        Setting("target", _target, "route", "target", everywhere=False),
        Setting("paths", _targets, "route", "paths", everywhere=False),
        Setting("export", _name, "route", "export"),
        Setting("device", _device, "link", "device", everywhere=False),
        Setting("connections", _number, "link", "connections"),
        Setting("read-only", _switch, "link", "read_only"),
        Setting("block-size", _size, "link", "block_size"),
        Setting("timeout", _number, "link", "timeout"),
        Setting("dead-timeout", _number, "link", "dead_timeout"),
        Setting("ioctl", _ioctl, "link", "road"),
        Setting("tls", _choice(POLICIES), "tls", "policy"),
        Setting("tls-certificates", _file, "files", "directory"),
        Setting("tls-cert", _file, "files", "certificate"),
        Setting("tls-key", _file, "files", "key"),
        Setting("tls-ca", _file, "files", "authority"),
        Setting("tls-crl", _file, "files", "revocation"),
        Setting("tls-passphrase", _file, "files", "passphrase"),
        Setting("tls-psk", _file, "files", "psk"),
        Setting("tls-username", _word, "files", "username"),
        Setting("tls-hostname", _word, "tls", "hostname"),
        Setting("tls-verify-peer", _switch, "tls", "verify_peer"),
        Setting("tls-verify-depth", _depth, "files", "verify_depth"),
        Setting("tls-road", _choice(TLS_ROADS), "link", "tls_road"),
    )
}

_ANYWHERE: Final = LinkSpec(Target("localhost"))


def read_value(
    key: str, value: Any, folder: Path, source: str, *, word: str | None = None
) -> Value:
    """Read what was written for a known key.

    Args:
        key: one of `SETTINGS`.
        value: what was written.
        folder: where relative paths begin.
        source: `file:line`.
        word: what the file calls the key, if it has another name for it.

    Raises:
        ConfigError: it is of another type, or not possible.
    """
    setting = SETTINGS[key]
    try:
        converted = setting.convert(value, folder)
        if setting.place == "link":
            check(replace(_ANYWHERE, **{setting.field: converted}))
    except ConfigError as error:
        raise at(source, of_key(word or key, error)) from None
    return Value(converted, source)
