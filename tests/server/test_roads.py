"""Whatever way a request takes through the server, it means the same.

Random requests of all sizes from three connections at once, one in each style of headers, each
with a region of the file for itself and an array of bytes that says what must be there.
"""

from __future__ import annotations

import itertools
import os
import random
import tempfile
import threading
from pathlib import Path

import pytest

from nbdlink.server import engine, workers
from nbdlink.server.workers import Workers
from nbdlink.storage.raw import RawStorage

from .fakes import CACHE, DF, FLUSH, FUA, NO_HOLE, READ, TRIM, WRITE, WRITE_ZEROES
from .styles import STYLES, StyledClient

K, M = 1 << 10, 1 << 20
REGION = 4 * M
LONGEST = 3 * M
EDGES = [32 * K, 128 * K, 256 * K, M]
FOLDERS = {"disk": tempfile.gettempdir(), "memory": "/dev/shm"}  # the latter has no RWF_NOWAIT


class GeneralStorage(RawStorage):
    """A file whose requests all come by the storage."""

    plain_file = None

    def lend(self, offset, length):
        raise AssertionError("a storage that is no plain file is not asked for its pages")


class QuickStorage(GeneralStorage):
    """The same, without threads of their own."""

    waits = False


def impatient(monkeypatch):
    """Have every storage taken for a slow one."""
    sleeps = itertools.count()
    usage = type("Usage", (), {"ru_nvcsw": property(lambda _: next(sleeps))})()
    monkeypatch.setattr(engine, "_SLOW", -1)
    monkeypatch.setattr(engine, "getrusage", lambda _: usage)


def forgetful(monkeypatch):
    """Have a page cache that lacks every third page that somebody asks for."""
    preadv, rng = os.preadv, random.Random(3)

    def cold(fd, buffers, offset, flags=0):
        if flags & os.RWF_NOWAIT and rng.randrange(3) == 0:
            raise BlockingIOError
        return preadv(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", cold)


def forgetful_and_alone(monkeypatch):
    """The same, where no thread is to be had for what is not there."""
    forgetful(monkeypatch)
    monkeypatch.setattr(workers._PROCESS, "threads", 0)


ROADS = {
    "plain": (RawStorage, lambda _: None),
    "forgetful": (RawStorage, forgetful),
    "forgetful and alone": (RawStorage, forgetful_and_alone),
    "general": (GeneralStorage, lambda _: None),
    "quick": (QuickStorage, lambda _: None),
    "impatient": (RawStorage, impatient),
    "no threads": (GeneralStorage, lambda patch: patch.setattr(workers._PROCESS, "threads", 0)),
    "no memory": (GeneralStorage, lambda patch: patch.setattr(workers._PROCESS, "bytes", 0)),
    "small queue": (GeneralStorage, lambda patch: patch.setattr(workers, "_QUEUE", 1)),
}


def some_length(rng):
    match rng.randrange(4):
        case 0:
            return rng.randrange(1, 9000)
        case 1:
            return rng.choice(EDGES) + rng.choice([-1, 0, 0, 1])
        case 2:
            return 512 * rng.randrange(1, 600)
    return rng.randrange(1, LONGEST)


class Script:
    """Random requests to one region, in batches whose requests do not overlap where one writes.

    Attributes:
        model: what the region must hold.
    """

    def __init__(self, client, start, content, seed):
        self.client = client
        self.start = start
        self.model = bytearray(content)
        self.failure = None
        self._rng = random.Random(seed)
        self._cookies = itertools.count(seed << 32)

    def run(self, rounds):
        try:
            for _ in range(rounds):
                self._round()
        except BaseException as failure:
            self.failure = failure

    def _round(self):
        batch, taken, budget = {}, [], LONGEST
        for _ in range(self._rng.choice([1, 1, 2, 8, 30])):
            request = self._request(taken)
            if request is not None and (budget := budget - request["length"]) > -LONGEST:
                batch[next(self._cookies)] = request
        for cookie, request in batch.items():
            self.client.expect(request["command"], request["offset"], request["length"], cookie)
        stream = b"".join(self._packed(cookie, **request) for cookie, request in batch.items())
        sender = threading.Thread(target=self.client.send, args=(stream,))
        sender.start()
        trimmed = []
        while batch:
            answer = self.client.answer()
            request = batch.pop(answer.cookie)
            assert answer.error == 0
            begin = request["offset"] - self.start
            end = begin + request["length"]
            match request["command"]:
                case 0:
                    assert answer.data == self.model[begin:end]
                case 1:
                    self.model[begin:end] = request["data"]
                case 6:
                    self.model[begin:end] = bytes(end - begin)
                case 4:
                    trimmed.append((begin, end))
        sender.join()
        for begin, end in trimmed:  # whatever is there now is right
            self.model[begin:end] = self.client.ask(READ, self.start + begin, end - begin)[1]

    def _packed(self, cookie, command, offset, length, flags, data):
        length = 0 if data else length
        return self.client.pack(command, offset, length, flags=flags, data=data, cookie=cookie)

    def _request(self, taken):
        rng = self._rng
        command = rng.choice([READ] * 6 + [WRITE] * 6 + [WRITE_ZEROES, TRIM, CACHE, FLUSH])
        flags, data = 0, b""
        if command == FLUSH:
            return dict(command=FLUSH, offset=0, length=0, flags=0, data=b"")
        length = some_length(rng)
        begin = rng.randrange(REGION - length)
        writes = command in (WRITE, WRITE_ZEROES, TRIM)
        for other_begin, other_end, other_writes in taken:
            if begin < other_end and other_begin < begin + length and (writes or other_writes):
                return None
        taken.append((begin, begin + length, writes))
        if writes and rng.randrange(20) == 0:
            flags |= FUA
        if command == WRITE_ZEROES and rng.randrange(2):
            flags |= NO_HOLE
        if command == READ and self.client.style and rng.randrange(4) == 0:
            flags |= DF
        if command == WRITE:
            data = rng.randbytes(length)
        return dict(
            command=command, offset=self.start + begin, length=length, flags=flags, data=data
        )


def read_only_model(path, start):
    with path.open("rb") as file:
        file.seek(start)
        return file.read(REGION)


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("transport", ["tcp", "unix"])
@pytest.mark.parametrize("road", ROADS)
def test_every_road_leads_to_the_same_bytes(serve, monkeypatch, road, transport, folder):
    if not Path(FOLDERS[folder]).is_dir():
        pytest.skip(f"there is no {FOLDERS[folder]}")
    kind, prepare = ROADS[road]
    prepare(monkeypatch)
    seed = int(os.environ.get("NBDLINK_SEED", "7"))
    with tempfile.NamedTemporaryFile(dir=FOLDERS[folder]) as file:
        path = Path(file.name)
        os.truncate(path, 3 * REGION + 777)  # a hole at first
        with path.open("r+b") as begin:
            begin.write(os.urandom(REGION // 2))
        options = {} if transport == "unix" else {"unix": None}
        service = serve({"": kind.open(path)}, **options)
        scripts = []
        for number, style in enumerate(STYLES.values()):
            client = StyledClient(service, style)
            start = number * REGION + 77
            scripts.append(Script(client, start, read_only_model(path, start), seed + number))
        threads = [threading.Thread(target=script.run, args=(12,)) for script in scripts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for script in scripts:
            script.client.sock.close()
        for script in scripts:
            if script.failure:
                raise script.failure
            assert read_only_model(path, script.start) == script.model


@pytest.mark.parametrize("road", ["plain", "general", "impatient"])
def test_the_roads_are_the_ones_that_are_meant(serve, monkeypatch, tmp_path, road):
    kind, prepare = ROADS[road]
    prepare(monkeypatch)
    submitted = []
    submit = Workers.submit

    def counted(*arguments, **options):
        submitted.append(arguments)
        return submit(*arguments, **options)

    monkeypatch.setattr(Workers, "submit", counted)
    path = tmp_path / "image"
    path.write_bytes(bytes(M))
    with StyledClient(serve({"": kind.open(path)}), 0) as client:
        batch = [client.pack(WRITE, 0, data=bytes(20_000), cookie=i) for i in range(3)]
        for _ in range(2):
            for cookie in range(3):
                client.expect(WRITE, 0, 20_000, cookie)
            client.send(b"".join(batch))
            for _ in range(3):
                assert client.answer().error == 0
    assert bool(submitted) == (road != "plain")
