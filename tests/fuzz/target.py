"""The real handshake and engine at one end of a socket pair; at the other, whoever lies."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import threading
import time

from nbdlink.errors import RemoteProtocolError, TransportError
from nbdlink.server import Catalogue, Export
from nbdlink.server.engine import Transmission
from nbdlink.server.handshake import negotiate
from nbdlink.server.negotiate import Negotiation
from nbdlink.server.sessions import Session
from nbdlink.storage.raw import RawStorage
from nbdlink.transport.stream import Deadline

from ..server.fakes import READ, MemoryStorage, RawClient
from .streams import SIZE, conversation

PATIENCE = 20
"""Seconds after which a conversation hangs."""
FENCE = 4096
"""Bytes around what is served of a file, which nobody may touch."""


class WaitingStorage(MemoryStorage):
    """A storage in memory whose requests go to workers all the same; it checks their ranges."""

    waits = True


class Target:
    """Exports that outlive the conversations: what one client breaks, another would see."""

    def __init__(self, folder):
        self._image = folder / "image"
        self._image.write_bytes(b"\xaa" * FENCE + bytes(SIZE) + b"\xaa" * FENCE)
        raw = RawStorage.open(self._image, offset=FENCE, size=SIZE)
        self._storages = [MemoryStorage(SIZE), WaitingStorage(SIZE), raw]
        self._catalogues = [
            Catalogue([Export("", storage), Export("other", storage, read_only=True)])
            for storage in self._storages
        ]

    def close(self):
        for storage in self._storages:
            storage.close()

    def converse(self, seed):
        """Have one conversation with each storage, and check what may never happen."""
        for catalogue in self._catalogues:
            rng = random.Random(seed)
            said = conversation(rng)
            self._converse(catalogue, said, rng)
        with self._image.open("rb") as file:
            content = file.read()
        assert len(content) == SIZE + 2 * FENCE
        assert content[:FENCE] == content[-FENCE:] == b"\xaa" * FENCE

    def _converse(self, catalogue, said, rng):
        before = set(threading.enumerate())
        listens, reset = rng.randrange(8) > 0, rng.randrange(8) == 0
        with contextlib.ExitStack() as stack:
            ours, theirs = socket.socketpair()
            stack.callback(ours.close)
            stack.callback(theirs.close)
            failures = []
            server = threading.Thread(target=_serve, args=(theirs, catalogue, failures))
            server.start()
            heard = threading.Thread(target=_hear, args=(ours,))
            if listens:
                heard.start()
            ours.settimeout(PATIENCE if listens else 0.05)
            with contextlib.suppress(OSError):
                ours.sendall(said)
            if reset or not listens:
                ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                ours.shutdown(socket.SHUT_RDWR)
            else:
                ours.shutdown(socket.SHUT_WR)
            server.join(PATIENCE)
            assert not server.is_alive(), "the server hangs"
            theirs.close()
            if listens:
                heard.join(PATIENCE)
                assert not heard.is_alive()
        if failures:
            raise failures[0]
        end = time.monotonic() + PATIENCE
        while set(threading.enumerate()) - before:
            assert time.monotonic() < end, "threads are left"
            time.sleep(0.001)
        _check_others(catalogue)


def _serve(sock, catalogue, failures):
    """Do what a service does with a client; keep what it would have called a bug."""
    session = Session(1, sock)
    try:
        negotiation = Negotiation(catalogue, admit=lambda export, claim: None)
        negotiated = negotiate(session, negotiation, Deadline(PATIENCE))
        if negotiated is not None:
            Transmission(session, negotiated).run()
    except (RemoteProtocolError, TransportError, ConnectionError):
        pass
    except BaseException as failure:
        failures.append(failure)
    finally:
        session.cut()


def _hear(sock):
    with contextlib.suppress(OSError):
        while sock.recv(1 << 18):
            pass


def _check_others(catalogue):
    """Check that the next client is served as if nothing had been."""
    ours, theirs = socket.socketpair()
    failures = []
    server = threading.Thread(target=_serve, args=(theirs, catalogue, failures))
    server.start()
    with ours, theirs:
        ours.settimeout(PATIENCE)
        client = RawClient.__new__(RawClient)
        client.sock = ours
        client._negotiate(b"", True)
        assert client.write(0, bytes(512)) == 0
        assert client.ask(READ, 0, 512) == (0, bytes(512))
        ours.shutdown(socket.SHUT_WR)
        server.join(PATIENCE)
    assert not failures


def silence():
    """Keep the log of bad requests to itself."""
    import logging

    logging.getLogger("nbdlink").setLevel(logging.CRITICAL + 1)


def seed_from_system():
    """Give a seed that nobody has tried."""
    return int.from_bytes(os.urandom(4))
