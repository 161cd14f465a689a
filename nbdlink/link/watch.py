"""What happens to links, seen from outside: by looking again and again, and by listening.

Nothing here speaks to a supervisor, and nothing needs rights: what is attached is in sysfs, what
is known of it in its record, what it does in the block layer's counters. The kernel tells when
a connection dies or a device changes, so that a look at the right moment says what became of it.

How many connections are up is the one thing that takes long to find out on a machine with many
processes or sockets (`sysfs.live_links`, `health`). It is looked for when something was heard,
and else so seldom that it takes a hundredth of the time at most.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from nbdlink.errors import ConfigError
from nbdlink.kernel import statistics, sysfs
from nbdlink.kernel.events import Event, EventKind
from nbdlink.kernel.state import DeviceState
from nbdlink.kernel.statistics import Rates, Sample
from nbdlink.link import record
from nbdlink.link.health import count_live, looked
from nbdlink.link.record import Record
from nbdlink.sizes import format_size
from nbdlink.uri import Target

HISTORY = 60
"""How many rates of a link are kept."""

STALL_SECONDS = 3.0
"""A device on which requests wait, and none has been completed for so long, is called stalled."""

_LOOKING_SHARE = 0.01
_SETTLE_SECONDS = 0.1
_ECHO_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Link:
    """An attached device, as it was at one moment.

    Attributes:
        index: N of /dev/nbdN.
        name: the link's name, or None.
        state: a `DeviceState`.
        size: bytes.
        live: how many connections are up, or None if that is not to be seen from here.
        total: how many it was given, or None if that was not recorded.
        target: the export's URI, or what the kernel shows as backend, or None.
        routes: the servers that its connections were made to.
        tls: "none", "kernel", "relay" or "mixed"; None if that was not recorded.
        renewals: how many connections have been replaced since it was attached.
        identity: what tells one use of the device from the next.
    """

    index: int
    name: str | None
    state: str
    size: int
    live: int | None
    total: int | None
    target: str | None = None
    routes: tuple[str, ...] = ()
    tls: str | None = None
    renewals: int = 0
    identity: tuple[str | None, int | None] = (None, None)

    @property
    def device(self) -> str:
        """The path of its node."""
        return f"/dev/nbd{self.index}"

    @property
    def connections(self) -> str:
        """Live connections of all, `3/4`."""
        return "/".join(
            "?" if number is None else str(number) for number in (self.live, self.total)
        )


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that happened to a device.

    Attributes:
        time: seconds since the epoch.
        event: which kind of thing, a word of `nbdlink-watch(8)`.
        index: N of /dev/nbdN, or None if it concerns all.
        name: the link's name, or None.
        message: the same for people.
    """

    time: float
    event: str
    index: int | None
    name: str | None
    message: str

    @property
    def device(self) -> str | None:
        """The path of the device's node."""
        return None if self.index is None else f"/dev/nbd{self.index}"


@dataclass(slots=True)
class Activity:
    """What a device has done lately.

    Attributes:
        sample: the newest counters.
        rates: between the newest two, or None if there are no two.
        history: bytes per second read and written, the newest last.
        progress: when a request was last completed or none was waiting, of `time.monotonic()`.
    """

    sample: Sample
    rates: Rates | None = None
    history: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY))
    progress: float = 0.0


class Observer:
    """Looks at devices, and remembers what it saw last.

    Args:
        wanted: devices (`/dev/nbdN`, `nbdN`) and names of links; none means all. A link that is
            not attached is waited for.

    Attributes:
        links: what is attached, by index.
        activity: what it does, by index.

    Raises:
        ConfigError: a word is neither.
    """

    def __init__(self, wanted: Sequence[str] = ()) -> None:
        self._indices, self._names = _selection(wanted)
        self._all = not wanted
        self._counts: dict[int, int] | None = None
        self._count_next = 0.0
        self._fell: dict[int, float] = {}
        self.links: dict[int, Link] = {}
        self.activity: dict[int, Activity] = {}

    @property
    def missing(self) -> list[str]:
        """What was asked for and is not attached."""
        names = {link.name for link in self.links.values()}
        devices = [f"/dev/nbd{index}" for index in sorted(self._indices - self.links.keys())]
        return devices + sorted(self._names - names)

    def look(self, heard: Sequence[Event] = ()) -> list[Notice]:
        """Look at everything again; tell what has happened since the last time.

        Args:
            heard: what the kernel said meanwhile.
        """
        before = self.links
        died = self._died(heard)
        self.links = self._look(bool(heard), died)
        for index in self.activity.keys() - self.links.keys():
            del self.activity[index]
        now = time.monotonic()
        self._fell |= {
            index: now
            for index, link in self.links.items()
            if index in before and (before[index].live or 0) > (link.live or 0)
        }
        heard = [each for each in heard if each.kind is not EventKind.DEAD or each.index in died]
        known = before.keys() | self.links.keys() | self._indices
        return [
            notice
            for notice in compare(before, self.links, heard, time.time())
            if self._all or notice.index is None or notice.index in known
        ]

    def measure(self) -> list[Notice]:
        """Read the counters of every link; tell which of them stall, and which do so no more."""
        notices = []
        for index, link in self.links.items():
            sample = statistics.sample(index)
            if sample is None:
                continue
            activity = self.activity.get(index)
            if activity is None:
                self.activity[index] = Activity(sample, progress=sample.time)
                continue
            _advance(activity, sample)
            state = _state_after(link, activity)
            if state != link.state:
                self.links[index] = replace(link, state=state)
                message = _STATE_MESSAGES[state]
                notices.append(Notice(time.time(), "state", index, link.name, message))
        return notices

    def _died(self, heard: Iterable[Event]) -> set[int]:
        """Give the devices of which a death was heard that is not an echo of one seen already.

        The kernel tells of each connection separately, and somewhat after it is gone.
        """
        now = time.monotonic()
        dead = {each.index for each in heard if each.kind is EventKind.DEAD}
        return {
            index
            for index in dead
            if index is not None and now - self._fell.get(index, -_ECHO_SECONDS) >= _ECHO_SECONDS
        }

    def _look(self, force: bool, died: set[int]) -> dict[int, Link]:
        attached = {}
        for index in sysfs.indices():
            if (pid := sysfs.pid(index)) is None:
                continue
            backend = sysfs.backend(index)
            known = record.read(index)
            if known is not None and not known.describes(backend, pid):
                known = None
            if self._wants(index, known.name if known else None):
                attached[index] = (pid, backend, known)
        records = {index: known for index, (_, _, known) in attached.items()}
        self._count(force or attached.keys() != self.links.keys(), records, died)
        return {
            index: _link(index, *found, self._live(index), self.links.get(index))
            for index, found in attached.items()
        }

    def _wants(self, index: int, name: str | None) -> bool:
        return self._all or index in self._indices or name in self._names

    def _live(self, index: int) -> int | None:
        return None if self._counts is None else self._counts.get(index)

    def _count(self, force: bool, attached: dict[int, Record | None], died: set[int]) -> None:
        """Count the connections that are up, if it is worth it."""
        now = time.monotonic()
        if not attached or (not force and now < self._count_next):
            return
        began = time.thread_time()
        self._counts = _counted(attached)
        # What was heard may not show yet; the next look will see to it that nothing is missed.
        cost = 0.0 if force else (time.thread_time() - began) / _LOOKING_SHARE
        self._count_next = now + cost
        # A connection is told to have died a moment before it shows, and one that has just been
        # made shows a moment later.
        deadline = now + _SETTLE_SECONDS
        while self._counts and time.monotonic() < deadline and self._doubtful(attached, died):
            time.sleep(_SETTLE_SECONDS / 10)
            self._counts = _counted(attached)

    def _doubtful(self, attached: Collection[int], died: set[int]) -> bool:
        for index in attached:
            live = self._live(index)
            before = self.links[index].live if index in self.links else None
            if live is None:
                continue
            if index in died and before is not None and live >= before:
                return True
            if live == 0 and before != 0 and index not in died:
                return True
        return False


def _counted(attached: dict[int, Record | None]) -> dict[int, int] | None:
    """Count the connections that are up, by their sockets where these are known."""
    records = [known for known in attached.values() if known is not None]
    look = looked({each.cookie for known in records for each in known.channels})
    seen = {known.index: count_live(known, look) for known in records}
    exact = {index: live for index, live in seen.items() if live is not None}
    if exact.keys() == attached.keys():
        return exact
    counts = sysfs.live_links()
    return None if counts is None and not exact else {**(counts or {}), **exact}


def compare(
    before: Mapping[int, Link], after: Mapping[int, Link], heard: Iterable[Event], moment: float
) -> list[Notice]:
    """Tell what happened between two looks.

    Args:
        before: links by index.
        after: the same, later.
        heard: what the kernel said between the two.
        moment: seconds since the epoch, for the notices.
    """
    return list(_compare(before, after, list(heard), moment))


def _compare(
    before: Mapping[int, Link], after: Mapping[int, Link], heard: list[Event], moment: float
) -> Iterator[Notice]:
    died = {event.index for event in heard if event.kind is EventKind.DEAD}
    for event in heard:
        if event.kind is EventKind.LOST:
            yield Notice(moment, "lost", None, None, "there may have been more than was heard")
        elif event.kind is EventKind.ADDED:
            yield Notice(moment, "appeared", event.index, None, "the kernel made the device")
    for index in sorted(before.keys() | after.keys()):
        old, new = before.get(index), after.get(index)
        if old is not None and (new is None or new.identity != old.identity):
            yield Notice(moment, "detached", index, old.name, "detached")
            old = None
        if new is None:
            continue
        if old is None:
            where = f" to {new.target}" if new.target else ""
            message = f"attached{where}, {new.connections} connections"
            yield Notice(moment, "attached", index, new.name, message)
        else:
            for kind, message in _changes(old, new, index in died):
                yield Notice(moment, kind, index, new.name, message)
    for event in heard:
        if event.kind is EventKind.REMOVED:
            yield Notice(moment, "vanished", event.index, None, "the kernel removed the device")


def _changes(old: Link, new: Link, heard_death: bool) -> Iterator[tuple[str, str]]:
    """Tell what changed about a link that has been attached all the while."""
    if old.live is None or new.live is None:
        died, back = int(heard_death), max(new.renewals - old.renewals, 0)
    else:
        # One that died and left no gap has been renewed already.
        died = max(old.live - new.live, int(heard_death))
        back = new.live - old.live + died
    if died:
        yield "connection-died", f"{_connections(died)} died, {new.connections} up"
    if back:
        yield "connection-renewed", f"{_connections(back)} renewed, {new.connections} up"
    if new.size != old.size:
        yield "resized", f"resized from {format_size(old.size)} to {format_size(new.size)}"
    if new.routes != old.routes and new.routes:
        yield "moved", f"now over {', '.join(new.routes)}"
    if new.state != old.state:
        yield "state", _STATE_MESSAGES.get(new.state, new.state)


_STATE_MESSAGES = {
    "attached": "in order again",
    "dead": "dead: no connection is left",
    "stalled": "stalled: requests wait, and none is completed",
    "unknown": "what state its connections are in cannot be seen",
}


def _connections(count: int) -> str:
    return "a connection" if count == 1 else f"{count} connections"


def _selection(wanted: Sequence[str]) -> tuple[set[int], set[str]]:
    indices, names = set(), set()
    for word in wanted:
        bare = word.removeprefix("/dev/")
        if "/" in word or (bare.startswith("nbd") and bare[3:].isdigit()):
            indices.add(sysfs.index_of(word, must_exist=False))
            continue
        try:
            names.add(record.check_name(word))
        except ConfigError:
            raise ConfigError(
                f"{word!r} is neither a device nor a link's name",
                hint="say /dev/nbdN, nbdN, or a name of `nbdlink list`",
            ) from None
    return indices, names


def _link(
    index: int,
    pid: int,
    backend: str | None,
    known: record.Record | None,
    live: int | None,
    before: Link | None,
) -> Link:
    size = sysfs.size(index)
    if live == 0 or size == 0:
        state = DeviceState.DEAD
    elif live is None:
        state = DeviceState.UNKNOWN
    else:
        state = DeviceState.ATTACHED
    if before is not None and before.state == DeviceState.STALLED and state != DeviceState.DEAD:
        state = DeviceState.STALLED  # until `measure` sees a request completed
    if known is None:
        return Link(index, None, state, size, live, None, backend, identity=(backend, pid))
    return Link(
        index,
        known.name,
        state,
        size,
        live,
        known.connections,
        known.target,
        _routes(known),
        _tls(known),
        sum(channel.renewals for channel in known.channels),
        (backend, pid),
    )


def _routes(known: record.Record) -> tuple[str, ...]:
    uris = [channel.route for channel in known.channels if channel.route] or [known.target]
    addresses = []
    for uri in uris:
        try:
            addresses.append(Target.parse(uri).address)
        except ConfigError:
            addresses.append(uri)
    return tuple(dict.fromkeys(addresses))


def _tls(known: record.Record) -> str:
    roads = {channel.tls for channel in known.channels} or {"none"}
    return roads.pop() if len(roads) == 1 else "mixed"


def _advance(activity: Activity, sample: Sample) -> None:
    found = statistics.rates(activity.sample, sample)
    if found is None or found.per_second or not sample.in_flight:
        activity.progress = sample.time
    activity.sample, activity.rates = sample, found
    if found is not None:
        activity.history.append(found.read.bytes_per_second + found.write.bytes_per_second)


def _state_after(link: Link, activity: Activity) -> str:
    if link.state not in (DeviceState.ATTACHED, DeviceState.STALLED):
        return link.state
    stalled = activity.sample.time - activity.progress >= STALL_SECONDS
    return DeviceState.STALLED if stalled else DeviceState.ATTACHED


# As `nbdlink watch --json` prints it; the keys are documented in nbdlink-watch(8).


def link_as_json(link: Link, moment: float) -> dict[str, Any]:
    """Give what is known of a link."""
    return {
        "type": "link",
        "time": round(moment, 3),
        "device": link.device,
        "name": link.name,
        "state": str(link.state),
        "size": link.size,
        "connections": {"live": link.live, "total": link.total},
        "renewals": link.renewals,
        "target": link.target,
        "routes": list(link.routes),
        "tls": link.tls,
    }


def absent_as_json(what: str, moment: float) -> dict[str, Any]:
    """Say of a device or a link's name that nothing of the kind is attached."""
    is_device = what.startswith("/dev/")
    absent = Link(0, None, "absent", 0, None, None)
    return link_as_json(absent, moment) | {
        "device": what if is_device else None,
        "name": None if is_device else what,
    }


def notice_as_json(notice: Notice) -> dict[str, Any]:
    """Give what happened."""
    values = asdict(notice)
    del values["index"]
    values["time"] = round(notice.time, 3)
    return {"type": "event", "device": notice.device, **values}


def rates_as_json(link: Link, activity: Activity, moment: float) -> dict[str, Any] | None:
    """Give what a link did since it was last measured; None if that is not known yet."""
    rates = activity.rates
    if rates is None:
        return None
    kinds = {
        "read": rates.read, "write": rates.write, "discard": rates.discard, "flush": rates.flush
    }  # fmt: skip
    return {
        "type": "sample",
        "time": round(moment, 3),
        "device": link.device,
        "name": link.name,
        "state": str(link.state),
        "connections": {"live": link.live, "total": link.total},
        "seconds": round(rates.seconds, 3),
        **{
            kind: {
                "requests_per_second": round(rate.per_second, 3),
                "bytes_per_second": round(rate.bytes_per_second),
                "latency_ms": None if rate.latency is None else round(rate.latency, 3),
            }
            for kind, rate in kinds.items()
        },
        "queue_depth": round(rates.queue_depth, 3),
        "in_flight": rates.in_flight,
        "utilisation": round(rates.utilisation, 4),
    }
