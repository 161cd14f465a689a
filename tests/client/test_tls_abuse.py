"""Servers that mean harm, or fail, around TLS, and who listens in: what the client lets happen."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading

import pytest

from nbdlink.client.connection import Connection
from nbdlink.client.negotiate import Negotiation
from nbdlink.client.opening import negotiate, negotiate_best
from nbdlink.client.security import Security, TLSOptions
from nbdlink.errors import NBDError, RemoteProtocolError, TLSError, TransportError
from nbdlink.protocol.constants import HeaderStyle, Option, OptionReply
from nbdlink.server import serve_in_thread
from nbdlink.transport.stream import Deadline
from nbdlink.transport.tlsfiles import CredentialFiles
from nbdlink.uri import Target

from ..server.fakes import MemoryStorage
from ..server.tls_client import security as server_security
from ..transport.pairs import authority, context, identity
from ..wire import DOWN, UP, records, tapped

NAME = "the-name-of-the-export"
MAGIC = struct.pack(">Q", 0x3E889045565A9)
GREETING = b"NBDMAGICIHAVEOPT\0\3"
ABORT = b"IHAVEOPT" + struct.pack(">II", Option.ABORT, 0)
STARTTLS = b"IHAVEOPT" + struct.pack(">II", Option.STARTTLS, 0)


@pytest.fixture
def demand(tmp_path):
    """Give what a client wants of TLS with a target."""
    files = authority().write_directory(tmp_path / "client-pki")

    def demand(target, policy="require"):
        options = TLSOptions(policy, CredentialFiles(directory=str(files)), hostname="localhost")
        return Security(target, options)

    return demand


def reply(option, kind, data=b""):
    return MAGIC + struct.pack(">III", option, kind, len(data)) + data


def receive(connection, length):
    data = b""
    while len(data) < length:
        piece = connection.recv(length - len(data))
        if not piece:
            raise ConnectionError
        data += piece
    return data


class Script:
    """A server that answers STARTTLS as it is told to.

    Attributes:
        heard: all that the client said.
    """

    def __init__(self, answer, then=lambda connection: None):
        self.heard = b""
        self.done = threading.Event()
        self._answer, self._then = answer, then

    def __call__(self, connection):
        try:
            connection.sendall(GREETING)
            self.heard += receive(connection, 4 + len(STARTTLS))
            connection.sendall(self._answer)
            with contextlib.suppress(NBDError):
                self._then(connection)
            while piece := connection.recv(1 << 16):
                self.heard += piece
        finally:
            self.done.set()


def attempt(server, demand, policy="require"):
    """Give the error that the client comes to."""
    with pytest.raises(NBDError) as caught:
        negotiate(server.target, timeout=1, security=demand(server.target, policy))
    return caught.value


# What a server says to STARTTLS.

ERRORS = [kind for kind in OptionReply if kind >> 31]


@pytest.mark.parametrize("kind", [*ERRORS, (1 << 31) + 99])
def test_who_demands_tls_says_nothing_more_in_plain_if_it_is_refused(liar, demand, kind):
    script = Script(reply(Option.STARTTLS, kind, b"words"))
    error = attempt(liar(script), demand)
    assert isinstance(error, TLSError)
    assert script.done.wait(20)
    assert script.heard[4:] in (STARTTLS, STARTTLS + ABORT)


@pytest.mark.parametrize("kind", [OptionReply.ERR_UNSUP, OptionReply.ERR_POLICY])
def test_who_allows_tls_goes_on_without_if_there_is_none(liar, demand, kind):
    script = Script(reply(Option.STARTTLS, kind))
    attempt(liar(script), demand, "allow")
    assert script.done.wait(20)
    rest = script.heard[4 + len(STARTTLS) :]
    assert rest.startswith(b"IHAVEOPT" + struct.pack(">I", Option.GO))


@pytest.mark.parametrize("kind", [OptionReply.ERR_INVALID, OptionReply.ERR_SHUTDOWN])
def test_who_allows_tls_does_not_go_on_if_something_is_wrong_with_it(liar, demand, kind):
    script = Script(reply(Option.STARTTLS, kind))
    assert isinstance(attempt(liar(script), demand, "allow"), TLSError)
    assert script.done.wait(20)
    assert script.heard[4:] in (STARTTLS, STARTTLS + ABORT)


@pytest.mark.parametrize("policy", ["allow", "require"])
@pytest.mark.parametrize(
    "extra",
    [
        b"x",
        reply(Option.LIST, OptionReply.ACK),
        reply(Option.GO, OptionReply.INFO, bytes(12)) + reply(Option.GO, OptionReply.ACK),
        b"\x16\3\3\0\4\2\0\0\0",
    ],
    ids=["a byte", "a reply", "an export", "a record"],
)
def test_plain_bytes_behind_the_answer_end_it(liar, demand, extra, policy):
    script = Script(reply(Option.STARTTLS, OptionReply.ACK) + extra)
    error = attempt(liar(script), demand, policy)
    assert isinstance(error, RemoteProtocolError | TLSError)
    assert script.done.wait(20)
    assert b"IHAVEOPT" not in script.heard[4 + len(STARTTLS) :]


@pytest.mark.parametrize("policy", ["allow", "require"])
def test_who_hangs_up_after_the_answer_is_not_tried_without_tls(liar, demand, policy):
    script = Script(reply(Option.STARTTLS, OptionReply.ACK), lambda c: c.shutdown(socket.SHUT_RDWR))
    server = liar(script)
    assert isinstance(attempt(server, demand, policy), TransportError | TLSError)
    assert server.connections == 1


def test_an_old_server_is_told_nothing_where_tls_is_demanded(liar, demand):
    heard = []

    def script(connection):
        connection.sendall(b"NBDMAGICIHAVEOPT\0\0")
        heard.append(connection.recv(1 << 16))
        heard.append(connection.recv(1 << 16))

    server = liar(script)
    assert isinstance(attempt(server, demand), TLSError)
    server.close()
    assert b"".join(heard) in (b"", bytes(4)), "something was said but the flags"


def test_a_server_that_says_nothing_in_the_handshake_meets_the_deadline(liar, demand):
    server = liar(Script(reply(Option.STARTTLS, OptionReply.ACK)))
    with pytest.raises(TransportError, match="no answer"):
        negotiate(server.target, timeout=0.2, security=demand(server.target))


# Who listens in.


@pytest.fixture
def service(tmp_path):
    with serve_in_thread(
        {NAME: MemoryStorage()}, unix=tmp_path / "nbd", security=server_security(tmp_path)
    ) as service:
        yield service


@pytest.fixture
def tap(service, tmp_path):
    with tapped(service.addresses[0], tmp_path / "tap") as tap:
        yield tap


@pytest.fixture
def target(tap):
    return Target(socket=tap.addresses[0], export=NAME)


def test_all_that_follows_starttls_are_records(tap, target, demand):
    with Negotiation.best(target, security=demand(target)) as negotiation:
        negotiation.list_exports()
        negotiation.set_meta_contexts(["base:allocation"])
        export = negotiation.go()
        wire = negotiation.detach_socket()
    wire.release()
    with Connection(target, wire, export) as connection:
        connection.pwrite(b"something to hide", 0)
        assert connection.pread(17, 0) == b"something to hide"
        connection.flush()
    (wire,) = tap.wires
    wire.close()
    said = bytes(wire.carried[UP])
    assert said[:20] == struct.pack(">I", 3) + STARTTLS
    assert len(records(said[20:])) > 5
    answered = bytes(wire.carried[DOWN])
    assert answered[:38] == GREETING + reply(Option.STARTTLS, OptionReply.ACK)
    assert len(records(answered[38:])) > 5
    for secret in (NAME.encode(), b"something to hide", b"base:allocation", b"IHAVEOPT"):
        assert secret not in said[20:]
        assert secret not in answered[38:]


@pytest.mark.parametrize("kind", ERRORS)
def test_who_forges_a_refusal_learns_nothing(tap, target, demand, kind):
    def forge(direction, data):
        if direction == DOWN and MAGIC in data:
            return reply(Option.STARTTLS, kind)
        return data

    tap.alter = forge
    with pytest.raises(TLSError):
        negotiate_best(target, timeout=5, security=demand(target))
    for wire in tap.wires:
        wire.close()
        assert bytes(wire.carried[UP])[4:] in (STARTTLS, STARTTLS + ABORT)


def connect(target, security):
    wire, export = negotiate_best(target, timeout=20, security=security)
    return Connection(target, wire, export)


def test_a_cut_connection_fails_the_requests_on_it(tap, target, demand):
    with connect(target, demand(target)) as connection:
        assert connection.pread(10, 0)
        tap.wires[0].cut()
        with pytest.raises(TransportError):
            connection.pread(10, 0)


def test_a_connection_cut_without_goodbye_is_said_to_be_cut_off(tap, target, demand):
    with connect(target, demand(target)) as connection:
        tap.wires[0].alter = lambda direction, data: data if direction == UP else None
        with pytest.raises(TransportError, match="cut off"):
            connection.pread(10, 0)


def test_a_changed_reply_is_never_given(tap, target, demand):
    with connect(target, demand(target)) as connection:

        def change(direction, data):
            return data if direction == UP else data[:-1] + bytes([data[-1] ^ 1])

        tap.wires[0].alter = change
        with pytest.raises(TLSError, match="no valid TLS"):
            connection.pread(100, 0)


def test_a_changed_request_is_never_done(tap, target, demand, service):
    with connect(target, demand(target)) as connection:
        before = bytes(connection.pread(4096, 0))

        def change(direction, data):
            return data if direction == DOWN else data[:-1] + bytes([data[-1] ^ 1])

        tap.wires[0].alter = change
        with pytest.raises((TLSError, TransportError)):
            connection.pwrite(bytes(4096), 0)
    with connect(Target(socket=service.addresses[0], export=NAME), demand(target)) as connection:
        assert connection.pread(4096, 0) == before


def test_requests_of_many_threads_are_not_mixed_up(service, demand):
    target = Target(socket=service.addresses[0], export=NAME)
    failures = []
    with connect(target, demand(target)) as connection:
        whole = bytes(connection.pread(1 << 20, 0))

        def read(number):
            try:
                for turn in range(50):
                    offset, length = number * 1000 + turn, 3000 * (turn % 40 + 1)
                    assert connection.pread(length, offset) == whole[offset : offset + length]
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=read, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
    assert not failures


def test_styles_are_agreed_on_inside_of_tls(service, demand):
    target = Target(socket=service.addresses[0], export=NAME)
    wire, export = negotiate_best(target, timeout=20, security=demand(target))
    with wire:
        assert export.style == HeaderStyle.EXTENDED


# A server with TLS that breaks off later.


def test_a_server_that_ends_in_the_negotiation_is_an_error(liar, demand):
    def secured(connection):
        stream = context("server").stream(connection)
        stream.handshake(Deadline(20))
        stream.recv(1 << 16)
        stream.shutdown(socket.SHUT_WR)

    server = liar(Script(reply(Option.STARTTLS, OptionReply.ACK), secured))
    error = attempt(server, demand)
    assert isinstance(error, RemoteProtocolError | TransportError)


def test_nobody_is_believed_for_another_s_name(liar, demand):
    assert identity("server").certificate
    script = Script(
        reply(Option.STARTTLS, OptionReply.ACK),
        lambda connection: context("server").stream(connection).handshake(Deadline(20)),
    )
    server = liar(script)
    files = demand(server.target)._files
    security = Security(server.target, TLSOptions("require", files, hostname="elsewhere.example"))
    with pytest.raises(TLSError, match="elsewhere"):
        negotiate(server.target, timeout=5, security=security)
