"""Waiting until udevd has processed a device and its partitions.

udevd announces each event that it has finished on a netlink group of its own. A listener that
was there before the device was attached misses none, so nothing is polled: who waits says which
devices must have been announced since. pyudev is imported only where udevd runs.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

_CONTROL = "/run/udev/control"
_UNIX_SOCKETS = Path("/proc/net/unix")
_SEQUENCE = Path("/sys/kernel/uevent_seqnum")


def runs() -> bool:
    """Tell whether a udevd runs whose announcements can be heard here.

    Looked up, not tried: udevd serves one control connection at a time. A udevd that was
    killed leaves the file behind, and one of another network namespace cannot be heard; neither
    is in this list.
    """
    try:
        listed = f" {_CONTROL}\n" in _UNIX_SOCKETS.read_text(errors="replace")
    except OSError:
        return False
    return listed and Path(_CONTROL).exists()


class Watch:
    """Listens to udevd from its making on; without a udevd it does nothing."""

    def __init__(self) -> None:
        self._monitor: Any = None
        self._since = 0
        if runs():
            self._monitor = _monitor()
            self.mark()

    @property
    def listening(self) -> bool:
        """Whether there is a udevd to wait for."""
        return self._monitor is not None

    def mark(self) -> None:
        """Let only events count that the kernel sends from now on.

        What udevd still has to do about the device's previous use must not be taken for the
        new one.
        """
        if self._monitor is not None:
            self._since = int(_SEQUENCE.read_text())

    def wait(self, names: Iterable[str], deadline: float) -> set[str]:
        """Wait until udevd has processed an event of each device since the mark.

        Args:
            names: kernel names, `nbd0p1`.
            deadline: of `time.monotonic()`.

        Returns:
            The names that are still missing at the deadline; empty if all is well, and where
            there is no udevd.
        """
        if self._monitor is None:
            return set()
        missing = set(names)
        while missing and (left := deadline - time.monotonic()) > 0:
            device = self._monitor.poll(left)
            if device is None:
                continue
            if device.sequence_number > self._since and device.action != "remove":
                missing.discard(device.sys_name)
        return missing

    def close(self) -> None:
        """Stop listening."""
        # pyudev closes the socket when the last reference goes.
        self._monitor = None

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _monitor() -> Any:
    try:
        from pyudev import Context, Monitor

        monitor = Monitor.from_netlink(Context(), source="udev")
        monitor.filter_by("block")
        monitor.start()
    except (ImportError, OSError):
        # No libudev: its udevd works, and nobody can tell us when.
        return None
    return monitor
