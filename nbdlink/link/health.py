"""Which of a device's channels are connected.

The kernel tells how many are, but not which. That is known from their sockets
(`nbdlink.kernel.sockets`), whose cookies the record has.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from nbdlink.kernel import sockets, sysfs
from nbdlink.link.record import Record, network

Look = Callable[[Collection[int]], set[int] | None]
"""Gives those of some cookies whose sockets are connected, or None if nobody can tell."""


@dataclass(frozen=True, slots=True)
class Health:
    """Which of a device's channels are connected.

    Attributes:
        live: numbers of channels.
        dead: numbers of channels.
    """

    live: tuple[int, ...]
    dead: tuple[int, ...]


def health(known: Record, look: Look = sockets.connected) -> Health:
    """Tell which of a device's channels are connected.

    Of channels whose socket is not known (the record was lost), or cannot be seen from here (it
    is in another network namespace), only the number of the dead is: then the first ones are
    said to be.

    Args:
        known: the device.
        look: gives those of some cookies that are connected; for who has looked already.
    """
    numbers = range(len(known.channels))
    here = network()
    visible = {n: each.cookie for n, each in enumerate(known.channels) if each.network == here}
    alive = look([cookie for cookie in visible.values() if cookie])
    live = [n for n, cookie in visible.items() if alive is not None and cookie in alive]
    unknown = [n for n in numbers if alive is None or not visible.get(n)]
    if unknown:
        total = sysfs.settled_links({known.index}).get(known.index)
        missing = 0 if total is None else max(0, len(live) + len(unknown) - total)
        live = sorted(live + unknown[min(missing, len(unknown)) :])
    return Health(tuple(live), tuple(n for n in numbers if n not in live))


def count_live(known: Record, look: Look = sockets.connected) -> int | None:
    """Count a device's live channels; None unless the socket of each can be seen from here."""
    here = network()
    cookies = {each.cookie for each in known.channels if each.network == here and each.cookie}
    if not cookies or len(cookies) != len(known.channels):
        return None
    alive = look(cookies)
    return None if alive is None else len(alive)


def looked(cookies: Iterable[int | None]) -> Look:
    """Look at all these sockets at once; the kernel lists every one of the machine each time."""
    alive = sockets.connected([cookie for cookie in cookies if cookie])
    return lambda wanted: None if alive is None else alive.intersection(wanted)


def strayed(known: Record) -> tuple[int, ...]:
    """Give the numbers of the channels that do not take the route that is theirs."""
    routes = [known.spec.get("target"), *known.spec.get("paths", ())]
    return tuple(
        number
        for number, each in enumerate(known.channels)
        if each.route not in (None, routes[number % len(routes)])
    )
