"""Reading the kernel's lists of sockets, where it has none."""

from __future__ import annotations

import socket

import pytest

from nbdlink.kernel import sockets


@pytest.fixture
def refusing(monkeypatch):
    """Have the kernel refuse to list what has this family."""
    listed = sockets._dump

    def refuse(*families):
        def dump(request):
            if request[0] in families:
                raise FileNotFoundError
            return listed(request)

        monkeypatch.setattr(sockets, "_dump", dump)

    return refuse


@pytest.fixture
def connection():
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
    ):
        yield sockets.cookie(client)


def test_a_kernel_that_cannot_list_tcp_does_not_show_that_nothing_is_alive(refusing, connection):
    refusing(socket.AF_INET, socket.AF_INET6)
    assert sockets.connected([connection]) is None


def test_a_kernel_without_ipv6_shows_the_rest(refusing, connection):
    refusing(socket.AF_INET6)
    assert sockets.connected([connection, 1]) == {connection}
