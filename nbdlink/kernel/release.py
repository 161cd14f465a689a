"""Detaching: refuse while it would lose data, flush, say goodbye, wait until it is gone.

Whether the device is in use is asked twice. Mounts, swaps and holders are looked up to be
named; then the device is opened exclusively, which the kernel refuses for every claim of a
mount, swap or stacked device, of another mount namespace too, and which keeps new ones away
until the disconnect is done.

Nothing here waits without an end. The flush and the guard are a process of their own; the
disconnect runs in a thread, and fails every request that is in flight.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from pathlib import Path

from nbdlink.errors import DeviceBusyError, DeviceInUseError, KernelError
from nbdlink.kernel import module, sysfs, usage
from nbdlink.kernel.bounded import Aside
from nbdlink.kernel.flush import Guard

_POLL_SECONDS = 0.002


def detach(index: int, *, force: bool = False, wait: float = 10.0) -> None:
    """Detach a device, whoever attached it.

    Args:
        index: N of `/dev/nbdN`.
        force: even if it is mounted, held or cannot be flushed; unwritten data is lost.
        wait: seconds for which a flush may make no progress, for the disconnect, and until
            the device is free again.

    Raises:
        DeviceInUseError: it is mounted, swapped on or held; nothing was done. With `force`:
            it is disconnected, but stays occupied by what uses it.
        DeviceBusyError: it is disconnected, but a process keeps it open.
        RightsError: CAP_SYS_ADMIN is missing.
        KernelError: nothing is attached there; what is unwritten cannot be flushed; the kernel
            did not disconnect in time.
    """
    path = f"/dev/nbd{index}"
    if sysfs.pid(index) is None:
        module.require_loaded()
        there = sysfs.exists(index)
        raise KernelError(
            f"{path} is not attached" if there else f"{path} does not exist",
            errno=errno.ENOTCONN if there else errno.ENODEV,
            hint="`nbdlink list` shows what is attached",
        )
    if force:
        _disconnect(index, wait)
    else:
        _refuse_if_used(index)
        # A dead device has nobody to flush to, and would only fail.
        flush = sysfs.has_live_link(index)
        with _guard(index, wait, flush=flush):
            _disconnect(index, wait)
    _await_gone(index, wait)


def _refuse_if_used(index: int) -> None:
    found = usage.uses(index)
    if not found:
        return
    shown = "; ".join(map(str, found[:5])) + ("; ..." if len(found) > 5 else "")
    raise DeviceInUseError(shown, errno=errno.EBUSY, hint=_remedy(found))


def _remedy(found: list[usage.Use]) -> str:
    for use in reversed(found):  # the top of a stack comes last, and must go first
        if use.kind == "mount":
            return f"umount {use.where}"
        if use.kind == "swap":
            return f"swapoff {use.device}"
    return f"take {found[-1].where} down first"


def _guard(index: int, wait: float, *, flush: bool) -> contextlib.AbstractContextManager[object]:
    """Keep others off a device, which is flushed before that if `flush` says so."""
    path = f"/dev/nbd{index}"
    # The whole device last, whose flush is then the server's last one.
    flushed = [*(part.path for part in sysfs.partitions(index)), path] if flush else []
    try:
        return Guard(path, wait, lambda: sysfs.writes_done(index), flushed)
    except TimeoutError:
        if not flush:
            # Its open waits for a server, behind somebody who reads the partition table. Who has
            # claimed the device would have been told at once.
            return contextlib.nullcontext()
        raise KernelError(
            f"{path}: what is unwritten could not be flushed: the server does not answer",
            errno=errno.ETIMEDOUT,
            hint="--force detaches all the same; unwritten data is lost then",
        ) from None
    except OSError as error:
        # No node perhaps, of which the disconnect needs none. And whoever has the claim, if it is
        # a flush of ours that waits for the server that has died, keeps everybody else off.
        if not flush and (error.errno != errno.EBUSY or _has_flush_left(index)):
            return contextlib.nullcontext()
        raise _flush_error(index, error.errno or 0) from None


def _has_flush_left(index: int) -> bool:
    """Tell whether the flush of an earlier detach, which has given up on it, is still waiting."""
    program = f"/{Path(__file__).parent.name}/flush.py".encode()
    for opener in usage.openers(index):
        with contextlib.suppress(OSError):  # it has come to its end
            words = Path(f"/proc/{opener.pid}/cmdline").read_bytes().split(b"\0")
            if any(word.endswith(program) for word in words):
                return True
    return False


def _flush_error(index: int, number: int) -> KernelError:
    path = f"/dev/nbd{index}"
    if number == errno.EBUSY and _has_flush_left(index):
        return KernelError(
            f"{path}: the flush of an earlier detach still waits for the server",
            errno=number,
            hint="--force detaches all the same; unwritten data is lost then",
        )
    if number == errno.EBUSY:
        _refuse_if_used(index)  # somebody was faster than we looked
        return DeviceInUseError(
            f"{path} is in exclusive use, mounted in another mount namespace perhaps",
            errno=number,
            hint=f"grep nbd{index} /proc/*/mountinfo",
        )
    if number in (errno.EPERM, errno.EACCES):
        return module.rights_error(f"detaching {path}", number)
    return KernelError(
        f"{path}: what is unwritten could not be flushed: {os.strerror(number)}",
        errno=number,
        hint="--force detaches all the same; unwritten data is lost then",
    )


def _disconnect(index: int, wait: float) -> None:
    def disconnect() -> None:
        from nbdlink.kernel import ioctl, netlink

        # Netlink works for devices of either road, and wakes I/O that waits for a renewal,
        # which the ioctls do not.
        try:
            netlink.disconnect(index)
        except netlink.FamilyMissingError:
            ioctl.disconnect(index)

    try:
        Aside(disconnect).result(wait)
    except TimeoutError:
        raise KernelError(
            f"/dev/nbd{index}: the kernel has not finished disconnecting after {wait:g} seconds",
            errno=errno.ETIMEDOUT,
            hint="it goes on with it; the server may be slow to take the goodbye",
        ) from None


def _await_gone(index: int, wait: float) -> None:
    """Wait until the configuration is gone; the last close takes it away."""
    path = f"/dev/nbd{index}"
    deadline = time.monotonic() + wait
    pause = _POLL_SECONDS
    looked = False
    while sysfs.pid(index) is not None:
        now = time.monotonic()
        if now >= deadline or (now > deadline - wait / 2 and not looked):
            looked = True
            if found := usage.uses(index):
                # These do not go by themselves.
                shown = "; ".join(map(str, found[:5]))
                raise DeviceInUseError(
                    f"{path} is disconnected, but stays occupied: {shown}",
                    errno=errno.EBUSY,
                    hint=_remedy(found),
                )
        if now >= deadline:
            who = "; ".join(map(str, usage.openers(index)[:5])) or "somebody has it open"
            raise DeviceBusyError(
                f"{path} is disconnected, but stays occupied: {who}",
                errno=errno.EBUSY,
                hint=f"{path} is free again when it has been closed",
            )
        # The kernel tells nobody when a device is closed.
        time.sleep(pause)
        pause = min(pause * 2, 0.05)
    _drop_partitions(index)


def _drop_partitions(index: int) -> None:
    """Let go of the partitions that the kernel would show until somebody opens the device."""
    if not sysfs.partitions(index):
        return
    with contextlib.suppress(OSError):  # no node; the next attach will do it
        os.close(os.open(f"/dev/nbd{index}", os.O_RDONLY | os.O_CLOEXEC))
