"""Exports of several storages: whole to other programs, and mirrors when real members fail."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest

import nbdlink
from nbdlink.errors import NBDError
from nbdlink.uri import Target

from .ours import Server, full, need, serving
from .peers import _running, qemu_nbd
from .test_suites_fio import fio

pytestmark = pytest.mark.interop

SIZE = 8 << 20
LONG = 60


@pytest.fixture(autouse=True)
def _directories(tmp_path, monkeypatch):
    monkeypatch.setenv("NBDLINK_STATE_DIRECTORY", str(tmp_path / "state"))
    monkeypatch.setenv("NBDLINK_RUNTIME_DIRECTORY", str(tmp_path / "run"))


@pytest.fixture
def several(tmp_path):
    """Serve storages as one until the test ends."""
    with contextlib.ExitStack() as stack:
        yield lambda *words, **options: stack.enter_context(
            serving(tmp_path, "-f", "raw", *words, exports=1, **options)
        )


def mirror(*words, status=0):
    """Run `nbdlink mirror`; give what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "nbdlink", "mirror", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=LONG,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout if status == 0 else done.stderr


def members(member):
    """Give the states of a mirror's members, in their order."""
    (sheet,) = json.loads(mirror("status", "--json", member))
    return [each["state"] for each in sheet["members"]]


def until(wanted, member):
    """Wait until the members are in these states."""
    end = time.monotonic() + LONG
    while (found := members(member)) != wanted:
        assert time.monotonic() < end, found
        time.sleep(0.05)


def empty(*paths, size=SIZE):
    for path in paths:
        path.touch()
        os.truncate(path, size)
    return paths


# All kinds, as other programs see them.


@pytest.mark.parametrize(
    "words", [["--linear"], ["--stripe"], ["--stripe", "--stripe-unit", "64K"]]
)
def test_nbdcopy_writes_and_reads_all_of_it(several, run, tmp_path, words):
    parts = empty(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    server = several(*words, *parts)
    image = full(tmp_path / "image", 3 * SIZE)
    assert run("nbdinfo", "--size", server.uri).strip() == str(3 * SIZE)
    run("nbdcopy", "--flush", image, server.uri)
    run("nbdcopy", server.uri, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == image.read_bytes()
    data = [part.read_bytes() for part in parts]
    if "--linear" in words:
        assert b"".join(data) == image.read_bytes()
    else:
        unit = 64 << 10 if "64K" in words else 4096
        whole = image.read_bytes()
        assert data[1][:unit] == whole[unit : 2 * unit]
        assert data[0][unit : 2 * unit] == whole[3 * unit : 4 * unit]


def test_sizes_are_told_one_by_one(several, run, tmp_path):
    parts = empty(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    server = several("--linear", "--size", "1M,-,512K", *parts)
    assert run("nbdinfo", "--size", server.uri).strip() == str((1 << 20) + SIZE + (512 << 10))


def test_linear_has_no_limit_of_size(several, run, tmp_path):
    parts = empty(*(tmp_path / name for name in "abcd"), size=4 << 40)
    server = several("--linear", *parts)
    assert run("nbdinfo", "--size", server.uri).strip() == str(16 << 40)
    with nbdlink.connect(server.uri) as nbd:
        nbd.pwrite(b"x" * 8192, (8 << 40) - 4096)
        assert nbd.pread(8192, (8 << 40) - 4096) == b"x" * 8192


@pytest.mark.parametrize("kind", ["linear", "stripe", "mirror"])
def test_fio_reads_what_it_wrote(several, run, tmp_path, kind):
    parts = empty(tmp_path / "a", tmp_path / "b")
    server = several(f"--{kind}", *parts)
    how = ["--name=one", "--rw=randwrite", f"--size={SIZE // 2}", "--verify=crc32c"]
    how += ["--bsrange=512-128k", "--verify_backlog=32"]
    (job,) = fio(run, server.uri, tmp_path, *how)
    assert job["read"]["total_ios"] > 0
    server.end()
    if kind == "mirror":
        assert parts[0].read_bytes() == parts[1].read_bytes()


# Mirrors whose members fail.


@pytest.fixture
def qemu(tmp_path):
    """Run qemu-nbd, which can be killed and started again; give start, and its URI."""
    need("qemu-nbd")
    (image,) = empty(tmp_path / "remote")
    uri = str(Target(socket=str(tmp_path / "qemu.sock"), export="data"))
    with contextlib.ExitStack() as stack:

        def start():
            stack.enter_context(qemu_nbd(image, tmp_path))

        start()
        yield start, stack.close, uri, image


def test_a_dead_server_is_dropped_under_load_and_rebuilt(several, run, tmp_path, qemu):
    start, stop, uri, image = qemu
    (local,) = empty(tmp_path / "local")
    server = several("--mirror", local, uri)
    until(["good", "good"], local)
    how = ["--name=one", "--rw=randwrite", f"--size={SIZE}", "--verify=crc32c", "--bs=4k"]
    with nbdlink.connect(server.uri) as nbd:
        nbd.pwrite(b"x" * 4096, 0)
        stop()
        nbd.pwrite(b"y" * 4096, 0)
        assert members(local) == ["good", "stale"]
    (job,) = fio(run, server.uri, tmp_path, *how)
    assert job["read"]["total_ios"] == SIZE // 4096
    start()
    assert mirror("rebuild", uri) == f"{uri} is good\n"
    with nbdlink.connect(server.uri) as nbd:
        nbd.pwrite(b"z" * 4096, 4096)
    assert members(local) == ["good", "good"]
    server.end()
    stop()
    assert image.read_bytes() == local.read_bytes()


def test_a_stale_member_alone_is_refused(several, tmp_path, qemu):
    _, stop, uri, _ = qemu
    (local,) = empty(tmp_path / "local")
    with serving(tmp_path, "-f", "raw", "--mirror", local, uri, exports=1) as server:
        until(["good", "good"], local)
        with nbdlink.connect(server.uri) as nbd:
            nbd.pwrite(b"x" * 4096, 0)
            stop()
            nbd.pwrite(b"y" * 4096, 0)
    assert members(uri) == ["good", "stale"]
    command = ["serve", "-f", "raw", "--degraded", "-k", tmp_path / "s", "--mirror", uri]
    done = subprocess.run(
        [sys.executable, "-m", "nbdlink", *map(str, command)],
        capture_output=True,
        text=True,
        timeout=LONG,
        check=False,
    )
    assert done.returncode == 1
    assert f"only stale members are named; {local} has newer data" in done.stderr


@contextlib.contextmanager
def faulty(folder, size=SIZE):
    """Have nbdkit serve a disk in memory; give its URI and the file that makes writes fail."""
    need("nbdkit")
    target = Target(socket=str(folder / "faulty.sock"))
    switch = folder / "fail"
    command = ["nbdkit", "-f", "-U", str(target.socket), "--filter=error", "memory", str(size)]
    command += ["error-pwrite-rate=100%", f"error-pwrite-file={switch}", "error-pwrite=ENOSPC"]
    with _running(command, target):
        yield str(target), switch


def test_a_server_that_fails_is_dropped_and_comes_back(several, run, tmp_path):
    (local,) = empty(tmp_path / "local")
    with faulty(tmp_path) as (uri, switch):
        server = several("--mirror", uri, local)
        until(["good", "good"], local)
        image = full(tmp_path / "image", SIZE)
        switch.touch()
        run("nbdcopy", "--flush", image, server.uri)
        assert members(local) == ["stale", "good"]
        assert "is not rebuilt: writing failed" in mirror("rebuild", uri, status=1)
        switch.unlink()
        mirror("rebuild", uri)
        assert members(local) == ["good", "good"]
        run("nbdcopy", uri, tmp_path / "theirs")
        server.end()
    assert (tmp_path / "theirs").read_bytes() == local.read_bytes() == image.read_bytes()


def test_a_full_disk_is_dropped_though_its_record_is_on_it(tmp_path, run):
    """On a file system of one megabyte, a hole of eight can be made, and not be filled."""
    need("unshare", "mount")
    folder = tmp_path / "small"
    folder.mkdir()
    words = ["unshare", "-m", "sh", "-c"]
    words += [f'mount -t tmpfs -o size=1M none {folder} && truncate -s {SIZE} {folder}/a; "$@"']
    (other,) = empty(tmp_path / "b")
    with Stopping(
        Server(
            tmp_path,
            ["-f", "raw", "--mirror", folder / "a", other],
            under=[*words, "sh"],
            exports=1,
        )
    ) as server:
        image = full(tmp_path / "image", SIZE)
        run("nbdcopy", "--flush", image, server.uri)
        assert members(other) == ["stale", "good"]
        run("nbdcopy", server.uri, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == other.read_bytes() == image.read_bytes()


class Stopping:
    """Ends a server with the block."""

    def __init__(self, server):
        self.server = server

    def __enter__(self):
        return self.server

    def __exit__(self, *_):
        self.server.end()


# A server that is killed.


@pytest.mark.timeout(240)
@pytest.mark.parametrize("seed", range(2))
def test_what_was_acknowledged_is_there_after_a_kill(tmp_path, seed):
    """Writers note what was answered; the server is killed; a new one has all of that."""
    chance = random.Random(seed)
    block, blocks = 4096, SIZE // 4096
    parts = empty(tmp_path / "a", tmp_path / "b")
    words = ["-f", "raw", "--mirror", *parts]
    answered = [0] * blocks  # the last write of each block that was answered
    asked = [0] * blocks  # and that may have been done
    for _ in range(2):
        server = Server(tmp_path, words, exports=1)
        enough = threading.Event()

        limit = sum(answered) + chance.randrange(50, 400)

        def work(number, uri=server.uri, enough=enough, limit=limit):
            mine = random.Random(number)
            with contextlib.suppress(NBDError, OSError), nbdlink.connect(uri) as nbd:
                while True:
                    place = mine.randrange(number, blocks, 4)
                    asked[place] += 1
                    data = (place * 1000 + asked[place]).to_bytes(8) * (block // 8)
                    nbd.pwrite(data, place * block, fua=mine.random() < 0.1)
                    answered[place] = asked[place]
                    if sum(answered) > limit:
                        enough.set()

        threads = [threading.Thread(target=work, args=(each,), daemon=True) for each in range(4)]
        for thread in threads:
            thread.start()
        assert enough.wait(LONG)
        os.kill(server.pid, signal.SIGKILL)
        for thread in threads:
            thread.join(LONG)
        server._process.communicate()
        (tmp_path / "pid").unlink(missing_ok=True)

        server = Server(tmp_path, words, exports=1)
        until(["good", "good"], parts[0])
        with nbdlink.connect(server.uri) as nbd:
            first = nbd.pread(SIZE, 0)
            for place in range(blocks):
                data = first[place * block : (place + 1) * block]
                found = max(0, int.from_bytes(data[:8]) - place * 1000)
                assert answered[place] <= found <= asked[place], place
                assert data == data[:8] * (block // 8), place
            assert nbd.pread(SIZE, 0) == first
        server.end()
        assert parts[0].read_bytes() == parts[1].read_bytes() == first
