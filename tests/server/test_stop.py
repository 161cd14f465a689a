"""How a service ends: what is finished, what is told to whom, and what is left."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import threading
from pathlib import Path

import pytest

from nbdlink.server import Catalogue, Export, Service, serve_in_thread
from nbdlink.transport.stream import listen_unix

from .fakes import (
    EIO,
    FLUSH,
    OPT_ABORT,
    OPT_EXPORT_NAME,
    OPT_GO,
    OPT_INFO,
    OPT_LIST,
    READ,
    REP_ACK,
    MemoryStorage,
    RawClient,
    export_request,
    request,
)

REP_ERR_SHUTDOWN = (1 << 31) + 7


@contextlib.contextmanager
def greeted(service):
    """Connect, and come as far as to the options."""
    with RawClient(service, handshake=False) as client:
        client.receive(18)
        client.send(b"\0\0\0\3")
        yield client


def test_nothing_is_left_after_a_stop(storage, tmp_path, nothing_leaks):
    path = tmp_path / "socket"
    with serve_in_thread({"": storage}, unix=path) as service:
        assert path.is_socket()
        client = RawClient(service)
        assert client.ask(READ, 0, 5)[0] == 0
    assert client.hung_up()
    client.sock.close()
    assert not path.exists()
    assert storage.calls[-1] == ("flush",)
    assert storage.closed
    assert service.status == 0


def test_stopping_twice_is_stopping_once(service):
    service.stop()
    service.stop()
    assert service.join(20)
    service.stop()


def test_a_service_stops_while_clients_are_in_their_handshake(service):
    with RawClient(service, handshake=False) as client:
        client.receive(18)
        service.stop()
        assert client.hung_up()
        assert service.join(20)


def test_a_request_in_flight_is_finished(service, storage):
    storage.gate.clear()
    with RawClient(service) as client:
        client.send(request(1, 0, 4, cookie=3) + b"last" + request(READ, 0, 4, cookie=4))
        storage.entered.wait(20)
        service.stop()
        storage.gate.set()
        assert client.reply() == (0, 3, b"")
        assert client.reply(4) == (0, 4, b"last")
        assert client.hung_up()
    assert service.join(20)
    assert storage.data[:4] == b"last"


def test_a_payload_under_way_is_taken(service, storage, eventually):
    length = 300_000
    with RawClient(service) as client:
        client.send(request(1, 0, length, cookie=3) + bytes(200_000))
        # Busy as soon as the server has the first part: nothing tells of that but the state.
        (session,) = service.sessions._active.values()
        eventually(lambda: not session.idle)
        service.stop()
        eventually(lambda: session.ending)
        client.send(bytes(length - 200_000))
        assert client.reply() == (0, 3, b"")
        assert client.hung_up()
    assert service.join(20)
    assert storage.data[:length] == bytes(length)


# Who comes while it stops.


@contextlib.contextmanager
def stopping(service, storage):
    """Have a service stop that cannot, because a client's write takes its time."""
    storage.gate.clear()
    with RawClient(service) as client:
        client.send(request(1, 0, 4) + b"last")
        assert storage.entered.wait(20)
        service.stop()
        try:
            yield
        finally:
            storage.gate.set()
        assert client.reply()[0] == 0, "the write that the stop had to wait for"
    assert service.join(20)


@pytest.mark.parametrize("option", [OPT_GO, OPT_INFO, OPT_LIST])
def test_a_newcomer_is_told_that_the_server_shuts_down(service, storage, option):
    with stopping(service, storage), greeted(service) as newcomer:
        data = b"" if option == OPT_LIST else export_request()
        assert newcomer.option(option, data) == [(REP_ERR_SHUTDOWN, b"the server is shutting down")]
        assert newcomer.option(OPT_ABORT)[-1][0] == REP_ACK


def test_a_newcomer_whose_option_has_no_error_reply_is_hung_up_on(service, storage):
    with stopping(service, storage), greeted(service) as newcomer:
        newcomer.send(b"IHAVEOPT" + bytes([0, 0, 0, OPT_EXPORT_NAME, 0, 0, 0, 0]))
        assert newcomer.hung_up()


def test_who_is_in_the_handshake_is_told_as_well(service, storage):
    with greeted(service) as early, stopping(service, storage):
        assert early.option(OPT_GO, export_request())[-1][0] == REP_ERR_SHUTDOWN


def test_a_newcomer_is_told_even_if_there_is_no_room_for_it(serve, storage):
    service = serve({"": storage}, shared=1)
    with stopping(service, storage), greeted(service) as newcomer:
        assert newcomer.option(OPT_GO, export_request())[-1][0] == REP_ERR_SHUTDOWN


def test_handshakes_are_broken_off_once_the_last_request_is_done(serve, storage):
    service = serve({"": storage}, grace=1000)
    with greeted(service) as early:
        with stopping(service, storage):
            pass
        assert early.hung_up()


def test_handshakes_alone_keep_a_service_from_nothing(serve, storage):
    service = serve({"": storage}, grace=1000)
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(RawClient(service, handshake=False))
        service.stop()
        assert service.join(20), "the service waits for clients that asked for nothing"


def test_afterwards_connections_are_refused(serve, storage):
    service = serve({"": storage}, unix=None)
    service.stop()
    assert service.join(20)
    with pytest.raises(ConnectionRefusedError):
        RawClient(service, handshake=False)


def test_on_a_socket_that_was_given_newcomers_are_left_to_the_successor(
    storage, tmp_path, nothing_leaks
):
    listener = listen_unix(str(tmp_path / "socket"))
    ours = listener.dup()
    catalogue = Catalogue([Export("", storage)])
    begun = threading.Event()
    with (
        Service(catalogue, [listener], inherited=True, on_stopping=begun.set) as service,
        contextlib.ExitStack() as stack,
    ):
        with stopping(service, storage):
            assert begun.wait(20)
            newcomer = stack.enter_context(RawClient(service, handshake=False))
        storage.closed = False
        with Service(catalogue, [ours], inherited=True):
            assert newcomer.receive(18).startswith(b"NBDMAGIC")


def test_it_is_said_when_the_stop_begins(serve, storage):
    said = threading.Event()
    service = serve({"": storage}, on_stopping=said.set)
    assert not said.is_set()
    with stopping(service, storage):
        assert said.wait(20)


def test_who_cannot_be_ready_does_not_go_on(storage, tmp_path, nothing_leaks):
    service = Service(Catalogue([Export("", storage)]), [listen_unix(str(tmp_path / "socket"))])
    with pytest.raises(ZeroDivisionError):
        service.run(lambda: 1 // 0)
    assert storage.closed
    assert not (tmp_path / "socket").exists()


def test_grace_is_bounded(serve, storage, caplog):
    service = serve({"": storage}, grace=0.05)
    with RawClient(service) as client:
        client.send(request(1, 0, 100_000) + bytes(10))  # and never the rest
        assert client.sock.getpeername()
        service.stop()
        assert service.join(20)
        assert client.hung_up()


def test_a_hanging_storage_is_not_closed_under_its_thread(serve, storage, monkeypatch, caplog):
    monkeypatch.setattr("nbdlink.server.service._CUT_GRACE", 0.05)
    service = serve({"": storage}, grace=0.05)
    storage.gate.clear()
    with RawClient(service) as client:
        client.send(request(1, 0, 4) + b"hang")
        storage.entered.wait(20)
        service.stop()
        assert service.join(20)
    assert not storage.closed
    assert service.status == 1
    assert "did not finish" in caplog.text
    storage.gate.set()


def test_a_flush_that_fails_at_the_end_is_told(service, storage, caplog):
    storage.failing = {"flush": errno.EIO}
    with RawClient(service) as client:
        assert client.ask(FLUSH)[0] == EIO
    service.stop()
    assert service.join(20)
    assert service.status == 1
    assert storage.closed
    assert "not made durable" in caplog.text


def test_abort_flushes_nothing(service, storage):
    service.abort()
    assert service.join(20)
    assert ("flush",) not in storage.calls
    assert service.status == 1


def test_a_socket_that_somebody_else_has_taken_over_is_left_alone(serve, storage, tmp_path):
    service = serve({"": storage}, unix=tmp_path / "socket")
    (tmp_path / "socket").rename(tmp_path / "elsewhere")
    with listen_unix(str(tmp_path / "socket")):
        service.stop()
        assert service.join(20)
        assert (tmp_path / "socket").is_socket()


def test_a_socket_that_was_given_is_not_removed(storage, tmp_path, nothing_leaks):
    listener = listen_unix(str(tmp_path / "socket"))
    with Service(Catalogue([Export("", storage)]), [listener], inherited=True):
        pass
    assert (tmp_path / "socket").is_socket()


def test_whatever_goes_wrong_in_accepting_ends_in_order(storage, tmp_path, caplog, monkeypatch):
    def broken(service, listener):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(Service, "_accept_one", broken)
    with serve_in_thread({"": storage}, unix=tmp_path / "socket") as service:
        RawClient(service, handshake=False).sock.close()
        assert service.join(20)
    assert service.status == 1
    assert "accepting failed: ZeroDivisionError: oops" in caplog.text
    assert storage.closed


def test_a_storage_that_cannot_be_flushed_keeps_no_other_from_it(serve, storage, caplog):
    storage.failing = {"flush": ZeroDivisionError("oops")}
    other = MemoryStorage()
    service = serve({"a": storage, "b": other})
    service.stop()
    assert service.join(20)
    assert service.status == 1
    assert "memory: not made durable: oops" in caplog.text
    assert other.calls == [("flush",)]
    assert storage.closed


def test_a_storage_that_cannot_be_closed_properly_is_told_of(serve, storage, caplog, monkeypatch):
    # Image formats have something to write then.
    def close():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(storage, "close", close)
    service = serve({"": storage})
    service.stop()
    assert service.join(20)
    assert service.status == 1
    assert "memory: not closed properly: No space left on device" in caplog.text


def test_whatever_goes_wrong_in_stopping_is_told(serve, storage, caplog, monkeypatch):
    monkeypatch.setattr(storage, "close", lambda: 1 // 0)
    service = serve({"": storage})
    service.stop()
    assert service.join(20)
    assert service.status == 1
    assert "stopping failed: ZeroDivisionError" in caplog.text


# Signals: only a program's main thread hears them.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_program_in_order(program, number):
    program = program()
    with RawClient(program) as client:
        assert client.write(0, b"kept") == 0
        program.process.send_signal(number)
        assert client.hung_up()
    status, log = program.end()
    assert status == 0
    assert "Traceback" not in log
    assert number.name in log
    assert not program.socket.exists()
    assert program.image.read_bytes()[:4] == b"kept"


def test_a_second_signal_does_not_wait(program):
    program = program(slow=True)
    with RawClient(program) as client:
        client.send(request(1, 0, 4) + b"slow")
        assert program.process.stdout.readline() == "writing\n"
        program.process.send_signal(signal.SIGTERM)
        assert program.logs("told to stop by SIGTERM")
        program.process.send_signal(signal.SIGTERM)
        status, log = program.end()
    assert status == 1
    assert "told to stop twice" in log
    assert not program.socket.exists()


def test_a_program_that_serves_once_ends_by_itself(program):
    program = program(once=True)
    with RawClient(program) as client:
        assert client.ask(READ, 0, 4) == (0, bytes(4))
    status, log = program.end()
    assert status == 0
    assert "the last client has gone" in log


@pytest.mark.parametrize("once", [False, True])
def test_a_signal_is_heard_whichever_thread_it_reaches(program, once):
    # The kernel gives a process's signal to any thread that takes it.
    server = program(once=once)
    pid = server.process.pid
    other = max(int(task.name) for task in Path(f"/proc/{pid}/task").iterdir())
    assert other != pid
    ctypes.CDLL(None).tgkill(pid, other, signal.SIGTERM)
    assert server.end()[0] == 0
