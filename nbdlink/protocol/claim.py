"""What the two ends of a device's channel say to each other beyond the specification.

A channel of a block device is one connection after another. When one breaks, the kernel sends
what was not answered again on its successor, and goes on. A write of the dead connection that is
still on its way in the server's machine, a ghost, must not reach the storage after that: it would
overtake newer data. So a client that renews channels tells whose successor a connection is, and a
server that understands lets nothing of the predecessor live before it serves the successor.

The client says it in a query of NBD_OPT_LIST_META_CONTEXT ("Metadata querying" of the
specification), which servers that do not know the namespace have to ignore, immediately before
it chooses the export:

    x-nbdlink:session=<32 hex digits>;channel=<N>;generation=<N>[;notice=<port>]

The server answers with names of contexts, which it lists for nobody else and which cannot be
selected:

    x-nbdlink:fences            it does what is described above
    x-nbdlink:signature=<text>  which export it is: two that differ are not the same data

Only one who takes part in the export can claim its channels: the server listens to a claim where
the connection may use the export, and a session's number is a secret between the two.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Self

__all__ = ["NAMESPACE", "NOTICE", "NO_TESTIMONY", "Claim", "Testimony", "digest_of"]

NAMESPACE: Final = "x-nbdlink:"
NOTICE: Final = "nbdlink-notice 1"
"""Begins a notice: its name and version."""
_HIGHEST: Final = (1 << 63) - 1
_LONGEST_SIGNATURE: Final = 255
_SESSION: Final = re.compile(r"[0-9a-f]{32}\Z")
_NUMBER: Final = re.compile(r"(0|[1-9][0-9]{0,18})\Z")
_KEYS: Final = ("session", "channel", "generation", "notice")
_FENCES: Final = NAMESPACE + "fences"
_SIGNATURE: Final = NAMESPACE + "signature="


def digest_of(session: str) -> str:
    """Give the name of a session that may be heard by anybody."""
    return hashlib.sha256(f"notice {session}".encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Claim:
    """Which channel of which device a connection is, and how many there were before it.

    Attributes:
        session: 32 hex digits, chosen at random for each device when it is attached.
        channel: counts the device's channels from 0.
        generation: counts the channel's connections from 0; a successor has a higher one.
        notice: UDP port on which the client would like to be told that the server is back.
    """

    session: str
    channel: int
    generation: int
    notice: int | None = None

    def __post_init__(self) -> None:
        """Refuse what could not be sent.

        Raises:
            ValueError: something is out of its range.
        """
        if not _SESSION.match(self.session):
            raise ValueError("a session's number has 32 lower-case hex digits")
        for number in (self.channel, self.generation):
            if not 0 <= number <= _HIGHEST:
                raise ValueError(f"{number} is out of range")
        if self.notice is not None and not 1 <= self.notice <= 65535:
            raise ValueError(f"{self.notice} is no port")

    @property
    def query(self) -> str:
        """The claim as it is sent."""
        text = (
            f"{NAMESPACE}session={self.session};channel={self.channel};generation={self.generation}"
        )
        return text if self.notice is None else f"{text};notice={self.notice}"

    @property
    def notice_text(self) -> str:
        """What a server sends to that port when it is back.

        In clear, to whoever listens there now: so it does not tell the session's number, by
        which channels could be claimed, but a digest of it.
        """
        return f"{NOTICE} {digest_of(self.session)}"

    @classmethod
    def parse(cls, query: str) -> Self:
        """Read a claim; keys that are not known are left alone, so that more can be said later.

        Raises:
            ValueError: it is not one.
        """
        if not query.startswith(NAMESPACE):
            raise ValueError("not of our namespace")
        said: dict[str, str] = {}
        for item in query.removeprefix(NAMESPACE).split(";"):
            key, separator, value = item.partition("=")
            if not separator or key in said:
                raise ValueError("not a list of keys and values")
            said[key] = value
        numbers: list[int | None] = []
        for key in _KEYS[1:]:
            value = said.get(key, "")
            if key == "notice" and key not in said:
                numbers.append(None)
            elif not _NUMBER.match(value):
                raise ValueError(f"{key} is not a number")
            else:
                numbers.append(int(value))
        channel, generation, notice = numbers
        assert channel is not None
        assert generation is not None
        return cls(said.get("session", ""), channel, generation, notice)


@dataclass(frozen=True, slots=True)
class Testimony:
    """What a server says to a claim.

    Attributes:
        fences: whether a channel's successor is served only when nothing of its predecessors can
            reach the storage any more.
        signature: tells exports apart, or None. One that begins with `auto:` was made up by the
            server and holds only for that server; others were given by its administrator.
    """

    fences: bool = False
    signature: str | None = None

    @property
    def contexts(self) -> tuple[str, ...]:
        """The names of contexts that say it."""
        said = [_FENCES] if self.fences else []
        if self.signature is not None:
            said.append(_SIGNATURE + self.signature)
        return tuple(said)

    @classmethod
    def parse(cls, contexts: Iterable[str]) -> Self:
        """Read it from the names that a server listed; what is not known is left alone."""
        fences = False
        signature = None
        for name in contexts:
            if name == _FENCES:
                fences = True
            elif name.startswith(_SIGNATURE):
                signature = name.removeprefix(_SIGNATURE)[:_LONGEST_SIGNATURE]
        return cls(fences, signature)


NO_TESTIMONY: Final = Testimony()
"""What servers say that do not understand."""
