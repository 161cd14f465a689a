"""Where an export is: NBD URIs and the short forms that people type.

Source of the URI form: `doc/uri.md` of the NBD project, and RFC 3986. Examples of what
`Target.parse` takes, all of them naming the export `data`::

    nbd://store1/data           nbd+unix:///data?socket=/run/nbd.sock
    nbds://store1:10810/data    store1/data      store1:10810/data     [fd00::1]/data
"""

from __future__ import annotations

import urllib.parse
from dataclasses import dataclass
from typing import Final, Literal

from nbdlink.errors import ConfigError

DEFAULT_PORT: Final = 10809
_SCHEMES: Final = ("nbd", "nbds", "nbd+unix", "nbds+unix")
_PARAMETERS: Final = (
    "socket",
    "tls-type",
    "tls-hostname",
    "tls-verify-peer",
    "tls-certificates",
    "tls-psk-file",
)
TLSType = Literal["anon", "x509", "psk"]


@dataclass(frozen=True, slots=True)
class Target:
    """An export and the way to it.

    Attributes:
        host: name or address (v6 without brackets), or None for a Unix socket.
        port: TCP port.
        socket: path of a Unix socket, or None for TCP; an abstract one begins with NUL.
        export: the export's name; the empty name is the server's default export.
        tls: whether the connection must be encrypted (`nbds`).
        username: for TLS with pre-shared keys, or None.
        tls_type: kind of TLS credentials, or None if not said.
        tls_hostname: the name that the server's certificate must have, or None for `host`.
        tls_verify_peer: whether the server's identity is verified, or None if not said.
        tls_certificates: directory of X.509 files, or None.
        tls_psk_file: file of pre-shared keys, or None.
    """

    host: str | None = None
    port: int = DEFAULT_PORT
    socket: str | None = None
    export: str = ""
    tls: bool = False
    username: str | None = None
    tls_type: TLSType | None = None
    tls_hostname: str | None = None
    tls_verify_peer: bool | None = None
    tls_certificates: str | None = None
    tls_psk_file: str | None = None

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read a URI or a short form.

        Raises:
            ConfigError: the text is neither; the message says which part is wrong.
        """
        if not text:
            raise ConfigError(
                "an empty target names no server", hint="say host, host:port/export or an NBD URI"
            )
        try:
            if "://" in text or is_uri(text):
                return _parse_uri(text)
            return _parse_short(text)
        except UnicodeDecodeError:
            raise ConfigError(f"{text!r}: percent-encoded bytes are not valid UTF-8") from None

    @property
    def address(self) -> str:
        """The server without the export, for messages."""
        if self.socket is not None:
            return "@" + self.socket[1:] if self.socket.startswith("\0") else self.socket
        host = self.host or ""
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    def __str__(self) -> str:
        """Give the canonical URI: `Target.parse` of it gives an equal target."""
        scheme = ("nbds" if self.tls else "nbd") + ("+unix" if self.socket is not None else "")
        user = urllib.parse.quote(self.username, safe="") + "@" if self.username else ""
        if self.socket is None:
            host = self.host or ""
            # The % before a zone as well, or what follows could be taken for an encoded byte.
            quoted = urllib.parse.quote(host, safe=":")
            authority = user + (f"[{quoted}]" if ":" in host else quoted)
            if self.port != DEFAULT_PORT:
                authority += f":{self.port}"
        else:
            authority = user
        query = {
            "socket": self.socket,
            "tls-type": self.tls_type,
            "tls-hostname": self.tls_hostname,
            "tls-verify-peer": None if self.tls_verify_peer is None else str(+self.tls_verify_peer),
            "tls-certificates": self.tls_certificates,
            "tls-psk-file": self.tls_psk_file,
        }
        said = {key: value for key, value in query.items() if value is not None}
        path = urllib.parse.quote(self.export, safe="/")
        if path or said or self.socket is not None:
            path = "/" + path
        words = [
            f"{key}={urllib.parse.quote(value, errors='surrogateescape')}"
            for key, value in said.items()
        ]
        tail = "?" + "&".join(words) if words else ""
        return f"{scheme}://{authority}{path}{tail}"


def is_uri(text: str) -> bool:
    """Tell an NBD URI, be it right or wrong, from a path or another word."""
    scheme, colon, rest = text.partition(":")
    scheme = scheme.lower()
    return bool(colon) and scheme in _SCHEMES and ("+" in scheme or rest.startswith("//"))


def _parse_short(text: str) -> Target:
    # nbd:HOST:PORT or nbd:unix:PATH; a host may be called nbd.
    if text.startswith("nbd:") and ":" in text.removeprefix("nbd:").partition("/")[0]:
        raise ConfigError(f"{text!r} is how QEMU once wrote it", hint="say nbd://host:port/export")
    if text.startswith(("/", "./", "../")):
        raise ConfigError(
            f"{text!r} is a path, not a server",
            hint="serve a file first (nbdlink serve); for a Unix socket say "
            f"nbd+unix:///?socket={urllib.parse.quote(text, errors='surrogateescape')}",
        )
    place, slash, export = text.partition("/")
    if slash and text.startswith("["):
        closing = text.find("]")
        place, _, export = text[closing:].partition("/")
        place = text[:closing] + place
    host, port = _parse_authority(place, text)
    return Target(host=host, port=port, export=_checked_export(export, text))


def _parse_authority(authority: str, text: str) -> tuple[str, int]:
    """Split host[:port]; a v6 address needs brackets."""
    if authority.startswith("["):
        host, bracket, rest = authority[1:].partition("]")
        if not bracket:
            raise ConfigError(f"{text!r}: the bracket of the IPv6 address is not closed")
        if ":" not in host:
            raise ConfigError(f"{text!r}: {host!r} in brackets is not an IPv6 address")
        if rest and not rest.startswith(":"):
            raise ConfigError(f"{text!r}: {rest!r} behind the IPv6 address is not a port")
        port = rest[1:]
    else:
        if authority.count(":") > 1:
            raise ConfigError(
                f"{text!r}: an IPv6 address needs brackets", hint=f"say [{authority}]"
            )
        host, _, port = authority.partition(":")
    if not host:
        raise ConfigError(f"{text!r}: the host is missing")
    if any(c.isspace() or not c.isprintable() for c in host):
        raise ConfigError(f"{text!r}: {host!r} is not a host name")
    return host, _parse_port(port, text) if port else DEFAULT_PORT


def _parse_port(port: str, text: str) -> int:
    # Cut, as Python reads no number of thousands of digits.
    number = int(port.lstrip("0")[:6] or 0) if port.isascii() and port.isdigit() else 0
    if not 0 < number < 65536:
        raise ConfigError(f"{text!r}: {port!r} is not a port (1 to 65535)")
    return number


def _checked_export(name: str, text: str) -> str:
    if "\0" in name:
        raise ConfigError(f"{text!r}: an export's name cannot contain NUL")
    if not _is_unicode(name):
        raise ConfigError(f"{text!r}: the export's name is not valid Unicode")
    if (length := len(name.encode())) > 4096:
        raise ConfigError(f"an export's name of {length} bytes is too long (4096)")
    return name


def _is_unicode(text: str) -> bool:
    """Tell whether no byte of what was typed had to be taken over as it is."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parse_uri(text: str) -> Target:
    scheme, _, rest = text.partition(":")
    scheme = scheme.lower()
    if scheme not in _SCHEMES:
        raise ConfigError(
            f"{text!r}: {scheme!r} is not an NBD URI's scheme", hint="use " + ", ".join(_SCHEMES)
        )
    if "#" in rest:
        raise ConfigError(f"{text!r}: an NBD URI has no fragment", hint="write # as %23")
    rest, _, query = rest.partition("?")
    if rest.startswith("//"):
        authority, slash, path = rest[2:].partition("/")
        path = slash + path
    else:
        authority, path = "", rest
    export = _checked_export(urllib.parse.unquote(path.removeprefix("/"), errors="strict"), text)
    parameters = _parse_query(query, text)
    user, at, place = authority.rpartition("@")
    username = urllib.parse.unquote(user, errors="strict") if at else None
    if not _is_unicode(user):
        raise ConfigError(f"{text!r}: the user's name is not valid Unicode")
    tls = scheme.startswith("nbds")
    if "\0" in parameters.get("tls-hostname", "") + urllib.parse.unquote(place, errors="strict"):
        raise ConfigError(f"{text!r}: a host's name cannot contain NUL")
    common = {
        "export": export,
        "tls": tls,
        "username": username or None,
        "tls_type": _parse_tls_type(parameters.get("tls-type"), text),
        "tls_hostname": parameters.get("tls-hostname"),
        "tls_verify_peer": _parse_switch("tls-verify-peer", parameters, text),
        "tls_certificates": parameters.get("tls-certificates"),
        "tls_psk_file": parameters.get("tls-psk-file"),
    }
    if not tls and (said := [key for key in parameters if key.startswith("tls-")]):
        raise ConfigError(
            f"{text!r}: {said[0]} has no effect on a connection without TLS",
            hint=f"say {scheme.replace('nbd', 'nbds')}://",
        )
    if scheme.endswith("+unix"):
        if place:
            raise ConfigError(f"{text!r}: a Unix socket has no host", hint="write three slashes")
        if not (path_of_socket := parameters.get("socket")):
            raise ConfigError(
                f"{text!r}: the Unix socket is not named", hint="add ?socket=/path/of/socket"
            )
        if "\0" in path_of_socket[1:]:
            raise ConfigError(f"{text!r}: a socket's path cannot contain NUL")
        return Target(socket=path_of_socket, **common)  # type: ignore[arg-type]
    if "socket" in parameters:
        raise ConfigError(
            f"{text!r}: socket= belongs to a Unix socket", hint=f"say {scheme}+unix://"
        )
    # The scheme's host may be percent-encoded; brackets stay outside of that.
    host, port = _parse_authority(place or "localhost", text)
    host = urllib.parse.unquote(host, errors="strict")
    return Target(host=host, port=port, **common)  # type: ignore[arg-type]


def _parse_query(query: str, text: str) -> dict[str, str]:
    parameters: dict[str, str] = {}
    # "+" is a plus sign in an NBD URI: the rules are RFC 3986's, not those of HTML forms.
    for part in filter(None, query.split("&")):
        key, _, value = part.partition("=")
        key = urllib.parse.unquote(key, errors="strict").lower()
        if key.startswith("x-"):
            continue
        if key not in _PARAMETERS:
            import difflib  # only a mistake pays for it

            near = difflib.get_close_matches(key, _PARAMETERS, 1)
            raise ConfigError(
                f"{text!r}: unknown parameter {key!r}",
                hint=f"did you mean {near[0]}?" if near else "known: " + ", ".join(_PARAMETERS),
            )
        if key in parameters:
            raise ConfigError(f"{text!r}: {key} is given twice")
        parameters[key] = urllib.parse.unquote(value, errors="strict")
    return parameters


def _parse_tls_type(value: str | None, text: str) -> TLSType | None:
    match value:
        case None:
            return None
        case "anon" | "x509" | "psk":
            return value
    raise ConfigError(f"{text!r}: tls-type is {value!r}", hint="use anon, x509 or psk")


def _parse_switch(key: str, parameters: dict[str, str], text: str) -> bool | None:
    value = parameters.get(key)
    if value is not None and value not in ("0", "1"):
        raise ConfigError(f"{text!r}: {key} is {value!r}", hint="use 0 or 1")
    return None if value is None else value == "1"
