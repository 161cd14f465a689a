"""A link as a file describes it, made of what was said for it and by default."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

from nbdlink.client.security import Security, TLSOptions
from nbdlink.errors import ConfigError
from nbdlink.link.config.settings import SETTINGS, Place, Value, Values
from nbdlink.link.record import check_name
from nbdlink.link.spec import LinkSpec
from nbdlink.toml.words import at
from nbdlink.transport.tlsfiles import CredentialFiles, printable
from nbdlink.uri import Target

_KEYS_OF_PSK: Final = ("tls-psk", "tls-username")
_KEYS_OF_X509: Final = (
    "tls-certificates",
    "tls-cert",
    "tls-key",
    "tls-ca",
    "tls-crl",
    "tls-passphrase",
)


DEAD_TIMEOUT: Final = 300
"""Seconds for which I/O waits if nothing else is said. A link in a file is one that a supervisor
looks after, so its server may take the time of a reboot."""


@dataclass(frozen=True, slots=True)
class ConfiguredLink:
    """A link as a file describes it.

    Attributes:
        spec: what to attach; its name is the link's.
        source: `file:line`, for messages.
        notes: what was said in the file and has no effect here, in sentences for the log.
    """

    spec: LinkSpec
    source: str
    notes: tuple[str, ...] = ()


def configure(
    name: str,
    said: Values,
    source: str,
    *,
    defaults: Values | None = None,
    notes: tuple[str, ...] = (),
) -> ConfiguredLink:
    """Make a link of what was said for it.

    What the link itself says counts more than a default. A default is also dropped where it
    would only contradict the link: a weaker `tls` if the target is `nbds://`, all of `tls-*` if
    the link says `tls = "off"`, credentials of one kind if it names the other, `export` if the
    target names one, and `tls-road` if there is no TLS.

    Raises:
        ConfigError: what was said contradicts itself.
    """
    try:
        check_name(name)
    except ConfigError as error:
        raise at(source, error) from None
    if "target" not in said:
        raise ConfigError(
            f"{printable(source)}: the link {name!r} has no target",
            hint='say target = "nbd://HOST/EXPORT"',
        )
    values = {**_inherited(defaults or {}, said), **said}
    target, paths = _routes(said, values)
    fields: dict[Place, dict[str, Any]] = {"route": {}, "link": {}, "tls": {}, "files": {}}
    for key, value in values.items():
        fields[SETTINGS[key].place][SETTINGS[key].field] = value.value
    options = TLSOptions(files=CredentialFiles(**fields["files"]), **fields["tls"])
    policy = _tls_policy(target, options, values["target"].source)
    for path in paths:
        if _tls_policy(path, options, values["paths"].source) != "require" == policy:
            raise ConfigError(
                f"{printable(values['paths'].source)}: {path} goes without TLS, which the target "
                "demands",
                hint="say nbds:// in all of them",
            )
    if policy == "off" and fields["link"].get("tls_road", "auto") != "auto":
        if "tls-road" in said:
            raise ConfigError(
                f"{printable(said['tls-road'].source)}: tls-road is said, and yet no TLS is "
                "asked for",
                hint='say nbds:// or tls = "require"',
            )
        del fields["link"]["tls_road"]
    fields["link"].setdefault("dead_timeout", DEAD_TIMEOUT)
    spec = LinkSpec(target=target, paths=paths, name=name, tls=options, **fields["link"])
    return ConfiguredLink(spec, source, notes)


def _inherited(defaults: Values, said: Values) -> dict[str, Value]:
    """Give the defaults that hold for a link."""
    target: Target = said["target"].value
    dropped: set[str] = set()
    if "tls" in said and said["tls"].value == "off":
        dropped.update(key for key in defaults if key.startswith("tls-"))
    if target.tls and "tls" in defaults and defaults["tls"].value != "require":
        dropped.add("tls")
    kind = target.tls_type
    if kind == "x509" or target.tls_certificates or any(key in said for key in _KEYS_OF_X509):
        dropped.update(_KEYS_OF_PSK)
    if kind == "psk" or target.tls_psk_file or "tls-psk" in said:
        dropped.update(_KEYS_OF_X509)
    return {key: value for key, value in defaults.items() if key not in dropped}


def _routes(said: Values, values: Values) -> tuple[Target, tuple[Target, ...]]:
    """Give the target and the further routes, which must be different ones."""
    first = values["target"]
    routes = [(first.value, first.source)]
    if "paths" in values:
        routes += [(path, values["paths"].source) for path in values["paths"].value]
    seen: dict[tuple[str | None, int, str | None, str], str] = {}
    for number, (route, source) in enumerate(routes):
        if "export" in values:
            export = values["export"]
            if not route.export:
                route = _with_export(route, export)
            elif "export" in said and route.export != export.value:
                raise ConfigError(
                    f"{printable(export.source)}: the export is named twice: {route.export!r} in "
                    f"{route}, and {export.value!r}",
                    hint="leave one of them out",
                )
            routes[number] = (route, source)
        host = None if route.socket else (route.host or "localhost").casefold().rstrip(".")
        key = (host, 0 if route.socket else route.port, route.socket, route.export)
        if key in seen:
            raise ConfigError(
                f"{printable(source)}: {route} is the same way as {seen[key]}",
                hint="name each way to the export once; more connections are `connections`",
            )
        seen[key] = str(route)
    target, *paths = [route for route, _ in routes]
    return target, tuple(paths)


def _with_export(route: Target, export: Value) -> Target:
    try:
        return Target.parse(str(replace(route, export=export.value)))  # which checks the name
    except ConfigError as error:
        raise at(export.source, error) from None


def _tls_policy(target: Target, options: TLSOptions, source: str) -> str:
    try:
        return Security(target, options).policy
    except ConfigError as error:
        raise at(source, error) from None
