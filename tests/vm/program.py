"""How the programs of this package end."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from . import TimedOutError, VMError, show

TIMED_OUT = 124
"""Exit status: the guest's command took too long (as `timeout` has it)."""

BROKEN = 125
"""Exit status: there was no machine, or it died."""

INTERRUPTED = 130
"""Exit status: Ctrl-C, or a signal to the same end."""


def reported(work: Callable[[], int]) -> int:
    """Do a program's work: errors become lines and exit statuses."""
    try:
        with _signals_unwind():
            return work()
    except VMError as error:
        show.complain(error)
        return TIMED_OUT if isinstance(error, TimedOutError) else BROKEN
    except (KeyboardInterrupt, BrokenPipeError):
        return INTERRUPTED


@contextlib.contextmanager
def _signals_unwind() -> Iterator[None]:
    """Let SIGTERM and SIGHUP act like Ctrl-C, so that no guest stays behind."""

    def unwind(number: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt(signal.Signals(number).name)

    previous = {number: signal.signal(number, unwind) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
