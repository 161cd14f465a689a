"""The supervisor: what is configured is attached, what breaks is renewed, what runs is adopted."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from nbdlink import kernel
from nbdlink.cli.main import main
from nbdlink.errors import DeviceBusyError
from nbdlink.kernel import sysfs
from nbdlink.link import record
from nbdlink.link.config import files
from tests.certificates import Authority
from tests.interop.peers import MISSING

from .conftest import PATIENCE, free_all, until
from .restarts import Restartable
from .supervisors import Supervisor, index_of, link, live

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

SIZE = 8 << 20


@pytest.fixture(autouse=True)
def _freed(runtime_directory):
    yield
    free_all()


@pytest.fixture
def servers(image, tmp_path):
    """Make servers of the image, which are not started; all of them end with the test."""
    made = []

    def make(kind="nbdkit", *options):
        server = Restartable(kind, image, tmp_path, *options)
        made.append(server)
        return server

    yield make
    for server in made:
        server.kill()


@pytest.fixture
def server(servers):
    return servers()


@pytest.fixture
def supervise(tmp_path):
    """Start a supervisor with some configuration; all of them end with the test."""
    started = []

    def start(text=None, *names, **options):
        if text is not None:
            (tmp_path / "nbdlink.toml").write_text(text)
        supervisor = Supervisor(tmp_path, names, **options)
        started.append(supervisor)
        return supervisor

    yield start
    for supervisor in started:
        supervisor.end(signal.SIGKILL)


@pytest.fixture
def attached(supervise, server):
    """Have a supervisor attach the server's export; give the supervisor."""

    def attach(**settings):
        server.start()
        supervisor = supervise(link(server, **settings))
        supervisor.until("attached as /dev/nbd")
        return supervisor

    return attach


def test_a_configured_link_is_attached(supervise, server, image):
    server.start()
    supervise(link(server)).until("attached as /dev/nbd")
    assert Path(f"/dev/nbd{index_of('data')}").read_bytes() == image.read_bytes()


def test_a_server_may_come_later_than_the_supervisor(supervise, server):
    supervisor = supervise(link(server))
    supervisor.until("connection refused")
    server.start()
    supervisor.until("attached as /dev/nbd")


def test_a_device_outlives_its_server(attached, server, image):
    supervisor = attached(connections=2)
    for _ in range(3):
        server.kill()
        supervisor.until("channels 0, 1 are dead")
        server.start()
        supervisor.until("channels 0, 1 renewed; 2 of 2 live")
    assert Path(f"/dev/nbd{index_of('data')}").read_bytes() == image.read_bytes()


def test_what_was_attached_by_hand_is_renewed_too(supervise, server):
    server.start()
    assert main(["attach", server.uri, "--dead-timeout", "100"]) == 0
    supervisor = supervise()
    supervisor.until("/dev/nbd0: adopted")
    server.restart()
    supervisor.until("channels 0 renewed")


def test_what_is_attached_by_hand_later_is_renewed_too(supervise, server):
    supervisor = supervise()
    supervisor.until("ready")
    server.start()
    assert main(["attach", server.uri, "--name", "late", "--dead-timeout", "100"]) == 0
    supervisor.until(r"late \(/dev/nbd0\): adopted")
    server.restart()
    supervisor.until("channels 0 renewed")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_devices_outlive_the_supervisor(attached, number):
    supervisor = attached(connections=2)
    supervisor.end(number)
    assert live() == 2


def test_a_supervisor_that_was_killed_finds_everything_again(attached, server, supervise):
    first = attached(connections=2)
    cookies = [each.cookie for each in record.read(index_of("data")).channels]
    first.end(signal.SIGKILL)
    second = supervise()
    second.until("ready: 1 link, 1 attached")
    assert [each.cookie for each in record.read(index_of("data")).channels] == cookies
    server.restart()
    second.until("channels 0, 1 renewed")


def test_two_that_look_after_one_link_do_no_harm(attached, server, supervise, image):
    first = attached(connections=2)
    second = supervise()
    second.until("ready")
    for _ in range(3):
        server.restart()
        until(lambda: live() == 2)
    assert Path(f"/dev/nbd{index_of('data')}").read_bytes() == image.read_bytes()
    assert not re.search("Traceback|unexpected", first.log() + second.log())


def test_what_died_while_nobody_looked_is_renewed(attached, server, supervise):
    first = attached()
    first.end(signal.SIGKILL)
    server.restart()
    supervise().until("channels 0 renewed")


def test_without_its_record_a_device_is_known_by_its_identifier(attached, server, supervise):
    first = attached(connections=2)
    index = index_of("data")
    first.end()
    record.remove(index)
    second = supervise()
    second.until(f"data: adopted .*nbd{index}")
    server.restart()
    second.until("channels 0, 1 renewed; 2 of 2 live")


def test_so_it_is_though_the_kernel_knows_no_part_of_a_sector(attached, server, supervise, image):
    with image.open("ab") as file:
        file.write(b"tail")
    first = attached()
    first.end()
    record.remove(index_of("data"))
    second = supervise()
    second.until("data: adopted")
    server.restart()
    second.until("channels 0 renewed")


def test_what_was_detached_on_purpose_stays_so(attached):
    supervisor = attached()
    assert main(["detach", "data"]) == 0
    supervisor.until("data: was detached")
    supervisor.tell(signal.SIGHUP)
    supervisor.until("read again")
    assert supervisor.end() == 0
    assert index_of("data") is None


def is_being_attached():
    with contextlib.suppress(DeviceBusyError), record.locked("data", wait=False):
        return False
    return True


def test_what_is_detached_while_it_is_being_attached_stays_so(
    supervise, server, tmp_path, monkeypatch
):
    load, here = files.load, (tmp_path / "nbdlink.toml", tmp_path / "none", tmp_path / "none")
    monkeypatch.setattr(files, "load", lambda *paths: load(*(paths or here)))
    server.start()
    server.freeze()
    supervise(link(server))
    until(is_being_attached)
    detaching = threading.Thread(target=main, args=(["detach", "data"],))
    detaching.start()
    until(lambda: record.is_detached("data"))
    server.thaw()
    detaching.join(PATIENCE)
    with record.locked("data"):
        assert index_of("data") is None
    assert record.is_detached("data")


def test_who_is_named_is_attached_even_if_it_was_detached(supervise, server):
    server.start()
    record.mark_detached("data")
    supervise(link(server), "data").until("data: attached as")


def test_what_stays_detached_is_told_at_the_start(attached, supervise):
    attached().end()
    assert main(["detach", "data"]) == 0
    supervise().until("data: stays detached.*nbdlink attach --name data")


def test_attaching_by_hand_ends_the_detachment(attached, server):
    supervisor = attached()
    assert main(["detach", "data"]) == 0
    supervisor.until("data: was detached")
    main(["attach", server.uri, "--name", "data", "--dead-timeout", "99"])
    server.restart()
    supervisor.until("channels 0 renewed")


def test_a_device_that_somebody_else_disconnects_comes_back(attached):
    supervisor = attached()
    kernel.detach(index_of("data"))
    supervisor.until("data: is gone")
    supervisor.until("attached as")


def test_a_device_of_the_ioctl_road_comes_back(attached, server):
    supervisor = attached(ioctl="true", device='"/dev/nbd4"')
    server.restart()
    supervisor.until("attached as /dev/nbd4")
    assert sysfs.size(4) == SIZE


def test_an_ioctl_device_that_was_attached_by_hand_comes_back(supervise, server):
    server.start()
    assert main(["attach", "--ioctl", server.uri, "/dev/nbd4"]) == 0
    supervisor = supervise()
    supervisor.until("/dev/nbd4: adopted")
    server.restart()
    supervisor.until("attached as /dev/nbd4")


def test_an_ioctl_device_that_was_detached_by_hand_stays_so(supervise, server):
    server.start()
    assert main(["attach", "--ioctl", server.uri, "/dev/nbd4"]) == 0
    supervisor = supervise()
    supervisor.until("/dev/nbd4: adopted")
    assert main(["detach", "/dev/nbd4"]) == 0
    supervisor.until("/dev/nbd4: was detached")
    supervisor.tell(signal.SIGHUP)
    supervisor.until("read again")
    assert supervisor.end() == 0
    assert sysfs.pid(4) is None


def test_a_device_that_has_another_use_by_now_keeps_its_record(attached, server):
    supervisor = attached(device='"/dev/nbd4"')
    supervisor.tell(signal.SIGSTOP)
    assert main(["detach", "data"]) == 0
    assert main(["attach", server.uri, "/dev/nbd4", "--name", "other"]) == 0
    supervisor.tell(signal.SIGCONT)
    supervisor.until(r"other \(/dev/nbd4\): adopted")
    assert record.read(4).name == "other"


def test_another_configuration_is_told_while_it_runs(attached, server):
    supervisor = attached()
    supervisor.config.write_text(link(server, connections=2))
    supervisor.tell(signal.SIGHUP)
    supervisor.until("is not attached as it is configured, but differs in connections")


def test_a_module_that_is_gone_is_loaded_again(supervise, server):
    supervisor = supervise(link(server))
    supervisor.until("connection refused")
    until(lambda: subprocess.run(["rmmod", "nbd"], check=False).returncode == 0)
    server.start()
    supervisor.until("attached as")


def test_the_channels_of_a_dead_route_take_another_one_and_come_back(supervise, servers):
    here, there = servers().start(), servers().start()
    supervisor = supervise(link(here, there, connections=2))
    supervisor.until("attached as")
    here.kill()
    supervisor.until("channels 0 renewed; 2 of 2 live")
    channels = record.read(index_of("data")).channels
    assert {each.route for each in channels} == {there.uri}
    here.start()
    supervisor.until("channels 0 back on their routes; 2 of 2 live")
    channels = record.read(index_of("data")).channels
    assert [each.route for each in channels] == [here.uri, there.uri]


def test_an_export_that_was_swapped_is_refused(attached, server, image):
    supervisor = attached()
    server.kill()
    os.truncate(image, SIZE // 2)
    server.start()
    supervisor.until(f"is not the one that data has: it has {SIZE // 2} bytes")
    assert live() == 0


@pytest.fixture
def notice_port():
    """A UDP port that is free."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_server_that_is_told_to_has_its_channels_renewed(supervise, servers, notice_port):
    server = servers("nbdlink").start()
    supervisor = supervise(link(server, connections=2), port=notice_port)
    supervisor.until("attached as")
    generations = [each.generation for each in record.read(index_of("data")).channels]
    server.send_signal(signal.SIGHUP)
    supervisor.until("2 of 2 live")
    until(
        lambda: all(
            each.generation > before
            for each, before in zip(
                record.read(index_of("data")).channels, generations, strict=True
            )
        )
    )


def test_a_hint_makes_it_try_at_once(supervise, servers, tmp_path, notice_port):
    state = tmp_path / "clients"
    server = servers("nbdlink", "--remember-clients", str(state)).start()
    supervisor = supervise(link(server), port=notice_port)
    supervisor.until("attached as")
    server.restart()
    supervisor.until("channels 0 renewed")  # with this the server knows where to tell
    session = record.read_session(index_of("data"))
    until(lambda: session in state.read_text())
    server.kill()
    # What takes a person is tried every 30 seconds only, but for a hint.
    os.truncate(server.image, SIZE // 2)
    server.start()
    supervisor.until("is not the one that data has")
    server.kill()
    os.truncate(server.image, SIZE)
    server.start()
    supervisor.until("its server says that it is back")
    supervisor.until("channels 0 renewed")


def test_a_new_configuration_is_taken_over(supervise, server, tmp_path):
    server.start()
    supervisor = supervise("")
    supervisor.until("ready")
    supervisor.config.write_text(link(server))
    supervisor.tell(signal.SIGHUP)
    supervisor.until("attached as")


def test_a_mistake_in_the_new_configuration_changes_nothing(attached, server):
    supervisor = attached()
    supervisor.config.write_text("[link.data]\nbad = 1\n")
    supervisor.tell(signal.SIGHUP)
    supervisor.until("the configuration stays as it was: .*:2: unknown key 'bad'")
    server.restart()
    supervisor.until("channels 0 renewed")


def test_a_link_that_is_no_longer_configured_stays_attached(attached, server):
    supervisor = attached()
    supervisor.config.write_text("")
    supervisor.tell(signal.SIGHUP)
    supervisor.until("read again: 0 links")
    server.restart()
    supervisor.until("channels 0 renewed")


def test_another_configuration_of_a_running_link_is_told(supervise, server):
    server.start()
    assert main(["attach", server.uri, "--name", "data"]) == 0
    supervise(link(server, connections=2)).until(
        "differs in connections and timeout and dead-timeout"
    )


def test_a_name_that_nobody_knows_is_a_mistake(supervise):
    supervisor = supervise("", "nobody")
    supervisor.until("there is no link named 'nobody'")
    assert supervisor.end(None) == 2


def test_only_what_is_named_is_looked_after(supervise, servers):
    one, two = servers().start(), servers().start()
    text = f'[link.one]\ntarget = "{one.uri}"\n[link.two]\ntarget = "{two.uri}"\n'
    supervisor = supervise(text, "two")
    supervisor.until("ready")
    assert [known.name for known in record.read_all()] == ["two"]


def test_the_service_manager_is_told(supervise, server, tmp_path):
    server.start()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(PATIENCE)
        told = ""

        def hear(word):
            nonlocal told
            while word not in told:
                told += sock.recv(4096).decode() + "\n"

        under = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "2000000"}
        supervisor = supervise(link(server), under=under)
        hear("READY=1")
        hear("STATUS=1 link, 1 attached")
        hear("WATCHDOG=1")
        told = ""
        supervisor.tell(signal.SIGHUP)
        hear("RELOADING=1\nMONOTONIC_USEC=")
        hear("READY=1")
        supervisor.tell(signal.SIGTERM)
        hear("STOPPING=1")


def test_attach_may_stay_and_renew(server, tmp_path):
    server.start()
    environment = {**os.environ, "NBDLINK_RUNTIME_DIRECTORY": str(record.DIRECTORY)}
    words = ["attach", "--supervise", "--name", "data", server.uri]
    with subprocess.Popen(
        [sys.executable, "-m", "nbdlink", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout.readline() == "/dev/nbd0\n"
        server.restart()
        until(lambda: live() == 1)
        process.terminate()
        assert process.wait(PATIENCE) == 0


def test_who_stays_for_one_link_ends_with_it(server):
    server.start()
    environment = {**os.environ, "NBDLINK_RUNTIME_DIRECTORY": str(record.DIRECTORY)}
    words = ["attach", "--supervise", "--name", "data", server.uri]
    with subprocess.Popen(
        [sys.executable, "-m", "nbdlink", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout.readline() == "/dev/nbd0\n"
        assert main(["detach", "data"]) == 0
        assert process.wait(PATIENCE) == 0


class Tamperer:
    """Stands between a client and a server, and alters a byte when it is told to."""

    def __init__(self, port):
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._server = port
        self._armed = threading.Event()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with contextlib.suppress(OSError):
                server = socket.create_connection(("127.0.0.1", self._server))
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=self._copy, args=pair, daemon=True).start()

    def _copy(self, source, sink):
        with source, contextlib.suppress(OSError):
            while data := bytearray(source.recv(65536)):
                if self._armed.is_set():
                    self._armed.clear()
                    data[-1] ^= 1
                sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)

    def alter_something(self):
        self._armed.set()

    def close(self):
        self._listener.close()


@pytest.mark.parametrize("road", ["kernel", "relay"])
def test_a_connection_that_is_tampered_with_is_renewed(supervise, image, tmp_path, servers, road):
    authority = Authority()
    credentials = authority.write_directory(
        tmp_path / "pki", server=authority.issue(), client=authority.issue("me", role="client")
    )
    server = Restartable("nbdlink", image, tmp_path, credentials=credentials).start()
    between = Tamperer(server.port)
    try:
        uri = f"nbds://localhost:{between.port}/data"
        words = ["--tls-certificates", str(credentials), "--tls-road", road]
        words += ["--dead-timeout", "100", "--timeout", "5", "--name", "data"]
        assert main(["attach", uri, *words]) == 0
        supervisor = supervise()
        supervisor.until("data .*: adopted")
        between.alter_something()
        # What is on its way is asked for again when its time is up.
        assert Path("/dev/nbd0").read_bytes() == image.read_bytes()
        supervisor.until("channels 0 renewed")
    finally:
        between.close()
        server.kill()
