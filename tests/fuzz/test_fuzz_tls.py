"""Real sessions with TLS, and somebody on the wire who changes what goes over it.

Whatever happens to the bytes, each side comes to an end in time and with an error of ours, and
what is read is what is there: a changed record is never data.
"""

from __future__ import annotations

import logging
import random
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdlink.client.connection import Connection
from nbdlink.client.opening import negotiate_best
from nbdlink.client.security import Security, TLSOptions
from nbdlink.errors import NBDError
from nbdlink.server import serve_in_thread
from nbdlink.transport.tlsfiles import CredentialFiles
from nbdlink.uri import Target

from ..server.fakes import MemoryStorage
from ..server.tls_client import security as server_security
from ..transport.pairs import authority
from ..wire import DOWN, UP, Tap, faithfully

SIZE = 1 << 18
PATIENCE = 10
"""Seconds after which a session hangs: longer than each side's own deadline."""


class Tampering:
    """Changes bytes at chosen places of each direction.

    Attributes:
        done: whether anything was changed.
    """

    def __init__(self, seed):
        self._rng = random.Random(seed)
        self._lock = threading.Lock()
        self._gone = {UP: 0, DOWN: 0}
        # Most of what there is goes over in the first kilobytes; the greeting is left alone in
        # half of the sessions.
        most = self._rng.choice([200, 2_000, 20_000, 150_000])
        self._places = {
            direction: self._rng.randrange(most)
            for direction in (UP, DOWN)
            if self._rng.random() < 0.7
        }
        self.done = False

    def __call__(self, direction, data):
        with self._lock:
            before = self._gone[direction]
            self._gone[direction] += len(data)
            at = self._places.get(direction, -1) - before
            if not 0 <= at < len(data):
                return data
            self.done = True
            return self._change(bytearray(data), at)

    def _change(self, data, at):
        rng = self._rng
        match rng.randrange(6):
            case 0 | 1:
                data[at] ^= 1 << rng.randrange(8)
            case 2:
                data[at : at + 8] = rng.randbytes(8)
            case 3:
                del data[at : at + rng.choice([1, 5, 40])]
            case 4:
                data[at:at] = data[:at] or b"\x15\3\3\0\2\1\0"
            case 5:
                return None
        return bytes(data)


class Sessions:
    """One service, and a wire to it for each session."""

    def __init__(self, folder):
        self._folder = folder
        self._storage = MemoryStorage(SIZE)
        self.content = bytes(self._storage.data)
        self.failures = []
        self._count = 0
        self._service = serve_in_thread(
            {"": self._storage},
            unix=folder / "nbd",
            security=server_security(folder),
            negotiation_timeout=2,
        )
        self.service = self._service.__enter__()
        files = authority().write_directory(folder / "trust")
        options = TLSOptions("require", CredentialFiles(directory=str(files)), hostname="localhost")
        self._security = Security(Target(socket="x"), options)

    def close(self):
        self._service.__exit__(None, None, None)

    def converse(self, alter, patience=0.5):
        """Have a session over a wire with somebody on it; give whether it went well.

        Each step may take `patience` seconds: where bytes are missing, both sides wait for them.
        """
        self._count += 1
        tap = Tap(self.service.addresses[0], str(self._folder / f"tap{self._count}"))
        tap.alter = alter
        target = Target(socket=tap.addresses[0])
        outcome = []
        client = threading.Thread(target=self._read, args=(target, outcome, patience), daemon=True)
        client.start()
        client.join(5 * PATIENCE)
        assert not client.is_alive(), "the client hangs"
        for wire in tap.wires:
            wire.cut()
        tap.close()
        if isinstance(outcome[0], BaseException) and not isinstance(outcome[0], NBDError):
            raise outcome[0]
        return outcome[0] is None

    def _read(self, target, outcome, patience):
        try:
            wire, export = negotiate_best(target, timeout=patience, security=self._security)
            with Connection(target, wire, export) as connection:
                for offset, length in ((0, 1), (7, 100_000), (SIZE - 50_000, 50_000)):
                    pending = connection.submit_read(length, offset)
                    data = pending.result(patience)
                    assert data == self.content[offset : offset + length], "wrong data"
                connection.submit_write(self.content[:1000], 0).result(patience)
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)


@pytest.fixture(scope="module")
def sessions(tmp_path_factory):
    sessions = Sessions(tmp_path_factory.mktemp("tls"))
    yield sessions
    sessions.close()


class Bugs(logging.Handler):
    """Keeps what the server calls unexpected."""

    def __init__(self):
        super().__init__()
        self.found = []

    def emit(self, record):
        if "unexpected " in record.getMessage() and "Error" in record.getMessage():
            self.found.append(record.getMessage())


@pytest.fixture
def bugs():
    logger = logging.getLogger("nbdlink.server")
    handler = Bugs()
    logger.addHandler(handler)
    yield handler.found
    logger.removeHandler(handler)


def test_a_session_that_nobody_touches_goes_well(sessions):
    assert sessions.converse(faithfully, PATIENCE)


def test_what_is_changed_on_the_wire_is_never_data(sessions, bugs):
    before = bytes(sessions._storage.data)
    tampered = []

    @settings(max_examples=80, deadline=None, derandomize=True)
    @given(st.integers(0, 2**32 - 1))
    def tamper(seed):
        change = Tampering(seed)
        well = sessions.converse(change)
        assert not bugs
        assert bytes(sessions._storage.data) == before, "something else was written"
        tampered.append(change.done and not well)

    tamper()
    assert sum(tampered) > len(tampered) // 3, "too little was changed to prove anything"


def test_no_thread_is_left_of_sessions_that_were_changed(sessions, bugs):
    for seed in range(20):
        sessions.converse(Tampering(seed))
    for thread in sessions.service.sessions.threads():
        thread.join(PATIENCE)
        assert not thread.is_alive(), f"{thread.name} hangs"
    assert not bugs
    assert sessions.converse(faithfully, PATIENCE), "the next one is not served"
