"""Locks on ranges of blocks, within one process."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class RangeLock:
    """Lets many threads work on different ranges at once, and one at a time on the same.

    They come to their turn in the order in which they asked: each waits for those before it that
    hold, or wait for, something of the same, so that nobody waits for ever, nor for one who waits
    for him. It is made for a few dozen threads: each looks through all the others.
    """

    def __init__(self) -> None:
        self._asked: list[_Wish] = []  # in that order; some hold theirs, the others wait
        self._changed = threading.Condition(threading.Lock())

    @contextlib.contextmanager
    def hold(self, first: int, last: int, *, exclusive: bool) -> Iterator[None]:
        """Hold the blocks from `first` to `last`, both included; wait until that can be.

        Who holds them not exclusively shares them with others who do not, either. A thread that
        holds a range must not ask for another one.
        """
        mine = _Wish(first, last, exclusive)
        with self._changed:
            self._asked.append(mine)
            try:
                self._changed.wait_for(lambda: self._is_free(mine))
            except BaseException:
                self._leave(mine)
                raise
        try:
            yield
        finally:
            with self._changed:
                self._leave(mine)

    def _leave(self, mine: _Wish) -> None:
        self._asked.remove(mine)
        self._changed.notify_all()

    def _is_free(self, mine: _Wish) -> bool:
        """Tell whether nobody is before me; the lock is held."""
        for other in self._asked:
            if other is mine:
                break
            if other.conflicts(mine):
                return False
        return True


class _Wish:
    """What somebody holds or waits for. Two of them are never equal."""

    __slots__ = ("exclusive", "first", "last")

    def __init__(self, first: int, last: int, exclusive: bool) -> None:
        self.first = first
        self.last = last
        self.exclusive = exclusive

    def conflicts(self, other: _Wish) -> bool:
        """Tell whether the two cannot hold theirs at the same time."""
        return (
            self.first <= other.last
            and other.first <= self.last
            and (self.exclusive or other.exclusive)
        )
