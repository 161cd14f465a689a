"""The relay, with the ends that the kernel would have in the hands of the tests."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
from pathlib import Path

import pytest

from nbdlink.errors import TransportError
from nbdlink.transport import relay

from .pairs import PATIENCE, aside, exactly, pair

K, M = 1 << 10, 1 << 20


class Relayed:
    """Connections behind a relay.

    Attributes:
        pid: the relay.
        kernel: the ends that the kernel would have.
        servers: the servers' ends.
    """

    def __init__(self, pid, kernel, servers):
        self.pid, self.kernel, self.servers = pid, kernel, servers
        # Tells of its end without being its parent.
        self._process = os.pidfd_open(pid)

    def status(self):
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return dict(line.split(":\t", 1) for line in lines)

    def wait(self):
        poll = select.poll()
        poll.register(self._process, select.POLLIN)
        assert poll.poll(PATIENCE * 1000), "the relay goes on"

    def close(self):
        for sock in (*self.kernel, *self.servers):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self.wait()
        os.close(self._process)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    """Have servers that take no leave given up on sooner: the process inherits it."""
    monkeypatch.setattr(relay, "_FAREWELL", 0.2)


@pytest.fixture
def start():
    """Start a relay for so many connections; all of it ends with the test."""
    with contextlib.ExitStack() as stack:

        def start(count=1, family="tcp"):
            # As in the negotiation: the relay releases them by itself.
            pairs = [stack.enter_context(pair(family=family, exact=True)) for _ in range(count)]
            for each in pairs:
                each.server.release()
            pid, kernel = relay.start([each.client for each in pairs], "a test")
            for end in kernel:
                stack.callback(end.close)
            relayed = Relayed(pid, kernel, [each.server for each in pairs])
            stack.callback(relayed.close)
            return relayed

        yield start


@pytest.fixture(params=["unix", "tcp"])
def relayed(start, request):
    return start(family=request.param)


def received(sock, length):
    return sock.recv(length, socket.MSG_WAITALL)


# Data.


@pytest.mark.parametrize("size", [1, 28, 16 * K, 256 * K + 1, 5 * M])
def test_what_the_kernel_sends_reaches_the_server(relayed, size):
    data = os.urandom(size)
    with aside(relayed.kernel[0].sendall, data):
        assert exactly(relayed.servers[0], size) == data


@pytest.mark.parametrize("size", [1, 28, 16 * K, 256 * K + 1, 5 * M])
def test_what_the_server_sends_reaches_the_kernel(relayed, size):
    data = os.urandom(size)
    with aside(relayed.servers[0].sendall, data):
        assert received(relayed.kernel[0], size) == data


def test_both_ways_are_open_at_once(relayed):
    up, down = os.urandom(20 * M), os.urandom(20 * M)
    (kernel,), (server,) = relayed.kernel, relayed.servers
    with aside(kernel.sendall, up), aside(server.sendall, down), aside(_expect, server, up):
        assert received(kernel, len(down)) == down


def _expect(stream, data):
    assert exactly(stream, len(data)) == data


def test_a_server_that_does_not_receive_holds_up_nothing_from_it(relayed):
    (kernel,), (server,) = relayed.kernel, relayed.servers
    with aside(kernel.sendall, bytes(20 * M)):
        for _ in range(10):
            server.sendall(b"answer")
            assert received(kernel, 6) == b"answer"
        assert exactly(server, 20 * M) == bytes(20 * M)


def test_what_came_before_the_relay_is_not_lost():
    with pair(family="tcp", exact=True) as ends:
        ends.server.release()
        ends.server.sendall(b"before")
        _, (kernel,) = relay.start([ends.client], "a test")
        with kernel:
            assert received(kernel, 6) == b"before"


def test_connections_are_not_mixed_up(start):
    relayed = start(4)
    for number, kernel in enumerate(relayed.kernel):
        kernel.sendall(b"to %d" % number)
    for number, server in enumerate(relayed.servers):
        assert exactly(server, 4) == b"to %d" % number
        server.sendall(b"from %d" % number)
    for number, kernel in enumerate(relayed.kernel):
        assert received(kernel, 6) == b"from %d" % number


# The end.


def test_the_kernel_s_end_is_told_to_the_server(relayed):
    relayed.kernel[0].sendall(b"last")
    relayed.kernel[0].close()
    # A bare end would be an error.
    assert exactly(relayed.servers[0], 10) == b"last"


def test_the_server_s_end_is_told_to_the_kernel(relayed):
    relayed.servers[0].sendall(b"last")
    relayed.servers[0].close()
    assert received(relayed.kernel[0], 10) == b"last"


def test_a_server_that_dies_shuts_the_kernel_s_end(relayed):
    relayed.servers[0].shutdown(socket.SHUT_RDWR)
    assert received(relayed.kernel[0], 1) == b""
    relayed.wait()


def test_nothing_can_be_sent_to_a_server_that_has_died(relayed):
    relayed.servers[0].shutdown(socket.SHUT_RDWR)
    relayed.wait()
    with pytest.raises(BrokenPipeError):
        relayed.kernel[0].sendall(b"data")


def test_it_ends_when_the_kernel_has_closed(relayed):
    relayed.kernel[0].close()
    assert exactly(relayed.servers[0], 1) == b""
    relayed.servers[0].close()
    relayed.wait()


def test_a_server_that_does_not_take_leave_keeps_it_for_some_seconds_only(relayed):
    relayed.kernel[0].close()
    relayed.wait()


def test_a_server_that_says_goodbye_and_receives_nothing_does_not_keep_it(relayed):
    (kernel,), (server,) = relayed.kernel, relayed.servers
    kernel.settimeout(0.5)
    with contextlib.suppress(TimeoutError):
        while True:
            kernel.send(bytes(M))  # until nothing more goes in
    server._say_goodbye()
    relayed.wait()


def test_one_that_ends_leaves_the_others(start):
    relayed = start(3)
    relayed.servers[1].shutdown(socket.SHUT_RDWR)
    assert received(relayed.kernel[1], 1) == b""
    for number in (0, 2):
        relayed.kernel[number].sendall(b"still here")
        assert exactly(relayed.servers[number], 10) == b"still here"


def test_it_ends_when_all_have_ended(start):
    relayed = start(3)
    for server in relayed.servers:
        server.shutdown(socket.SHUT_RDWR)
    relayed.wait()


def test_what_was_tampered_with_never_reaches_the_kernel(relayed):
    relayed.servers[0]._sock.sendall(b"\x17\3\3\0\x20" + bytes(32))
    assert received(relayed.kernel[0], 1) == b""
    relayed.wait()


# The process.


def test_it_is_not_our_child(relayed):
    with pytest.raises(ChildProcessError):
        os.waitpid(relayed.pid, os.WNOHANG)


def test_it_is_in_a_session_of_its_own(relayed):
    assert os.getsid(relayed.pid) != os.getsid(0)


def test_it_is_named(relayed):
    assert relayed.status()["Name"] == "nbdlink-relay"


def open_files(pid):
    found = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of this very list
            found[int(entry.name)] = str(entry.readlink())
    return found


def test_it_has_nothing_open_but_what_it_needs(start, tmp_path):
    with (tmp_path / "file").open("w"), socket.create_server(("127.0.0.1", 0)):
        relayed = start(3)
        files = open_files(relayed.pid)
    assert [files.pop(number) for number in (0, 1, 2)] == ["/dev/null"] * 3
    assert sorted(path.partition(":")[0] for path in files.values()) == ["socket"] * 6


def test_we_keep_nothing_open_but_the_kernel_s_ends():
    with contextlib.ExitStack() as stack:
        ends = stack.enter_context(pair(exact=True))
        before = set(open_files(os.getpid()))
        client = ends.client.fileno()
        _, (kernel,) = relay.start([ends.client], "a test")
        with kernel:
            assert set(open_files(os.getpid())) - before <= {kernel.fileno()}
            assert client == kernel.fileno() or client not in open_files(os.getpid())


def test_its_memory_is_not_swapped(relayed):
    assert int(relayed.status()["VmLck"].split()[0]) > 0


def test_its_memory_cannot_be_dumped(relayed):
    # Files of a process that cannot be dumped belong to root, and no core is written for it.
    # `CoreDumping` tells of the present only; that no debugger but root's may look is the same.
    # Not our own Python: nobody may run what is installed below /root.
    nobody = subprocess.run(
        ["/bin/cat", f"/proc/{relayed.pid}/maps"],
        user=65534,
        group=65534,
        env={"LC_ALL": "C"},
        cwd="/",
        capture_output=True,
        check=False,
    )
    assert b"Permission denied" in nobody.stderr, nobody


def test_it_lives_where_the_starter_did_not(relayed):
    assert Path(f"/proc/{relayed.pid}/cwd").readlink() == Path("/")


def test_a_terminal_s_signals_are_not_for_it(relayed):
    for name in ("SigIgn",):
        ignored = int(relayed.status()[name], 16)
        assert all(ignored >> number - 1 & 1 for number in (1, 2, 13))


def test_it_ends_on_sigterm(relayed):
    os.kill(relayed.pid, 15)
    relayed.wait()
    assert received(relayed.kernel[0], 1) == b""


def test_systemd_spares_it_at_shutdown(relayed):
    assert Path(f"/proc/{relayed.pid}/cmdline").read_bytes().startswith(b"@")


def test_it_is_the_last_that_is_killed_for_memory(relayed):
    try_it = "echo -1000 > /proc/self/oom_score_adj; cat /proc/self/oom_score_adj"
    allowed = subprocess.run(["sh", "-c", try_it], capture_output=True, check=True).stdout
    assert Path(f"/proc/{relayed.pid}/oom_score_adj").read_bytes() == allowed


def test_who_starts_it_cannot_use_the_stream_any_more():
    with pair(exact=True) as ends:
        _, (kernel,) = relay.start([ends.client], "a test")
        with kernel:
            assert ends.client.fileno() == -1


def test_without_processes_it_is_said_what_is_wrong(monkeypatch):
    def refuse():
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refuse)
    with pair(exact=True) as ends, pytest.raises(TransportError, match="relay cannot be started"):
        relay.start([ends.client], "a test")
