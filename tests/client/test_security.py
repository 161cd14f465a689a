"""What a client demands of TLS: from the scheme, from the options, from the URI."""

from __future__ import annotations

import pytest

from nbdlink.client.security import NO_OPTIONS, Security, TLSOptions
from nbdlink.errors import ConfigError, TLSError
from nbdlink.transport.credentials import PSKCredentials, X509Credentials, load_client
from nbdlink.transport.tlsfiles import CredentialFiles
from nbdlink.uri import Target
from tests import credentials

FILES = CredentialFiles(directory="dir")
WORDS = {
    "nothing": {},
    "a file": {"files": FILES},
    "a name": {"hostname": "store1"},
    "no verification": {"verify_peer": False},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return credentials.make(tmp_path_factory.mktemp("credentials"))


def security(uri, policy=None, **said):
    return Security(Target.parse(uri), TLSOptions(policy, **said))


# (scheme, --tls, what else is said) and what follows; ... is a contradiction.
TABLE = [
    ("nbd", None, "nothing", "off"),
    ("nbd", None, "a file", "require"),
    ("nbd", None, "a name", "require"),
    ("nbd", None, "no verification", "require"),
    ("nbd", "off", "nothing", "off"),
    ("nbd", "off", "a file", ...),
    ("nbd", "off", "a name", ...),
    ("nbd", "off", "no verification", ...),
    *(("nbd", policy, said, policy) for policy in ("allow", "require") for said in WORDS),
    *(("nbds", policy, said, "require") for policy in (None, "require") for said in WORDS),
    *(("nbds", policy, said, ...) for policy in ("off", "allow") for said in WORDS),
]


def test_the_table_is_complete():
    assert len({row[:3] for row in TABLE}) == len(TABLE) == 2 * 4 * len(WORDS)


@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
@pytest.mark.parametrize(("scheme", "policy", "said", "wanted"), TABLE)
def test_the_policy_follows_from_what_was_said(scheme, policy, said, wanted, unix):
    uri = f"{scheme}+unix:///?socket=/s" if unix else f"{scheme}://store1"
    if wanted is ...:
        with pytest.raises(ConfigError):
            security(uri, policy, **WORDS[said])
    else:
        assert security(uri, policy, **WORDS[said]).policy == wanted


@pytest.mark.parametrize("policy", ["off", "allow"])
def test_nbds_is_never_weakened(policy):
    with pytest.raises(ConfigError, match="never goes without TLS") as caught:
        security("nbds://store1", policy)
    assert "nbd://" in caught.value.hint


def test_nothing_is_loaded_before_it_is_needed():
    made = security("nbds://store1?tls-certificates=/nowhere")
    with pytest.raises(ConfigError, match="/nowhere: no such directory"):
        made.context  # noqa: B018


def test_the_credentials_are_loaded_once(files):
    made = security("nbds://store1", files=CredentialFiles(directory=str(files.trust)))
    assert made.context is made.context


# Who the server has to be.


@pytest.mark.parametrize(
    ("uri", "hostname", "host"),
    [
        ("nbds://store1", None, "store1"),
        ("nbds://[::1]:10810", None, "::1"),
        ("nbds://store1?tls-hostname=store2", None, "store2"),
        ("nbds://store1?tls-hostname=store2", "store3", "store3"),
        ("nbds+unix:///?socket=/s", None, None),
        ("nbds+unix:///?socket=/s&tls-hostname=store2", None, "store2"),
        ("nbds+unix:///?socket=/s", "store3", "store3"),
    ],
)
def test_the_name_is_the_options_then_the_uris_then_the_hosts(uri, hostname, host):
    assert security(uri, hostname=hostname).host == host


@pytest.mark.parametrize(
    ("query", "verify_peer", "verifies"),
    [
        ("", True, True),
        ("?tls-verify-peer=1", True, True),
        ("?tls-verify-peer=0", True, False),
        ("", False, False),
        # Neither of them is given up in silence, so both count.
        ("?tls-verify-peer=1", False, False),
        ("?tls-verify-peer=0", False, False),
    ],
)
def test_either_may_give_up_to_verify(files, query, verify_peer, verifies):
    given = CredentialFiles(directory=str(files.trust))
    made = security(f"nbds://store1/{query}", files=given, verify_peer=verify_peer)
    assert made.context.verifies is verifies
    assert made.verifies is verifies


def test_a_pre_shared_key_is_always_verified(files):
    made = security(f"nbds://alice@h/?tls-verify-peer=0&tls-psk-file={files.keys}")
    assert made.context.has_keys
    assert made.verifies


# Credentials in the URI.


def loaded(uri, **said):
    """Give the credentials that a client comes to."""
    made = Security(Target.parse(uri), TLSOptions(files=CredentialFiles(**said)))
    return load_client(made._files)


def test_the_uri_may_name_a_directory(files):
    found = loaded(f"nbds://h/?tls-certificates={files.client}")
    assert isinstance(found, X509Credentials)
    assert found.sources.certificate == f"{files.client}/client-cert.pem"


def test_the_option_counts_more_than_the_uri(files):
    found = loaded(f"nbds://h/?tls-certificates={files.client}", directory=str(files.other))
    assert found.sources.certificate == f"{files.other}/client-cert.pem"
    found = loaded(
        f"nbds://h/?tls-psk-file=/nowhere&tls-certificates={files.client}",
        directory=str(files.other),
    )
    assert found.sources.certificate == f"{files.other}/client-cert.pem"


@pytest.mark.parametrize("user", ["alice", "bob"])
def test_the_uri_may_name_keys_and_user(files, user):
    found = loaded(f"nbds://{user}@h/?tls-psk-file={files.keys}")
    assert isinstance(found, PSKCredentials)
    assert found.username == user


def test_the_option_may_name_another_user(files):
    found = loaded(f"nbds://alice@h/?tls-psk-file={files.keys}", username="bob")
    assert found.username == "bob"


def test_keys_of_the_options_count_more_than_the_uris_certificates(files):
    uri = f"nbds://alice@h/?tls-certificates={files.client}"
    assert loaded(uri, psk=str(files.keys)).username == "alice"


def test_a_user_without_keys_does_no_harm(files):
    assert isinstance(loaded("nbds://alice@h", directory=str(files.trust)), X509Credentials)


def test_two_kinds_of_credentials_are_one_too_many(files):
    with pytest.raises(ConfigError, match="exclude each other"):
        loaded(f"nbds://h/?tls-certificates={files.client}&tls-psk-file={files.keys}")


def test_a_user_who_is_not_in_the_file_is_told_of(files):
    with pytest.raises(ConfigError, match="no key for mallory") as caught:
        loaded(f"nbds://mallory@h/?tls-psk-file={files.keys}")
    assert "alice, bob" in caught.value.hint


def test_of_several_users_one_has_to_be_chosen(files):
    with pytest.raises(ConfigError, match="keys for 2 users") as caught:
        loaded(f"nbds://h/?tls-psk-file={files.keys}")
    assert "--tls-username" in caught.value.hint


# The kind of TLS.


@pytest.mark.parametrize("policy", [None, "require"])
def test_anonymous_tls_is_refused(policy):
    with pytest.raises(ConfigError, match="anonymous TLS") as caught:
        security("nbds://h/?tls-type=anon", policy)
    assert caught.value.hint == "use x509 or psk"


def test_the_type_psk_takes_keys(files):
    with pytest.raises(ConfigError, match="need a file with the keys") as caught:
        security("nbds://h/?tls-type=psk")
    assert "--tls-psk FILE" in caught.value.hint
    with pytest.raises(ConfigError, match="need a file with the keys"):
        security("nbds://h/?tls-type=psk", files=CredentialFiles(directory=str(files.trust)))
    made = security(f"nbds://alice@h/?tls-type=psk&tls-psk-file={files.keys}")
    assert made.context.has_keys
    given = CredentialFiles(psk=str(files.keys))
    assert security("nbds://alice@h/?tls-type=psk", files=given).context.has_keys


def test_the_type_x509_takes_no_keys(files):
    with pytest.raises(ConfigError, match="tls-type is x509"):
        security(f"nbds://h/?tls-type=x509&tls-psk-file={files.keys}")
    made = security(f"nbds://h/?tls-type=x509&tls-certificates={files.trust}")
    assert not made.context.has_keys


# Where nothing is named.


def test_the_usual_directory_counts_where_none_is_named(files, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    (tmp_path / ".pki").mkdir()
    (tmp_path / ".pki" / "nbdlink").symlink_to(files.client)
    made = Security(Target.parse("nbds://h"), NO_OPTIONS)
    assert made.context.has_certificate


def test_what_is_there_but_of_no_use_is_not_passed_over(tmp_path):
    (tmp_path / "ca-cert.pem").write_bytes(b"nonsense")
    with pytest.raises(TLSError, match="is not PEM"):
        security("nbds://h", files=CredentialFiles(directory=str(tmp_path))).context  # noqa: B018
