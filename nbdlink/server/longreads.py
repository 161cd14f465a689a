"""Long reads of what the page cache has, which leave without being copied here.

The kernel reads the lent pages of the file while it sends (`FileMapping`); on Unix sockets, from
128 KiB on, `sendfile` moves them. Whether a range is in the page cache is guessed from its ends:
what is wrong about it costs time and nothing else. Where the file cannot be read, after all,
the reply is finished as far as it can be.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Final, NamedTuple

from nbdlink.server.executor import Executor
from nbdlink.server.outlet import Outlet, Part
from nbdlink.server.replies import ReplyFormat
from nbdlink.server.sessions import Session
from nbdlink.server.workers import Workers
from nbdlink.storage.base import PlainFile, Storage

LONG: Final = 32 * 1024
"""Bytes from which on lending pages is faster than copying."""
_SENDFILE: Final = 128 * 1024
"""Bytes from which on `sendfile` is faster still, on Unix sockets."""
_ENOUGH: Final = 256 * 1024
"""Bytes that are sent before another request is looked at."""


class Read(NamedTuple):
    """A read that was asked for."""

    cookie: int
    offset: int
    length: int


class LongReads:
    """Answers one connection's long reads from a plain file.

    Attributes:
        parts: headers and pages, by turns, that wait to be sent.
    """

    def __init__(
        self,
        session: Session,
        storage: Storage,
        plain: PlainFile,
        form: ReplyFormat,
        outlet: Outlet,
        workers: Workers,
        executor: Executor,
    ) -> None:
        """Serve `plain`, which is where `storage` lies."""
        self.parts: list[Part] = []
        self._reads: list[Read] = []
        self._size = 0
        self._session = session
        self._storage = storage
        self._file, self._start, _ = plain
        self._form = form
        self._outlet = outlet
        self._workers = workers
        self._executor = executor
        self._sendfile = _SENDFILE if session.sock.family == socket.AF_UNIX else 1 << 63
        self._nowait = nowait_flag(self._file)
        self._scratch = memoryview(bytearray(1))

    def answer(self, cookie: int, offset: int, length: int, *, whole: bool) -> bool:
        """Answer a read, now or with the next `send`.

        Args:
            cookie: the request's.
            offset: the request's.
            length: the request's.
            whole: whether the reply may not be divided into data and holes.

        Returns:
            Whether it will be answered. If not, a worker has to do it, as the disk has to be
            waited for, or it is a matter of several chunks.
        """
        position = self._start + offset
        if not self._is_cached(position, length):
            return False
        if not whole and self._storage.is_sparse and self._form.chunked:
            try:
                segments = self._executor.segments(offset, length)
            except OSError:
                return False
            if any(is_hole for _, _, is_hole in segments):
                if len(segments) > 1:
                    return False
                self._outlet.send(self._form.hole(cookie, offset, offset, length, done=True))
                return True
        opening = self._form.data_header(cookie, offset, length)
        if length >= self._sendfile:
            if self.parts:
                return False
            with self._turn():
                sent = self._outlet.send_file(opening, self._file, position, length)
                if sent < length:
                    self._executor.finish_read(offset + sent, length - sent)
        else:
            lent = self._storage.lend(offset, length)
            if lent is None:
                return False
            self.parts += (opening, lent)
            self._reads.append(Read(cookie, offset, length))
            self._size += len(opening) + length
        self._session.count(bytes_read=length)
        return True

    @property
    def is_enough(self) -> bool:
        """Whether it is time to send."""
        return self._size >= _ENOUGH

    def send(self) -> list[Read]:
        """Send what waits; give the reads that the file failed, of which nothing has been sent."""
        parts, reads, total = self.parts[:], self._reads[:], self._size
        self.parts.clear()
        self._reads.clear()
        self._size = 0
        with self._turn():
            sent = self._outlet.send_vector(parts)
            if sent == total:
                return []
            head = self._form.data.size
            while sent >= head + reads[0].length:
                sent -= head + reads.pop(0).length
                del parts[:2]
            if sent:
                _, offset, length = reads.pop(0)
                if sent < head:
                    self._outlet.send_locked(parts[0][sent:])
                done = max(0, sent - head)
                self._executor.finish_read(offset + done, length - done)
        return reads

    def _is_cached(self, position: int, length: int) -> bool:
        # Where the file system cannot tell, this shows at least that the file is long enough:
        # the last page of one that was truncated can be lent in whole, with zeroes at its end.
        last = position + length - 1
        # As the kernel reads ahead, the end is there if the front is; long ranges may have lost
        # their front meanwhile.
        probes = (last,) if length < _SENDFILE else (position, last)
        try:
            return all(
                os.preadv(self._file, (self._scratch,), probe, self._nowait) for probe in probes
            )
        except OSError:
            return False

    def _turn(self) -> contextlib.AbstractContextManager[object]:
        """Keep workers from sending, if there are any."""
        return self._outlet.lock if self._workers.pending else contextlib.nullcontext()


def nowait_flag(file: int) -> int:
    """Give the flag of reads that do not wait, or 0 if the file system does not know it."""
    try:
        os.preadv(file, (bytearray(1),), 0, os.RWF_NOWAIT)
    except BlockingIOError:
        pass
    except OSError:
        return 0
    return os.RWF_NOWAIT
