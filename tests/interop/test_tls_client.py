"""Our client over TLS against other implementations' servers.

The certificates are read by GnuTLS there and by OpenSSL here, and the two do not refuse alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex

import pytest

from nbdlink.cli.main import main
from nbdlink.client.connection import connect
from nbdlink.client.security import Security, TLSOptions
from nbdlink.transport.tlsfiles import CredentialFiles
from nbdlink.uri import Target
from tests import credentials
from tests.certificates import DAY, NOW, Authority

from .peers import _running
from .tls_peers import TLS_PEERS, free_port, nbd_server, nbdkit, qemu_nbd

pytestmark = pytest.mark.interop

SIZE = 4 << 20
X509 = list(TLS_PEERS)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return credentials.make(tmp_path_factory.mktemp("credentials"))


@pytest.fixture(scope="module")
def served(tmp_path_factory, files):
    """Give the image and the target of a peer, which is started when it is first asked for.

    Nobody changes the image outside of its first MiB.
    """
    running = {}
    with contextlib.ExitStack() as stack:

        def give(name):
            if name not in running:
                image = tmp_path_factory.mktemp(name) / "disk.img"
                image.write_bytes(os.urandom(SIZE))
                kind, _, psk = name.partition("+")
                server = TLS_PEERS[kind](image, files.keys if psk else files.server)
                running[name] = image, stack.enter_context(server)
            return running[name]

        yield give


@pytest.fixture
def nbdlink(capsys):
    """Run nbdlink in this process; give its exit status, stdout and stderr."""

    def run(*words):
        capsys.readouterr()
        status = main([str(word) for word in words])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


@pytest.fixture
def done(nbdlink):
    """Run nbdlink, which must not fail; give what it printed."""

    def run(*words):
        status, out, err = nbdlink(*words)
        assert status == 0, f"nbdlink {shlex.join(map(str, words))}: {err}"
        return out

    return run


@pytest.fixture
def refused(nbdlink):
    """Run nbdlink, which must fail with one line and at most one of advice; give the two."""

    def run(*words):
        status, out, err = nbdlink(*words)
        what, *hint = err.splitlines()
        assert (status, out, len(hint) < 2) == (1, "", True), (status, out, err)
        assert what.startswith("nbdlink: ")
        return what, hint[0] if hint else ""

    return run


def certificates(files):
    return "--tls-certificates", files.client


def keys(files, user="alice"):
    return "--tls-psk", files.keys, "--tls-username", user


def secured(target, **said):
    """Demand TLS with certain files, for `connect`."""
    return Security(target, TLSOptions(files=CredentialFiles(**said)))


@pytest.mark.parametrize("peer", X509)
def test_info_tells_who_the_server_is_and_how_it_is_spoken_to(peer, served, files, done):
    _, target = served(peer)
    server = json.loads(done("info", "--json", target, *certificates(files)))
    assert server["TLS"] is True
    assert (server["TLS-version"], server["TLS-peer"]) == ("TLSv1.3", "CN=localhost")
    assert server["TLS-cipher"].startswith("TLS_"), server["TLS-cipher"]
    assert server["exports"][0]["export-size"] == SIZE


@pytest.mark.parametrize("peer", ["nbdkit+psk", "qemu-nbd+psk"])
def test_info_over_a_pre_shared_key_names_nobody(peer, served, files, done):
    _, target = served(peer)
    server = json.loads(done("info", "--json", target, *keys(files)))
    assert (server["TLS"], server["TLS-peer"]) == (True, None)
    assert "by a pre-shared key" in done("info", target, *keys(files))


@pytest.mark.parametrize("peer", [*X509, "nbdkit+psk", "qemu-nbd+psk"])
def test_what_is_written_arrives_and_is_read_again(peer, served, files):
    image, target = served(peer)
    data = os.urandom(300_001)
    said = {"psk": str(files.keys), "username": "bob"}
    if not peer.endswith("psk"):
        said = {"directory": str(files.client)}
    with connect(target, security=secured(target, **said)) as nbd:
        nbd.pwrite(data, 12_345)
        nbd.flush()
        assert nbd.pread(len(data), 12_345) == data
    assert image.read_bytes()[12_345 : 12_345 + len(data)] == data


@pytest.mark.parametrize("peer", [*X509, "nbdkit+psk", "qemu-nbd+psk"])
def test_a_copy_of_the_export_is_the_image(peer, served, files, done, tmp_path):
    image, target = served(peer)
    said = keys(files) if peer.endswith("psk") else certificates(files)
    done("copy", "-C", 1 if peer == "nbd-server" else 3, target, tmp_path / "copy", *said)
    assert (tmp_path / "copy").read_bytes() == image.read_bytes()


@pytest.mark.parametrize("peer", X509)
def test_a_copy_to_the_export_fills_the_image(peer, files, done, tmp_path):
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(SIZE))
    source = tmp_path / "source"
    source.write_bytes(os.urandom(SIZE))
    with TLS_PEERS[peer](image, files.server) as target:
        done("copy", source, target, *certificates(files))
    assert image.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("peer", ["nbdkit", "qemu-nbd"])
def test_map_tells_of_data_and_holes(peer, files, done, tmp_path):
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(SIZE)
        file.seek(1 << 20)
        file.write(os.urandom(1 << 20))
    with TLS_PEERS[peer](image, files.server) as target:
        extents = json.loads(done("map", "--json", target, *certificates(files)))
    data = [(each["offset"], each["length"]) for each in extents if not each["type"] & 1]
    assert data == [(1 << 20, 1 << 20)]


@pytest.mark.parametrize("peer", ["qemu-nbd", "nbd-server"])
def test_exports_lists_what_is_offered(peer, served, files, done):
    _, target = served(peer)
    server = json.loads(done("exports", "--json", target, *certificates(files)))
    assert server["TLS"] is True
    assert [(each["export-name"], each["export-size"]) for each in server["exports"]] == [
        ("data", SIZE)
    ]


# The URI can say it all.


def test_the_uri_can_name_the_certificates(served, files, done):
    _, target = served("nbdkit")
    target = dataclasses.replace(target, tls_certificates=str(files.trust))
    assert "CN=localhost" in done("info", target)


def test_the_uri_can_name_the_keys_and_the_user(served, files, done):
    _, target = served("nbdkit+psk")
    target = dataclasses.replace(target, tls_psk_file=str(files.keys), username="bob")
    assert "pre-shared key" in done("info", target)


def test_the_uri_can_give_up_to_verify(served, done):
    _, target = served("nbdkit")
    said = done("info", dataclasses.replace(target, tls_verify_peer=False))
    assert "CN=localhost (not verified)" in said


# Unix sockets.


@pytest.mark.parametrize("name", [None, "localhost"])
def test_over_a_unix_socket_the_certificate_has_no_name_to_match(files, done, tmp_path, name):
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(SIZE))
    plain = Target(socket=str(tmp_path / "socket"))
    command = ["nbdkit", "-f", "-U", plain.socket, "--tls=require"]
    command += [f"--tls-certificates={files.server}", "file", str(image)]
    with _running(command, plain):
        target = dataclasses.replace(plain, tls=True, tls_hostname=name)
        assert str(target).startswith("nbds+unix:///?socket=")
        done("copy", target, tmp_path / "copy", "--tls-certificates", files.trust)
    assert (tmp_path / "copy").read_bytes() == image.read_bytes()


def test_over_a_unix_socket_a_name_that_is_given_has_to_match(files, refused, tmp_path):
    plain = Target(socket=str(tmp_path / "socket"))
    command = ["nbdkit", "-f", "-U", plain.socket, "--tls=require"]
    command += [f"--tls-certificates={files.server}", "memory", "1M"]
    with _running(command, plain):
        target = dataclasses.replace(plain, tls=True, tls_hostname="store1.example.com")
        what, hint = refused("info", target, "--tls-certificates", files.trust)
    assert "for localhost, 127.0.0.1, ::1, not for store1.example.com" in what
    assert "--tls-hostname localhost" in hint


# Whether TLS is wanted.


@pytest.mark.parametrize("peer", ["nbdkit", "qemu-nbd"])
def test_a_server_that_demands_tls_says_so_to_a_plain_client(peer, served, refused):
    _, target = served(peer)
    what, hint = refused("info", dataclasses.replace(target, tls=False))
    assert "demands TLS" in what
    assert "nbds://" in hint


@pytest.mark.parametrize(
    ("policy", "tls"), [("off", False), ("allow", True), ("require", True)], ids=str
)
def test_a_server_that_offers_tls_leaves_it_to_the_client(policy, tls, files, done, tmp_path):
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(SIZE))
    said = () if policy == "off" else ("--tls-certificates", files.trust)
    with nbdkit(image, files.server, "--tls=on") as target:
        plain = dataclasses.replace(target, tls=False)
        server = json.loads(done("info", "--json", plain, "--tls", policy, *said))
        done("copy", plain, tmp_path / "copy", "--tls", policy, *said)
    assert server["TLS"] is tls
    assert (tmp_path / "copy").read_bytes() == image.read_bytes()


@pytest.fixture(scope="module")
def plain_server(tmp_path_factory):
    target = Target(socket=str(tmp_path_factory.mktemp("plain") / "socket"))
    command = ["nbdkit", "-f", "-U", target.socket, "--tls=off", "memory", "1M"]
    with _running(command, target):
        yield target


def test_nbds_never_goes_without_tls(plain_server, files, refused):
    target = dataclasses.replace(plain_server, tls=True)
    what, hint = refused("info", target, "--tls-certificates", files.trust)
    assert "does not offer TLS" in what
    assert "nbd://" in hint


def test_tls_that_is_only_allowed_is_done_without_where_there_is_none(plain_server, done):
    assert "without TLS" in done("info", plain_server, "--tls", "allow")


# Servers that want to know who comes.


def test_nbdkit_lets_in_who_shows_a_certificate(files, done, tmp_path):
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(SIZE))
    with nbdkit(image, files.server, "--tls-verify-peer") as target:
        done("copy", target, tmp_path / "copy", *certificates(files))
    assert (tmp_path / "copy").read_bytes() == image.read_bytes()


@pytest.fixture(scope="module")
def choosy(tmp_path_factory, files):
    """Servers that demand a certificate."""
    image = tmp_path_factory.mktemp("choosy") / "disk.img"
    image.write_bytes(bytes(SIZE))
    with (
        nbdkit(image, files.server, "--tls-verify-peer") as first,
        qemu_nbd(image, files.server, verify=True) as second,
        nbd_server(image, files.server) as third,
    ):
        yield {"nbdkit": first, "qemu-nbd": second, "nbd-server": third}


@pytest.mark.parametrize("peer", X509)
def test_a_server_lets_in_who_shows_a_certificate(peer, choosy, files, done):
    assert "CN=localhost" in done("info", choosy[peer], *certificates(files))


# With GnuTLS a server closes the connection without an alert, once the handshake is done here.
# So all that a person can be told is what it may be, and where to look.


@pytest.mark.parametrize("peer", X509)
def test_who_shows_no_certificate_is_told_that_it_may_take_one(peer, choosy, files, refused):
    _, hint = refused("info", choosy[peer], "--tls-certificates", files.trust)
    assert hint.startswith("  hint: perhaps it wants a certificate from us (--tls-certificates")
    assert "its log will tell" in hint


@pytest.mark.parametrize("peer", X509)
def test_who_is_not_believed_is_told_that_it_may_be_the_certificate(
    peer, choosy, files, refused, tmp_path
):
    stranger = Authority("Another CA").issue("me", role="client")
    folder = files.authority.write_directory(tmp_path / "pki", client=stranger)
    _, hint = refused("info", choosy[peer], "--tls-certificates", folder)
    assert hint == "  hint: perhaps it does not believe our certificate: its log will tell"


# Wrong credentials, against GnuTLS, which is as silent then.


@pytest.mark.parametrize("peer", ["nbdkit+psk", "qemu-nbd+psk"])
@pytest.mark.parametrize("user", ["alice", "mallory"])
def test_a_wrong_key_and_a_wrong_user_are_told_by_name(peer, user, served, refused, tmp_path):
    _, target = served(peer)
    wrong = credentials.write_keys(tmp_path / "keys.psk", **{user: b"z" * 32})
    what, hint = refused("info", target, "--tls-psk", wrong)
    assert "hung up in the TLS handshake" in what
    assert f"no key, or another one, for {user}: compare the key files" in hint


@pytest.mark.parametrize("peer", ["nbdkit+psk", "qemu-nbd+psk"])
def test_who_has_no_key_is_told_that_it_may_take_one(peer, served, files, refused):
    _, target = served(peer)
    what, hint = refused("info", target, *certificates(files))
    assert "hung up in the TLS handshake" in what
    assert "perhaps it wants a pre-shared key (--tls-psk FILE)" in hint


@pytest.mark.parametrize("peer", X509)
def test_a_certificate_is_no_proof_of_the_pre_shared_key(peer, served, files, refused):
    _, target = served(peer)
    what, hint = refused("info", target, *keys(files))
    assert "does not use the pre-shared key of alice, but shows a certificate" in what
    assert "--tls-ca" in hint


@pytest.mark.usefixtures("only_tls_1_2")
def test_nor_is_it_in_tls_1_2(files, refused, tmp_path):
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(SIZE))
    with nbdkit(image, files.server) as target:
        what, _ = refused("info", target, *keys(files))
    assert "TLS handshake" in what


def wrongs(authority):
    """Give server certificates that are wrong, and what is said of each."""
    stranger = Authority("Another CA")
    return {
        "expired": (authority.issue(not_after=NOW - 3 * DAY), f"expired on {NOW - 3 * DAY:%Y-%m}"),
        "not yet valid": (
            authority.issue(not_before=NOW + 3 * DAY),
            f"is valid only from {NOW + 3 * DAY:%Y-%m-%d} on",
        ),
        "for another host": (
            authority.issue(names=("store1.example.com",)),
            "is for store1.example.com, not for localhost",
        ),
        "of an unknown authority": (
            stranger.issue(),
            "signed by an authority that is not trusted (CN=Another CA)",
        ),
        "for clients": (authority.issue(role="client"), "not meant for servers"),
    }


@pytest.mark.parametrize("wrong", list(wrongs(Authority())))
def test_a_server_is_not_believed_with_a_certificate_that_is(wrong, files, refused, tmp_path):
    # nbdkit shows whatever it is given.
    identity, said = wrongs(files.authority)[wrong]
    folder = files.authority.write_directory(tmp_path / "pki", server=identity)
    plain = Target("localhost", free_port())
    command = ["nbdkit", "-f", "-i", "127.0.0.1", "-p", str(plain.port), "--tls=require"]
    command += [f"--tls-certificates={folder}", "memory", "1M"]
    with _running(command, dataclasses.replace(plain, host="127.0.0.1")):
        target = dataclasses.replace(plain, tls=True)
        what, _ = refused("info", target, "--tls-certificates", files.trust)
    assert "the server's certificate CN=localhost " in what
    assert said in what


# TLS 1.2.


@pytest.fixture
def only_tls_1_2(monkeypatch, tmp_path):
    """Keep programs with GnuTLS from TLS 1.3."""
    path = tmp_path / "gnutls.conf"
    path.write_text("[overrides]\ndisabled-version = tls1.3\n")
    monkeypatch.setenv("GNUTLS_SYSTEM_PRIORITY_FILE", str(path))


@pytest.mark.parametrize("kind", ["certificates", "keys"])
@pytest.mark.parametrize("peer", [nbdkit, qemu_nbd])
@pytest.mark.usefixtures("only_tls_1_2")
def test_a_server_without_tls_1_3_is_spoken_to_in_1_2(peer, kind, files, done, tmp_path):
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(SIZE))
    given, said = files.server, certificates(files)
    if kind == "keys":
        given, said = files.keys, keys(files)
    with peer(image, given) as target:
        server = json.loads(done("info", "--json", target, *said))
        done("copy", target, tmp_path / "copy", *said)
    assert server["TLS-version"] == "TLSv1.2"
    assert (tmp_path / "copy").read_bytes() == image.read_bytes()
