"""`nbdlink doctor` on its way to other programs' servers, and where a firewall is in the way."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta

import pytest

from nbdlink.cli.main import main
from nbdlink.link.checkup.stranger import provoke
from nbdlink.uri import Target
from tests.certificates import DAY, NOW, Authority
from tests.interop import peers, tls_peers
from tests.interop.ours import full, need
from tests.listening import is_listening

pytestmark = pytest.mark.interop


@pytest.fixture
def image(tmp_path):
    return full(tmp_path / "disk.img", 1 << 20)


@pytest.fixture
def doctor(capsys):
    """Run `doctor --json`; give its status, the findings by what was looked at, and the last."""

    def examine(*words):
        status = main(["doctor", "--json", *map(str, words)])
        found = json.loads(capsys.readouterr().out)
        return status, {each["check"]: each for each in found}, found[-1]

    return examine


@pytest.mark.parametrize("peer", peers.PEERS)
def test_the_way_to_other_servers(doctor, image, tmp_path, peer):
    need(peer)
    with peers.PEERS[peer](image, tmp_path) as target:
        status, _, last = doctor(target)
    assert (status, last["check"], last["status"]) == (0, "read", "ok")


def test_a_server_that_ends_with_its_first_client_is_no_obstacle(doctor, image, tmp_path):
    need("qemu-nbd")
    path = tmp_path / "socket"
    command = ["qemu-nbd", "-k", path, "-f", "raw", "-x", "data", image]
    with subprocess.Popen(command) as server:
        while not is_listening(path):
            assert server.poll() is None
            time.sleep(0.02)  # nothing tells when it listens
        status, _, last = doctor(f"nbd+unix:///data?socket={path}")
        assert (status, last["check"]) == (0, "read")
        assert server.wait(60) == 0


def test_a_server_that_serves_one_client_at_a_time(doctor, image, tmp_path):
    need("qemu-nbd")
    with (
        peers.qemu_nbd(image, tmp_path, shared=1) as target,
        socket.socket(socket.AF_UNIX) as first,
    ):
        first.connect(target.socket)
        assert first.recv(8) == b"NBDMAGIC"
        status, _, last = doctor("--timeout", "0.3", target)
    assert (status, last["check"]) == (1, "greeting")
    assert "serve one at a time (qemu-nbd: -e 0)" in last["remedy"]


def test_the_nearest_of_an_nbd_server_s_exports(doctor, image, tmp_path):
    need("nbd-server")
    with peers.nbd_server(image, tmp_path) as target:
        status, _, last = doctor(replace(target, export="daat"))
    assert (status, last["check"], last["status"]) == (1, "export", "failed")


def test_a_read_that_fails(doctor, image, tmp_path):
    need("nbdkit")
    path = tmp_path / "socket"
    command = ["nbdkit", "-f", "-U", path, "--filter=error", "file", image, "error-pread-rate=100%"]
    target = Target(socket=str(path))
    with peers._running([str(word) for word in command], target):
        status, _, last = doctor(target)
    assert (status, last["check"], last["status"]) == (1, "read", "failed")
    assert "input/output error" in last["found"]


def test_a_server_that_knows_only_the_oldstyle_negotiation(doctor, image, tmp_path):
    need("nbdkit")
    path = tmp_path / "socket"
    command = ["nbdkit", "-f", "-o", "-U", path, "file", image]
    target = Target(socket=str(path))
    with peers._running([str(word) for word in command], target):
        status, _, last = doctor(target)
    assert (status, last["check"], last["status"]) == (1, "negotiation", "failed")
    assert "oldstyle" in last["found"]


def test_a_certificate_that_nbdkit_wants(doctor, image, tmp_path):
    need("nbdkit")
    authority = Authority()
    folder = authority.write_directory(tmp_path / "pki", server=authority.issue())
    trust = authority.write_directory(tmp_path / "trust")
    with tls_peers.nbdkit(image, folder, "--tls-verify-peer") as target:
        status, _, last = doctor("--tls-certificates", trust, target)
    assert (status, last["check"], last["status"]) == (1, "TLS", "failed")
    assert "--tls-certificates DIR" in last["remedy"]


def test_a_server_that_begins_with_tls_is_known(tmp_path):
    need("openssl")
    authority = Authority()
    folder = authority.write_directory(tmp_path / "pki", server=authority.issue())
    port = tls_peers.free_port()
    command = ["openssl", "s_server", "-quiet", "-accept", f"127.0.0.1:{port}"]
    command += ["-cert", folder / "server-cert.pem", "-key", folder / "server-key.pem"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
        try:
            while True:
                with contextlib.suppress(ConnectionRefusedError):
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                assert server.poll() is None
                time.sleep(0.02)  # nothing tells when it listens
            who = provoke(Target("127.0.0.1", port), 60)
        finally:
            server.kill()
    assert who == "a server that begins with TLS, as HTTPS does and NBD does not"


@pytest.mark.parametrize(
    ("begin", "end", "says"),
    [
        (NOW + 2 * DAY, NOW + 5 * DAY, "before the certificate's time"),
        (NOW - 5 * DAY, NOW - timedelta(hours=1), "after the certificate's time"),
    ],
    ids=["not yet valid", "expired"],
)
def test_a_certificate_s_dates_are_held_against_the_clock(
    doctor, image, tmp_path, begin, end, says
):
    need("nbdkit")
    authority = Authority()
    issued = authority.issue(not_before=begin, not_after=end)
    folder = authority.write_directory(tmp_path / "pki", server=issued)
    trust = authority.write_directory(tmp_path / "trust")
    with tls_peers.nbdkit(image, folder) as target:
        status, found, last = doctor("--tls-certificates", trust, target)
    assert status == 1
    assert [found[check]["status"] for check in ("TLS", "certificate")] == ["failed", "failed"]
    assert last["check"] == "clock"
    assert f"this machine's clock says {NOW:%Y-%m-%d}" in last["found"]
    assert says in last["found"]
    assert "set this machine's clock" in last["remedy"]


# In a network namespace of its own: its loopback device, address and rules are nobody else's.
_FIREWALL = """
set -e
ip link set lo up
nft -f - <<EOF
table inet doctor {
    chain in { type filter hook input priority 0; tcp dport 10809 %s; }
}
EOF
exec "$@"
"""


def _elsewhere(setup, *words):
    """Run nbdlink in a network namespace that a script has set up."""
    unshare = ["unshare", "-n"] if os.geteuid() == 0 else ["unshare", "-rn"]
    command = [*unshare, "sh", "-c", setup, "sh", sys.executable, "-m", "nbdlink", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def _behind(setup, address, seconds="60"):
    """Run the doctor there; give its status and the last of what it found."""
    done = _elsewhere(setup, "doctor", "--json", "--timeout", seconds, address)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)[-1]


@pytest.mark.parametrize(
    ("verdict", "says", "advises"),
    [
        ("drop", "did not answer within 0.5 seconds: a firewall swallows", "let TCP port 10809"),
        ("reject with icmpx type admin-prohibited", "a firewall on the way refuses", "let TCP"),
        ("reject with tcp reset", "refuses: nobody listens there, or a firewall", "`ss -ltn`"),
    ],
    ids=["drop", "prohibited", "reset"],
)
def test_a_firewall(verdict, says, advises):
    need("nft", "unshare")
    if _elsewhere("nft add table inet doctor && exec true").returncode:
        pytest.skip("no firewall in this kernel")
    seconds = "0.5" if verdict == "drop" else "60"
    status, last = _behind(_FIREWALL % verdict, "127.0.0.1", seconds)
    assert (status, last["check"]) == (1, "connect")
    assert says in last["found"]
    assert advises in last["remedy"]


def test_no_route():
    need("unshare")
    status, last = _behind('exec "$@"', "192.0.2.1")
    assert (status, last["check"]) == (1, "connect")
    assert "this machine has no route there" in last["found"]
    assert "ip route get 192.0.2.1" in last["remedy"]


def test_other_verbs_point_at_the_doctor():
    need("unshare")
    done = _elsewhere('exec "$@"', "info", "192.0.2.1/data")
    what, hint = done.stderr.splitlines()
    assert "network is unreachable" in what
    assert "`nbdlink doctor nbd://192.0.2.1/data`" in hint
