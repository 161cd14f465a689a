"""Requests that the engine's loop does not do itself: whatever is long, rare, slow or wrong.

They are checked by the rules of the specification, their payload is taken off the socket
whatever becomes of them, and then they are done: here, if the storage answers at once, or by a
worker.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Final

from nbdlink.errors import RemoteProtocolError
from nbdlink.protocol.chunks import parse_status_filter
from nbdlink.protocol.constants import Command, CommandFlag, Error, HeaderStyle
from nbdlink.server.executor import PIECE, Executor
from nbdlink.server.intake import SPLICE, HungUpError, Intake, StoringFailedError
from nbdlink.server.negotiate import NegotiatedSession
from nbdlink.server.outlet import Outlet
from nbdlink.server.replies import ReplyFormat
from nbdlink.server.sessions import Session
from nbdlink.server.workers import Workers
from nbdlink.storage.base import PlainFile

_READ: Final = int(Command.READ)
_WRITE: Final = int(Command.WRITE)
_FLUSH: Final = int(Command.FLUSH)
_BLOCK_STATUS: Final = int(Command.BLOCK_STATUS)
_FUA: Final = int(CommandFlag.FUA)
_DF: Final = int(CommandFlag.DF)
_PAYLOAD: Final = int(CommandFlag.PAYLOAD_LEN)
_EINVAL: Final = int(Error.EINVAL)

WHOLE: Final = 128 * 1024
"""Bytes of the longest payload that is received together with its neighbours."""


class Dispatcher:
    """One connection's requests off the fast road. Only the connection's own thread calls it.

    Attributes:
        failure: what went wrong in a worker so that the connection had to be cut, or None.
        rules: what requests must keep to; other ones once the export is found to have grown.
    """

    def __init__(
        self,
        session: Session,
        negotiated: NegotiatedSession,
        form: ReplyFormat,
        intake: Intake,
        outlet: Outlet,
        workers: Workers,
    ) -> None:
        """Serve one connection.

        Args:
            session: the connection.
            negotiated: what was agreed on.
            form: how its replies look.
            intake: where its requests come from.
            outlet: where its replies go.
            workers: its threads.
        """
        self.failure: Exception | None = None
        self.executor = Executor(negotiated.export, negotiated.contexts, form, outlet, session)
        self._session = session
        self._export = negotiated.export
        self._storage = negotiated.export.storage
        self.rules = negotiated.rules
        self._contexts = negotiated.contexts
        self._form = form
        self._intake = intake
        self._outlet = outlet
        self._workers = workers
        at_once = None if self._storage.plain_file else self._storage.at_once
        self._write_at_once = at_once and at_once.write

    def take(self, start: int, end: int, *, inline: bool) -> tuple[int, int] | None:
        """Do the request at `inbox[start:end]`, or have it done.

        Args:
            start: where the request begins.
            end: where what has been received ends.
            inline: whether the storage is quick enough for this thread.

        Returns:
            Where the rest of the inbox begins and ends, or None if some of the request is
            missing and shall be received first.

        Raises:
            RemoteProtocolError: far more is announced than may be sent; the error is out.
            HungUpError: a newer connection has taken this one's place.
        """
        if self._session.superseded:
            raise HungUpError
        _, flags, command, cookie, offset, length = self._intake.request.unpack_from(
            self._intake.inbox, start
        )
        flags, announced, error = self._payload(command, flags, length)
        filtered = announced if command == _BLOCK_STATUS else 0
        if not error and not filtered:
            error = self._check(command, flags, offset, length)
        payload = start + self._intake.request.size
        after = payload + announced
        if after > end:
            if announced <= WHOLE:
                return None
            self._take_long(
                flags, cookie, offset, announced, error or (filtered and _EINVAL), payload, end,
                inline=inline,
            )  # fmt: skip
            return 0, 0
        only = None
        if filtered and not error:
            try:
                length, only = parse_status_filter(self._intake.inbox[payload:after])
                error = self._check(command, flags, offset, length)
                if len(set(only)) < len(only) or not self._contexts.keys() >= set(only) or not only:
                    error = _EINVAL
            except RemoteProtocolError:
                error = _EINVAL
        if error:
            self.executor.refuse(error, cookie, offset)
        elif command == _READ and not length:
            self._outlet.send(self._form.nothing_read(cookie, offset))
        elif command == _WRITE:
            data = self._intake.inbox[payload:after]
            if inline and not flags and self._may_write_file(offset):
                self.executor.perform(command, flags, cookie, offset, length, data)
            elif not (inline and self._store_at_once(flags, cookie, offset, length, data)):
                self.dispatch(command, flags, cookie, offset, length, data)
        else:
            self.dispatch(command, flags, cookie, offset, length, only=only)
        return after, end

    def _may_write_file(self, offset: int) -> PlainFile | None:
        """Give the file that the storage is, if it may be written there by who likes."""
        plain = self._storage.plain_file
        return plain if plain and offset >= plain.guarded else None

    def _check(self, command: int, flags: int, offset: int, length: int) -> int:
        """Say which error a request deserves, or 0.

        One that reaches behind the end may come from a client that knows of a growth sooner than
        this process: another connection was told, or a person.
        """
        error = self.rules.check(command, flags, offset, length)
        if error and offset + length > self.rules.size:
            self._storage.notice_growth()
            if (size := self._export.size) > self.rules.size:
                self.rules = dataclasses.replace(self.rules, size=size)
                return self.rules.check(command, flags, offset, length)
        return error

    def _payload(self, command: int, flags: int, length: int) -> tuple[int, int, int]:
        """Tell how long a request's payload is.

        Returns:
            The flags without the one that says so, the payload's length, and an error.
        """
        if self._form.style != HeaderStyle.EXTENDED:
            return flags, length if command == _WRITE else 0, 0
        if not flags & _PAYLOAD:
            return flags, 0, _EINVAL if command == _WRITE else 0
        allowed = command == _WRITE or (command == _BLOCK_STATUS and self._contexts)
        return flags ^ _PAYLOAD, length, 0 if allowed else _EINVAL

    def dispatch(
        self,
        command: int,
        flags: int,
        cookie: int,
        offset: int,
        length: int,
        data: memoryview | None = None,
        only: tuple[int, ...] | None = None,
    ) -> None:
        """Have a worker do a request, or do it here if there is none to be had."""
        workers, perform = self._workers, self.executor.perform
        if self._storage.waits:
            cost = 0
            if command == _READ:
                cost = min(length, PIECE) if self._form.chunked and not flags & _DF else length
            elif data is not None:
                cost = length
            if workers.reserve(cost):
                # The inbox will be used again before the worker is done.
                kept = None if data is None else memoryview(bytes(data))
                request = (command, flags, cookie, offset, length, kept, only)
                if workers.submit(self._job(*request), cost):
                    return
        perform(command, flags, cookie, offset, length, data, only, frugal=True)

    def _job(self, *request: Any) -> Callable[[], None]:
        def do() -> None:
            if self._session.superseded:
                return  # the client has asked for it again by now, elsewhere
            try:
                self.executor.perform(*request)
            except OSError:
                self._session.cut()  # the connection broke; the other thread is to hear of it
            except Exception as error:
                self.failure = error
                self._session.cut()

        return do

    def _take_long(
        self,
        flags: int,
        cookie: int,
        offset: int,
        length: int,
        error: int,
        payload: int,
        end: int,
        *,
        inline: bool,
    ) -> None:
        """Take a payload that is not in the inbox as a whole, and store it unless `error`.

        Args:
            flags: the request's.
            cookie: the request's.
            offset: where to write.
            length: bytes of payload.
            error: why the request is refused, or 0. Its payload has to be read nevertheless.
            payload: where in the inbox it begins.
            end: where in the inbox the received bytes end; they all belong to the payload.
            inline: whether the storage is quick enough for this thread.

        Raises:
            RemoteProtocolError: far more is announced than may be sent; the error is out.
        """
        self._intake.note(length - (end - payload))
        if error:
            if length > 2 * self.rules.maximum_payload:
                self.executor.refuse(error, cookie, offset)
                raise RemoteProtocolError(f"a request announces {length} bytes of payload")
            self._intake.skip(length - (end - payload))
            self.executor.refuse(error, cookie, offset)
            return
        if inline and length <= PIECE and self._write_at_once:
            self._intake.fill(self._intake.inbox[end : payload + length])
            data = self._intake.inbox[payload : payload + length]
            if self._session.superseded:
                raise HungUpError
            if not self._store_at_once(flags, cookie, offset, length, data):
                self.dispatch(_WRITE, flags, cookie, offset, length, data)
            return
        storage, workers = self._storage, self._workers
        plain = self._may_write_file(offset) if inline else None
        if not plain and storage.waits and workers.reserve(length):
            try:
                data = memoryview(bytearray(length))
                data[: end - payload] = self._intake.inbox[payload:end]
                self._intake.fill(data[end - payload :])
            except BaseException:
                workers.release(length)
                raise
            request = (_WRITE, flags, cookie, offset, length, data)
            if not workers.submit(self._job(*request), length):
                self.executor.perform(*request)
            return
        fua = flags & _FUA != 0
        try:
            if plain and self._intake.is_unix and length - (end - payload) >= SPLICE:
                self._intake.splice(storage, plain, offset, length, payload, end)
            else:
                self._intake.store(storage, offset, length, fua and not plain, payload, end)
        except StoringFailedError as failed:
            self.executor.fail(failed.why, _WRITE, cookie, offset, length)
            return
        self._written(fua and plain, cookie, offset, length)

    def _store_at_once(
        self, flags: int, cookie: int, offset: int, length: int, data: memoryview
    ) -> bool:
        """Do a write if the storage does it at once; False if that does not go."""
        if self._write_at_once is None or not self._write_at_once(data, offset):
            return False
        self._written(flags & _FUA, cookie, offset, length)
        return True

    def _written(self, flush: object, cookie: int, offset: int, length: int) -> None:
        """Answer a write, once it is durable if that is left to be done."""
        self._session.count(bytes_written=length)
        if flush:
            # The worker that flushes tells that it is written.
            self.dispatch(_FLUSH, 0, cookie, offset, 0)
        else:
            self._outlet.send(self._form.success(cookie, offset))
