"""Why a peer is not believed, in words; and whether a certificate is for a host.

OpenSSL judges a chain of certificates and gives a number. A person needs to know which
certificate it is about, what is wrong with it, and who can do what about it.
"""

from __future__ import annotations

import ipaddress
import re
from datetime import datetime
from enum import IntEnum
from typing import Final

from cryptography import x509

from nbdlink.transport.identity import (
    Role,
    alternative_names,
    describe,
    describe_issuer,
    moment,
    next_update,
    valid_from,
    valid_until,
)
from nbdlink.transport.tlsfiles import printable

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class VerifyError(IntEnum):
    """OpenSSL's X509_V_ERR_* numbers (include/openssl/x509_vfy.h of OpenSSL 3)."""

    UNSPECIFIED = 1
    UNABLE_TO_GET_ISSUER_CERT = 2
    UNABLE_TO_GET_CRL = 3
    UNABLE_TO_DECRYPT_CERT_SIGNATURE = 4
    UNABLE_TO_DECRYPT_CRL_SIGNATURE = 5
    UNABLE_TO_DECODE_ISSUER_PUBLIC_KEY = 6
    CERT_SIGNATURE_FAILURE = 7
    CRL_SIGNATURE_FAILURE = 8
    CERT_NOT_YET_VALID = 9
    CERT_HAS_EXPIRED = 10
    CRL_NOT_YET_VALID = 11
    CRL_HAS_EXPIRED = 12
    ERROR_IN_CERT_NOT_BEFORE_FIELD = 13
    ERROR_IN_CERT_NOT_AFTER_FIELD = 14
    ERROR_IN_CRL_LAST_UPDATE_FIELD = 15
    ERROR_IN_CRL_NEXT_UPDATE_FIELD = 16
    OUT_OF_MEM = 17
    DEPTH_ZERO_SELF_SIGNED_CERT = 18
    SELF_SIGNED_CERT_IN_CHAIN = 19
    UNABLE_TO_GET_ISSUER_CERT_LOCALLY = 20
    UNABLE_TO_VERIFY_LEAF_SIGNATURE = 21
    CERT_CHAIN_TOO_LONG = 22
    CERT_REVOKED = 23
    NO_ISSUER_PUBLIC_KEY = 24
    PATH_LENGTH_EXCEEDED = 25
    INVALID_PURPOSE = 26
    CERT_UNTRUSTED = 27
    CERT_REJECTED = 28
    SUBJECT_ISSUER_MISMATCH = 29
    AKID_SKID_MISMATCH = 30
    AKID_ISSUER_SERIAL_MISMATCH = 31
    KEYUSAGE_NO_CERTSIGN = 32
    UNABLE_TO_GET_CRL_ISSUER = 33
    UNHANDLED_CRITICAL_EXTENSION = 34
    KEYUSAGE_NO_CRL_SIGN = 35
    UNHANDLED_CRITICAL_CRL_EXTENSION = 36
    INVALID_NON_CA = 37
    PROXY_PATH_LENGTH_EXCEEDED = 38
    KEYUSAGE_NO_DIGITAL_SIGNATURE = 39
    PROXY_CERTIFICATES_NOT_ALLOWED = 40
    INVALID_EXTENSION = 41
    INVALID_POLICY_EXTENSION = 42
    NO_EXPLICIT_POLICY = 43
    DIFFERENT_CRL_SCOPE = 44
    UNSUPPORTED_EXTENSION_FEATURE = 45
    UNNESTED_RESOURCE = 46
    PERMITTED_VIOLATION = 47
    EXCLUDED_VIOLATION = 48
    SUBTREE_MINMAX = 49
    APPLICATION_VERIFICATION = 50
    UNSUPPORTED_CONSTRAINT_TYPE = 51
    UNSUPPORTED_CONSTRAINT_SYNTAX = 52
    UNSUPPORTED_NAME_SYNTAX = 53
    CRL_PATH_VALIDATION_ERROR = 54
    PATH_LOOP = 55
    SUITE_B_INVALID_VERSION = 56
    SUITE_B_INVALID_ALGORITHM = 57
    SUITE_B_INVALID_CURVE = 58
    SUITE_B_INVALID_SIGNATURE_ALGORITHM = 59
    SUITE_B_LOS_NOT_ALLOWED = 60
    SUITE_B_CANNOT_SIGN_P_384_WITH_P_256 = 61
    HOSTNAME_MISMATCH = 62
    EMAIL_MISMATCH = 63
    IP_ADDRESS_MISMATCH = 64
    DANE_NO_MATCH = 65
    EE_KEY_TOO_SMALL = 66
    CA_KEY_TOO_SMALL = 67
    CA_MD_TOO_WEAK = 68
    INVALID_CALL = 69
    STORE_LOOKUP = 70
    NO_VALID_SCTS = 71
    PROXY_SUBJECT_NAME_VIOLATION = 72
    OCSP_VERIFY_NEEDED = 73
    OCSP_VERIFY_FAILED = 74
    OCSP_CERT_UNKNOWN = 75
    UNSUPPORTED_SIGNATURE_ALGORITHM = 76
    SIGNATURE_ALGORITHM_MISMATCH = 77
    SIGNATURE_ALGORITHM_INCONSISTENCY = 78
    INVALID_CA = 79
    PATHLEN_INVALID_FOR_NON_CA = 80
    PATHLEN_WITHOUT_KU_KEY_CERT_SIGN = 81
    KU_KEY_CERT_SIGN_INVALID_FOR_NON_CA = 82
    ISSUER_NAME_EMPTY = 83
    SUBJECT_NAME_EMPTY = 84
    MISSING_AUTHORITY_KEY_IDENTIFIER = 85
    MISSING_SUBJECT_KEY_IDENTIFIER = 86
    EMPTY_SUBJECT_ALT_NAME = 87
    EMPTY_SUBJECT_SAN_NOT_CRITICAL = 88
    CA_BCONS_NOT_CRITICAL = 89
    AUTHORITY_KEY_IDENTIFIER_CRITICAL = 90
    SUBJECT_KEY_IDENTIFIER_CRITICAL = 91
    CA_CERT_MISSING_KEY_USAGE = 92
    EXTENSIONS_REQUIRE_VERSION_3 = 93
    EC_KEY_EXPLICIT_PARAMS = 94


def explain(
    code: int,
    depth: int,
    certificate: x509.Certificate | None,
    *,
    host: str | None = None,
    role: Role = "server",
    revocations: tuple[x509.CertificateRevocationList, ...] = (),
) -> tuple[str, str | None]:
    """Say why a certificate is not believed, and what to do next.

    Args:
        code: OpenSSL's number, one of `VerifyError` or not.
        depth: how far the certificate is from the peer's own, which has 0.
        certificate: the one that failed, if it is known.
        host: who the peer should be, where that was checked.
        role: what the peer is.
        revocations: the lists that were used; only for the date on which one expired.

    Returns:
        One line, and one line of advice or None.
    """
    mismatches = VerifyError.HOSTNAME_MISMATCH, VerifyError.IP_ADDRESS_MISMATCH
    if code in mismatches and certificate is not None and role == "server":
        return explain_host(certificate, host or "the host that was asked for")
    subject = _subject(depth, certificate, role)
    issuer = "its authority" if certificate is None else describe_issuer(certificate)
    match code:
        case VerifyError.CERT_HAS_EXPIRED:
            when = "" if certificate is None else f" on {moment(valid_until(certificate))}"
            return f"{subject} expired{when}", "have it renewed, or check the clocks"
        case VerifyError.CERT_NOT_YET_VALID:
            when = "later" if certificate is None else moment(valid_from(certificate))
            return f"{subject} is valid only from {when} on", "check the clocks of both machines"
        case (
            VerifyError.UNABLE_TO_GET_ISSUER_CERT
            | VerifyError.UNABLE_TO_GET_ISSUER_CERT_LOCALLY
            | VerifyError.UNABLE_TO_VERIFY_LEAF_SIGNATURE
        ):
            return (
                f"{subject} is signed by an authority that is not trusted ({issuer})",
                "give that authority's certificate with --tls-ca; if it is only an intermediate "
                f"one, the {role} has to send it with its own",
            )
        case VerifyError.DEPTH_ZERO_SELF_SIGNED_CERT:
            return (
                f"{subject} is self-signed, and not trusted",
                "if it is the right one, give it with --tls-ca",
            )
        case VerifyError.SELF_SIGNED_CERT_IN_CHAIN:
            return (
                f"{subject} is not trusted",
                "if it is the right authority, give its certificate with --tls-ca",
            )
        case VerifyError.CERT_UNTRUSTED | VerifyError.CERT_REJECTED:
            return f"{subject} is not trusted for this purpose", None
        case VerifyError.CERT_SIGNATURE_FAILURE:
            return (
                f"{subject} has a signature that {issuer} did not make",
                "is another authority of the same name given with --tls-ca?",
            )
        case VerifyError.CERT_REVOKED:
            return f"{subject} was revoked by {issuer}", f"the {role} needs a new one"
        case VerifyError.CERT_CHAIN_TOO_LONG:
            return (
                f"{subject} is further from a trusted one than --tls-verify-depth allows",
                "allow more, or trust one of its intermediate authorities with --tls-ca",
            )
        case VerifyError.PATH_LENGTH_EXCEEDED:
            return f"{subject} does not allow as many authorities beneath it as there are", None
        case VerifyError.INVALID_PURPOSE if depth == 0:
            return (
                f"{subject} is not meant for {role}s (its purpose)",
                f"it needs {'serverAuth' if role == 'server' else 'clientAuth'} among its "
                "extended key usages",
            )
        case (
            VerifyError.INVALID_CA | VerifyError.KEYUSAGE_NO_CERTSIGN | VerifyError.INVALID_PURPOSE
        ):
            return f"{subject} may not sign certificates, but signed one", None
        case VerifyError.EE_KEY_TOO_SMALL | VerifyError.CA_KEY_TOO_SMALL:
            return f"{subject} has a key that is too weak", "RSA needs 2048 bits or more"
        case VerifyError.CA_MD_TOO_WEAK:
            return (
                f"{subject} is signed with a digest that is too weak",
                "it has to be signed anew, with SHA-256 or better",
            )
        case VerifyError.UNHANDLED_CRITICAL_EXTENSION:
            return f"{subject} has a critical extension that OpenSSL does not know", None
        case VerifyError.PERMITTED_VIOLATION | VerifyError.EXCLUDED_VIOLATION:
            return f"{subject} is for names that its authority may not vouch for", None
    if problem := _REVOCATION_PROBLEMS.get(code):
        if code == VerifyError.CRL_HAS_EXPIRED and (end := _expiry(certificate, revocations)):
            problem = (f"expired on {moment(end)}", problem[1])
        return f"the list of revoked certificates of {issuer} {problem[0]}", problem[1]
    return f"{subject} is not believed: {_words(code)}", None


def explain_host(certificate: x509.Certificate, host: str) -> tuple[str, str | None]:
    """Say that a server's certificate is not for `host`, but for whom it is; as `explain` does."""
    names = names_of(certificate)
    shown = printable(host)
    subject = _subject(0, certificate, "server")
    if not names:
        return (
            f"{subject} is for no host, so not for {shown} either",
            "it needs its host among its subject alternative names",
        )
    listed = ", ".join(names[:_NAMES_SHOWN])
    if len(names) > _NAMES_SHOWN:
        listed += f" and {len(names) - _NAMES_SHOWN} more"
    example = next((name for name in names if not name.startswith("*")), "NAME")
    return (
        f"{subject} is for {listed}, not for {shown}",
        f"if that is the server you mean, say --tls-hostname {example}",
    )


_NAMES_SHOWN: Final = 5

_REVOCATION_PROBLEMS: Final[dict[int, tuple[str, str | None]]] = {
    VerifyError.UNABLE_TO_GET_CRL: (
        "was not given",
        "give that list as well, as ca-crl.pem or with --tls-crl",
    ),
    VerifyError.CRL_HAS_EXPIRED: ("expired", "fetch the current one, or check the clocks"),
    VerifyError.CRL_NOT_YET_VALID: ("is not valid yet", "check this machine's clock"),
    VerifyError.CRL_SIGNATURE_FAILURE: (
        "has a signature that it did not make",
        "is it of another authority of the same name?",
    ),
    VerifyError.UNABLE_TO_GET_CRL_ISSUER: (
        "is signed by somebody unknown",
        "give its authority with --tls-ca",
    ),
    VerifyError.KEYUSAGE_NO_CRL_SIGN: (
        "counts for nothing: the authority may not sign such lists",
        "the authority's certificate needs cRLSign among its key usages",
    ),
    VerifyError.UNHANDLED_CRITICAL_CRL_EXTENSION: (
        "has a critical extension that OpenSSL does not know",
        None,
    ),
    VerifyError.DIFFERENT_CRL_SCOPE: ("is not about certificates of this kind", None),
}


def _subject(depth: int, certificate: x509.Certificate | None, role: Role) -> str:
    name = "" if certificate is None else " " + describe(certificate)
    if depth == 0:
        return f"the {role}'s certificate{name}"
    return f"the authority{name}, on which the {role}'s certificate depends,"


def _expiry(
    certificate: x509.Certificate | None, revocations: tuple[x509.CertificateRevocationList, ...]
) -> datetime | None:
    if certificate is None:
        return None
    dates = [next_update(each) for each in revocations if each.issuer == certificate.issuer]
    return max((date for date in dates if date is not None), default=None)


def _words(code: int) -> str:
    try:
        return VerifyError(code).name.lower().replace("_", " ")
    except ValueError:
        return f"OpenSSL's verification error {code}"


# Names of hosts. OpenSSL judges them too, but gives neither the reason nor the names, and takes
# wildcards that RFC 9525 has ruled out (f*.example.com).

_LABELS: Final = re.compile(
    r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*"
)
_NUMBER: Final = re.compile(r"[0-9]+|0x[0-9a-f]*")


def matches_host(certificate: x509.Certificate, host: str) -> bool:
    """Tell whether a certificate is for `host` (RFC 9525, section 6).

    An address is looked for among the addresses of the certificate, anything else among its DNS
    names, without regard to case and to one dot at the end. `*` may stand for a whole first
    label if two or more follow. The common name counts, as it does for GnuTLS and OpenSSL 3,
    only if the certificate has no DNS name at all and no other common name.

    Args:
        certificate: the server's own.
        host: a name, which may be international, or an address; a v6 address may have a scope.
    """
    try:
        return _matches(certificate, host)
    except ValueError:  # the certificate is damaged where the names are
        return False


def _matches(certificate: x509.Certificate, host: str) -> bool:
    alternatives = alternative_names(certificate)
    if address := _address(host):
        return any(
            isinstance(each, x509.IPAddress) and each.value == address for each in alternatives
        )
    name = _ascii_name(host)
    if name is None:
        return False
    patterns = [each.value for each in alternatives if isinstance(each, x509.DNSName)]
    return any(_matches_name(pattern, name) for pattern in patterns or _common_names(certificate))


def names_of(certificate: x509.Certificate) -> list[str]:
    """Give the names and addresses of the hosts that a certificate is for, safe to print."""
    try:
        alternatives = alternative_names(certificate)
        names = [each.value for each in alternatives if isinstance(each, x509.DNSName)]
        names = names or _common_names(certificate)
        names += [str(each.value) for each in alternatives if isinstance(each, x509.IPAddress)]
    except ValueError:
        return []
    return [printable(name) for name in names]


def _common_names(certificate: x509.Certificate) -> list[str]:
    found = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    names = [each.value for each in found if isinstance(each.value, str)]
    # Which of several is meant is a matter of taste, and tastes differ (RFC 6125, section 1.8).
    return names if len(names) == 1 else []


def _address(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None


def _ascii_name(host: str) -> str | None:
    """Give a host's name as DNS knows it, or None if it cannot be one."""
    try:
        # The codec is what getaddrinfo has applied for the connection.
        name = host.encode("idna").decode("ascii").lower().removesuffix(".")
    except UnicodeError:
        return None
    # Resolvers take 127.1 and 0x7f000001 for addresses: these are nobody's names.
    if not _LABELS.fullmatch(name) or _NUMBER.fullmatch(name.rpartition(".")[2]):
        return None
    return name


def _matches_name(pattern: str, name: str) -> bool:
    if not pattern.isascii():
        return False
    pattern = pattern.lower()
    if not pattern.startswith("*."):
        return pattern == name
    tail = pattern[2:]
    first, _, rest = name.partition(".")
    return rest == tail and "." in tail and "_" not in first
