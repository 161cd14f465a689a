"""Wrong credentials: what `nbdlink info` says of them, and what the server's log says.

Each is told in one line on either side, and here in one more of advice at most.
"""

from __future__ import annotations

import dataclasses
import logging
import queue
import shutil

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from nbdlink.cli.main import main
from nbdlink.server import serve_in_thread
from nbdlink.server.security import ServerSecurity
from nbdlink.transport.tlsfiles import CredentialFiles
from nbdlink.uri import Target
from tests import credentials
from tests.certificates import DAY, NOW, Authority, pem, write_secret

SIZE = 1 << 20


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return credentials.make(tmp_path_factory.mktemp("credentials"))


@pytest.fixture
def nbdlink(capfd):
    """Run nbdlink in this process; give its exit status, what it says, and its advice or ""."""

    def run(*words):
        capfd.readouterr()
        status = main([str(word) for word in words])
        out, err = capfd.readouterr()
        what, *hint = err.splitlines() or [""]
        assert len(hint) < 2, f"more than a line and a hint: {err}"
        assert not status or not out, out
        return status, what.removeprefix("nbdlink: "), "".join(hint).removeprefix("  hint: ")

    return run


class Log(logging.Handler):
    """What the server says of its clients, without their addresses."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self._lines = queue.SimpleQueue()

    def emit(self, record):
        _, _, words = record.getMessage().partition(": ")
        self._lines.put(words)

    def line(self):
        """Wait for the next line."""
        return self._lines.get(timeout=60)

    def is_empty(self):
        return self._lines.empty()


@pytest.fixture
def log():
    log = Log()
    logger = logging.getLogger("nbdlink.server")
    logger.addHandler(log)
    yield log
    logger.removeHandler(log)


@pytest.fixture
def meet(tmp_path, nbdlink, log):
    """Have `nbdlink info` meet a server; give what it says, its advice, and the server's line.

    The server has a directory or a file of keys, or None for no TLS. The meeting has to fail,
    and each side has to say one thing only.
    """
    (tmp_path / "disk.img").write_bytes(bytes(SIZE))

    def meet(server, words, *, host="localhost", scheme="nbds", logs=True, **options):
        security = None
        if server is not None:
            given = {"directory" if server.is_dir() else "psk": str(server)}
            security = ServerSecurity("require", CredentialFiles(**given), **options)
        with serve_in_thread({"": tmp_path / "disk.img"}, security=security) as service:
            target = Target(host, service.addresses[0][1], tls=scheme == "nbds")
            status, what, hint = nbdlink("info", target, *words)
            line = log.line() if logs else ""
        assert status == 1, (status, what, hint)
        assert log.is_empty(), f"the server says more than one thing: {log.line()}"
        return what.removeprefix(f"{target.address}: "), hint, line.partition(": ")[2]

    return meet


@pytest.fixture
def directory(files, tmp_path):
    """Write a directory of the authority of `files`."""

    def write(name="pki", **who):
        return files.authority.write_directory(tmp_path / name, **who)

    return write


def trusting(folder):
    return "--tls-certificates", folder


# What a client does not believe.


def test_a_certificate_of_another_host(meet, files, directory):
    server = directory(server=files.authority.issue(names=("store1.example.com", "192.0.2.1")))
    what, hint, _ = meet(server, trusting(files.trust))
    assert what == (
        "the server's certificate CN=localhost is for store1.example.com, 192.0.2.1, "
        "not for localhost"
    )
    assert hint == "if that is the server you mean, say --tls-hostname store1.example.com"


def test_the_hint_about_another_host_mends_it(files, directory, nbdlink, tmp_path):
    server = directory(server=files.authority.issue(names=("store1.example.com",)))
    (tmp_path / "disk.img").write_bytes(bytes(SIZE))
    security = ServerSecurity("require", CredentialFiles(directory=str(server)))
    with serve_in_thread({"": tmp_path / "disk.img"}, security=security) as service:
        target = Target("localhost", service.addresses[0][1], tls=True)
        words = "--tls-certificates", files.trust, "--tls-hostname", "store1.example.com"
        assert nbdlink("info", target, *words) == (0, "", "")


def test_an_unknown_authority(meet, files, tmp_path):
    other = Authority("Another CA")
    server = other.write_directory(tmp_path / "pki", server=other.issue())
    what, hint, line = meet(server, trusting(files.trust))
    assert what == (
        "the server's certificate CN=localhost is signed by an authority that is not trusted "
        "(CN=Another CA)"
    )
    assert hint.startswith("give that authority's certificate with --tls-ca")
    assert line == "the client does not trust the authority that signed our certificate"


def test_a_self_signed_certificate(meet, files, tmp_path):
    lone = Authority("localhost")
    folder = tmp_path / "pki"
    folder.mkdir()
    (folder / "server-cert.pem").write_bytes(pem(lone.certificate))
    write_secret(folder / "server-key.pem", lone_key(lone))
    what, _, _ = meet(folder, trusting(files.trust))
    assert what == "the server's certificate CN=localhost is self-signed, and not trusted"


def lone_key(authority):
    return dataclasses.replace(authority.issue(), key=authority.key).key_pem()


def test_an_authority_of_the_same_name(meet, files, tmp_path):
    double = Authority()
    server = double.write_directory(tmp_path / "pki", server=double.issue())
    what, hint, _ = meet(server, trusting(files.trust))
    assert what.startswith("the server's certificate CN=localhost ")
    assert "CN=Test CA" in what
    assert "--tls-ca" in hint


def test_a_revoked_certificate(meet, files, directory):
    identity = files.authority.issue()
    revoked = revocations(files.authority, identity)
    what, hint, line = meet(
        directory(server=identity), trusting(directory("trust", revocations=revoked))
    )
    assert what == "the server's certificate CN=localhost was revoked by CN=Test CA"
    assert hint == "the server needs a new one"
    assert line == "the client says that our certificate was revoked"


def revocations(authority, *identities, **dates):
    """Sign a list without remembering it."""
    before = list(authority.revoked)
    authority.revoke(*identities)
    made = authority.revocations(**dates)
    authority.revoked[:] = before
    return made


def test_an_expired_list_of_revoked_certificates(meet, files, directory):
    old = revocations(files.authority, last_update=NOW - 9 * DAY, next_update=NOW - 5 * DAY)
    what, hint, line = meet(files.server, trusting(directory(revocations=old)))
    assert what == (
        f"the list of revoked certificates of CN=Test CA expired on {NOW - 5 * DAY:%Y-%m-%d}"
    )
    assert hint == "fetch the current one, or check the clocks"
    # TLS has no word for it, so the server cannot know better.
    assert line == "the client says that our certificate, or what it checks it by, has expired"


def test_no_list_of_revoked_certificates_of_the_issuer(meet, files, tmp_path):
    (tmp_path / "crl.pem").write_bytes(pem(Authority("Another CA").revocations()))
    what, hint, _ = meet(files.server, (*trusting(files.trust), "--tls-crl", tmp_path / "crl.pem"))
    assert what == "the list of revoked certificates of CN=Test CA was not given"
    assert "--tls-crl" in hint


def test_a_chain_that_is_too_long(meet, files, directory):
    nearest = Authority("Nearest", parent=Authority("Between", parent=files.authority))
    server = directory(server=nearest.issue())
    what, hint, _ = meet(server, (*trusting(files.trust), "--tls-verify-depth", "1"))
    assert "is further from a trusted one than --tls-verify-depth allows" in what
    assert hint.startswith("allow more")


def test_a_certificate_for_clients_only(meet, files, directory):
    what, hint, _ = meet(
        directory(server=files.authority.issue(role="client")), trusting(files.trust)
    )
    assert what == "the server's certificate CN=localhost is not meant for servers (its purpose)"
    assert "serverAuth" in hint


def test_an_authority_that_has_expired(meet, tmp_path):
    old = Authority("Old CA", not_after=NOW - 5 * DAY)
    folder = old.write_directory(tmp_path / "pki", server=old.issue())
    what, hint, _ = meet(folder, trusting(folder))
    assert what == (
        "the authority CN=Old CA, on which the server's certificate depends, expired on "
        f"{NOW - 5 * DAY:%Y-%m-%d}"
    )
    assert hint == "have it renewed, or check the clocks"


def test_a_missing_intermediate_authority(meet, files, directory):
    between = Authority("Between", parent=files.authority)
    server = directory(server=dataclasses.replace(between.issue(), intermediates=()))
    what, hint, _ = meet(server, trusting(files.trust))
    assert "not trusted (CN=Between)" in what
    assert "the server has to send it with its own" in hint


def test_without_verification_nothing_is_refused_and_nothing_is_claimed(
    files, tmp_path, capfd, directory
):
    (tmp_path / "disk.img").write_bytes(bytes(SIZE))
    other = Authority("Another CA")
    server = other.write_directory(
        tmp_path / "pki", server=other.issue("mallory", names=("elsewhere.example",))
    )
    security = ServerSecurity("require", CredentialFiles(directory=str(server)))
    with serve_in_thread({"": tmp_path / "disk.img"}, security=security) as service:
        target = Target("localhost", service.addresses[0][1], tls=True)
        assert main(["info", str(target), "--tls-no-verify-peer"]) == 0
    out, err = capfd.readouterr()
    assert "CN=mallory (not verified)\n" in out
    assert err == ""


# What a server does not believe. In TLS 1.3 a client learns it at its first read only.


@pytest.mark.parametrize("attempt", range(5))
def test_no_certificate_where_one_is_demanded(meet, files, attempt):
    what, hint, line = meet(files.server, trusting(files.trust), verify_peer=True)
    assert what == "the server wants a certificate from us"
    assert hint == "give one: --tls-certificates DIR, or --tls-cert and --tls-key"
    assert line == "the client has shown no certificate"


@pytest.mark.parametrize("attempt", range(3))
def test_a_client_of_an_unknown_authority(meet, files, directory, attempt):
    stranger = Authority("Another CA").issue("me", role="client")
    client = directory(client=stranger)
    what, _, line = meet(files.server, trusting(client), verify_peer=True)
    assert what == "the server does not trust the authority that signed our certificate"
    assert line == (
        "the client's certificate CN=me is signed by an authority that is not trusted "
        "(CN=Another CA)"
    )


def test_a_client_that_was_revoked(meet, files, directory):
    identity = files.authority.issue("me", role="client")
    server = directory(
        "server",
        server=files.authority.issue(),
        revocations=revocations(files.authority, identity),
    )
    what, hint, line = meet(server, trusting(directory(client=identity)), verify_peer=True)
    assert what == "the server says that our certificate was revoked"
    assert hint == "ask the authority for a new one"
    assert line == "the client's certificate CN=me was revoked by CN=Test CA"


def test_a_client_with_a_certificate_for_servers(meet, files, directory):
    client = directory(client=files.authority.issue("me", role="server"))
    _, _, line = meet(files.server, trusting(client), verify_peer=True)
    assert line == "the client's certificate CN=me is not meant for clients (its purpose)"


def test_a_client_that_is_not_among_those_allowed(meet, files):
    what, _, line = meet(
        files.server, trusting(files.other), verify_peer=True, allowed=["CN=me", "CN=you"]
    )
    assert what == ("the server's policy forbids it (it says: CN=other may not use this server)")
    assert line == "CN=other may not use this server"


# Pre-shared keys.


def keys(path, user="alice"):
    return "--tls-psk", path, "--tls-username", user


def test_a_wrong_key(meet, files, tmp_path):
    wrong = credentials.write_keys(tmp_path / "keys.psk", alice=b"z" * 32)
    what, hint, line = meet(files.keys, keys(wrong))
    assert what == "the server has another key for alice"
    assert hint == "compare the key files on both sides"
    assert line == "the client has another pre-shared key for 'alice' than we have"


def test_an_unknown_user(meet, files, tmp_path):
    wrong = credentials.write_keys(tmp_path / "keys.psk", mallory=b"a" * 32)
    what, hint, line = meet(files.keys, keys(wrong, "mallory"))
    assert what == "the server has no key for mallory, or uses certificates instead"
    assert hint == "check --tls-username and the server's key file"
    assert line == "the client is 'mallory', who has no key here"


def test_a_user_that_is_not_among_those_allowed(meet, files):
    what, _, line = meet(files.keys, keys(files.keys), allowed=["bob"])
    assert "alice may not use this server" in what
    assert line == "alice may not use this server"


def test_a_key_where_certificates_are_shown(meet, files):
    # Who holds no key could show any certificate at all, so this must not go on.
    what, hint, _ = meet(files.server, keys(files.keys))
    assert what == ("the server does not use the pre-shared key of alice, but shows a certificate")
    assert "--tls-ca FILE instead of --tls-psk" in hint


def test_certificates_where_keys_are_shared(meet, files):
    what, hint, line = meet(files.keys, trusting(files.client))
    assert what == "the server and we have no cipher or kind of credentials in common"
    assert hint == "do both sides use certificates, or both pre-shared keys?"
    assert line == "the client offers no pre-shared key, which it has to have here"


# TLS or none.


def test_a_server_without_tls(meet, files):
    what, hint, _ = meet(None, trusting(files.trust), logs=False)
    assert what == "the server does not offer TLS (NBD_OPT_STARTTLS is not supported)"
    assert "nbd://" in hint


def test_a_client_without_tls(meet, files):
    what, hint, line = meet(files.server, (), scheme="nbd")
    assert what == "the server demands TLS (it says: TLS is demanded here)"
    assert hint == "say nbds:// or --tls require"
    assert line == "it came without TLS, which is demanded here"


def test_certificates_are_not_passed_over_in_silence(meet, files):
    what, _, _ = meet(None, trusting(files.trust), scheme="nbd", logs=False)
    assert "does not offer TLS" in what


# Files, on either side: (the role, what is done to its directory, exit status, what is said,
# advice). They are all told before anybody is troubled with a connection.


def expose(folder, role):
    (folder / f"{role}-key.pem").chmod(0o644)


def remove(name):
    def remove(folder, role):
        (folder / name.format(role)).unlink()

    return remove


def swap_keys(folder, role):
    write_secret(folder / f"{role}-key.pem", Authority().issue().key_pem())


def empty(folder, role):
    (folder / f"{role}-cert.pem").write_bytes(b"")


def remove_all(folder, role):
    shutil.rmtree(folder)


BAD = {
    "a key that others may read": (
        expose,
        2,
        "the private key {path}/{role}-key.pem: others may read it (its mode is 0644)",
        "chmod 600 {path}/{role}-key.pem",
    ),
    "a key of another certificate": (
        swap_keys,
        1,
        "{path}/{role}-key.pem is the wrong key: it does not belong to the certificate "
        "CN={name} in {path}/{role}-cert.pem",
        "give the key that the certificate was made with",
    ),
    "no certificate": (
        remove("{}-cert.pem"),
        2,
        "{path}/{role}-cert.pem: no such file",
        "the directory has to hold",
    ),
    "no key": (
        remove("{}-key.pem"),
        2,
        "{path}/{role}-key.pem: no such file",
        "the directory has to hold",
    ),
    "no directory": (remove_all, 2, "{path}: no such directory", "the directory has to hold"),
    "an empty certificate": (
        empty,
        1,
        "{path}/{role}-cert.pem is not PEM",
        "the file has to hold lines like -----BEGIN CERTIFICATE-----",
    ),
}


@pytest.fixture
def speak(files, directory, nbdlink, tmp_path):
    """Run a client or a server with a directory of its own; neither gets far."""
    (tmp_path / "disk.img").write_bytes(bytes(SIZE))

    def speak(role, folder, *words):
        words = ("--tls-certificates", folder, *words)
        if role == "client":
            return nbdlink("info", "nbds://localhost:1", *words)
        return nbdlink("serve", "-k", tmp_path / "socket", *words, tmp_path / "disk.img")

    return speak


@pytest.mark.parametrize("role", ["client", "server"])
@pytest.mark.parametrize("bad", list(BAD))
def test_files_that_are_of_no_use(bad, role, files, directory, speak):
    spoil, status, what, hint = BAD[bad]
    name = {"client": "me", "server": "localhost"}[role]
    folder = directory(**{role: files.authority.issue(name, role=role)})
    spoil(folder, role)
    words = {"path": folder, "role": role, "name": name}
    said = speak(role, folder)
    assert said[:2] == (status, what.format(**words)), said
    assert said[2].startswith(hint.format(**words)), said


@pytest.mark.parametrize("role", ["client", "server"])
@pytest.mark.parametrize(
    ("dates", "what", "hint"),
    [
        ({"not_after": NOW - 3 * DAY}, f"expired on {NOW - 3 * DAY:%Y-%m-%d}", "renew"),
        (
            {"not_before": NOW + 3 * DAY},
            f"is valid only from {NOW + 3 * DAY:%Y-%m-%d} on",
            "wait, or check this machine's clock",
        ),
    ],
    ids=["expired", "not yet valid"],
)
def test_an_own_certificate_that_is_not_valid_now(role, dates, what, hint, files, directory, speak):
    folder = directory(**{role: files.authority.issue("us", role=role, **dates)})
    said = speak(role, folder)
    assert said[:2] == (1, f"CN=us in {folder}/{role}-cert.pem {what}")
    assert said[2].startswith(hint)


@pytest.mark.parametrize("role", ["client", "server"])
def test_a_key_that_is_too_weak(role, files, directory, speak):
    weak = rsa.generate_private_key(65537, 1024)
    folder = directory(**{role: files.authority.issue("us", role=role, key=weak)})
    assert speak(role, folder) == (
        1,
        f"OpenSSL does not take {folder}/{role}-cert.pem: ee key too small",
        "RSA keys need 2048 bits or more",
    )


@pytest.mark.parametrize("role", ["client", "server"])
def test_an_encrypted_key_takes_its_passphrase(role, files, directory, speak, tmp_path):
    identity = files.authority.issue("us", role=role)
    folder = directory(**{role: identity})
    key = write_secret(folder / f"{role}-key.pem", identity.key_pem(b"right"))
    status, what, hint = speak(role, folder)
    assert (status, what) == (2, f"{key} is protected by a passphrase")
    assert hint == "give it with --tls-passphrase FILE"
    wrong = write_secret(tmp_path / "wrong", b"wrong\n")
    status, what, _ = speak(role, folder, "--tls-passphrase", wrong)
    assert (status, what) == (
        1,
        f"{key} cannot be decrypted: the passphrase in {wrong} is wrong, or the key is damaged",
    )
    right = write_secret(tmp_path / "right", b"right\n")
    # The credentials are good, and so it fails at what comes behind them: nobody listens there,
    # and a storage that does not exist.
    if role == "client":
        status, what, _ = speak(role, folder, "--tls-passphrase", right)
        assert "localhost:1: connection refused" in what, what
    else:
        (tmp_path / "disk.img").unlink()
        status, what, _ = speak(role, folder, "--tls-passphrase", right)
        assert f"{tmp_path}/disk.img" in what, what
    assert status == 1
