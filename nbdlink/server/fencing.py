"""Fencing: a channel's successor is served only when nothing of its predecessor is left.

What a claim is, and why there are any, says `protocol/claim.py`. This is the server's book of
them. The first process keeps it, wherever connections are served: a session's thread there comes
back only when the connection's last request has ended, in whichever process that was
(`Processes`), and `release` is called then and not before.

The rules, for the claims of one channel, which is an export, a session and a number:

 1. One connection at a time holds the channel: from the moment it is admitted, before the client
    hears of it, until nothing of it can reach the storage any more.
 2. A claim must have a higher generation than all that have been admitted.
 3. It breaks the holder off, and waits until that has let go. What the holder has read and not
    begun is dropped; what it has begun is waited for to its end, as nobody can call it back.
 4. One waits at a time: the one with the highest generation, and of equals, none of which has
    been admitted, the last to come. The others are refused.
 5. Who has waited in vain is refused and may try again, with the same generation too. The
    holder stays broken off.
"""

from __future__ import annotations

import logging
import select
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from nbdlink.protocol.claim import Claim
from nbdlink.server.sessions import Session

_log = logging.getLogger("nbdlink.server")

_REMEMBERED: Final = 1 << 14
"""Channels of which the generation is known; of those that have no connection, the oldest are
forgotten. It takes about 6 MB."""
_GLANCE: Final = 0.2
"""Seconds between two looks at whether the client that waits is still there."""
_SHARE: Final = 0.8
"""The part of the time left for the handshake that may be waited; the rest is for the answer."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a claim is not admitted.

    Attributes:
        words: for people.
        is_passing: whether the same claim may be admitted later.
    """

    words: str
    is_passing: bool = False


Admit = Callable[[str, Claim], Refusal | None]
"""Waits until the predecessors on an export are gone; gives why that cannot be, or None."""


class _Candidate:
    """A connection that waits for the channel."""

    __slots__ = ("generation",)

    def __init__(self, generation: int) -> None:
        self.generation = generation


class _Channel:
    """What is known of a channel."""

    __slots__ = ("candidate", "highest", "holder")

    def __init__(self) -> None:
        self.highest = -1  # generation, of those that have been admitted
        self.holder: Session | None = None
        self.candidate: _Candidate | None = None

    @property
    def is_idle(self) -> bool:
        return self.holder is None and self.candidate is None


_Key = tuple[str, bytes, int]


class Fences:
    """All channels of a service; safe to use from every thread."""

    def __init__(self, remembered: int = _REMEMBERED) -> None:
        """Begin with none.

        Args:
            remembered: how many channels may be known at a time, beside those in use.
        """
        self._remembered = remembered
        self._channels: OrderedDict[_Key, _Channel] = OrderedDict()
        self._held: dict[int, _Key] = {}  # by the session's number
        self._closed = False
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._channels)

    def admit(self, session: Session, export: str, claim: Claim, seconds: float) -> Refusal | None:
        """Give a channel to a connection, once nothing of a predecessor is left.

        Args:
            session: the connection. If it is admitted, `release` must follow.
            export: the export's name.
            claim: what the client says.
            seconds: what is left of the time for the handshake.

        Returns:
            None if it is admitted, or why it is not.
        """
        key = export, bytes.fromhex(claim.session), claim.channel
        end = time.monotonic() + _SHARE * seconds
        with self._changed:
            channel = self._channels.setdefault(key, _Channel())
            try:
                refusal = self._wait(channel, session, claim, end)
                if refusal is None:
                    channel.holder, channel.highest = session, claim.generation
                    self._held[session.number] = key
            finally:
                self._channels.move_to_end(key)
                self._forget()
        if refusal is not None:
            _log.warning("%s: refused: %s", session.peer, refusal.words)
        return refusal

    def _wait(
        self, channel: _Channel, session: Session, claim: Claim, end: float
    ) -> Refusal | None:
        """Wait for the channel, until `end` on the monotonic clock; the lock is held."""
        generation, waiting = claim.generation, channel.candidate
        if generation <= channel.highest:
            return Refusal(
                f"connection {generation} of channel {claim.channel} comes too late: "
                f"connection {channel.highest} has been served"
            )
        if waiting is not None and generation < waiting.generation:
            return _overtaken(claim, waiting)
        channel.candidate = me = _Candidate(generation)
        self._changed.notify_all()  # for one that waits already
        try:
            if (old := channel.holder) is not None:
                old.supersede()
                _log.info("%s: takes over from %s, which is broken off", session.peer, old.peer)
            while channel.candidate is me:
                if self._closed:
                    return Refusal("the server is shutting down", is_passing=True)
                if channel.holder is None:
                    return None
                left = end - time.monotonic()
                if left <= 0:
                    return Refusal(
                        f"requests of the last connection of channel {claim.channel} have not "
                        "ended yet; try again",
                        is_passing=True,
                    )
                if _has_gone(session):
                    return Refusal("it left while its predecessor was waited for", is_passing=True)
                self._changed.wait(min(left, _GLANCE))
            return _overtaken(claim, channel.candidate)
        finally:
            if channel.candidate is me:
                channel.candidate = None

    def _forget(self) -> None:
        """Forget the oldest channels that nobody uses, if there are too many."""
        excess = len(self._channels) - self._remembered
        for _ in range(excess):
            key, channel = self._channels.popitem(last=False)
            if not channel.is_idle:
                self._channels[key] = channel  # to the end, so that it is not met each time

    def release(self, session: Session) -> None:
        """Take note that nothing of a connection can reach the storage any more."""
        with self._changed:
            key = self._held.pop(session.number, None)
            if key is not None:
                self._channels[key].holder = None
                self._channels.move_to_end(key)
                self._changed.notify_all()

    def close(self) -> None:
        """Let nobody wait any more: the service is about to end."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def _overtaken(claim: Claim, by: _Candidate | None) -> Refusal:
    newer = "a newer one" if by is None else f"connection {by.generation}"
    return Refusal(
        f"connection {claim.generation} of channel {claim.channel} comes too late: {newer} has come"
    )


def _has_gone(session: Session) -> bool:
    """Tell whether a client that waits for our answer has hung up, or was made to."""
    poll = select.poll()
    poll.register(session.sock.fileno(), select.POLLRDHUP)
    return bool(poll.poll(0))
