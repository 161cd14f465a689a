"""Locks on ranges of blocks, within one process."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class RangeLock:
    """Lets many threads work on different ranges at once, and one at a time on the same.

    It is made for a few dozen holders: each looks through all of them.
    """

    def __init__(self) -> None:
        self._held: list[tuple[int, int, bool]] = []
        self._changed = threading.Condition(threading.Lock())

    @contextlib.contextmanager
    def hold(self, first: int, last: int, *, exclusive: bool) -> Iterator[None]:
        """Hold the blocks from `first` to `last`, both included; wait until that can be.

        Who holds them not exclusively shares them with others who do not, either. A thread that
        holds a range must not ask for another one.
        """
        mine = (first, last, exclusive)
        with self._changed:
            self._changed.wait_for(lambda: not self._is_taken(mine))
            self._held.append(mine)
        try:
            yield
        finally:
            with self._changed:
                self._held.remove(mine)
                self._changed.notify_all()

    def _is_taken(self, wanted: tuple[int, int, bool]) -> bool:
        first, last, exclusive = wanted
        return any(
            begin <= last and first <= end and (exclusive or alone)
            for begin, end, alone in self._held
        )
