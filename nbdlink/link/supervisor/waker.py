"""Signals, and threads that have something to tell, as something that a loop can wait for."""

from __future__ import annotations

import contextlib
import signal
import socket


class Waker:
    """A descriptor that becomes readable when a signal came or a thread has something to tell."""

    def __init__(self) -> None:
        self._ours, self._theirs = socket.socketpair()
        self._ours.setblocking(False)
        self._theirs.setblocking(False)
        self._before: list[tuple[int, object]] = []
        self._fd = -1
        self._came: set[int] = set()

    def __enter__(self) -> Waker:
        self._fd = signal.set_wakeup_fd(self._theirs.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            self._before.append((number, signal.signal(number, self._take_note)))
        return self

    def _take_note(self, number: int, _: object) -> None:
        self._came.add(number)  # for its byte there may be no room

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._fd)
        for number, handler in self._before:
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._ours.close()
        self._theirs.close()

    def fileno(self) -> int:
        """Give the descriptor."""
        return self._ours.fileno()

    def wake(self) -> None:
        """Make it readable; from any thread."""
        with contextlib.suppress(OSError):  # full: it is readable; closed: nobody waits
            self._theirs.send(b"\0")

    def signals(self) -> set[int]:
        """Give the signals that came since the last time, each once."""
        with contextlib.suppress(BlockingIOError):
            while len(self._ours.recv(4096)) == 4096:
                pass
        came, self._came = self._came, set()
        return came
