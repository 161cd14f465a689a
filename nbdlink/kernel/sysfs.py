"""What the kernel shows of nbd devices in /sys/block and /proc, and which device a name means.

Reading only, no rights needed, nothing here can block: sysfs answers from the kernel's memory
even when a device's server is gone. What is not there is told as nothing; that this process has
no descriptor left to look with is a KernelError, so that no device is taken for free because of it.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from dataclasses import dataclass, field
from pathlib import Path

from nbdlink.errors import KernelError, is_shortage
from nbdlink.kernel import module

SECTOR = 512
"""The unit of every size in sysfs, whatever the device's block size."""

_SETTLE_SECONDS = 0.1

_INDICES = 1 << 20
"""Minor numbers have twenty bits (MINORBITS of `include/linux/kdev_t.h`)."""

_BLOCK = Path("/sys/block")
_NUMBERS = Path("/sys/dev/block")
_PROC = Path("/proc")
_DISK = re.compile(r"nbd(0|[1-9][0-9]*)\Z")
_PARTITION = re.compile(r"nbd(0|[1-9][0-9]*)p([1-9][0-9]*)\Z")
# A receiving worker of nbd0 shows as `kworker/u5:1+nbd0-recv`, an idle one that last served it
# with `-` for `+`; the workqueue's rescuer is `nbd0-recv` or, since Linux 6.8,
# `kworker/R-nbd0-recv`, cut short in some versions.
_WORKER = re.compile(r"(?:.*[+-])?nbd(\d+)(-r?e?c?v?)?\Z")


@dataclass(frozen=True, slots=True)
class Partition:
    """One partition of a device.

    Attributes:
        name: `nbd0p1`.
        path: `/dev/nbd0p1`.
        number: its number in the partition table.
        size: bytes.
        mounts: where it is mounted in this process's mount namespace.
    """

    name: str
    path: str
    number: int
    size: int
    mounts: tuple[str, ...] = field(default=())


def indices() -> list[int]:
    """Give the index of every nbd device there is, used or not, in order."""
    return sorted(int(match[1]) for match in map(_DISK.match, names_in(_BLOCK)) if match)


def exists(index: int) -> bool:
    """Tell whether the kernel has such a device."""
    return (_BLOCK / f"nbd{index}").exists()


def pid(index: int) -> int | None:
    """Give the process that started the device, or None if nothing is attached.

    Over netlink it is the process that sent CONNECT, which is usually gone; over ioctl the one
    that sits in NBD_DO_IT.
    """
    text = _attribute(index, "pid")
    return int(text) if text else None


def size(index: int) -> int:
    """Give the device's size in bytes; 0 if it is unused or does not exist."""
    return int(_attribute(index, "size") or 0) * SECTOR


def writes_done(index: int) -> int:
    """Give how many writes and flushes have completed (`Documentation/block/stat.rst`)."""
    fields = (_attribute(index, "stat") or "").split()
    return sum(int(fields[n]) for n in (4, 15) if n < len(fields))


def read_only(index: int) -> bool:
    """Tell whether the device refuses writes."""
    return _attribute(index, "ro") == "1"


def block_size(index: int) -> int:
    """Give the logical block size in bytes; the physical one is the same on nbd."""
    return int(_attribute(index, "queue/logical_block_size") or SECTOR)


def backend(index: int) -> str | None:
    """Give the backend identifier; None if none was set."""
    return _attribute(index, "backend") or None


def over_netlink(index: int) -> bool:
    """Tell whether an attached device was attached over netlink.

    CONNECT makes the file `backend` (Linux 5.14), even without an identifier; an ioctl never
    does.
    """
    return _attribute(index, "backend") is not None


def device_number(name: str) -> str | None:
    """Give `MAJOR:MINOR` of a disk or a partition, or None if it does not exist."""
    match = _PARTITION.match(name)
    path = _BLOCK / f"nbd{match[1]}" / name if match else _BLOCK / name
    return _read(path / "dev")


def partitions(index: int) -> tuple[Partition, ...]:
    """Give the partitions the kernel knows of, by number, without their mounts."""
    disk = f"nbd{index}"
    found = []
    for name in names_in(_BLOCK / disk):
        if name.startswith(disk) and (match := _PARTITION.match(name)):
            sectors = _read(_BLOCK / disk / name / "size")
            if sectors is not None:  # None: it went away just now
                found.append(Partition(name, f"/dev/{name}", int(match[2]), int(sectors) * SECTOR))
    return tuple(sorted(found, key=lambda partition: partition.number))


def live_links() -> dict[int, int] | None:
    """Count the live connections of every device, by index.

    The driver does not tell which connections are dead, but each live one keeps a worker of
    the workqueue `nbdN-recv` busy from CONNECT until its end (`recv_work`), and a worker shows
    in its `comm` what it is at (`wq_worker_comm`, Linux 4.18). A device whose rescuer thread
    shows and whose workers do not has no connection left.

    A connection to a machine that vanished without a goodbye counts as alive until a request
    times out: nobody can know better without asking it.

    Returns:
        Counts, with 0 for devices without any; a device that is missing is not known (its
        workqueue has another name before Linux 5.16). None if kernel threads are not to be
        seen from here (a container, `hidepid`).
    """
    if _read(_PROC / "2" / "comm") != "kthreadd":
        return None
    counts: dict[int, int] = {}
    for name in names_in(_PROC):
        if not name.isdigit():
            continue
        comm = _read_fast(f"{_PROC}/{name}/comm")
        if b"nbd" not in comm:  # nearly always
            continue
        match = _WORKER.match(comm.decode(errors="replace").strip())
        if match is None or not _is_kernel_thread(name):
            continue
        index = int(match[1])
        busy = match[0].endswith(f"+nbd{index}-recv")
        counts[index] = counts.get(index, 0) + busy
    return counts


def settled_links(among: set[int]) -> dict[int, int]:
    """Count the live connections of the given devices; what is not known is left out.

    Right after CONNECT the workers are queued and may not run yet, so none is believed to be
    none only if it stays so for a moment. The kernel sends no event for either.
    """
    deadline = time.monotonic() + _SETTLE_SECONDS
    while True:
        counts = live_links() or {}
        known = {index: counts[index] for index in among if index in counts}
        if all(known.values()) or time.monotonic() >= deadline:
            return known
        time.sleep(_SETTLE_SECONDS / 10)


def has_live_link(index: int) -> bool:
    """Tell whether a device has a connection left, or none can be seen from here."""
    return settled_links({index}).get(index) != 0


def index_of(device: str, *, must_exist: bool = True) -> int:
    """Give N of what `/dev/nbdN`, `nbdN` or any link to it names.

    Args:
        device: a path or a bare name.
        must_exist: if not, a name of the right form is enough: netlink makes the device.

    Raises:
        KernelError: it is a partition, something else, or does not exist.
        ModuleMissingError: it does not exist because the driver is not there.
    """
    name = device.removeprefix("/dev/")
    if match := _DISK.match(name):
        index = int(match[1])
        if index >= _INDICES:
            raise KernelError(
                f"/dev/nbd{index} cannot exist",
                errno=errno.EINVAL,
                hint=f"the kernel numbers devices up to {_INDICES - 1}",
            )
        if must_exist and not exists(index):
            module.require_loaded()
            raise KernelError(
                f"/dev/nbd{index} does not exist",
                errno=errno.ENODEV,
                hint=f"the kernel has {_span()}",
            )
        return index
    if match := _PARTITION.match(name):
        raise _partition_error(device, f"nbd{match[1]}")
    return _index_of_path(device)


def _index_of_path(device: str) -> int:
    path = Path(device if "/" in device else f"/dev/{device}")
    try:
        found = path.stat()
    except OSError as error:
        raise KernelError(
            f"{device}: {os.strerror(error.errno or 0).lower()}",
            errno=error.errno or 0,
            hint="name a device as /dev/nbdN or nbdN",
        ) from None
    if stat.S_ISBLK(found.st_mode):
        number = f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"
        name = (_NUMBERS / number).resolve().name
        if match := _DISK.match(name):
            return int(match[1])
        if match := _PARTITION.match(name):
            raise _partition_error(device, f"nbd{match[1]}")
        if os.major(found.st_rdev) == module.MAJOR:
            module.require_loaded()
            raise KernelError(
                f"{device} is an nbd node, but the kernel has no such device", errno=errno.ENODEV
            )
    raise KernelError(
        f"{device} is not an nbd device",
        errno=errno.EINVAL,
        hint="name a device as /dev/nbdN or nbdN",
    )


def names_in(directory: Path) -> list[str]:
    """List a directory of a kernel file system; one that is not there is empty."""
    try:
        with os.scandir(directory) as entries:
            return [entry.name for entry in entries]
    except OSError as error:
        _refuse_shortage(error, directory)
        return []


def _partition_error(device: str, disk: str) -> KernelError:
    return KernelError(
        f"{device} is a partition of /dev/{disk}",
        errno=errno.EINVAL,
        hint=f"say /dev/{disk} if the whole device is meant",
    )


def _span() -> str:
    known = indices()
    return f"/dev/nbd{known[0]} to /dev/nbd{known[-1]}" if known else "no nbd device at all"


def _attribute(index: int, name: str) -> str | None:
    return _read(_BLOCK / f"nbd{index}" / name)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip()
    except OSError as error:
        _refuse_shortage(error, path)
        return None  # absent, or ENODEV: it went away while it was read


def _read_fast(path: str) -> bytes:
    """Read a short file with three system calls; there is one for each process to be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        _refuse_shortage(error, path)
        return b""
    try:
        return os.read(fd, 512)
    except OSError:
        return b""
    finally:
        os.close(fd)


def _refuse_shortage(error: OSError, path: Path | str) -> None:
    if is_shortage(error):
        raise KernelError(
            f"{path} cannot be read: {os.strerror(error.errno or 0).lower()}",
            errno=error.errno or 0,
        ) from None


def _is_kernel_thread(pid_name: str) -> bool:
    """Tell a kernel thread from a process that merely calls itself so (PF_KTHREAD)."""
    fields = _read_fast(f"{_PROC}/{pid_name}/stat").rpartition(b")")[2].split()
    return len(fields) > 6 and bool(int(fields[6]) & 0x0020_0000)
