"""A client that always has requests under way does not hold up the end of the service."""

from __future__ import annotations

import contextlib
import threading

import pytest

from .fakes import READ, WRITE, HungUpError, RawClient, request


@pytest.mark.parametrize(
    "piece", [request(READ, 0, 16), request(WRITE, 0, 4001) + bytes(4001)], ids=["reads", "writes"]
)
@pytest.mark.parametrize("family", ["tcp", "unix"])
def test_a_client_that_never_stops_sending_does_not_hold_up_the_stop(
    serve, storage, piece, family, tmp_path
):
    unix = tmp_path / "s" if family == "unix" else None
    service = serve({"": storage}, unix=unix, grace=1000)
    with RawClient(service) as client:

        def send():
            with contextlib.suppress(OSError):
                while True:
                    client.sock.sendall(piece * 300)

        def receive():
            with contextlib.suppress(OSError):
                while client.sock.recv(1 << 20):
                    moved.set()

        moved = threading.Event()
        threads = [threading.Thread(target=work) for work in (send, receive)]
        for thread in threads:
            thread.start()
        assert moved.wait(20)
        service.stop()
        stopped = service.join(10)
        with contextlib.suppress(OSError):
            client.sock.shutdown(2)
        for thread in threads:
            thread.join()
        if not stopped:
            service.abort()
        assert stopped, "the service still hears a client that has been sending since"


@pytest.mark.parametrize("length", [200_000, 1 << 20])
@pytest.mark.parametrize("family", ["tcp", "unix"])
def test_a_client_with_long_writes_is_let_go_too(serve, tmp_path, family, length):
    unix = tmp_path / "s" if family == "unix" else None
    (tmp_path / "image").write_bytes(bytes(2 << 20))
    service = serve({"": tmp_path / "image"}, unix=unix, grace=1000)
    with RawClient(service) as client:
        client.send((request(WRITE, 0, length) + bytes(length)) * 3 + request(WRITE, 0, length))
        service.stop()
        with contextlib.suppress(OSError):  # the last one may have come too late
            client.send(bytes(length))
        with contextlib.suppress(HungUpError):
            while client.reply() == (0, 7, b""):
                pass
    assert service.join(20), "the service waits for a client that owes nothing"
