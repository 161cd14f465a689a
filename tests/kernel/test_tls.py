"""Devices over TLS: who encrypts, against every server, as an administrator would type it.

On the kernel's road no process is left behind; `/proc/net/tls_stat` counts what the kernel does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
from pathlib import Path

import pytest

from nbdlink.cli.main import main
from nbdlink.server import serve_in_thread
from nbdlink.server.security import ServerSecurity
from nbdlink.transport import tlscontext
from nbdlink.transport.tlsfiles import CredentialFiles
from nbdlink.uri import Target
from tests.certificates import Authority, write_secret
from tests.interop.peers import MISSING
from tests.interop.tls_peers import nbdkit, qemu_nbd

from .conftest import free_all, until

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

# A machine whose files are in its memory keeps all of them until the end.
SIZE = 12 << 20
AES_128, AES_256 = "TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384"
CHACHA20 = "TLS_CHACHA20_POLY1305_SHA256"


@contextlib.contextmanager
def ours(image, credentials):
    files = CredentialFiles(directory=str(credentials))
    if not credentials.is_dir():
        files = CredentialFiles(psk=str(credentials))
    security = ServerSecurity("require", files)
    with serve_in_thread({"data": image}, security=security) as service:
        port = service.addresses[0][1]
        yield Target("localhost", port, export="data", tls=True)


SERVERS = {"nbdkit": nbdkit, "qemu-nbd": qemu_nbd, "nbdlink": ours}


@pytest.fixture(scope="module")
def credentials(tmp_path_factory):
    authority = Authority()
    return authority.write_directory(
        tmp_path_factory.mktemp("pki"),
        server=authority.issue(),
        client=authority.issue("me", role="client"),
    )


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture(params=list(SERVERS))
def server(request, image, credentials):
    with SERVERS[request.param](image, credentials) as target:
        yield target


@pytest.fixture
def attach(capsys, credentials):
    """Attach a target with the client's credentials; give the device."""

    def attach(target, *options, credentials=("--tls-certificates", str(credentials))):
        capsys.readouterr()
        status = main(["attach", str(target), *credentials, *options])
        said = capsys.readouterr()
        assert status == 0, said.err
        return said.out.strip()

    yield attach
    free_all()


def counters():
    """Give the kernel's counters of TLS connections (Documentation/networking/tls.rst)."""
    lines = Path("/proc/net/tls_stat").read_text().splitlines()
    return {name: int(count) for name, count in (line.split() for line in lines)}


def about(device, capsys):
    capsys.readouterr()
    assert main(["info", "--json", device]) == 0
    return json.loads(capsys.readouterr().out)


def relays():
    """Give the processes that relay TLS."""
    found = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            if path.read_text().strip() == "nbdlink-relay":
                found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize("road", ["kernel", "relay"])
def test_the_disk_is_all_there(server, image, attach, road):
    device = attach(server, "--tls-road", road)
    assert Path(device).read_bytes() == image.read_bytes()


@pytest.mark.parametrize("road", ["kernel", "relay"])
def test_a_file_system_on_four_connections_keeps_its_files(server, image, attach, road, tmp_path):
    device = attach(server, "--tls-road", road, "-C", "4")
    subprocess.run(["mkfs.ext4", "-q", "-F", device], check=True)
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    data = os.urandom(4 << 20)
    subprocess.run(["mount", device, mounted], check=True)
    try:
        (mounted / "file").write_bytes(data)
    finally:
        subprocess.run(["umount", mounted], check=True)
    assert main(["detach", device]) == 0
    again = attach(server, "--tls-road", road, "-C", "4")
    subprocess.run(["mount", "-o", "ro", again, mounted], check=True)
    try:
        read = (mounted / "file").read_bytes()
    finally:
        subprocess.run(["umount", mounted], check=True)
    assert hashlib.sha256(read).digest() == hashlib.sha256(data).digest()


@pytest.mark.parametrize("suite", [AES_128, AES_256, CHACHA20])
@pytest.mark.parametrize("make", [nbdkit, qemu_nbd])
def test_the_kernel_does_each_cipher(make, suite, image, credentials, attach, monkeypatch, capsys):
    monkeypatch.setattr(tlscontext, "_SUITES", suite.encode())
    with make(image, credentials) as target:
        device = attach(target, "--tls-road", "kernel")
        assert Path(device).read_bytes() == image.read_bytes()
        assert [each["cipher"] for each in about(device, capsys)["channels"]] == [suite]
        assert main(["detach", device]) == 0


def test_by_itself_it_takes_the_kernel_s_road(server, attach, capsys):
    device = attach(server, "-C", "2")
    assert [each["tls"] for each in about(device, capsys)["channels"]] == ["kernel", "kernel"]


def test_the_kernel_s_road_leaves_no_process(server, attach):
    attach(server, "--tls-road", "kernel")
    assert relays() == []


def test_the_kernel_counts_its_connections(image, credentials, attach):
    with nbdkit(image, credentials) as target:
        before = counters()
        attach(target, "-C", "3", "--tls-road", "kernel")
        after = counters()
    changes = {name: after[name] - before[name] for name in ("TlsTxSw", "TlsRxSw")}
    assert changes == {"TlsTxSw": 3, "TlsRxSw": 3}


def test_our_server_hands_its_side_over_as_well(image, credentials, attach):
    with ours(image, credentials) as target:
        before = counters()
        attach(target, "--tls-road", "relay")
        assert counters()["TlsTxSw"] == before["TlsTxSw"] + 1


def test_nothing_is_decrypted_wrongly(server, attach):
    before = counters()["TlsDecryptError"]
    device = attach(server, "--tls-road", "kernel")
    Path(device).read_bytes()
    assert counters()["TlsDecryptError"] == before


@pytest.mark.parametrize("make", [nbdkit, qemu_nbd, ours])
@pytest.mark.parametrize("road", ["kernel", "relay"])
def test_keys_that_both_sides_know_do_as_well_as_certificates(make, road, image, attach, tmp_path):
    keys = write_secret(tmp_path / "keys.psk", b"alice:" + os.urandom(32).hex().encode() + b"\n")
    with make(image, keys) as target:
        device = attach(target, "--tls-road", road, credentials=("--tls-psk", str(keys)))
        assert Path(device).read_bytes() == image.read_bytes()
        assert main(["detach", device]) == 0


def test_the_relay_is_one_process_and_named(server, attach, capsys):
    device = attach(server, "-C", "4", "--tls-road", "relay")
    assert relays() == [about(device, capsys)["relay"]]


def test_the_relay_ends_with_its_device(server, attach):
    device = attach(server, "-C", "2", "--tls-road", "relay")
    assert main(["detach", device]) == 0
    until(lambda: not relays())


def test_the_relay_keeps_nothing_that_is_swapped_or_dumped(server, attach, capsys):
    relay = about(attach(server, "--tls-road", "relay"), capsys)["relay"]
    status = Path(f"/proc/{relay}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    assert int(fields["VmLck"].split()[0]) > 0


def test_a_killed_relay_is_a_dead_link(server, attach, capsys):
    device = attach(server, "--tls-road", "relay")
    os.kill(about(device, capsys)["relay"], 9)
    until(lambda: about(device, capsys)["state"] == "dead")


@pytest.mark.parametrize("road", ["kernel", "relay"])
def test_a_killed_server_is_a_dead_link(road, image, credentials, attach, capsys):
    with nbdkit(image, credentials) as target:
        device = attach(target, "--tls-road", road)
    until(lambda: about(device, capsys)["state"] == "dead")


def test_tls_over_a_unix_socket_takes_the_relay(image, credentials, attach, capsys, tmp_path):
    security = ServerSecurity("require", CredentialFiles(directory=str(credentials)))
    path = tmp_path / "nbd.sock"
    with serve_in_thread({"": image}, unix=path, security=security):
        device = attach(Target(socket=str(path), tls=True), "--tls-hostname", "localhost")
        (channel,) = about(device, capsys)["channels"]
        assert (channel["tls"], channel["reason"]) == ("relay", "the kernel has TLS for TCP only")
        assert Path(device).read_bytes() == image.read_bytes()
        assert main(["detach", device]) == 0


def test_the_list_says_which_road_is_taken(server, attach, capsys):
    attach(server)
    capsys.readouterr()
    assert main(["list"]) == 0
    assert " kernel " in capsys.readouterr().out


def test_the_doctor_finds_tls_in_the_kernel(capsys):
    main(["doctor", "--json"])
    findings = {each["check"]: each["status"] for each in json.loads(capsys.readouterr().out)}
    assert findings["TLS in the kernel"] == "ok"
