"""A channel: one connection of a device, made ready for the kernel.

A connection without TLS goes to the kernel as it is. One with TLS has two roads: the kernel does
the TLS itself, with the connection's keys; or, where it cannot, a relay does it for the kernel.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from nbdlink.errors import TLSError
from nbdlink.kernel.sockets import inode
from nbdlink.link.record import Channel, TLSRoad, network
from nbdlink.transport.stream import Wire

if TYPE_CHECKING:
    from nbdlink.transport.tls import TLSStream


@dataclass(frozen=True, slots=True)
class Channels:
    """Connections that are ready for the kernel.

    Attributes:
        sockets: what to give to the kernel.
        known: what is known of each, but for its route and generation.
    """

    sockets: tuple[socket.socket, ...]
    known: tuple[Channel, ...]


def prepare(wires: Sequence[Wire], road: TLSRoad, name: str, stack: ExitStack) -> Channels:
    """Make connections in transmission ready for the kernel.

    Args:
        wires: the connections; those with TLS are used up.
        road: who is to do TLS.
        name: the device's or link's name, for the log of a relay.
        stack: closes the sockets.

    Raises:
        TLSError: the kernel was asked for and cannot do it.
        TransportError: the relay cannot be started.
    """
    sockets: list[socket.socket | None] = []
    known: list[Channel] = []
    relayed: list[TLSStream] = []
    for wire in wires:
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
        replace(each, inode=inode(sock), network=here)
        for each, sock in zip(known, ready, strict=True)
    )
    return Channels(ready, tuple(told))
