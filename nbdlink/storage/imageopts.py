"""`--image-opts`: a storage in QEMU's words, `driver=raw,offset=1M,file.filename=disk.img`.

Keys that belong to the driver below begin with `file.`; a comma within a value is doubled. What
is not understood is refused by its name: to leave out what somebody asked for could serve other
bytes than they mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, TypeVar, Union

from nbdlink.errors import ConfigError
from nbdlink.sizes import parse_size
from nbdlink.storage.chain import NO_CHAIN, Backing, Chain
from nbdlink.storage.open import AIO_MODES, DETECT_ZEROES, Part, StorageSpec
from nbdlink.storage.probe import KNOWN
from nbdlink.uri import DEFAULT_PORT, Target, is_uri

if TYPE_CHECKING:
    from nbdlink.client.security import TLSOptions

_Tree = dict[str, Union[str, "_Tree"]]
_T = TypeVar("_T", bound=str)

_FILES: Final = ("file", "host_device")
_DRIVERS: Final = (*_FILES, "nbd", "raw", "qcow2", "vmdk", "vdi", "vpc", "vhdx")
_ON: Final = {"on": True, "yes": True, "true": True, "y": True}
_OFF: Final = {"off": False, "no": False, "false": False, "n": False}
_DISCARDS: Final[dict[str, Literal["ignore", "unmap"]]] = {
    "ignore": "ignore",
    "off": "ignore",
    "unmap": "unmap",
    "on": "unmap",
}


Credentials = Callable[[str, str | None], "TLSOptions"]
"""Gives what a client demands of TLS, from the id of credentials and a server's name."""


def _no_credentials(name: str, hostname: str | None) -> TLSOptions:
    raise ConfigError(f"tls-creds={name}: there are no credentials here")


def parse_image_options(
    text: str, spec: StorageSpec, credentials: Credentials = _no_credentials
) -> StorageSpec:
    """Read what `--image-opts` says, on top of what other options have said.

    Args:
        text: the options.
        spec: what else was said; its path, format and parts are not looked at.
        credentials: finds the credentials that are named.

    Raises:
        ConfigError: it is not written as it should be, or says what is not understood.
    """
    found = _node(_tree(text), "", spec, credentials)
    return replace(found, parts=tuple(part for part in found.parts if part != Part()))


def split_options(text: str) -> list[tuple[str, str | None]]:
    """Divide `key=value,key=value` where no comma is doubled; a value may be missing."""
    pieces: list[str] = [""]
    position = 0
    while position < len(text):
        if text.startswith(",,", position):
            pieces[-1] += ","
            position += 2
        elif text[position] == ",":
            pieces.append("")
            position += 1
        else:
            pieces[-1] += text[position]
            position += 1
    split = []
    for piece in pieces:
        key, equals, value = piece.partition("=")
        split.append((key.strip(), value if equals else None))
    return split


def discard_mode(word: str) -> Literal["ignore", "unmap"]:
    """Give the discard mode of a word: on and off are words for it, too.

    Raises:
        ConfigError: there is none.
    """
    if word not in _DISCARDS:
        raise ConfigError(f"discard={word}: no such mode", hint="say ignore or unmap")
    return _DISCARDS[word]


def _tree(text: str) -> _Tree:
    tree: _Tree = {}
    for key, value in split_options(text):
        if not key or value is None:
            raise ConfigError(
                f"{key or text!r} is not KEY=VALUE",
                hint="--image-opts takes driver=raw,file.filename=PATH and the like",
            )
        *folders, last = key.split(".")
        place = tree
        for folder in folders:
            below = place.setdefault(folder, {})
            if isinstance(below, str):
                raise ConfigError(f"{key}: {folder} is given as a value already")
            place = below
        if last in place:
            raise ConfigError(f"{key} is given twice")
        place[last] = value
    return tree


def _node(tree: _Tree, prefix: str, spec: StorageSpec, credentials: Credentials) -> StorageSpec:
    """Read one driver and what is below it."""
    tree = dict(tree)
    driver = _text(tree, prefix, "driver")
    if driver is not None and driver not in _DRIVERS:
        raise ConfigError(_refusal(driver, prefix), hint=f"there are {', '.join(_DRIVERS)}")
    if driver == "nbd":
        found = _export(tree, prefix, spec, credentials)
    elif driver in _FILES or "filename" in tree:
        found = _file(tree, prefix, driver, spec)
    else:
        below = tree.pop("file", None)
        if not isinstance(below, dict):
            raise ConfigError(
                f"{prefix}file.filename is missing",
                hint="say driver=raw,file.filename=PATH, or driver=qcow2,file.filename=PATH",
            )
        found = _node(below, f"{prefix}file.", spec, credentials)
        if driver == "raw":
            part = Part(_size(tree, prefix, "offset") or 0, _size(tree, prefix, "size"))
            # What has no driver of its own is what lies below raw: a file.
            found = replace(found, format=found.format or "raw", parts=(*found.parts, part))
        else:
            if found.parts or found.format not in (None, "raw"):
                raise ConfigError(
                    f"{prefix}driver={driver or ''}: an image within an image cannot be served",
                    hint="its file has to be driver=file, driver=host_device or driver=nbd",
                )
            chain = _chain(tree, prefix) if driver in (None, "qcow2") else NO_CHAIN
            found = replace(found, format=driver, chain=chain)
    found = _general(tree, prefix, found)
    for key, value in tree.items():
        name = f"{prefix}{key}" + ("" if isinstance(value, str) else ".*")
        raise ConfigError(f"{name} is not known to the driver {driver or 'file'}")
    return found


def _file(tree: _Tree, prefix: str, driver: str | None, spec: StorageSpec) -> StorageSpec:
    if driver is not None and driver not in _FILES:
        raise ConfigError(
            f"{prefix}filename is not for the driver {driver}",
            hint=f"say {prefix}file.filename=PATH",
        )
    path = _text(tree, prefix, "filename")
    if not path:
        raise ConfigError(f"{prefix}filename is missing")
    if driver is None and is_uri(path):
        target = Target.parse(path)
        return replace(spec, path=str(target), format=None, parts=(), target=target)
    aio = _choice(tree, prefix, "aio", AIO_MODES) or spec.aio
    locking = _text(tree, prefix, "locking")
    if locking not in (None, "auto"):
        spec = replace(spec, locking=_switch(f"{prefix}locking", locking or ""))
    return replace(
        spec,
        path=path.removeprefix("file:"),
        # A file is served as it is; only where no driver is named at all is the format found.
        format="raw" if driver is not None and not prefix else None,
        parts=(),
        aio=aio,
        device=None if driver is None else driver == "host_device",
    )


def _export(tree: _Tree, prefix: str, spec: StorageSpec, credentials: Credentials) -> StorageSpec:
    """Read where an export is, in the words of QEMU's driver nbd, the older ones too."""
    server = tree.pop("server", None)
    if isinstance(server, str):
        raise ConfigError(f"{prefix}server takes {prefix}server.type and the like")
    name = f"{prefix}server." if server is not None else prefix
    place = dict(server) if server is not None else tree
    kind = _choice(place, name, "type", ("inet", "unix")) if server is not None else None
    path, host, port = (_text(place, name, key) for key in ("path", "host", "port"))
    if server:
        for key in place:
            raise ConfigError(f"{name}{key} is not known to the driver nbd")
    kind = kind or ("inet" if path is None else "unix")
    if kind == "unix":
        if not path or host is not None or port is not None:
            raise ConfigError(f"a Unix socket is named by {name}path, and nothing else")
        target = Target(socket=path)
    else:
        if not host or path is not None:
            raise ConfigError(f"a server is named by {name}host and {name}port")
        if port is not None and not (
            # Not longer, as Python reads no number of thousands of digits.
            port.isascii() and port.isdigit() and len(port) < 6 and 0 < int(port) < 65536
        ):
            raise ConfigError(f"{name}port={port} is not a port", hint="use 1 to 65535")
        target = Target(host=host.strip("[]"), port=DEFAULT_PORT if port is None else int(port))
    target = replace(target, export=_text(tree, prefix, "export") or "")
    named, hostname = _text(tree, prefix, "tls-creds"), _text(tree, prefix, "tls-hostname")
    if hostname is not None and named is None:
        raise ConfigError(f"{prefix}tls-hostname goes with {prefix}tls-creds only")
    target = replace(target, tls=named is not None)
    return replace(
        spec,
        path=str(target),
        format=None if prefix else "raw",
        parts=(),
        target=target,
        tls=None if named is None else credentials(named, hostname),
    )


def _chain(tree: _Tree, prefix: str) -> Chain:
    """Take what is said of a qcow2 image's data file, and of what lies behind it."""
    data = tree.pop("data-file", None)
    data_file = None if data is None else _path_of(data, f"{prefix}data-file")
    backing = tree.pop("backing", None)
    if backing == "":
        return Chain(data_file, has_backing=False)
    if backing is None:
        return Chain(data_file)
    if isinstance(backing, str):
        raise ConfigError(
            f"{prefix}backing={backing}: nodes with names cannot be referred to",
            hint=f"say {prefix}backing.file.filename=PATH, or {prefix}backing= for none",
        )
    place, name = dict(backing), f"{prefix}backing."
    driver = _choice(place, name, "driver", ("raw", "qcow2"))
    below = place.pop("file", None)
    path = None if below is None else _path_of(below, f"{name}file")
    chain = NO_CHAIN if driver == "raw" else _chain(place, name)
    for key, value in place.items():
        dots = "" if isinstance(value, str) else ".*"
        raise ConfigError(f"{name}{key}{dots} is not understood")
    return Chain(data_file, Backing(path, driver, chain))


def _path_of(said: str | _Tree, prefix: str) -> Path:
    """Give the path of a file behind an image: filename=, or file.filename= below raw."""
    if isinstance(said, str):
        raise ConfigError(f"{prefix} takes {prefix}.filename=PATH")
    place, name = dict(said), f"{prefix}."
    driver = _choice(place, name, "driver", (*_FILES, "raw"))
    if driver == "raw" or "file" in place:
        below = place.pop("file", {})
        found = _path_of(below, f"{name}file")
    else:
        path = _text(place, name, "filename")
        if not path:
            raise ConfigError(f"{name}filename is missing")
        found = Path(path.removeprefix("file:"))
    for key, value in place.items():
        dots = "" if isinstance(value, str) else ".*"
        raise ConfigError(f"{name}{key}{dots} is not understood")
    return found


def _general(tree: _Tree, prefix: str, spec: StorageSpec) -> StorageSpec:
    """Take the keys that all drivers know; those of upper drivers count more."""
    _text(tree, prefix, "node-name")
    _text(tree, prefix, "auto-read-only")
    if (word := _text(tree, prefix, "read-only")) is not None:
        spec = replace(spec, read_only=_switch(f"{prefix}read-only", word) or spec.read_only)
    if (word := _text(tree, prefix, "force-share")) is not None and _switch(
        f"{prefix}force-share", word
    ):
        if not spec.read_only:
            raise ConfigError(f"{prefix}force-share=on goes with read-only=on only")
        spec = replace(spec, locking=False)
    if (word := _text(tree, prefix, "discard")) is not None:
        spec = replace(spec, discard=discard_mode(word))
    if (mode := _choice(tree, prefix, "detect-zeroes", DETECT_ZEROES)) is not None:
        spec = replace(spec, detect_zeroes=mode)
    cache = tree.get("cache")
    if isinstance(cache, dict):
        cache, name = dict(cache), f"{prefix}cache."
        if (word := _text(cache, name, "direct")) is not None:
            spec = replace(spec, cache=spec.cache._replace(direct=_switch(f"{name}direct", word)))
        if (word := _text(cache, name, "no-flush")) is not None:
            flushes = not _switch(f"{name}no-flush", word)
            spec = replace(spec, cache=spec.cache._replace(flushes=flushes))
        if cache:
            raise ConfigError(f"{name}{next(iter(cache))} is not known")
        del tree["cache"]
    return spec


def _refusal(driver: str, prefix: str) -> str:
    if driver in KNOWN:
        return f"{prefix}driver={driver}: such images cannot be served"
    return f"{prefix}driver={driver}: there is no such driver"


def _text(tree: _Tree, prefix: str, key: str) -> str | None:
    value = tree.pop(key, None)
    if isinstance(value, dict):
        raise ConfigError(f"{prefix}{key} takes a value, and not {prefix}{key}.{next(iter(value))}")
    return value


def _size(tree: _Tree, prefix: str, key: str) -> int | None:
    word = _text(tree, prefix, key)
    try:
        return None if word is None else parse_size(word)
    except ConfigError as error:
        raise ConfigError(f"{prefix}{key}: {error}", hint=error.hint) from None


def _choice(tree: _Tree, prefix: str, key: str, words: tuple[_T, ...]) -> _T | None:
    word = _text(tree, prefix, key)
    if word is None:
        return None
    for known in words:
        if known == word:
            return known
    raise ConfigError(f"{prefix}{key}={word}: no such mode", hint=f"say {' or '.join(words)}")


def _switch(name: str, word: str) -> bool:
    if word not in _ON | _OFF:
        raise ConfigError(f"{name}={word} is neither on nor off")
    return (_ON | _OFF)[word]
