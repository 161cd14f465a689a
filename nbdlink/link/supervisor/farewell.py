"""Letting go of dead devices while the machine goes down.

A configured link lets I/O wait for minutes when its server is away, and a file system is not
unmounted before its I/O is done. At shutdown that would be a hang that nothing ends but systemd's
patience. So nbdlink-shutdown.service, which is stopped first, leaves a mark; from then on the
supervisor, which is stopped last, gives a device whose server is gone some seconds more and then
disconnects it: its I/O fails, the file system is unmounted, and the machine goes down.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections.abc import Iterable
from typing import Final

from nbdlink.errors import NBDError
from nbdlink.link import record
from nbdlink.link.attach import detach
from nbdlink.link.supervisor.watched import Watched

_log = logging.getLogger("nbdlink.supervisor")

MARK: Final = "shutdown"
"""The file in /run/nbdlink that says that the machine goes down."""
GRACE_SECONDS: Final = 10.0
"""For which a server may still come back: what is unwritten is lost otherwise."""


class Farewell:
    """Remembers since when devices are dead while the machine goes down."""

    def __init__(self) -> None:
        self._since: dict[int, float] = {}

    def look(self, links: Iterable[Watched], now: float) -> None:
        """Let go of what has been dead for too long, if the machine goes down."""
        for link in self.overdue(links, now):
            _log.warning(
                "%s: its server is gone and the machine goes down: what was not written is lost",
                link.title,
            )
            arguments = (f"/dev/nbd{link.index}",)
            threading.Thread(target=_let_go, args=arguments, name="farewell", daemon=True).start()

    def overdue(self, links: Iterable[Watched], now: float) -> list[Watched]:
        """Give what is to be let go of; each device once."""
        if not (record.DIRECTORY / MARK).exists():
            self._since.clear()
            return []
        dead = {link.index: link for link in links if link.index is not None and _is_dead(link)}
        self._since = {index: self._since.get(index, now) for index in dead}
        late = [n for n, since in self._since.items() if now >= since + GRACE_SECONDS]
        self._since.update((index, math.inf) for index in late)
        return [dead[index] for index in late]


def _is_dead(link: Watched) -> bool:
    return link.health is not None and bool(link.health.dead) and not link.health.live


def _let_go(path: str) -> None:
    with contextlib.suppress(NBDError):  # it stays occupied until it has been unmounted
        detach(path, force=True)
