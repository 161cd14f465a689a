"""Taking over an export's new size while the device is in use.

The kernel freezes a device's requests for that, so it is never done while a connection is dead:
it would wait for requests that nobody answers. A server need not serve on an old connection what
lies beyond the size that it told on it; so unless it is known to, the connections are renewed
first.
"""

from __future__ import annotations

import secrets
from dataclasses import replace

from nbdlink import kernel
from nbdlink.client.negotiate import Negotiation
from nbdlink.client.security import Security
from nbdlink.errors import ConfigError, KernelError
from nbdlink.link import record
from nbdlink.link.attach import secure
from nbdlink.link.record import Record
from nbdlink.link.renew import health, known_of, renew
from nbdlink.link.spec import restore
from nbdlink.protocol.claim import NO_TESTIMONY, Claim, Testimony


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
    size, testimony = _ask(known)
    if (
        known.size is None
        or size <= known.size
        or known.signature is None
        or testimony.signature != known.signature
        or health(known).dead
    ):
        return None
    with record.held(index, 1.0):
        _take_over(known_of(index), size)
    return size


def resize(index: int, size: int | None = None) -> int:
    """Take over an export's size, or a given one.

    Args:
        index: N of `/dev/nbdN`.
        size: bytes, not more than the export has; None for all of it.

    Returns:
        The device's size in bytes.

    Raises:
        ConfigError: the export is not that large.
        KernelError: the device has a dead connection that cannot be renewed.
    """
    known = known_of(index)
    offered, testimony = _ask(known)
    if size is not None and size > offered:
        raise ConfigError(
            f"{known.title}: the export has only {offered} bytes",
            hint="leave the size out to take all of it",
        )
    wanted = offered if size is None else size
    if wanted < known.block_size:
        raise ConfigError(f"{known.title}: {wanted} bytes are less than a block")
    if known.size != offered:
        # From here on this is the size that its connections are to have.
        with record.held(index, 5.0):
            record.write(replace(known_of(index), size=offered))
    if health(known_of(index)).dead or (offered != known.size and not testimony.fences):
        renew(index, everything=not testimony.fences)
    if health(known_of(index)).dead:
        raise KernelError(
            f"{known.title}: not all of its connections could be renewed, and with a dead one it "
            "cannot be resized"
        )
    with record.held(index, 5.0):
        _take_over(known_of(index), wanted, offered)
    return wanted


def _take_over(known: Record, size: int, offered: int | None = None) -> None:
    kernel.resize(known.index, size)
    record.write(replace(known, size=offered or size))


def _ask(known: Record) -> tuple[int, Testimony]:
    """Ask the server for an export's size and signature."""
    spec = restore(known.spec, known.name, f"/dev/nbd{known.index}")
    spec, securities = secure(spec)
    security: Security = securities[spec.target]
    with Negotiation(spec.target, timeout=spec.negotiation_timeout, security=security) as talk:
        # Of a device that nobody has: it takes effect with GO only.
        testimony = talk.claim(Claim(secrets.token_hex(16), 0, 0)) if talk.fixed else NO_TESTIMONY
        return talk.info().size, testimony
