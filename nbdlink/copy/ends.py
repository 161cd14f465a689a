"""What a copy can come from and go to: exports, files, block devices, streams, nothing.

An end has one or more lanes, each for a thread of its own. A lane's `read` and `write` either
begin something and give the `Pending` of it, or do it at once. Errors name the end and the
offset.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Protocol

from nbdlink.client.connection import Connection, connect
from nbdlink.client.negotiate import DEFAULT_TIMEOUT
from nbdlink.client.pipeline import Pending
from nbdlink.client.security import NO_OPTIONS, Security, TLSOptions
from nbdlink.copy.zeroes import ZEROES
from nbdlink.errors import ConfigError
from nbdlink.protocol.chunks import Extent
from nbdlink.protocol.constants import DEFAULT_MAXIMUM_PAYLOAD, TransmissionFlag
from nbdlink.uri import Target

# A thread each, and more threads than processors only get into each other's way.
DEFAULT_CONNECTIONS = min(4, len(os.sched_getaffinity(0)))
"""Connections to an export that allows several."""

FURTHER_TIMEOUT = 3.0
"""Seconds for each connection behind the first one, if nobody has asked for so many. Servers that
let only a few in leave the others without an answer."""


class SourceLane(Protocol):
    """One thread's way to a source."""

    def read(self, view: memoryview, offset: int) -> Pending | int:
        """Begin to fill `view`, or fill it and give how many bytes there were.

        Only a stream gives fewer than asked for: it has ended.
        """

    def leave(self) -> None:
        """Let go."""


class DestinationLane(Protocol):
    """One thread's way to a destination."""

    def write(self, view: memoryview, offset: int) -> Pending | None:
        """Write `view`, which stays as it is until the pending request is done."""

    def zero(self, offset: int, length: int) -> Sequence[Pending]:
        """Make a range read as zeroes; give the requests to wait for."""

    def leave(self) -> None:
        """Let go."""


class Source(Protocol):
    """Where data comes from.

    Attributes:
        name: as messages call it.
        size: bytes, or None for a stream.
        lanes: how many may be open at once; None is any number.
        alignment: offsets and lengths of reads are multiples of it, except at the end.
        largest: bytes that a lane reads at a time, at most.
    """

    name: str
    size: int | None
    lanes: int | None
    alignment: int
    largest: int

    def open_lane(self) -> SourceLane:
        """Open one more lane."""

    def extents(self) -> Iterator[Extent]:
        """Go through what is data and what is zeroes, as in `base:allocation`."""

    def close(self) -> None:
        """Let go of all but the lanes."""


class Destination(Protocol):
    """Where data goes to; attributes as those of `Source`.

    Attributes:
        is_new: whether all of it reads as zeroes as long as nothing was written.
    """

    name: str
    size: int | None
    lanes: int | None
    alignment: int
    largest: int
    is_new: bool

    def prepare(self, size: int | None) -> None:
        """Get ready for `size` bytes; None if a stream brings them.

        Raises:
            ConfigError: they do not fit.
        """

    def open_lane(self) -> DestinationLane:
        """Open one more lane."""

    def finish(self, size: int, *, flush: bool) -> None:
        """Bring what was written to stable storage; `size` is how much there was."""

    def close(self) -> None:
        """Let go of all but the lanes."""


class ExportEnd:
    """An export, as source or destination.

    The first connection asks about the export, and is the first lane as well.

    Attributes:
        can_flush: whether its server can bring what was written to stable storage.
    """

    def __init__(
        self,
        target: Target,
        *,
        connections: int | None,
        allocate: bool = False,
        tls: TLSOptions = NO_OPTIONS,
    ) -> None:
        """Connect.

        Args:
            target: server and export.
            connections: how many may be used, or None for what suits the server.
            allocate: whether zeroes written take space.
            tls: what is demanded of TLS, beside what the target says.
        """
        self.name = str(target)
        self._target = target
        self._allocate = allocate
        self._security = Security(target, tls)
        self._main = connect(target, security=self._security)
        export = self._main.export
        self.size: int | None = export.size
        self.alignment = export.minimum_block
        self.largest = export.maximum_payload
        self.is_new = False
        self.can_flush = self._main.can(TransmissionFlag.SEND_FLUSH)
        several = self._main.can(TransmissionFlag.CAN_MULTI_CONN)
        self.lanes: int | None = (connections or DEFAULT_CONNECTIONS) if several else 1
        if connections and connections > 1 and not several:
            self.close()
            raise ConfigError(
                f"{self.name} does not promise that several connections see the same data",
                hint="use one connection (-C 1)",
            )
        self._main_is_free = True
        self._patience = DEFAULT_TIMEOUT if connections else FURTHER_TIMEOUT

    def extents(self) -> Iterator[Extent]:
        """Ask for `base:allocation`."""
        return self._main.extents()

    def prepare(self, size: int | None) -> None:
        """Check that the export can be written and is large enough."""
        if self._main.export.read_only:
            raise ConfigError(f"{self.name} is read-only")
        assert self.size is not None
        if size is not None and size > self.size:
            raise too_small(self.name, self.size, size, "choose a larger export")

    def open_lane(self) -> ExportLane:
        """Use the first connection first, then open more."""
        if self._main_is_free:
            self._main_is_free = False
            return ExportLane(self._main, self._allocate)
        # Extents are asked on the first connection only.
        return ExportLane(
            connect(self._target, contexts=(), security=self._security, timeout=self._patience),
            self._allocate,
        )

    def finish(self, size: int, *, flush: bool) -> None:
        """Flush, where the server can; its promise for several connections covers all."""
        if flush and self.can_flush:
            self._main.flush()

    def close(self) -> None:
        """Leave the server."""
        self._main.close()


class ExportLane:
    """A connection."""

    def __init__(self, connection: Connection, allocate: bool) -> None:
        self._connection = connection
        self._allocate = allocate
        self._can_zero = connection.can(TransmissionFlag.SEND_WRITE_ZEROES)
        self._alignment = connection.export.minimum_block

    def read(self, view: memoryview, offset: int) -> Pending | int:
        """Begin to read."""
        if short := len(view) % self._alignment:
            # The end of something that fills no block, compared with a larger export.
            whole = len(view) + self._alignment - short
            view[:] = self._connection.pread(whole, offset)[: len(view)]
            return len(view)
        return self._connection.submit_read(len(view), offset, into=view)

    def write(self, view: memoryview, offset: int) -> Pending | None:
        """Begin to write."""
        if len(view) % self._alignment:
            self._write_tail(view, offset)
            return None
        return self._connection.submit_write(view, offset)

    def zero(self, offset: int, length: int) -> Sequence[Pending]:
        """Begin to write zeroes; by sending them where the server cannot make them."""
        short = length % self._alignment
        if self._can_zero and not short:
            return (self._connection.submit_zero(length, offset, no_hole=self._allocate),)
        # Of the end of a source that fills no block, only that is sent.
        whole = length - short if self._can_zero else 0
        begun: list[Pending] = []
        if whole:
            begun.append(self._connection.submit_zero(whole, offset, no_hole=self._allocate))
        most = min(self._connection.export.maximum_payload, len(ZEROES))
        for at in range(whole, length, most):
            part = self.write(ZEROES[: min(most, length - at)], offset + at)
            if part is not None:
                begun.append(part)
        return begun

    def _write_tail(self, view: memoryview, offset: int) -> None:
        """Write the end of a source that fills no block: what is behind it stays as it is."""
        whole = len(view) // self._alignment * self._alignment
        if whole:
            self._connection.pwrite(view[:whole], offset)
        block = self._connection.pread(self._alignment, offset + whole)
        block[: len(view) - whole] = view[whole:]
        self._connection.pwrite(block, offset + whole)

    def leave(self) -> None:
        """Leave the server; whoever waits for a reply is told."""
        self._connection.close()


class NullEnd:
    """`null:`, where everything fits and nothing stays. It is its own lane."""

    name = "null:"
    size: int | None = None
    lanes: int | None = None
    alignment = 1
    largest = DEFAULT_MAXIMUM_PAYLOAD
    is_new = True

    def prepare(self, size: int | None) -> None:
        """Take anything."""

    def open_lane(self) -> NullEnd:
        """Any number of lanes is as good as one."""
        return self

    def write(self, view: memoryview, offset: int) -> Pending | None:
        """Forget."""
        return None

    def zero(self, offset: int, length: int) -> Sequence[Pending]:
        """Forget."""
        return ()

    def finish(self, size: int, *, flush: bool) -> None:
        """Have nothing to flush."""

    def leave(self) -> None:
        """Have nothing to let go."""

    def close(self) -> None:
        """Have nothing to let go."""


def too_small(name: str, has: int, needed: int, hint: str) -> ConfigError:
    """Say that a destination is too small."""
    return ConfigError(f"{name} has only {has} bytes; the source has {needed}", hint=hint)
