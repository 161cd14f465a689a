"""The threads of a connection: what bounds them, and that nothing is left of them."""

from __future__ import annotations

import errno
import threading

import pytest

from nbdlink.server import workers
from nbdlink.server.workers import THREADS, Budget, Workers

from .fakes import FLUSH, READ, TIMEOUT, WRITE, MemoryStorage, RawClient, request
from .styles import STRUCTURED, STYLES, StyledClient

M = 1 << 20


class SlowStorage(MemoryStorage):
    """Every request waits for the gate, in a worker.

    Attributes:
        waiting: how many requests are waiting.
        most: how many have waited at the same time.
    """

    waits = True

    def __init__(self, size=4 * M):
        super().__init__(size)
        self.waiting = self.most = 0
        self._counting = threading.Condition()
        self.on_read = lambda _: self._wait()

    def _wait(self):
        with self._counting:
            self.waiting += 1
            self.most = max(self.most, self.waiting)
            self._counting.notify_all()
        try:
            assert self.gate.wait(TIMEOUT)
        finally:
            with self._counting:
                self.waiting -= 1

    def write(self, buffer, offset, fua):
        self._wait()
        super().write(buffer, offset, fua)

    def flush(self):
        self._wait()
        super().flush()

    def until_waiting(self, count):
        with self._counting:
            assert self._counting.wait_for(lambda: self.waiting >= count, TIMEOUT)


@pytest.fixture
def storage():
    storage = SlowStorage()
    yield storage
    storage.gate.set()


@pytest.fixture(autouse=True)
def _the_budget_is_given_back(eventually):
    budget = workers._PROCESS
    state = lambda: (budget.threads, budget.bytes)  # noqa: E731
    eventually(lambda: state() == (256, 256 << 20), "somebody else holds on to the budget")
    yield
    eventually(lambda: state() == (256, 256 << 20), f"{state()} is left of the budget")


def test_slow_requests_do_not_wait_for_each_other(service, storage):
    storage.gate.clear()
    with RawClient(service) as client:
        client.send(b"".join(request(READ, 0, 512, cookie=i) for i in range(THREADS)))
        storage.until_waiting(THREADS)
        storage.gate.set()
        assert {client.reply(512)[1] for _ in range(THREADS)} == set(range(THREADS))


def test_a_request_may_overtake_a_slow_one(service, storage):
    slow = threading.Event()

    def only_the_first(offset):
        if offset == 0:
            assert slow.wait(TIMEOUT)

    storage.on_read = only_the_first
    with RawClient(service) as client:
        client.send(request(READ, 0, 512, cookie=1) + request(READ, 512, 512, cookie=2))
        assert client.reply(512) == (0, 2, storage.data[512:1024])
        slow.set()
        assert client.reply(512) == (0, 1, storage.data[:512])


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_more_requests_than_threads_are_all_answered(service, storage, style):
    with StyledClient(service, style) as client:
        for cookie in range(500):
            client.expect(READ, cookie, 100, cookie)
        client.send(b"".join(client.pack(READ, i, 100, cookie=i) for i in range(500)))
        for _ in range(500):
            answer = client.answer()
            assert answer.data == storage.data[answer.cookie : answer.cookie + 100]
    assert storage.most <= THREADS + 1


def test_the_queue_has_an_end(service, storage, monkeypatch, eventually):
    # A client that takes no replies, with requests that cost no memory to remember.
    monkeypatch.setattr(workers, "_QUEUE", 20)
    storage.gate.clear()
    with RawClient(service) as client:
        client.send(request(FLUSH) * 10_000)
        storage.until_waiting(THREADS + 1)  # the connection's own thread has to work as well
        assert storage.most == THREADS + 1
        storage.gate.set()
        for _ in range(10_000):
            assert client.reply() == (0, 7, b"")


def test_without_threads_a_connection_works_by_itself(service, storage, monkeypatch):
    monkeypatch.setattr(workers._PROCESS, "threads", 0)
    with RawClient(service) as client:
        client.send(request(READ, 0, 512, cookie=1) + request(FLUSH, cookie=2))
        assert client.reply(512) == (0, 1, storage.data[:512])
        assert client.reply() == (0, 2, b"")
    assert storage.most == 1


def test_a_system_without_threads_is_no_reason_to_fail(service, storage, monkeypatch):
    start = threading.Thread.start

    def exhausted(thread):
        if "worker" in thread.name:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", exhausted)
    with RawClient(service) as client:
        assert client.ask(READ, 0, 512) == (0, storage.data[:512])
        assert client.write(0, bytes(M)) == 0


# Nothing is left.


def test_threads_and_descriptors_go_with_the_connection(serve, storage, eventually):
    service = serve({"": storage})
    before = set(threading.enumerate())
    for _ in range(3):
        clients = [RawClient(service) for _ in range(5)]
        for client in clients:
            client.send(request(READ, 0, 512) * 20)
            for _ in range(20):
                assert client.reply(512)[0] == 0
            client.sock.close()
    eventually(lambda: not set(threading.enumerate()) - before)  # and `serve` looks at the rest


def test_threads_go_when_there_is_nothing_to_do(service, storage, monkeypatch, eventually):
    monkeypatch.setattr(workers, "_LINGER", 0.05)
    with RawClient(service) as client:
        assert client.ask(READ, 0, 512)[0] == 0
        eventually(lambda: not any("worker" in t.name for t in threading.enumerate()))
        assert client.ask(READ, 0, 512)[0] == 0, "and come back"


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_client_that_vanishes_frees_its_threads(service, storage, reset, eventually):
    storage.gate.clear()
    client = RawClient(service)
    client.send(request(READ, 0, 512) * 40 + request(WRITE, 0, 200_000) + bytes(100_000))
    storage.until_waiting(THREADS)
    if reset:
        client.sock.setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")
    client.sock.close()
    storage.gate.set()
    eventually(lambda: len(service.sessions) == 0)


def test_a_client_that_takes_nothing_is_cut_off_at_the_end(serve, storage):
    service = serve({"": storage}, grace=0.05)
    with RawClient(service) as client:
        client.send(request(READ, 0, M) * 40)
        storage.gate.set()
        service.stop()
        assert service.join(TIMEOUT)
        assert storage.closed


def test_a_bug_of_a_storage_in_a_thread_costs_one_connection(service, storage, caplog, eventually):
    with RawClient(service) as other, RawClient(service) as client:
        storage.failing = {"flush": ZeroDivisionError("oops")}
        client.send(request(FLUSH))
        assert client.hung_up()
        storage.failing = {}
        assert other.ask(FLUSH) == (0, b"")
        eventually(lambda: len(service.sessions) == 1)
    (line,) = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert line.endswith("unexpected ZeroDivisionError: oops")


# A stop while they are busy.


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_a_stop_waits_for_what_the_threads_have_in_hand(service, storage, style, eventually):
    storage.gate.clear()
    with StyledClient(service, style) as client:
        client.submit(READ, 0, 512, cookie=1)
        client.submit(WRITE, 1000, data=b"short", cookie=2)
        client.submit(WRITE, M, data=b"l" * 300_000, cookie=3)
        client.submit(FLUSH, cookie=4)
        client.submit(READ, 2 * M, 2 * M, cookie=5)
        storage.until_waiting(5)
        service.stop()
        (session,) = service.sessions._active.values()
        eventually(lambda: session.ending)
        storage.gate.set()
        assert {client.answer()[:2] for _ in range(5)} == {(i, 0) for i in range(1, 6)}
        assert client.hung_up()
    assert service.join(TIMEOUT)
    assert storage.closed  # and `_called` checks that nothing comes afterwards
    assert storage.data[1000:1005] == b"short"


def test_what_fails_at_the_end_is_told(service, storage):
    storage.gate.clear()
    storage.failing = {"write": errno.ENOSPC}
    with StyledClient(service, STRUCTURED) as client:
        client.submit(WRITE, 0, data=b"lost")
        storage.until_waiting(1)
        service.stop()
        storage.gate.set()
        assert client.answer().error == errno.ENOSPC
    assert service.join(TIMEOUT)


# The budget by itself.


def test_a_budget_gives_all_or_nothing():
    budget = Budget(threads=2, bytes=100)
    assert budget.take(threads=1, bytes=100)
    assert not budget.take(bytes=1)
    assert not budget.take(threads=2)
    assert (budget.threads, budget.bytes) == (1, 0)
    budget.give(threads=1, bytes=100)
    assert (budget.threads, budget.bytes) == (2, 100)


def test_a_job_that_is_not_taken_costs_nothing():
    budget = Budget(threads=0, bytes=100)
    team = Workers("nobody", budget)
    assert team.reserve(50)
    assert not team.submit(lambda: None, 50)
    assert not team.reserve(101)
    assert budget.bytes == 100
    team.join()


def test_who_joins_waits_for_every_job(eventually):
    before = set(threading.enumerate())
    done = []
    team = Workers("test", Budget())
    for number in range(100):
        assert team.reserve(1)
        assert team.submit(lambda number=number: done.append(number), 1)
    team.join()
    assert sorted(done) == list(range(100))
    assert team.pending == 0
    eventually(lambda: not set(threading.enumerate()) - before)
