"""`nbdlink serve --metrics`: the numbers are those of what clients did, in all processes."""

from __future__ import annotations

import errno
import os
import signal
import socket
import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

import nbdlink
from nbdlink.client.negotiate import Negotiation
from nbdlink.uri import Target

from ..server.fakes import READ, RawClient
from .programs import end, run, serving
from .programs import nbdlink as program

SIZE = 1 << 20


class Served:
    def __init__(self, folder, process):
        self.folder = folder
        self.process = process
        self.target = Target(socket=str(folder / "socket"))
        self.addresses = [str(folder / "socket")]

    def numbers(self):
        """Scrape; give the values by metric and labels."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(30)
            sock.connect(str(self.folder / "metrics"))
            sock.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            answer = b""
            while heard := sock.recv(65536):
                answer += heard
        head, _, body = answer.decode().partition("\r\n\r\n")
        assert head.startswith("HTTP/1.1 200 OK"), answer
        return {
            (sample.name.removeprefix("nbdlink_"), *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(body)
            for sample in family.samples
        }

    def until(self, **wanted):
        """Scrape until the numbers of the default export are these."""
        deadline = time.monotonic() + 20
        while True:
            numbers = self.numbers()
            found = {name: numbers[f"export_{name}", ""] for name in wanted}
            if found == wanted:
                return numbers
            assert time.monotonic() < deadline, f"{found}, not {wanted}"


@pytest.fixture(params=[0, 3], ids=["one process", "several processes"])
def server(request, tmp_path):
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(SIZE))
    words = ["--processes", request.param, "-k", tmp_path / "socket"]
    with serving(*words, "--metrics", tmp_path / "metrics", image) as (process, _):
        yield Served(tmp_path, process)
        if process.poll() is None:
            status, log = end(process)
            assert status == 0, log
            assert "unexpected" not in log


def test_a_new_server_has_all_its_numbers(server):
    numbers = server.numbers()
    assert numbers["export_size_bytes", ""] == SIZE
    assert numbers["export_requests_total", ""] == 0
    assert numbers["server_info", nbdlink.__version__] == 1


def test_requests_and_bytes_are_counted_while_clients_are_there(server):
    clients = [nbdlink.connect(server.target) for _ in range(5)]
    for nbd in clients:
        nbd.pread(8192, 0)
        nbd.pwrite(bytes(4096), 0)
    server.until(
        sessions=5,
        connections_total=5,
        requests_total=10,
        errors_total=0,
        read_bytes_total=5 * 8192,
        written_bytes_total=5 * 4096,
    )
    for nbd in clients:
        nbd.close()


def test_they_stay_when_clients_have_gone(server):
    for _ in range(3):
        with nbdlink.connect(server.target) as nbd:
            nbd.pread(4096, 0)
    numbers = server.until(sessions=0, connections_total=3, read_bytes_total=3 * 4096)
    assert numbers["server_handshakes_total", "transmission"] == 3


def test_errors_are_counted(server):
    with RawClient(server) as client:
        assert client.ask(READ, SIZE - 512, 4096)[0] == errno.EINVAL
        server.until(errors_total=1)
    server.until(sessions=0, errors_total=1)


def test_what_a_process_did_is_not_forgotten_when_it_dies(tmp_path):
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(SIZE))
    words = ["--processes", 1, "-k", tmp_path / "socket", "--metrics", tmp_path / "metrics"]
    with serving(*words, image) as (process, _):
        server = Served(tmp_path, process)
        with RawClient(server) as here, RawClient(server) as there:
            assert here.ask(READ, 0, 4096) == there.ask(READ, 0, 4096) == (0, bytes(4096))
            server.until(sessions=2, read_bytes_total=8192)
            path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            (child,) = map(int, path.read_text().split())
            os.kill(child, signal.SIGKILL)
            numbers = server.until(sessions=1, read_bytes_total=8192, requests_total=2)
            assert numbers[("server_processes",)] == 1


def test_handshakes_that_come_to_nothing_are_told_apart(server):
    with Negotiation(server.target) as negotiation:
        negotiation.list_exports()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(server.target.socket)
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n" * 4)
        while sock.recv(4096):
            pass
    server.until(sessions=0)
    deadline = time.monotonic() + 20
    while True:
        numbers = server.numbers()
        found = [numbers["server_handshakes_total", how] for how in ("left", "refused")]
        if found == [1, 1]:
            return
        assert time.monotonic() < deadline, found


def test_the_socket_goes_with_the_server(server):
    assert (server.folder / "metrics").exists()
    assert end(server.process)[0] == 0
    assert not (server.folder / "metrics").exists()


def test_an_address_that_is_none_is_refused(tmp_path):
    done = program("serve", "--metrics", "9100", tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "nbdlink: '9100' is no address for metrics\n  hint: say HOST:PORT"
    )


def test_an_address_that_is_in_use_ends_the_server(tmp_path):
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(SIZE))
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        done = program("serve", "-f", "raw", "-k", tmp_path / "socket", "--metrics", address, image)
    assert done.returncode == 1
    assert done.stderr.startswith(f"nbdlink: metrics: cannot listen on {address}: ")
    assert not (tmp_path / "socket").exists()


def test_curl_reads_it(server):
    done = run("curl", "-sf", "--unix-socket", server.folder / "metrics", "http://x/metrics")
    assert "# TYPE nbdlink_export_size_bytes gauge" in done.stdout
