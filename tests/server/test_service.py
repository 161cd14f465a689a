"""Listeners, limits, and how a service ends."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import selectors
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nbdlink.errors import TransportError
from nbdlink.server import Catalogue, Export, Service, serve_in_thread
from nbdlink.transport.stream import listen_tcp, listen_unix
from nbdlink.uri import Target

from .fakes import (
    EIO,
    FLUSH,
    READ,
    REP_ACK,
    MemoryStorage,
    RawClient,
    export_request,
    request,
)


def waits_to_be_accepted(client):
    """Tell whether a client hears nothing, not even a greeting, and nobody is busy meanwhile."""
    client.sock.settimeout(0.2)
    before = time.process_time()
    try:
        client.sock.recv(18)
    except TimeoutError:
        return time.process_time() - before < 0.1
    else:
        return False
    finally:
        client.sock.settimeout(30)


# Where it listens.


def test_a_free_port_is_chosen(serve, storage):
    service = serve({"": storage}, unix=None)
    ((host, port),) = service.addresses
    assert service.uri("x") == f"nbd://{host}:{port}/x"
    with RawClient(service) as client:
        assert client.ask(READ, 0, 9) == (0, storage.data[:9])


def test_a_unix_socket(service, storage, tmp_path):
    assert Target.parse(service.uri()).socket == str(tmp_path / "nbd1.sock")
    with RawClient(service) as client:
        assert client.ask(READ, 0, 9) == (0, storage.data[:9])


def test_several_listeners(storage, tmp_path, nothing_leaks):
    listeners = [*listen_tcp("localhost", 0), listen_unix(str(tmp_path / "socket"))]
    with Service(Catalogue([Export("", storage)]), listeners) as service:
        for address in list(service.addresses):
            service.addresses = [address]
            if isinstance(address, str) or ":" not in address[0]:
                with RawClient(service) as client:
                    assert client.ask(READ, 0, 9)[0] == 0


def test_several_exports(serve, tmp_path):
    paths = {}
    for name in ("", "one", "two"):
        paths[name] = tmp_path / f"image-{name}"
        paths[name].write_bytes(f"content of {name}".encode())
    service = serve(paths)
    for name, path in paths.items():
        with RawClient(service, name=name.encode()) as client:
            data = path.read_bytes()
            assert client.ask(READ, 0, len(data)) == (0, data)


def test_a_tcp_client_is_known_by_its_address(serve, storage):
    service = serve({"": storage}, unix=None)
    with RawClient(service) as client:
        (info,) = service.sessions.snapshot()
        host, port = client.sock.getsockname()
        assert info.peer == f"{host}:{port}"


def test_a_unix_client_is_known_by_its_process(service):
    with RawClient(service):
        (info,) = service.sessions.snapshot()
        assert info.peer == f"process {os.getpid()} of user {os.getuid()}"


def test_a_storage_that_cannot_be_served_leaves_nothing(storage, tmp_path, nothing_leaks):
    (tmp_path / "good").write_bytes(b"x")
    taken = listen_tcp("127.0.0.1", 0)
    with (
        pytest.raises(TransportError),
        serve_in_thread({"a": tmp_path / "good", "b": storage}, port=taken[0].getsockname()[1]),
    ):
        pass
    assert storage.closed
    taken[0].close()


# Many clients.


def test_clients_share_one_export(service, storage):
    with RawClient(service) as one, RawClient(service) as two:
        assert one.write(100, b"hello") == 0
        assert two.ask(READ, 100, 5) == (0, b"hello")
        assert two.ask(FLUSH)[0] == 0


def test_a_slow_client_holds_up_nobody(service, storage):
    storage.gate.clear()
    with RawClient(service) as slow, RawClient(service) as other:
        slow.send(request(1, 0, 4, cookie=3) + b"slow")
        storage.entered.wait(20)
        assert other.ask(READ, 100, 5) == (0, storage.data[100:105])
        storage.gate.set()
        assert slow.reply() == (0, 3, b"")


def test_clients_in_their_handshake_hold_up_nobody(service, storage):
    with contextlib.ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(RawClient(service, handshake=False))
        with RawClient(service) as client:
            assert client.ask(READ, 0, 5)[0] == 0


def test_a_dawdler_is_dropped(serve, storage, caplog):
    service = serve({"": storage}, negotiation_timeout=0.1)
    with RawClient(service, handshake=False) as dawdler:
        dawdler.receive(18)
        assert dawdler.hung_up()
    with RawClient(service) as client:
        assert client.ask(READ, 0, 5)[0] == 0


def test_a_deadline_for_the_handshake_is_none_for_requests(serve, storage, eventually):
    service = serve({"": storage}, negotiation_timeout=0.5)
    with RawClient(service) as client, RawClient(service, handshake=False) as dawdler:
        dawdler.receive(18)
        assert dawdler.hung_up()  # so half a second has passed
        assert client.ask(READ, 0, 5)[0] == 0


@pytest.mark.parametrize(
    "garbage",
    [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", os.urandom(1000), b"\x16\x03\x01" * 20, bytes(100)],
    ids=["HTTP", "noise", "TLS", "zeroes"],
)
def test_other_protocols_are_hung_up_on(service, garbage, caplog):
    with RawClient(service, handshake=False) as client:
        client.receive(18)
        client.send(garbage)
        assert client.hung_up()
    with RawClient(service) as client:
        assert client.ask(READ, 0, 5)[0] == 0
    assert "Traceback" not in caplog.text
    assert "hung up on: " in caplog.text


def test_a_missing_export_by_export_name_is_hung_up_on(service):
    with RawClient(service, handshake=False) as client:
        client.receive(18)
        client.send(b"\0\0\0\3IHAVEOPT\0\0\0\1\0\0\0\4nope")
        assert client.hung_up()


# Limits.


def test_clients_beyond_the_limit_wait_until_another_leaves(serve, storage):
    service = serve({"": storage}, shared=2)
    with (
        RawClient(service) as one,
        RawClient(service),
        RawClient(service, handshake=False) as three,
    ):
        assert waits_to_be_accepted(three)
        assert len(service.sessions) == 2
        one.sock.close()
        assert three.receive(18).startswith(b"NBDMAGIC")


def test_the_limit_holds_for_clients_that_come_at_the_same_moment(storage, nothing_leaks):
    listeners = [*listen_tcp("127.0.0.1", 0), *listen_tcp("127.0.0.1", 0)]
    service = Service(Catalogue([Export("", storage)]), listeners, shared=1)
    clients = []
    for address in list(service.addresses):  # they wait before the service looks
        service.addresses = [address]
        clients.append(RawClient(service, handshake=False))
    with service, contextlib.ExitStack() as stack:
        for client in clients:
            stack.callback(client.sock.close)
        greeted = selectors.DefaultSelector()
        stack.callback(greeted.close)
        for client in clients:
            greeted.register(client.sock, selectors.EVENT_READ, client)
        ((key, _),) = greeted.select(20)
        (other,) = (client for client in clients if client is not key.data)
        assert waits_to_be_accepted(other)
        key.data.sock.close()
        assert other.receive(18).startswith(b"NBDMAGIC")


def test_no_limit_is_no_limit(service):
    with contextlib.ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(RawClient(service))
        assert len(service.sessions) == 40


def test_a_client_for_whom_there_is_no_thread_is_turned_away(service, monkeypatch, caplog):
    start = threading.Thread.start

    def exhausted(thread):
        if thread.name.startswith("nbd-session"):
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", exhausted)
        with RawClient(service, handshake=False) as client:
            assert client.hung_up()
    with RawClient(service) as client:
        assert client.ask(READ, 0, 5)[0] == 0
    assert "turned away: can't start new thread" in caplog.text


# Once.


@pytest.fixture
def once(serve, storage):
    return serve({"": storage}, once=True)


def test_once_ends_with_its_client(once, storage):
    with RawClient(once) as client:
        assert client.ask(READ, 0, 5)[0] == 0
        assert once.join(0) is False
    assert once.join(20)
    assert storage.closed


def test_once_waits_for_the_last_of_several(once, eventually):
    one, two = RawClient(once), RawClient(once)
    one.sock.close()
    eventually(lambda: len(once.sessions) == 1)
    with RawClient(once) as three:  # the accepting thread has seen the first one leave
        assert three.ask(READ, 0, 5)[0] == 0
    assert two.ask(READ, 0, 5)[0] == 0
    assert once.join(0) is False
    two.sock.close()
    assert once.join(20)


def test_once_does_not_count_who_only_looks(once):
    with RawClient(once, handshake=False) as client:
        client.receive(18)
        client.send(b"\0\0\0\3")
        assert client.option(3)[-1][0] == REP_ACK
        assert client.option(6, export_request())[-1][0] == REP_ACK
        assert client.option(2)[-1][0] == REP_ACK
        assert client.hung_up()
    with RawClient(once) as client:
        assert client.ask(READ, 0, 5)[0] == 0
    assert once.join(20)


# The end.


def test_nothing_is_left_after_a_stop(storage, tmp_path, nothing_leaks):
    path = tmp_path / "socket"
    with serve_in_thread({"": storage}, unix=path) as service:
        assert path.is_socket()
        client = RawClient(service)
        assert client.ask(READ, 0, 5)[0] == 0
    assert client.hung_up()
    client.sock.close()
    assert not path.exists()
    assert storage.calls[-1] == ("flush",)
    assert storage.closed
    assert service.status == 0


def test_stopping_twice_is_stopping_once(service):
    service.stop()
    service.stop()
    assert service.join(20)
    service.stop()


def test_a_service_stops_while_clients_are_in_their_handshake(service):
    with RawClient(service, handshake=False) as client:
        client.receive(18)
        service.stop()
        assert client.hung_up()
        assert service.join(20)


def test_a_request_in_flight_is_finished(service, storage):
    storage.gate.clear()
    with RawClient(service) as client:
        client.send(request(1, 0, 4, cookie=3) + b"last" + request(READ, 0, 4, cookie=4))
        storage.entered.wait(20)
        service.stop()
        storage.gate.set()
        assert client.reply() == (0, 3, b"")
        assert client.reply(4) == (0, 4, b"last")
        assert client.hung_up()
    assert service.join(20)
    assert storage.data[:4] == b"last"


def test_a_payload_under_way_is_taken(service, storage, eventually):
    length = 300_000
    with RawClient(service) as client:
        client.send(request(1, 0, length, cookie=3) + bytes(200_000))
        # Busy as soon as the server has the first part: nothing tells of that but the state.
        (session,) = service.sessions._active.values()
        eventually(lambda: not session.idle)
        service.stop()
        eventually(lambda: session.ending)
        client.send(bytes(length - 200_000))
        assert client.reply() == (0, 3, b"")
        assert client.hung_up()
    assert service.join(20)
    assert storage.data[:length] == bytes(length)


def refuses(service):
    try:
        RawClient(service, handshake=False).sock.close()
    except (ConnectionError, FileNotFoundError):
        return True
    return False


def test_newcomers_are_refused_while_it_stops(service, storage, eventually):
    storage.gate.clear()
    with RawClient(service) as client:
        client.send(request(1, 0, 4) + b"last")
        storage.entered.wait(20)
        service.stop()
        eventually(lambda: refuses(service))
        storage.gate.set()
        assert client.reply()[0] == 0


def test_grace_is_bounded(serve, storage, caplog):
    service = serve({"": storage}, grace=0.05)
    with RawClient(service) as client:
        client.send(request(1, 0, 100_000) + bytes(10))  # and never the rest
        assert client.sock.getpeername()
        service.stop()
        assert service.join(20)
        assert client.hung_up()


def test_a_hanging_storage_is_not_closed_under_its_thread(serve, storage, monkeypatch, caplog):
    monkeypatch.setattr("nbdlink.server.service._CUT_GRACE", 0.05)
    service = serve({"": storage}, grace=0.05)
    storage.gate.clear()
    with RawClient(service) as client:
        client.send(request(1, 0, 4) + b"hang")
        storage.entered.wait(20)
        service.stop()
        assert service.join(20)
    assert not storage.closed
    assert service.status == 1
    assert "did not finish" in caplog.text
    storage.gate.set()


def test_a_flush_that_fails_at_the_end_is_told(service, storage, caplog):
    storage.failing = {"flush": errno.EIO}
    with RawClient(service) as client:
        assert client.ask(FLUSH)[0] == EIO
    service.stop()
    assert service.join(20)
    assert service.status == 1
    assert storage.closed
    assert "not made durable" in caplog.text


def test_abort_flushes_nothing(service, storage):
    service.abort()
    assert service.join(20)
    assert ("flush",) not in storage.calls
    assert service.status == 1


def test_a_socket_that_somebody_else_has_taken_over_is_left_alone(serve, storage, tmp_path):
    service = serve({"": storage}, unix=tmp_path / "socket")
    (tmp_path / "socket").rename(tmp_path / "elsewhere")
    with listen_unix(str(tmp_path / "socket")):
        service.stop()
        assert service.join(20)
        assert (tmp_path / "socket").is_socket()


def test_a_socket_that_was_given_is_not_removed(storage, tmp_path, nothing_leaks):
    listener = listen_unix(str(tmp_path / "socket"))
    with Service(Catalogue([Export("", storage)]), [listener], unlink=False):
        pass
    assert (tmp_path / "socket").is_socket()


def test_whatever_goes_wrong_in_accepting_ends_in_order(storage, tmp_path, caplog, monkeypatch):
    def broken(service, listener):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(Service, "_accept_one", broken)
    with serve_in_thread({"": storage}, unix=tmp_path / "socket") as service:
        RawClient(service, handshake=False).sock.close()
        assert service.join(20)
    assert service.status == 1
    assert "accepting failed: ZeroDivisionError: oops" in caplog.text
    assert storage.closed


# Signals: only a program's main thread hears them.

PROGRAM = """
import logging, sys, time
from nbdlink.server import *
from nbdlink.storage.raw import RawStorage
from nbdlink.transport.stream import listen_unix
logging.basicConfig(level=logging.INFO, format="%(message)s")
socket, image, once, slow = sys.argv[1:]
storage = RawStorage.open(image)
if slow == "slow":
    def write(*_):
        print("writing", flush=True)
        time.sleep(1000)
    storage.write = write
service = Service(Catalogue([Export("", storage)]), [listen_unix(socket)], once=once == "once",
                  grace=1000)
sys.exit(service.run(lambda: print("ready", flush=True)))
"""


class Program:
    """A service in a process of its own, as `RawClient` needs it."""

    def __init__(self, folder, *, once=False, slow=False):
        self.image, self.socket = folder / "image", folder / "socket"
        self.image.write_bytes(bytes(4096))
        words = ["once" if once else "-", "slow" if slow else "-"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(self.socket), str(self.image), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.addresses = [str(self.socket)]
        assert self.process.stdout.readline() == "ready\n"

    def logs(self, words):
        """Wait until the program has said `words` in a line of its log."""
        return any(words in line for line in self.process.stderr)

    def end(self):
        """Give exit status and log."""
        log = self.process.communicate(timeout=20)[1]
        return self.process.returncode, log


@pytest.fixture
def program(tmp_path):
    with contextlib.ExitStack() as stack:

        def start(**options):
            program = Program(tmp_path, **options)
            stack.callback(program.process.communicate)
            stack.callback(program.process.kill)
            return program

        yield start


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_program_in_order(program, number):
    program = program()
    with RawClient(program) as client:
        assert client.write(0, b"kept") == 0
        program.process.send_signal(number)
        assert client.hung_up()
    status, log = program.end()
    assert status == 0
    assert "Traceback" not in log
    assert number.name in log
    assert not program.socket.exists()
    assert program.image.read_bytes()[:4] == b"kept"


def test_a_second_signal_does_not_wait(program):
    program = program(slow=True)
    with RawClient(program) as client:
        client.send(request(1, 0, 4) + b"slow")
        assert program.process.stdout.readline() == "writing\n"
        program.process.send_signal(signal.SIGTERM)
        assert program.logs("told to stop by SIGTERM")
        program.process.send_signal(signal.SIGTERM)
        status, log = program.end()
    assert status == 1
    assert "told to stop twice" in log
    assert not program.socket.exists()


def test_a_program_that_serves_once_ends_by_itself(program):
    program = program(once=True)
    with RawClient(program) as client:
        assert client.ask(READ, 0, 4) == (0, bytes(4))
    status, log = program.end()
    assert status == 0
    assert "the last client has gone" in log


def test_running_out_of_descriptors_is_survived(program):
    program = program()
    _, hard = resource.prlimit(program.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(program.process.pid, resource.RLIMIT_NOFILE, (16, hard))
    with contextlib.ExitStack() as stack:
        for _ in range(30):
            stack.enter_context(RawClient(program, handshake=False))
        assert program.logs("no new clients for now: Too many open files")
        time.sleep(0.2)  # whether it is quiet now, no event can tell
    # They are gone, and so the next is served.
    with RawClient(program) as client:
        assert client.ask(READ, 0, 4) == (0, bytes(4))
    program.process.terminate()
    assert program.end()[1].count("no new clients") < 5


def test_a_killed_client_loses_nothing_acknowledged(program):
    program = program()
    source = (
        "import sys; sys.path.insert(0, sys.argv[2]); from tests.server.fakes import *\n"
        "class S: addresses = [sys.argv[1]]\n"
        "c = RawClient(S)\n"
        "assert c.write(0, b'kept') == 0\n"
        "c.send(request(WRITE, 100, 3000) + bytes(1000))\n"
        "print('half', flush=True)\n"
        "import time; time.sleep(1000)\n"
    )
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", source, str(program.socket), root]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as victim:
        assert victim.stdout.readline() == b"half\n"
        victim.kill()
    with RawClient(program) as client:
        assert client.ask(READ, 0, 4) == (0, b"kept")
    assert program.image.read_bytes()[:4] == b"kept"


def test_a_storage_that_cannot_be_flushed_keeps_no_other_from_it(serve, storage, caplog):
    storage.failing = {"flush": ZeroDivisionError("oops")}
    other = MemoryStorage()
    service = serve({"a": storage, "b": other})
    service.stop()
    assert service.join(20)
    assert service.status == 1
    assert "memory: not made durable: oops" in caplog.text
    assert other.calls == [("flush",)]
    assert storage.closed


def test_whatever_goes_wrong_in_stopping_is_told(serve, storage, caplog, monkeypatch):
    monkeypatch.setattr(storage, "close", lambda: 1 // 0)
    service = serve({"": storage})
    service.stop()
    assert service.join(20)
    assert service.status == 1
    assert "stopping failed: ZeroDivisionError" in caplog.text
