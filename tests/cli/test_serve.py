"""`nbdlink serve` as a program: what it says, what it serves, how it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import pytest

import nbdlink
from nbdlink.client.negotiate import Negotiation
from nbdlink.errors import LocalProtocolError
from nbdlink.uri import Target

SIZE = 1 << 20


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SIZE))
    return path


@contextlib.contextmanager
def serving(*words, lines=1, **options):
    """Run `nbdlink serve` and give the process, and the first lines that it prints."""
    command = [sys.executable, "-m", "nbdlink", "serve", *map(str, words)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )
    try:
        yield process, [process.stdout.readline().strip() for _ in range(lines)]
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def end(process, number=signal.SIGTERM):
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


def test_a_file_is_the_default_export_and_its_uri_is_printed(image):
    with serving("-p", 0, "-b", "127.0.0.1", image) as (_, (line,)):
        uri, rest = line.split(" is ")
        assert rest == f"{image} (1M)"
        with nbdlink.connect(uri) as nbd:
            assert nbd.pread(SIZE, 0) == image.read_bytes()


def test_several_files_are_named_after_themselves_or_as_told(image, tmp_path):
    other = tmp_path / "other.img"
    other.write_bytes(bytes(512))
    with serving("-p", 0, image, f"second={other}", lines=2) as (_, printed):
        target = Target.parse(printed[0].split(" is ")[0])
        with Negotiation(target) as negotiation:
            assert [e.name for e in negotiation.list_exports()] == ["disk.img", "second"]


def test_a_name_and_a_description_are_told(image, tmp_path):
    path = tmp_path / "socket"
    with serving("-k", path, "-x", "data", "-D", "words", image) as (_, (line,)):
        with Negotiation(Target.parse(line.split(" is ")[0])) as negotiation:
            export = negotiation.info()
        assert (export.name, export.description) == ("data", "words")


def test_a_window_of_a_file_is_served(image, tmp_path):
    path = tmp_path / "socket"
    with (
        serving("-k", path, "-o", "4K", "--size", "8K", image) as (_, (line,)),
        nbdlink.connect(line.split(" is ")[0]) as nbd,
    ):
        assert nbd.pread(nbd.size, 0) == image.read_bytes()[4096 : 4096 + 8192]


def test_a_read_only_export_says_so(image, tmp_path):
    with serving("-r", "-k", tmp_path / "socket", image) as (_, (line,)):
        assert line.endswith("(1M, read-only)")
        with (
            nbdlink.connect(line.split(" is ")[0]) as nbd,
            pytest.raises(LocalProtocolError, match="read-only"),
        ):
            nbd.pwrite(b"x", 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_ends_it_gracefully_and_the_socket_is_gone(image, tmp_path, number):
    path = tmp_path / "socket"
    with serving("-k", path, image) as (process, _):
        assert end(process, number) == (0, "")
    assert not path.exists()


def test_a_connected_client_does_not_keep_it_from_ending(image, tmp_path):
    with (
        serving("-k", tmp_path / "socket", image) as (process, (line,)),
        nbdlink.connect(line.split(" is ")[0]) as nbd,
    ):
        nbd.pwrite(b"acknowledged", 0)
        assert end(process) == (0, "")
    assert image.read_bytes().startswith(b"acknowledged")


def test_once_ends_with_the_last_client(image, tmp_path):
    with serving("--once", "-k", tmp_path / "socket", image) as (process, (line,)):
        uri = line.split(" is ")[0]
        Negotiation(Target.parse(uri)).close()  # only looks around, so it does not count
        with nbdlink.connect(uri) as first, nbdlink.connect(uri) as second:
            first.close()
            assert second.pread(1, 0)
        assert process.wait(60) == 0


def test_a_second_server_on_the_same_socket_is_refused(image, tmp_path):
    path = tmp_path / "socket"
    with serving("-k", path, image):
        again = subprocess.run(
            [sys.executable, "-m", "nbdlink", "serve", "-k", str(path), str(image)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert again.returncode == 1
        assert "another server listens there" in again.stderr
        with nbdlink.connect(Target(socket=str(path))) as nbd:
            assert nbd.pread(1, 0)


def test_a_socket_that_a_dead_server_left_is_replaced(image, tmp_path):
    path = tmp_path / "socket"
    with serving("-k", path, image) as (process, _):
        process.kill()
        process.wait()
    assert path.exists()
    with serving("-k", path, image), nbdlink.connect(Target(socket=str(path))) as nbd:
        assert nbd.pread(1, 0)


def test_a_port_in_use_is_named(image):
    with serving("-p", 0, "-b", "127.0.0.1", image) as (_, (line,)):
        port = Target.parse(line.split(" is ")[0]).port
        words = ["serve", "-p", str(port), "-b", "127.0.0.1", str(image)]
        again = subprocess.run(
            [sys.executable, "-m", "nbdlink", *words], capture_output=True, text=True, timeout=60
        )
    assert again.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}: address already in use" in again.stderr


def test_clients_are_reported_on_request(image, tmp_path):
    with serving("-v", "-k", tmp_path / "socket", image) as (process, (line,)):
        nbdlink.connect(line.split(" is ")[0]).close()
        status, log = end(process)
    assert status == 0
    assert "connected to export ''" in log
