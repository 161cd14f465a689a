"""Reading `/etc/nbdtab`, which nbd-client has its devices from.

The format is nbdtab(5)'s, and that of `nbdtab_lexer.l` and `nbd-client.c` (NBD 3.24 to 3.27)
where the manual is silent: per line a device, a host, an export and options with commas in
between, all divided by blanks and tabs; nothing can be quoted, and `#` begins a comment where a
word could begin.

The line of nbd0 becomes the link "nbdtab-nbd0": a link's name cannot be that of a device.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nbdlink.errors import ConfigError
from nbdlink.link.config.configured import ConfiguredLink, configure
from nbdlink.link.config.settings import Value, read_value
from nbdlink.toml.words import at, nearest
from nbdlink.transport.tlsfiles import printable
from nbdlink.uri import DEFAULT_PORT, Target

_TEXTS: Final = {
    "certfile": "tls-cert",
    "keyfile": "tls-key",
    "cacertfile": "tls-ca",
    "tlshostname": "tls-hostname",
}
_NUMBERS: Final = {
    "bs": "block-size",
    "conns": "connections",
    "timeout": "timeout",
    "dead-timeout": "dead-timeout",
}
_WITHOUT_EFFECT: Final = {
    "persist": "connections that break are the supervisor's business",
    "swap": "nbdlink does not change how its processes are kept in memory",
    "sdp": "the Socket Direct Protocol is gone from Linux; this is TCP",
    "no_optgo": "nbdlink finds out by itself what the server can do",
    "priority": "nbdlink chooses the ciphers itself",
}
_FLAGS: Final = ("unix", "tls", "persist", "swap", "sdp", "no_optgo", "preinit")
_PROPERTIES: Final = ("port", "priority", *_TEXTS, *_NUMBERS)


@dataclass(frozen=True, slots=True)
class _Options:
    """The fourth field: what was said with a value, and what without."""

    properties: dict[str, str]
    flags: frozenset[str]


def read_nbdtab(text: str, path: Path) -> Iterator[ConfiguredLink]:
    """Read the text of an nbdtab; relative paths in it begin in its folder.

    Raises:
        ConfigError: a line is not as nbdtab(5) has it, or asks for something impossible.
    """
    for number, line in enumerate(text.split("\n"), 1):
        fields = re.split(r"[ \t]+", re.sub(r"(^|[ \t])#.*", "", line.rstrip("\r")).strip(" \t"))
        if fields == [""]:
            continue
        source = f"{path}:{number}"
        try:
            link = _read_line(fields, path.parent, source)
        except _LineError as error:
            raise at(source, error) from None
        yield link


class _LineError(ConfigError):
    """Something is wrong with a line, which the message does not name yet."""


def _read_line(fields: list[str], folder: Path, source: str) -> ConfiguredLink:
    if not 3 <= len(fields) <= 4:
        raise _LineError(
            f"{len(fields)} fields, where a line has 3 or 4",
            hint="say DEVICE HOST EXPORT [OPTION,OPTION=VALUE,...], with no blanks in the options",
        )
    device, host, export = fields[:3]
    for what, field in (("device", device), ("host", host), ("export", export)):
        if "," in field or "=" in field:
            # So says nbd-client's lexer; most often the export has been forgotten.
            raise _LineError(
                f"{printable(field)!r} stands where the {what} belongs, and looks like options",
                hint="say DEVICE HOST EXPORT [OPTION,OPTION=VALUE,...]",
            )
    options = _read_options(fields[3] if len(fields) == 4 else "")
    values = {"device": read_value("device", device, folder, source)}
    values["target"] = Value(_read_target(host, export, options, folder), source)
    for word, key in _TEXTS.items():
        if word in options.properties:
            values[key] = read_value(key, options.properties[word], folder, source, word=word)
    notes = [
        f"{source}: {word} has no effect: {why}"
        for word, why in _WITHOUT_EFFECT.items()
        if word in options.flags or word in options.properties
    ]
    for word, key in _NUMBERS.items():
        if word not in options.properties:
            continue
        number = _read_number(word, options.properties[word])
        if word == "timeout" and number == 0:
            notes.append(f"{source}: timeout=0 is the kernel's own timeout here, 30 seconds")
        else:
            values[key] = read_value(key, number, folder, source, word=word)
    if "tls" in options.flags:
        values["tls"] = read_value("tls", "require", folder, source)
    name = "nbdtab-" + values["device"].value.removeprefix("/dev/")
    return configure(name, values, source, notes=tuple(notes))


def _read_options(field: str) -> _Options:
    properties: dict[str, str] = {}
    flags: set[str] = set()
    for option in field.split(",") if field else ():
        word, equals, value = option.partition("=")
        if word.startswith("_"):
            continue  # nbdtab(5) leaves these to whoever else reads the file
        if word not in (_PROPERTIES if equals else _FLAGS):
            raise _unknown(word, bool(equals))
        if word in properties or word in flags:
            raise _LineError(f"{word} is given twice")
        if not equals:
            flags.add(word)
        elif not value or "=" in value:
            raise _LineError(f"{word}= takes one value, not {printable(value)!r}")
        else:
            properties[word] = value
    if "preinit" in flags:
        raise _LineError(
            "preinit is for servers that do not negotiate; nbdlink always does",
            hint="leave such a device to nbd-client, in a file of its own",
        )
    return _Options(properties, frozenset(flags))


def _unknown(word: str, has_value: bool) -> _LineError:
    if has_value and word in _FLAGS:
        return _LineError(f"{word} takes no value")
    if word in _PROPERTIES:
        return _LineError(f"{word} needs a value", hint=f"say {word}=...")
    if not word:
        return _LineError("an option is empty", hint="look for a comma too many")
    return _LineError(
        f"unknown option {printable(word)!r}", hint=nearest(word, (*_FLAGS, *_PROPERTIES))
    )


def _read_target(host: str, export: str, options: _Options, folder: Path) -> Target:
    if "unix" in options.flags:
        target = Target(socket=str(folder / host), export=export)
    elif host.startswith("/"):
        raise _LineError(
            f"{printable(host)!r} is a path, not a host", hint="for a Unix socket add `unix`"
        )
    else:
        port = options.properties.get("port", str(DEFAULT_PORT))
        number = _read_number("port", port)
        # An IPv6 address has no brackets in this file.
        target = Target(host=host, port=number, export=export)
    try:
        return Target.parse(str(target))  # which checks each part
    except ConfigError as error:
        raise _LineError(str(error), hint=error.hint) from None


def _read_number(word: str, text: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 18:
        raise _LineError(f"{word} takes a number, not {printable(text)!r}")
    return int(text)
