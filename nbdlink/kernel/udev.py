"""Waiting until udevd has processed a device and its partitions; and the kernel's own uevents.

udevd announces each event that it has finished on a netlink group of its own. A listener that
was there before the device was attached misses none, so nothing is polled: who waits says which
devices must have been announced since. pyudev is imported only where it is used.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CONTROL = "/run/udev/control"
_UNIX_SOCKETS = Path("/proc/net/unix")
_QUEUE = Path("/run/udev/queue")
"""There while udevd has anything to do."""
_SEQUENCE = Path("/sys/kernel/uevent_seqnum")
_ROOM = 16 << 20
"""Bytes for what is not heard at once: others are announced as well, hundreds when a machine
starts, while the kernel binds a device and a slow server lets its partitions be read."""
_GLANCE = 0.1
_DEVICE = re.compile(r"nbd(0|[1-9][0-9]*)(p[1-9][0-9]*)?\Z")


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
        lost = False
        while missing and (left := deadline - time.monotonic()) > 0:
            try:
                device = self._monitor.poll(min(left, _GLANCE) if lost else left)
            except OSError:
                _clear_error(self._monitor.fileno())
                lost = True  # and theirs may be among it
                continue
            if device is None:
                if lost and not _QUEUE.exists():
                    return set()
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

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class Uevent:
    """What the kernel says of an nbd device or of one of its partitions.

    Attributes:
        action: "add", "remove", "change" and the like (`lib/kobject_uevent.c`).
        index: N of `/dev/nbdN`.
        partition: whether it is about a partition of it.
        resized: whether it says that the size is another (`set_capacity_and_notify`).
    """

    action: str
    index: int
    partition: bool
    resized: bool


class Uevents:
    """Listens to the kernel itself, so that it works with and without a udevd.

    What udevd makes of an event (its links, its properties) has not been done yet when it is
    heard here.

    Raises:
        ImportError, OSError: there is no libudev, or no such socket to be had.
    """

    def __init__(self) -> None:
        from pyudev import Context, Monitor

        self._monitor: Any = Monitor.from_netlink(Context(), source="kernel")
        self._monitor.filter_by("block")
        self._monitor.start()

    def fileno(self) -> int:
        """Give the descriptor that is readable when there is something to receive."""
        return int(self._monitor.fileno())

    def receive(self) -> Uevent | None:
        """Give the next one, without waiting, or None if there is none.

        Raises:
            OSError: events were lost (ENOBUFS).
        """
        while (device := self._next()) is not None:
            if match := _DEVICE.match(device.sys_name):
                return Uevent(
                    device.action,
                    int(match[1]),
                    partition=match[2] is not None,
                    resized=device.properties.get("RESIZE") == "1",
                )
        return None

    def _next(self) -> Any:
        try:
            return self._monitor.poll(0)
        except OSError:
            number = _clear_error(self.fileno())
            raise OSError(number or errno.ENOBUFS, "uevents were lost") from None

    def close(self) -> None:
        """Stop listening."""
        # pyudev closes the socket when the last reference goes.
        self._monitor = None


def _clear_error(descriptor: int) -> int:
    """Take a monitor's error away, and give it.

    pyudev (0.24) says so instead of receiving, without the reason, and would for ever.
    """
    with socket.socket(fileno=os.dup(descriptor)) as same:
        return same.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


def _monitor() -> Any:
    try:
        from pyudev import Context, Monitor

        monitor = Monitor.from_netlink(Context(), source="udev")
        monitor.filter_by("block")
        with contextlib.suppress(OSError):  # it takes CAP_NET_ADMIN
            monitor.set_receive_buffer_size(_ROOM)
        monitor.start()
    except (ImportError, OSError):
        # No libudev: its udevd works, and nobody can tell us when.
        return None
    return monitor
