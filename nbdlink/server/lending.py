"""Reads of what the page cache has, sent from the file's own pages without a copy of ours.

The kernel reads the pages while it sends (`storage/mapping.py`), so a batch of reads costs one
system call in all. Where the file cannot be read, after all, `send` finishes the reply that was
begun, and gives the others back.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from typing import Final, NamedTuple

from nbdlink.protocol.constants import Command
from nbdlink.server.executor import Executor
from nbdlink.server.intake import buffer
from nbdlink.server.outlet import Outlet, Part
from nbdlink.server.replies import ReplyFormat
from nbdlink.server.sessions import Session
from nbdlink.server.workers import Workers
from nbdlink.storage.base import PlainFile, Storage

LONG: Final = 32 * 1024
"""Bytes from which on it is worth while to look for holes before a read."""
COPIED: Final = 128 * 1024
"""Bytes that are copied and encrypted in one go: they stay in the processor's cache."""

_READ: Final = int(Command.READ)


class Read(NamedTuple):
    """A read that was asked for."""

    cookie: int
    offset: int
    length: int


class Lending:
    """One connection's reads from a plain file. The engine's loop fills the lists as well.

    Attributes:
        parts: headers and pages, by turns, that wait to be sent.
        reads: what they are the replies to, one for each pair.
        plain: where the storage lies; another one once it has grown.
    """

    def __init__(
        self,
        storage: Storage,
        plain: PlainFile,
        form: ReplyFormat,
        outlet: Outlet,
        workers: Workers,
        executor: Executor,
        session: Session,
        *,
        copies: bool = False,
    ) -> None:
        """Lend the pages of `plain`, which is where `storage` lies.

        With `copies` nothing is lent, and long reads are copied before they are sent. TLS in
        this process has to be done so: a kernel that cannot read a page of a truncated file
        says so, and a process that cannot is killed.
        """
        self.parts: list[Part] = []
        self.reads: list[Read | tuple[int, int, int]] = []
        self._storage = storage
        self.plain = plain
        self._form = form
        self._outlet = outlet
        self._workers = workers
        self._executor = executor
        self._session = session
        # Data is page aligned: 8 to 24 bytes behind a page's beginning, where a header would put
        # it, 64 KiB took three times as long to be read (from 32 bytes on it did not).
        head = form.data.size
        self._copy = buffer(head + COPIED, mmap.PAGESIZE - head)[1] if copies else None

    def answer(self, cookie: int, offset: int, length: int, tick: int) -> int:
        """Answer a long read, now or with the next `send`.

        Args:
            cookie: the request's.
            offset: the request's.
            length: the request's.
            tick: the present time for `FileMapping.seen`.

        Returns:
            How many bytes wait to be sent for it; 0 if the reply is out; -1 if a worker has to
            do it, as the disk has to be waited for, or it is a matter of several chunks.

        Raises:
            OSError: the connection broke.
        """
        in_memory, mapping = self.plain.in_memory, self.plain.mapping
        if not in_memory and not (mapping.nowait and mapping.is_cached(offset, length, tick)):
            return -1
        if self._storage.is_sparse:
            try:
                segments = self._executor.segments(offset, length)
            except OSError:
                return -1
            if any(is_hole for _, _, is_hole in segments):
                if len(segments) > 1 or not self._form.chunked:
                    return -1
                self._outlet.send(self._form.hole(cookie, offset, offset, length, done=True))
                return 0
        if self._copy is not None:
            return self._answer_with_copy(cookie, offset, length)
        window = mapping.window(offset)
        if not window.first <= offset <= offset + length <= window.last:
            # Not mapped, or across two windows; but it is in the page cache.
            self._executor.perform(_READ, 0, cookie, offset, length, frugal=True)
            return 0
        begin = offset - window.first
        self.parts.append(self._form.data_header(cookie, offset, length))
        self.parts.append(window.pages[begin : begin + length])
        self.reads.append(Read(cookie, offset, length))
        return self._form.data.size + length

    def _answer_with_copy(self, cookie: int, offset: int, length: int) -> int:
        assert self._copy is not None
        head, fd, start = self._form.data.size, self.plain.fd, self.plain.start
        reply = self._copy[: head + min(length, COPIED)]
        if not _fills(fd, reply[head:], start + offset):
            return -1
        reply[:head] = self._form.data_header(cookie, offset, length)
        done = len(reply) - head
        with self._outlet.lock if self._workers.pending else contextlib.nullcontext():
            self._outlet.send_locked(reply)
            while done < length:
                piece = self._copy[head : head + min(length - done, COPIED)]
                if not _fills(fd, piece, start + offset + done):
                    self._executor.finish_read(offset + done, length - done)
                    break
                self._outlet.send_locked(piece)
                done += len(piece)
        self._session.count(bytes_read=length)
        return 0

    def send(self, lead: int, total: int, sent: int = 0) -> list[Read]:
        """Send what waits.

        Args:
            lead: bytes of other replies, which are the first part, if any.
            total: bytes in all parts.
            sent: how many of them have been sent already.

        Returns:
            The reads that the file failed, of which nothing has been sent.

        Raises:
            StorageError: it failed in the middle of a reply.
            OSError: the connection broke.
        """
        parts, reads = self.parts[:], [Read(*read) for read in self.reads]
        self.parts.clear()
        self.reads.clear()
        with self._outlet.lock if self._workers.pending else contextlib.nullcontext():
            sent = self._outlet.send_vector(parts, sent)
            if sent == total:
                return []
            # Pages of the file could not be read: it fails, or has been truncated.
            if lead:
                if sent < lead:
                    self._outlet.send_locked(parts[0][sent:])
                sent = max(0, sent - lead)
                del parts[0]
            head = self._form.data.size
            while reads and sent >= head + reads[0].length:
                sent -= head + reads.pop(0).length
                del parts[:2]
            if sent:
                _, offset, length = reads.pop(0)
                if sent < head:
                    self._outlet.send_locked(parts[0][sent:])
                done = max(0, sent - head)
                self._executor.finish_read(offset + done, length - done)
        return reads


def _fills(fd: int, place: memoryview, position: int) -> bool:
    """Read from a file; tell whether there was enough of it."""
    try:
        return os.preadv(fd, (place,), position) == len(place)
    except OSError:
        return False
