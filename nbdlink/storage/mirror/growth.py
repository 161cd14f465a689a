"""How a mirror becomes larger, with its members and while it is in use.

See rule 13 of `nbdlink.storage.mirror.storage`.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from nbdlink.sizes import format_size
from nbdlink.storage.mirror.intent import Intent
from nbdlink.storage.mirror.members import words
from nbdlink.storage.mirror.record import most_bytes

if TYPE_CHECKING:
    from nbdlink.storage.mirror.storage import Mirror

_log = logging.getLogger("nbdlink.mirror")


class Growth:
    """Lets a mirror grow, once at a time."""

    def __init__(self, mirror: Mirror, intent: Intent) -> None:
        """Prepare; `intent` is the mirror's."""
        self._mirror = mirror
        self._intent = intent
        self._one_at_a_time = threading.Lock()
        self._told_limit = False

    def notice(self) -> None:
        """Grow if all members have that are written to; that it cannot is told in the log."""
        mirror = self._mirror
        with self._one_at_a_time:
            members = mirror.membership.enter()
            try:
                for each in members:
                    if each.storage:
                        each.storage.notice_growth()
                with mirror.lock:
                    size = self._common_size()
                    if size <= mirror.size or mirror.is_closing:
                        return
                    mirror.least = size
            finally:
                with mirror.lock:
                    mirror.membership.leave(members)
            try:
                self._grow(size)
            except OSError as error:
                _log.error("%s cannot grow: %s", mirror.name, words(error))

    def _common_size(self) -> int:
        """Give the bytes that all have which are written to; the lock is held."""
        mirror = self._mirror
        size = min(
            each.storage.size for each in mirror.members if each.storage and each.takes_writes
        )
        size = size // mirror.minimum_block * mirror.minimum_block
        most = most_bytes(mirror.region)
        if size > most and not self._told_limit:
            self._told_limit = True
            _log.warning(
                "%s: its members have more than %s; restart the server to use all of them",
                mirror.name,
                format_size(most),
            )
        return min(size, most)

    def _grow(self, size: int) -> None:
        """Take what all members have to a size.

        Raises:
            OSError: it cannot be recorded.
        """
        mirror = self._mirror
        regions = range(mirror.size // mirror.region, -(-size // mirror.region))
        self._intent.begin(regions)
        # If this fails they stay in the bitmap: there may be copies that tell of the new size.
        mirror.membership.record_size(size)
        with mirror.lock:
            first = next(each for each in mirror.members if each.is_complete)
            for each in mirror.members:
                if each is not first and each.takes_writes:
                    each.fall_behind(regions)
            mirror.size = size
            mirror.lock.notify_all()
        self._intent.end(regions)
        _log.warning("%s has grown to %s", mirror.name, format_size(size))
