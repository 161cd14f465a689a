"""Storages that do at once what they can: the loop asks them first, and workers do the rest."""

from __future__ import annotations

import os
import random
import struct
from concurrent.futures import ThreadPoolExecutor

import pytest

from nbdlink.server import serve_in_thread
from nbdlink.storage.base import AtOnce
from nbdlink.storage.qcow2 import Qcow2Storage

from ..storage.qcow2 import qemu
from .fakes import (
    EPERM,
    FLUSH,
    FUA,
    READ,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    MemoryStorage,
    RawClient,
    request,
)

K = 1024
LENGTHS = [1, 4 * K, 100_000, 200_000, K * K, K * K + 1]
"""What fits into the inbox, what is received exactly, and what is longer than all buffers."""


class PromptStorage(MemoryStorage):
    """Bytes in memory that are there at once, unless they are told not to be.

    Attributes:
        absent: offsets that requests begin at which cannot be done at once.
        prompt: what was done at once: the method, offset and length.
    """

    waits = True

    def __init__(self, size=8 << 20, **options):
        super().__init__(size, **options)
        self.absent = set()
        self.prompt = []

    @property
    def at_once(self):
        return AtOnce(self._read, self._write, in_memory=True, nowait=True)

    def _read(self, buffer, offset):
        if offset in self.absent:
            buffer[: len(buffer) // 2] = b"?" * (len(buffer) // 2)
            return False
        self.prompt.append(("read", offset, len(buffer)))
        buffer[:] = self.data[offset : offset + len(buffer)]
        return True

    def _write(self, buffer, offset):
        if offset in self.absent:
            half = len(buffer) // 2  # a part of it may have been done
            self.data[offset : offset + half] = buffer[:half]
            return False
        self.prompt.append(("write", offset, len(buffer)))
        self.data[offset : offset + len(buffer)] = buffer
        return True


@pytest.fixture
def storage():
    return PromptStorage()


@pytest.fixture(params=["unix", "tcp"])
def client(request, serve, storage):
    options = {"unix": None, "host": "127.0.0.1"} if request.param == "tcp" else {}
    with RawClient(serve({"": storage}, **options)) as client:
        yield client


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("goes", [True, False])
def test_a_request_is_done_once_at_once_or_by_a_worker(goes, length, client, storage):
    if not goes:
        storage.absent = {512}
    data = os.urandom(length)
    assert client.write(512, data) == 0
    assert client.ask(READ, 512, length) == (0, data)
    assert storage.data[512:][:length] == data
    at_once = [("write", 512, length), ("read", 512, length)]
    by_worker = [("write", 512, length, False), ("read", 512, length)]
    if not goes:
        assert storage.prompt == []
        assert storage.calls == by_worker
    elif length <= K * K:
        assert storage.prompt == at_once
        assert storage.calls == []
    else:  # more than is held in memory for it
        assert storage.prompt == []


def test_who_has_to_wait_does_not_hold_up_the_others(client, storage):
    storage.absent = {0}
    storage.gate.clear()
    client.send(request(WRITE, 0, 4, cookie=1) + b"slow" + request(READ, 4096, 4, cookie=2))
    assert client.reply(4) == (0, 2, bytes(storage.data[4096:4100]))
    assert storage.entered.wait(30)
    assert client.write(8192, b"fast") == 0
    storage.gate.set()
    assert client.reply() == (0, 1, b"")
    assert storage.data[:4] == b"slow"


@pytest.mark.parametrize("length", [4 * K, 200_000])
def test_fua_is_not_answered_before_a_flush(length, client, storage):
    data = os.urandom(length)
    assert client.write(0, data, FUA) == 0
    assert storage.data[:length] == data
    assert storage.calls in ([("write", 0, length, True)], [("flush",)])


@pytest.mark.parametrize("length", [4 * K, 200_000])
def test_an_export_that_is_read_only_is_not_written_to(length, serve, storage):
    before = bytes(storage.data)
    with RawClient(serve({"": storage}, read_only=True)) as client:
        assert client.write(0, b"x" * length) == EPERM
        assert client.ask(READ, 0, 10) == (0, before[:10])
    assert storage.data == before


def test_a_read_behind_the_end_is_never_asked_for(client, storage):
    assert client.ask(READ, storage.size - 512, 1024)[0]
    assert client.write(storage.size - 512, bytes(1024))
    assert storage.prompt == []


# Real images.

BLOCK = 4 * K


class Player:
    """A client with many requests in flight, which knows what must be in its blocks.

    Its blocks lie between those of other players, in the same clusters.
    """

    def __init__(self, service, blocks, content, trims):
        self.client = RawClient(service)
        self.rnd = random.Random(blocks.start)
        self.blocks = blocks
        self.model = {block: content[block * BLOCK :][:BLOCK] for block in blocks}
        self.trims = trims  # whether a block is a cluster, and so can be given back

    def play(self, turns):
        for _ in range(turns):
            self.turn()
        self.client.sock.close()

    def turn(self):
        """Send requests for as many blocks, and take the answers as they come."""
        asked, message = {}, b""
        for cookie, block in enumerate(self.rnd.sample(self.blocks, 24)):
            kind = self.rnd.choice([READ, READ, WRITE, WRITE, WRITE, WRITE_ZEROES, TRIM])
            data = bytes([self.rnd.randrange(1, 256)]) * BLOCK if kind == WRITE else b""
            asked[cookie] = kind, block, data
            message += request(kind, block * BLOCK, BLOCK, cookie=cookie) + data
        if self.rnd.random() < 0.3:
            asked[len(asked)] = FLUSH, None, b""
            message += request(FLUSH, cookie=len(asked) - 1)
        with ThreadPoolExecutor(1) as sender:
            sent = sender.submit(self.client.send, message)
            while asked:
                magic, error, cookie = struct.unpack(">IIQ", self.client.receive(16))
                assert (magic, error) == (0x67446698, 0)
                self.take(*asked.pop(cookie))
            sent.result()

    def take(self, kind, block, data):
        if kind == READ:
            assert self.client.receive(BLOCK) == self.model[block]
        elif kind == WRITE:
            self.model[block] = data
        elif kind == WRITE_ZEROES or (kind == TRIM and self.trims):
            self.model[block] = bytes(BLOCK)


@pytest.mark.skipif(bool(qemu.MISSING), reason=f"not installed: {', '.join(qemu.MISSING)}")
@pytest.mark.interop
@pytest.mark.parametrize("kind", ["", "snapshot", "backing", "extended_l2=on", "cluster_size=4k"])
def test_deep_queues_of_several_clients_leave_an_image_as_they_say(kind, tmp_path):
    blocks, players = 1024, 3
    size = blocks * BLOCK
    path = tmp_path / "disk.qcow2"
    before = bytes(size)
    if kind == "backing":
        before = os.urandom(size // 2).ljust(size, b"\0")
        (tmp_path / "base.raw").write_bytes(before[: size // 2])
        qemu.create(path, size, backing="base.raw", backing_format="raw")
    else:
        qemu.create(path, size, options=kind if "=" in kind else "")
    if kind == "snapshot":
        qemu.io(path, f"write -P 5 0 {size // 2}")
        before = (b"\x05" * (size // 2)).ljust(size, b"\0")
        qemu.run("qemu-img", "snapshot", "-c", "s", path)
    with serve_in_thread({"": Qcow2Storage.open(path)}, unix=tmp_path / "socket") as service:
        crew = [
            Player(service, range(me, blocks, players), before, kind == "cluster_size=4k")
            for me in range(players)
        ]
        with ThreadPoolExecutor(players) as pool:
            list(pool.map(lambda player: player.play(15), crew))
    qemu.check(path)
    content = qemu.content(path)
    for player in crew:
        for block, data in player.model.items():
            assert content[block * BLOCK :][:BLOCK] == data, block
    if kind == "snapshot":
        assert qemu.content(path, snapshot=1) == before
