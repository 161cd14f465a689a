"""What a supervisor knows of one link, and what it would do next: decisions without any act.

A link is wanted by the configuration, or was found attached and adopted, or both. It is looked
at (`see`), which tells what is to be done; tried (`begin`, then `done` or `failed`); and tried
again when its backoff says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nbdlink.errors import NBDError, is_retryable
from nbdlink.link.health import Health
from nbdlink.link.spec import LinkSpec
from nbdlink.link.supervisor.backoff import Backoff

Act = Literal["attach", "renew", "return", "measure"]
"""Bind the device; renew dead channels; give channels back the route that is theirs; see whether
the export has grown."""

RETURN_SECONDS = 30.0
"""Between two attempts to go back to a route that was dead."""
MEASURE_SECONDS = 30.0
"""Between two looks at an export's size, more or less: not at all of a server's at once."""
_HOPELESS_SECONDS = 30.0
"""Before what needs a person's help is tried again all the same: that person has been there."""
_IMPATIENT_SECONDS = 2.0
"""For a connection, in most attempts: a server that is back must not be waited for with one that
was begun when it was away."""


@dataclass(slots=True)
class Watched:
    """One link, as a supervisor sees it.

    Attributes:
        title: what it is called in messages.
        spec: what to attach, or None for a device that was found and is not configured.
        index: N of `/dev/nbdN` while something is attached that is this link.
        health: the channels, as they were seen last; None on the ioctl road.
        measurable: whether the server proves which export it is, so that growth can be followed.
        ended: whether it is of the ioctl road and has ended, but somebody still has it open.
        detached: whether it was detached on purpose.
        strayed: channels that do not take their own route.
        closed: routes that led nowhere the last time, and why.
        compared: whether what is attached has been compared with what is configured.
        digest: by which its server calls it when it is back (`nbdlink.protocol.claim`), or None.
        busy: what is being done about it just now.
        due: when it is to be tried again, or None if there is nothing to try.
        trouble: what went wrong the last time, or None.
        grumble: what went wrong the last time with what is not urgent.
        tried: whether it has been attempted, or found, at least once.
    """

    title: str
    spec: LinkSpec | None = None
    index: int | None = None
    health: Health | None = None
    measurable: bool = False
    ended: bool = False
    detached: bool = False
    strayed: tuple[int, ...] = ()
    closed: dict[str, str] = field(default_factory=dict)
    compared: bool = False
    digest: str | None = None
    busy: Act | None = None
    due: float | None = None
    trouble: NBDError | None = None
    grumble: str = ""
    tried: bool = False
    backoff: Backoff = field(default_factory=Backoff)
    next_return: float = 0.0
    next_measure: float = 0.0

    @property
    def state(self) -> str:
        """One word for people."""
        if self.index is None:
            return "detached" if self.detached else "waiting"
        if self.ended:
            return "dead"
        if self.health is None or not self.health.dead:
            return "attached"
        return "degraded" if self.health.live else "dead"

    def needs(self) -> Act | None:
        """Tell what is to be done about it, time left aside."""
        if self.index is None:
            return "attach" if self.spec is not None and not self.detached else None
        if self.health is not None and self.health.dead:
            return "renew"
        return None

    def next_act(self, now: float) -> Act | None:
        """Tell what is to be done about it now."""
        if self.busy:
            return None
        act = self.needs()
        if act:
            return act if self.due is not None and now >= self.due else None
        if self.index is None or self.health is None:
            return None
        if self.strayed and now >= self.next_return:
            return "return"
        if self.measurable and now >= self.next_measure:
            return "measure"
        return None

    def next_time(self) -> float | None:
        """Tell when `next_act` may give something, or None if never without an event."""
        if self.busy:
            return None
        if self.needs():
            return self.due
        if self.index is None or self.health is None:
            return None
        times = []
        if self.strayed:
            times.append(self.next_return)
        if self.measurable:
            times.append(self.next_measure)
        return min(times, default=None)

    def seen(self, now: float) -> None:
        """Take note that it was looked at: what is to be done is due, unless it is waited for."""
        if self.needs() is None:
            self.due = None
            if self.trouble is not None and self.index is not None:
                self.trouble = None
        elif self.due is None and not self.busy:
            self.due = self.backoff.failed(now)

    def begin(self, act: Act, now: float) -> float | None:
        """Take note that something is being done; give the patience for a connection, in s."""
        self.busy = act
        self.due = None
        if act == "return":
            self.next_return = now + RETURN_SECONDS
        if act == "measure":
            self.next_measure = now + self.backoff.scattered(MEASURE_SECONDS)
        patient = act == "attach" or self.backoff.attempts % 4 == 3
        return None if patient else _IMPATIENT_SECONDS

    def done(self, now: float) -> None:
        """Take note that it has been done."""
        act, self.busy = self.busy, None
        self.tried = True
        if act in ("attach", "renew"):
            self.trouble = None
            self.backoff.succeeded(now)
            self.next_measure = now + self.backoff.scattered(MEASURE_SECONDS)
        else:
            self.grumble = ""

    def failed(self, error: NBDError, now: float) -> bool:
        """Take note that it failed; tell whether that is news."""
        act, self.busy = self.busy, None
        self.tried = True
        if act not in ("attach", "renew"):
            # The link is well all the same, and being seen to be is no end of this.
            news, self.grumble = self.grumble != str(error), str(error)
            return news
        news = self.trouble is None or str(self.trouble) != str(error)
        self.trouble = error
        self.due = self.backoff.failed(now)
        if not is_retryable(error):
            self.due = max(self.due, now + _HOPELESS_SECONDS)
        return news

    def hurry(self, now: float) -> bool:
        """Try at once, if it is waited for; tell whether it is."""
        self.backoff.hurry()
        if self.due is None or self.busy or not self.needs():
            return False
        self.due = now
        return True
