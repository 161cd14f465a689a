"""The options about TLS: what a command line comes to, for a client and for a server."""

from __future__ import annotations

import argparse

import pytest

from nbdlink.cli.tls import (
    add_client_arguments,
    add_server_arguments,
    client_options,
    server_security,
)
from nbdlink.client.security import NO_OPTIONS, TLSOptions
from nbdlink.errors import ConfigError
from nbdlink.transport.tlsfiles import CredentialFiles
from tests import credentials


def parse(words, add=add_client_arguments, **options):
    parser = argparse.ArgumentParser(exit_on_error=False)
    add(parser, **options)
    return parser.parse_args(words)


def client(*words):
    return client_options(parse(words))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return credentials.make(tmp_path_factory.mktemp("credentials"))


def server(*words):
    return server_security(parse([str(word) for word in words], add_server_arguments))


# Clients.


def test_without_options_nothing_is_said():
    assert client() == NO_OPTIONS
    assert not client().files.given


def test_every_option_comes_to_its_place():
    options = client(
        *("--tls", "require", "--tls-certificates", "dir", "--tls-cert", "cert"),
        *("--tls-key", "key", "--tls-passphrase", "phrase", "--tls-ca", "ca", "--tls-crl", "crl"),
        *("--tls-verify-depth", "3", "--tls-psk", "keys", "--tls-username", "alice"),
        *("--tls-hostname", "store1", "--tls-no-verify-peer"),
    )
    files = CredentialFiles(
        directory="dir",
        certificate="cert",
        key="key",
        authority="ca",
        revocation="crl",
        passphrase="phrase",
        psk="keys",
        username="alice",
        verify_depth=3,
    )
    assert options == TLSOptions("require", files, "store1", verify_peer=False)


@pytest.mark.parametrize(
    "option",
    ["certificates", "cert", "key", "passphrase", "ca", "crl", "psk", "username", "verify-depth"],
)
def test_every_option_about_files_counts_as_one(option):
    assert client(f"--tls-{option}", "1").files.given


@pytest.mark.parametrize("policy", ["off", "allow", "require"])
def test_the_policy_is_one_of_three(policy):
    assert client("--tls", policy).policy == policy


def test_another_policy_is_refused():
    with pytest.raises(argparse.ArgumentError, match="invalid choice: 'maybe'"):
        client("--tls", "maybe")


@pytest.mark.parametrize("depth", ["-1", "101"])
@pytest.mark.parametrize("of", [client, server])
def test_a_depth_that_is_not_possible_is_refused(of, depth):
    with pytest.raises(ConfigError, match=f"a verification depth of {depth} is not possible"):
        of(f"--tls-verify-depth={depth}")


@pytest.mark.parametrize(("words", "road"), [([], "auto"), (["--tls-road", "relay"], "relay")])
def test_a_device_may_say_who_encrypts(words, road):
    assert parse(words, road=True).tls_road == road


def test_only_a_device_may():
    with pytest.raises(SystemExit):
        parse(["--tls-road", "relay"])


# Servers.


def test_a_server_without_options_has_no_tls():
    assert server() is None
    assert server("--tls", "off") is None


def test_credentials_demand_tls(files):
    assert server("--tls-certificates", files.server).mode == "require"
    assert server("--tls-psk", files.keys).mode == "require"


def test_a_server_may_leave_it_to_its_clients(files):
    assert server("--tls", "allow", "--tls-certificates", files.server).mode == "allow"


def test_certificates_file_by_file_are_as_good(files):
    at = files.server
    words = "--tls-cert", at / "server-cert.pem", "--tls-key", at / "server-key.pem"
    assert server(*words).mode == "require"
    assert server(*words, "--tls-verify-peer", "--tls-ca", at / "ca-cert.pem").knows_peers


def test_clients_are_known_if_they_have_to_be(files):
    assert not server("--tls-certificates", files.server).knows_peers
    assert server("--tls-certificates", files.server, "--tls-verify-peer").knows_peers
    assert server("--tls-psk", files.keys).knows_peers


def test_who_may_come_is_taken_together(files):
    words = "--tls-psk", files.keys, "--tls-authz", "alice", "--tls-authz", "bob"
    security = server(*words)
    assert [security.admits(who) for who in ("alice", "bob", "mallory", None)] == [
        True,
        True,
        False,
        False,
    ]


def test_without_a_word_about_it_everybody_may(files):
    security = server("--tls-certificates", files.server)
    assert security.admits(None)
    assert security.admits("CN=anybody")


@pytest.mark.parametrize(
    "words",
    [
        ["--tls-certificates", "dir"],
        ["--tls-psk", "keys"],
        ["--tls-verify-peer"],
        ["--tls-authz", "CN=me"],
        ["--client", "CN=me"],
    ],
    ids=" ".join,
)
def test_tls_off_goes_with_no_other_option(words):
    with pytest.raises(ConfigError, match="options for TLS, and yet no TLS") as caught:
        server("--tls", "off", *words)
    assert "--tls require" in caught.value.hint


def test_clients_of_an_export_have_to_be_known(files):
    with pytest.raises(ConfigError, match="have to show who they are") as caught:
        server("--tls-certificates", files.server, "--client", "CN=me")
    assert caught.value.hint == "add --tls-verify-peer"
    assert server("--tls-psk", files.keys, "--client", "alice").knows_peers


@pytest.mark.parametrize("kind", ["certificates", "keys"])
def test_who_may_come_cannot_be_told_of_plain_clients(files, kind):
    given = ["--tls-certificates", files.server, "--tls-verify-peer"]
    if kind == "keys":
        given = ["--tls-psk", files.keys]
    with pytest.raises(ConfigError, match="lets anybody in without TLS"):
        server("--tls", "allow", *given, "--tls-authz", "me")
