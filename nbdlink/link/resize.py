"""Taking over an export's new size while the device is in use.

The kernel freezes a device's requests for that, so it is never done while a connection is dead:
it would wait for requests that nobody answers. A server need not serve on an old connection what
lies beyond the size that it told on it; so unless it is known to, the connections are renewed
first.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import Final

from nbdlink import kernel
from nbdlink.client.negotiate import Negotiation
from nbdlink.client.security import Security
from nbdlink.errors import ConfigError, KernelError, NBDError
from nbdlink.link import record
from nbdlink.link.attach import secure
from nbdlink.link.health import health
from nbdlink.link.identity import is_proved, known_of, require_same
from nbdlink.link.record import Record
from nbdlink.link.renew import renew
from nbdlink.link.spec import restore
from nbdlink.protocol.claim import NO_TESTIMONY, Claim
from nbdlink.uri import Target

_PATIENCE: Final = 20.0
"""Seconds to wait for who is renewing the device: a supervisor's attempt takes up to 15."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a server says of an export.

    Attributes:
        size: bytes.
        fences: whether it lets nothing of a connection's predecessor live.
        proved: whether its signature proves that it is the device's export.
    """

    size: int
    fences: bool
    proved: bool


def follow(index: int) -> int | None:
    """Take over that an export has grown, if the server proves that it is the same one.

    Args:
        index: N of `/dev/nbdN`.

    Returns:
        The new size in bytes, or None if it is as it was.

    Raises:
        KernelError, TransportError, OptionError, RemoteProtocolError: it cannot be found out.
    """
    known = known_of(index)
    answers = [_ask(known, route, security) for route, security in _routes(known)]
    size = min(answer.size for answer in answers)
    if (
        known.size is None
        or size <= known.size
        or not all(answer.proved for answer in answers)
        or health(known).dead
    ):
        return None
    with record.held(index, 1.0):
        _take_over(known, size, size)
    return size


def resize(index: int, size: int | None = None) -> int:
    """Take over an export's size, or a given one.

    Args:
        index: N of `/dev/nbdN`.
        size: bytes, not more than the export has; None for all of it.

    Returns:
        The device's size in bytes.

    Raises:
        ConfigError: the export is not that large, or has become smaller and no size is given.
        ForeignExportError: it is not the export that the device was attached to.
        KernelError: the device has a dead connection that cannot be renewed.
    """
    known = known_of(index)
    answers = [_ask(known, route, security) for route, security in _routes(known)]
    offered = min(answer.size for answer in answers)
    fences = all(answer.fences for answer in answers)
    if size is not None and size > offered:
        raise ConfigError(
            f"{known.title}: the export has only {offered} bytes",
            hint="leave the size out to take all of it",
        )
    if size is None and known.size is not None and offered < known.size:
        name = known.name or f"/dev/nbd{index}"
        raise ConfigError(
            f"{known.title}: the export has {offered} bytes now, less than the device",
            hint=f"nbdlink resize {name} {offered} gives up what is behind",
        )
    wanted = offered if size is None else size
    if wanted < known.block_size:
        raise ConfigError(f"{known.title}: {wanted} bytes are less than a block")
    if known.size != offered:
        # From here on this is the size that its connections are to have.
        _expect(known, offered)
    try:
        if health(known_of(index)).dead or (offered != known.size and not fences):
            renew(index, everything=not fences, wait=_PATIENCE)
        if health(known_of(index)).dead:
            raise KernelError(
                f"{known.title}: not all of its connections could be renewed, and with a dead one "
                "it cannot be resized"
            )
    except NBDError:
        # Or a supervisor would take an export of that size for the device's, from then on.
        if known.size is not None and known.size != offered:
            _expect(known, known.size)
        raise
    with record.held(index, _PATIENCE):
        _take_over(known, wanted, offered)
    return wanted


def _expect(known: Record, size: int) -> None:
    """Take note of which size an export must have to be the device's."""
    with record.held(known.index, _PATIENCE):
        require_same(known)
        record.write(replace(known_of(known.index), size=size))


def _take_over(known: Record, size: int, offered: int) -> None:
    require_same(known)
    kernel.resize(known.index, size)
    record.write(replace(known_of(known.index), size=offered))


def _routes(known: Record) -> list[tuple[Target, Security]]:
    """Give the routes that the device's connections take: what one says, another need not."""
    spec = restore(known.spec, known.name, f"/dev/nbd{known.index}")
    spec, securities = secure(spec)
    used = {each.route for each in known.channels}
    taken = [route for route in spec.routes if str(route) in used]
    return [(route, securities[route]) for route in taken or spec.routes]


def _ask(known: Record, route: Target, security: Security) -> _Answer:
    """Ask a server for an export's size and signature.

    Raises:
        ForeignExportError: it is not the export that the device was attached to.
    """
    timeout = known.spec["negotiation_timeout"]
    with Negotiation(route, timeout=timeout, security=security) as talk:
        # Of a device that nobody has: it takes effect with GO only.
        testimony = talk.claim(Claim(secrets.token_hex(16), 0, 0)) if talk.fixed else NO_TESTIMONY
        proved = is_proved(known, route, testimony.signature)
        return _Answer(talk.info().size, testimony.fences, proved)
