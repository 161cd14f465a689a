"""Rows of enbd-server's manual: ports, identity, signals, block sizes, and how writes are done."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import types

import pytest

import nbdlink
from nbdlink.cli import serve
from nbdlink.cli.storage import storage_spec
from nbdlink.client.negotiate import Negotiation
from nbdlink.storage.blocksize import BlockSizes
from nbdlink.storage.open import CACHE_MODES, Part
from nbdlink.storage.writebehind import DEFAULT_MEMORY
from nbdlink.uri import Target

from ..server.fakes import RawClient
from ..server.gated import claimed
from .programs import end, run, serving
from .programs import nbdlink as program

SIZE = 1 << 20


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where pid files are."""
    monkeypatch.setenv("NBDLINK_RUNTIME_DIRECTORY", str(tmp_path / "run"))
    return tmp_path / "run"


def uri_of(line):
    return line.partition(" is ")[0]


# Ports.


@pytest.fixture
def neighbours():
    """Two ports next to each other, of which somebody listens on the first."""
    for _ in range(100):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            try:
                socket.create_server(("127.0.0.1", port + 1)).close()
            except (OSError, OverflowError):
                continue
            yield port, port + 1
            return
    pytest.fail("no two ports next to each other are free")


def test_of_several_ports_the_first_free_one_is_taken_and_told(image, neighbours):
    words = ["-b", "127.0.0.1", "-p", "-".join(map(str, neighbours)), image]
    with serving(*words) as (_, (line,)):
        assert uri_of(line) == f"nbd://127.0.0.1:{neighbours[1]}"
        with nbdlink.connect(uri_of(line)) as nbd:
            assert nbd.size == SIZE


def test_a_port_is_taken_only_if_all_addresses_have_it(image, neighbours):
    words = ["-b", "127.0.0.2", "-b", "127.0.0.1", "-p", "-".join(map(str, neighbours)), image]
    with serving(*words) as (_, (line,)):
        assert uri_of(line) == f"nbd://127.0.0.2:{neighbours[1]}"


def test_if_no_port_of_several_is_free_that_is_said(image, neighbours):
    with socket.create_server(("127.0.0.1", neighbours[1])):
        ports = "-".join(map(str, neighbours))
        done = program("serve", "-f", "raw", "-b", "127.0.0.1", "-p", ports, image)
    assert done.returncode == 1
    ports = "from {} to {}".format(*neighbours)
    assert done.stderr.startswith(f"nbdlink: cannot listen: all ports {ports} are in use\n")


@pytest.mark.parametrize(
    ("port", "says"),
    [
        ("x", "'x' is not a port"),
        ("65536", "'65536' is not a port"),
        ("-5", "'-5' is not a port"),
        ("5-", "'5-' is not a port"),
        ("0-5", "there is no port in 0-5"),
        ("6-5", "there is no port in 6-5"),
    ],
)
def test_what_is_no_port_is_refused(image, port, says):
    done = program("serve", f"--port={port}", image)
    assert (done.returncode, done.stderr.splitlines()[0]) == (2, f"nbdlink: {says}")


# Identity.


def test_the_pid_file_is_named_after_the_signature(image, tmp_path, folder):
    with serving("-k", tmp_path / "s", "--signature", "a/b", image) as (process, _):
        path = folder / "server-a%2Fb.pid"
        assert path.read_text() == f"{process.pid}\n"
        assert end(process)[0] == 0
    assert not path.exists()


def test_a_second_server_with_the_same_signature_is_refused(image, tmp_path, folder):
    with serving("-f", "raw", "-k", tmp_path / "s", "--signature", "nbd", image) as (process, _):
        again = program("serve", "-k", tmp_path / "t", "--signature", "nbd", image)
        assert again.returncode == 1
        first, _hint = again.stderr.splitlines()
        assert first == f"nbdlink: {folder}/server-nbd.pid belongs to process {process.pid}"
        words = ["-k", tmp_path / "t", "--signature", "nbd", "--pid-file", tmp_path / "pid"]
        with serving("-f", "raw", "-r", *words, image) as (_, (line,)):
            assert uri_of(line)


def test_each_of_several_signatures_has_a_pid_file(image, tmp_path, folder):
    words = ["--signature", "one=1", "--signature", f"two={'2' * 199}/"]
    exports = [f"{name}={image}" for name in ("one", "two", "three")]
    with serving("-k", tmp_path / "s", *words, *exports, lines=3):
        names = {path.name for path in folder.iterdir()}
        assert len(names) == 2
        assert "server-1.pid" in names


# Signals.


def test_sighup_renews_the_connections_that_somebody_looks_after(image, tmp_path):
    path = tmp_path / "s"
    with serving("-k", path, image, start_new_session=True) as (process, _):
        service = types.SimpleNamespace(addresses=[str(path)])
        with (
            claimed(RawClient(service, handshake=False), 0, notice=4000) as supervised,
            RawClient(service) as other,
        ):
            assert supervised.write(0, b"it is served") == 0
            process.send_signal(signal.SIGHUP)
            assert supervised.hung_up()
            assert other.write(0, b"still here") == 0
        assert "a connection is to be renewed" in end(process)[1]


def test_sighup_ends_a_server_whose_terminal_is_closed(image, tmp_path):
    ours, theirs = os.openpty()
    words = [sys.executable, "-m", "nbdlink", "serve", "-k", tmp_path / "s", image]
    server = subprocess.Popen(
        [*map(str, ["setsid", "--ctty", *words])],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs)
    try:
        assert server.stdout.readline()
        os.close(ours)
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.communicate()


# Block sizes.


def test_block_sizes_are_offered_and_demanded(image, tmp_path):
    path = tmp_path / "s"
    os.truncate(image, SIZE + 1000)
    with serving("-k", path, "--block-size", "4096,64K,1M", image) as (_, (line,)):
        with Negotiation(Target.parse(uri_of(line))) as negotiation:
            export = negotiation.info()
        assert (export.minimum_block, export.preferred_block) == (4096, 65536)
        assert (export.maximum_payload, export.size) == (1 << 20, SIZE)
        with RawClient(types.SimpleNamespace(addresses=[str(path)])) as client:
            assert client.write(4096, bytes(4096)) == 0
            assert client.write(512, bytes(4096)) == 22


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ("1000", "the protocol does not allow a minimum block size of 1000"),
        ("4096,512", "the protocol does not allow a preferred block size of 512"),
        ("512,512,1000", "1000 cannot be the longest payload"),
        ("512,512,1G", "1073741824 cannot be the longest payload"),
        ("1,2,3,4", "'1,2,3,4' are more than three block sizes"),
        ("x", "'x' is not a size"),
    ],
)
def test_block_sizes_that_cannot_be_are_refused(image, sizes, says):
    done = program("serve", "-f", "raw", "--block-size", sizes, image)
    assert done.returncode == 2
    assert says in done.stderr


def test_an_image_smaller_than_a_block_is_refused(tmp_path):
    (tmp_path / "small").write_bytes(bytes(512))
    done = program("serve", "-f", "raw", "--block-size", "4096", tmp_path / "small")
    assert done.returncode == 2
    assert "has 512 bytes, less than a block of 4096" in done.stderr


# Who dawdles.


def test_the_time_to_choose_an_export_is_what_was_said(image, tmp_path):
    words = ["-v", "-k", tmp_path / "s", "--negotiation-timeout", "1", image]
    with serving(*words) as (process, _), socket.socket(socket.AF_UNIX) as dawdler:
        dawdler.connect(str(tmp_path / "s"))
        while dawdler.recv(100):
            pass
        assert "lost in the handshake: no answer within 1 seconds" in end(process)[1]


# How writes are done.


@pytest.mark.parametrize(
    ("typed", "means"),
    [
        ("--lock-ranges", {"lock_ranges": True}),
        ("--write-behind", {"write_behind": DEFAULT_MEMORY}),
        ("--write-behind --write-behind-memory 4M", {"write_behind": 4 << 20}),
        ("--block-size 512,4K,1M", {"block_sizes": BlockSizes(512, 4096, 1 << 20)}),
        ("--cache writethrough", {"cache": CACHE_MODES["writethrough"]}),
        ("--cache directsync", {"cache": CACHE_MODES["directsync"]}),
        ("-n", {"cache": CACHE_MODES["none"]}),
        ("-r", {"read_only": True}),
        ("--size 4K", {"parts": (Part(0, 4096),)}),
        ("--discard ignore", {"discard": "ignore"}),
        ("--discard unmap --detect-zeroes unmap", {"detect_zeroes": "unmap"}),
    ],
)
def test_what_is_typed_comes_to_the_storage(typed, means):
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser, "serve")
    spec = storage_spec(parser.parse_args([*typed.split(), "x"]), "x")
    assert {name: getattr(spec, name) for name in means} == means


@pytest.mark.parametrize("option", ["--write-behind", "--lock-ranges"])
@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_a_copy_arrives_whole(image, tmp_path, option, kind):
    target = tmp_path / "target"
    run("qemu-img", "create", "-f", kind, target, SIZE)
    words = ["-k", tmp_path / "s", "-f", kind, option, target]
    with serving(*words) as (process, (line,)):
        copied = run("nbdcopy", "--connections=4", "--requests=16", image, uri_of(line))
        assert copied.returncode == 0, copied.stderr
        assert end(process) == (0, "")
    compared = run("qemu-img", "compare", "-f", "raw", "-F", kind, image, target)
    assert compared.returncode == 0, compared.stdout


def test_a_graceful_stop_writes_out_what_was_acknowledged(image, tmp_path):
    data = os.urandom(SIZE)
    with (
        serving("-k", tmp_path / "s", "--write-behind", image) as (process, (line,)),
        nbdlink.connect(uri_of(line)) as nbd,
    ):
        nbd.pwrite(data, 0)  # and no flush
        assert end(process)[0] == 0
    assert image.read_bytes() == data


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--write-behind", "--cache", "writethrough"], "write-behind acknowledges before"),
        (["--write-behind", "--cache", "directsync"], "write-behind acknowledges before"),
        (["--write-behind", "--write-behind-memory", "4K"], "4096 bytes are too few"),
        (["--write-behind-memory", "4M"], "--write-behind-memory is for --write-behind"),
    ],
)
def test_write_behind_that_cannot_be_is_refused(image, words, says):
    done = program("serve", "-f", "raw", *words, image)
    assert done.returncode == 2
    assert says in done.stderr
