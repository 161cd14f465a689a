"""Verification: the words for each of OpenSSL's verdicts, and whom a certificate is for."""

from __future__ import annotations

import subprocess

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtensionOID, NameOID
from hypothesis import example, given
from hypothesis import strategies as st
from OpenSSL import crypto

from nbdlink.transport.bindings import add_revocations
from nbdlink.transport.verification import (
    VerifyError,
    explain,
    explain_host,
    matches_host,
    names_of,
)
from tests.certificates import DAY, NOW, Authority, Identity, common_name, pem


@pytest.fixture(scope="module")
def authority():
    return Authority()


@pytest.fixture(scope="module")
def store1(authority):
    return authority.issue("store1", names=("store1", "10.0.0.1")).certificate


def verdict(
    identity: Identity,
    trusted: Authority,
    *,
    intermediates: tuple[x509.Certificate, ...] | None = None,
    revocations: x509.CertificateRevocationList | None = None,
) -> tuple[str, str | None]:
    """Have OpenSSL refuse a certificate, and explain what it says."""
    store = crypto.X509Store()
    store.add_cert(crypto.X509.from_cryptography(trusted.certificate))
    if revocations is not None:
        add_revocations(store, revocations)
        store.set_flags(crypto.X509StoreFlags.CRL_CHECK)
    sent = identity.intermediates if intermediates is None else intermediates
    context = crypto.X509StoreContext(
        store,
        crypto.X509.from_cryptography(identity.certificate),
        [crypto.X509.from_cryptography(each) for each in sent],
    )
    with pytest.raises(crypto.X509StoreContextError) as told:
        context.verify_certificate()
    code, depth, _ = told.value.errors
    known = told.value.certificate.to_cryptography()
    return explain(code, depth, known, revocations=() if revocations is None else (revocations,))


# What OpenSSL refuses


def test_an_expired_certificate(authority):
    said, hint = verdict(authority.issue("store1", not_after=NOW - 5 * DAY), authority)
    assert said == f"the server's certificate CN=store1 expired on {NOW - 5 * DAY:%Y-%m-%d}"
    assert hint == "have it renewed, or check the clocks"


def test_a_certificate_of_later(authority):
    said, _ = verdict(authority.issue("store1", not_before=NOW + 3 * DAY), authority)
    assert said == (
        f"the server's certificate CN=store1 is valid only from {NOW + 3 * DAY:%Y-%m-%d} on"
    )


def test_an_authority_that_expired(authority):
    expired = Authority("Old CA", parent=authority, not_after=NOW - 9 * DAY)
    said, _ = verdict(expired.issue("store1"), authority)
    assert said == (
        "the authority CN=Old CA, on which the server's certificate depends, "
        f"expired on {NOW - 9 * DAY:%Y-%m-%d}"
    )


def test_an_unknown_authority(authority):
    said, hint = verdict(Authority("Other CA").issue("store1"), authority)
    assert said == (
        "the server's certificate CN=store1 is signed by an authority that is not trusted "
        "(CN=Other CA)"
    )
    assert "--tls-ca" in hint


def test_an_intermediate_authority_that_was_not_sent(authority):
    between = Authority("Intermediate CA", parent=authority)
    said, hint = verdict(between.issue("store1"), authority, intermediates=())
    assert "(CN=Intermediate CA)" in said
    assert "the server has to send it" in hint


def test_a_root_that_came_along_but_is_not_trusted(authority):
    other = Authority("Other CA")
    said, _ = verdict(other.issue("store1"), authority, intermediates=(other.certificate,))
    assert said.startswith("the authority CN=Other CA, ")
    assert said.endswith(" is not trusted")


def test_a_certificate_that_signed_itself(authority):
    other = Authority("store1")
    said, _ = verdict(Identity(other.certificate, other.key), authority)
    assert said == "the server's certificate CN=store1 is self-signed, and not trusted"


def test_an_authority_of_the_same_name(authority):
    said, hint = verdict(Authority().issue("store1"), authority)
    assert said == (
        "the server's certificate CN=store1 has a signature that CN=Test CA did not make"
    )
    assert "of the same name" in hint


def test_a_revoked_certificate():
    authority = Authority()
    identity = authority.issue("store1")
    authority.revoke(identity)
    said, _ = verdict(identity, authority, revocations=authority.revocations())
    assert said == "the server's certificate CN=store1 was revoked by CN=Test CA"


def test_a_list_that_expired(authority):
    old = authority.revocations(last_update=NOW - 9 * DAY, next_update=NOW - 5 * DAY)
    said, hint = verdict(authority.issue(), authority, revocations=old)
    assert said == (
        f"the list of revoked certificates of CN=Test CA expired on {NOW - 5 * DAY:%Y-%m-%d}"
    )
    assert "fetch the current one" in hint


def test_a_list_that_is_missing(authority):
    said, _ = verdict(authority.issue(), authority, revocations=Authority("Other").revocations())
    assert said == "the list of revoked certificates of CN=Test CA was not given"


def test_an_authority_below_one_that_allows_none():
    root = Authority("Root CA", path_length=0)
    said, _ = verdict(Authority("Sub CA", parent=root).issue(), root)
    assert "does not allow as many authorities" in said


def test_a_certificate_that_signed_without_being_an_authority(authority):
    server = authority.issue("store1")
    forged = Authority("store1", parent=authority)
    forged.key = server.key
    identity = forged.issue("store2")
    said, _ = verdict(identity, authority, intermediates=(server.certificate,))
    assert said.startswith("the authority CN=store1, ")
    assert said.endswith("may not sign certificates, but signed one")


# What takes more than a chain


@pytest.mark.parametrize(
    ("role", "says", "usage"),
    [("server", "for servers", "serverAuth"), ("client", "for clients", "clientAuth")],
)
def test_a_certificate_for_another_purpose(store1, role, says, usage):
    said, hint = explain(VerifyError.INVALID_PURPOSE, 0, store1, role=role)
    assert said == f"the {role}'s certificate CN=store1 is not meant {says} (its purpose)"
    assert usage in hint


def test_a_chain_that_is_too_long(authority):
    said, _ = explain(VerifyError.CERT_CHAIN_TOO_LONG, 2, authority.certificate)
    assert "--tls-verify-depth" in said


def test_a_host_that_does_not_match(store1):
    said = explain(VerifyError.HOSTNAME_MISMATCH, 0, store1, host="store2")
    assert said == explain_host(store1, "store2")


def test_what_has_no_words_of_its_own_has_openssls(store1):
    said, hint = explain(VerifyError.SUITE_B_INVALID_CURVE, 0, store1)
    assert said == "the server's certificate CN=store1 is not believed: suite b invalid curve"
    assert hint is None


def test_a_number_of_a_later_openssl_is_said(store1):
    said, _ = explain(9999, 0, store1)
    assert said.endswith("is not believed: OpenSSL's verification error 9999")


@pytest.mark.parametrize("known", [True, False], ids=["certificate", "none"])
@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("role", ["server", "client"])
def test_every_verdict_has_one_line(store1, known, depth, role):
    for code in [*VerifyError, 0, -1, 1000]:
        said, _ = explain(code, depth, store1 if known else None, role=role)
        assert said.isprintable(), code
        assert role in said or "list of revoked" in said, code


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (VerifyError.CERT_HAS_EXPIRED, b"certificate has expired"),
        (VerifyError.CERT_REVOKED, b"certificate revoked"),
        (VerifyError.HOSTNAME_MISMATCH, b"hostname mismatch"),
        (VerifyError.INVALID_CA, b"invalid CA certificate"),
        (VerifyError.CA_CERT_MISSING_KEY_USAGE, b"CA cert does not include key usage extension"),
    ],
)
def test_the_numbers_are_those_of_openssl(code, words):
    assert crypto._ffi.string(crypto._lib.X509_verify_cert_error_string(code)) == words


# Hosts


def certificate(authority, names, subject=None) -> x509.Certificate:
    return authority.issue(subject or x509.Name([]), names=tuple(names)).certificate


MATCHES = [
    ("store1", "store1"),
    ("store1.example.com", "store1.example.com"),
    ("Store1.Example.COM", "sTORE1.eXAMPLE.com"),
    ("*.example.com", "store1.example.com"),
    ("*.Example.com", "STORE1.example.COM"),
    ("*.example.com", "xn--bcher-kva.example.com"),
    ("*.a.example.com", "b.a.example.com"),
    ("xn--bcher-kva.example.com", "xn--bcher-kva.example.com"),
    ("a_b.example.com", "a_b.example.com"),
    ("10.0.0.1", "10.0.0.1"),
    ("fd00::1", "fd00::1"),
    ("fd00::1", "fd00:0:0::0001"),
]

MISMATCHES = [
    ("store1", "store2"),
    ("store1", "store1.example.com"),
    ("store1.example.com", "store1"),
    ("example.com", "store1.example.com"),
    ("*.example.com", "example.com"),
    ("*.example.com", "a.store1.example.com"),
    ("*.example.com", "a_b.example.com"),
    ("*.com", "example.com"),
    ("*", "store1"),
    ("*.", "store1"),
    ("*.*.com", "store1.example.com"),
    ("store1.*.com", "store1.example.com"),
    ("*", "10.0.0.1"),
    ("*.0.0.1", "10.0.0.1"),
    ("10.0.0.1", "10.0.0.2"),
    ("fd00::1", "fd00::2"),
    ("::ffff:10.0.0.1", "10.0.0.1"),
    ("10.0.0.1", "::ffff:10.0.0.1"),
    ("store1", "10.0.0.1"),
    ("10.0.0.1", "store1"),
    (".example.com", "store1.example.com"),
]


@pytest.mark.parametrize(("name", "host"), MATCHES)
def test_a_host_is_matched(authority, name, host):
    assert matches_host(certificate(authority, [name]), host)


@pytest.mark.parametrize(("name", "host"), MISMATCHES)
def test_a_host_is_not_matched(authority, name, host):
    assert not matches_host(certificate(authority, [name]), host)


@pytest.mark.parametrize(
    ("name", "host", "believed"),
    [(*each, True) for each in MATCHES] + [(*each, False) for each in MISMATCHES],
)
def test_openssl_agrees(tmp_path, authority, name, host, believed):
    option = "-verify_ip" if ":" in host or host[0].isdigit() else "-verify_hostname"
    trusted, shown = tmp_path / "ca.pem", tmp_path / "cert.pem"
    trusted.write_bytes(pem(authority.certificate))
    shown.write_bytes(pem(certificate(authority, [name])))
    done = subprocess.run(
        ["openssl", "verify", option, host, "-CAfile", trusted, shown], capture_output=True
    )
    assert (done.returncode == 0) == believed


@pytest.mark.parametrize(
    ("name", "host"),
    [
        # OpenSSL takes these.
        ("s*.example.com", "store1.example.com"),
        ("*e1.example.com", "store1.example.com"),
        ("*.example.com", "*.example.com"),
        ("b.example.com", ".example.com"),
        # What a resolver takes for an address.
        ("*.0.1", "127.0.1"),
        ("127.1", "127.1"),
        ("0x7f000001", "0x7f000001"),
        # What is no name at all.
        ("store1", ""),
        ("store1", "."),
        ("store1", "store1.."),
        ("store1", "store1\0"),
        ("store1", "store1 "),
        ("store1", "x" * 64),
        ("store1.", "store1"),
    ],
)
def test_nobody_has_such_a_name(authority, name, host):
    assert not matches_host(certificate(authority, [name]), host)


@pytest.mark.parametrize(
    ("name", "host"),
    [
        ("store1", "store1."),
        ("xn--bcher-kva.example.com", "bücher.example.com"),
        ("xn--bcher-kva.example.com", "BÜCHER.example.com"),
        ("fe80::1", "fe80::1%eth0"),
    ],
)
def test_a_host_may_be_written_as_people_do(authority, name, host):
    assert matches_host(certificate(authority, [name]), host)


def test_the_common_name_counts_without_other_names(authority):
    assert matches_host(certificate(authority, [], common_name("store1")), "store1")


def test_the_common_name_counts_beside_addresses(authority):
    assert matches_host(certificate(authority, ["10.0.0.1"], common_name("store1")), "store1")


def test_the_common_name_does_not_count_beside_names(authority):
    assert not matches_host(certificate(authority, ["store2"], common_name("store1")), "store1")


def test_the_common_name_is_no_address(authority):
    assert not matches_host(certificate(authority, [], common_name("10.0.0.1")), "10.0.0.1")


def test_of_several_common_names_none_counts(authority):
    several = x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, name) for name in ("store1", "store2")]
    )
    assert not matches_host(certificate(authority, [], several), "store1")


def test_damaged_names_match_nothing(authority):
    key = ec.generate_private_key(ec.SECP256R1())
    damaged = (
        x509.CertificateBuilder()
        .subject_name(common_name("store1"))
        .issuer_name(authority.certificate.subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(NOW)
        .not_valid_after(NOW + DAY)
        .add_extension(
            x509.UnrecognizedExtension(ExtensionOID.SUBJECT_ALTERNATIVE_NAME, b"\x30\x03\x82\x01"),
            critical=False,
        )
        .sign(authority.key, hashes.SHA256())
    )
    assert (matches_host(damaged, "store1"), names_of(damaged)) == (False, [])


ADDRESSES = st.ip_addresses().map(str)


@given(host=ADDRESSES)
@example(host="10.0.0.1")
def test_no_pattern_matches_an_address(wildcards, host):
    assert not matches_host(wildcards, host)


@given(host=st.text())
def test_whatever_the_host_is_there_is_an_answer(wildcards, host):
    assert matches_host(wildcards, host) in (True, False)


@pytest.fixture(scope="module")
def wildcards(authority):
    names = ("*", "*.*", "*.0.0.1", "*.*.*.*", "*.example.com", "*::1")
    return certificate(authority, names, common_name("10.0.0.1"))


LABEL = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,10}[a-z0-9])?", fullmatch=True)


@given(first=LABEL.filter(lambda label: not label.startswith("xn--")))
def test_a_wildcard_is_for_any_first_label(wildcards, first):
    assert matches_host(wildcards, f"{first}.example.com")


@given(first=LABEL, second=LABEL)
def test_a_wildcard_is_for_one_label(wildcards, first, second):
    assert not matches_host(wildcards, f"{first}.{second}.example.com")


# Names in messages


def test_the_names_of_a_certificate(authority):
    names = ["store1", "*.example.com", "10.0.0.1", "fd00::1"]
    assert names_of(certificate(authority, names, common_name("x"))) == names


def test_the_common_name_is_a_name_if_there_is_no_other(authority):
    assert names_of(certificate(authority, [], common_name("store1"))) == ["store1"]


def test_a_name_cannot_steer_the_terminal(authority):
    assert names_of(certificate(authority, ["a\x1b[2J"])) == [r"a\x1b[2J"]


def test_the_wrong_host_is_told_with_the_right_ones(store1):
    assert explain_host(store1, "store2") == (
        "the server's certificate CN=store1 is for store1, 10.0.0.1, not for store2",
        "if that is the server you mean, say --tls-hostname store1",
    )


def test_of_many_hosts_some_are_told(authority):
    many = certificate(authority, [f"store{number}" for number in range(9)])
    said, _ = explain_host(many, "web1")
    assert "store4 and 4 more, not for web1" in said


def test_a_wildcard_is_no_host_to_say(authority):
    _, hint = explain_host(certificate(authority, ["*.example.com"]), "web1")
    assert hint.endswith("--tls-hostname NAME")


def test_a_certificate_for_no_host_is_told(authority):
    said, _ = explain_host(certificate(authority, [], x509.Name([])), "web1")
    assert said.endswith("is for no host, so not for web1 either")
