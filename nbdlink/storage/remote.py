"""An export of another server, as a storage: what it can do depends on that server.

All requests go over one connection, which the threads share (`client.pipeline`); so a flush of
any of them covers what all of them have written.

When the connection is lost, every request that is under way fails. Whether the storage may go on
over a new one depends on what could be missing there:

1. A write that was answered and not flushed since may be lost with the server.
2. A write that was not answered may still reach the disk, after others that came later.

If there is neither, the next request connects anew, to the same export as far as can be told.
Otherwise nothing succeeds any more, no flush above all, until the storage is opened again: its
users believe that what they have written is there.

A storage that was closed may have left a write that was not answered, too. So the next one of the
same export in this process is its successor, and servers that are nbdlink's serve it only when
nothing of the other one lives (`protocol/claim.py`).

A server that is silent for longer than `REQUEST_TIMEOUT` is as good as gone. And one that failed
to flush once is not asked to again, since systems report what was lost only once, see `lost`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import secrets
import threading
from collections.abc import Iterator
from typing import Final

from nbdlink.client.connection import Connection, connect
from nbdlink.client.export import NegotiatedExport
from nbdlink.client.negotiate import DEFAULT_TIMEOUT
from nbdlink.client.security import NO_OPTIONS, Security, TLSOptions
from nbdlink.errors import (
    ForeignExportError,
    LocalProtocolError,
    NBDError,
    RequestError,
    StorageError,
)
from nbdlink.protocol.chunks import Extent
from nbdlink.protocol.claim import Claim
from nbdlink.protocol.constants import (
    ALLOCATION_CONTEXT,
    DEPTH_CONTEXT,
    AllocationFlag,
    TransmissionFlag,
)
from nbdlink.storage.base import Storage
from nbdlink.storage.lost import LostWrites
from nbdlink.uri import Target

_log = logging.getLogger("nbdlink.storage")

REQUEST_TIMEOUT: Final = 120.0
"""Seconds that a request may take. A flush of much on slow disks takes a minute."""

_REMEMBERED: Final = 1024
_ended: Final[dict[Target, tuple[str, int]]] = {}
"""Sessions of storages that were closed, and the generation of their last connection."""

_KNOWN_FLAGS: Final = int(AllocationFlag.HOLE | AllocationFlag.ZERO)

_PROMISED: Final = (
    TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    | TransmissionFlag.SEND_TRIM
    | TransmissionFlag.SEND_WRITE_ZEROES
    | TransmissionFlag.SEND_FAST_ZERO
    | TransmissionFlag.SEND_CACHE
)
"""What clients of ours were told, and have to find after a reconnect."""


class _Line:
    """One connection, and what would be lost with it. Its fields belong to the storage's lock.

    Attributes:
        connection: the connection.
        changes: requests that change something and were begun so far.
        under_way: how many of them are not answered yet.
        at_risk: whether something was changed, and nobody knows whether it is durable.
        failure: why the connection is dead, or None.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.changes = 0
        self.under_way = 0
        self.at_risk = False
        self.failure: str | None = None

    @property
    def is_lost_alone(self) -> bool:
        """Whether the connection is dead, and nothing that was written went with it."""
        return self.failure is not None and not self.at_risk and not self.under_way


class RemoteStorage(Storage):
    """An export of another server. Made by `open`.

    Attributes:
        target: server and export.
        start: 0, since all of it is served.
        has_zeroes: whether the server zeroes by itself.
    """

    waits = True
    start = 0

    def __init__(
        self,
        target: Target,
        security: Security,
        *,
        read_only: bool,
        timeout: float,
        request_timeout: float,
    ) -> None:
        """Connect; see `open`."""
        self.target = target
        self.name = str(target)
        self._security = security
        self._timeout = timeout
        self._request_timeout = request_timeout
        # Names this storage to servers that are nbdlink's, so that they let nothing of a
        # connection live when its successor comes.
        self._session, self._generation = _ended.pop(target, (secrets.token_hex(16), -1))
        self._lock = threading.Lock()
        self._renewing = threading.Lock()
        self._attempts = 0
        self._refusal = ""
        self._lost = LostWrites(self.name)
        try:
            self._line = _Line(self._connect())
        except BaseException:
            self._end()
            raise
        export = self._export = self._line.connection.export
        self.size = export.size
        self.read_only = read_only or export.read_only
        self.minimum_block = export.minimum_block
        self.preferred_block = max(self.preferred_block, export.preferred_block)
        has = export.flags
        self._has_flush = bool(has & TransmissionFlag.SEND_FLUSH)
        self._has_fua = bool(has & TransmissionFlag.SEND_FUA)
        self.has_zeroes = bool(has & TransmissionFlag.SEND_WRITE_ZEROES)
        self.can_trim = bool(has & TransmissionFlag.SEND_TRIM)
        self.can_fast_zero = bool(has & TransmissionFlag.SEND_FAST_ZERO)
        self.can_cache = bool(has & TransmissionFlag.SEND_CACHE)
        self.is_rotational = bool(has & TransmissionFlag.ROTATIONAL)
        self.contexts = (ALLOCATION_CONTEXT, DEPTH_CONTEXT)

    @classmethod
    def open(
        cls,
        target: Target,
        *,
        read_only: bool = False,
        tls: TLSOptions | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        request_timeout: float = REQUEST_TIMEOUT,
    ) -> RemoteStorage:
        """Connect to an export.

        Args:
            target: server and export.
            read_only: whether nothing will be written.
            tls: what is demanded of TLS, beside what the target says; or None.
            timeout: seconds for connection and handshake together.
            request_timeout: seconds that a request may take.

        Raises:
            StorageError: it is empty, or can only be read.
            ConfigError, TransportError, RemoteProtocolError, OptionError, TLSError: there is no
                connection to be had, see `connect`.
        """
        storage = cls(
            target,
            Security(target, tls or NO_OPTIONS),
            read_only=read_only,
            timeout=timeout,
            request_timeout=request_timeout,
        )
        try:
            if not storage.size:
                raise StorageError(f"{storage.name} is empty", hint="give it a size at its server")
            if storage.read_only and not read_only:
                raise StorageError(
                    f"{storage.name}: its server serves it read-only",
                    hint="serve it with -r (--read-only)",
                )
        except BaseException:
            storage.close()
            raise
        if not read_only and not storage._has_flush:
            _log.warning(
                "%s: its server cannot flush; what is written becomes durable when it likes",
                storage.name,
            )
        return storage

    @property
    def signature(self) -> str | None:
        """A word made of the server's own, if it tells one."""
        said = self._export.testimony.signature
        if said is None:
            return None
        return "auto:" + hashlib.blake2b(said.encode(), digest_size=16).hexdigest()

    # Connections.

    def _connect(self) -> Connection:
        self._generation += 1
        return connect(
            self.target,
            timeout=self._timeout,
            contexts=(ALLOCATION_CONTEXT,),
            security=self._security,
            request_timeout=self._request_timeout,
            claim=Claim(self._session, 0, self._generation),
        )

    @contextlib.contextmanager
    def _using(self, *, changes: bool = False, durable: bool = False) -> Iterator[_Line]:
        """Give a connection for a request, and note what becomes of it.

        Args:
            changes: whether the request changes something.
            durable: whether what it changes is durable once it was answered.

        Raises:
            OSError: the request fails in the block, or there is no connection.
        """
        line = self._begin(changes, durable)
        try:
            yield line
        except RequestError as error:
            raise OSError(error.errno, str(error)) from None
        except LocalProtocolError as error:
            raise OSError(errno.EINVAL, str(error)) from None
        except NBDError as error:
            self._note_loss(line, str(error), changes=changes)
            raise OSError(errno.EIO, str(error)) from None
        finally:
            if changes:
                with self._lock:
                    line.under_way -= 1

    def _begin(self, changes: bool, durable: bool) -> _Line:
        while True:
            with self._lock:
                line, seen = self._line, self._attempts
                if line.failure is None:
                    if changes:
                        line.changes += 1
                        line.under_way += 1
                        line.at_risk = line.at_risk or not durable
                    return line
                if not line.is_lost_alone:
                    line.at_risk = True
                    raise OSError(
                        errno.EIO,
                        f"{line.failure}, and perhaps what was written and not flushed is lost",
                    )
            self._renew(line, seen)

    def _renew(self, old: _Line, seen: int) -> None:
        """Connect anew, unless somebody else has done so, or has failed to, since `seen`.

        Raises:
            OSError: EIO, there is no such connection to be had.
        """
        with self._renewing:
            if self._line is not old:
                return
            if self._attempts != seen:
                raise OSError(errno.EIO, self._refusal)
            try:
                connection = self._connect()
                try:
                    self._check_same(connection.export)
                except BaseException:
                    connection.close()
                    raise
            except NBDError as error:
                self._refusal = str(error)
                self._attempts += 1
                raise OSError(errno.EIO, self._refusal) from None
            with self._lock:
                self._line = _Line(connection)
                self.size = connection.export.size
        old.connection.close()
        _log.warning("%s: connected anew", self.name)

    def _check_same(self, export: NegotiatedExport) -> None:
        """Refuse an export that is not the one that was opened.

        Raises:
            ForeignExportError: it differs.
        """
        known = self._export
        missing = known.flags & _PROMISED & ~export.flags
        signatures = {known.testimony.signature, export.testimony.signature} - {None}
        # Only of a file that is known to be the same one can it be said that it has grown.
        is_known = None not in (known.testimony.signature, export.testimony.signature)
        has_grown = is_known and export.size > self.size
        if export.size != self.size and not has_grown:
            wrong = f"it has {export.size} bytes, not {self.size}"
        elif export.minimum_block > known.minimum_block:
            wrong = f"it demands blocks of {export.minimum_block} bytes, not {known.minimum_block}"
        elif export.read_only and not self.read_only:
            wrong = "it is read-only"
        elif missing:
            words = (str(flag.name) for flag in TransmissionFlag if flag & missing)
            wrong = f"it lacks {', '.join(words)}"
        elif len(signatures) > 1:
            wrong = "its signature is another one"
        else:
            return
        raise ForeignExportError(f"{self.name} is not the same export any more: {wrong}")

    def _note_loss(self, line: _Line, why: str, *, changes: bool) -> None:
        with self._lock:
            line.at_risk = line.at_risk or changes
            if line.failure is not None:
                return
            line.failure = why
            alone = line.is_lost_alone
        what = "the next request connects anew" if alone else "it has to be opened again"
        _log.warning("%s: the connection is lost (%s); %s", self.name, why, what)

    # Reading.

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Read from the server."""
        with self._using() as line:
            line.connection.pread_into(buffer, offset)

    def head(self, length: int) -> bytes:
        """Read the first bytes, as many as there are."""
        block = self.minimum_block
        buffer = bytearray(min(-(-length // block), self.size // block) * block)
        self.read_into(memoryview(buffer), 0)
        return bytes(buffer[:length])

    def cache(self, offset: int, length: int) -> None:
        """Have the server read ahead, if it can; waits for its answer, which comes at once."""
        if not self.can_cache:
            return
        with self._using() as line:
            line.connection.cache(length, offset)

    def extents(self, context: str, offset: int, length: int) -> Iterator[Extent]:
        """Ask the server; where it does not tell, all is data."""
        if context == DEPTH_CONTEXT:
            yield Extent(length, 1)  # all of it comes from there, as with QEMU
            return
        with self._using() as line:
            for extent in line.connection.extents(offset, length):
                yield Extent(extent.length, extent.flags & _KNOWN_FLAGS)

    # Writing.

    def write(self, buffer: memoryview, offset: int, fua: bool) -> None:
        """Write to the server."""
        through = fua and self._has_fua
        with self._changing(fua, through) as line:
            line.connection.pwrite(buffer, offset, fua=through)

    def zero(self, offset: int, length: int, *, may_trim: bool, fast: bool, fua: bool) -> None:
        """Have the server zero a range, or send it zeroes if it cannot."""
        if not self.has_zeroes or (fast and not self.can_fast_zero):
            super().zero(offset, length, may_trim=may_trim, fast=fast, fua=fua)
            return
        through = fua and self._has_fua
        with self._changing(fua, through) as line:
            line.connection.zero(length, offset, fua=through, no_hole=not may_trim, fast=fast)

    def trim(self, offset: int, length: int, fua: bool) -> None:
        """Pass the hint on."""
        if not self.can_trim:
            return
        through = fua and self._has_fua
        with self._changing(fua, through) as line:
            line.connection.trim(length, offset, fua=through)

    @contextlib.contextmanager
    def _changing(self, fua: bool, through: bool) -> Iterator[_Line]:
        """Do a request that changes something, and if `fua`, make it durable.

        Args:
            fua: whether it has to be durable.
            through: whether the server sees to that.
        """
        if fua:
            self._lost.check()
        with self._using(changes=True, durable=through) as line:
            try:
                yield line
            except RequestError as error:
                if through and error.errno == errno.EIO:
                    self._lost.note(error)
                raise
        if fua and not through:
            self.flush()
        elif fua:
            self._lost.check()  # a neighbour may have been told what belongs to both

    def flush(self) -> None:
        """Have the server flush; it fails for ever once data may have been lost."""
        self._lost.check()
        with self._lock:
            if self._line.is_lost_alone:
                return
        line = None
        try:
            with self._using() as line:
                self._flush(line)
        except OSError:
            with self._lock:
                if line is None or not line.is_lost_alone:
                    raise
        self._lost.check()

    def _flush(self, line: _Line) -> None:
        if not self._has_flush:
            return
        with self._lock:
            mark, is_quiet = line.changes, not line.under_way
        try:
            line.connection.flush()
        except RequestError as error:
            self._lost.note(error)
            raise
        with self._lock:
            if is_quiet and line.changes == mark:
                line.at_risk = False

    def close(self) -> None:
        """Take leave of the server."""
        self._line.connection.close()
        self._end()

    def _end(self) -> None:
        """Leave the session to the next storage of the same export."""
        _ended[self.target] = self._session, self._generation
        if len(_ended) > _REMEMBERED:
            with contextlib.suppress(KeyError, RuntimeError):  # another thread has done so
                del _ended[next(iter(_ended))]
