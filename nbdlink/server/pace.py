"""When a connection's thread should let its client finish before it wakes.

A client with a deep queue on the same processor is interrupted by each request it sends: the
server wakes, answers that one request, and sleeps again. With 4 KiB requests, sixteen in flight,
that was measured as three requests for a switch of tasks instead of fifteen, and twice the
processor time for each. A thread with the policy SCHED_BATCH does not interrupt whom it is woken
by (sched(7)), so the queue is taken as a whole.

The same policy costs latency where somebody else keeps the processor busy. So it is tried for a
short while, and kept only as long as it pays: `Pace` compares how fast requests are answered
with and without it. A client that leaves the server waiting is never a reason for it.
"""

from __future__ import annotations

import contextlib
import os
from typing import Final

_BUSY: Final = 3000.0
"""Receives per second from which on a connection is busy enough for the policy to matter."""
_GAIN: Final = 1.03
"""How many times as fast it must be with the policy as without."""
_LOOKS: Final = 4
"""Looks that a trial lasts, and that the ordinary policy is watched before one."""
_LOSS: Final = 0.5
"""The part of the ordinary rate below which a trial ends at once."""
_PAUSE: Final = 0.05
"""Seconds without the policy after it did not pay; doubled each time, up to `_LONGEST`."""
_LONGEST: Final = 60.0
_BELIEVED: Final = 10.0
"""Seconds after which the ordinary policy is looked at again."""


class Pace:
    """Decides on the policy for one thread, which calls `look` every few receives.

    Attributes:
        batch: whether the policy is SCHED_BATCH now.
    """

    def __init__(self, now: float) -> None:
        """Begin with the ordinary policy.

        Args:
            now: seconds, of any steady clock.
        """
        self.batch = False
        self._at = now
        self._requests = self._inboxes = 0
        self._looks = 0  # with the present policy
        self._rate = 0.0  # requests per second with it, lately
        self._ordinary = 0.0  # and with the ordinary one, when it was left
        self._pause = _PAUSE
        self._until = now + _PAUSE  # when the present policy is to be given up

    def look(self, now: float, requests: int, inboxes: int) -> bool:
        """Take note of how far things have come; tell whether `batch` has changed.

        Args:
            now: seconds.
            requests: how many have been answered.
            inboxes: how many receives there have been.
        """
        elapsed = max(now - self._at, 1e-9)
        rate = (requests - self._requests) / elapsed
        receives = (inboxes - self._inboxes) / elapsed
        self._at, self._requests, self._inboxes = now, requests, inboxes
        self._looks += 1
        self._rate = rate if self._looks == 1 else self._rate + (rate - self._rate) / _LOOKS
        if not self.batch:
            if receives < _BUSY:
                self._looks = 0
            if self._looks < _LOOKS or now < self._until:
                return False
            self._ordinary = self._rate
            self._change(now + _BELIEVED)
            return True
        if self._looks < _LOOKS and rate > _LOSS * self._ordinary:
            return False
        if self._rate > _GAIN * self._ordinary:
            if now < self._until:
                return False
            self._pause = _PAUSE
            self._change(now)  # to see whether it still pays
            return True
        self._change(now + self._pause)
        self._pause = min(2 * self._pause, _LONGEST)
        return True

    def _change(self, until: float) -> None:
        self.batch = not self.batch
        self._until = until
        self._looks = 0


def set_policy(*, batch: bool) -> None:
    """Set the calling thread's scheduling policy, unless an administrator has chosen another."""
    before, after = os.SCHED_OTHER, os.SCHED_BATCH
    if not batch:
        before, after = after, before
    with contextlib.suppress(OSError):  # some systems forbid it
        if os.sched_getscheduler(0) == before:
            os.sched_setscheduler(0, after, os.sched_param(0))
