"""Two ends of a connection with TLS, both ours, and the credentials for them."""

from __future__ import annotations

import contextlib
import functools
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from OpenSSL import SSL

from nbdlink.transport.bindings import set_suites
from nbdlink.transport.credentials import Credentials, PSKCredentials, X509Credentials
from nbdlink.transport.stream import Deadline
from nbdlink.transport.tls import TLSStream
from nbdlink.transport.tlscontext import TLSContext
from tests.certificates import Authority, Identity
from tests.wire import Wire

PATIENCE = 20
"""Seconds after which something hangs."""

AES_128, AES_256 = "TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384"
CHACHA20 = "TLS_CHACHA20_POLY1305_SHA256"
TLS_1_2 = SSL.TLS1_2_VERSION
KINDS = ("one certificate", "two certificates", "keys")


@functools.cache
def authority() -> Authority:
    return Authority()


@functools.cache
def identity(role: str) -> Identity:
    return authority().issue("localhost" if role == "server" else "me", role=role)


def credentials(role: str, kind: str = "one certificate") -> Credentials:
    """Give one side's; in "one certificate" it is only the server who shows one."""
    if kind == "keys":
        return PSKCredentials({"alice": b"a" * 32}, "alice" if role == "client" else None)
    shows = role == "server" or kind == "two certificates"
    own = identity(role)
    return X509Credentials(
        (own.certificate,) if shows else (),
        own.key if shows else None,
        (authority().certificate,),
        (),
        None,
    )


def context(
    role: str, kind: str = "one certificate", *, suite: str | None = None, newest: int = 0
) -> TLSContext:
    """Prepare one side.

    Args:
        role: "server" or "client".
        kind: one of `KINDS`.
        suite: the only cipher for TLS 1.3, or None for what is usual.
        newest: the newest version to speak, as a number of OpenSSL's; 0 for what is usual.
    """
    server = role == "server"
    verify = kind == "two certificates" if server else None
    made = TLSContext(credentials(role, kind), server=server, verify_peer=verify)
    if suite:
        set_suites(made._context, suite.encode())
    if newest:
        made._context.set_max_proto_version(newest)
    return made


def sockets(family: str = "unix") -> tuple[socket.socket, socket.socket]:
    """Give the two ends of a connection; `family` is "unix" or "tcp"."""
    if family == "unix":
        return socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname(), PATIENCE)
        other, _ = listener.accept()
    one.settimeout(None)
    return one, other


@dataclass
class Pair:
    """A client and a server that have done their handshake.

    Attributes:
        client: one end.
        server: the other.
        wire: what is between them, if somebody listens in.
    """

    client: TLSStream
    server: TLSStream
    wire: Wire | None = None

    def release(self) -> None:
        for stream in (self.client, self.server):
            stream.release()

    def cut(self) -> None:
        for stream in (self.client, self.server):
            with contextlib.suppress(OSError):
                stream.shutdown(socket.SHUT_RDWR)


@functools.cache
def _servant() -> ThreadPoolExecutor:
    """Give a thread that stays.

    One that ends has locks of OpenSSL for a moment after it has been joined, and a process that
    is forked at that moment would wait for them for ever.
    """
    return ThreadPoolExecutor(1)


def shake_hands(client: TLSStream, server: TLSStream, deadline: float = PATIENCE) -> None:
    """Do the handshake on both ends; raise what the client does, or else the server."""

    def serve() -> BaseException | None:
        try:
            server.handshake(Deadline(deadline))
        except BaseException as error:
            server._sock.shutdown(socket.SHUT_RDWR)
            return error
        return None

    served = _servant().submit(serve)
    try:
        client.handshake(Deadline(deadline))
    except BaseException:
        with contextlib.suppress(OSError):
            client._sock.shutdown(socket.SHUT_RDWR)
        served.result(PATIENCE)
        raise
    if failure := served.result(PATIENCE):
        raise failure
    client.settimeout(None)
    server.settimeout(None)


@contextlib.contextmanager
def pair(
    kind: str = "one certificate",
    *,
    family: str = "unix",
    suite: str | None = None,
    newest: int = 0,
    exact: bool = False,
    wired: bool = False,
) -> Iterator[Pair]:
    """Give two connected ends.

    Args:
        kind: one of `KINDS`.
        family: "unix" or "tcp".
        suite: the only cipher for TLS 1.3, or None for what is usual.
        newest: the newest version to speak, as a number of OpenSSL's; 0 for what is usual.
        exact: whether the ends receive record by record still, as in the negotiation.
        wired: whether there is a `Wire` between them.
    """
    with contextlib.ExitStack() as stack:
        wire = None
        ours, theirs = sockets(family)
        if wired:
            left, right = sockets(family)
            wire = Wire(theirs, right)
            stack.callback(wire.close)
            theirs = left
        client = context("client", kind, suite=suite, newest=newest)
        server = context("server", kind)
        ends = Pair(
            client.stream(ours, host="localhost" if client.verifies else None),
            server.stream(theirs),
            wire,
        )
        for end in (ends.client, ends.server):
            stack.callback(end.close)
        shake_hands(ends.client, ends.server)
        if not exact:
            ends.release()
        yield ends


@contextlib.contextmanager
def aside(work, *arguments):
    """Do something in a thread meanwhile; it must come to its end, and may not fail.

    A failure in the block comes first: it is most often the reason.
    """
    failures = []

    def run():
        try:
            work(*arguments)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield thread
    thread.join(PATIENCE)
    assert not thread.is_alive(), "it hangs"
    if failures:
        raise failures[0]


def exactly(stream, length):
    """Receive so many bytes."""
    place = bytearray(length)
    count = stream.recv_into(place, 0, socket.MSG_WAITALL)
    return bytes(place[:count])
