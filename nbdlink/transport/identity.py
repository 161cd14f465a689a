"""Who a certificate says it is for, in words that are safe to show and to compare."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal

from cryptography import x509

from nbdlink.transport.tlsfiles import printable

Role = Literal["client", "server"]

_ATTRIBUTES: Final[dict[str, str]] = {
    "2.5.4.3": "CN",
    "2.5.4.4": "surName",
    "2.5.4.5": "serialNumber",
    "2.5.4.6": "C",
    "2.5.4.7": "L",
    "2.5.4.8": "ST",
    "2.5.4.9": "street",
    "2.5.4.10": "O",
    "2.5.4.11": "OU",
    "2.5.4.12": "title",
    "2.5.4.13": "description",
    "2.5.4.17": "postalCode",
    "2.5.4.42": "givenName",
    "2.5.4.43": "initials",
    "2.5.4.44": "generationQualifier",
    "2.5.4.46": "dnQualifier",
    "2.5.4.65": "pseudonym",
    "0.9.2342.19200300.100.1.1": "UID",
    "0.9.2342.19200300.100.1.25": "DC",
    "1.2.840.113549.1.9.1": "EMAIL",
}
"""What GnuTLS calls the parts of a name; others are shown by their number."""
ATTRIBUTES: Final = frozenset(_ATTRIBUTES.values())


def describe(certificate: x509.Certificate) -> str:
    r"""Name a certificate by its subject, as `CN=web1,O=Example`.

    This is what qemu compares with the identity of an authz object: gnutls_x509_crt_get_dn
    escapes as RFC 4514 does, but has the parts in the order of the certificate, where RFC 4514
    and `x509.Name.rfc4514_string` begin with the last one. certtool puts CN first into a
    certificate, and `openssl req` puts C first. Unlike GnuTLS, what is not printable becomes
    `\0A`, pairs of digits as RFC 4514 has them: two subjects never look the same.

    A certificate without a subject is named by its first subject alternative name, with the kind
    before it (`DNS:web1`), which no subject can look like.
    """
    try:
        if subject := _describe_name(certificate.subject):
            return subject
        names = alternative_names(certificate)
    except ValueError:
        names = []
    if not names:
        return f"certificate number {certificate.serial_number:X}"
    kinds: dict[type[x509.GeneralName], str] = {
        x509.DNSName: "DNS",
        x509.IPAddress: "IP",
        x509.RFC822Name: "EMAIL",
        x509.UniformResourceIdentifier: "URI",
    }
    kind = kinds.get(type(names[0]), "NAME")
    return f"{kind}:{printable(str(names[0].value))}"


def describe_issuer(certificate: x509.Certificate) -> str:
    """Name the authority that signed a certificate, as `describe` names a subject."""
    try:
        return _describe_name(certificate.issuer) or "an authority without a name"
    except ValueError:
        return "an authority whose name is damaged"


def alternative_names(certificate: x509.Certificate) -> list[x509.GeneralName]:
    """Give the subject alternative names of a certificate.

    Raises:
        ValueError: the certificate's extensions are damaged.
    """
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    except (x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise ValueError(str(error)) from None
    return list(extension.value)


def _describe_name(name: x509.Name) -> str:
    return ",".join(
        "+".join(
            f"{_ATTRIBUTES.get(each.oid.dotted_string, each.oid.dotted_string)}"
            f"={_escape(each.value)}"
            for each in part
        )
        for part in name.rdns
    )


def _escape(value: str | bytes) -> str:
    """Escape a part of a name (RFC 4514, section 2.4)."""
    if isinstance(value, bytes):
        return "#" + value.hex()
    escaped = []
    for place, each in enumerate(value):
        edge = place in (0, len(value) - 1)
        if each in ',+"\\<>;' or (each == " " and edge) or (each == "#" and place == 0):
            escaped.append("\\" + each)
        elif each.isprintable():
            escaped.append(each)
        else:
            escaped += [f"\\{byte:02X}" for byte in each.encode("utf-8", "surrogatepass")]
    return "".join(escaped)


def moment(when: datetime) -> str:
    """Give a date as messages have it, with the time if it is less than two days from now."""
    if abs(when - datetime.now(UTC)) < timedelta(days=2):
        return f"{when:%Y-%m-%d %H:%M:%S} UTC"
    return f"{when:%Y-%m-%d}"


def valid_from(certificate: x509.Certificate) -> datetime:
    """Give the moment from which on a certificate is valid."""
    when: datetime = _moment(certificate, "not_valid_before")
    return when


def valid_until(certificate: x509.Certificate) -> datetime:
    """Give the last moment at which a certificate is valid."""
    when: datetime = _moment(certificate, "not_valid_after")
    return when


def next_update(revocations: x509.CertificateRevocationList) -> datetime | None:
    """Give the moment until which a list of revoked certificates is good, if it says so."""
    when: datetime | None = _moment(revocations, "next_update")
    return when


def _moment(thing: object, name: str) -> Any:
    try:
        return getattr(thing, f"{name}_utc")
    except AttributeError:  # before cryptography 42, as in Debian 12, dates had no time zone
        when: datetime | None = getattr(thing, name)
        return None if when is None else when.replace(tzinfo=UTC)
