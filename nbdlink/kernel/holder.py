"""The process that an ioctl device lives in: NBD_DO_IT does not return before the device ends.

Run by path, as `python -I -S holder.py ...`, by `nbdlink.kernel.ioctl`: so it must import
nothing but the standard library, and little of that. Its standard output is a pipe to the one
who attaches; a line `ready` says that everything is set and NBD_DO_IT comes next, a line
`error STEP ERRNO` that the kernel refused. The pipe closes when NBD_DO_IT has returned at the
latest, so an early end is never mistaken for life.

If this process is killed, NBD_DO_IT returns (`nbd_start_device_ioctl` waits interruptibly),
the kernel closes the sockets, fails what is in flight and frees the device.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sys

SET_SOCK = 0xAB00
SET_BLKSIZE = 0xAB01
DO_IT = 0xAB03
CLEAR_SOCK = 0xAB04
SET_SIZE_BLOCKS = 0xAB07
DISCONNECT = 0xAB08
SET_TIMEOUT = 0xAB09
SET_FLAGS = 0xAB0A

_INT_MAX = 0x7FFF_FFFF


def _ioctl(fd: int, request: int, argument: int) -> None:
    if argument <= _INT_MAX:
        fcntl.ioctl(fd, request, argument)
        return
    # Python passes a C int; the driver takes an unsigned long.
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong]
    if libc.ioctl(fd, request, argument) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _tell(line: str) -> None:
    os.write(1, line.encode() + b"\n")


def main(arguments: list[str]) -> int:
    """Set a device up, run it to its end, and clean up.

    Args:
        arguments: path, blocks, block size (bytes), timeout (s), transmission flags, then the
            sockets' descriptors.
    """
    path, *numbers = arguments
    blocks, block_size, timeout, flags, *sockets = map(int, numbers)
    os.chdir("/")
    step = "open"
    try:
        # Read-only will do: the ioctls ask for the capability, not for the mode. And a close
        # after writing would have udevd look at a device that is gone.
        device = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        # The order matters: the first SET_SOCK makes this thread the device's owner, or fails
        # with EBUSY where there is one; only then may anything be changed.
        setup = [("NBD_SET_SOCK", SET_SOCK, descriptor) for descriptor in sockets]
        setup += [
            ("NBD_SET_BLKSIZE", SET_BLKSIZE, block_size),
            ("NBD_SET_SIZE_BLOCKS", SET_SIZE_BLOCKS, blocks),
            ("NBD_SET_TIMEOUT", SET_TIMEOUT, timeout),
            ("NBD_SET_FLAGS", SET_FLAGS, flags),
        ]
        for name, request, argument in setup:
            step = name
            _ioctl(device, request, argument)
    except OSError as error:
        _tell(f"error {step} {error.errno}")
        return 1
    for descriptor in sockets:
        os.close(descriptor)  # the kernel has its own reference
    _be_spared()
    _tell("ready")
    status = 0
    try:
        fcntl.ioctl(device, DO_IT)
    except OSError as error:
        # ETIMEDOUT and EPIPE are how a device ends whose server is gone.
        status = 1
        if error.errno in (errno.EBUSY, errno.EINVAL, errno.ENOMEM):
            _try_to_tell(f"error NBD_DO_IT {error.errno}")
    finally:
        _clear(device)
    return status


def _be_spared() -> None:
    """Have systemd pass this process over when it ends all others at shutdown.

    A file system that is still mounted then needs it. The sign is an argv[0] that begins with @
    (systemd's ROOT_STORAGE_DAEMONS); where that is in memory is told in proc_pid_stat(5), field 48.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        with open("/proc/self/stat", "rb") as stat:  # noqa: PTH123 (pathlib takes long to import)
            fields = stat.read().rpartition(b")")[2].split()
        memory = os.open("/proc/self/mem", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.pwrite(memory, b"@", int(fields[45]))
        finally:
            os.close(memory)


def _try_to_tell(line: str) -> None:
    # Who attached may have gone after "ready"; this is its end then, not its start.
    with contextlib.suppress(OSError):
        _tell(line)


def _clear(device: int) -> None:
    with contextlib.suppress(OSError):
        fcntl.ioctl(device, CLEAR_SOCK)
    os.close(device)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
