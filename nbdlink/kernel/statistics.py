"""What a device is doing, from the block layer's own counters.

The kernel counts in /sys/block/nbdN/stat what has been completed since the device was made
(`Documentation/block/stat.rst`); two looks at it give rates. Reading needs no rights, and does
not wait for the device's server.

Only completed requests are counted. A device that hangs shows rates of zero, and what gives it
away are the requests that are under way (`Sample.in_flight`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from nbdlink.kernel.sysfs import SECTOR

_BLOCK = Path("/sys/block")
_MILLISECONDS_WRAP = 1 << 32
"""Times are printed as an `unsigned int` (`part_stat_show` of `block/genhd.c`): with 16 requests
always under way they begin anew every three days."""


@dataclass(frozen=True, slots=True)
class Operations:
    """One kind of request, as counted since the device was made.

    Attributes:
        count: requests completed.
        bytes: what they read, wrote or discarded; 0 for flushes.
        milliseconds: the sum of the time that they took; begins anew at 2**32.
    """

    count: int = 0
    bytes: int = 0
    milliseconds: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """The counters of a device at one moment.

    Attributes:
        time: of `time.monotonic()`, in seconds.
        read, write, discard, flush: the kinds of request. Flushes are not counted before Linux
            5.5, discards not before 4.18: zero.
        in_flight: requests under way just now.
        busy: milliseconds for which any was; begins anew at 2**32.
        waited: milliseconds, those of each request added up; begins anew at 2**32.
    """

    time: float
    read: Operations
    write: Operations
    discard: Operations
    flush: Operations
    in_flight: int
    busy: int
    waited: int


@dataclass(frozen=True, slots=True)
class Rate:
    """One kind of request between two samples.

    Attributes:
        per_second: requests completed.
        bytes_per_second: what they moved.
        latency: mean of the time that they took in milliseconds, None if there were none.
    """

    per_second: float = 0.0
    bytes_per_second: float = 0.0
    latency: float | None = None


@dataclass(frozen=True, slots=True)
class Rates:
    """What a device did between two samples.

    Attributes:
        seconds: how far they are apart.
        read, write, discard, flush: by kind of request.
        queue_depth: mean number of requests under way, from those that were completed.
        in_flight: how many were under way at the end.
        utilisation: part of the time for which any was, 0 to 1. The kernel looks at this at the
            beginning and the end of requests only, so that it is coarse.
    """

    seconds: float
    read: Rate
    write: Rate
    discard: Rate
    flush: Rate
    queue_depth: float
    in_flight: int
    utilisation: float

    @property
    def per_second(self) -> float:
        """Requests of all kinds completed."""
        return sum(rate.per_second for rate in (self.read, self.write, self.discard, self.flush))

    @property
    def latency(self) -> float | None:
        """Mean of the time that requests of all kinds took, in milliseconds; None without any."""
        kinds = (self.read, self.write, self.discard, self.flush)
        done = [(rate.per_second, rate.latency) for rate in kinds if rate.latency is not None]
        total = sum(count for count, _ in done)
        return sum(count * latency for count, latency in done) / total if total else None


def parse(text: str, moment: float) -> Sample | None:
    """Read the line of a `stat` file; None if it is no such line.

    Args:
        text: the file.
        moment: when it was read, of `time.monotonic()`.
    """
    try:
        fields = [int(field) for field in text.split()]
    except ValueError:
        return None
    if len(fields) < 11:
        return None
    fields += [0] * (17 - len(fields))  # older kernels count less
    return Sample(
        moment,
        Operations(fields[0], fields[2] * SECTOR, fields[3]),
        Operations(fields[4], fields[6] * SECTOR, fields[7]),
        Operations(fields[11], fields[13] * SECTOR, fields[14]),
        Operations(fields[15], 0, fields[16]),
        in_flight=fields[8],
        busy=fields[9],
        waited=fields[10],
    )


def sample(index: int) -> Sample | None:
    """Read a device's counters now; None if there is no such device."""
    try:
        text = (_BLOCK / f"nbd{index}" / "stat").read_text()
    except OSError:
        return None
    return parse(text, time.monotonic())


def rates(earlier: Sample, later: Sample) -> Rates | None:
    """Tell what was done between two samples of a device.

    Returns:
        None if that cannot be said: no time has passed, or the counters went back, as the
        device was removed and made again.
    """
    seconds = later.time - earlier.time
    if seconds <= 0 or any(
        getattr(later, kind).count < getattr(earlier, kind).count
        for kind in ("read", "write", "discard", "flush")
    ):
        return None
    milliseconds = seconds * 1000
    return Rates(
        seconds,
        read=_rate(earlier.read, later.read, seconds),
        write=_rate(earlier.write, later.write, seconds),
        discard=_rate(earlier.discard, later.discard, seconds),
        flush=_rate(earlier.flush, later.flush, seconds),
        queue_depth=_passed(earlier.waited, later.waited) / milliseconds,
        in_flight=later.in_flight,
        utilisation=min(1.0, _passed(earlier.busy, later.busy) / milliseconds),
    )


def _rate(earlier: Operations, later: Operations, seconds: float) -> Rate:
    count = later.count - earlier.count
    spent = _passed(earlier.milliseconds, later.milliseconds)
    return Rate(
        count / seconds,
        max(0, later.bytes - earlier.bytes) / seconds,
        spent / count if count else None,
    )


def _passed(earlier: int, later: int) -> int:
    return (later - earlier) % _MILLISECONDS_WRAP
