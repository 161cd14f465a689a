"""Connections are made ready for the kernel."""

from __future__ import annotations

import contextlib
import socket

import pytest

from nbdlink.link.channel import prepare


@pytest.fixture
def connection():
    """Give one end of a TCP connection."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as sock,
    ):
        yield sock


def option(sock, name):
    return sock.getsockopt(socket.IPPROTO_TCP, name)


@pytest.mark.parametrize("timeout", [1, 30, 1000])
def test_tcp_gives_up_before_a_request_times_out(connection, timeout):
    with contextlib.ExitStack() as stack:
        prepare([connection], "auto", "data", stack, timeout=timeout)
    assert 0 < option(connection, socket.TCP_USER_TIMEOUT) < timeout * 1000


def test_one_lost_probe_does_not_end_an_idle_connection(connection):
    with contextlib.ExitStack() as stack:
        prepare([connection], "auto", "data", stack, timeout=30)
    seconds = option(connection, socket.TCP_USER_TIMEOUT) / 1000
    pauses = option(connection, socket.TCP_KEEPIDLE) + option(connection, socket.TCP_KEEPINTVL)
    assert pauses < seconds


def test_a_unix_socket_is_left_as_it_is():
    ours, theirs = socket.socketpair()
    with ours, theirs, contextlib.ExitStack() as stack:
        ready = prepare([ours], "auto", "data", stack, timeout=30)
    assert ready.sockets == (ours,)
