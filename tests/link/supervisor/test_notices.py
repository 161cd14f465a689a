"""Datagrams of servers that are back: few are listened to, and nothing else."""

from __future__ import annotations

import select
import socket

import pytest

from nbdlink.link.supervisor.notices import Notices

SESSION = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def notices():
    with Notices(0) as listener:
        yield listener


def send(notices, *datagrams, family=socket.AF_INET):
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        for each in datagrams:
            sock.sendto(each, ("127.0.0.1" if family == socket.AF_INET else "::1", notices.port))
    assert select.select([notices], [], [], 10)[0], "nothing arrived"


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_server_that_is_back_is_heard(notices, family):
    send(notices, f"nbdlink-notice 1 {SESSION}\n".encode(), family=family)
    assert notices.read() == {SESSION}


@pytest.mark.parametrize(
    "datagram",
    [
        b"",
        b"nbdlink-notice",
        b"nbdlink-notice 2 " + SESSION.encode(),
        b"hello 1 " + SESSION.encode(),
        b"nbdlink-notice 1 " + b"x" * 5000,
        b"\xff\xfe\x00",
    ],
)
def test_what_is_no_notice_is_left_alone(notices, datagram):
    send(notices, datagram)
    assert notices.read() == set()


def test_a_flood_about_one_session_is_one_hint(notices):
    send(notices, *[f"nbdlink-notice 1 {SESSION}\n".encode()] * 50)
    assert (notices.read(), notices.read()) == ({SESSION}, set())


def test_a_flood_of_sessions_is_not_remembered_without_end(notices):
    for number in range(3000):
        notices._is_fresh(f"{number:032x}")
    assert len(notices._last) <= 1024


def test_for_a_port_that_is_taken_there_is_another(notices):
    with Notices(notices.port) as second:
        assert second.port not in (None, notices.port)


def test_nobody_has_to_listen():
    with Notices(None) as silent:
        assert (silent.port, silent.read()) == (None, set())
