"""`nbdlink serve` with TLS: whom it lets in to what, and credentials that change under it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import struct
import tempfile
from pathlib import Path

import pytest

from nbdlink.cli.main import main
from nbdlink.client.connection import connect
from nbdlink.client.negotiate import Negotiation
from nbdlink.client.security import Security, TLSOptions
from nbdlink.errors import OptionError, RemoteProtocolError, TLSError
from nbdlink.protocol.constants import Option, OptionReply
from nbdlink.protocol.messages import ExportNameAnswer, OptionRequest, pack_export_name
from nbdlink.transport.stream import Deadline
from nbdlink.transport.tlsfiles import CredentialFiles
from nbdlink.uri import Target
from tests import credentials
from tests.certificates import Authority

from .programs import end, serving

SIZE = 1 << 20


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return credentials.make(tmp_path_factory.mktemp("credentials"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    made = {}
    for name in ("open", "secret"):
        made[name] = folder / f"{name}.img"
        made[name].write_bytes(os.urandom(SIZE))
    return made


def secured(target, folder=None, *, psk=None, user=None):
    """Give what a client with these files demands of TLS."""
    given = CredentialFiles(
        directory=None if folder is None else str(folder),
        psk=None if psk is None else str(psk),
        username=user,
    )
    return Security(target, TLSOptions(files=given))


@contextlib.contextmanager
def serve(images, *words):
    """Serve both images under their names on a Unix socket; give process and plain target."""
    path = Path(tempfile.mkdtemp(dir=images["open"].parent), "socket")
    exports = [f"{name}={image}" for name, image in images.items()]
    with serving("-k", path, *words, *exports, lines=2) as (process, lines):
        assert all(lines), process.stderr.read()
        yield process, Target(socket=str(path))
        status, said = end(process)
        assert status == 0, said
        assert "Traceback" not in said, said


# Exports for some only ("SELECTIVETLS mode" of the specification).


@pytest.fixture(scope="module")
def selective(files, images):
    words = ["--tls", "allow", "--tls-certificates", files.server, "--tls-verify-peer"]
    with serve(images, *words, "--client", "secret=CN=me") as (_, target):
        yield target


@pytest.fixture
def plain(selective):
    with Negotiation(selective) as negotiation:
        yield negotiation


@pytest.fixture
def stranger(selective, files):
    with Negotiation(selective, security=secured(selective, files.other)) as negotiation:
        yield negotiation


@pytest.fixture
def friend(selective, files):
    with Negotiation(selective, security=secured(selective, files.client)) as negotiation:
        yield negotiation


def names(negotiation):
    return [listing.name for listing in negotiation.list_exports()]


def test_who_may_use_an_export_sees_it(friend):
    assert friend.tls is not None
    assert names(friend) == ["open", "secret"]
    assert friend.go("secret").size == SIZE


def test_a_plain_client_sees_the_others_only(plain):
    assert plain.tls is None
    assert names(plain) == ["open"]
    assert plain.go("open").size == SIZE


def test_another_client_sees_the_others_only(stranger):
    assert names(stranger) == ["open"]
    assert stranger.go("open").size == SIZE


@pytest.mark.parametrize("verb", ["info", "go"])
def test_a_plain_client_is_told_that_the_export_takes_tls(plain, verb):
    with pytest.raises(OptionError, match="demands TLS") as caught:
        getattr(plain, verb)("secret")
    assert caught.value.reply == OptionReply.ERR_TLS_REQD
    assert names(plain) == ["open"], "the negotiation does not go on"


@pytest.mark.parametrize("verb", ["info", "go"])
def test_another_client_is_told_that_it_may_not(stranger, verb):
    with pytest.raises(OptionError, match="CN=other may not use the export 'secret'") as caught:
        getattr(stranger, verb)("secret")
    assert caught.value.reply == OptionReply.ERR_POLICY


@pytest.mark.parametrize("who", ["plain", "stranger"])
def test_metadata_contexts_are_not_told_either(request, who):
    negotiation = request.getfixturevalue(who)
    assert negotiation.request_structured_replies()
    assert negotiation.list_meta_contexts("open") == ["base:allocation"]
    assert negotiation.list_meta_contexts("secret") == []
    assert negotiation.set_meta_contexts(["base:allocation"], "secret") == {}


@pytest.mark.parametrize("who", ["plain", "stranger"])
def test_export_name_is_no_way_around(request, who):
    negotiation = request.getfixturevalue(who)
    negotiation._send(OptionRequest(Option.EXPORT_NAME, pack_export_name("secret")))
    with pytest.raises(RemoteProtocolError, match="hung up"):
        assert not isinstance(negotiation._receive(), ExportNameAnswer)


def test_data_is_the_same_with_tls_and_without(selective, files, images):
    for folder in (None, files.client):
        security = secured(selective, folder)
        target = Target(socket=selective.socket, export="open")
        with connect(target, security=security) as nbd:
            assert nbd.pread(SIZE, 0) == images["open"].read_bytes()


# TLS for everybody.


def test_where_tls_is_demanded_every_option_says_so(files, images):
    with serve(images, "--tls-certificates", files.server) as (_, target):
        for option in (Option.LIST, Option.INFO, Option.GO, Option.STRUCTURED_REPLY, 77):
            with Negotiation(target) as negotiation:
                with pytest.raises(OptionError) as caught:
                    negotiation._ask(OptionRequest(option))
                assert caught.value.reply == OptionReply.ERR_TLS_REQD, option
        with Negotiation(target, security=secured(target, files.trust)) as negotiation:
            assert names(negotiation) == ["open", "secret"]


def may_come(target, security):
    """Tell whether somebody may use a server."""
    with contextlib.suppress(OptionError), Negotiation(target, security=security) as negotiation:
        return negotiation.go("open").size == SIZE
    return False


def test_several_may_be_let_in_by_their_distinguished_names(files, images, tmp_path):
    third = files.authority.issue("third", role="client")
    folder = files.authority.write_directory(tmp_path / "third", client=third)
    words = ["--tls-certificates", files.server, "--tls-verify-peer"]
    words += ["--tls-authz", "CN=me", "--tls-authz", "CN=third"]
    with serve(images, *words) as (_, target):
        let_in = [
            may_come(target, secured(target, each)) for each in (files.client, files.other, folder)
        ]
    assert let_in == [True, False, True]


def test_users_of_keys_may_be_let_in_by_name(files, images):
    with serve(images, "--tls-psk", files.keys, "--tls-authz", "bob") as (_, target):
        let_in = [
            may_come(target, secured(target, psk=files.keys, user=user))
            for user in ("alice", "bob")
        ]
    assert let_in == [False, True]


def test_an_export_may_be_one_users_of_keys(files, images):
    words = ["--tls-psk", files.keys, "--client", "secret=bob"]
    with serve(images, *words) as (_, target):
        seen = {}
        for user in ("alice", "bob"):
            security = secured(target, psk=files.keys, user=user)
            with Negotiation(target, security=security) as negotiation:
                seen[user] = names(negotiation)
    assert seen == {"alice": ["open"], "bob": ["open", "secret"]}


# What contradicts itself.


@pytest.mark.parametrize(
    ("words", "what", "hint"),
    [
        ("--tls off --tls-certificates {server}", "options for TLS, and yet no TLS", "--tls req"),
        ("--tls off --tls-psk {keys}", "options for TLS, and yet no TLS", "--tls require"),
        ("--tls-verify-peer", "options for TLS, and yet no TLS", "--tls-certificates DIR"),
        ("--tls-authz CN=me", "options for TLS, and yet no TLS", "--tls-certificates DIR"),
        ("--client CN=me", "options for TLS, and yet no TLS", "--tls-certificates DIR"),
        (
            "--tls-certificates {server} --client CN=me",
            "--client takes clients that have to show who they are",
            "add --tls-verify-peer",
        ),
        (
            "--tls-certificates {server} --tls-authz CN=me",
            "--tls-authz takes clients that have to show a certificate",
            "add --tls-verify-peer",
        ),
        (
            "--tls allow --tls-certificates {server} --tls-verify-peer --tls-authz CN=me",
            "--tls allow lets anybody in without TLS",
            "say --tls require",
        ),
        (
            "--tls-cert {server}/server-cert.pem --tls-key {server}/server-key.pem "
            "--tls-verify-peer",
            "--tls-verify-peer takes the authority that signed the clients' certificates",
            "--tls-ca FILE",
        ),
        (
            "--tls-certificates {server} --tls-psk {keys}",
            "--tls-psk and --tls-certificates exclude each other",
            "either pre-shared keys or certificates",
        ),
        (
            "--tls-key {server}/server-key.pem",
            "is given without its certificate",
            "add --tls-cert FILE",
        ),
        ("--tls require", "a server with TLS needs credentials", "--tls-certificates DIR"),
        (
            "--tls-certificates {server} --tls-verify-depth 101",
            "a verification depth of 101 is not possible",
            "0 to 100",
        ),
        ("--tls-psk {server}", "keys.psk: no such file", "holds keys.psk"),
    ],
)
def test_what_contradicts_itself_is_an_error_of_the_command_line(
    words, what, hint, files, images, tmp_path, capsys
):
    given = words.format(server=files.server, keys=files.keys).split()
    words = ["serve", "-k", str(tmp_path / "socket"), *given, str(images["open"])]
    assert main(words) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2, said
    assert what in said[0]
    assert hint in said[1]
    assert not (tmp_path / "socket").exists()


# Credentials that change.


@pytest.fixture
def renewable(files, images, tmp_path):
    """A server, the directory that it has its credentials from, and what it will show next."""
    folder = shutil.copytree(files.server, tmp_path / "pki")
    with serve(images, "-v", "--tls-certificates", folder) as (process, target):
        yield process, target, folder


def hang_up(process):
    """Send SIGHUP and give what the server says to it."""
    process.send_signal(signal.SIGHUP)
    while line := process.stderr.readline():
        if "credentials" in line:
            return line
    raise AssertionError("the server has ended")


def shown(target, files):
    """Give the serial number of the certificate that a newcomer is shown."""
    with Negotiation(target, security=secured(target, files.trust)) as negotiation:
        return negotiation.tls.certificate.serial_number


def test_newcomers_are_shown_what_was_renewed(renewable, files):
    process, target, folder = renewable
    before = shown(target, files)
    renewed = files.authority.issue()
    assert shown(target, files) == before, "it changes without being told to"
    files.authority.write_directory(folder, server=renewed)
    assert hang_up(process) == "nbdlink: the credentials have been loaded anew\n"
    assert shown(target, files) == renewed.certificate.serial_number != before


def test_who_is_connected_goes_on_undisturbed(renewable, files, images):
    process, target, folder = renewable
    target = Target(socket=target.socket, export="open")
    with connect(target, security=secured(target, files.trust)) as nbd:
        half = SIZE // 2
        data = nbd.pread(half, 0)
        other = Authority("Another CA")
        other.write_directory(folder, server=other.issue())
        hang_up(process)
        with pytest.raises(TLSError, match="Another CA"):
            shown(target, files)
        assert data + nbd.pread(half, half) == images["open"].read_bytes()


def test_who_is_in_the_handshake_meanwhile_comes_in(files, images):
    # OpenSSL calls back for a key, and what it calls must not be gone with the old credentials.
    with (
        serve(images, "-v", "--tls-psk", files.keys) as (process, target),
        socket.socket(socket.AF_UNIX) as sock,
    ):
        sock.settimeout(60)
        sock.connect(target.socket)
        sock.recv(18, socket.MSG_WAITALL)
        sock.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", Option.STARTTLS, 0))
        assert sock.recv(20, socket.MSG_WAITALL)[12:16] == bytes([0, 0, 0, 1]), "no TLS"
        for _ in range(5):
            hang_up(process)
        security = secured(target, psk=files.keys, user="alice")
        with security.begin(sock, Deadline(60)) as stream:
            assert stream.session.version == "TLSv1.3"


def break_key(folder):
    (folder / "server-key.pem").write_bytes(b"nonsense\n")


def remove_certificate(folder):
    (folder / "server-cert.pem").unlink()


def expose_key(folder):
    (folder / "server-key.pem").chmod(0o640 | 0o004)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (break_key, "server-key.pem is not PEM"),
        (remove_certificate, "server-cert.pem: no such file"),
        (expose_key, "others may read it"),
    ],
)
def test_what_cannot_be_used_leaves_the_old_in_place(renewable, files, spoil, words):
    process, target, folder = renewable
    before = shown(target, files)
    spoil(folder)
    line = hang_up(process)
    assert line.startswith("nbdlink: the credentials stay as they are: ")
    assert words in line
    assert shown(target, files) == before


def test_a_server_that_went_to_the_background_finds_its_files_again(
    files, images, tmp_path, monkeypatch
):
    # It leaves the directory in which it was told where they are.
    folder = shutil.copytree(files.server, tmp_path / "pki")
    monkeypatch.chdir(tmp_path)
    words = ["-k", tmp_path / "socket", "--fork", "--pid-file", tmp_path / "pid"]
    words += ["--tls-certificates", "pki", f"open={images['open']}"]
    with serving(*words) as (starter, _):
        assert starter.wait(60) == 0
    pid = int((tmp_path / "pid").read_text())
    ended = os.pidfd_open(pid)
    try:
        target = Target(socket=str(tmp_path / "socket"))
        renewed = files.authority.issue()
        files.authority.write_directory(folder, server=renewed)
        os.kill(pid, signal.SIGHUP)
        # What it says goes to syslog. A signal is heard by its main thread soon, and nothing
        # tells when, but newcomers.
        wanted = renewed.certificate.serial_number
        assert any(shown(target, files) == wanted for _ in range(1000)), "it shows the old one"
    finally:
        os.kill(pid, signal.SIGTERM)
        select.select([ended], [], [], 60)
        os.close(ended)


def test_the_uri_that_is_printed_says_tls(files, images, capsys):
    words = ["-b", "127.0.0.1", "-p", "0", "--tls-certificates", files.server]
    with serving(*words, images["open"]) as (process, (line,)):
        uri = line.partition(" is ")[0]
        assert uri.startswith("nbds://localhost:")
        assert main(["info", "--json", uri, "--tls-certificates", str(files.trust)]) == 0
        assert json.loads(capsys.readouterr().out)["TLS"] is True
        assert end(process)[0] == 0
