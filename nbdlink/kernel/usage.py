"""Who uses a device: mounts, swaps, devices stacked upon it, and processes that hold it open.

Mounts are those of this process's mount namespace. What another namespace mounted is found
out when it comes to detaching: an exclusive open fails then (`nbdlink.kernel.release`).
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nbdlink.kernel import sysfs

_BLOCK = Path("/sys/class/block")
_ESCAPE = re.compile(r"\\([0-7]{3})")
_DEPTH = 8
"""Block devices stacked deeper than this are somebody's loop."""


@dataclass(frozen=True, slots=True)
class Use:
    """One thing that would break if the device went away.

    Attributes:
        kind: what it is.
        device: the disk or partition, `/dev/nbd0p1`, or what is stacked upon it.
        where: the mount point, or the name of the device that holds it.
    """

    kind: Literal["mount", "swap", "holder"]
    device: str
    where: str

    def __str__(self) -> str:
        if self.kind == "mount":
            return f"{self.device} is mounted on {self.where}"
        if self.kind == "swap":
            return f"{self.device} is swapped on"
        return f"{self.device} is held by {self.where}"


@dataclass(frozen=True, slots=True)
class Opener:
    """A process that holds the device or a partition open."""

    pid: int
    name: str
    device: str

    def __str__(self) -> str:
        return f"{self.name} (process {self.pid}) has {self.device} open"


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo: device number, source and mount point."""

    number: str
    source: str
    point: str


def parse_mountinfo(lines: Iterable[str]) -> list[Mount]:
    """Parse `/proc/PID/mountinfo` (proc_pid_mountinfo(5)); lines of another form are left out.

    The number alone would miss btrfs, which shows an anonymous one, so the source counts too.
    """
    found = []
    for line in lines:
        fields = line.split()
        with contextlib.suppress(ValueError, IndexError):
            after = fields.index("-", 6)
            found.append(Mount(fields[2], _plain(fields[after + 2]), _plain(fields[4])))
    return found


def parse_swaps(lines: Iterable[str]) -> list[str]:
    """Parse `/proc/swaps` and give the paths of the swapped-on block devices."""
    found = []
    for line in lines:
        fields = line.split()
        if len(fields) >= 2 and fields[1] == "partition":
            found.append(_plain(fields[0]))
    return found


def mounts() -> list[Mount]:
    """Give the mounts of this process's namespace."""
    try:
        with Path("/proc/self/mountinfo").open(errors="surrogateescape") as lines:
            return parse_mountinfo(lines)
    except OSError:
        return []


def mount_points(name: str, among: Iterable[Mount]) -> tuple[str, ...]:
    """Give where the disk or partition called `name` is mounted."""
    number = _number(name)
    path = f"/dev/{name}"
    return tuple(m.point for m in among if m.number == number or _names(m.source, path))


def uses(index: int) -> list[Use]:
    """Give every use of a device and of its partitions, through what is stacked upon them."""
    disk = f"nbd{index}"
    names = [disk, *(partition.name for partition in sysfs.partitions(index))]
    mounted = mounts()
    swapped = _swapped_numbers()
    looped = _loops()
    found: list[Use] = []
    for name in names:
        found += _uses_of(name, mounted, swapped, looped, _DEPTH)
    return found


def openers(index: int) -> list[Opener]:
    """Give the processes that hold the device or a partition open, as far as one may look.

    The kernel's own users (a mount, a loop device) are not processes and not among them.
    """
    names = [f"nbd{index}", *(partition.name for partition in sysfs.partitions(index))]
    numbers = {_rdev(number): name for name in names if (number := sysfs.device_number(name))}
    found = []
    for pid in filter(str.isdigit, sysfs.names_in(Path("/proc"))):
        for name in sorted(_open_among(pid, numbers)):
            found.append(Opener(int(pid), _process_name(pid), f"/dev/{name}"))
    return found


def _loops() -> dict[str, list[str]]:
    """Give the loop devices, by the path of the block device that backs them.

    They claim nothing and are no process, so neither `holders` nor a search of /proc shows them.
    """
    found: dict[str, list[str]] = {}
    for link in sorted(Path("/sys/block").glob("loop*/loop/backing_file")):
        if backing := _text(link):
            found.setdefault(backing, []).append(link.parts[3])
    return found


def _uses_of(
    name: str, mounted: list[Mount], swapped: set[str], looped: dict[str, list[str]], depth: int
) -> list[Use]:
    path = _shown_path(name)
    found = [Use("mount", path, point) for point in mount_points(name, mounted)]
    if _number(name) in swapped:
        found.append(Use("swap", path, ""))
    for holder in sorted(sysfs.names_in(_BLOCK / name / "holders")) + looped.get(path, []):
        found.append(Use("holder", path, _shown_path(holder)))
        if depth:
            found += _uses_of(holder, mounted, swapped, looped, depth - 1)
    return found


def _shown_path(name: str) -> str:
    """Give the path people know a device by: a device-mapper device has a name of its own."""
    mapped = _text(_BLOCK / name / "dm" / "name")
    return f"/dev/mapper/{mapped}" if mapped else f"/dev/{name}"


def _swapped_numbers() -> set[str]:
    try:
        with Path("/proc/swaps").open(errors="surrogateescape") as lines:
            paths = parse_swaps(lines)
    except OSError:
        return set()
    numbers = set()
    for path in paths:
        with contextlib.suppress(OSError):
            found = Path(path).stat()
            if stat.S_ISBLK(found.st_mode):
                numbers.add(f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}")
    return numbers


def _open_among(pid: str, numbers: dict[int, str]) -> set[str]:
    found: set[str] = set()
    directory = Path("/proc") / pid / "fd"
    for descriptor in sysfs.names_in(directory):  # empty if it is not ours to look at
        with contextlib.suppress(OSError):  # closed meanwhile
            target = (directory / descriptor).stat()
            if stat.S_ISBLK(target.st_mode) and target.st_rdev in numbers:
                found.add(numbers[target.st_rdev])
    return found


def _process_name(pid: str) -> str:
    return _text(Path("/proc") / pid / "comm") or "?"


def _number(name: str) -> str | None:
    return _text(_BLOCK / name / "dev")


def _rdev(number: str) -> int:
    major, minor = number.split(":")
    return os.makedev(int(major), int(minor))


def _names(source: str, path: str) -> bool:
    if source == path:
        return True
    # /dev/mapper/x and /dev/disk/by-label/y are links; only they are worth a look.
    return source.startswith("/dev/") and "nbd" in path and os.path.realpath(source) == path


def _plain(text: str) -> str:
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None
