"""When to try again: at once, then soon, then ever more slowly, and never all at the same time.

Most servers that go away are restarted, and back within seconds. So for some seconds the pauses
stay short: a device that waits for its server loses no more than one of them.

Pure: the clock and the dice are passed in, so that a test can tell the future.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

FIRST: Final = 0.05
"""Seconds before the second attempt; the first one is made at once."""
FACTOR: Final = 2.0
QUICK: Final = 5.0
"""Seconds for which the pauses stay short, from the first failure on."""
SOON: Final = 1.0
"""Seconds between two attempts, at most, in the first minute: the time of a reboot."""
LONGEST: Final = 5.0
"""The same after that: a server that is back is not kept waiting for longer."""
_MINUTE: Final = 60.0
JITTER: Final = 0.25
"""Share of a pause by which it may be shorter or longer, so that a hundred clients of a server
that is back do not come all at once, again and again."""
CALM: Final = 1.0
"""Seconds that a connection must last before the next failure counts as the first one again. A
server that takes connections and drops them is not to be asked twenty times a second."""


class Backoff:
    """The pauses of one thing that is tried until it succeeds.

    Attributes:
        attempts: how many have failed since it was calm.
    """

    def __init__(
        self,
        *,
        first: float = FIRST,
        factor: float = FACTOR,
        quick: float = QUICK,
        soon: float = SOON,
        longest: float = LONGEST,
        jitter: float = JITTER,
        calm: float = CALM,
        dice: Callable[[], float] = random.random,
    ) -> None:
        """Begin without a failure.

        Args:
            first: seconds of the first pause.
            factor: by how much each pause is longer than the one before.
            quick: seconds from the first failure on in which they do not get longer.
            soon: seconds of a pause, at most, before jitter, in the first minute.
            longest: the same after that.
            jitter: share by which a pause is shorter or longer, below 1.
            calm: seconds that a success must last to count.
            dice: gives a number from 0 up to 1.
        """
        self.attempts = 0
        self._begun = 0.0
        self._longer = 0
        self._first = first
        self._factor = factor
        self._quick = quick
        self._soon = soon
        self._longest = longest
        self._jitter = jitter
        self._calm = calm
        self._dice = dice
        self._succeeded: float | None = None

    def failed(self, now: float) -> float:
        """Take note of a failure, of an attempt or of what had succeeded; say when to try again.

        Args:
            now: seconds on a clock that does not go back.

        Returns:
            A moment on the same clock; `now` if it is to be tried at once.
        """
        if self._succeeded is not None:
            if now - self._succeeded >= self._calm:
                self.attempts = 0
            self._succeeded = None
        self.attempts += 1
        if self.attempts == 1:
            self._begun, self._longer = now, 0
            return now
        if now - self._begun >= self._quick:
            self._longer += 1
        # The exponent is bounded: after a weekend of attempts there is no float for the power.
        exponent = min(max(0, self._longer - 1), 60)
        most = self._soon if now - self._begun < _MINUTE else self._longest
        pause = min(most, self._first * self._factor**exponent)
        return now + self.scattered(pause)

    def scattered(self, pause: float) -> float:
        """Give a pause that is a little shorter or longer than this one."""
        return pause * (1 + self._jitter * (2 * self._dice() - 1))

    def succeeded(self, now: float) -> None:
        """Take note of a success, which counts once it has lasted."""
        self._succeeded = now

    def hurry(self) -> None:
        """Begin anew: there is reason to believe that the next attempt succeeds."""
        self.attempts = 0
