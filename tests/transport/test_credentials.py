"""Credentials: which files count, what is refused and with which words, what comes out."""

from __future__ import annotations

import base64
import contextlib
import os
import pwd
import subprocess
import sys
import warnings

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdlink.errors import ConfigError, NBDError, TLSError
from nbdlink.transport.credentials import (
    PSKCredentials,
    X509Credentials,
    describe,
    load_client,
    load_server,
)
from nbdlink.transport.pskfile import parse_keys
from nbdlink.transport.tlsfiles import (
    LARGEST_FILE,
    CredentialFiles,
    FileContent,
    printable,
    refuse_exposed,
)
from tests.certificates import DAY, NOW, Authority, Identity, common_name, pem, write_secret

KEY = "00112233445566778899aabbccddeeff"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    return tmp_path / "home"


@pytest.fixture(scope="module")
def authority():
    return Authority()


@pytest.fixture(scope="module")
def server(authority):
    return authority.issue("web1")


@pytest.fixture(scope="module")
def client(authority):
    return authority.issue("alice", names=(), role="client")


@pytest.fixture
def directory(tmp_path, authority, server, client):
    return authority.write_directory(tmp_path / "pki", server=server, client=client)


def secret(tmp_path, data, name="secret"):
    return str(write_secret(tmp_path / name, data))


def written(tmp_path, data, name="written.pem"):
    (tmp_path / name).write_bytes(data)
    return str(tmp_path / name)


def pair(tmp_path, identity: Identity, **fields) -> CredentialFiles:
    return CredentialFiles(
        certificate=written(tmp_path, identity.chain_pem, "pair-cert.pem"),
        key=secret(tmp_path, identity.key_pem(), "pair-key.pem"),
        **fields,
    )


# The words


def test_nothing_is_given_at_first():
    assert not CredentialFiles().given


@pytest.mark.parametrize("said", [{"directory": "d"}, {"verify_depth": 0}, {"username": ""}])
def test_anything_that_was_said_is_given(said):
    assert CredentialFiles(**said).given


def test_the_command_line_need_not_wait_for_cryptography():
    code = "import sys, nbdlink.transport.tlsfiles; print('cryptography' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("word", ["directory", "certificate", "key", "authority", "revocation"])
@pytest.mark.parametrize("load", [load_client, load_server])
def test_keys_and_certificates_exclude_each_other(load, word):
    with pytest.raises(ConfigError, match=r"--tls-psk and --tls-\w+ exclude") as told:
        load(CredentialFiles(psk="keys", **{word: "x"}))
    assert told.value.hint == "give either pre-shared keys or certificates"


@pytest.mark.parametrize(
    "word", ["directory", "certificate", "key", "authority", "psk", "username", "passphrase"]
)
def test_an_empty_word_is_refused(word):
    with pytest.raises(ConfigError, match="is empty"):
        load_client(CredentialFiles(**{word: ""}))


def test_a_username_without_keys_is_refused():
    with pytest.raises(ConfigError, match="the username alice belongs to a pre-shared key"):
        load_client(CredentialFiles(username="alice"))


def test_a_negative_depth_is_refused():
    with pytest.raises(ConfigError, match="--tls-verify-depth -1"):
        load_client(CredentialFiles(verify_depth=-1))


def test_a_depth_is_handed_on():
    assert load_client(CredentialFiles(verify_depth=0)).verify_depth == 0


@pytest.mark.parametrize("load", [load_client, load_server])
def test_a_key_without_certificate_is_refused(load):
    with pytest.raises(ConfigError, match="without its certificate") as told:
        load(CredentialFiles(key="/k", directory="/"))
    assert told.value.hint == "add --tls-cert FILE"


# Directories


def test_a_client_takes_its_half_of_a_directory(directory, authority, client):
    loaded = load_client(CredentialFiles(directory=str(directory)))
    assert (loaded.chain, loaded.authorities) == (
        (client.certificate,),
        (authority.certificate,),
    )


def test_a_server_takes_its_half_of_a_directory(directory, authority, server):
    loaded = load_server(CredentialFiles(directory=str(directory)))
    assert (loaded.chain, loaded.authorities) == (
        (server.certificate,),
        (authority.certificate,),
    )


def test_other_files_of_a_directory_do_not_matter(directory):
    (directory / "dh-params.pem").write_bytes(b"nothing")
    assert load_server(CredentialFiles(directory=str(directory)))


def test_the_files_behind_credentials_are_known(directory):
    sources = load_client(CredentialFiles(directory=str(directory))).sources
    assert (sources.certificate, sources.key, sources.authorities, sources.revocations) == (
        str(directory / "client-cert.pem"),
        str(directory / "client-key.pem"),
        str(directory / "ca-cert.pem"),
        None,
    )


def test_a_client_needs_no_certificate(tmp_path, authority):
    path = authority.write_directory(tmp_path / "pki")
    loaded = load_client(CredentialFiles(directory=str(path)))
    assert (loaded.chain, loaded.key) == ((), None)


@pytest.mark.parametrize("name", ["client-cert.pem", "client-key.pem"])
def test_a_client_has_both_files_or_none(directory, name):
    (directory / name).unlink()
    with pytest.raises(ConfigError, match=f"{name}: no such file"):
        load_client(CredentialFiles(directory=str(directory)))


@pytest.mark.parametrize("name", ["server-cert.pem", "server-key.pem"])
def test_a_server_needs_both_files(directory, name):
    (directory / name).unlink()
    with pytest.raises(ConfigError, match=f"{name}: no such file") as told:
        load_server(CredentialFiles(directory=str(directory)))
    assert "server-cert.pem and server-key.pem" in told.value.hint


def test_a_client_needs_an_authority(directory):
    (directory / "ca-cert.pem").unlink()
    with pytest.raises(ConfigError, match=r"pki/ca-cert\.pem: no such file") as told:
        load_client(CredentialFiles(directory=str(directory)))
    assert "has to hold ca-cert.pem" in told.value.hint


def test_an_authority_given_apart_is_enough_for_a_client(directory, tmp_path):
    (directory / "ca-cert.pem").unlink()
    other = Authority("Other CA")
    path = written(tmp_path, pem(other.certificate))
    loaded = load_client(CredentialFiles(directory=str(directory), authority=path))
    assert loaded.authorities == (other.certificate,)


def test_a_server_needs_no_authority(directory):
    (directory / "ca-cert.pem").unlink()
    assert load_server(CredentialFiles(directory=str(directory))).authorities is None


@pytest.mark.parametrize("load", [load_client, load_server])
def test_a_missing_directory_is_named(tmp_path, load):
    with pytest.raises(ConfigError, match="nowhere: no such directory"):
        load(CredentialFiles(directory=str(tmp_path / "nowhere")))


def test_a_file_is_no_directory(tmp_path):
    with pytest.raises(ConfigError, match="is not a directory"):
        load_client(CredentialFiles(directory=written(tmp_path, b"")))


def test_single_files_win_as_a_pair(directory, tmp_path, authority):
    other = authority.issue("bob", role="client")
    loaded = load_client(pair(tmp_path, other, directory=str(directory)))
    assert loaded.chain == (other.certificate,)
    assert loaded.authorities == (authority.certificate,)


def test_revocations_of_a_directory_are_loaded(tmp_path, authority, server):
    revocations = authority.revocations()
    path = authority.write_directory(tmp_path / "crl", server=server, revocations=revocations)
    assert load_server(CredentialFiles(directory=str(path))).revocations == (revocations,)


def test_a_link_to_nowhere_does_not_switch_revocation_off(directory):
    (directory / "ca-crl.pem").symlink_to("gone")
    with pytest.raises(ConfigError, match=r"ca-crl\.pem: no such file"):
        load_client(CredentialFiles(directory=str(directory)))


# Nothing given


def test_a_client_without_files_trusts_the_system(monkeypatch):
    monkeypatch.delenv("HOME")
    loaded = load_client(CredentialFiles())
    assert loaded == X509Credentials((), None, None, (), None)


@pytest.mark.parametrize("place", [".config/pki/nbdlink", ".pki/nbdlink"])
def test_a_client_finds_the_directory_at_home(home, authority, place):
    authority.write_directory(home / place)
    assert load_client(CredentialFiles()).authorities == (authority.certificate,)


def test_the_configuration_may_be_elsewhere(tmp_path, authority, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    authority.write_directory(tmp_path / "xdg/pki/nbdlink")
    assert load_client(CredentialFiles()).authorities == (authority.certificate,)


def test_a_directory_with_nothing_for_the_role_is_passed_over(home, authority, server):
    (home / ".config/pki/nbdlink").mkdir(parents=True)
    authority.write_directory(home / ".pki/nbdlink", server=server)
    assert load_server(CredentialFiles()).chain == (server.certificate,)


def test_half_a_directory_is_not_passed_over(home, authority, client):
    authority.write_directory(home / ".config/pki/nbdlink", client=client)
    (home / ".config/pki/nbdlink/ca-cert.pem").unlink()
    authority.write_directory(home / ".pki/nbdlink", client=client)
    with pytest.raises(ConfigError, match=r"\.config/pki/nbdlink/ca-cert\.pem: no such file"):
        load_client(CredentialFiles())


def test_a_named_authority_keeps_the_usual_directory_out(home, tmp_path, authority, client):
    authority.write_directory(home / ".pki/nbdlink", client=client)
    path = written(tmp_path, pem(authority.certificate))
    assert load_client(CredentialFiles(authority=path)).chain == ()


@pytest.mark.parametrize("said", [{}, {"authority": "/etc/ssl/certs"}])
def test_a_server_without_files_is_told_what_to_give(said):
    with pytest.raises(ConfigError, match="needs credentials") as told:
        load_server(CredentialFiles(**said))
    assert "--tls-certificates DIR" in told.value.hint
    assert "--tls-psk FILE" in told.value.hint


# Certificates and keys


def test_a_chain_comes_whole_and_leaf_first(tmp_path, authority):
    between = Authority("Intermediate CA", parent=authority)
    own = between.issue("web2")
    loaded = load_server(pair(tmp_path, own))
    assert loaded.chain == (own.certificate, between.certificate)


def test_a_chain_in_the_wrong_order_is_told(tmp_path, authority):
    between = Authority("Intermediate CA", parent=authority)
    own = between.issue("web2")
    certificate = written(tmp_path, pem(between.certificate, own.certificate))
    key = secret(tmp_path, own.key_pem())
    with pytest.raises(TLSError, match="is not the first but number 2"):
        load_server(CredentialFiles(certificate=certificate, key=key))


def test_the_key_may_be_in_the_file_of_the_certificate(tmp_path, server):
    path = secret(tmp_path, server.chain_pem + server.key_pem())
    assert load_server(CredentialFiles(certificate=path)).key is not None


def test_what_another_tool_made_is_understood(tmp_path):
    made = trustme.CA().issue_cert("localhost").private_key_and_cert_chain_pem.bytes()
    loaded = load_server(CredentialFiles(certificate=secret(tmp_path, made)))
    assert len(loaded.chain) == 1


def test_a_certificate_without_its_key_is_told(tmp_path, server):
    path = written(tmp_path, server.chain_pem)
    with pytest.raises(ConfigError, match="not its private key") as told:
        load_server(CredentialFiles(certificate=path))
    assert told.value.hint == "give the key with --tls-key FILE"


def test_words_and_windows_ends_of_lines_do_not_matter(tmp_path, server):
    data = b"Bag Attributes\r\n" + server.chain_pem.replace(b"\n", b"\r\n") + b"done"
    certificate = written(tmp_path, data)
    key = secret(tmp_path, server.key_pem())
    assert load_server(CredentialFiles(certificate=certificate, key=key))


def test_the_wrong_key_is_told(tmp_path, server, client):
    certificate = written(tmp_path, server.chain_pem)
    key = secret(tmp_path, client.key_pem())
    with pytest.raises(TLSError, match=r"secret is the wrong key.*CN=web1 in .*written"):
        load_server(CredentialFiles(certificate=certificate, key=key))


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: rsa.generate_private_key(65537, 2048), id="rsa"),
        pytest.param(lambda: ec.generate_private_key(ec.SECP384R1()), id="ecdsa"),
        pytest.param(ed25519.Ed25519PrivateKey.generate, id="ed25519"),
        pytest.param(ed448.Ed448PrivateKey.generate, id="ed448"),
    ],
)
def test_every_kind_of_key_will_do(tmp_path, authority, make):
    assert load_server(pair(tmp_path, authority.issue(key=make())))


def test_a_key_that_cannot_sign_in_tls_is_told(tmp_path, authority):
    # Other versions of cryptography warn of it.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        key = dsa.generate_private_key(1024)
        data = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        certificate = written(tmp_path, authority.issue().chain_pem)
        with pytest.raises(TLSError, match="kind DSA"):
            load_server(CredentialFiles(certificate=certificate, key=secret(tmp_path, data)))


def test_a_key_of_ssh_is_told(tmp_path, server):
    data = server.key_pem(form=PrivateFormat.OpenSSH)
    certificate = written(tmp_path, server.chain_pem)
    with pytest.raises(TLSError, match="a key of OpenSSH"):
        load_server(CredentialFiles(certificate=certificate, key=secret(tmp_path, data)))


def test_an_expired_certificate_is_told(tmp_path, authority):
    own = authority.issue("web1", not_after=NOW - 5 * DAY)
    with pytest.raises(
        TLSError, match=f"CN=web1 in .* expired on {NOW - 5 * DAY:%Y-%m-%d}"
    ) as told:
        load_server(pair(tmp_path, own))
    assert "renew the certificate, or check this machine's clock" in told.value.hint


def test_a_certificate_that_expired_just_now_is_told_with_the_time(tmp_path, authority):
    own = authority.issue("web1", not_after=NOW - DAY)
    with pytest.raises(TLSError, match=f"expired on {NOW - DAY:%Y-%m-%d %H:%M:%S} UTC"):
        load_server(pair(tmp_path, own))


def test_a_certificate_of_tomorrow_is_told(tmp_path, authority):
    own = authority.issue("web1", not_before=NOW + 3 * DAY)
    with pytest.raises(TLSError, match=f"CN=web1 in .* only from {NOW + 3 * DAY:%Y-%m-%d} on"):
        load_server(pair(tmp_path, own))


# Passphrases


FORMS = pytest.mark.parametrize("form", [PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL])


def protected(tmp_path, server, form, passphrase=None) -> CredentialFiles:
    return CredentialFiles(
        certificate=written(tmp_path, server.chain_pem),
        key=secret(tmp_path, server.key_pem(b"open sesame", form), "key"),
        passphrase=None if passphrase is None else secret(tmp_path, passphrase, "phrase"),
    )


@FORMS
@pytest.mark.parametrize("line", [b"open sesame", b"open sesame\nrest\n", b"open sesame\r\n"])
def test_a_protected_key_opens_with_the_first_line(tmp_path, server, form, line):
    assert load_server(protected(tmp_path, server, form, line)).key is not None


@FORMS
def test_a_missing_passphrase_is_told(tmp_path, server, form):
    with pytest.raises(ConfigError, match="key is protected by a passphrase") as told:
        load_server(protected(tmp_path, server, form))
    assert told.value.hint == "give it with --tls-passphrase FILE"


@FORMS
def test_a_wrong_passphrase_is_told_and_not_shown(tmp_path, server, form):
    with pytest.raises(TLSError, match=r"passphrase in .*phrase is wrong") as told:
        load_server(protected(tmp_path, server, form, b"opensaysme"))
    assert "opensaysme" not in str(told.value)


def test_a_passphrase_that_is_not_needed_does_not_matter(tmp_path, server):
    phrase = secret(tmp_path, b"x")
    assert load_server(pair(tmp_path, server, passphrase=phrase)).key is not None


def test_an_empty_passphrase_is_told(tmp_path, server):
    with pytest.raises(TLSError, match="holds no passphrase"):
        load_server(protected(tmp_path, server, PrivateFormat.PKCS8, b"\n"))


# Authorities and revocations


def test_a_file_may_hold_many_authorities(tmp_path, authority):
    other = Authority("Other CA")
    path = written(tmp_path, pem(authority.certificate, other.certificate))
    loaded = load_client(CredentialFiles(authority=path))
    assert loaded.authorities == (authority.certificate, other.certificate)


@pytest.mark.parametrize("name", ["a.pem", "a.crt", "0a1b2c3d.0", "0a1b2c3d.12"])
def test_a_directory_of_authorities_is_read(tmp_path, authority, name):
    (tmp_path / "ca").mkdir()
    written(tmp_path / "ca", pem(authority.certificate), name)
    loaded = load_client(CredentialFiles(authority=str(tmp_path / "ca")))
    assert loaded.authorities == (authority.certificate,)


def test_what_is_no_authority_in_a_directory_is_passed_over(tmp_path, authority, server):
    path = tmp_path / "ca"
    path.mkdir()
    written(path, pem(authority.certificate), "a.pem")
    written(path, server.key_pem(), "key.pem")
    written(path, b"nothing", "README")
    (path / "0a1b2c3d.0").symlink_to("a.pem")
    (path / "gone.pem").symlink_to("nowhere")
    loaded = load_client(CredentialFiles(authority=str(path)))
    assert loaded.authorities == (authority.certificate,)


def test_a_directory_without_authorities_is_told(tmp_path):
    with pytest.raises(ConfigError, match="holds no authority"):
        load_client(CredentialFiles(authority=str(tmp_path)))


def test_a_damaged_authority_is_counted(tmp_path, authority):
    good = pem(authority.certificate)
    bad = b"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"
    with pytest.raises(TLSError, match="certificate number 2 is damaged"):
        load_client(CredentialFiles(authority=written(tmp_path, good + bad)))


def test_a_key_is_no_authority(tmp_path, server):
    path = written(tmp_path, server.key_pem())
    with pytest.raises(TLSError, match="holds no certificate, but PRIVATE KEY"):
        load_client(CredentialFiles(authority=path))


def test_der_is_told_apart(tmp_path, authority):
    path = written(tmp_path, authority.certificate.public_bytes(Encoding.DER))
    with pytest.raises(TLSError, match="is not PEM") as told:
        load_client(CredentialFiles(authority=path))
    assert "looks like DER" in told.value.hint


def test_a_file_that_was_cut_off_is_told(tmp_path, authority):
    path = written(tmp_path, pem(authority.certificate)[:-40])
    with pytest.raises(TLSError, match="a block of CERTIFICATE has no end"):
        load_client(CredentialFiles(authority=path))


def test_a_file_may_hold_many_lists(tmp_path, authority):
    lists = authority.revocations(), Authority("Other CA").revocations()
    path = written(tmp_path, pem(*lists))
    assert load_client(CredentialFiles(revocation=path)).revocations == lists


def test_a_certificate_is_no_list(tmp_path, authority):
    path = written(tmp_path, pem(authority.certificate))
    with pytest.raises(TLSError, match="holds no list of revoked certificates, but CERTIFICATE"):
        load_client(CredentialFiles(revocation=path))


def test_a_damaged_list_is_counted(tmp_path):
    path = written(tmp_path, b"-----BEGIN X509 CRL-----\nMIIB\n-----END X509 CRL-----\n")
    with pytest.raises(TLSError, match="number 1 is damaged"):
        load_client(CredentialFiles(revocation=path))


# Who else may read it


@pytest.mark.parametrize(
    ("mode", "owner"),
    [(0o600, 1000), (0o400, 1000), (0o700, 1000), (0o711, 1000), (0o600, 0), (0o640, 0)],
)
def test_a_secret_of_its_owner_is_accepted(mode, owner):
    refuse_exposed(FileContent("/key", b"", mode, owner), "the private key")


@pytest.mark.parametrize(
    ("mode", "owner", "says"),
    [
        (0o644, 1000, "read"),
        (0o640, 1000, "read"),
        (0o604, 1000, "read"),
        (0o620, 1000, "write"),
        (0o602, 1000, "write"),
        (0o660, 0, "write"),
        (0o644, 0, "read"),
    ],
)
def test_a_secret_that_others_can_reach_is_refused(mode, owner, says):
    with pytest.raises(ConfigError, match=f"/key: others may {says} it .*{mode:04o}") as told:
        refuse_exposed(FileContent("/key", b"", mode, owner), "the private key")
    assert told.value.hint == "chmod 600 /key"


def test_a_key_that_others_can_read_is_refused(directory):
    (directory / "server-key.pem").chmod(0o644)
    with pytest.raises(ConfigError, match=r"server-key\.pem: others may read it"):
        load_server(CredentialFiles(directory=str(directory)))


def test_a_key_beside_its_certificate_is_a_secret_too(tmp_path, server):
    path = written(tmp_path, server.chain_pem + server.key_pem())
    (tmp_path / "written.pem").chmod(0o644)
    with pytest.raises(ConfigError, match="others may read it"):
        load_server(CredentialFiles(certificate=path))


def test_a_passphrase_that_others_can_read_is_refused(tmp_path, server):
    files = protected(tmp_path, server, PrivateFormat.PKCS8, b"open sesame")
    (tmp_path / "phrase").chmod(0o644)
    with pytest.raises(ConfigError, match="phrase: others may read it"):
        load_server(files)


def test_pre_shared_keys_that_others_can_read_are_refused(tmp_path):
    path = secret(tmp_path, f"alice:{KEY}".encode())
    (tmp_path / "secret").chmod(0o604)
    with pytest.raises(ConfigError, match="others may read it"):
        load_server(CredentialFiles(psk=path))


def test_it_is_the_file_behind_a_link_that_counts(tmp_path):
    secret(tmp_path, f"alice:{KEY}".encode(), "real")
    (tmp_path / "link").symlink_to("real")
    assert load_server(CredentialFiles(psk=str(tmp_path / "link")))


# Files that are none


@pytest.fixture(params=["certificate", "key", "authority", "revocation", "passphrase", "psk"])
def place(request, tmp_path, server):
    """Say what a file is for, and give what makes words of its path."""

    def files(path: str) -> CredentialFiles:
        if request.param == "psk":
            return CredentialFiles(psk=path)
        words = {
            "certificate": written(tmp_path, server.chain_pem, "good-cert.pem"),
            "key": secret(tmp_path, server.key_pem(), "good-key.pem"),
        }
        return CredentialFiles(**(words | {request.param: path}))

    return files


def test_a_missing_file_is_named(tmp_path, place):
    with pytest.raises(ConfigError, match="gone: no such file or directory"):
        load_server(place(str(tmp_path / "gone")))


def test_a_fifo_is_refused_at_once(tmp_path, place):
    os.mkfifo(tmp_path / "fifo", 0o600)
    with pytest.raises(ConfigError, match="fifo: is not a regular file"):
        load_server(place(str(tmp_path / "fifo")))


def test_a_device_is_refused(place):
    with pytest.raises(ConfigError, match="/dev/zero: is not a regular file"):
        load_server(place("/dev/zero"))


def test_a_file_that_is_too_large_is_refused(tmp_path, place):
    with pytest.raises(ConfigError, match="larger than 1 MiB"):
        load_server(place(secret(tmp_path, b"\n" * (LARGEST_FILE + 1))))


def test_a_path_cannot_contain_nul(place):
    with pytest.raises(ConfigError, match=r"a path cannot contain NUL|no such file"):
        load_server(place("/tmp/a\0b"))


def test_a_path_can_be_too_long(place):
    with pytest.raises(ConfigError, match="file name too long"):
        load_server(place("/" + "x" * 5000))


def test_a_path_cannot_steer_the_terminal(place):
    with pytest.raises(ConfigError) as told:
        load_server(place("/nowhere/\x1b[2J\n\udcff"))
    assert str(told.value).isprintable()


def test_a_directory_is_no_certificate(tmp_path):
    with pytest.raises(ConfigError, match="is a directory"):
        load_server(CredentialFiles(certificate=str(tmp_path), key="/k"))


LABELS = st.sampled_from(
    ["CERTIFICATE", "X509 CRL", "PRIVATE KEY", "ENCRYPTED PRIVATE KEY", "RSA PRIVATE KEY", "\x1b"]
)
GARBAGE = st.one_of(
    st.binary(max_size=300),
    st.builds(
        lambda label, body: f"-----BEGIN {label}-----\n{body}\n-----END {label}-----\n".encode(),
        LABELS,
        st.one_of(
            st.binary(max_size=90).map(lambda data: base64.b64encode(data).decode()),
            st.text(max_size=90),
        ),
    ),
)


@given(data=GARBAGE)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_garbage_is_told_in_one_line(tmp_path, place, data):
    with pytest.raises(NBDError) as told:
        load_server(place(secret(tmp_path, b"\n" + data)))
    assert str(told.value).isprintable()


@given(spot=st.integers(0, 1 << 20), bit=st.integers(0, 7))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_a_bit_that_fell_over_raises_nothing_else(tmp_path, place, damageable, spot, bit):
    damaged = bytearray(damageable)
    damaged[spot % len(damaged)] ^= 1 << bit
    with contextlib.suppress(NBDError):
        load_server(place(secret(tmp_path, bytes(damaged))))


@pytest.fixture(scope="module")
def damageable(authority, server):
    return server.chain_pem + server.key_pem() + pem(authority.revocations())


# Pre-shared keys


def test_a_file_of_keys_is_read(tmp_path):
    path = secret(tmp_path, f"# made by psktool\n\nalice:{KEY}\r\nbob:{KEY.upper()} \n".encode())
    loaded = load_server(CredentialFiles(psk=path))
    assert loaded == PSKCredentials(
        {"alice": bytes.fromhex(KEY), "bob": bytes.fromhex(KEY)}, None, path
    )


def test_a_directory_may_hold_the_keys(tmp_path):
    secret(tmp_path, f"qemu:{KEY}\n".encode(), "keys.psk")
    assert load_client(CredentialFiles(psk=str(tmp_path))).username == "qemu"


def test_a_directory_without_keys_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"keys\.psk: no such file"):
        load_client(CredentialFiles(psk=str(tmp_path)))


def test_a_representation_keeps_the_secret(tmp_path):
    path = secret(tmp_path, f"alice:{KEY}".encode())
    shown = repr(load_client(CredentialFiles(psk=path)))
    assert repr(bytes.fromhex(KEY))[2:-1] not in shown


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "holds no pre-shared key"),
        (b"# alice:00\n", "holds no pre-shared key"),
        (b"alice", "line 1: there is no colon"),
        (b"\nalice:", "line 2: the key is empty"),
        (b"alice:0", "line 1: the key is not an even number of hexadecimal digits"),
        (b"alice:0g", "not an even number of hexadecimal digits"),
        (b"alice:00 11", "not an even number of hexadecimal digits"),
        (b"alice:00:11", "not an even number of hexadecimal digits"),
        (b"alice:" + b"00" * 513, "the key has 513 bytes, 512 are possible"),
        (b":00", "the user name is empty"),
        (b" alice:00", "spaces around it"),
        (b"al\x1bice:00", "unprintable"),
        (b"al\0ice:00", "unprintable"),
        (b"\xff:00", "not UTF-8"),
        (b"a" * 129 + b":00", "the user name has 129 bytes, 128 are possible"),
        (b"a:00\nb:00\na:11", "line 3: a has a key already, in line 1"),
    ],
)
def test_a_line_that_is_wrong_is_told(data, says):
    with pytest.raises(TLSError) as told:
        parse_keys(data, "/keys")
    assert says in str(told.value)


USERS = st.text(
    st.characters(exclude_characters=":", exclude_categories=["C", "Z"]), min_size=1, max_size=32
).filter(lambda user: not user.startswith("#") and user.isprintable())


@given(st.dictionaries(USERS, st.binary(min_size=1, max_size=512), min_size=1, max_size=5))
def test_every_file_of_keys_comes_back(keys):
    data = "".join(f"{user}:{key.hex()}\n" for user, key in keys.items())
    assert parse_keys(data.encode(), "/keys") == keys


@given(st.one_of(st.binary(), st.text("ab:#0f \n\r\t").map(str.encode)))
def test_whatever_the_keys_are_the_error_is_one(data):
    with contextlib.suppress(TLSError):
        assert parse_keys(data, "/keys")


@given(st.binary(min_size=8).map(bytes.hex), st.sampled_from(["0", "x", " 1"]))
def test_no_error_shows_a_key(key, tail):
    with pytest.raises(TLSError) as told:
        parse_keys(f"alice:{key}{tail}".encode(), "/keys")
    assert key not in f"{told.value} {told.value.hint}"


def users(tmp_path, *names):
    return secret(tmp_path, "".join(f"{name}:{KEY}\n" for name in names).encode())


def test_the_username_that_is_asked_for_is_used(tmp_path):
    files = CredentialFiles(psk=users(tmp_path, "alice", "bob"), username="bob")
    assert load_client(files).username == "bob"


def test_a_username_without_key_is_told(tmp_path):
    with pytest.raises(ConfigError, match="has no key for carol") as told:
        load_client(CredentialFiles(psk=users(tmp_path, "alice", "bob"), username="carol"))
    assert told.value.hint == "it has: alice, bob"


def test_the_only_user_need_not_be_asked_for(tmp_path):
    assert load_client(CredentialFiles(psk=users(tmp_path, "alice"))).username == "alice"


def test_the_login_name_is_the_user_if_there_are_several(tmp_path):
    login = pwd.getpwuid(os.geteuid()).pw_name
    files = CredentialFiles(psk=users(tmp_path, "somebody else", login))
    assert load_client(files).username == login


def test_a_choice_that_cannot_be_made_is_told(tmp_path):
    names = [f"nobody.{number}" for number in range(6)]
    with pytest.raises(ConfigError, match="keys for 6 users") as told:
        load_client(CredentialFiles(psk=users(tmp_path, *names)))
    assert told.value.hint == f"choose with --tls-username: {', '.join(names[:5])}, ..."


# Names


def subject(*parts: tuple[x509.ObjectIdentifier, str]) -> x509.Name:
    return x509.Name([x509.NameAttribute(oid, value) for oid, value in parts])


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (common_name("web1"), "CN=web1"),
        # gnutls_x509_crt_get_dn gives all of these alike, but for what is not printable.
        (
            subject((NameOID.COMMON_NAME, "web1"), (NameOID.ORGANIZATION_NAME, "Example")),
            "CN=web1,O=Example",
        ),
        (
            subject((NameOID.COUNTRY_NAME, "DE"), (NameOID.COMMON_NAME, "web1")),
            "C=DE,CN=web1",
        ),
        (subject((NameOID.EMAIL_ADDRESS, "a@b"), (NameOID.USER_ID, "u")), "EMAIL=a@b,UID=u"),
        (common_name('a,b+c"d\\e<f>g;h=i'), r"CN=a\,b\+c\"d\\e\<f\>g\;h=i"),
        (common_name(" a "), r"CN=\ a\ "),
        (common_name("##"), r"CN=\##"),
        (common_name("é"), "CN=é"),
        (common_name("a\x1b[2J\n\0"), r"CN=a\1B[2J\0A\00"),
        (common_name("a\u202eb"), r"CN=a\E2\80\AEb"),
    ],
)
def test_a_certificate_is_named_by_its_subject(authority, name, shown):
    assert describe(authority.issue(name).certificate) == shown


@pytest.mark.parametrize(
    ("names", "shown"),
    [(("web1", "web2"), "DNS:web1"), (("::1",), "IP:::1"), (("CN=a",), "DNS:CN=a")],
)
def test_a_certificate_without_subject_is_named_by_its_host(authority, names, shown):
    assert describe(authority.issue(x509.Name([]), names=names).certificate) == shown


def test_a_certificate_without_any_name_is_named_by_its_number(authority):
    certificate = authority.issue(x509.Name([]), names=()).certificate
    assert describe(certificate) == f"certificate number {certificate.serial_number:X}"


@given(st.text())
def test_printable_text_is_printable(text):
    assert printable(text).isprintable()
