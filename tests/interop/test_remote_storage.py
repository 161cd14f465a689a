"""`nbdlink serve` in front of other servers: what it passes on, and what it adds."""

from __future__ import annotations

import errno
import os
import random
import signal

import pytest

import nbdlink
from nbdlink.errors import RequestError
from nbdlink.storage.remote import RemoteStorage

from ..storage.arrays import play, read
from .ours import Server, full, need, serving, sparse
from .peers import PEERS

pytestmark = pytest.mark.interop

SIZE = 1 << 20


def script(number):
    """Give requests that every server has to understand, aligned to 512 bytes."""
    chance = random.Random(number)
    for _ in range(60):
        begin, end = sorted(chance.randrange(0, SIZE + 1, 512) for _ in range(2))
        what = chance.choice(["write", "write", "zero", "trim", "cache"])
        detail = chance.randrange(256) if what == "write" else chance.random() < 0.5
        yield what, (begin, end), chance.random() < 0.5, detail


@pytest.mark.parametrize("peer", PEERS)
def test_any_server_is_a_storage(tmp_path, peer):
    need(peer)
    image = full(tmp_path / "disk.img", SIZE)
    model = bytearray(image.read_bytes())
    with PEERS[peer](image, tmp_path) as target:
        remote = RemoteStorage.open(target)
        play(remote, model, script(peer))
        assert read(remote) == model
        remote.flush()
        remote.close()
    assert image.read_bytes() == model


@pytest.mark.parametrize("peer", ["nbdkit", "qemu-nbd"])
def test_what_is_allocated_is_passed_on(tmp_path, run, peer):
    need(peer)
    image = sparse(tmp_path / "disk.img")
    with (
        PEERS[peer](image, tmp_path) as target,
        serving(tmp_path, "-f", "raw", target) as server,
    ):
        ours, theirs = (run("nbdinfo", "--map", str(uri)) for uri in (server.uri, target))
    assert ours == theirs
    assert len(ours.splitlines()) > 5


def test_tls_is_added(tmp_path, program, run):
    image = full(tmp_path / "disk.img", SIZE)
    keys = tmp_path / "keys.psk"
    keys.touch(0o600)
    keys.write_text(f"alice:{os.urandom(32).hex()}\n")
    inner = program("-f", "raw", image)
    outer = program("--tls-psk", keys, "-f", "raw", inner.uri, exports=1)
    where = outer.uri.replace("://", "://alice@", 1)
    run("nbdcopy", f"{where}&tls-psk-file={keys}", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == image.read_bytes()


def test_it_connects_with_tls(tmp_path, program, run):
    image = full(tmp_path / "disk.img", SIZE)
    keys = tmp_path / "keys.psk"
    keys.touch(0o600)
    keys.write_text(f"alice:{os.urandom(32).hex()}\n")
    inner = program("--tls-psk", keys, "-f", "raw", image, exports=1)
    where = inner.uri.replace("://", "://alice@", 1)
    outer = program("-f", "raw", f"{where}&tls-psk-file={keys}")
    run("nbdcopy", outer.uri, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == image.read_bytes()


def test_several_exports_are_named_as_at_their_servers(tmp_path, program):
    images = [full(tmp_path / name) for name in ("a.img", "b.img")]
    inner = program("-f", "raw", *images)
    outer = program("-f", "raw", *inner.uris, f"third={inner.uri}")
    names = [uri.partition("?")[0].rpartition("/")[2] for uri in outer.uris]
    assert names == ["a.img", "b.img", "third"]


def test_a_server_that_comes_back_is_used_again(tmp_path, program, run):
    image = full(tmp_path / "disk.img", SIZE)
    folder = tmp_path / "inner"
    folder.mkdir()
    with serving(folder, "-f", "raw", image) as inner:
        outer = program("-f", "raw", inner.uri)
        run("qemu-io", "-f", "raw", "-c", "write -P 1 0 4096", "-c", "flush", outer.uri)
    assert image.read_bytes()[:4096] == b"\1" * 4096
    assert run("qemu-io", "-f", "raw", "-c", "read 0 4096", outer.uri, check=False).returncode
    with serving(folder, "-f", "raw", image):
        run("qemu-io", "-f", "raw", "-c", "read -P 1 0 4096", outer.uri)


def test_after_a_crash_no_flush_succeeds(tmp_path, program):
    image = full(tmp_path / "disk.img", SIZE)
    folder = tmp_path / "inner"
    folder.mkdir()
    inner = Server(folder, ["-f", "raw", image])
    outer = program("-f", "raw", inner.uri)
    with nbdlink.connect(outer.uri) as client:
        client.pwrite(b"x", 0)
        os.kill(inner.pid, signal.SIGKILL)
        inner.end(status=-signal.SIGKILL)
        with pytest.raises(RequestError) as caught:
            client.flush()
        assert caught.value.errno == errno.EIO
        with serving(folder, "-f", "raw", image), pytest.raises(RequestError):
            client.flush()
    outer.end(status=1)  # which cannot flush at its end either
