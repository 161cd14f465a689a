"""Attaching: negotiated sockets in, a block device with its node and partitions out.

Theory of operation. The listener to udevd opens first, so that it misses nothing. CONNECT
binds the sockets; it fails with EBUSY if anybody has the device open, were it udevd having a
look for some milliseconds, so that is tried again for a while unless the device is truly
attached. The kernel reads the partition table at the first open that follows, not before, and
until then shows the partitions of the previous use. So we open the device ourselves, udevd or
not; when that open returns, the partitions in sysfs are true, and devtmpfs has their nodes.
Then udevd is given time to announce each of them.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from nbdlink.errors import DeviceBusyError, KernelError
from nbdlink.kernel import module, sysfs
from nbdlink.kernel.bounded import Aside
from nbdlink.kernel.sysfs import Partition

Road = Literal["auto", "netlink", "ioctl"]

BUSY_SECONDS = 2.0
"""How long somebody else's glance at a free device is waited out."""

_LOOK_SECONDS = 0.25
_RECEIVERS_SECONDS = 2.0
"""For which no worker comes for a connection, before none is believed to come."""
_SMALLEST_BLOCK = 512
_MULTI_CONN = 1 << 8
_SIZE_LIMIT = 1 << 63


@dataclass(frozen=True, slots=True)
class Binding:
    """What the kernel is to be told; checked as far as it can be checked without the kernel.

    Attributes:
        sockets: descriptors of connections in the transmission phase, simple replies only.
        size: bytes.
        transmission_flags: as the server announced them.
        block_size: logical block size in bytes, a power of two from 512 to the page size.
        timeout: seconds a request may take.
        dead_timeout: seconds that I/O waits for a renewal once no connection is left.
        identifier: the backend identifier, or None; not on the ioctl road.
        index: N of `/dev/nbdN`, or None for a free one.
    """

    sockets: tuple[int, ...]
    size: int
    transmission_flags: int
    block_size: int = 4096
    timeout: int = 30
    dead_timeout: int = 0
    identifier: str | None = None
    index: int | None = None

    def __post_init__(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        block = self.block_size
        if not _SMALLEST_BLOCK <= block <= page or block & (block - 1):
            raise _invalid(
                f"a block size of {block} bytes is not possible",
                f"the kernel takes a power of two from {_SMALLEST_BLOCK} to {page}",
            )
        if not 0 < self.size < _SIZE_LIMIT:
            raise _invalid(f"a device of {self.size} bytes is not possible")
        if not self.sockets:
            raise _invalid("a device needs at least one connection")
        if len(self.sockets) > 1 and not self.transmission_flags & _MULTI_CONN:
            raise _invalid(
                f"{len(self.sockets)} connections are not possible: the server does not promise "
                "that they see the same data (no MULTI_CONN flag)",
                "use one connection",
            )
        if self.timeout < 1:
            # 0 would make the kernel fall back to 30 seconds without closing the connection.
            raise _invalid(f"a timeout of {self.timeout} seconds is not possible")
        if self.dead_timeout < 0:
            raise _invalid(f"a dead timeout of {self.dead_timeout} seconds is not possible")


@dataclass(frozen=True, slots=True)
class Device:
    """An attached device.

    Attributes:
        index: N of `/dev/nbdN`.
        path: `/dev/nbdN`.
        partitions: those that the kernel found; empty if nobody waited for them.
        road: "netlink" or "ioctl".
        reason: why it is the ioctl road although netlink would have been preferred, or None.
        missing: devices (`nbd0p1`) that udevd had not processed in time; it may still do so.
        pid: what sysfs shows: over ioctl the process that holds the device.
    """

    index: int
    path: str
    partitions: tuple[Partition, ...]
    road: str
    reason: str | None = None
    missing: tuple[str, ...] = ()
    pid: int | None = None


def attach(binding: Binding, *, road: Road = "auto", wait: float | None = 30.0) -> Device:
    """Bind sockets to a device.

    The kernel keeps references to the sockets of its own, so the caller may close his as soon
    as this returns, and the device outlives the calling process.

    Args:
        binding: what to bind, and where.
        road: "auto" takes ioctls if and only if the netlink family is missing.
        wait: seconds for the node, the partition scan and udevd; None waits for nothing, and
            then nobody may have read the partition table.

    Raises:
        DeviceBusyError: the device is attached already, or somebody keeps it open.
        RightsError: CAP_SYS_ADMIN is missing.
        ModuleMissingError: there is no driver and none could be loaded.
        KernelError: anything else the kernel refuses; the server does not answer the first
            read; there is no node. The device is detached again in that case. With EAGAIN it is
            worth to be tried again, with new connections.
    """
    module.require()
    if wait is None:
        index, taken, reason = _bind(binding, road, lambda: None)
        _require_receivers(index, taken, len(binding.sockets))
        return Device(index, f"/dev/nbd{index}", (), taken, reason, (), sysfs.pid(index))
    from nbdlink.kernel.udev import Watch

    deadline = time.monotonic() + wait
    with Watch() as watch:
        index, taken, reason = _bind(binding, road, watch.mark)
        _require_receivers(index, taken, len(binding.sockets))
        try:
            partitions = _scan(index, deadline, watch.listening)
            names = [f"nbd{index}", *(partition.name for partition in partitions)]
            missing = watch.wait(names, deadline)
        except BaseException:
            _undo(index, taken)
            raise
    late = tuple(sorted(missing))
    path = f"/dev/nbd{index}"
    return Device(index, path, partitions, taken, reason, late, sysfs.pid(index))


def reconfigure(
    index: int,
    sockets: Sequence[int] = (),
    *,
    timeout: int | None = None,
    dead_timeout: int | None = None,
    identifier: str | None = None,
) -> None:
    """Give a device new connections in place of dead ones, or other timeouts.

    A live connection is not replaced: the kernel drops the surplus socket without a word. Can
    block in the kernel. With an `identifier`, the kernel refuses if the device has another one:
    then it is not the use of it any more that was meant.

    Raises:
        KernelError: it is not attached over netlink; RightsError: as the name says.
    """
    from nbdlink.kernel import netlink

    _require_attached(index)
    netlink.reconfigure(
        index,
        sockets=sockets,
        timeout=timeout,
        dead_timeout=dead_timeout,
        identifier=identifier or sysfs.backend(index),
    )


def resize(index: int, size: int) -> None:
    """Change the size of an attached device, in bytes.

    Raises:
        KernelError: it is not attached, or has no live connection: the kernel would wait for
            the requests in flight with the device locked.
    """
    _require_attached(index)
    if not 0 < size < _SIZE_LIMIT:
        raise _invalid(f"a device of {size} bytes is not possible")
    if not sysfs.has_live_link(index):
        raise KernelError(
            f"/dev/nbd{index} has no live connection, so it cannot be resized",
            hint="renew its connections first",
        )
    if sysfs.over_netlink(index):
        from nbdlink.kernel import netlink

        netlink.reconfigure(index, size=size, identifier=sysfs.backend(index))
    else:
        from nbdlink.kernel import ioctl

        ioctl.resize(index, size)


def busy_error(index: int) -> DeviceBusyError:
    """Say by what a device is occupied."""
    path = f"/dev/nbd{index}"
    if sysfs.pid(index) is not None:
        backend = sysfs.backend(index)
        to_what = f" to {backend}" if backend else ""
        return DeviceBusyError(
            f"{path} is attached already{to_what} ({sysfs.size(index)} bytes)",
            errno=errno.EBUSY,
            hint=f"nbdlink detach {path}, or name another device, or none",
        )
    from nbdlink.kernel import usage

    who = "; ".join(map(str, usage.openers(index)[:3])) or "somebody has it open"
    return DeviceBusyError(
        f"{path} is free but busy: {who}",
        errno=errno.EBUSY,
        hint="name another device, or none",
    )


def _bind(binding: Binding, road: Road, mark: Callable[[], None]) -> tuple[int, str, str | None]:
    """Bind; give the index, the road that was taken, and why if it was not asked for."""
    reason = None
    if road != "ioctl":
        from nbdlink.kernel import netlink

        try:
            return _persist(binding, mark, _over_netlink), "netlink", None
        except netlink.FamilyMissingError as error:
            if road == "netlink":
                raise
            reason = str(error)
            if binding.dead_timeout:
                reason += "; ioctls know no dead timeout, so the device ends with its connection"
    return _persist(binding, mark, _over_ioctl), "ioctl", reason


def _require_receivers(index: int, road: str, count: int) -> None:
    """Make sure that the kernel listens on every connection of a device; or undo it.

    Each has work of its own (`recv_work`) in the device's workqueue, which never ends. If the
    kernel cannot make a worker within 10 ms, as on a machine that is very busy, the workqueue's
    rescuer takes all that waits and does one after the other (`rescuer_thread` in
    kernel/workqueue.c): on all connections but the first of these nobody ever listens, and what
    is asked on them is not heard of before its timeout. Seen with Linux 6.1.

    Raises:
        KernelError: EAGAIN; the device is detached again.
    """
    if count < 2:
        return
    most, deadline = 0, math.inf
    while (links := sysfs.live_links()) and (live := links.get(index, count)) < count:
        now = time.monotonic()
        if live > most or deadline == math.inf:
            most, deadline = live, now + _RECEIVERS_SECONDS
        elif now >= deadline:
            _undo(index, road)
            raise KernelError(
                f"/dev/nbd{index}: the kernel listens on {most} of {count} connections only, as it "
                "is too busy",
                errno=errno.EAGAIN,
                hint="try again, or with fewer connections",
            )
        time.sleep(0.005)


def _over_netlink(binding: Binding) -> int:
    from nbdlink.kernel import netlink

    return netlink.connect(
        binding.sockets,
        size=binding.size,
        block_size=binding.block_size,
        timeout=binding.timeout,
        dead_timeout=binding.dead_timeout,
        server_flags=binding.transmission_flags,
        index=binding.index,
        identifier=binding.identifier,
    )


def _over_ioctl(binding: Binding) -> int:
    from nbdlink.kernel import ioctl

    return ioctl.connect(
        binding.sockets,
        size=binding.size,
        block_size=binding.block_size,
        timeout=binding.timeout,
        flags=binding.transmission_flags,
        index=binding.index,
    )


def _persist(binding: Binding, mark: Callable[[], None], connect: Callable[[Binding], int]) -> int:
    """Connect; wait out whoever merely looks at the device."""
    deadline = time.monotonic() + BUSY_SECONDS
    pause = 0.002
    while True:
        mark()
        try:
            return connect(binding)
        except DeviceBusyError:
            index = binding.index
            if index is None:
                raise
            if _truly_attached(index) or time.monotonic() >= deadline:
                raise busy_error(index) from None
            # The kernel tells nobody when a device is closed.
            time.sleep(pause)
            pause = min(pause * 2, 0.1)


def _truly_attached(index: int) -> bool:
    """Tell a device in use from one that was detached and waits for its last close."""
    return sysfs.pid(index) is not None and sysfs.has_live_link(index)


def _scan(index: int, deadline: float, udev: bool) -> tuple[Partition, ...]:
    """Have the kernel read the partition table, and give what it found."""
    path = f"/dev/nbd{index}"

    def look() -> None:
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))

    while True:
        try:
            _await_open(index, Aside(look), deadline)
        except TimeoutError:
            raise KernelError(
                f"{path}: the server does not answer the first read", errno=errno.ETIMEDOUT
            ) from None
        except FileNotFoundError:
            # A device that was made just now, and a udevd that makes the node: old systems.
            if not udev or time.monotonic() >= deadline:
                raise KernelError(
                    f"the kernel has attached nbd{index}, but there is no {path}",
                    errno=errno.ENOENT,
                    hint="is /dev a devtmpfs, or does udevd run? A container must be given it",
                ) from None
            time.sleep(0.01)
        except OSError as error:
            raise KernelError(
                f"{path} cannot be opened: {error.strerror}", errno=error.errno or 0
            ) from None
        else:
            break
    # An open succeeds even if the partition table cannot be read.
    ended = sysfs.pid(index) is None or sysfs.size(index) == 0
    if ended or not sysfs.has_live_link(index):
        raise _ended(index)
    return sysfs.partitions(index)


def _await_open(index: int, look: Aside[None], deadline: float) -> None:
    """Wait for an open to come back, which reads the partition table, unless it is in vain.

    Without a connection it would come back when the request timer runs out, not before.

    Raises:
        TimeoutError: it has not come back by the deadline.
        OSError: what the open gave.
    """
    while True:
        left = deadline - time.monotonic()
        try:
            look.result(min(_LOOK_SECONDS, left))
        except TimeoutError:
            if not sysfs.has_live_link(index):
                raise _ended(index) from None
            if left <= _LOOK_SECONDS:
                raise
        else:
            return


def _ended(index: int) -> KernelError:
    return KernelError(
        f"/dev/nbd{index} ended as soon as it had begun",
        hint="the server closed the connection; see its log and `dmesg`",
    )


def _undo(index: int, road: str) -> None:
    if road == "ioctl":
        from nbdlink.kernel import ioctl

        ioctl.abandon(index)
        return
    from nbdlink.kernel import netlink

    with contextlib.suppress(KernelError):
        netlink.disconnect(index)


def _require_attached(index: int) -> None:
    if sysfs.pid(index) is None:
        module.require_loaded()
        raise KernelError(f"/dev/nbd{index} is not attached", errno=errno.ENOTCONN)


def _invalid(message: str, hint: str | None = None) -> KernelError:
    return KernelError(message, errno=errno.EINVAL, hint=hint)
