"""A channel: one connection of a device, made ready for the kernel.

A connection without TLS goes to the kernel as it is. One with TLS has two roads: the kernel does
the TLS itself, with the connection's keys; or, where it cannot, a relay does it for the kernel.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from nbdlink.errors import TLSError
from nbdlink.kernel.sockets import cookie
from nbdlink.link.record import Channel, TLSRoad, network
from nbdlink.transport.stream import Wire

if TYPE_CHECKING:
    from nbdlink.transport.tls import TLSStream


@dataclass(frozen=True, slots=True)
class Channels:
    """Connections that are ready for the kernel.

    Attributes:
        sockets: what to give to the kernel.
        known: what is known of each, but for its route and its place's past.
    """

    sockets: tuple[socket.socket, ...]
    known: tuple[Channel, ...]


_TAKEN_WITHIN: Final = 0.8
"""Share of a request's timeout within which a server's machine has to take what is sent to it."""
_PROBES: Final = 4
"""How often within that time an idle server is asked whether it lives."""


def prepare(
    wires: Sequence[Wire], road: TLSRoad, name: str, stack: ExitStack, *, timeout: int
) -> Channels:
    """Make connections in transmission ready for the kernel.

    Args:
        wires: the connections; those with TLS are used up.
        road: who is to do TLS.
        name: the device's or link's name, for the log of a relay.
        stack: closes the sockets.
        timeout: seconds after which the kernel sends a request again, by another connection.

    Raises:
        TLSError: the kernel was asked for and cannot do it.
        TransportError: the relay cannot be started.
    """
    sockets: list[socket.socket | None] = []
    known: list[Channel] = []
    relayed: list[TLSStream] = []
    for wire in wires:
        _limit(wire, timeout)
        if isinstance(wire, socket.socket):
            sockets.append(wire)
            known.append(Channel("none"))
            continue
        from nbdlink.transport import ktls  # for TLS only

        assert wire.session is not None
        why = ktls.obstacle(wire) if road != "relay" else "the relay was asked for"
        if why is None:
            sock = stack.enter_context(ktls.hand_over(wire))
        elif road == "kernel":
            raise TLSError(
                f"the kernel cannot do TLS for this connection: {why}",
                hint="use --tls-road auto, or see `nbdlink doctor`",
            )
        else:
            relayed.append(wire)
            sock = None
        sockets.append(sock)
        known.append(
            Channel("relay" if why else "kernel", wire.session.version, wire.session.cipher, why)
        )
    if relayed:
        from nbdlink.transport.relay import start

        relay, ends = start(relayed, name)
        for end in ends:
            stack.enter_context(end)
            number = sockets.index(None)
            sockets[number] = end
            known[number] = replace(known[number], relay=relay)
    ready = tuple(sock for sock in sockets if sock is not None)
    here = network()
    told = (
        replace(each, cookie=cookie(sock), network=here)
        for each, sock in zip(known, ready, strict=True)
    )
    return Channels(ready, tuple(told))


def _limit(wire: Wire, timeout: int) -> None:
    """Have a connection end, and forget what it has to send, before its requests time out.

    The kernel sends a request that timed out again at once, by another connection of the device
    if one lives. TCP would still try to deliver the first one, for many minutes, and a write
    that arrives so late overtakes what was written since: only the successor of its own
    connection fences it, and not every server does. What TCP has given up never arrives.
    """
    if wire.family == socket.AF_UNIX:
        return
    seconds = _TAKEN_WITHIN * timeout
    wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))
    # With that, how many probes an idle server leaves unanswered does not count any more
    # (`tcp_keepalive_timer`): only the time does, after the first of them.
    pause = max(1, int(seconds / _PROBES))
    wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, pause)
    wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, pause)
