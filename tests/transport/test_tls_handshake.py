"""Handshakes with peers that hang up, dawdle, or speak something else; and with openssl's own."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import threading
import time

import pytest
from OpenSSL import SSL

from nbdlink.errors import TLSError, TransportError
from nbdlink.transport.stream import Deadline

from .pairs import (
    PATIENCE,
    TLS_1_2,
    aside,
    authority,
    context,
    identity,
    pair,
    shake_hands,
    sockets,
)

SIDES = ("client", "server")
HELLO = b"\x16\3\1"


@contextlib.contextmanager
def against(side):
    """Give a stream of ours before its handshake, and the bare socket of its peer."""
    ours, theirs = sockets("tcp")
    theirs.settimeout(PATIENCE)
    host = "localhost" if side == "client" else None
    with theirs, context(side).stream(ours, host=host) as stream:
        yield stream, theirs


# Who is no TLS peer.

GARBAGE = {
    "zeroes": bytes(100),
    "noise": bytes(range(37, 137)),
    "HTTP": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "an HTTP answer": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "an NBD greeting": b"NBDMAGICIHAVEOPT\0\3" + bytes(20),
    "an NBD option": b"IHAVEOPT\0\0\0\3\0\0\0\0",
    "an NBD reply": b"\0\3\xe8\x89\x04\x55\x65\xa9\0\0\0\3\0\0\0\1\0\0\0\0",
    "SSH": b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n",
}


@pytest.mark.parametrize("said", GARBAGE.values(), ids=GARBAGE)
@pytest.mark.parametrize("side", SIDES)
def test_who_speaks_something_else_is_said_to_speak_no_tls(side, said):
    with against(side) as (stream, peer):
        peer.sendall(said)
        with pytest.raises(TLSError, match="does not speak TLS"):
            stream.handshake(Deadline(PATIENCE))


@pytest.mark.parametrize("length", [(1 << 14) + 2049, 0xFFFF])
@pytest.mark.parametrize("side", SIDES)
def test_a_record_that_is_too_long_is_not_waited_for(side, length):
    with against(side) as (stream, peer):
        peer.sendall(HELLO + length.to_bytes(2))
        with pytest.raises(TLSError, match=f"record of {length} bytes"):
            stream.handshake(Deadline(PATIENCE))


@pytest.mark.parametrize("kind", [20, 21, 22, 23])
@pytest.mark.parametrize("side", SIDES)
def test_records_of_every_kind_may_hold_nonsense(side, kind):
    with against(side) as (stream, peer):
        peer.sendall(bytes([kind, 3, 3, 0, 40]) + bytes(range(40)))
        with pytest.raises(TLSError):
            stream.handshake(Deadline(PATIENCE))


@pytest.mark.parametrize("number", range(120))
def test_whatever_alert_comes_in_the_handshake_it_is_an_error(number):
    with against("client") as (stream, peer):
        peer.sendall(bytes([21, 3, 3, 0, 2, 2, number]))
        with pytest.raises(TLSError) as caught:
            stream.handshake(Deadline(PATIENCE))
        assert str(caught.value).strip()


@pytest.mark.parametrize("side", SIDES)
def test_a_goodbye_in_the_handshake_is_an_error_with_words(side):
    with against(side) as (stream, peer):
        peer.sendall(bytes([21, 3, 3, 0, 2, 1, 0]))
        peer.shutdown(socket.SHUT_WR)
        with pytest.raises((TLSError, TransportError)) as caught:
            stream.handshake(Deadline(PATIENCE))
        assert "no reason given" not in str(caught.value)


def test_a_failed_handshake_is_told_to_the_peer():
    with against("server") as (stream, peer):
        peer.sendall(HELLO + b"\0\5\1\0\0\1\0")
        with pytest.raises(TLSError):
            stream.handshake(Deadline(PATIENCE))
        assert peer.recv(100)[:1] == b"\x15", "the first record is no alert"


# Who hangs up, or dawdles.


@pytest.mark.parametrize("said", [b"", HELLO, HELLO + b"\0\x40", HELLO + b"\0\x40" + bytes(63)])
@pytest.mark.parametrize("side", SIDES)
def test_who_hangs_up_in_the_handshake_is_said_to(side, said):
    with against(side) as (stream, peer):
        peer.sendall(said)
        peer.shutdown(socket.SHUT_WR)
        with pytest.raises(TransportError, match="hung up in the TLS handshake"):
            stream.handshake(Deadline(PATIENCE))


@pytest.mark.parametrize("side", SIDES)
def test_who_says_nothing_meets_the_deadline(side):
    with against(side) as (stream, _), pytest.raises(TransportError, match=r"within 0\.1 seconds"):
        stream.handshake(Deadline(0.1))


@contextlib.contextmanager
def trickle(sock, data):
    """Send one byte after the other, a hundredth of a second apart, until the block ends."""
    ended = threading.Event()

    def send():
        with contextlib.suppress(OSError):
            for byte in data:
                if ended.wait(0.01):
                    return
                sock.send(bytes([byte]))

    with aside(send):
        yield
        ended.set()


@pytest.mark.parametrize("side", SIDES)
def test_a_byte_now_and_then_wins_no_time_in_the_handshake(side):
    began = time.monotonic()
    with against(side) as (stream, peer), trickle(peer, HELLO + b"\x40\0" + bytes(5000)):
        with pytest.raises(TransportError, match="no answer"):
            stream.handshake(Deadline(0.3))
        assert time.monotonic() - began < 10


def test_a_byte_now_and_then_wins_no_time_in_a_record():
    with pair(exact=True) as ends:
        began = time.monotonic()
        ends.client.settimeout(0.3)
        with trickle(ends.server._sock, b"\x17\3\3\x40\0" + bytes(5000)):
            with pytest.raises(TransportError, match="no answer"):
                ends.client.recv(1)
            assert time.monotonic() - began < 10


def test_a_byte_now_and_then_wins_no_time_once_all_is_taken_that_comes():
    with pair() as ends:
        began = time.monotonic()
        ends.client.settimeout(0.3)
        with trickle(ends.server._sock, b"\x17\3\3\x40\0" + bytes(5000)):
            with pytest.raises(TimeoutError):
                ends.client.recv(1)
            assert time.monotonic() - began < 10


@pytest.mark.parametrize("family", ["unix", "tcp"])
def test_taking_something_now_and_then_wins_no_time(family):
    with pair(family=family, exact=True) as ends:
        ends.server.settimeout(0.3)
        ended = threading.Event()

        def take():
            while not ended.wait(0.02):
                ends.client._sock.recv(100_000)

        began = time.monotonic()
        with aside(take):
            with pytest.raises(TimeoutError):
                ends.server.sendall(bytes(64 << 20))
            ended.set()
        assert time.monotonic() - began < 10


@pytest.mark.parametrize("side", SIDES)
def test_cutting_ends_a_handshake(side):
    with against(side) as (stream, _):
        caught = []

        def shake():
            try:
                stream.handshake(Deadline(None))
            except TransportError as error:
                caught.append(error)

        with aside(shake):
            stream.shutdown(socket.SHUT_RDWR)
        assert caught, "the handshake came to an end without an error"


# Versions.


@pytest.mark.parametrize("newest", [0, TLS_1_2], ids=["1.3", "1.2"])
def test_the_newest_version_of_both_is_spoken(newest):
    with pair(newest=newest) as ends:
        expected = "TLSv1.2" if newest else "TLSv1.3"
        assert ends.client.session.version == ends.server.session.version == expected


def old(side):
    """Have a side that knows nothing newer than TLS 1.1, and would take any cipher."""
    made = context(side)
    # Before the maximum, or OpenSSL would take the two for nonsense.
    made._context.set_min_proto_version(SSL.TLS1_VERSION)
    made._context.set_max_proto_version(SSL.TLS1_1_VERSION)
    made._context.set_cipher_list(b"ALL:@SECLEVEL=0")
    return made


@pytest.mark.parametrize("side", SIDES)
def test_versions_before_1_2_are_refused(side):
    ours, theirs = sockets()
    makers = {"client": context, "server": context, side: old}
    client = makers["client"]("client").stream(ours, host="localhost")
    server = makers["server"]("server").stream(theirs)
    with client, server, pytest.raises(TLSError):
        shake_hands(client, server)


@pytest.mark.parametrize("side", SIDES)
def test_who_is_not_believed_is_given_no_session(side):
    ours, theirs = sockets()
    client = context("client").stream(ours, host="elsewhere.example")
    server = context("server").stream(theirs)
    with client, server:
        with pytest.raises(TLSError, match=re.escape("elsewhere.example")):
            shake_hands(client, server)
        assert client.session is None


# openssl's own programs, which can do what we never do.


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return authority().write_directory(
        tmp_path_factory.mktemp("pki"), server=identity("server"), client=identity("client")
    )


class OpenSSL:
    """A running `openssl s_client` or `s_server`, and what it says."""

    def __init__(self, *words):
        self.process = subprocess.Popen(
            ["openssl", *map(str, words)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.said = b""
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self):
        while data := self.process.stdout.read1():
            with self._changed:
                self.said += data
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def wait_for(self, pattern):
        with self._changed:
            found = self._changed.wait_for(
                lambda: re.search(pattern, self.said) or not self._thread.is_alive(), PATIENCE
            )
        assert found, f"{pattern!r} is not in {self.said.decode(errors='replace')}"
        return re.search(pattern, self.said)

    def say(self, line):
        self.process.stdin.write(line)
        self.process.stdin.flush()

    def close(self):
        self.process.kill()
        self._thread.join()
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


@contextlib.contextmanager
def s_client(*words):
    """Give a server's stream of ours, and openssl's client at its other end."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        listener.settimeout(PATIENCE)
        where = f"127.0.0.1:{listener.getsockname()[1]}"
        peer = OpenSSL("s_client", "-connect", where, "-msg", *words)
        stack.callback(peer.close)
        sock, _ = listener.accept()
        stream = stack.enter_context(context("server").stream(sock))
        stream.handshake(Deadline(PATIENCE))
        stream.settimeout(PATIENCE)
        stream.release()
        peer.wait_for(rb"Verify return code")
        yield stream, peer


@contextlib.contextmanager
def s_server(files, *words):
    """Give a client's stream of ours, and openssl's server at its other end."""
    with contextlib.ExitStack() as stack:
        credentials = ("-cert", files / "server-cert.pem", "-key", files / "server-key.pem")
        peer = OpenSSL("s_server", "-accept", "127.0.0.1:0", "-msg", *credentials, *words)
        stack.callback(peer.close)
        port = int(peer.wait_for(rb"ACCEPT 127\.0\.0\.1:(\d+)")[1])
        sock = socket.create_connection(("127.0.0.1", port), PATIENCE)
        stream = stack.enter_context(context("client").stream(sock, host="localhost"))
        stream.handshake(Deadline(PATIENCE))
        stream.settimeout(PATIENCE)
        stream.release()
        peer.wait_for(rb"CIPHER is")
        yield stream, peer


@contextlib.contextmanager
def openssl(side, files, *words):
    """Give a stream of ours, and openssl as its `side`."""
    with s_client(*words) if side == "client" else s_server(files, *words) as both:
        yield both


@pytest.mark.parametrize("version", ["-tls1_3", "-tls1_2"])
@pytest.mark.parametrize("side", SIDES)
def test_openssl_understands_us_and_we_it(side, version, files):
    with openssl(side, files, version) as (stream, peer):
        stream.sendall(b"from us\n")
        peer.wait_for(b"from us\n")
        peer.say(b"from it\n")
        assert stream.recv(100) == b"from it\n"


@pytest.mark.parametrize("command", [b"k\n", b"K\n"], ids=["for itself", "for both"])
@pytest.mark.parametrize("side", SIDES)
def test_data_goes_on_after_new_keys(side, command, files):
    with openssl(side, files, "-tls1_3") as (stream, peer):
        for number in range(3):
            peer.say(command)
            # It takes a line that comes with a command for a part of that.
            peer.wait_for(rb"(?s)(>>> TLS 1.3, Handshake[^\n]*KeyUpdate.*){%d}" % (number + 1))
            peer.say(b"from it\n")
            assert stream.recv(100) == b"from it\n"
            stream.sendall(b"from us %d\n" % number)
            peer.wait_for(b"from us %d\n" % number)


@pytest.mark.parametrize("side", SIDES)
def test_who_asks_for_new_keys_is_answered(side, files):
    with openssl(side, files, "-tls1_3") as (stream, peer):
        peer.say(b"K\n")
        peer.wait_for(rb">>> TLS 1.3, Handshake[^\n]*KeyUpdate")
        peer.say(b"from it\n")
        assert stream.recv(100) == b"from it\n"
        # New keys for our side come with what we say next (RFC 8446, section 4.6.3).
        stream.sendall(b"from us\n")
        peer.wait_for(rb"(?s)<<< TLS 1.3, Handshake[^\n]*KeyUpdate.*from us\n")


def test_who_renegotiates_as_a_client_is_not_let(files):
    with s_client("-tls1_2", "-legacy_renegotiation") as (stream, peer):
        heard = []
        with aside(lambda: heard.append(_error(stream))):
            peer.say(b"R\n")
            peer.wait_for(rb"<<< TLS 1.2, Alert[^\n]*no_renegotiation")
            peer.process.kill()
        assert isinstance(heard[0], TransportError | TLSError)


def test_who_renegotiates_as_a_server_goes_on_without(files):
    session = s_server(files, "-tls1_2", "-legacy_renegotiation")
    with session as (stream, peer), aside(lambda: _error(stream)):
        peer.say(b"r\n")
        peer.wait_for(rb"<<< TLS 1.2, Alert[^\n]*no_renegotiation")
        peer.process.kill()


def _error(stream):
    """Give the error that receiving comes to."""
    try:
        while stream.recv(100):
            pass
    except (TLSError, TransportError, OSError) as error:
        return error
    return None
