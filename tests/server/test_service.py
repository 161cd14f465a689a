"""Where a service listens, and what its clients may do to each other."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nbdlink.errors import TransportError
from nbdlink.server import Catalogue, Export, Service, serve_in_thread
from nbdlink.transport.stream import listen_tcp, listen_unix
from nbdlink.uri import Target

from .fakes import (
    FLUSH,
    READ,
    REP_ACK,
    RawClient,
    export_request,
    request,
)

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
    service = serve({"": storage}, negotiation_timeout=1)
    with RawClient(service, handshake=False) as dawdler:
        dawdler.receive(18)
        assert dawdler.hung_up()
    with RawClient(service) as client:
        assert client.ask(READ, 0, 5)[0] == 0


def test_a_deadline_for_the_handshake_is_none_for_requests(serve, storage, eventually):
    service = serve({"": storage}, negotiation_timeout=1)
    with RawClient(service) as client, RawClient(service, handshake=False) as dawdler:
        dawdler.receive(18)
        assert dawdler.hung_up()  # so the time is over
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
