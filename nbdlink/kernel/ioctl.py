"""The old road: ioctls on the device node, and a process that stays for the device's life.

Used where netlink is missing. What it cannot do: wait for a renewal once every connection is
dead (the device ends then), be renewed, carry a backend identifier, make a device that does
not exist.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from nbdlink.errors import DeviceBusyError, KernelError
from nbdlink.kernel import holder, module, sysfs

START_SECONDS = 30.0
"""For the holder to start and to set the device up; an interpreter under emulation is slow."""

_POLL_SECONDS = 0.002


def connect(
    sockets: Sequence[int],
    *,
    size: int,
    block_size: int,
    timeout: int,
    flags: int,
    index: int | None = None,
) -> int:
    """Bind negotiated sockets to a device and give its index.

    Starts a process that holds the device (`nbdlink.kernel.holder`), detached from this one's
    session and streams; returns when the device is live.

    Args:
        sockets: descriptors; the holder and the kernel take references of their own.
        size: bytes; what does not fill a block at the end is cut off.
        block_size: bytes.
        timeout: seconds a request may take.
        flags: the transmission flags.
        index: which device, or None for a free one among those that exist.

    Raises:
        DeviceBusyError: the device, or every device, is attached.
        RightsError, KernelError: as the names say.
    """
    tail = [size // block_size, block_size, timeout, flags, *sockets]
    if index is not None:
        _start(index, tail, sockets)
        return index
    for candidate in sysfs.indices():
        if sysfs.pid(candidate) is None and sysfs.size(candidate) == 0:
            # Somebody else may be faster; then the next one will do.
            with contextlib.suppress(DeviceBusyError):
                _start(candidate, tail, sockets)
                return candidate
    raise DeviceBusyError(
        "every nbd device is in use, and ioctls cannot make another",
        errno=errno.EBUSY,
        hint="detach one, or load the module with a larger nbds_max",
    )


def disconnect(index: int) -> None:
    """Tell the server goodbye and close the sockets; works on devices of either road.

    Raises:
        RightsError, KernelError: as the names say.
    """
    device = _open(index)
    try:
        # Both may find that the device ended in between; that was the aim.
        for request in (holder.DISCONNECT, holder.CLEAR_SOCK):
            try:
                fcntl.ioctl(device, request)
            except OSError as error:
                if error.errno in (errno.EPERM, errno.EACCES):
                    raise module.rights_error(f"detaching /dev/nbd{index}", error.errno) from None
    finally:
        os.close(device)


def abandon(index: int) -> None:
    """End a device of this road by ending its holder, if that can be found.

    Unlike `disconnect` this does not open the device, which blocks while the kernel reads the
    partition table of a server that does not answer.
    """
    pid = sysfs.pid(index)
    if pid is None:
        return
    with contextlib.suppress(OSError):
        # The number may mean another process in this PID namespace.
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if {holder.__file__.encode(), f"/dev/nbd{index}".encode()} <= set(words):
            os.kill(pid, signal.SIGKILL)


def resize(index: int, size: int) -> None:
    """Set the size of a device of this road, in bytes.

    Raises:
        RightsError, KernelError: as the names say.
    """
    device = _open(index)
    try:
        fcntl.ioctl(device, holder.SET_SIZE_BLOCKS, size // sysfs.block_size(index))
    except OSError as error:
        raise _explained(index, "NBD_SET_SIZE_BLOCKS", error.errno or 0) from None
    finally:
        os.close(device)


def _open(index: int) -> int:
    try:
        return os.open(f"/dev/nbd{index}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _explained(index, "open", error.errno or 0) from None


def _start(index: int, tail: list[int], sockets: Sequence[int]) -> None:
    if sysfs.pid(index) is not None:
        raise DeviceBusyError(f"/dev/nbd{index} is attached already", errno=errno.EBUSY)
    command = [sys.executable, "-I", "-S", str(Path(holder.__file__)), f"/dev/nbd{index}"]
    try:
        # The holder outlives this process and is nobody's child to wait for once it is ready,
        # so the object is let go below without a wait.
        process = subprocess.Popen(
            command + [str(number) for number in tail],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=sockets,
            start_new_session=True,
        )
    except OSError as error:
        raise KernelError(f"the holder of /dev/nbd{index} cannot be started: {error}") from None
    assert process.stdout is not None
    try:
        _await_ready(index, process.stdout.fileno())
    except BaseException:
        process.kill()
        process.wait()
        raise
    finally:
        process.stdout.close()
    # Popen would warn about a child that still runs; it is meant to.
    process.returncode = 0


def _await_ready(index: int, pipe: int) -> None:
    """Wait until the holder sits in NBD_DO_IT and the device is live, or raise why not."""
    deadline = time.monotonic() + START_SECONDS
    received = b""
    ready = False
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while time.monotonic() < deadline:
            # Once it is ready, the kernel gives no sign of NBD_DO_IT having begun but sysfs.
            if selector.select(_POLL_SECONDS if ready else deadline - time.monotonic()):
                chunk = os.read(pipe, 512)
                received += chunk
                for line in received.decode().splitlines():
                    word, *details = line.split()
                    if word == "error" and len(details) == 2:
                        raise _explained(index, details[0], int(details[1]))
                    ready = ready or word == "ready"
                if not chunk:
                    raise KernelError(
                        f"/dev/nbd{index} ended as soon as it had begun",
                        hint="the server closed the connection; see its log and `dmesg`",
                    )
            # Whose pid it is need not be asked: SET_SOCK made the device this holder's. (And
            # the kernel shows the number of the machine's first PID namespace.)
            if ready and sysfs.pid(index) is not None and sysfs.size(index):
                return
    raise KernelError(f"/dev/nbd{index} did not come alive within {START_SECONDS:g} seconds")


def _explained(index: int, step: str, number: int) -> KernelError:
    path = f"/dev/nbd{index}"
    if number in (errno.EPERM, errno.EACCES):
        return module.rights_error(f"{step} on {path}", number)
    if number == errno.EBUSY:
        return DeviceBusyError(f"{step} on {path}: the device is in use", errno=number)
    if number in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
        return KernelError(
            f"{path} does not exist",
            errno=number,
            hint="is /dev a devtmpfs, or does udevd run? ioctls cannot make a device",
        )
    if step == "NBD_DO_IT" and number == errno.EINVAL:
        return KernelError(
            f"{path}: the kernel refuses several connections without the MULTI_CONN flag",
            errno=number,
        )
    return KernelError(f"{step} on {path}: {os.strerror(number)}", errno=number)
