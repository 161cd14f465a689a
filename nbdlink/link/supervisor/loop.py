"""The daemon: attaches what is configured, renews what breaks, adopts what already runs.

Theory of operation. One loop waits for whatever may happen: the kernel's events, signals, words
of servers that are back, and the time of the next attempt. It never acts itself. What is to be
done about a link (`watched.Watched` decides) is done in a thread of its own, at most one for
each link, which reports back to the loop; negotiating and the kernel's calls may take their time
there. Nothing that the supervisor knows is precious: what is attached and how is in the kernel
and in the records, so it can be killed at any moment and started again, and finds everything.

Events are only a reason to look. Whatever the loop has been told, it looks at the sockets of the
device (`health.health`) before it believes it, and it looks at everything now and then, as an
event can be lost.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import resource
import selectors
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from nbdlink import kernel
from nbdlink.errors import ConfigError, NBDError
from nbdlink.kernel import netlink, sockets, sysfs
from nbdlink.kernel.events import EventKind, Events
from nbdlink.link import record, resize
from nbdlink.link.attach import attach_spec, secure
from nbdlink.link.config.files import Configuration
from nbdlink.link.health import Look, health, looked, strayed
from nbdlink.link.identity import is_true
from nbdlink.link.record import Record
from nbdlink.link.renew import Renewal, renew
from nbdlink.link.spec import LinkSpec, describe, differences, restore
from nbdlink.link.supervisor.adoption import adopt
from nbdlink.link.supervisor.farewell import Farewell
from nbdlink.link.supervisor.notices import Notices
from nbdlink.link.supervisor.waker import Waker
from nbdlink.link.supervisor.watched import Act, Watched
from nbdlink.protocol.claim import digest_of
from nbdlink.transport.activation import notify, watchdog_seconds

_log = logging.getLogger("nbdlink.supervisor")

_SURVEY_SECONDS: Final = 5.0
"""Between two looks at everything, whatever the events say."""
_FAREWELL_SECONDS: Final = 5.0
"""For which a stopping supervisor waits for what is being done."""


@dataclass(frozen=True, slots=True)
class _Report:
    """What a thread has to tell the loop.

    Attributes:
        key: the link.
        act: what was to be done.
        result: what came of it.
    """

    key: str
    act: Act
    result: kernel.Device | Renewal | int | NBDError | None


class Supervisor:
    """Looks after links until it is told to stop.

    Attributes:
        links: what is looked after, by name, or by device where there is no name.
    """

    def __init__(
        self,
        load: Callable[[], Configuration],
        names: Sequence[str] = (),
        *,
        notice_port: int | None = None,
        until_detached: bool = False,
    ) -> None:
        """Prepare; nothing happens before `run`.

        Args:
            load: reads the configuration; called again when it is to be read anew.
            names: the only links to look after; none for all that are configured or attached.
            notice_port: UDP port on which to hear that servers are back, or None.
            until_detached: whether to end when all links have been detached on purpose.

        Raises:
            ConfigError: the configuration has a mistake, or there is no link of that name.
        """
        self.links: dict[str, Watched] = {}
        self._load = load
        self._names = tuple(names)
        self._notice_port = notice_port
        self._until_detached = until_detached
        self._reports: queue.SimpleQueue[_Report] = queue.SimpleQueue()
        self._wanted: dict[str, LinkSpec] = {}
        self._stopping = False
        self._ready = False
        self._next_survey = 0.0
        self._farewell = Farewell()
        self._status = ""
        self._configure(load())
        if not until_detached:
            for name in self._names:
                record.unmark_detached(name)  # who names it wants it

    def run(self) -> None:
        """Look after the links until SIGTERM or SIGINT; devices stay attached.

        To be called in the main thread. SIGHUP reads the configuration again.

        Raises:
            KernelError: the kernel's events cannot be heard.
        """
        _take_descriptors()
        # Has the kernel load what it lists sockets with, now and not when the first one is dead:
        # after an upgrade of the system its modules may be gone.
        sockets.connected([0])
        with contextlib.ExitStack() as stack:
            stack.enter_context(netlink.kept_open())
            events = stack.enter_context(Events())
            for complaint in events.unheard:
                _log.warning("%s; looking every %g s instead", complaint, _SURVEY_SECONDS)
            notices = stack.enter_context(Notices(self._notice_port))
            self._notice_port = notices.port
            self._waker = stack.enter_context(Waker())
            selector = stack.enter_context(selectors.DefaultSelector())
            selector.register(events, selectors.EVENT_READ)
            selector.register(self._waker, selectors.EVENT_READ)
            if notices.port is not None:
                selector.register(notices, selectors.EVENT_READ)
            watchdog = watchdog_seconds()
            while not self._stopping:
                now = time.monotonic()
                self._survey_if_due(now)
                self._act(now)
                self._tell()
                if self._until_detached and all(each.detached for each in self.links.values()):
                    break
                selector.select(self._sleep(watchdog))
                if watchdog is not None:
                    notify("WATCHDOG=1")
                for number in self._waker.signals():
                    self._signalled(number)
                self._heard(events)
                self._hurry(notices)
                self._collect()
            notify("STOPPING=1")
            _log.info("stopping; the devices stay attached")
            self._await_threads()

    # What happens.

    def _signalled(self, number: int) -> None:
        if number == signal.SIGHUP:
            notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
            try:
                self._configure(self._load())
                _log.info("the configuration was read again: %d links", len(self._wanted))
            except NBDError as error:
                _log.error("the configuration stays as it was: %s", error)
            self._next_survey = 0.0
            notify("READY=1")
        elif number in (signal.SIGTERM, signal.SIGINT):
            self._stopping = True

    def _heard(self, events: Events) -> None:
        for event in events.read():
            if event.kind is EventKind.LOST or event.index is None:
                self._next_survey = 0.0
            elif event.kind in (EventKind.ADDED, EventKind.REMOVED):
                # A device that came or went may be one that is waited for.
                self._next_survey = 0.0
                if event.kind is EventKind.ADDED:
                    self._hurry_all(event.index)
            else:
                self._look_at(event.index)

    def _hurry_all(self, index: int) -> None:
        now = time.monotonic()
        for link in self.links.values():
            if link.index is None and link.spec and link.spec.device in (None, f"/dev/nbd{index}"):
                link.hurry(now)

    def _hurry(self, notices: Notices) -> None:
        for digest in notices.read():
            for link in self.links.values():
                # Anybody may write to us, so nothing is looked up for it.
                if link.index is not None and link.digest == digest:
                    if link.hurry(time.monotonic()):
                        _log.info("%s: its server says that it is back", link.title)
                    break

    def _collect(self) -> None:
        # What comes in meanwhile is for the next time: the loop has other duties.
        for _ in range(self._reports.qsize()):
            self._take(self._reports.get_nowait())

    def _take(self, report: _Report) -> None:
        link = self.links.get(report.key)
        if link is None:
            return
        now = time.monotonic()
        result = report.result
        if isinstance(result, NBDError):
            if link.failed(result, now):
                hint = f" ({result.hint})" if result.hint else ""
                _log.warning("%s: %s%s", link.title, result, hint)
        else:
            link.done(now)
            match result:
                case kernel.Device():
                    _log.info("%s: attached as %s", link.title, result.path)
                case Renewal():
                    self._renewed(link, report.act, result)
                case int():
                    _log.info("%s: has grown to %d bytes", link.title, result)
        # Not at everything: a hundred links of a server that is away report all the time.
        index = result.index if isinstance(result, kernel.Device) else link.index
        if index is None:
            self._miss(report.key, link)
        else:
            self._look_at(index)

    def _renewed(self, link: Watched, act: Act, renewal: Renewal) -> None:
        link.strayed, link.health = renewal.strayed, renewal.health
        closed = {str(route): str(error) for route, error in renewal.failures}
        for route, words in closed.items():
            if link.closed.get(route) != words:
                _log.warning("%s: the route %s is closed: %s", link.title, route, words)
        link.closed = closed
        if renewal.renewed:
            live = len(renewal.health.live)
            total = live + len(renewal.health.dead)
            what = "back on their routes" if act == "return" else "renewed"
            numbers = ", ".join(str(number) for number in renewal.renewed)
            _log.info("%s: channels %s %s; %d of %d live", link.title, numbers, what, live, total)
        if renewal.grown_to is not None:
            _log.info("%s: has grown to %d bytes", link.title, renewal.grown_to)

    # What there is.

    def _configure(self, configuration: Configuration) -> None:
        known_names = {known.name for known in record.read_all()} | {*configuration.links}
        if missing := [name for name in self._names if name not in known_names]:
            raise ConfigError(
                f"there is no link named {missing[0]!r}",
                hint="say [link.NAME] in /etc/nbdlink.toml, or attach it with --name",
            )
        wanted = {
            name: link.spec
            for name, link in configuration.links.items()
            if not self._names or name in self._names
        }
        for configured in configuration.links.values():
            for note in configured.notes if str(configured.spec.name) in wanted else ():
                _log.info("%s", note)
        for name, link in list(self.links.items()):
            if name in self._wanted and name not in wanted:
                link.spec = None  # what is attached goes on, and is looked after
        self._wanted = wanted
        for name, spec in wanted.items():
            known = self.links.setdefault(name, Watched(name))
            if known.spec != spec:
                known.spec, known.compared = spec, False

    def _survey_if_due(self, now: float) -> None:
        if now >= self._next_survey:
            self._next_survey = now + _SURVEY_SECONDS
            try:
                self._survey()
            except (NBDError, OSError) as error:  # being short of something is no end of it
                _log.warning("nothing can be seen just now: %s", error)
            self._farewell.look(self.links.values(), now)

    def _survey(self) -> None:
        """Look at everything."""
        found: dict[str, Record] = {}
        for known in record.read_all():
            if is_true(known) and (key := self._key(known)) is not None:
                found[key] = known
        for name, spec in self._wanted.items():
            link = self.links[name]
            if name not in found and not link.busy and (adopted := adopt(spec)):
                _log.info("%s: adopted %s, of which nothing was recorded", name, adopted.title)
                found[name] = adopted
        look = looked({each.cookie for known in found.values() for each in known.channels})
        for key, known in found.items():
            if key not in self.links:
                self.links[key] = Watched(known.title)
                _log.info("%s: adopted", known.title)
            self._see(self.links[key], known, look)
        for key, link in list(self.links.items()):
            if key not in found:
                self._miss(key, link)

    def _look_at(self, index: int) -> None:
        """Look at one device, of which there is news."""
        try:
            self._look_closely(index)
        except NBDError:
            self._next_survey = 0.0  # which will say so

    def _look_closely(self, index: int) -> None:
        known = record.read(index)
        if known is None or (key := self._key(known)) is None or not is_true(known):
            self._next_survey = 0.0
        elif key in self.links:
            self._see(self.links[key], known)
        else:
            self._next_survey = 0.0

    def _see(self, link: Watched, known: Record, look: Look = sockets.connected) -> None:
        """Take note of what a device is like."""
        if link.spec is not None and known.spec and not link.compared:
            link.compared = True
            wanted = _described(link.spec)
            changed = [each for each in differences(known.spec, wanted) if each != "road"]
            if changed:
                _log.warning(
                    "%s: is not attached as it is configured, but differs in %s; it stays so until "
                    "it is detached",
                    link.title,
                    " and ".join(changed),
                )
        link.index = known.index
        link.detached = False
        link.tried = True
        link.measurable = known.signature is not None
        link.strayed = strayed(known)
        session = record.read_session(known.index)
        link.digest = None if session is None else digest_of(session)
        before = link.health.dead if link.health else ()
        if known.road == "netlink":
            link.health = health(known, look)
        else:
            self._see_ioctl(link, known)
        if link.health and link.health.dead != before and not link.busy:
            if link.health.dead:
                numbers = ", ".join(str(number) for number in link.health.dead)
                _log.info("%s: channels %s are dead", link.title, numbers)
            else:
                _log.info("%s: somebody else has renewed it", link.title)
        link.seen(time.monotonic())

    def _see_ioctl(self, link: Watched, known: Record) -> None:
        """Take note of a device that ends with its connections, but not while it is open."""
        counts = sysfs.live_links() or {}
        ended = counts.get(known.index) == 0
        if ended and not link.ended:
            _log.warning(
                "%s: has lost its server, and ioctls cannot renew it; it is attached again when "
                "nobody has it open any more",
                link.title,
            )
        link.ended = ended

    def _miss(self, key: str, link: Watched) -> None:
        """Take note that a link is not attached."""
        # What has no name is marked by its device.
        before = link.detached
        link.detached = record.is_detached(key.removeprefix("/dev/"))
        if link.detached and not before and link.index is None and link.spec:
            _log.info("%s: stays detached; nbdlink attach --name %s brings it back", key, key)
        if link.index is not None:
            self._lost(key, link)
        if link.detached and key not in self._wanted:
            link.spec = None
        if link.spec is None and not link.busy:
            del self.links[key]
        else:
            link.seen(time.monotonic())

    def _lost(self, key: str, link: Watched) -> None:
        """Take note that a device is not attached any more."""
        index, link.index, link.health, link.ended = link.index, None, None, False
        link.compared = False
        assert index is not None
        known = record.read(index)
        if known is None or link.detached or self._key(known) != key or is_true(known):
            # What is recorded, if anything is, may be the device's next use already.
            _log.info("%s: was detached", link.title)
        elif known.road == "ioctl" and link.spec is None:
            # Such a device ends with its connections. What is asked for is known.
            with contextlib.suppress(ConfigError):
                link.spec = replace(
                    restore(known.spec, known.name, f"/dev/nbd{index}"), road="ioctl"
                )
            _log.info("%s: has ended", link.title)
        else:
            record.remove(index)
            _log.warning("%s: is gone", link.title)

    def _key(self, known: Record) -> str | None:
        """Give the key of a device that is looked after."""
        if self._names and known.name not in self._names:
            return None
        return known.name or f"/dev/nbd{known.index}"

    # What is done.

    def _act(self, now: float) -> None:
        for key, link in self.links.items():
            if act := link.next_act(now):
                patience = link.begin(act, now)
                threading.Thread(
                    target=self._work,
                    args=(key, act, link.spec, link.index, link.strayed, patience),
                    name=f"link-{key}",
                    daemon=True,
                ).start()

    def _work(
        self,
        key: str,
        act: Act,
        spec: LinkSpec | None,
        index: int | None,
        away: tuple[int, ...],
        patience: float | None,
    ) -> None:
        """Do it, in a thread of its own, and tell the loop."""
        result: kernel.Device | Renewal | int | NBDError | None
        try:
            if act == "attach":
                assert spec is not None
                result = attach_spec(spec, notice=self._notice_port, unasked=True)
            else:
                assert index is not None
                if act == "measure":
                    result = resize.follow(index)
                else:
                    also = away if act == "return" else ()
                    result = renew(index, also=also, timeout=patience, notice=self._notice_port)
        except NBDError as error:
            result = error
        except Exception as error:
            # A bug of ours, or the system is out of something. It must not cost the other links.
            _log.debug("%s", key, exc_info=True)
            result = NBDError(f"unexpected {type(error).__name__}: {error}")
        self._reports.put(_Report(key, act, result))
        self._waker.wake()

    def _await_threads(self) -> None:
        """Let what is being done come to its end; the system does without us if it cannot."""
        deadline = time.monotonic() + _FAREWELL_SECONDS
        for thread in threading.enumerate():
            if thread.name.startswith("link-"):
                thread.join(max(0.0, deadline - time.monotonic()))

    def _sleep(self, watchdog: float | None) -> float:
        times = [link.next_time() for link in self.links.values()]
        now = time.monotonic()
        wake = min([self._next_survey, *(each for each in times if each is not None)])
        pause = max(0.0, wake - now)
        return pause if watchdog is None else min(pause, watchdog / 2)

    def _tell(self) -> None:
        """Tell the service manager how it goes, if that has changed."""
        states = [link.state for link in self.links.values()]
        words = f"{len(states)} link{'s' if len(states) != 1 else ''}" + "".join(
            f", {states.count(state)} {state}"
            for state in ("attached", "degraded", "dead", "waiting", "detached")
            if state in states
        )
        troubled = [link for link in self.links.values() if link.trouble is not None]
        if troubled:
            words += f"; {troubled[0].title}: {troubled[0].trouble}"
        words = " ".join(words.split())  # a line of its own would be another variable
        if words != self._status:
            self._status = words
            notify(f"STATUS={words}")
        waited = (link for link in self.links.values() if link.spec and not link.detached)
        if not self._ready and all(link.tried for link in waited):
            self._ready = True
            notify("READY=1")
            _log.info("ready: %s", words)


def _described(spec: LinkSpec) -> dict[str, Any]:
    """Describe what is configured as it is recorded once it is attached."""
    with contextlib.suppress(ConfigError):  # which attaching it will tell
        spec, _ = secure(spec)
    return describe(spec)


def _take_descriptors() -> None:
    """Have as many as are allowed: when a server is back, all its links are renewed at once."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
