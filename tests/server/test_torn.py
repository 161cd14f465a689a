"""A reply that cannot be finished is the last thing a client gets."""

from __future__ import annotations

import contextlib
import errno
import socket
import threading

import pytest

from nbdlink.errors import StorageError
from nbdlink.protocol.constants import HeaderStyle
from nbdlink.server import Export
from nbdlink.server.executor import PIECE, Executor
from nbdlink.server.outlet import Outlet
from nbdlink.server.replies import ReplyFormat
from nbdlink.server.sessions import Session
from nbdlink.server.workers import Workers

from .fakes import READ, TIMEOUT, MemoryStorage


def test_nothing_follows_a_reply_that_was_torn():
    # What came behind it would be taken for the rest of the read.
    class Failing(MemoryStorage):
        def read_into(self, buffer, offset):
            if offset >= PIECE:
                waiting.wait(TIMEOUT)
                raise OSError(errno.EIO, "bad sector")
            super().read_into(buffer, offset)

    waiting = threading.Event()
    failing = Failing(2 << 20)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(TIMEOUT)
        session = Session(1, theirs)
        outlet = Outlet(theirs, Workers("test"))
        form = ReplyFormat(HeaderStyle.SIMPLE)
        executor = Executor(Export("", failing), {}, form, outlet, session)

        def read():
            with pytest.raises(StorageError):
                executor.perform(READ, 0, 1, 0, PIECE + 4096, frugal=True)

        def another():
            with contextlib.suppress(OSError):
                executor.perform(READ, 0, 2, 0, 4096)

        threads = [threading.Thread(target=read)]
        threads += [threading.Thread(target=another) for _ in range(5)]
        received = bytearray()
        threads[0].start()
        while len(received) < 16 + PIECE:  # so that the lock is held by now
            received += ours.recv(1 << 16)
        for thread in threads[1:]:
            thread.start()
        waiting.set()
        while data := ours.recv(1 << 16):
            received += data
        for thread in threads:
            thread.join()
        assert len(received) == 16 + PIECE
