"""How a session takes leave of a client that is still sending."""

from __future__ import annotations

import socket
import threading

import pytest

from nbdlink.server.sessions import Session
from nbdlink.transport.stream import listen_tcp

SIZE = 4 << 20


@pytest.fixture(params=["tcp", "unix"])
def connection(request):
    """A session, and the client's end of it."""
    if request.param == "unix":
        theirs, ours = socket.socketpair()
    else:
        (listener,) = listen_tcp("127.0.0.1", 0)
        theirs = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
        listener.close()
    with theirs, ours:
        theirs.settimeout(20)
        yield Session(1, ours), theirs


def everything(sock):
    """Receive until the end of the stream; give how many bytes came."""
    count = 0
    while data := sock.recv(1 << 16):
        count += len(data)
    return count


def leave(session):
    """Send a lot and go, as the thread of a session does."""

    def work():
        with session.sock:
            session.sock.sendall(bytes(SIZE))
            session.take_leave()

    thread = threading.Thread(target=work)
    thread.start()
    return thread


@pytest.mark.parametrize("deaf", [False, True], ids=["hearing", "deaf"])
def test_replies_reach_a_client_whose_last_requests_are_not_read(connection, deaf):
    session, client = connection
    client.sendall(b"never read" * 1000)
    if deaf:
        session.hear_no_more()
    thread = leave(session)
    assert everything(client) == SIZE
    client.close()
    thread.join(20)
    assert not thread.is_alive()


def test_a_client_that_sends_meanwhile_meets_no_reset(connection):
    session, client = connection
    thread = leave(session)
    client.recv(1)
    client.sendall(b"more")  # the session has sent, or still sends, its last bytes
    assert everything(client) == SIZE - 1
    client.close()
    thread.join(20)
    assert not thread.is_alive()


def test_who_has_taken_everything_is_not_waited_for(connection):
    session, client = connection
    thread = leave(session)
    assert everything(client) == SIZE
    thread.join(0.9)
    assert not thread.is_alive(), "the client is silent, and nothing is under way"


def test_who_takes_nothing_is_not_waited_for_long(connection, monkeypatch):
    monkeypatch.setattr("nbdlink.server.sessions._FAREWELL", 0.1)
    session, client = connection
    session.sock.send(bytes(1000))
    client.sendall(b"x")
    with session.sock:
        session.take_leave()
