"""Ending connections that are alive, so that others can take their place."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Collection
from pathlib import Path
from typing import Final

from nbdlink.errors import KernelError
from nbdlink.kernel import sockets, sysfs
from nbdlink.link.health import health
from nbdlink.link.record import Channel, Record, network

_ENDING: Final = 2.0
"""Seconds that the kernel may take to notice that a connection was ended."""
_POLL_SECONDS: Final = 0.001


def end(known: Record, numbers: Collection[int]) -> None:
    """End what is alive of these channels, and wait until the driver has given them up.

    Raises:
        KernelError: one that is alive cannot be ended from here; nothing was done about it.
    """
    doomed = _living(known, numbers)
    for number in doomed:
        each = known.channels[number]
        if each.relay is not None and _is_relay(each.relay):
            with contextlib.suppress(ProcessLookupError):
                os.kill(each.relay, signal.SIGTERM)
        elif each.cookie is None or not _can_be_seen(each):
            raise KernelError(
                f"{known.title}: a connection that is alive cannot be ended, as its socket is not "
                "known here",
                hint="do it in the network namespace in which the device was attached, or detach "
                "the device and attach it again",
            )
        elif not sockets.destroy(each.cookie) and _living(known, [number]):
            raise KernelError(
                f"{known.title}: a connection over a Unix socket that is alive cannot be ended "
                "from outside",
                hint="restart its server, or detach the device and attach it again",
            )
    if doomed:
        _await_end(known, [cookie for n in doomed if (cookie := known.channels[n].cookie)])


def _is_relay(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip() == "nbdlink-relay"
    return False


def _await_end(known: Record, cookies: Collection[int]) -> None:
    """Wait until the driver has given connections up; it tells by shutting the sockets down."""
    deadline = time.monotonic() + _ENDING
    while sockets.connected(cookies):
        if time.monotonic() >= deadline:
            raise KernelError(f"{known.title}: the kernel does not give up a connection that ended")
        time.sleep(_POLL_SECONDS)
    # The socket is told before the driver's receiver, which is woken by that.
    while (links := sysfs.live_links()) and time.monotonic() < deadline:
        still = sockets.connected([each.cookie for each in known.channels if each.cookie])
        if still is None or links.get(known.index, 0) <= len(still):
            return
        time.sleep(_POLL_SECONDS)


def _living(known: Record, numbers: Collection[int]) -> list[int]:
    cookies = {n: known.channels[n].cookie for n in numbers}
    alive = sockets.connected([cookie for cookie in cookies.values() if cookie])
    if alive is None:
        return list(numbers)
    # Of those that cannot be seen only the kernel's count tells, as it told who wants their end.
    unseen = [n for n in numbers if not _can_be_seen(known.channels[n])]
    counted = health(known).live if unseen else ()
    return [n for n in numbers if cookies[n] in alive or (n in unseen and n in counted)]


def _can_be_seen(channel: Channel) -> bool:
    return channel.cookie is not None and channel.network == network()
