"""What the reading verbs and `copy` do over TLS."""

from __future__ import annotations

import json
import os

import pytest

from nbdlink.cli.main import main
from nbdlink.server import serve_in_thread
from nbdlink.server.security import ServerSecurity
from nbdlink.transport.tlsfiles import CredentialFiles
from nbdlink.uri import Target
from tests import credentials

MIB = 1 << 20
SIZE = 4 * MIB


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return credentials.make(tmp_path_factory.mktemp("credentials"))


def security(files):
    return ServerSecurity("require", CredentialFiles(directory=str(files.server)))


@pytest.fixture
def image(tmp_path):
    """One MiB of data, and a hole."""
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(MIB))
    os.truncate(path, SIZE)
    return path


@pytest.fixture
def secured(image, files):
    """Serve the image as "data" over TLS only; give the target."""
    with serve_in_thread({"data": image}, security=security(files)) as service:
        yield Target("localhost", service.addresses[0][1], export="data", tls=True)


@pytest.fixture
def plain(tmp_path):
    """Serve another file without TLS; give it and the target."""
    path = tmp_path / "plain.img"
    path.write_bytes(os.urandom(SIZE))
    with serve_in_thread({"": path}) as service:
        yield path, Target("127.0.0.1", service.addresses[0][1])


@pytest.fixture
def nbdlink(files, capsys):
    """Run nbdlink with a client's directory, which must not fail; give what it printed."""

    def run(*words):
        status = main([*map(str, words), "--tls-certificates", str(files.trust)])
        said = capsys.readouterr()
        assert status == 0, said.err
        return said.out

    return run


TLS = ("TLS", "TLS-version", "TLS-cipher", "TLS-peer")


@pytest.mark.parametrize("verb", ["info", "exports"])
def test_json_tells_of_tls(verb, nbdlink, secured):
    server = json.loads(nbdlink(verb, "--json", secured))
    assert [server[key] for key in TLS] == [
        True,
        "TLSv1.3",
        "TLS_AES_128_GCM_SHA256",
        "CN=localhost",
    ]
    (export,) = server["exports"]
    assert (export["export-name"], export["export-size"]) == ("data", SIZE)
    assert export["uri"] == str(secured)


@pytest.mark.parametrize(("options", "verified"), [((), True), (("--tls-no-verify-peer",), False)])
def test_json_tells_whether_the_server_has_proved_who_it_is(options, verified, nbdlink, secured):
    server = json.loads(nbdlink("info", "--json", *options, secured))
    assert server["TLS-verified"] is verified


@pytest.mark.parametrize("verb", ["info", "exports"])
def test_json_tells_that_there_is_no_tls(verb, plain, capsys):
    assert main([verb, "--json", str(plain[1])]) == 0
    server = json.loads(capsys.readouterr().out)
    assert server["TLS"] is False
    assert [server.get(key) for key in TLS[1:]] == [None] * 3


def test_info_tells_of_tls_in_two_lines(nbdlink, secured):
    first, second, *_ = nbdlink("info", secured).splitlines()
    assert first.startswith("protocol: newstyle-fixed with TLS, ")
    assert second == "TLS: TLSv1.3, TLS_AES_128_GCM_SHA256, CN=localhost"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1"])
def test_an_address_is_looked_for_in_the_certificate(host, nbdlink, image, files):
    with serve_in_thread({"": image}, host=host, security=security(files)) as service:
        target = Target(host, service.addresses[0][1], tls=True)
        assert "CN=localhost" in nbdlink("info", target)


def test_exports_lists_them(nbdlink, secured):
    assert nbdlink("exports", secured).splitlines()[1].split()[:2] == ["data", "4M"]


def test_map_tells_of_data_and_holes(nbdlink, secured):
    extents = json.loads(nbdlink("map", "--json", secured))
    assert [tuple(extent.values())[:3] for extent in extents] == [
        (0, MIB, 0),
        (MIB, SIZE - MIB, 3),
    ]


def test_map_finds_no_other_context(secured, files, capsys):
    # Which takes a second connection.
    words = ["map", "--context", "qemu:nothing", str(secured)]
    assert main([*words, "--tls-certificates", str(files.trust)]) == 2
    assert "base:allocation" in capsys.readouterr().err


# Credentials are for the end that says nbds, and the other one is not asked for TLS.


def test_copy_from_a_plain_export_to_one_with_tls(nbdlink, plain, secured, image):
    path, source = plain
    nbdlink("copy", "--verify", source, secured)
    assert image.read_bytes() == path.read_bytes()


def test_copy_from_an_export_with_tls_to_a_plain_one(nbdlink, plain, secured, image):
    path, destination = plain
    nbdlink("copy", "--verify", secured, destination)
    assert path.read_bytes() == image.read_bytes()


def test_copy_from_tls_to_tls(nbdlink, secured, image, files, tmp_path):
    path = tmp_path / "other.img"
    path.write_bytes(bytes(SIZE))
    with serve_in_thread({"": path}, security=security(files)) as service:
        other = Target("localhost", service.addresses[0][1], tls=True)
        nbdlink("copy", "--verify", secured, other)
    assert path.read_bytes() == image.read_bytes()


def test_copy_between_files_and_exports_with_tls(nbdlink, secured, image, tmp_path):
    nbdlink("copy", secured, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == image.read_bytes()
    other = tmp_path / "other"
    other.write_bytes(os.urandom(SIZE))
    nbdlink("copy", other, secured)
    assert image.read_bytes() == other.read_bytes()


def test_copy_with_tls_for_both_ends_wants_it_of_both(plain, secured, files, capsys):
    words = ["copy", str(plain[1]), str(secured), "--tls", "require"]
    assert main([*words, "--tls-certificates", str(files.trust)]) == 1
    assert "does not offer TLS" in capsys.readouterr().err


def test_copy_takes_credentials_from_either_uri(secured, image, files, tmp_path, capsys):
    words = f"{secured}?tls-certificates={files.trust}", str(tmp_path / "copy")
    assert main(["copy", *words]) == 0, capsys.readouterr().err
    assert (tmp_path / "copy").read_bytes() == image.read_bytes()


def test_copy_without_an_export_has_no_use_for_credentials(image, files, tmp_path, capsys):
    words = ["copy", str(image), str(tmp_path / "copy"), "--tls-certificates", str(files.trust)]
    assert main(words) == 2
    assert "neither end is an export" in capsys.readouterr().err
    assert not (tmp_path / "copy").exists()
