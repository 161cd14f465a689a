"""Fencing: a channel's successor is served when nothing of its predecessor is left, not before."""

from __future__ import annotations

import contextlib
import os
import threading
import tracemalloc
from pathlib import Path

import pytest

from nbdlink.errors import TransportError
from nbdlink.protocol.claim import Claim
from nbdlink.server import Catalogue, Export, Service, serve_in_thread
from nbdlink.server.fencing import Fences
from nbdlink.transport.stream import listen_unix

from .fakes import (
    FUA,
    OPT_EXPORT_NAME,
    OPT_STARTTLS,
    READ,
    REP_ACK,
    WRITE,
    HungUpError,
    MemoryStorage,
    RawClient,
    request,
)
from .gated import (
    ERR_POLICY,
    ERR_SHUTDOWN,
    GHOST,
    OPT_LIST_META_CONTEXT,
    OPT_SET_META_CONTEXT,
    OPT_STRUCTURED_REPLY,
    SESSION,
    GatedServer,
    claim,
    claimed,
    go,
    introduced,
    meta_query,
)

NEWER = b"newer" + bytes(4091)


@pytest.fixture
def gated(tmp_path):
    """Start servers whose ghosts wait at a gate."""
    with contextlib.ExitStack() as stack:

        def start(**options):
            server = GatedServer(tmp_path, **options)
            stack.callback(server.close)
            return server

        yield start


@pytest.fixture
def connect():
    """Connect clients that are hung up at the end; give each before its handshake."""
    with contextlib.ExitStack() as stack:

        def start(server):
            make = getattr(server, "client", None) or (lambda **how: RawClient(server, **how))
            return stack.enter_context(make(handshake=False))

        yield start


def occupy(client):
    """Have the first process serve somebody, so that who comes next is served elsewhere."""
    assert go(introduced(client))[0] == REP_ACK
    assert client.ask(READ, 0, 1)[0] == 0


def assert_hung_up(client):
    with contextlib.suppress(TransportError):  # TLS has no time for a farewell
        assert client.hung_up()


class Successor(threading.Thread):
    """Does something in a thread of its own; the result is got by `result`."""

    def __init__(self, do):
        super().__init__()
        self._do = do
        self._result = self._error = None
        self.start()

    def run(self):
        try:
            self._result = self._do()
        except BaseException as error:
            self._error = error

    def result(self):
        self.join(30)
        assert not self.is_alive(), "it hangs"
        if self._error:
            raise self._error
        return self._result


WAYS = [(0, False), (2, False), (0, True), (2, True)]
NAMES = ["one process", "processes", "TLS", "TLS in processes"]


def _with_a_ghost(server, connect):
    """Give a connection one write of which is held up in the storage."""
    occupy(connect(server))
    old = claimed(connect(server), 0)
    old.send(request(WRITE, 0, len(GHOST)) + GHOST)
    server.entered()
    return old


def _write_again_and_newer(client):
    assert client.write(0, GHOST) == 0  # the kernel sends again what was not answered
    assert client.write(0, NEWER) == 0


@pytest.mark.parametrize("end", ["cut", "black-holed"])
@pytest.mark.parametrize(("processes", "tls"), WAYS, ids=NAMES)
def test_a_delayed_write_never_overtakes_a_newer_one(gated, connect, processes, tls, end):
    # Long enough for a handshake in a slow virtual machine; the test waits for most of it.
    server = gated(processes=processes, tls=tls, seconds=5 if tls else 2)
    old = _with_a_ghost(server, connect)
    if end == "cut":
        old.sock.close()
    new = introduced(connect(server))
    claim(new, 1)
    kind, words = go(new)
    if kind == REP_ACK:  # it is served while the ghost lives: then this is what happens
        _write_again_and_newer(new)
        server.open_gate()
    else:
        assert words == "requests of the last connection of channel 0 have not ended yet; try again"
        assert kind == ERR_SHUTDOWN
        server.open_gate()
        _write_again_and_newer(claimed(connect(server), 1))
    server.end()
    assert server.image.read_bytes()[: len(NEWER)] == NEWER


@pytest.mark.parametrize(("processes", "tls"), WAYS, ids=NAMES)
def test_who_waits_is_served_once_the_old_one_has_ended(gated, connect, processes, tls):
    server = gated(processes=processes, tls=tls)
    old = _with_a_ghost(server, connect)
    new = connect(server)
    successor = Successor(lambda: claimed(new, 1))
    server.logs("takes over from")
    server.open_gate()
    assert successor.result().ask(READ, 0, 5)[1] == b"ghost"
    assert_hung_up(old)


# With a storage that is a plain file: what the engine does itself.


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(bytes(16 << 20))
    return path


@pytest.fixture(params=["unix", "tcp", *NAMES[1:]])
def plain(request, tmp_path, image, connect):
    with contextlib.ExitStack() as stack:
        if request.param in NAMES:
            processes, tls = WAYS[NAMES.index(request.param)]
            server = GatedServer(tmp_path, processes=processes, tls=tls, plain=True, size=16 << 20)
            stack.callback(server.close)
            if processes:
                occupy(connect(server))
        else:
            options = {"unix": tmp_path / "socket"} if request.param == "unix" else {}
            server = stack.enter_context(serve_in_thread({"": image}, **options))
        yield server


LONG = 8 << 20


@pytest.mark.parametrize("sent", [10, 3 << 20, LONG - 1])
def test_a_successor_does_not_wait_for_the_rest_of_a_payload(plain, connect, image, sent):
    old = claimed(connect(plain), 0)
    old.send(request(WRITE, 0, LONG) + b"o" * sent)
    new = claimed(connect(plain), 1)
    assert new.write(0, b"n" * LONG) == 0
    with contextlib.suppress(OSError):
        old.send(b"o" * (LONG - sent))
    assert_hung_up(old)
    assert image.read_bytes()[:LONG] == b"n" * LONG


def test_a_client_that_takes_no_replies_holds_nobody_up(plain, connect):
    old = claimed(connect(plain), 0)
    old.send(request(READ, 0, 16 << 20) * 16)
    new = claimed(connect(plain), 1)
    assert new.ask(READ, 0, 3) == (0, bytes(3))


def test_an_idle_predecessor_is_hung_up(plain, connect):
    old = claimed(connect(plain), 0)
    claimed(connect(plain), 1)
    assert_hung_up(old)


def _generations(connect, server, count):
    """Have many successors each leave a queue of writes behind; none may show up later."""
    for generation in range(count):
        client = claimed(connect(server), generation)
        mine = generation.to_bytes(4, "big") * 1024
        assert client.write(0, mine) == 0
        for _ in range(10):
            assert client.ask(READ, 0, 4096) == (0, mine)
        client.send((request(WRITE, 0, 4096) + mine) * 100)


def test_no_write_of_a_generation_shows_up_in_the_next(plain, connect):
    _generations(connect, plain, 40)


def test_no_write_of_a_worker_shows_up_in_the_next(serve, connect, storage):
    storage.waits = True
    _generations(connect, serve({"": storage}), 40)


def test_queued_requests_are_dropped(serve, connect, tmp_path, storage):
    storage.waits = True
    service = serve({"": storage})
    old = claimed(connect(service), 0)
    storage.gate.clear()
    for number in range(100):
        old.send(request(WRITE, 4096 * number, 4096) + bytes(4096))
    # A worker can be counted on to have taken one of them; most have nobody to do them.
    assert storage.entered.wait(20)
    new = connect(service)
    successor = Successor(lambda: claimed(new, 1))
    assert old.hung_up()
    storage.gate.set()
    successor.result()
    assert len([call for call in storage.calls if call[0] == "write"]) <= 17


# Who is admitted.


def test_a_claim_is_answered_and_a_signature_told(serve, connect, image):
    client = introduced(connect(serve({"": image})))
    fences, signature = claim(client, 0)
    assert fences == "x-nbdlink:fences"
    assert signature.startswith("x-nbdlink:signature=auto:")


@pytest.mark.parametrize("generation", [0, 4, 5])
def test_a_stale_generation_is_refused(service, connect, generation):
    claimed(connect(service), 5)
    late = introduced(connect(service))
    claim(late, generation)
    assert go(late) == (
        ERR_POLICY,
        f"connection {generation} of channel 0 comes too late: connection 5 has been served",
    )


def test_a_stale_generation_harms_nobody(service, connect):
    new = claimed(connect(service), 5)
    late = introduced(connect(service))
    claim(late, 4)
    go(late)
    assert new.ask(READ, 0, 1)[0] == 0


def test_a_generation_is_remembered_when_its_connection_has_gone(service, connect, eventually):
    with claimed(connect(service), 5):
        pass
    eventually(lambda: not len(service.sessions))
    late = introduced(connect(service))
    claim(late, 5)
    assert go(late)[0] == ERR_POLICY


@pytest.mark.parametrize(
    "other", [{"channel": 1}, {"session": "a" * 32}], ids=["channel", "session"]
)
def test_others_are_left_alone(service, connect, other):
    old = claimed(connect(service), 5)
    claimed(connect(service), 6, **other)
    assert old.ask(READ, 0, 1)[0] == 0


def test_the_same_channel_of_another_export_is_another(serve, connect):
    service = serve({"a": MemoryStorage(), "b": MemoryStorage()})
    old = claimed(connect(service), 5, name=b"a")
    claimed(connect(service), 6, name=b"b")
    assert old.ask(READ, 0, 1)[0] == 0


def test_who_claims_nothing_is_left_alone(service, connect):
    one = introduced(connect(service))
    two = introduced(connect(service))
    assert go(one)[0] == go(two)[0] == REP_ACK
    claimed(connect(service), 0)
    assert one.ask(READ, 0, 1)[0] == two.ask(READ, 0, 1)[0] == 0


def test_a_claim_of_another_export_does_not_count(serve, connect):
    service = serve({"a": MemoryStorage(), "b": MemoryStorage()})
    old = claimed(connect(service), 5, name=b"a")
    other = introduced(connect(service))
    claim(other, 6, name=b"a")
    assert go(other, b"b")[0] == REP_ACK
    assert old.ask(READ, 0, 1)[0] == 0
    claimed(connect(service), 0, name=b"b")  # is not taken for a late one
    assert other.ask(READ, 0, 1)[0] == 0


def test_a_claim_alone_breaks_nobody_off(service, connect):
    old = claimed(connect(service), 0)
    claim(introduced(connect(service)), 1)
    assert old.ask(READ, 0, 1)[0] == 0


def test_export_name_is_fenced_too(service, connect):
    old = claimed(connect(service), 0)
    new = introduced(connect(service))
    claim(new, 1)
    new.send(b"IHAVEOPT" + OPT_EXPORT_NAME.to_bytes(4, "big") + bytes(4))
    assert len(new.receive(10)) == 10
    assert old.hung_up()


def test_export_name_of_a_stale_generation_is_hung_up_on(service, connect):
    claimed(connect(service), 1)
    late = introduced(connect(service))
    claim(late, 0)
    late.send(b"IHAVEOPT" + OPT_EXPORT_NAME.to_bytes(4, "big") + bytes(4))
    assert late.hung_up()


# What is no claim, or not one that counts.


MALFORMED = [
    "x-nbdlink:",
    "x-nbdlink:fences",
    "x-nbdlink:signature=",
    "x-nbdlink:session=1;channel=0;generation=1",
    f"x-nbdlink:session={SESSION};channel=0",
    "base:",
    "other:thing",
]


def _listed(client, option, *queries):
    *told, last = client.option(option, meta_query(b"", *queries))
    assert last == (REP_ACK, b"")
    return [data[4:].decode() for _, data in told]


@pytest.mark.parametrize("queries", [[], *([query] for query in MALFORMED)], ids=str)
def test_nobody_else_is_told(service, connect, queries):
    client = introduced(connect(service))
    listed = _listed(client, OPT_LIST_META_CONTEXT, *queries)
    assert [name for name in listed if name.startswith("x-nbdlink")] == []


@pytest.mark.parametrize("query", [Claim(SESSION, 0, 1).query, "x-nbdlink:fences"])
def test_nothing_of_it_can_be_selected(service, connect, query):
    old = claimed(connect(service), 0)
    client = introduced(connect(service))
    assert client.option(OPT_STRUCTURED_REPLY) == [(REP_ACK, b"")]
    assert _listed(client, OPT_SET_META_CONTEXT, query, "base:allocation") == ["base:allocation"]
    assert go(client)[0] == REP_ACK
    assert old.ask(READ, 0, 1)[0] == 0


def test_a_claim_among_other_queries_is_none(service, connect):
    old = claimed(connect(service), 0)
    client = introduced(connect(service))
    queries = Claim(SESSION, 0, 1).query, "base:"
    assert _listed(client, OPT_LIST_META_CONTEXT, *queries) == ["base:allocation"]
    assert go(client)[0] == REP_ACK
    assert old.ask(READ, 0, 1)[0] == 0


@pytest.mark.parametrize("processes", [0, 2])
def test_what_was_claimed_before_tls_is_forgotten(tmp_path, connect, processes):
    with GatedServer(tmp_path, processes=processes, tls=True, mode="allow") as server:
        old = claimed(connect(server), 0)
        client = server.client(handshake=False, tls=False)
        claim(client, 1)
        assert client.option(OPT_STARTTLS) == [(REP_ACK, b"")]
        client.begin()
        assert go(client)[0] == REP_ACK
        assert old.ask(READ, 0, 1)[0] == 0
        client.sock.close()


def test_only_who_may_use_the_export_can_claim(tmp_path, storage, connect):
    export = Export("", storage, tls_only=True)
    with Service(Catalogue([export]), [listen_unix(str(tmp_path / "socket"))]) as service:
        client = introduced(connect(service))
        query = meta_query(b"", Claim(SESSION, 0, 1).query)
        assert client.option(OPT_LIST_META_CONTEXT, query)[-1][0] == ERR_POLICY
        assert not len(service._conversations.fences)


# Several at once.


@pytest.fixture
def held_up(storage, serve, connect):
    """A service whose channel 0 is held by a connection with a write that does not end."""
    service = serve({"": storage}, negotiation_timeout=1000)
    old = claimed(connect(service), 0)
    storage.gate.clear()
    old.send(request(WRITE, 0, 4, flags=FUA) + b"old!")
    assert storage.entered.wait(20)
    yield service
    storage.gate.set()


def _waiting(service, eventually, generation):
    """Wait until somebody waits for the channel."""

    def is_there():
        (channel,) = service._conversations.fences._channels.values()
        return channel.candidate is not None and channel.candidate.generation == generation

    eventually(is_there)


def _try(client, generation):
    introduced(client)
    claim(client, generation)
    return go(client)


def _trying(client, generation):
    return Successor(lambda: _try(client, generation))


@pytest.mark.parametrize("second", [2, 1], ids=["newer", "the same again"])
def test_of_two_successors_the_newer_one_is_served(held_up, storage, connect, eventually, second):
    first = _trying(connect(held_up), 1)
    _waiting(held_up, eventually, 1)
    (channel,) = held_up._conversations.fences._channels.values()
    candidate = channel.candidate
    winner = _trying(connect(held_up), second)
    eventually(lambda: channel.candidate is not candidate)
    assert first.result() == (
        ERR_POLICY,
        f"connection 1 of channel 0 comes too late: connection {second} has come",
    )
    storage.gate.set()
    assert winner.result()[0] == REP_ACK


def test_an_older_successor_does_not_take_the_place_of_a_newer_one(
    held_up, storage, connect, eventually
):
    newer = _trying(connect(held_up), 2)
    _waiting(held_up, eventually, 2)
    assert _try(connect(held_up), 1)[0] == ERR_POLICY
    storage.gate.set()
    assert newer.result()[0] == REP_ACK


def test_twenty_successors_at_once_leave_the_newest(service, connect):
    claimed(connect(service), 0)
    clients = {n: introduced(connect(service)) for n in range(1, 21)}
    for number, client in clients.items():
        claim(client, number)
    attempts = {n: Successor(lambda c=client: _gone_or(c)) for n, client in clients.items()}
    kinds = {n: attempt.result() for n, attempt in attempts.items()}
    assert set(kinds.values()) <= {REP_ACK, ERR_POLICY, None}
    assert kinds[20] == REP_ACK
    assert clients[20].ask(READ, 0, 1)[0] == 0
    for number in range(1, 20):  # whoever was served for a moment is not any more
        if kinds[number] == REP_ACK:
            assert clients[number].hung_up()


def _gone_or(client):
    """Choose the export; give the kind of the answer, or None if a newer one was quicker."""
    try:
        return go(client)[0]
    except HungUpError:
        return None


def test_who_leaves_while_it_waits_is_not_waited_for(held_up, connect, eventually):
    client = introduced(connect(held_up))
    claim(client, 1)
    client.send(b"IHAVEOPT\0\0\0\7\0\0\0\6" + bytes(6))
    _waiting(held_up, eventually, 1)
    client.sock.close()
    eventually(lambda: len(held_up.sessions) == 1)


def test_who_left_while_it_waited_may_come_again(held_up, storage, connect, eventually):
    client = introduced(connect(held_up))
    claim(client, 1)
    client.send(b"IHAVEOPT\0\0\0\7\0\0\0\6" + bytes(6))
    _waiting(held_up, eventually, 1)
    client.sock.close()
    eventually(lambda: len(held_up.sessions) == 1)
    storage.gate.set()
    claimed(connect(held_up), 1)


def test_who_waits_is_told_that_the_server_stops(held_up, storage, connect, eventually):
    client = introduced(connect(held_up))
    waits = Successor(lambda: _try_again(client))
    _waiting(held_up, eventually, 1)
    held_up.stop()
    assert waits.result() == (ERR_SHUTDOWN, "the server is shutting down")
    storage.gate.set()


def _try_again(client):
    claim(client, 1)
    return go(client)


# Limits.


def test_memory_is_bounded_however_many_sessions_there_are():
    class Somebody:
        number, peer = 1, "somebody"

    fences = Fences()
    tracemalloc.start()
    try:
        for number in range(100_000):
            passing = Claim(f"{number:032x}", 0, 0)
            assert fences.admit(Somebody, "", passing, 1.0) is None
            fences.release(Somebody)
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(fences) == 1 << 14
    assert size < 8 << 20


def test_channels_in_use_are_never_forgotten():
    class Somebody:
        def __init__(self, number):
            self.number, self.peer = number, "somebody"

    fences = Fences(remembered=10)
    lasting = [Claim(os.urandom(16).hex(), 0, 3) for _ in range(5)]
    for number, one in enumerate(lasting):
        fences.admit(Somebody(number), "", one, 1.0)
    for number in range(100, 200):
        passing = Somebody(number)
        fences.admit(passing, "", Claim(os.urandom(16).hex(), 0, 0), 1.0)
        fences.release(passing)
    for one in lasting:
        assert not fences.admit(Somebody(1000), "", one, 1.0).is_passing
    assert len(fences) == 10


@pytest.mark.parametrize("how", ["killed", "left"])
def test_a_process_that_dies_lets_go_of_its_channels(gated, connect, how):
    server = gated(processes=1)
    occupy(connect(server))
    old = claimed(connect(server), 0)
    assert old.ask(READ, 0, 1)[0] == 0  # it is served there by now, and not only going to be
    if how == "killed":
        pid = server.process.pid
        (child,) = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        os.kill(child, 9)
        assert old.hung_up()
    else:
        old.sock.close()
    assert claimed(connect(server), 1).ask(READ, 0, 1)[0] == 0
