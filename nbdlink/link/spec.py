"""What an administrator asks for when a link is to be made, and how it is kept."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal

from nbdlink.client.negotiate import DEFAULT_TIMEOUT
from nbdlink.client.security import NO_OPTIONS, TLSOptions
from nbdlink.errors import ConfigError
from nbdlink.link.record import TLSRoad, check_name
from nbdlink.transport.tlsfiles import CredentialFiles
from nbdlink.uri import Target

Road = Literal["auto", "netlink", "ioctl"]

MAX_CONNECTIONS: Final = 64
"""More sockets than this are a typing error: the kernel keeps a thread's worth of state each."""

SECTOR: Final = 512
_LONGEST: Final = 86400


@dataclass(frozen=True, slots=True)
class LinkSpec:
    """What an administrator asks for.

    Attributes:
        target: server and export.
        device: `/dev/nbdN`, or None to let the kernel pick a free one.
        name: the link's name, or None.
        connections: how many sockets to spread requests over.
        read_only: bind it read-only even if the export could be written.
        block_size: logical block size in bytes, or None for 512 or the server's minimum.
        timeout: seconds after which a request is given up on its connection.
        dead_timeout: seconds for which I/O waits once no connection is left.
        road: netlink, ioctl, or whichever there is.
        negotiation_timeout: seconds for connecting and negotiating each connection.
        wait: seconds to wait for the partitions, or None not to wait at all.
        tls: what is demanded of TLS, beside what the target says.
        tls_road: who does it: "kernel", "relay", or "auto" for the kernel if it can.
        paths: further routes to the same export; the channels are spread over all of them.
    """

    target: Target
    device: str | None = None
    name: str | None = None
    connections: int = 1
    read_only: bool = False
    block_size: int | None = None
    timeout: int = 30
    dead_timeout: int = 0
    road: Road = "auto"
    negotiation_timeout: float = DEFAULT_TIMEOUT
    wait: float | None = 30.0
    tls: TLSOptions = NO_OPTIONS
    tls_road: TLSRoad = "auto"
    paths: tuple[Target, ...] = ()

    @property
    def routes(self) -> tuple[Target, ...]:
        """Every way to the export, the first one being the target."""
        return (self.target, *self.paths)


_KEPT: Final = (
    "connections",
    "read_only",
    "block_size",
    "timeout",
    "dead_timeout",
    "road",
    "negotiation_timeout",
    "tls_road",
)


def describe(spec: LinkSpec) -> dict[str, Any]:
    """Give what makes up a link, apart from its name and device, as JSON can keep it."""
    return {
        "target": str(spec.target),
        "paths": [str(path) for path in spec.paths],
        **{key: getattr(spec, key) for key in _KEPT},
        "tls": asdict(spec.tls) if any(route.tls for route in spec.routes) else {},
    }


def restore(description: Mapping[str, Any], name: str | None, device: str) -> LinkSpec:
    """Make a specification of what `describe` gave.

    Raises:
        ConfigError: it is not of this version.
    """
    try:
        tls = NO_OPTIONS
        if said := description["tls"]:
            tls = TLSOptions(**{**said, "files": CredentialFiles(**said["files"])})
        return LinkSpec(
            target=Target.parse(description["target"]),
            paths=tuple(Target.parse(path) for path in description["paths"]),
            name=name,
            device=device,
            tls=tls,
            **{key: description[key] for key in _KEPT},
        )
    except (KeyError, TypeError):
        raise ConfigError(
            f"{device}: what was recorded of it is not understood",
            hint=f"nbdlink detach {device}, and attach it again",
        ) from None


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Name what two descriptions differ in, in the words of options."""
    return [
        field.name.replace("_", "-")
        for field in fields(LinkSpec)
        if one.get(field.name) != other.get(field.name)
    ]


def check(spec: LinkSpec) -> None:
    """Refuse numbers and names that no server and no kernel could make good.

    Raises:
        ConfigError: the message says which, and what is possible.
    """
    if spec.name is not None:
        check_name(spec.name)
    if not 1 <= spec.connections <= MAX_CONNECTIONS:
        raise ConfigError(
            f"{spec.connections} connections are not possible", hint=f"use 1 to {MAX_CONNECTIONS}"
        )
    size = spec.block_size
    if size is not None and (not SECTOR <= size <= mmap.PAGESIZE or size & (size - 1)):
        raise ConfigError(
            f"a block size of {size} bytes is not possible",
            hint=f"the kernel takes a power of two from {SECTOR} to {mmap.PAGESIZE}",
        )
    if not 1 <= spec.timeout <= _LONGEST:
        # 0 would not mean "none": the kernel then falls back to 30 seconds.
        raise ConfigError(f"a timeout of {spec.timeout} seconds is not possible (1 to {_LONGEST})")
    if not 0 <= spec.dead_timeout <= _LONGEST:
        raise ConfigError(
            f"a dead timeout of {spec.dead_timeout} seconds is not possible (0 to {_LONGEST})"
        )
