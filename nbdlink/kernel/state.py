"""What state a device is in, told no better than is known.

The kernel's own word is not enough: STATUS says "connected" of any device that has a
configuration, even with every connection dead, and sysfs shows the pid of a process that has
long gone. What is known without asking the server, and without rights: whether the device has
been started (`pid`), and how many of its connections still have a receiver
(`sysfs.live_links`). What only the server can tell is found out by reading a block, when asked
to (`probe`).
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from nbdlink.errors import KernelError
from nbdlink.kernel import module, sysfs, usage
from nbdlink.kernel.sysfs import Partition

DEFAULT_DEADLINE = 2.0


class DeviceState(StrEnum):
    """The states; only one of them is good."""

    FREE = "free"
    """Nothing is attached."""

    ATTACHED = "attached"
    """At least one connection is up, or the probe read a block."""

    STALLED = "stalled"
    """The probe's read has not come back: the server is silent, or I/O waits for a renewal."""

    DEAD = "dead"
    """No connection is left, or the probe's read failed; I/O fails or waits for a renewal."""

    UNKNOWN = "unknown"
    """Attached once, and nothing can be seen of its connections from here."""


@dataclass(frozen=True, slots=True)
class DeviceStatus:
    """Everything the kernel shows of one device.

    Attributes:
        index: N of `/dev/nbdN`.
        path: `/dev/nbdN`.
        state: see `DeviceState`.
        size: bytes; 0 if free.
        read_only: whether writes are refused.
        block_size: logical block size in bytes.
        backend: the backend identifier, or None.
        road: "netlink" or "ioctl", None if free.
        pid: the process that started the device, or None if nothing is attached. Over netlink
            it may well be gone.
        pid_alive: whether a process with that number exists.
        connected: whether the device has been started and not yet been given up.
        live_links: how many connections are up, None if that is not to be seen from here.
        partitions: by number, with their sizes and mounts.
        mounts: mount points of the whole device.
        probe_errno: what the probe's read gave: 0, an errno, or None without a probe or an
            answer.
    """

    index: int
    path: str
    state: DeviceState
    size: int
    read_only: bool
    block_size: int
    backend: str | None
    road: str | None
    pid: int | None
    pid_alive: bool
    connected: bool
    live_links: int | None
    partitions: tuple[Partition, ...]
    mounts: tuple[str, ...]
    probe_errno: int | None = None


def status(index: int, *, probe: bool = False, deadline: float = DEFAULT_DEADLINE) -> DeviceStatus:
    """Tell everything about one device; needs no rights without `probe`.

    Args:
        index: N of `/dev/nbdN`.
        probe: read a block, to find out what only the server knows.
        deadline: seconds to wait for it.

    Raises:
        KernelError: there is no such device.
        ModuleMissingError: there is no driver.
    """
    if not sysfs.exists(index):
        module.require_loaded()
        raise KernelError(f"/dev/nbd{index} does not exist", errno=errno.ENODEV)
    return _statuses([index], probe, deadline)[0]


def devices(*, probe: bool = False, deadline: float = DEFAULT_DEADLINE) -> list[DeviceStatus]:
    """Tell everything about every device, free ones included; no driver, no devices.

    Args:
        probe: read a block of each that may live; all at once.
        deadline: seconds to wait for the slowest.
    """
    return _statuses(sysfs.indices(), probe, deadline)


def _statuses(indices: list[int], probe: bool, deadline: float) -> list[DeviceStatus]:
    attached = {index for index in indices if sysfs.pid(index) is not None}
    links = sysfs.settled_links(attached) if attached else {}
    mounted = usage.mounts() if attached else []
    found = [_passive(index, links.get(index), mounted) for index in indices]
    if probe:
        found = _probed(found, deadline)
    return found


def _passive(index: int, links: int | None, mounted: list[usage.Mount]) -> DeviceStatus:
    pid = sysfs.pid(index)
    size = sysfs.size(index)
    if pid is None:
        state, links = DeviceState.FREE, None
    elif links == 0 or size == 0:
        # Without a size it has been cleared while somebody still holds it open.
        state = DeviceState.DEAD
    else:
        state = DeviceState.UNKNOWN if links is None else DeviceState.ATTACHED
    road = None if pid is None else "netlink" if sysfs.over_netlink(index) else "ioctl"
    return DeviceStatus(
        index=index,
        path=f"/dev/nbd{index}",
        state=state,
        size=size,
        read_only=sysfs.read_only(index),
        block_size=sysfs.block_size(index),
        backend=sysfs.backend(index),
        road=road,
        pid=pid,
        pid_alive=pid is not None and Path(f"/proc/{pid}").exists(),
        connected=pid is not None,
        live_links=links,
        partitions=tuple(
            replace(part, mounts=usage.mount_points(part.name, mounted))
            for part in sysfs.partitions(index)
        ),
        mounts=usage.mount_points(f"nbd{index}", mounted),
    )


def _probed(found: list[DeviceStatus], deadline: float) -> list[DeviceStatus]:
    from nbdlink.kernel.probe import read_a_block

    # The dead ones are known; asking them would only cost the deadline.
    asked = [s.index for s in found if s.state in (DeviceState.ATTACHED, DeviceState.UNKNOWN)]
    results = read_a_block(asked, deadline)
    return [_with_answer(s, results[s.index]) if s.index in results else s for s in found]


def _with_answer(status: DeviceStatus, answer: int | None) -> DeviceStatus:
    if answer in (errno.EPERM, errno.EACCES, errno.ENOENT):
        return replace(status, probe_errno=answer)  # not allowed, or no node: nothing learnt
    if answer is None:
        return replace(status, state=DeviceState.STALLED)
    state = DeviceState.DEAD if answer else DeviceState.ATTACHED
    return replace(status, state=state, probe_errno=answer)
