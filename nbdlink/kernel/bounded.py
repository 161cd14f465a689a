"""Running what the kernel may block, without being blocked with it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Aside(Generic[T]):
    """A call that runs in a thread of its own.

    A system call on a device whose server is silent sleeps where no signal reaches it, and a
    process cannot end before it has come back. So use this only for calls that somebody is
    going to end: for what may never come back there is a process of its own
    (`nbdlink.kernel.probe`).
    """

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._value: T | None = None
        self._error: BaseException | None = None
        # A daemon, so that the interpreter does not wait for it at exit.
        self._thread = threading.Thread(target=self._run, daemon=True, name="nbdlink-aside")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:  # handed to the caller in `result`
            self._error = error

    def result(self, seconds: float) -> T:
        """Give what the call gave, or raise what it raised.

        Raises:
            TimeoutError: it has not come back within `seconds`; it goes on running.
        """
        self._thread.join(max(0.0, seconds))
        if self._thread.is_alive():
            raise TimeoutError
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]  # None only where T allows it
