"""What comes in: the inbox, and payloads that are too long for it.

The inbox takes whatever has arrived, many requests at a time. The payload of a long write is
received exactly, so that the next request begins at the inbox's front again, and stored in
pieces; on Unix sockets the kernel moves it into the file through a pipe (`splice`).

The socket's receives give up after a second (`set_timeout`), for the sake of idle connections;
in the middle of a request that means nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import socket
import struct
from typing import Final

from nbdlink.server.executor import PIECE
from nbdlink.server.sessions import Session
from nbdlink.storage.base import PlainFile, Storage

INBOX: Final = 1 << 20
"""Bytes that one receive takes at most."""
SPLICE: Final = 128 * 1024
"""Bytes from which on a payload comes from a Unix socket by `splice`."""
_PIPE: Final = 1 << 20
"""Bytes that the pipe between socket and file holds; more than that takes privileges."""
_ALIGNED: Final = 2048
"""Where the first payload begins in its page: 5 to 10 % are lost on copies from odd addresses."""


class HungUpError(Exception):
    """The client went away in the middle of a request."""


class StoringFailedError(Exception):
    """The storage failed, as `why` says; the payload has been taken off the socket."""

    def __init__(self, why: OSError) -> None:
        """Keep the reason."""
        super().__init__()
        self.why = why


class Intake:
    """Receives for one connection.

    Attributes:
        inbox: where requests are received, up to `INBOX` bytes; behind that there is room for
            a piece of a payload, wherever in the first part it begins.
        request: the layout of a request's header.
        is_unix: whether it is a bare Unix socket, out of which the kernel can move payloads.
    """

    def __init__(self, session: Session, request: struct.Struct) -> None:
        """Receive the requests of `session`, whose headers are `request`."""
        self._session = session
        self._sock = session.sock
        self.is_unix = session.is_bare and session.sock.family == socket.AF_UNIX
        self.request = request
        self._memory, self.inbox = buffer(INBOX + PIECE, _ALIGNED - request.size)
        self._pipe = (-1, -1)
        self._last: int | None = None  # bytes still to be heard once the session is ending

    def receive(self, target: memoryview, flags: int = 0) -> int:
        """Receive something into `target`; give how many bytes.

        Raises:
            HungUpError: the client has.
        """
        while True:
            try:
                count = self._sock.recv_into(target, 0, flags)
            except BlockingIOError:
                continue
            if not count:
                raise HungUpError
            return count

    def fill(self, target: memoryview) -> None:
        """Receive as much as fits into `target`."""
        while target:
            target = target[self.receive(target, socket.MSG_WAITALL) :]

    def skip(self, length: int) -> None:
        """Receive bytes and throw them away. The inbox must hold nothing of use."""
        while length:
            length -= self.receive(self.inbox[: min(length, INBOX)])

    def store(
        self, storage: Storage, offset: int, length: int, fua: bool, payload: int, end: int
    ) -> None:
        """Receive a payload in pieces and write each. The inbox is empty then.

        Args:
            storage: where to write.
            offset: where in it.
            length: bytes of payload.
            fua: whether they must be durable.
            payload: where in the inbox the payload begins.
            end: where in the inbox the received bytes end; they all belong to the payload.

        Raises:
            StoringFailedError: the storage failed.
        """
        inbox = self.inbox
        left = length
        while left:
            count = min(left, PIECE)
            if (stop := payload + count) > end:
                self.fill(inbox[end:stop])
                end = stop
            if self._session.superseded:
                raise HungUpError
            left -= count
            try:
                storage.write(inbox[payload:stop], offset, fua)
            except OSError as failure:
                self.skip(left - (end - stop))
                raise StoringFailedError(failure) from None
            offset += count
            # What the first receive brought beyond the piece belongs to the next one.
            payload, end = (stop, end) if end > stop else (payload, payload)

    def splice(
        self, storage: Storage, plain: PlainFile, offset: int, length: int, payload: int, end: int
    ) -> None:
        """Have the kernel move a payload into the file; like `store`, for Unix sockets."""
        if self._pipe[0] < 0:
            try:
                self._pipe = os.pipe()
            except OSError:  # out of descriptors, most likely
                self.store(storage, offset, length, False, payload, end)
                return
            with contextlib.suppress(OSError):  # the user has many pipes; a small one will do
                fcntl.fcntl(self._pipe[1], fcntl.F_SETPIPE_SZ, _PIPE)
        left = length - (end - payload)
        try:
            if end > payload:
                storage.write(self.inbox[payload:end], offset, False)
        except OSError as failure:
            self.skip(left)
            raise StoringFailedError(failure) from None
        source, (outlet, inlet) = self._sock.fileno(), self._pipe
        position = plain.start + offset + end - payload
        while left:
            try:
                count = os.splice(source, inlet, min(left, _PIPE))
            except BlockingIOError:
                continue
            if not count or self._session.superseded:
                raise HungUpError
            left -= count
            while count:
                try:
                    moved = os.splice(outlet, plain.fd, count, offset_dst=position)
                except OSError:
                    moved = 0
                if not moved:
                    # Some file systems know nothing of splice. Once more by the storage, which
                    # also knows what to say if it is something else.
                    data = self.inbox[:count]
                    while moved < count:
                        moved += os.readv(outlet, (data[moved:],))
                    try:
                        storage.write(data, position - plain.start, False)
                    except OSError as failure:
                        self.skip(left)
                        raise StoringFailedError(failure) from None
                position += moved
                count -= moved

    def left_to_hear(self) -> int:
        """Give how many bytes are still to be heard from a client that is to be let go.

        What had arrived when this was first asked is answered. A client that never stops to
        send would hold up the end otherwise.
        """
        if self._last is None:
            self._last = self._session.arrived()
        elif self._last and not self._session.is_bare and not self._session.arrived():
            self._last = 0  # what TLS adds to the data is not heard
        return self._last

    def note(self, count: int) -> None:
        """Take note that so many bytes have been heard."""
        if self._last is not None:
            self._last = max(0, self._last - count)

    def missing(self, end: int) -> int:
        """Give how many bytes the request at the front of the inbox lacks, as far as is known.

        Args:
            end: where what has been received ends.
        """
        if end < self.request.size:
            return self.request.size - end
        length: int = self.request.unpack_from(self.inbox)[5]
        return self.request.size + length - end

    def set_timeout(self, seconds: int) -> None:
        """Have receives give up after that time (BlockingIOError); 0 for never.

        The kernel does it by itself. A timeout of Python's would cost a poll for every receive.
        """
        value = struct.pack("ll", seconds, 0)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)

    def give_back(self) -> None:
        """Give the inbox's memory back to the system until it is used again."""
        self._memory.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Close the pipe."""
        for fd in self._pipe:
            if fd >= 0:
                os.close(fd)


def buffer(size: int, start: int) -> tuple[mmap.mmap, memoryview]:
    """Give anonymous memory, and `size` bytes of it that begin `start` bytes into a page.

    It is page aligned, and takes no memory before it is touched.
    """
    page = mmap.PAGESIZE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, -(-(start + size) // page) * page, flags)
    return memory, memoryview(memory)[start : start + size]
