"""An export of another server as a storage: what it passes on, and what if the wire breaks."""

from __future__ import annotations

import contextlib
import errno
import os
import threading

import pytest
from hypothesis import given, settings

from nbdlink.errors import OptionError, StorageError, TransportError
from nbdlink.server import serve_in_thread
from nbdlink.storage.base import Storage
from nbdlink.storage.open import Part, StorageSpec, open_storage
from nbdlink.storage.raw import RawStorage
from nbdlink.storage.remote import RemoteStorage
from nbdlink.storage.remotefile import RemoteFile
from nbdlink.uri import Target

from ..server.fakes import MemoryStorage
from .arrays import SIZE, play, read, scripts, told, write


class Plain(MemoryStorage):
    """A storage that can do as little as possible."""

    can_trim = can_zero = can_fast_zero = can_cache = False
    zero = Storage.zero


class Server:
    """A server that can be stopped and started again.

    Attributes:
        behind: what it serves; set it to serve something else from the next start on.
    """

    def __init__(self, path, behind):
        self.behind = behind
        self.target = Target(socket=str(path))
        self._running = contextlib.ExitStack()
        self.start()

    def start(self):
        self.behind.closed = False
        exports = {"": self.behind}
        self._running.enter_context(serve_in_thread(exports, unix=self.target.socket))

    def stop(self):
        self._running.close()


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path / "socket", MemoryStorage(SIZE))
    yield server
    server.stop()


@pytest.fixture
def remote(server):
    storage = RemoteStorage.open(server.target)
    yield storage
    storage.close()


def fails(request, *arguments, why=None, **options):
    """Send a request that must fail; give its errno."""
    with pytest.raises(OSError, match=why) as caught:
        request(*arguments, **options)
    return caught.value.errno


@pytest.mark.parametrize("kind", [MemoryStorage, Plain])
def test_it_behaves_as_an_array_of_bytes(tmp_path, kind):
    behind = kind(SIZE)
    model = bytearray(behind.data)
    server = Server(tmp_path / "socket", behind)
    remote = RemoteStorage.open(server.target)

    @settings(max_examples=60, deadline=None)
    @given(script=scripts())
    def plays(script):
        play(remote, model, script)
        assert read(remote) == model

    try:
        plays()
        assert behind.data == model
    finally:
        remote.close()
        server.stop()


def test_it_can_what_its_server_can(tmp_path):
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.write(os.urandom(64 << 10))
        file.truncate(1 << 20)
    with serve_in_thread({"": path}, unix=tmp_path / "socket"):
        remote = RemoteStorage.open(Target(socket=str(tmp_path / "socket")))
        assert told(remote) == [(0, 64 << 10, 0), (64 << 10, 960 << 10, 3)]
        assert told(remote, "qemu:allocation-depth") == [(0, 1 << 20, 1)]
        assert (remote.can_trim, remote.can_fast_zero, remote.can_cache) == (True, True, True)
        assert remote.signature.startswith("auto:")
        remote.close()


def test_what_its_server_cannot_is_not_promised(tmp_path):
    server = Server(tmp_path / "socket", Plain(SIZE, minimum_block=512))
    remote = RemoteStorage.open(server.target)
    assert (remote.can_trim, remote.can_fast_zero, remote.can_cache) == (False, False, False)
    assert remote.minimum_block == 512
    zero = {"may_trim": True, "fast": True, "fua": False}
    assert fails(remote.zero, 0, 512, **zero) == errno.ENOTSUP
    remote.close()
    server.stop()


@pytest.mark.parametrize(("what", "says"), [("read_only", "read-only"), ("empty", "is empty")])
def test_what_cannot_be_served_is_refused(tmp_path, what, says):
    behind = MemoryStorage(0 if what == "empty" else SIZE, read_only=what == "read_only")
    server = Server(tmp_path / "socket", behind)
    with pytest.raises(StorageError, match=says):
        RemoteStorage.open(server.target)
    server.stop()


def test_an_export_that_is_not_there_is_named(server):
    with pytest.raises(OptionError, match="does not offer the export 'other'"):
        RemoteStorage.open(Target(socket=server.target.socket, export="other"))


@pytest.mark.parametrize("fua", [False, True])
def test_a_write_is_durable_where_that_is_asked_for(server, remote, fua):
    write(remote, b"x", 0, fua=fua)
    assert server.behind.calls[-1] == ("write", 0, 1, fua)


def test_an_error_of_the_server_is_passed_on(server, remote):
    server.behind.failing["write"] = errno.ENOSPC
    assert fails(write, remote, b"x", 0) == errno.ENOSPC
    server.behind.failing.clear()
    write(remote, b"x", 0)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_after_a_flush_that_failed_none_succeeds(server, remote, number):
    write(remote, b"x", 0)
    server.behind.failing["flush"] = number
    assert fails(remote.flush) == number
    server.behind.failing.clear()
    assert fails(remote.flush, why="earlier writes were lost") == number
    assert fails(write, remote, b"x", 0, fua=True) == number


def test_after_a_durable_write_that_failed_no_flush_succeeds(server, remote):
    server.behind.failing["write"] = errno.EIO
    assert fails(write, remote, b"x", 0, fua=True) == errno.EIO
    server.behind.failing.clear()
    assert fails(remote.flush, why="earlier writes were lost") == errno.EIO


# What happens between two connections, and whether the second may be used.
HARMLESS = {
    "nothing": lambda remote: None,
    "a read": read,
    "a flushed write": lambda remote: (write(remote, b"x", 0), remote.flush()),
    "a durable write": lambda remote: write(remote, b"x", 0, fua=True),
    "a durable trim": lambda remote: remote.trim(0, 4096, True),
}
RISKY = {
    "a write": lambda remote: write(remote, b"x", 0),
    "a write behind a flush": lambda remote: (remote.flush(), write(remote, b"x", 0)),
    "zeroes": lambda remote: remote.zero(0, 4096, may_trim=True, fast=False, fua=False),
    "a trim": lambda remote: remote.trim(0, 4096, False),
}


@pytest.mark.parametrize("before", HARMLESS)
def test_it_goes_on_with_the_server_that_is_back(server, remote, before):
    HARMLESS[before](remote)
    server.stop()
    remote.flush()  # nothing can have been lost
    assert fails(read, remote) == errno.EIO
    assert fails(read, remote) == errno.EIO
    remote.flush()
    server.start()
    assert read(remote) == server.behind.data
    write(remote, b"y", 0)
    remote.flush()
    assert server.behind.data[0] == ord("y")


@pytest.mark.parametrize("before", RISKY)
def test_nothing_succeeds_once_a_write_may_be_lost(server, remote, before):
    RISKY[before](remote)
    server.stop()
    server.start()
    for _ in range(2):
        assert fails(remote.flush) == errno.EIO
    assert fails(read, remote, why="perhaps what was written") == errno.EIO
    assert fails(write, remote, b"x", 0, fua=True) == errno.EIO


def test_nothing_succeeds_once_a_write_was_under_way(server, remote):
    server.behind.gate.clear()
    server.behind.waits = True
    outcome = []

    def go():
        outcome.append(fails(write, remote, b"x", 0, fua=True))

    thread = threading.Thread(target=go)
    thread.start()
    assert server.behind.entered.wait(30)
    remote._line.connection.close()  # as if the network had done it
    thread.join()
    server.behind.gate.set()
    assert outcome == [errno.EIO]
    assert fails(read, remote, why="perhaps what was written") == errno.EIO


def test_a_write_begun_during_a_flush_is_not_covered_by_it(server, remote):
    write(remote, b"x", 0)
    flush = server.behind.flush

    def flush_while_writing():
        server.behind.flush = flush
        write(remote, b"y", 1)

    server.behind.waits = True
    server.behind.flush = flush_while_writing
    remote.flush()
    server.stop()
    server.start()
    fails(read, remote)
    assert fails(remote.flush, why="perhaps what was written") == errno.EIO


@pytest.mark.parametrize("size", [SIZE // 2, SIZE * 2])
def test_another_export_is_not_taken_for_the_same(server, remote, size):
    known = server.behind
    server.stop()
    fails(read, remote)
    server.behind = MemoryStorage(size)
    server.start()
    assert fails(read, remote, why="not the same export") == errno.EIO
    server.stop()
    server.behind = known
    server.start()
    assert read(remote) == known.data


def test_a_file_that_is_known_to_be_the_same_may_have_grown(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(SIZE))
    server = Server(tmp_path / "socket", RawStorage.open(path))
    remote = RemoteStorage.open(server.target)
    if remote.signature is None:
        pytest.skip("this file system does not tell one file from another")
    server.stop()
    fails(read, remote)
    os.truncate(path, 2 * SIZE)
    server.behind = RawStorage.open(path)
    server.start()
    assert len(read(remote)) == SIZE
    assert remote.size == 2 * SIZE
    write(remote, b"x", 2 * SIZE - 1)
    remote.close()
    server.stop()


@pytest.mark.parametrize(
    ("changed", "says"), [({"read_only": True}, "read-only"), ({"minimum_block": 512}, "blocks")]
)
def test_an_export_that_can_less_is_refused(server, remote, changed, says):
    server.stop()
    fails(read, remote)
    for name, value in changed.items():
        setattr(server.behind, name, value)
    server.start()
    assert fails(read, remote, why=says) == errno.EIO


def test_a_silent_server_is_an_error(server):
    remote = RemoteStorage.open(server.target, request_timeout=0.05)
    server.behind.gate.clear()
    server.behind.waits = True
    assert fails(write, remote, b"x", 0, why="no reply within 0.05 seconds") == errno.EIO
    assert fails(remote.flush, why="perhaps what was written") == errno.EIO
    server.behind.gate.set()
    remote.close()


def test_who_opens_it_anew_waits_for_what_the_last_one_left(server):
    remote = RemoteStorage.open(server.target, request_timeout=0.05)
    server.behind.gate.clear()
    server.behind.waits = True
    fails(write, remote, b"x", 0, why="no reply within 0.05 seconds")
    remote.close()
    for _ in range(2):
        with pytest.raises(TransportError, match="no answer"):
            RemoteStorage.open(server.target, timeout=0.3)
    server.behind.gate.set()
    remote = RemoteStorage.open(server.target)
    assert read(remote, 0, 1) == b"x"
    remote.close()


def test_two_storages_of_one_export_leave_each_other_alone(server, remote):
    another = RemoteStorage.open(server.target)
    write(remote, b"x", 0)
    assert read(another, 0, 1) == b"x"
    another.close()


def test_threads_that_wait_learn_of_a_silent_server_together(server):
    remote = RemoteStorage.open(server.target, request_timeout=0.5)
    server.behind.gate.clear()
    server.behind.waits = True
    found = []
    threads = [
        threading.Thread(target=lambda n=n: found.append(fails(write, remote, b"x", n)))
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    server.behind.gate.set()
    assert found == [errno.EIO] * 8
    remote.close()


def test_threads_share_it(server, remote):
    share = SIZE // 8
    failures = []

    def hammer(number):
        mine = bytes([number]) * 100
        try:
            for round_ in range(50):
                at = number * share + round_ * 100
                write(remote, mine, at)
                assert read(remote, at, 100) == mine
            remote.flush()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=hammer, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert all(server.behind.data[n * share] == n for n in range(8))


# Opened by its description.


def opened(server, **options):
    return open_storage(StorageSpec(str(server.target), target=server.target, **options))


def test_a_part_of_an_export_is_served(server):
    storage = opened(server, format="raw", parts=(Part(4096, 8192),))
    assert read(storage) == server.behind.data[4096:12288]
    storage.close()


def test_an_overlay_leaves_the_export_alone(server):
    before = bytes(server.behind.data)
    storage = opened(server, overlay=True, read_only=False)
    write(storage, b"x" * 100, 50)
    assert read(storage, 50, 100) == b"x" * 100
    storage.close()
    assert server.behind.data == before


def test_an_export_found_to_be_raw_stays_it(server):
    server.behind.data[:512] = bytes(512)
    storage = opened(server)
    assert fails(write, storage, b"QFI\xfb\0\0\0\3", 0) == errno.EPERM
    assert not any(server.behind.data[:512])
    write(storage, b"harmless", 0)
    storage.close()


def test_neighbours_within_a_block_do_not_undo_each_other(tmp_path):
    behind = MemoryStorage(SIZE, minimum_block=4096)
    behind.waits = True
    server = Server(tmp_path / "socket", behind)
    file = RemoteFile(RemoteStorage.open(server.target))

    def hammer(number):
        for round_ in range(100):
            file.write_at(bytes([round_]) * 512, number * 512)

    threads = [threading.Thread(target=hammer, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert behind.data[:4096] == bytes([99]) * 4096
    file.close()
    server.stop()
