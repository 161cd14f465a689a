"""How many clients are let in, and what becomes of the others."""

from __future__ import annotations

import contextlib
import resource
import selectors
import threading
import time
from pathlib import Path

from nbdlink.server import Catalogue, Export, Service
from nbdlink.server.sessions import most_connections
from nbdlink.transport.stream import listen_tcp

from .fakes import READ, RawClient


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


def test_who_never_speaks_keeps_a_place_no_longer_than_the_deadline(serve, storage):
    service = serve({"": storage}, shared=1, negotiation_timeout=1)
    with RawClient(service, handshake=False) as dawdler, RawClient(service) as client:
        assert dawdler.receive(18).startswith(b"NBDMAGIC"), "it had the only place"
        assert client.ask(READ, 0, 5)[0] == 0


def test_who_only_looks_gives_its_place_back(serve, storage):
    service = serve({"": storage}, shared=1)
    with RawClient(service, handshake=False) as looker:
        looker.receive(18)
    with RawClient(service) as client:
        assert client.ask(READ, 0, 5)[0] == 0


# The bound: what descriptors and threads allow.


def test_handshakes_beyond_the_bound_make_room_for_newcomers(service, caplog):
    service.sessions.bound = 10
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(RawClient(service, handshake=False)) for _ in range(30)]
        with RawClient(service) as client:
            assert client.ask(READ, 0, 5)[0] == 0
            assert len(service.sessions) <= 10
            silent[0].receive(18)
            assert silent[0].hung_up(), "the oldest handshake is the first to go"
    assert caplog.text.count("the slowest handshakes are broken off") == 1


def test_clients_in_transmission_keep_their_place(service, caplog):
    service.sessions.bound = 2
    with RawClient(service) as one:
        assert one.ask(READ, 0, 5)[0] == 0  # so its handshake is over for the server, too
        with RawClient(service) as two, RawClient(service, handshake=False) as three:
            assert waits_to_be_accepted(three)
            assert one.ask(READ, 0, 5)[0] == 0
            two.sock.close()
            assert three.receive(18).startswith(b"NBDMAGIC")
    assert "newcomers wait" in caplog.text


def test_the_bound_leaves_descriptors_for_other_things():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = sum(1 for _ in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 100, hard))
    try:
        assert 50 <= most_connections() < 100
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


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
