"""Restart notices: who is remembered, who is told, and what becomes of the file."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nbdlink.errors import ConfigError
from nbdlink.protocol.claim import Claim, digest_of
from nbdlink.server import notices as module
from nbdlink.server.notices import Notices

from .fakes import DISC, READ, TIMEOUT, RawClient, request
from .gated import SESSION, claimed

OTHER = "f" * 32


@pytest.fixture
def path(tmp_path):
    return tmp_path / "clients.json"


@pytest.fixture
def ear():
    """A UDP socket on which a client listens."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(TIMEOUT)
        yield sock


def content(*clients, version=1):
    listed = [{"address": a, "port": p, "session": s} for a, p, s in clients]
    return json.dumps({"version": version, "clients": listed})


def remembered(path):
    """Give what is in the file now, as sets of (port, session)."""
    with contextlib.suppress(FileNotFoundError):
        return {(c["port"], c["session"]) for c in json.loads(path.read_text())["clients"]}
    return set()


# A real server, killed and started again.


class Server:
    """`nbdlink serve --remember-clients`, on a port that stays the same."""

    def __init__(self, folder, path, *words):
        self.image = folder / "image"
        self.image.write_bytes(bytes(1 << 16))
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.addresses = [sock.getsockname()]
        port = str(self.addresses[0][1])
        self._command = [
            *(sys.executable, "-m", "nbdlink", "serve", "-v", "-b", "127.0.0.1", "-p", port),
            *("--remember-clients", str(path), *words, str(self.image)),
        ]
        self.start()

    def start(self):
        self.process = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout.readline()

    def end(self, number=signal.SIGTERM):
        """Have it end; give its log."""
        self.process.send_signal(number)
        return self.process.communicate(timeout=TIMEOUT)[1]


@pytest.fixture
def server(tmp_path, path):
    server = Server(tmp_path, path)
    yield server
    server.process.kill()
    server.process.communicate()


@pytest.fixture
def client(server):
    with RawClient(server, handshake=False) as client:
        yield client


def port(ear):
    return ear.getsockname()[1]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_client_hears_of_a_restart(server, client, ear, path, eventually, number):
    claimed(client, 0, notice=port(ear))
    eventually(lambda: remembered(path) == {(port(ear), SESSION)})
    server.end(number)
    server.start()
    assert ear.recvfrom(1000)[0] == f"nbdlink-notice 1 {digest_of(SESSION)}\n".encode()
    with RawClient(server) as again:  # it is there already
        assert again.ask(READ, 0, 1)[0] == 0


def test_who_said_goodbye_is_forgotten(server, client, ear, path, eventually):
    claimed(client, 0, notice=port(ear))
    eventually(lambda: remembered(path))
    client.send(request(DISC))
    assert client.hung_up()
    eventually(lambda: not remembered(path))


def test_who_was_lost_is_not_forgotten(server, client, ear, path, eventually):
    claimed(client, 0, notice=port(ear))
    eventually(lambda: remembered(path))
    client.sock.close()
    server.end()
    assert remembered(path) == {(port(ear), SESSION)}


def test_a_device_is_remembered_until_its_last_connection_says_goodbye(
    server, client, ear, path, eventually
):
    claimed(client, 0, notice=port(ear))
    with RawClient(server, handshake=False) as second:
        claimed(second, 0, channel=1, notice=port(ear))
        eventually(lambda: remembered(path))
        client.send(request(DISC))
        assert client.hung_up()
        assert second.ask(READ, 0, 1)[0] == 0
        assert remembered(path)
        second.send(request(DISC))
        assert second.hung_up()
    eventually(lambda: not remembered(path))


def test_who_listens_nowhere_is_not_remembered(server, client, ear, path, eventually):
    claimed(client, 0)
    with RawClient(server, handshake=False) as second:
        claimed(second, 0, session=OTHER, notice=port(ear))
        eventually(lambda: remembered(path) == {(port(ear), OTHER)})


def test_who_has_come_back_is_told_no_more(server, client, ear, path, eventually):
    claimed(client, 0, notice=port(ear))
    eventually(lambda: remembered(path))
    server.end(signal.SIGKILL)
    server.start()
    ear.recvfrom(1000)
    with RawClient(server, handshake=False) as again:
        claimed(again, 1, notice=port(ear))
        assert remembered(path) == {(port(ear), SESSION)}


def test_the_file_is_for_its_owner_only(server, client, ear, path, eventually):
    claimed(client, 0, notice=port(ear))
    eventually(lambda: remembered(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


# In this process, with its clock in hand.


class Somebody:
    """A session, as far as notices are concerned."""

    def __init__(self, number=1, address="127.0.0.1"):
        self.number, self.address = number, address


@pytest.fixture
def notices(path, nothing_leaks):
    with contextlib.ExitStack() as stack:

        def make():
            made = Notices(path)
            stack.callback(made.close)
            return made

        yield make


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_every_kind_of_address_is_told(notices, path, address):
    family = socket.AF_INET6 if address == "::1" else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as ear:
        try:
            ear.bind((address.removeprefix("::ffff:"), 0))
        except OSError:
            pytest.skip("no IPv6 here")
        ear.settimeout(TIMEOUT)
        path.write_text(content((address, port(ear), SESSION)))
        notices().start()
        assert ear.recv(1000) == f"nbdlink-notice 1 {digest_of(SESSION)}\n".encode()


def test_who_does_not_come_back_is_told_a_few_times_and_forgotten(
    notices, path, ear, eventually, monkeypatch
):
    monkeypatch.setattr(module, "_PATIENCE", 0.4)
    monkeypatch.setattr(module, "_TIMES", (0.0, 0.1, 0.2))
    path.write_text(content(("127.0.0.1", port(ear), SESSION)))
    notices().start()
    for _ in range(3):
        ear.recv(1000)
    eventually(lambda: not remembered(path))
    ear.setblocking(False)
    with pytest.raises(BlockingIOError):
        ear.recv(1000)


def test_one_who_is_back_from_another_address_is_not_forgotten(
    notices, path, ear, eventually, monkeypatch
):
    monkeypatch.setattr(module, "_PATIENCE", 0.2)
    monkeypatch.setattr(module, "_TIMES", (0.0,))
    path.write_text(
        content(("127.0.0.1", port(ear), SESSION), ("127.0.0.1", port(ear), OTHER)),
    )
    here = notices()
    here.arrived(Somebody(address="127.0.0.2"), Claim(SESSION, 0, 1, 4711))
    here.start()
    assert digest_of(OTHER).encode() in ear.recv(1000)
    eventually(lambda: remembered(path) == {(4711, SESSION)})


def test_the_number_of_clients_is_bounded_and_those_who_are_there_stay(notices, path, eventually):
    path.write_text(content(*(("127.0.0.1", 1, f"{n:032x}") for n in range(1024))))
    here = notices()
    for number in range(1000, 1100):
        here.arrived(Somebody(number), Claim(f"{number:032x}", 0, 0, 4711))
    here.start()
    present = {(4711, f"{n:032x}") for n in range(1000, 1100)}
    eventually(lambda: present <= remembered(path))
    assert len(remembered(path)) == 1024


BROKEN = {
    "nothing": "",
    "no JSON": "{",
    "another thing": "[]",
    "another version": content(version=2),
    "no list": '{"version": 1, "clients": 7}',
    "a name": content(("localhost", 1, SESSION)),
    "a bad port": content(("127.0.0.1", 0, SESSION)),
    "a port in words": content(("127.0.0.1", "1", SESSION)),
    "a truth": content(("127.0.0.1", True, SESSION)),
    "a bad session": content(("127.0.0.1", 1, "x")),
    "a session in numbers": content(("127.0.0.1", 1, 5)),
    "too many": content(*(("127.0.0.1", 1, f"{n:032x}") for n in range(1025))),
    "too long": " " * (1 << 20) + "{}",
    "deep": "[" * 100_000,
    "half": '{"version": 1, "clients": [{"address": "127.0.0.1"}]}',
    "no text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_reported_and_ignored(notices, path, eventually, caplog, broken):
    path.write_bytes(broken if isinstance(broken, bytes) else broken.encode())
    here = notices()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"{path} is ignored: " in record.getMessage()
    assert "\n" not in record.getMessage()
    here.start()
    here.arrived(Somebody(), Claim(SESSION, 0, 0, 4711))
    eventually(lambda: _valid(path) == {(4711, SESSION)})


def _valid(path):
    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
        return remembered(path)
    return None


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["FIFO", "directory"])
def test_what_is_no_file_is_reported_and_ignored(path, caplog, make):
    make(path)
    Notices(path)
    assert f"{path} is ignored: " in caplog.text


def test_a_file_that_cannot_be_written_is_said_once(notices, path, eventually, caplog):
    here = notices()
    here.start()
    path.mkdir()
    for number in range(10):
        here.arrived(Somebody(number), Claim(SESSION, number, 0, 4711))
        eventually(lambda: not here._stale)
    here.close()
    assert caplog.text.count("clients cannot be remembered") == 1


def test_a_directory_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is no directory to write to"):
        Notices(tmp_path / "missing" / "file")


def test_nobody_listening_there_holds_nothing_up(notices, path, ear, eventually):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as gone:
        gone.bind(("127.0.0.1", 0))
        nobody = port(gone)
    path.write_text(content(("127.0.0.1", nobody, OTHER), ("127.0.0.1", port(ear), SESSION)))
    before = time.monotonic()
    here = notices()
    here.start()
    assert time.monotonic() - before < 1
    assert ear.recv(1000)


def test_a_unix_client_is_not_remembered(notices, path):
    here = notices()
    here.start()
    here.arrived(Somebody(address=None), Claim(SESSION, 0, 0, 4711))
    here.close()
    assert not Path(path).exists()
