"""A stream with TLS, used as a socket is: what goes in at one end comes out at the other."""

from __future__ import annotations

import contextlib
import gc
import os
import select
import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdlink.errors import TLSError, TransportError
from nbdlink.transport.tls import _CHUNK

from .pairs import KINDS, PATIENCE, TLS_1_2, aside, exactly, pair

K, M = 1 << 10, 1 << 20
SIZES = [0, 1, 16 * K - 1, 16 * K, 16 * K + 1, 128 * K - 1, 128 * K, 128 * K + 1, 5 * M]


@pytest.fixture(params=["unix", "tcp"])
def ends(request):
    with pair(family=request.param) as ends:
        yield ends


@pytest.fixture(scope="module")
def lasting():
    """A pair for many small tests."""
    with pair() as ends:
        yield ends


# Data.


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("newest", [0, TLS_1_2], ids=["1.3", "1.2"])
@pytest.mark.parametrize("exact", [False, True], ids=["released", "exact"])
def test_data_of_any_size_arrives_whole_both_ways(size, newest, exact):
    data = os.urandom(size)
    with pair(newest=newest, exact=exact) as ends:
        for source, sink in ((ends.client, ends.server), (ends.server, ends.client)):
            with aside(source.sendall, data):
                assert exactly(sink, size) == data, f"{size} bytes were changed on their way"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_credentials_carries_data(kind):
    with pair(kind) as ends:
        ends.client.sendall(b"question")
        assert exactly(ends.server, 8) == b"question"
        ends.server.sendall(b"answer")
        assert exactly(ends.client, 6) == b"answer"


PARTS = st.lists(
    st.one_of(
        st.binary(max_size=40),
        st.sampled_from([16 * K, 100 * K, _CHUNK - 1, _CHUNK, _CHUNK + 1, 300 * K]).map(bytes),
    ),
    max_size=30,
)


@given(PARTS, st.sampled_from([bytes, bytearray, memoryview]))
def test_many_parts_are_their_concatenation(lasting, parts, kind):
    whole = b"".join(parts)
    sent = []
    with aside(lambda: sent.append(lasting.client.sendmsg(map(kind, parts)))):
        assert exactly(lasting.server, len(whole)) == whole
    assert sent == [len(whole)]


def test_send_tells_how_much_it_has_taken(lasting):
    assert lasting.client.send(b"12345") == 5
    assert exactly(lasting.server, 5) == b"12345"


def test_recv_gives_what_there_is(lasting):
    lasting.client.sendall(b"12345")
    assert lasting.server.recv(100) == b"12345"


def test_recv_keeps_what_was_not_asked_for(lasting):
    lasting.client.sendall(b"12345")
    assert [lasting.server.recv(2) for _ in range(3)] == [b"12", b"34", b"5"]


def test_recv_into_takes_no_more_than_it_was_told(lasting):
    lasting.client.sendall(b"12345")
    place = bytearray(b".....")
    assert lasting.server.recv_into(place, 3) == 3
    assert place == b"123.."
    assert exactly(lasting.server, 2) == b"45"


def test_recv_into_a_part_of_memory_leaves_the_rest_alone(lasting):
    lasting.client.sendall(b"12345")
    place = bytearray(9)
    assert lasting.server.recv_into(memoryview(place)[2:7], 0, socket.MSG_WAITALL) == 5
    assert place == b"\0\00012345\0\0"


def test_waiting_for_all_waits_over_many_records(ends):
    data = os.urandom(100)

    def dribble():
        for byte in data:
            ends.client.sendall(bytes([byte]))

    with aside(dribble):
        assert exactly(ends.server, 100) == data


def test_waiting_for_all_gives_less_only_at_the_end(ends):
    ends.client.sendall(b"123")
    ends.client.shutdown(socket.SHUT_WR)
    assert exactly(ends.server, 10) == b"123"
    assert exactly(ends.server, 10) == b""


def test_parts_that_are_small_share_a_record(lasting):
    lasting.client.sendmsg([b"x"] * 500)
    assert lasting.server.recv(1000) == b"x" * 500


# Not waiting, as `client.pipeline` does it.


@pytest.fixture
def calm(ends):
    """A client's end that does not wait, and the server's, which does."""
    ends.client.setblocking(False)
    return ends


def ready(stream, events):
    poll = select.poll()
    poll.register(stream, events)
    assert poll.poll(PATIENCE * 1000), "the socket never became ready"


def recv_when_ready(stream, limit):
    """Receive as somebody with a poll does. Not all that comes is data: tickets come first."""
    while True:
        ready(stream, select.POLLIN)
        with contextlib.suppress(BlockingIOError):
            return stream.recv(limit)


def test_nothing_to_receive_is_said_at_once(calm):
    with pytest.raises(BlockingIOError):
        calm.client.recv_into(bytearray(10))


def test_less_than_asked_for_is_given_at_once(calm):
    calm.server.sendall(b"123")
    assert recv_when_ready(calm.client, 10) == b"123"


def fill(stream):
    """Send until the socket takes no more; give how much the stream has taken."""
    taken = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            taken += stream.sendmsg([bytes(100 * K)] * 4)
    return taken


def test_a_full_socket_leaves_a_backlog(calm):
    fill(calm.client)
    assert calm.client.has_backlog


def test_who_has_a_backlog_takes_nothing_more(calm):
    fill(calm.client)
    with pytest.raises(BlockingIOError):
        calm.client.send(b"x")


def test_a_backlog_is_not_flushed_into_a_full_socket(calm):
    fill(calm.client)
    assert not calm.client.flush()


def test_what_was_taken_arrives_once_it_is_flushed(calm):
    taken = fill(calm.client)
    heard = bytearray()

    def hear():
        while len(heard) < taken:
            heard.extend(calm.server.recv(M))

    with aside(hear):
        while not calm.client.flush():
            ready(calm.client, select.POLLOUT)
    assert not calm.client.has_backlog
    assert bytes(heard) == bytes(taken)


def test_what_is_sent_behind_a_backlog_comes_behind_it(calm):
    taken = fill(calm.client)

    def go_on():
        while True:
            try:
                calm.client.send(b"last")
                break
            except BlockingIOError:
                ready(calm.client, select.POLLOUT)
        while not calm.client.flush():
            ready(calm.client, select.POLLOUT)

    with aside(go_on):
        assert exactly(calm.server, taken + 4)[taken:] == b"last"


def test_memory_is_not_given_back_while_something_waits_in_it(calm):
    taken = fill(calm.client)
    with pytest.raises(BlockingIOError):
        calm.client.recv(1)  # which gives back what it can
    calm.client.settimeout(None)
    with aside(calm.client.sendall, b"last"):
        assert exactly(calm.server, taken + 4) == bytes(taken) + b"last"


def test_what_is_decrypted_already_counts_as_pending(calm):
    calm.server.sendall(b"12345")
    assert recv_when_ready(calm.client, 2) == b"12"
    assert calm.client.has_pending()
    assert calm.client.has_pending()


def test_nothing_is_pending_once_all_is_received(calm):
    calm.server.sendall(b"12345")
    assert recv_when_ready(calm.client, 10) == b"12345"
    assert not calm.client.has_pending()
    assert not calm.client.has_pending()


def test_the_end_is_heard_without_waiting(calm):
    calm.server.shutdown(socket.SHUT_WR)
    assert recv_when_ready(calm.client, 10) == b""


# Threads.


def test_messages_of_several_writers_stay_whole_while_others_are_received(ends):
    writers, count, length = 4, 60, 20_000

    def write(stream, number):
        for _ in range(count):
            stream.sendmsg([bytes([number]), bytes([number]) * (length - 1)])

    def read(stream, heard):
        for _ in range(writers * count):
            message = exactly(stream, length)
            assert message == message[:1] * length, "a message was torn"
            heard.append(message[0])

    at_server, at_client = [], []
    with contextlib.ExitStack() as stack:
        for number in range(writers):
            stack.enter_context(aside(write, ends.client, number))
            stack.enter_context(aside(write, ends.server, number))
        stack.enter_context(aside(read, ends.server, at_server))
        stack.enter_context(aside(read, ends.client, at_client))
    expected = sorted([*range(writers)] * count)
    assert sorted(at_server) == sorted(at_client) == expected


def test_who_waits_to_receive_holds_up_no_sender(ends):
    with aside(lambda: exactly(ends.client, 1)):
        ends.client.sendall(b"question")
        assert exactly(ends.server, 8) == b"question"
        ends.server.sendall(b"x")


def test_a_sender_that_waits_holds_up_no_receiver(ends):
    started = threading.Event()

    def send():
        started.set()
        ends.client.sendall(bytes(20 * M))

    with aside(send):
        started.wait(PATIENCE)
        ends.server.sendall(b"answer")
        assert exactly(ends.client, 6) == b"answer"
        assert exactly(ends.server, 20 * M) == bytes(20 * M)


# The end.


@pytest.mark.parametrize("newest", [0, TLS_1_2], ids=["1.3", "1.2"])
def test_closing_is_the_end_of_the_stream(newest):
    with pair(newest=newest) as ends:
        ends.client.sendall(b"last")
        ends.client.close()
        assert exactly(ends.server, 10) == b"last"


def test_who_has_said_that_nothing_more_comes_can_go_on_to_receive(ends):
    ends.client.shutdown(socket.SHUT_WR)
    assert ends.server.recv(1) == b""
    ends.server.sendall(b"still here")
    assert exactly(ends.client, 10) == b"still here"


@pytest.mark.parametrize("exact", [False, True], ids=["released", "exact"])
@pytest.mark.parametrize("newest", [0, TLS_1_2], ids=["1.3", "1.2"])
def test_an_end_without_a_goodbye_is_an_error(newest, exact):
    with pair(newest=newest, exact=exact) as ends:
        ends.client.sendall(b"data")
        ends.client.shutdown(socket.SHUT_RDWR)
        assert exactly(ends.server, 4) == b"data"
        with pytest.raises(TransportError, match="cut off"):
            ends.server.recv(1)


def test_an_end_in_the_middle_of_a_record_is_an_error():
    with pair(wired=True) as ends:
        ends.wire.alter = lambda _, data: data[:-3]
        ends.client.sendall(b"data")
        ends.client.shutdown(socket.SHUT_RDWR)
        with pytest.raises(TransportError, match="cut off"):
            ends.server.recv(10)


def test_a_goodbye_without_a_key_is_not_believed():
    with pair(wired=True) as ends:
        ends.wire.alter = lambda _, data: b"\x15\3\3\0\2\1\0"  # close_notify as plain text
        ends.client.sendall(b"data")
        with pytest.raises(TLSError):
            ends.server.recv(10)


def test_hearing_no_more_gives_the_end_and_no_error(ends):
    heard = []
    with aside(lambda: heard.append(ends.client.recv(1))):
        ends.client.shutdown(socket.SHUT_RD)
    assert heard == [b""]


def test_closing_twice_is_closing_once(ends):
    ends.client.close()
    ends.client.close()
    assert ends.client.fileno() == -1


def test_closing_waits_for_nobody():
    with pair() as ends:
        ends.client.setblocking(False)
        fill(ends.client)
        ends.client.setblocking(True)
        ends.client.close()  # would hang if it waited for the server to take everything
        assert ends.client.fileno() == -1


def test_a_goodbye_does_not_disturb_who_receives_meanwhile(ends):
    """While one thread says goodbye, the other must not be told that it would have to wait."""
    count = 2000

    def say():
        for _ in range(count):
            ends.server.sendall(b"x")

    def hear():
        assert exactly(ends.client, count) == b"x" * count

    with aside(say), aside(hear):
        ends.client.shutdown(socket.SHUT_WR)


def test_abandoning_says_nothing_to_the_peer():
    with pair() as ends:
        ends.server.abandon()
        with pytest.raises(TransportError, match="cut off"):
            ends.client.recv(1)


# What was changed on its way.


@pytest.mark.parametrize("newest", [0, TLS_1_2], ids=["1.3", "1.2"])
@pytest.mark.parametrize("at", [0, 1, 2, 5, 9, -1])
def test_a_flipped_bit_is_an_error(newest, at):
    def flip(_, data):
        changed = bytearray(data)
        changed[at] ^= 2
        return bytes(changed)

    with pair(newest=newest, wired=True) as ends:
        ends.wire.alter = flip
        ends.client.sendall(b"data")
        with pytest.raises(TLSError):
            ends.server.recv(10)


@pytest.mark.parametrize("exact", [False, True], ids=["released", "exact"])
def test_what_comes_behind_a_flipped_bit_is_never_given(exact):
    changed = []

    def flip(to, data):
        if changed or to != "up":  # the server's session tickets may be late
            return data
        changed.append(True)
        return data[:-1] + bytes([data[-1] ^ 1])

    with pair(wired=True, exact=exact) as ends:
        ends.wire.alter = flip
        ends.client.sendall(b"first")
        with pytest.raises(TLSError):
            ends.server.recv(10)
        ends.client.sendall(b"second")
        with pytest.raises((TLSError, TransportError)):
            ends.server.recv(10)


def test_who_sent_what_could_not_be_read_is_told():
    with pair(wired=True) as ends:
        ends.wire.alter = lambda to, data: data[:-1] + bytes([data[-1] ^ 1]) if to == "up" else data
        ends.client.sendall(b"data")
        with pytest.raises(TLSError):
            ends.server.recv(10)
        ends.server.close()
        with pytest.raises(TLSError, match=r"key|bad record mac"):
            ends.client.recv(10)


def test_a_record_that_comes_twice_is_an_error():
    with pair(wired=True) as ends:
        ends.wire.alter = lambda _, data: data + data
        ends.client.sendall(b"data")
        assert ends.server.recv(4) == b"data"
        with pytest.raises(TLSError):
            ends.server.recv(4)


def test_a_record_that_is_missing_is_an_error():
    gone = threading.Event()

    def lose_one(to, data):
        if gone.is_set() or to != "up":  # the server's session tickets may be late
            return data
        gone.set()
        return b""

    with pair(wired=True) as ends:
        ends.wire.alter = lose_one
        ends.client.sendall(b"lost")
        assert gone.wait(PATIENCE)
        ends.client.sendall(b"not lost")
        with pytest.raises(TLSError):
            ends.server.recv(4)


def test_a_record_that_is_too_long_is_an_error():
    with pair(wired=True, exact=True) as ends:
        ends.wire.alter = lambda _, data: b"\x17\3\3\xff\xff" + bytes(1000)
        ends.client.sendall(b"data")
        with pytest.raises(TLSError, match="record of 65535 bytes"):
            ends.server.recv(4)


# Memory.


def test_a_failure_that_nobody_needs_any_more_can_be_collected():
    """Python 3.11 crashes if it collects a memoryview together with what was exported from it."""

    class Knot:
        """Refers to itself, as a connection that keeps the reason of its end does."""

    for _ in range(20):
        with pair() as ends:
            ends.client.shutdown(socket.SHUT_RDWR)
            place = memoryview(bytearray(100))  # before the knot: the collector goes by age
            knot = Knot()
            with pytest.raises(TransportError) as caught:
                ends.server.recv_into(place)
            knot.itself, knot.error = knot, caught.value
            del knot, caught, place
        del ends
        gc.collect()


def test_parts_without_bytes_before_a_long_one_are_nothing(lasting):
    long = bytes(200 * K)
    with aside(lasting.client.sendmsg, [b"", b"", long, b""]):
        assert exactly(lasting.server, len(long)) == long


def test_who_has_given_the_socket_away_says_no_goodbye(ends):
    with ends.server.detach_socket() as bare:
        # What a session does at its end, whatever became of its connection.
        with pytest.raises(OSError, match="Bad file descriptor"):
            ends.server.shutdown(socket.SHUT_WR)
        ends.server.close()
        bare.setblocking(False)
        with pytest.raises(BlockingIOError):
            bare.recv(1)
