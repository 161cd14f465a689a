"""An export to read, write and ask about from userspace.

What a request may be is checked here, by the rules that the server would check it with; what
is in flight, and who moves it, is the business of `pipeline`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Self

from nbdlink.client.export import NegotiatedExport
from nbdlink.client.negotiate import DEFAULT_TIMEOUT
from nbdlink.client.opening import negotiate_best
from nbdlink.client.pipeline import Pending, Pipeline
from nbdlink.client.security import Security
from nbdlink.errors import LocalProtocolError, NBDError, RemoteProtocolError
from nbdlink.protocol.chunks import Extent, pack_status_filter
from nbdlink.protocol.claim import Claim
from nbdlink.protocol.constants import (
    ALLOCATION_CONTEXT,
    Command,
    CommandFlag,
    HeaderStyle,
    TransmissionFlag,
    command_name,
)
from nbdlink.transport.stream import Wire
from nbdlink.uri import Target

Buffer = bytes | bytearray | memoryview

_MAX_LENGTH = 0xFFFF_FFFF
"""Bytes that a request can be about without extended headers."""

_ASK_FIRST = 1 << 30
_ASK_LEAST = 1 << 20
_ASK_MOST = 1 << 60
_FEW_EXTENTS = 1 << 10
_MANY_EXTENTS = 1 << 16


class PendingStatus(Pending):
    """A block status request on its way."""

    __slots__ = ("_names",)

    def __init__(
        self, pipeline: Pipeline, offset: int, length: int, flags: int, names: Mapping[str, int]
    ) -> None:
        """Ask for the contexts in `names`, which maps them to their ids."""
        contexts = tuple(names.values())
        super().__init__(pipeline, Command.BLOCK_STATUS, offset, length, flags, contexts=contexts)
        self._names = names

    def extents(self, timeout: float | None = None) -> dict[str, list[Extent]]:
        """Wait as `wait` does; give the extents of each context, from the offset asked on."""
        self.wait(timeout)
        return {name: list(self.status[number]) for name, number in self._names.items()}


class Connection:
    """An export to read and write; made by `connect`. Safe to share between threads.

    Offsets and lengths are in bytes. Reads and writes longer than the server's maximum payload
    are split, and so is what reaches over 4 GiB where the server has no extended headers. Every
    method raises `RequestError` if the server refuses, `LocalProtocolError` if the export
    cannot do it or the request reaches past its end, and `TransportError` or
    `RemoteProtocolError` once the connection is dead.

    Attributes:
        target: where the connection leads.
        export: what the server said of the export.
    """

    def __init__(
        self,
        target: Target,
        sock: Wire,
        export: NegotiatedExport,
        request_timeout: float | None = None,
    ) -> None:
        """Take over a socket in transmission; for the timeout see `connect`."""
        self.target = target
        self.export = export
        self._pipeline = Pipeline(sock, export.style, target.address, request_timeout)
        self._rules = export.rules
        self._wide = export.style == HeaderStyle.EXTENDED

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def size(self) -> int:
        """The export's size in bytes."""
        return self.export.size

    @property
    def contexts(self) -> tuple[str, ...]:
        """Names of the metadata contexts that `block_status` tells of."""
        return tuple(self.export.contexts)

    def can(self, flag: TransmissionFlag) -> bool:
        """Tell whether the export announced a transmission flag."""
        return bool(self.export.flags & flag)

    # Blocking requests.

    def pread(self, length: int, offset: int, *, whole: bool = False) -> bytearray:
        """Read `length` bytes; see `pread_into`."""
        self._check(Command.READ, 0, offset, length, split=True)
        data = bytearray(length)
        self.pread_into(data, offset, whole=whole)
        return data

    def pread_into(
        self, buffer: bytearray | memoryview, offset: int, *, whole: bool = False
    ) -> None:
        """Fill `buffer` with what is at `offset`.

        Args:
            buffer: where the data goes; undefined if the read fails.
            offset: bytes from the export's start.
            whole: have the server answer in one piece (the specification's DF flag), or fail
                with EOVERFLOW.
        """
        view = memoryview(buffer).cast("B")
        if view.readonly:
            raise LocalProtocolError("the buffer to read into cannot be written")
        flags = CommandFlag.DF if whole else 0
        self._check(Command.READ, flags, offset, len(view), split=True)
        self._finish(
            [
                self._read(offset + at, view[at : at + length], flags)
                for at, length in self._parts(len(view), self._most_payload)
            ]
        )

    def pwrite(self, data: Buffer, offset: int, *, fua: bool = False) -> None:
        """Write `data`; with `fua` it is on stable storage when this returns."""
        view = memoryview(data).cast("B")
        flags = self._fua(fua)
        self._check(Command.WRITE, flags, offset, len(view), split=True)
        self._finish(
            [
                self._write(offset + at, view[at : at + length], flags)
                for at, length in self._parts(len(view), self._most_payload)
            ]
        )

    def flush(self) -> None:
        """Bring every write that was answered so far to stable storage."""
        self.submit_flush().wait()

    def trim(self, length: int, offset: int, *, fua: bool = False) -> None:
        """Tell the server that the data is no longer needed."""
        self._ranges(Command.TRIM, self._fua(fua), offset, length)

    def zero(
        self,
        length: int,
        offset: int,
        *,
        fua: bool = False,
        no_hole: bool = False,
        fast: bool = False,
    ) -> None:
        """Write zeroes without sending them.

        Args:
            length: bytes.
            offset: bytes from the export's start.
            fua: be on stable storage when this returns.
            no_hole: keep the space allocated.
            fast: fail with ENOTSUP where this would be no faster than a write.
        """
        self._ranges(Command.WRITE_ZEROES, self._zero(fua, no_hole, fast), offset, length)

    def cache(self, length: int, offset: int) -> None:
        """Tell the server that the data will be read soon."""
        self._ranges(Command.CACHE, 0, offset, length)

    def block_status(
        self, length: int, offset: int, *, one: bool = False, contexts: Sequence[str] | None = None
    ) -> dict[str, list[Extent]]:
        """Ask for the status of a range in the metadata contexts that were selected.

        Args:
            length: bytes; a hint only, without `one`: the server may tell of fewer or more.
            offset: bytes from the export's start.
            one: ask for a single extent in each context, no longer than `length`.
            contexts: names of those wanted, or None for all.

        Returns:
            The extents of each context, one after another from `offset` on; at least one.
        """
        return self.submit_block_status(length, offset, one=one, contexts=contexts).extents()

    def extents(
        self, offset: int = 0, length: int | None = None, *, context: str = ALLOCATION_CONTEXT
    ) -> Iterator[Extent]:
        """Go through the extents of a range, neighbours of the same status joined.

        Where the server does not tell what is allocated, all of it counts as data.

        Args:
            offset: bytes from the export's start.
            length: bytes, or None for all that follows.
            context: a metadata context that was selected.

        Yields:
            Extents, one after another, that fill the range exactly.

        Raises:
            LocalProtocolError: the range ends past the export, or the context was not selected.
            RemoteProtocolError: the server tells of less than a block.
        """
        end = self.size if length is None else offset + length
        if not 0 <= offset <= end <= self.size:
            raise LocalProtocolError(
                f"{self.target.address}: {offset} to {end} is no range of {self.size} bytes"
            )
        if context in self.export.contexts:
            found = self._ask_extents(offset, end, context)
        elif context == ALLOCATION_CONTEXT:
            found = iter((Extent(end - offset, 0),) if end > offset else ())
        else:
            raise self._no_context(context)
        return _joined(found)

    # Requests in flight: each gives a `Pending` at once.

    def submit_read(
        self,
        length: int,
        offset: int,
        *,
        into: memoryview | None = None,
        whole: bool = False,
    ) -> Pending:
        """Begin to read up to the maximum payload, into `into` if that is given."""
        flags = CommandFlag.DF if whole else 0
        self._check(Command.READ, flags, offset, length)
        if into is not None:
            if len(into) != length:
                raise LocalProtocolError(f"a buffer of {len(into)} bytes for {length}")
            return self._read(offset, into, flags)
        data = bytearray(length)
        pending = Pending(self._pipeline, Command.READ, offset, length, flags, data=data)
        self._pipeline.submit(pending)
        return pending

    def submit_write(self, data: Buffer, offset: int, *, fua: bool = False) -> Pending:
        """Begin to write up to the maximum payload; `data` must not change until it is done."""
        view, flags = memoryview(data).cast("B"), self._fua(fua)
        self._check(Command.WRITE, flags, offset, len(view))
        return self._write(offset, view, flags)

    def submit_flush(self) -> Pending:
        """Begin to flush."""
        return self._simple(Command.FLUSH, 0, 0, 0)

    def submit_trim(self, length: int, offset: int, *, fua: bool = False) -> Pending:
        """Begin to trim."""
        return self._simple(Command.TRIM, self._fua(fua), offset, length)

    def submit_zero(
        self,
        length: int,
        offset: int,
        *,
        fua: bool = False,
        no_hole: bool = False,
        fast: bool = False,
    ) -> Pending:
        """Begin to write zeroes."""
        return self._simple(Command.WRITE_ZEROES, self._zero(fua, no_hole, fast), offset, length)

    def submit_cache(self, length: int, offset: int) -> Pending:
        """Begin to cache."""
        return self._simple(Command.CACHE, 0, offset, length)

    def submit_block_status(
        self, length: int, offset: int, *, one: bool = False, contexts: Sequence[str] | None = None
    ) -> PendingStatus:
        """Begin to ask for the status of a range; see `block_status`."""
        names = self.export.contexts
        if contexts is not None:
            for name in contexts:
                if name not in names:
                    raise self._no_context(name)
            names = {name: names[name] for name in contexts}
        if not self._wide:
            length = min(length, self._most_range)
        flags = CommandFlag.REQ_ONE if one else 0
        self._check(Command.BLOCK_STATUS, flags, offset, length)
        payload = None
        if len(names) < len(self.export.contexts):
            if self._wide and self.can(TransmissionFlag.BLOCK_STATUS_PAYLOAD):
                payload = memoryview(pack_status_filter(length, tuple(names.values())))
            else:
                names = self.export.contexts  # the server cannot be told: all come
        pending = PendingStatus(self._pipeline, offset, length, flags, names)
        self._pipeline.submit(pending, payload)
        return pending

    def batch(self) -> AbstractContextManager[None]:
        """Hold back requests that are submitted in the block, and send them in one go."""
        return self._pipeline.batch()

    def close(self) -> None:
        """Say goodbye and close; requests still in flight fail."""
        self._pipeline.close()

    # Making requests.

    @property
    def _most_payload(self) -> int:
        return self._aligned(self._rules.maximum_payload)

    @property
    def _most_range(self) -> int:
        return self._aligned(_MAX_LENGTH)

    def _aligned(self, length: int) -> int:
        return length // self._rules.minimum_block * self._rules.minimum_block

    def _fua(self, fua: bool) -> int:
        if fua and not self.can(TransmissionFlag.SEND_FUA):
            raise LocalProtocolError(
                f"{self.target.address}: the export cannot do forced unit access",
                hint="write without fua, then flush",
            )
        return CommandFlag.FUA if fua else 0

    def _zero(self, fua: bool, no_hole: bool, fast: bool) -> int:
        flags = self._fua(fua)
        flags |= CommandFlag.NO_HOLE if no_hole else 0
        return flags | (CommandFlag.FAST_ZERO if fast else 0)

    @staticmethod
    def _parts(length: int, most: int) -> list[tuple[int, int]]:
        """Cut `length` into parts of at most `most`: where each begins, and how long it is."""
        return [(at, min(most, length - at)) for at in range(0, length, most)]

    def _check(
        self, command: Command, flags: int, offset: int, length: int, *, split: bool = False
    ) -> None:
        if offset < 0 or length < 0:
            raise LocalProtocolError("offset and length cannot be negative")
        shown = min(length, self._most_payload) if split else length
        last = offset + length - shown
        error = self._rules.check(command, flags, last, shown)
        if not error and split:
            error = self._rules.check(command, flags, offset, shown)
        if error or (length > _MAX_LENGTH and not split and not self._wide):
            raise LocalProtocolError(
                f"{self.target.address}: {command_name(command)} of {length} bytes at {offset} "
                f"does not suit the export ({self._why(command, offset, length)})"
            )

    def _why(self, command: Command, offset: int, length: int) -> str:
        rules = self._rules
        if command in (Command.WRITE, Command.TRIM, Command.WRITE_ZEROES) and rules.flags & (
            TransmissionFlag.READ_ONLY
        ):
            return "it is read-only"
        if offset + length > rules.size:
            return f"it ends at {rules.size}"
        if (offset | length) & (rules.minimum_block - 1):
            return f"its minimum block size is {rules.minimum_block}"
        if length > rules.maximum_payload and command in (Command.READ, Command.WRITE):
            return f"its maximum payload is {rules.maximum_payload}"
        if command == Command.BLOCK_STATUS and not rules.has_contexts:
            return "no metadata context was selected"
        if length > _MAX_LENGTH:
            return "the server has no extended headers"
        return "the server did not announce that it can"

    def _no_context(self, name: str) -> LocalProtocolError:
        return LocalProtocolError(
            f"{self.target.address}: the metadata context {name!r} was not selected",
            hint="`nbdlink info` shows which contexts the export has",
        )

    def _read(self, offset: int, view: memoryview, flags: int) -> Pending:
        pending = Pending(self._pipeline, Command.READ, offset, len(view), flags, into=view)
        self._pipeline.submit(pending)
        return pending

    def _write(self, offset: int, view: memoryview, flags: int) -> Pending:
        pending = Pending(self._pipeline, Command.WRITE, offset, len(view), flags)
        self._pipeline.submit(pending, view)
        return pending

    def _simple(self, command: Command, flags: int, offset: int, length: int) -> Pending:
        self._check(command, flags, offset, length)
        pending = Pending(self._pipeline, command, offset, length, flags)
        self._pipeline.submit(pending)
        return pending

    def _ranges(self, command: Command, flags: int, offset: int, length: int) -> None:
        """Ask for something that has no payload, in as many requests as it takes."""
        self._check(command, flags, offset, length, split=True)
        most = max(length, 1) if self._wide else self._most_range
        self._finish(
            [
                self._simple(command, flags, offset + at, part)
                for at, part in self._parts(length, most)
            ]
        )

    def _finish(self, requests: Sequence[Pending]) -> None:
        """Wait for all of them, then report the first failure: none may be left behind."""
        failure: NBDError | None = None
        for pending in requests:
            try:
                pending.wait()
            except NBDError as error:
                failure = failure or error
        if failure:
            raise failure

    def _ask_extents(self, offset: int, end: int, context: str) -> Iterator[Extent]:
        # How much to ask for at a time is learnt: few extents come of a long range mostly, but
        # a fragmented one can have a million, and each takes a hundred bytes of memory.
        ask = _ASK_FIRST
        block = self._rules.minimum_block
        while offset < end:
            # An answer may end within a block, and only whole ones can be asked about.
            begin = at = offset // block * block
            length = self._aligned(min(ask, end - begin))
            if not length:  # the export does not end at a block's end: not to be asked about
                yield Extent(end - offset, 0)
                return
            extents = self.block_status(length, begin, contexts=(context,))[context]
            known = offset
            for extent in extents:
                at += extent.length
                part = min(at, end) - offset
                if part > 0:
                    yield Extent(part, extent.flags)
                    offset += part
            if offset == known:
                raise RemoteProtocolError(
                    f"{self.target.address}: the server tells of no more than {known - begin} "
                    f"bytes of the block at {begin}"
                )
            if len(extents) <= _FEW_EXTENTS:
                ask = min(ask * 4, _ASK_MOST)
            elif len(extents) > _MANY_EXTENTS:
                ask = max(ask // 4, _ASK_LEAST)


def _joined(extents: Iterator[Extent]) -> Iterator[Extent]:
    last: Extent | None = None
    for extent in extents:
        if last is None:
            last = extent
        elif last.flags == extent.flags:
            last = Extent(last.length + extent.length, last.flags)
        else:
            yield last
            last = extent
    if last is not None:
        yield last


def connect(
    target: Target | str,
    *,
    timeout: float | None = DEFAULT_TIMEOUT,
    contexts: Sequence[str] = (ALLOCATION_CONTEXT,),
    style: HeaderStyle = HeaderStyle.EXTENDED,
    security: Security | None = None,
    request_timeout: float | None = None,
    claim: Claim | None = None,
) -> Connection:
    """Connect to an export, to be used in a `with` block.

    Args:
        target: an NBD URI, `host[:port][/export]`, or a `Target`.
        timeout: seconds for connection and handshake together, or None for ever.
        contexts: the metadata contexts to select, if the export has them.
        style: the richest headers to ask for; servers that do not know them get simpler ones.
        security: what is demanded of TLS; None for what the target says.
        request_timeout: seconds that a request may take, unless who waits for it says otherwise;
            then the connection is dead. None for ever.
        claim: whose successor the connection is, for servers that understand; they also tell
            what the export's data is known by (`NegotiatedExport.testimony`).

    Raises:
        ConfigError: the target makes no sense.
        TransportError, RemoteProtocolError, OptionError: no such export to be had there.
        TLSError: TLS is demanded, and there is none, or the two do not come to terms.
    """
    place = Target.parse(target) if isinstance(target, str) else target
    sock, export = negotiate_best(
        place, timeout=timeout, contexts=contexts, style=style, security=security, claim=claim
    )
    return Connection(place, sock, export, request_timeout)
