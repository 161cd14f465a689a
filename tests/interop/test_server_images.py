"""What `nbdlink serve` makes of images, beside qemu-nbd and for real clients."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

import nbdlink
from nbdlink.client.negotiate import Negotiation
from nbdlink.uri import Target
from tests.listening import is_listening

from .ours import allocated, full, need, sparse

pytestmark = pytest.mark.interop

SIZE = 8 << 20


@pytest.fixture
def image(tmp_path):
    return full(tmp_path / "disk.img")


@contextlib.contextmanager
def qemu_nbd(folder, *words):
    """Run the real one, on a Unix socket; give its URI."""
    need("qemu-nbd")
    path = folder / "qemu.sock"
    process = subprocess.Popen(
        ["qemu-nbd", "--persistent", "--shared=5", "-k", path, *map(str, words)],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while not is_listening(path):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        yield f"nbd+unix:///?socket={path}"
    finally:
        process.terminate()
        process.communicate(timeout=60)


# How writes come to the disk, as the kernel sees it.


def traced(tmp_path, image, mode, work):
    """Serve an image with a cache mode under strace; give the system calls on the image.

    `work` is called with a connection. What was called until it came back is told apart from
    what came at the end.
    """
    need("strace")
    log = tmp_path / "strace.log"
    under = ["strace", "-f", "-y", "-o", log, "-P", image]
    calls = (
        "trace=openat,preadv,preadv2,pread64,pwritev,pwritev2,pwrite64,fdatasync,fsync,fallocate"
    )
    command = [
        *under, "-e", calls, sys.executable, "-m", "nbdlink", "serve", "--processes", "0",
        "-f", "raw", "--cache", mode, "-k", tmp_path / "socket", image,
    ]  # fmt: skip
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    try:
        uri = process.stdout.readline().split(" is ")[0]
        with nbdlink.connect(uri) as nbd:
            began = len(log.read_text().splitlines())
            work(nbd)
            during = log.read_text().splitlines()[began:]
    finally:
        # strace passes signals on only if it has a terminal; the server is its child.
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for child in children:
            os.kill(int(child), 15)
        process.communicate(timeout=60)
    opening = [line for line in log.read_text().splitlines() if "openat" in line]
    return opening, during, log.read_text()


def write_and_flush(nbd):
    nbd.pwrite(b"x" * 8192, 4096)
    nbd.pwrite(b"y" * 300_000, 1 << 20)
    nbd.flush()


def test_writeback_writes_to_the_cache_and_syncs_when_told(tmp_path, image):
    opening, during, _ = traced(tmp_path, image, "writeback", write_and_flush)
    assert not any("O_DIRECT" in line for line in opening)
    assert not any("RWF_DSYNC" in line for line in during)
    assert "fdatasync" in during[-1]
    assert sum("fdatasync(" in line for line in during) == 1


def test_writethrough_syncs_each_write_before_its_reply(tmp_path, image):
    def work(nbd):
        for number in range(3):
            nbd.pwrite(b"x" * 4096, number * 65536)
        nbd.pwrite(b"y" * 300_000, 1 << 20)

    opening, during, _ = traced(tmp_path, image, "writethrough", work)
    assert not any("O_DIRECT" in line for line in opening)
    writes = [line for line in during if "pwrite" in line and "<unfinished" not in line]
    assert len(writes) == 4
    assert all("RWF_DSYNC" in line for line in writes), writes


@pytest.mark.parametrize("mode", ["none", "directsync"])
def test_without_the_page_cache_all_is_aligned(tmp_path, image, mode):
    def work(nbd):
        nbd.pwrite(b"x" * 777, 333)
        nbd.pwrite(b"y" * 300_001, 1 << 20 | 1)
        assert nbd.pread(1000, 200)[133:910] == b"x" * 777

    opening, during, _ = traced(tmp_path, image, mode, work)
    assert any("O_DIRECT" in line and "O_RDWR" in line for line in opening)
    requests = [line for line in during if "iov_len=" in line]
    assert requests
    for line in requests:
        assert not int(re.search(r"iov_len=(\d+)", line)[1]) % 512, line
    # As two lines where another thread came in between.
    writes = [line for line in during if "pwritev2(" in line]
    assert all(("RWF_DSYNC" in line) == (mode == "directsync") for line in writes)


def test_unsafe_syncs_nothing_ever(tmp_path, image):
    def work(nbd):
        write_and_flush(nbd)
        nbd.pwrite(b"z", 0, fua=True)

    _, _, log = traced(tmp_path, image, "unsafe", work)
    assert not re.search(r"sync\(|RWF_DSYNC", log)
    assert log.count("pwrite") == 3


# Space.


@pytest.mark.parametrize(
    ("words", "shrinks"),
    [
        (["--detect-zeroes", "unmap"], True),
        (["--detect-zeroes", "on"], False),
        ([], False),
    ],
)
def test_writes_of_zeroes_give_space_back_if_that_is_wanted(program, image, words, shrinks):
    server = program("-f", "raw", *words, image)
    before = allocated(image)
    with nbdlink.connect(server.uri) as nbd:
        nbd.pwrite(bytes(4 << 20), 0)
        nbd.flush()
        assert nbd.pread(4 << 20, 0) == bytes(4 << 20)
    assert (allocated(image) <= before - (4 << 20)) is shrinks


@pytest.mark.parametrize("mode", ["ignore", "unmap"])
def test_space_is_given_back_unless_that_is_to_be_ignored(program, image, run, mode):
    server = program("-f", "raw", "--discard", mode, image)
    before = allocated(image)
    run("qemu-io", "-f", "raw", server.uri, "-d", "unmap", "-c", "discard 0 4M")
    run("qemu-io", "-f", "raw", server.uri, "-c", "write -z -u 4M 2M")
    gone = before - allocated(image)
    assert gone == 0 if mode == "ignore" else gone >= 6 << 20


# Overlays.


def test_an_overlay_is_for_all_clients_and_not_for_ever(program, image, run):
    before = image.read_bytes()
    server = program("-f", "raw", "-s", image)
    with nbdlink.connect(server.uri) as one, nbdlink.connect(server.uri) as two:
        one.pwrite(b"written" * 1000, 12345)
        assert two.pread(7000, 12345) == b"written" * 1000
    run("qemu-io", "-f", "raw", server.uri, "-c", "write -P 5 3M 1M")
    run("qemu-io", "-f", "raw", server.uri, "-c", "read -P 5 3M 1M")
    server.end()
    assert image.read_bytes() == before


def test_an_overlay_takes_a_copy_of_everything(program, tmp_path, run):
    empty, source = sparse(tmp_path / "empty.img"), full(tmp_path / "source.img", seed=7)
    server = program("-f", "raw", "-s", empty)
    run("nbdcopy", "--connections=4", source, server.uri)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", source, server.uri)


def test_an_overlay_over_an_image_of_a_format(program, qcow2, run):
    before = qcow2.read_bytes()
    server = program("-s", qcow2)
    run("qemu-io", "-f", "raw", server.uri, "-c", "write -P 5 3M 1M", "-c", "read -P 5 3M 1M")
    server.end()
    assert qcow2.read_bytes() == before


# Formats.


@pytest.mark.parametrize("kind", ["vmdk", "vdi", "vpc", "vhdx", "qcow2"])
def test_an_image_is_what_it_was_made_from(program, tmp_path, run, kind):
    pytest.importorskip("dissect.hypervisor")
    source, path = sparse(tmp_path / "source.img"), tmp_path / f"disk.{kind}"
    run("qemu-img", "convert", "-f", "raw", "-O", kind, source, path)
    server = program("-r", path)
    copy = tmp_path / "copy.img"
    run("nbdcopy", "--connections=4", server.uri, copy)
    run("qemu-img", "compare", "-f", "raw", "-F", kind, copy, path)


def test_a_found_raw_image_is_not_to_be_turned_into_something_else(program, image, run, tmp_path):
    trap = tmp_path / "trap.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "/etc/passwd", "-F", "raw", trap)
    server = program(image)
    before = image.read_bytes()
    done = run("nbdcopy", trap, server.uri, check=False)
    assert done.returncode != 0
    assert "Operation not permitted" in done.stderr
    assert image.read_bytes()[:512] == before[:512]


def test_who_says_raw_may_write_anything(program, image, run, tmp_path):
    trap = tmp_path / "trap.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", trap, "1M")
    server = program("-f", "raw", image)
    run("nbdcopy", trap, server.uri)
    server.end()
    assert image.read_bytes().startswith(b"QFI\xfb")


# Locks; more of them in tests/storage/test_locks.py.


@pytest.fixture
def qcow2(tmp_path, image, run):
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", image, path)
    return path


@pytest.mark.parametrize("words", [[], ["-r"], ["-s"]])
def test_an_image_that_qemu_nbd_writes_to_is_not_served(tmp_path, qcow2, run, words):
    with qemu_nbd(tmp_path, "-f", "qcow2", qcow2):
        serve = [sys.executable, "-m", "nbdlink", "serve", "-k", tmp_path / "socket"]
        done = run(*serve, *words, qcow2, check=False)
    assert done.returncode == 1
    assert f"{qcow2} is in use by qemu-nbd (process " in done.stderr
    assert len(done.stderr.splitlines()) == 2


def in_use(done):
    return done.returncode != 0 and "Is another process using the image" in done.stderr


def test_an_image_that_is_served_is_not_qemus(program, tmp_path, qcow2, run):
    server = program("-f", "qcow2", qcow2)
    assert in_use(run("qemu-nbd", "-f", "qcow2", "-k", tmp_path / "q", qcow2, check=False))
    assert in_use(run("qemu-img", "snapshot", "-c", "x", qcow2, check=False))
    assert in_use(run("qemu-img", "info", qcow2, check=False))
    server.end()
    run("qemu-img", "info", qcow2)


def test_a_daemon_keeps_its_image(tmp_path, qcow2, run):
    pid_file = tmp_path / "pid"
    words = ["--fork", "--pid-file", pid_file, "-k", tmp_path / "socket", qcow2]
    run(sys.executable, "-m", "nbdlink", "serve", *words)
    pid = int(pid_file.read_text())
    try:
        assert in_use(run("qemu-img", "info", qcow2, check=False))
    finally:
        handle = os.pidfd_open(pid)
        os.kill(pid, 15)
        select.select([handle], [], [], 60)
        os.close(handle)
    run("qemu-img", "info", qcow2)


def test_two_servers_may_have_a_raw_image_and_a_device_move_between_them(program, image):
    first, second = program("-f", "raw", image), program("-f", "raw", image)
    with nbdlink.connect(first.uri) as one, nbdlink.connect(second.uri) as two:
        one.pwrite(b"moved", 4096)
        assert two.pread(5, 4096) == b"moved"


# Internal snapshots.


@pytest.mark.parametrize("word", ["before", "1", "snapshot.name=before", "snapshot.id=1"])
def test_an_internal_snapshot_is_served_as_it_was(program, qcow2, image, run, word):
    run("qemu-img", "snapshot", "-c", "before", qcow2)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 9 0 4M", qcow2)
    server = program("-l", word, qcow2)
    with nbdlink.connect(server.uri) as nbd:
        assert nbd.export.read_only
        assert nbd.pread(SIZE, 0) == image.read_bytes()


def test_a_snapshot_that_is_not_there_is_named(qcow2, run):
    done = run(sys.executable, "-m", "nbdlink", "serve", "-l", "nothing", qcow2, check=False)
    assert done.returncode == 1
    assert "nothing" in done.stderr
    assert len(done.stderr.splitlines()) <= 2


# QEMU's metadata contexts.


@pytest.fixture
def chain(tmp_path, run):
    """An image with two bitmaps that is based on a qcow2 image that is based on a raw one."""
    base, middle, top = (tmp_path / name for name in ("base.img", "middle.qcow2", "top.qcow2"))
    sparse(base)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", middle)
    run("qemu-io", "-f", "qcow2", "-c", "write 2M 256k", middle)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", middle, "-F", "qcow2", top)
    for name in ("one", "two"):
        run("qemu-img", "bitmap", "--add", top, name)
        run("qemu-io", "-f", "qcow2", "-c", f"write {len(name)}M 100k", "-c", "write 5M 1M", top)
    return top


ASKING = ["-A", "-B", "one", "-B", "two"]


def mapped(run, uri, context):
    return json.loads(run("nbdinfo", "--json", f"--map={context}", uri))


@pytest.mark.parametrize(
    "context", ["qemu:allocation-depth", "qemu:dirty-bitmap:one", "qemu:dirty-bitmap:two"]
)
def test_contexts_tell_what_qemu_nbds_do(program, tmp_path, run, chain, context):
    with qemu_nbd(tmp_path, "-r", "-f", "qcow2", *ASKING, chain) as theirs:
        expected = mapped(run, theirs, context)
    server = program("-r", "-f", "qcow2", *ASKING, chain, exports=1)
    assert mapped(run, server.uri, context) == expected
    assert len(expected) > 2


def test_the_depth_of_an_overlay_is_qemu_nbds(program, tmp_path, run, chain):
    with qemu_nbd(tmp_path, "-s", "-f", "qcow2", "-A", chain) as theirs:
        run("qemu-io", "-f", "raw", theirs, "-c", "write 7M 64k")
        expected = mapped(run, theirs, "qemu:allocation-depth")
    server = program("-s", "-f", "qcow2", "-A", chain)
    run("qemu-io", "-f", "raw", server.uri, "-c", "write 7M 64k")
    assert mapped(run, server.uri, "qemu:allocation-depth") == expected


@pytest.mark.parametrize(
    "queries",
    [(), ("qemu:",), ("qemu:allocation-depth",), ("qemu:dirty-bitmap:",), ("base:", "qemu:x")],
)
@pytest.mark.parametrize("words", [[], ["-A"], ASKING], ids=["nothing", "depth", "all"])
def test_queries_are_answered_as_by_qemu_nbd(program, tmp_path, chain, queries, words):
    def ask(uri):
        with Negotiation.best(Target.parse(uri)) as negotiation:
            return negotiation.list_meta_contexts(queries=queries)

    with qemu_nbd(tmp_path, "-r", "-f", "qcow2", *words, chain) as theirs:
        expected = ask(theirs)
    server = program("-r", "-f", "qcow2", *words, chain, exports=1)
    assert sorted(ask(server.uri)) == sorted(expected)


def test_nbdlink_map_shows_the_depth(program, chain, run):
    server = program("-r", "-f", "qcow2", *ASKING, chain, exports=1)
    words = ["map", "--json", "--context", "qemu:allocation-depth", server.uri]
    ours = json.loads(run(sys.executable, "-m", "nbdlink", *words))
    assert ours == mapped(run, server.uri, "qemu:allocation-depth")
    assert {row["description"] for row in ours} >= {"local", "backing depth 2"}


def test_a_bitmap_that_is_not_there_is_named(chain, run):
    words = ["serve", "-r", "-B", "three", chain]
    done = run(sys.executable, "-m", "nbdlink", *words, check=False)
    assert done.returncode == 1
    assert f"{chain} has no bitmap 'three'" in done.stderr
