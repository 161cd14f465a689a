"""Connections that are served by further processes."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from nbdlink.errors import TransportError
from nbdlink.server import Catalogue, Export
from nbdlink.server.processes import Processes
from nbdlink.storage.mirror.opening import open_mirror
from nbdlink.storage.open import StorageSpec, open_storage
from nbdlink.storage.raw import RawStorage
from nbdlink.storage.remote import RemoteStorage
from nbdlink.uri import Target

from ..storage.qcow2 import qemu
from ..transport.pairs import authority, identity
from .fakes import DISC, OPT_STARTTLS, READ, WRITE, MemoryStorage, RawClient, request
from .gated import GatedServer, claimed
from .tls_client import TLSClient


class Server:
    """`nbdlink serve --processes 3`, as `RawClient` needs it."""

    def __init__(self, folder, tls):
        self.client = functools.partial(TLSClient if tls else RawClient, self)
        self.image = folder / "image"
        self.image.write_bytes(bytes(1 << 20))
        self.addresses = [str(folder / "socket")]
        words = f"-v --processes 3 -k {self.addresses[0]} {self.image}".split()
        if tls:
            self.credentials = authority().write_directory(folder, server=identity("server"))
            words += ["--tls-certificates", str(self.credentials)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nbdlink", "serve", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout.readline()

    @property
    def children(self):
        pid = self.process.pid
        return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def end(self):
        """Give the exit status and the log."""
        log = self.process.communicate(timeout=20)[1]
        return self.process.returncode, log


# With TLS it begins in the process that serves the client.
@pytest.fixture(params=["plain", "tls"])
def server(tmp_path, request):
    server = Server(tmp_path, request.param == "tls")
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.process.communicate()


def threads(pid):
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


@pytest.fixture
def four(server):
    """Four clients, one in each process."""
    with contextlib.ExitStack() as stack:
        clients = []
        for _ in range(4):
            clients.append(stack.enter_context(server.client()))
            # So it has its place, before the next one comes.
            assert clients[-1].ask(READ, 0, 512) == (0, bytes(512))
        yield clients


def test_connections_are_spread(server, four):
    assert [threads(child) for child in server.children] == [2, 2, 2]


def test_the_place_of_one_that_left_is_taken(server, four, eventually):
    four[1].send(request(DISC))
    assert four[1].hung_up()
    eventually(lambda: sorted(threads(child) for child in server.children) == [1, 2, 2])

    def taken():
        # The first process hears of the place a moment after it became free,
        # and may serve a client of that moment itself.
        with server.client() as client:
            assert client.ask(READ, 0, 16) == (0, bytes(16))
            return [threads(child) for child in server.children] == [2, 2, 2]

    eventually(taken)


def test_what_one_process_writes_the_others_read(four):
    for number, writer in enumerate(four):
        data = bytes([number + 1]) * 4096
        assert writer.write(8192, data) == 0
        assert [reader.ask(READ, 8192, 4096) for reader in four] == [(0, data)] * 4


def test_all_clients_leave_when_the_service_stops(server, four):
    server.process.terminate()
    assert all(client.hung_up() for client in four)
    status, log = server.end()
    assert (status, log.count("was let go") + log.count("hung up after")) == (0, 4), log


def test_what_has_arrived_is_answered_before_the_end(server, four):
    for client in four:
        client.send((request(WRITE, 0, 4096) + bytes(4096)) * 50)
    server.process.terminate()
    for client in four:
        assert [client.reply() for _ in range(50)] == [(0, 7, b"")] * 50
        assert client.hung_up()
    assert server.end()[0] == 0


def test_all_processes_serve_what_the_storage_has_grown_by(server, four):
    os.truncate(server.image, 2 << 20)
    with server.client() as fifth:
        for number, client in enumerate([*four, fifth]):
            offset = (1 << 20) + 4096 * number
            assert client.write(offset, b"grown") == 0
        assert fifth.ask(READ, 1 << 20, 5) == (0, b"grown")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_for_the_first_process(server, four, number):
    for child in server.children:
        os.kill(child, number)
    assert all(client.ask(READ, 0, 16) == (0, bytes(16)) for client in four)


def test_no_process_outlives_the_first(server, four, eventually):
    children = server.children
    server.process.kill()
    for child in children:
        eventually(lambda child=child: not Path(f"/proc/{child}/exe").exists())
    assert all(map(_is_gone, four))


def test_a_process_that_dies_takes_only_its_own_clients_along(server, four):
    os.kill(server.children[0], signal.SIGKILL)
    dead = [client for client in four if not _answers(client)]
    assert len(dead) == 1
    with server.client() as client:
        assert client.ask(READ, 0, 16) == (0, bytes(16))
    assert _line_with("which served it, has died", server.process.stderr)
    server.process.terminate()
    assert server.end()[0] == 0


@pytest.fixture
def secured(tmp_path):
    server = Server(tmp_path, True)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.process.communicate()


def shown(client):
    """Give the number of the certificate that the server has shown."""
    return client.sock.session.certificate.serial_number


def test_every_process_loads_the_credentials_anew(secured, eventually):
    with contextlib.ExitStack() as stack:
        before = [stack.enter_context(secured.client()) for _ in range(4)]
        new = authority().issue()
        authority().write_directory(secured.credentials, server=new)
        secured.process.send_signal(signal.SIGHUP)
        assert "loaded anew" in _line_with("credentials", secured.process.stderr)
        # The others hear of it one after the other, from a queue that keeps the order.
        after = [stack.enter_context(secured.client()) for _ in range(4)]
        assert {shown(client) for client in after} == {new.certificate.serial_number}
        assert shown(before[0]) != new.certificate.serial_number
        assert all(map(_answers, before))


def test_who_leaves_before_choosing_an_export_takes_no_place(secured, eventually):
    for _ in range(8):
        client = secured.client(handshake=False)
        client.sock.close()

    def spread():
        # Those above may just have begun, or be counted for a moment yet.
        with contextlib.ExitStack() as stack:
            for _ in range(4):
                stack.enter_context(secured.client())
            return [threads(child) for child in secured.children] == [2, 2, 2]

    eventually(spread)


def test_a_refused_handshake_is_told_once_wherever_it_was(secured):
    with secured.client():  # which occupies the first process
        client = secured.client(tls=False, handshake=False)
        client.option(OPT_STARTTLS)
        client.send(b"this is not TLS at all")
        assert client.rest()[:1] in (b"", b"\x15")
        client.sock.close()
        assert _line_with("does not speak TLS", secured.process.stderr)
    secured.process.terminate()
    status, log = secured.end()
    assert (status, log.count("does not speak TLS")) == (0, 0), log


def _line_with(words, stream):
    return next(line for line in stream if words in line)


def _is_gone(client):
    try:
        return client.hung_up()
    except TransportError:  # with TLS: an end without a goodbye
        return True


def _answers(client):
    try:
        return client.ask(READ, 0, 16) == (0, bytes(16))
    except Exception:
        return False


def test_a_broken_protocol_is_told_by_the_first_process(server, four):
    for client in four:
        client.send(bytes(28))
        assert client.hung_up()
        assert _line_with("hung up on: a request begins with the magic 0", server.process.stderr)


def test_a_storage_in_memory_is_served_by_one_process():
    processes = Processes(3, Catalogue([Export("", MemoryStorage())]))
    processes.start(lambda: None)
    assert processes._children == []


def test_a_lost_write_is_known_to_every_process(tmp_path):
    (tmp_path / "image").write_bytes(bytes(4096))
    storage = RawStorage.open(tmp_path / "image")
    pid = os.fork()
    if not pid:
        storage._lost.note(OSError(errno.EIO, "the disk fails"))
        os._exit(0)
    os.waitpid(pid, 0)
    with pytest.raises(OSError, match="earlier writes were lost"):
        storage.flush()
    storage.close()


@pytest.fixture
def renewing(tmp_path):
    """A server with one further process, which has a supervised client there, and others."""
    with (
        GatedServer(tmp_path, processes=1, tls=True, mode="allow", plain=True) as server,
        contextlib.ExitStack() as stack,
    ):
        clients = [stack.enter_context(RawClient(server))]  # in the first process
        supervised = stack.enter_context(RawClient(server, handshake=False))
        claimed(supervised, 1, notice=10809)
        clients += [stack.enter_context(RawClient(server)) for _ in range(2)]  # one in each
        yield server, supervised, clients


def test_a_renewal_lets_nobody_go_who_is_not_supervised(renewing):
    server, supervised, clients = renewing
    server.process.send_signal(signal.SIGHUP)
    assert supervised.hung_up()
    assert [_answers(client) for client in clients] == [True] * 3


def test_after_a_renewal_every_process_serves_newcomers(renewing):
    server, supervised, _ = renewing
    server.process.send_signal(signal.SIGHUP)
    assert supervised.hung_up()
    with contextlib.ExitStack() as stack:
        newcomers = [stack.enter_context(server.client()) for _ in range(4)]
        assert [_answers(client) for client in newcomers] == [True] * 4


class GatedEnd(RawStorage):
    """A file that one process closes when it is allowed to."""

    gate = entered = who = None

    def close(self):
        if self._fd >= 0 and os.getpid() != self.who:
            os.write(self.entered, b"x")
            os.read(self.gate, 1)
        super().close()


def test_an_export_is_released_once_all_have_closed_it(tmp_path, monkeypatch):
    monkeypatch.setattr("nbdlink.server.processes._REPORT_SECONDS", 30)
    (tmp_path / "image").write_bytes(bytes(4096))
    storage = GatedEnd.open(tmp_path / "image")
    gate, opened = os.pipe()
    heard, entered = os.pipe()
    storage.gate, storage.entered, storage.who = gate, entered, os.getpid()
    export = Export("", storage)
    processes = Processes(1, Catalogue([export]))
    processes.start(lambda: None)
    try:
        # Somebody has asked for the metrics, and the answer is on its way.
        processes._tell(processes._children[0], "report", 0)
        release = threading.Thread(target=processes.release, args=(export,))
        release.start()
        assert os.read(heard, 1) == b"x"
        release.join(0.1)
        assert release.is_alive(), "it is still open there"
        os.write(opened, b"x")
        release.join(20)
        assert not release.is_alive()
    finally:
        processes.close(kill=True)
        storage.close()
        for fd in (gate, opened, heard, entered):
            os.close(fd)


@contextlib.contextmanager
def beside_a_file(folder, storage):
    """Serve a storage that may not fork by two processes, which a raw file is there for."""
    (folder / "beside").write_bytes(bytes(4096))
    beside = RawStorage.open(folder / "beside")
    export = Export("it", storage)
    processes = Processes(1, Catalogue([Export("", beside), export]))
    try:
        processes.start(lambda: None)
        yield processes, export
    finally:
        processes.close(kill=True)
        beside.close()
        storage.close()


def test_a_released_export_of_another_server_is_still_flushed(tmp_path):
    server = Server(tmp_path, tls=False)
    try:
        target = Target(socket=server.addresses[0])
        with beside_a_file(tmp_path, RemoteStorage.open(target)) as (processes, export):
            export.storage.write(memoryview(b"unflushed"), 0, False)
            processes.release(export)
            export.storage.flush()
    finally:
        server.process.terminate()
        server.process.communicate(timeout=20)


# A mirror has threads by then, which newer Pythons warn of.
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("kind", ["mirror", "overlay", "lock_ranges", "qcow2"])
def test_a_released_file_is_closed_everywhere(tmp_path, kind, monkeypatch):
    image, files = tmp_path / "image", (str(tmp_path / "image"), str(tmp_path / "other"))
    monkeypatch.setenv("NBDLINK_STATE_DIRECTORY", str(tmp_path / "state"))
    image.write_bytes(bytes(4096))
    if kind == "mirror":
        (tmp_path / "other").write_bytes(bytes(4096))
        storage = open_mirror([StorageSpec(name, format="raw") for name in files])
    elif kind == "qcow2":
        storage = open_storage(StorageSpec(str(qemu.create(image, "1M")), format="qcow2"))
    else:
        storage = open_storage(StorageSpec(str(image), format="raw", **{kind: True}))
    with beside_a_file(tmp_path, storage) as (processes, export):
        (child,) = processes._children
        held = Path(f"/proc/{child.pid}/fd")

        def of_it():
            names = [str(fd.readlink()) for fd in held.iterdir()]
            return [name for name in names if name.startswith(files)]

        assert of_it()
        processes.release(export)
        assert not of_it()
