"""Clients that mean harm, or fail, around TLS: what the server says, and who is not harmed."""

from __future__ import annotations

import contextlib
import logging
import socket
import struct
import time

import pytest

from nbdlink.errors import TLSError, TransportError

from ..transport.pairs import authority, identity
from .fakes import (
    OPT_ABORT,
    OPT_EXPORT_NAME,
    OPT_GO,
    OPT_INFO,
    OPT_LIST,
    OPT_STARTTLS,
    READ,
    REP_ACK,
    HungUpError,
    RawClient,
    export_request,
    request,
)
from .served import served
from .styles import (
    OPT_EXTENDED_HEADERS,
    OPT_LIST_META_CONTEXT,
    OPT_SET_META_CONTEXT,
    OPT_STRUCTURED_REPLY,
    REP_ERR_INVALID,
    REP_ERR_UNSUP,
    meta_query,
)
from .tls_client import TLSClient, security

K, M = 1 << 10, 1 << 20
REP_ERR_TLS_REQD = (1 << 31) + 5

HELLO = b"\x16\3\1\0\xc8\1\0\0\xc4\3\3" + bytes(190)
"""The beginning of a TLS handshake, which lacks some bytes."""


@pytest.fixture
def secured(serve, storage, tmp_path):
    """A service that demands TLS."""

    def start(exports=None, mode="require", **options):
        return serve(exports or {"": storage}, security=security(tmp_path, mode), **options)

    return start


@pytest.fixture
def service(secured):
    return secured()


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.DEBUG, "nbdlink.server")
    return caplog


def starting(service):
    """Come to where the TLS handshake is next."""
    client = TLSClient(service, tls=False, handshake=False)
    assert client.option(OPT_STARTTLS) == [(REP_ACK, b"")]
    return client


def is_well(service):
    with TLSClient(service) as client:
        return client.ask(READ, 0, 512)[0] == 0


# Handshakes that come to nothing.


@pytest.mark.parametrize(
    "said", [b"", HELLO[:1], HELLO[:5], HELLO], ids=["nothing", "a byte", "a header", "half"]
)
def test_half_a_handshake_meets_the_deadline(secured, said):
    service = secured(negotiation_timeout=0.7)
    with starting(service) as client:
        client.send(said)
        assert client.hung_up()


def test_a_byte_now_and_then_wins_no_time(secured):
    service = secured(negotiation_timeout=0.3)
    with starting(service) as client:
        assert client.trickle(HELLO * 5) < 200


GARBAGE = {
    "an option": b"IHAVEOPT" + struct.pack(">II", OPT_LIST, 0),
    "HTTP": b"GET / HTTP/1.1\r\n\r\n",
    "zeroes": bytes(100),
    "a long record": b"\x16\3\3\xff\xff",
    "noise": b"\x16\3\3\0\x20" + bytes(range(32)),
    "data": b"\x17\3\3\0\x20" + bytes(range(32)),
}


@pytest.mark.parametrize("said", GARBAGE.values(), ids=GARBAGE)
def test_who_speaks_no_tls_is_hung_up_on(service, said, log):
    with starting(service) as client:
        client.send(said)
        answer = client.rest()
        # Nothing but an alert, if anything.
        assert answer[:1] in (b"", b"\x15")
        assert b"NBD" not in answer
    assert is_well(service)
    assert "hung up: unexpected" not in log.text


def test_many_half_handshakes_leave_room_for_others(service, eventually):
    with contextlib.ExitStack() as stack:
        for number in range(200):
            client = stack.enter_context(starting(service))
            client.send(HELLO[: number % len(HELLO)])
        assert is_well(service)
    eventually(lambda: len(service.sessions) == 0)


def test_stopping_cuts_handshakes(service):
    with starting(service) as client:
        client.send(HELLO)
        service.stop()
        assert client.hung_up()
        assert service.join(20)


@pytest.mark.parametrize("bytes_sent", [0, 5, len(HELLO)])
def test_who_hangs_up_in_the_handshake_is_logged_as_lost(service, log, eventually, bytes_sent):
    with starting(service) as client:
        client.send(HELLO[:bytes_sent])
    eventually(lambda: "hung up in the TLS handshake" in log.text)


# What is refused without TLS, and with it.

OPTIONS = [OPT_LIST, OPT_INFO, OPT_GO, OPT_STRUCTURED_REPLY, OPT_EXTENDED_HEADERS]
OPTIONS += [OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT, 4, 99, 0xFFFF_FFFF]


@pytest.mark.parametrize("data", [b"", export_request(), bytes(100_000)], ids=len)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_needs_tls_where_it_is_demanded(service, option, data):
    with TLSClient(service, tls=False, handshake=False) as client:
        ((reply, _),) = client.option(option, data)
        assert reply == REP_ERR_TLS_REQD


def test_leaving_needs_no_tls(service):
    with TLSClient(service, tls=False, handshake=False) as client:
        assert client.option(OPT_ABORT) == [(REP_ACK, b"")]


@pytest.mark.parametrize("flags", [0, 1, 2, 3])
def test_an_export_by_name_needs_tls(service, flags):
    with TLSClient(service, tls=False, handshake=False, flags=flags) as client:
        client.send(b"IHAVEOPT" + struct.pack(">II", OPT_EXPORT_NAME, 0))
        assert client.hung_up()


@pytest.mark.parametrize("data", [b"x", bytes(30_000)], ids=len)
def test_starttls_takes_no_data(service, data):
    with TLSClient(service, tls=False, handshake=False) as client:
        assert client.option(OPT_STARTTLS, data)[0][0] == REP_ERR_INVALID
        assert client.option(OPT_STARTTLS) == [(REP_ACK, b"")]


def test_tls_cannot_be_begun_inside_tls(service):
    with TLSClient(service, handshake=False) as client:
        assert client.option(OPT_STARTTLS)[0][0] == REP_ERR_INVALID
        client.go()
        assert client.ask(READ, 0, 16)[0] == 0


@pytest.mark.parametrize("flags", [0, 2])
def test_who_is_not_fixed_newstyle_cannot_begin_tls(service, flags):
    with TLSClient(service, tls=False, handshake=False, flags=flags) as client:
        client.send(b"IHAVEOPT" + struct.pack(">II", OPT_STARTTLS, 0))
        assert client.hung_up()


def test_without_credentials_starttls_is_not_known(serve, storage):
    with TLSClient(serve({"": storage}), tls=False, handshake=False) as client:
        assert client.option(OPT_STARTTLS)[0][0] == REP_ERR_UNSUP


# Plain bytes around the beginning of TLS (specification, "Protocol downgrade attacks").

INJECTED = {
    "LIST": b"IHAVEOPT" + struct.pack(">II", OPT_LIST, 0),
    "GO": b"IHAVEOPT" + struct.pack(">II", OPT_GO, 6) + bytes(6),
    "half an option": b"IHAVE",
    "a byte": b"I",
}


@pytest.mark.parametrize("mode", ["allow", "require"])
@pytest.mark.parametrize("injected", INJECTED.values(), ids=INJECTED)
def test_what_comes_with_starttls_is_never_answered_inside(secured, injected, mode):
    with TLSClient(secured(mode=mode), tls=False, handshake=False) as client:
        client.send(b"IHAVEOPT" + struct.pack(">II", OPT_STARTTLS, 0) + injected)
        answer = b""
        with contextlib.suppress(HungUpError, TLSError, TransportError, ConnectionError):
            client.replies(OPT_STARTTLS)
            client.begin()
            answer = client.rest()
        assert answer == b"", "something was said inside TLS to what came outside of it"


@pytest.mark.parametrize("injected", INJECTED.values(), ids=INJECTED)
def test_what_comes_behind_starttls_breaks_the_handshake(service, injected):
    with starting(service) as client:
        client.send(injected)
        with pytest.raises((TLSError, TransportError, ConnectionError)):
            client.begin()


def test_headers_agreed_on_in_plain_count_no_more(secured):
    with TLSClient(secured(mode="allow"), tls=False, handshake=False) as client:
        assert client.option(OPT_STRUCTURED_REPLY) == [(REP_ACK, b"")]
        assert client.option(OPT_STARTTLS) == [(REP_ACK, b"")]
        client.begin()
        # They would be needed for that.
        query = meta_query(b"", [b"base:allocation"])
        assert client.option(OPT_SET_META_CONTEXT, query)[0][0] == REP_ERR_INVALID
        client.go()
        assert client.ask(READ, 0, 16)[0] == 0, "that was no simple reply"


def test_contexts_selected_in_plain_count_no_more(secured):
    with TLSClient(secured(mode="allow"), tls=False, handshake=False) as client:
        client.option(OPT_STRUCTURED_REPLY)
        client.option(OPT_SET_META_CONTEXT, meta_query(b"", [b"base:allocation"]))
        client.option(OPT_STARTTLS)
        client.begin()
        assert client.option(OPT_STRUCTURED_REPLY) == [(REP_ACK, b"")]
        client.go()
        client.send(request(7, 0, 512))
        _, _, kind, _, length = struct.unpack(">IHHQI", client.receive(20))
        assert kind >> 15, "a block status was given without a context"
        assert struct.unpack_from(">I", client.receive(length))[0] == 22


def test_plain_clients_may_go_on_where_tls_is_only_allowed(secured):
    with RawClient(secured(mode="allow")) as client:
        assert client.ask(READ, 0, 16)[0] == 0


# Connections that are cut.


def test_who_takes_leave_of_tls_is_logged_as_gone(service, log, eventually):
    with TLSClient(service) as client:
        assert client.ask(READ, 0, 16)[0] == 0
    eventually(lambda: "hung up after 1 requests" in log.text)
    assert "cut off" not in log.text


@pytest.mark.parametrize("extra", [b"", b"\x17\3\3", request(READ)[:9]], ids=len)
def test_who_is_cut_off_is_logged_as_cut_off(service, log, eventually, extra):
    with TLSClient(service) as client:
        assert client.ask(READ, 0, 16)[0] == 0
        if extra[:1] == b"\x25":
            client.send(extra)
        else:
            client.bare.sendall(extra)
        client.bare.shutdown(socket.SHUT_RDWR)
        eventually(lambda: "cut off" in log.text)
    assert "hung up" not in log.text


def test_a_forged_record_ends_the_connection_and_no_other(service, log, eventually):
    with TLSClient(service) as client, TLSClient(service) as other:
        client.bare.sendall(b"\x17\3\3\0\x40" + bytes(64))
        with pytest.raises(TLSError):  # the alert that says so
            client.rest()
        eventually(lambda: "no valid TLS" in log.text)
        assert other.ask(READ, 0, 16)[0] == 0
    assert "hung up: unexpected" not in log.text


# A graceful stop.


def test_idle_clients_are_let_go_at_once(secured):
    service = secured(grace=60)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(TLSClient(service)) for _ in range(5)]
        began = time.monotonic()
        service.stop()
        for client in clients:
            assert client.rest() == b"", "an end without a goodbye would have been an error"
        assert service.join(20)
        assert time.monotonic() - began < 20


def test_busy_clients_get_their_replies_and_then_a_goodbye(service, storage):
    storage.gate.clear()
    with TLSClient(service) as client:
        client.send(request(1, 0, 4, cookie=3) + b"last" + request(READ, 0, 4, cookie=4))
        assert storage.entered.wait(20)
        service.stop()
        storage.gate.set()
        assert client.reply() == (0, 3, b"")
        assert client.reply(4) == (0, 4, b"last")
        assert client.rest() == b""
    assert service.join(20)


def test_a_service_stops_though_a_client_takes_nothing(secured):
    service = secured(grace=0.2)
    with TLSClient(service) as client:
        client.bare.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.send(request(READ, 0, M) * 20)
        service.stop()
        assert service.join(20)


# Clients that do not take their replies.


def test_who_takes_no_replies_holds_up_nobody_else(service):
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            greedy = stack.enter_context(TLSClient(service))
            greedy.send(request(READ, 0, M) * 20)
        for _ in range(3):
            assert is_well(service)


def test_who_takes_replies_late_gets_them_all(service, storage):
    with TLSClient(service) as late:
        late.send(request(READ, 0, M) * 20)
        assert is_well(service)
        for _ in range(20):
            assert late.reply(M) == (0, 7, bytes(storage.data))


def test_who_changes_keys_and_takes_no_answers_is_hung_up_on(service, log, eventually):
    with TLSClient(service, handshake=False) as client, TLSClient(service) as other:
        with contextlib.suppress(ConnectionError):
            client.bare.sendall(client.new_keys(50_000))
        eventually(lambda: "asks for new keys again and again, and takes no answer" in log.text)
        assert other.ask(READ, 0, 16)[0] == 0


@pytest.mark.parametrize("length", [4 * K, M, 32 * M], ids=["4k", "1m", "32m"])
@pytest.mark.parametrize(("kind", "most"), [("plain", 16 * M), ("general", 320 * M)])
def test_who_takes_no_replies_cannot_fill_the_memory(tmp_path, kind, most, length):
    image = tmp_path / "image"
    image.write_bytes(bytes(32 * M))
    files = authority().write_directory(tmp_path / "pki", server=identity("server"))
    with served(tmp_path, image, kind=kind, credentials=files) as server:
        with TLSClient(server) as first:
            assert first.ask(READ, 0, K)[0] == 0  # what TLS takes in any case is there now
        before = server.memory()
        with TLSClient(server) as greedy, TLSClient(server) as other:
            greedy.sock.settimeout(0.2)
            with contextlib.suppress(TimeoutError):
                for _ in range(20):
                    greedy.send(request(READ, 0, length) * 1000)
            assert server.memory() - before < most
            assert other.ask(READ, 0, K)[0] == 0


def test_an_idle_client_costs_little_memory(tmp_path, eventually):
    image = tmp_path / "image"
    image.write_bytes(bytes(32 * M))
    files = authority().write_directory(tmp_path / "pki", server=identity("server"))
    count = 30
    with served(tmp_path, image, credentials=files) as server, contextlib.ExitStack() as stack:
        with TLSClient(server) as first:
            assert first.ask(READ, 0, K)[0] == 0
        before = server.memory()
        for _ in range(count):
            client = stack.enter_context(TLSClient(server))
            assert client.write(0, bytes(M)) == 0
            assert client.ask(READ, 0, M) == (0, bytes(M))
        # Most of it is what OpenSSL's buffers have grown to.
        eventually(
            lambda: server.memory() - before < count * 768 * K, "more than 768 KiB each are left"
        )
