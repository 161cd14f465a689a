"""Copy an image: from a file, a block device, an export or a stream to another of these."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from nbdlink.client.security import NO_OPTIONS, TLSOptions
from nbdlink.copy.ends import (
    Destination,
    DestinationLane,
    ExportEnd,
    NullEnd,
    Source,
    SourceLane,
)
from nbdlink.copy.engine import (
    CopyLane,
    Lane,
    Progress,
    Supply,
    Tuning,
    run_lanes,
    segments,
    stream_segments,
)
from nbdlink.copy.files import (
    FileDestination,
    FileSource,
    StreamDestination,
    open_destination,
    open_source,
    same_file,
)
from nbdlink.copy.ranges import REQUEST_SIZE as RANGE
from nbdlink.copy.ranges import RangeLane
from nbdlink.copy.verify import CompareLane, both, report
from nbdlink.errors import (
    ConfigError,
    NBDError,
    OptionError,
    RemoteProtocolError,
    TransportError,
)
from nbdlink.uri import Target

NULL = "null:"
_SHORT_FORM = re.compile(r"(\[[0-9a-fA-F:.]+(%[\w.-]+)?\]|[\w.-]+):\d+(/.*)?", re.ASCII)

_One = TypeVar("_One", bound=SourceLane)
_Other = TypeVar("_Other", SourceLane, DestinationLane)

Watch = Callable[[str, int | None], Progress | None]
"""Is told what begins (`copying`, `verifying`) and how many bytes it has, None if that is not
known; gives who is to be told of the progress."""


@dataclass(frozen=True, slots=True)
class CopySpec:
    """What is asked for.

    Attributes:
        source: a path, an NBD URI, `host:port[/export]`, or `-` for stdin.
        destination: the same, with `-` for stdout, or `null:`.
        connections: to each export, or None for 4 where the server can.
        tuning: how to copy.
        flush: whether all of it is on stable storage in the end.
        verify: whether both ends are read again and compared.
    """

    source: str
    destination: str
    connections: int | None = None
    tuning: Tuning = field(default_factory=Tuning)
    flush: bool = True
    verify: bool = False
    tls: TLSOptions = NO_OPTIONS


@dataclass(frozen=True, slots=True)
class Summary:
    """What was done.

    Attributes:
        size: bytes of the source.
        data: of them, those copied as data.
        zeroes: those that became holes or zeroes without being sent.
        seconds: for copying and flushing.
        connections: how many were used to copy, to each export.
        verified: whether the ends were compared afterwards, and are equal.
        unflushed: whether it was to be on stable storage, and the destination's server cannot
            bring it there.
    """

    size: int
    data: int
    zeroes: int
    seconds: float
    connections: int
    verified: bool
    unflushed: bool = False


_NOT_COMPARABLE = ConfigError(
    "what comes from or goes to a stream cannot be read again to compare it",
    hint="leave --verify out, or copy to a file first",
)


def export_of(word: str) -> Target | None:
    """Tell an export from a path: a URI, or host:port unless there is such a file.

    Raises:
        ConfigError: it begins as an NBD URI and is none.
    """
    if "://" in word or (_SHORT_FORM.fullmatch(word) and not Path(word).exists()):
        return Target.parse(word)
    return None


def copy(spec: CopySpec, watch: Watch | None = None) -> Summary:
    """Copy all of a source to the beginning of a destination.

    A destination file that does not exist is made, as large as the source.

    Raises:
        ConfigError: the two do not go together.
        StorageError: a file cannot be read or written, or the ends differ (`verify`).
        TransportError, RemoteProtocolError, OptionError, RequestError: an export's failure.
    """
    _check(spec)
    with contextlib.ExitStack() as stack:
        begun = time.monotonic()
        source = _open_source(spec.source, spec)
        stack.callback(source.close)
        destination = _open_destination(spec)
        stack.callback(destination.close)
        if spec.verify and (source.size is None or isinstance(destination, StreamDestination)):
            raise _NOT_COMPARABLE
        destination.prepare(source.size)
        try:
            lanes, size = _copy(spec, source, destination, watch)
        except NBDError as error:
            if not isinstance(destination, NullEnd):
                left = f"{destination.name} is incomplete"
                error.hint = f"{error.hint}; {left}" if error.hint else left
            raise
        seconds = time.monotonic() - begun
    data = sum(lane.data for lane in lanes)
    if spec.verify:
        _verify(spec, size, watch)
    lacks_flush = isinstance(destination, ExportEnd) and not destination.can_flush
    unflushed = spec.flush and lacks_flush
    return Summary(size, data, size - data, seconds, len(lanes), spec.verify, unflushed)


def _check(spec: CopySpec) -> None:
    source, destination = export_of(spec.source), export_of(spec.destination)
    same = source == destination if source else same_file(spec.source, spec.destination)
    if same or (source is None and spec.source == spec.destination != "-"):
        raise ConfigError("source and destination are the same", hint="name two different ones")
    if spec.source == NULL:
        raise ConfigError("null: is for a destination", hint="copy from a file, or from /dev/zero")
    if spec.verify and ("-" in (spec.source, spec.destination) or spec.destination == NULL):
        raise _NOT_COMPARABLE
    if source is destination is None and spec.tls not in (NO_OPTIONS, TLSOptions("off")):
        raise ConfigError(
            "there are options for TLS, and neither end is an export",
            hint="leave them out, or name an export: nbds://HOST/EXPORT",
        )
    if spec.connections is not None and not 1 <= spec.connections <= 64:
        raise ConfigError(f"{spec.connections} connections are not possible", hint="use 1 to 64")
    if not 1 <= spec.tuning.requests <= 1024:
        raise ConfigError(f"{spec.tuning.requests} requests at a time are not possible (1 to 1024)")
    for what, size, least in (
        ("requests", spec.tuning.request_size, 4096),
        ("blocks of zeroes", spec.tuning.sparse or 512, 512),
    ):
        if not least <= size <= 32 << 20 or size & (size - 1):
            raise ConfigError(
                f"{what} of {size} bytes are not possible",
                hint=f"use a power of two from {least} to 32M",
            )


def _tls(target: Target, spec: CopySpec) -> TLSOptions:
    """Give the options for one of the exports: credentials are for the one that says nbds."""
    ends = [export_of(word) for word in (spec.source, spec.destination) if word != NULL]
    is_other = not target.tls and any(end.tls for end in ends if end)
    return NO_OPTIONS if is_other and spec.tls.policy is None else spec.tls


def _open_source(word: str, spec: CopySpec) -> Source:
    target = export_of(word)
    if target is not None:
        return ExportEnd(target, connections=spec.connections, tls=_tls(target, spec))
    return open_source(word)


def _open_destination(spec: CopySpec) -> Destination:
    if spec.destination == NULL:
        return NullEnd()
    target = export_of(spec.destination)
    allocate = spec.tuning.allocate
    if target is not None:
        return ExportEnd(
            target, connections=spec.connections, allocate=allocate, tls=_tls(target, spec)
        )
    return open_destination(spec.destination, allocate=allocate)


def _copy(
    spec: CopySpec, source: Source, destination: Destination, watch: Watch | None
) -> tuple[Sequence[Lane], int]:
    """Copy; give the lanes that did it, and how many bytes there were."""
    alignment = max(source.alignment, destination.alignment)
    tuning = _suited(spec.tuning, source, destination)
    between_files = isinstance(source, FileSource) and isinstance(destination, FileDestination)
    length = RANGE if between_files else tuning.request_size
    if source.size is None:
        supply = Supply(stream_segments(length))
    else:
        supply = Supply(segments(source.extents(), source.size, alignment=alignment, length=length))
    lanes: list[Lane] = []
    with contextlib.ExitStack() as stack:
        if isinstance(source, FileSource) and isinstance(destination, FileDestination):
            lanes.append(RangeLane(supply, source, destination))
        else:
            count = _count(source, destination)
            for pair in _pairs(spec, count, stack, source.open_lane, destination.open_lane):
                lanes.append(CopyLane(supply, *pair, tuning))
        run_lanes(lanes, supply, watch("copying", source.size) if watch else None)
        size = source.size if supply.end is None else supply.end
        assert size is not None
        destination.finish(size, flush=spec.flush)
    return lanes, size


def _suited(tuning: Tuning, one: Source, other: Source | Destination) -> Tuning:
    """Give the tuning that suits both ends."""
    alignment = max(one.alignment, other.alignment)
    # What goes nowhere is not looked at.
    sparse = 0 if isinstance(other, NullEnd) else tuning.sparse
    largest = min(tuning.request_size, one.largest, other.largest)
    return replace(
        tuning,
        request_size=max(alignment, largest // alignment * alignment),
        sparse=sparse and max(sparse, alignment),
    )


def _count(one: Source, other: Source | Destination) -> int:
    """Say how many lanes to use: as many as both ends allow."""
    return min((lanes for lanes in (one.lanes, other.lanes) if lanes is not None), default=1)


def _pairs(
    spec: CopySpec,
    count: int,
    stack: contextlib.ExitStack,
    one: Callable[[], _One],
    other: Callable[[], _Other],
) -> Iterator[tuple[_One, _Other]]:
    """Open a lane of each end `count` times, or as often as their servers let us in.

    Raises:
        TransportError, RemoteProtocolError, OptionError: not once, or not as often as was asked.
    """
    for number in range(count):
        try:
            left = one()
            stack.callback(left.leave)
            right = other()
            stack.callback(right.leave)
        except (TransportError, RemoteProtocolError, OptionError):
            if not number or spec.connections:
                raise
            return
        yield left, right


def _verify(spec: CopySpec, size: int, watch: Watch | None) -> None:
    """Read both ends anew and compare them.

    What both say reads as zeroes is not read: there is nothing behind it that could differ.
    """
    with contextlib.ExitStack() as stack:
        source = _open_source(spec.source, spec)
        stack.callback(source.close)
        destination = _open_source(spec.destination, spec)
        stack.callback(destination.close)
        if isinstance(destination, FileSource):
            destination.forget()
        tuning = _suited(spec.tuning, source, destination)
        supply = Supply(
            segments(
                both(source.extents(), destination.extents()),
                size,
                alignment=max(source.alignment, destination.alignment),
                length=tuning.request_size,
            )
        )
        count = _count(source, destination)
        lanes = [
            CompareLane(supply, *pair, tuning)
            for pair in _pairs(spec, count, stack, source.open_lane, destination.open_lane)
        ]
        run_lanes(lanes, supply, watch("verifying", size) if watch else None)
    report(lanes, source.name, destination.name)
