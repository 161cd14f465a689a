"""What OpenSSL and a peer's alerts mean, in words for people."""

from __future__ import annotations

from typing import Final

from OpenSSL import SSL

from nbdlink.errors import TLSError
from nbdlink.transport.tlscontext import Judgement, reasons

# OpenSSL's words (ssl_err.c, in lower case with spaces), and ours. "alert" stands in those that
# the peer has sent: it is the one that is not content.
_HANDSHAKE: Final[dict[str, tuple[str, str | None]]] = {
    "alert unknown ca": (
        "the {peer} does not trust the authority that signed our certificate",
        "use a certificate from an authority that the {peer} trusts",
    ),
    "alert certificate required": (
        "the {peer} wants a certificate from us",
        "give one: --tls-certificates DIR, or --tls-cert and --tls-key",
    ),
    "alert bad certificate": ("the {peer} does not accept our certificate", None),
    "alert certificate expired": (
        "the {peer} says that our certificate, or what it checks it by, has expired",
        "have it renewed, or check the clocks of both machines",
    ),
    "alert certificate revoked": (
        "the {peer} says that our certificate was revoked",
        "ask the authority for a new one",
    ),
    "alert unsupported certificate": ("the {peer} cannot use our kind of certificate", None),
    "alert certificate unknown": ("the {peer} does not accept our certificate", None),
    "alert access denied": ("the {peer} does not let us in", None),
    "alert unknown psk identity": (
        "the {peer} knows no key for our user name",
        "check --tls-username and the {peer}'s key file",
    ),
    "alert decrypt error": (
        "the {peer} has another key, or cannot check our signature",
        "compare the key files on both sides",
    ),
    "alert illegal parameter": ("the {peer} does not accept our parameters", None),
    "alert bad record mac": ("the {peer} has another key", "compare the key files on both sides"),
    "alert protocol version": ("the {peer} speaks no TLS 1.2 or 1.3 with us", None),
    "alert insufficient security": ("the {peer} demands other ciphers", None),
    "alert handshake failure": (
        "the {peer} and we have no cipher or kind of credentials in common",
        "do both sides use certificates, or both pre-shared keys?",
    ),
    # OpenSSL's word for a name that is not in the certificate, too, if the program compares it.
    "alert internal error": (
        "the {peer} failed in the handshake, or takes our certificate for somebody else's",
        "see what it says itself",
    ),
    "no shared cipher": (
        "the {peer} and we have no cipher or kind of credentials in common",
        "do both sides use certificates, or both pre-shared keys?",
    ),
    "peer did not return a certificate": ("the {peer} has shown no certificate", None),
    "unsupported protocol": ("the {peer} offers neither TLS 1.2 nor 1.3", None),
    "psk identity not found": ("the {peer} named a user who has no key here", None),
    "binder does not verify": ("the {peer} has another pre-shared key than we have", None),
    "wrong version number": ("the {peer} does not speak TLS", None),
    "http request": ("the {peer} speaks HTTP", None),
}


# The same, for a client that has a pre-shared key.
_KEY_ALERTS: Final = {
    "alert handshake failure": (
        "the server has no key for {user}, or uses certificates instead",
        "check --tls-username and the server's key file",
    ),
    "alert unknown psk identity": (
        "the server has no key for {user}",
        "check --tls-username and the server's key file",
    ),
    "alert decrypt error": (
        "the server has another key for {user}",
        "compare the key files on both sides",
    ),
    "alert bad record mac": (
        "the server has another key for {user}",
        "compare the key files on both sides",
    ),
}

# How a server fails if the client's key is another one, in TLS 1.3 and 1.2.
_WRONG_KEY: Final = ("binder does not verify", "bad record mac", "record layer failure")

# A server without certificates fails so if it finds no key to use.
_NO_KEY: Final = frozenset(
    {"no suitable signature algorithm", "no shared cipher", "psk identity not found"}
)

_ALERTS: Final = {
    10: "unexpected message",
    20: "bad record MAC",
    22: "record overflow",
    40: "handshake failure",
    42: "bad certificate",
    43: "unsupported certificate",
    44: "certificate revoked",
    45: "certificate expired",
    46: "certificate unknown",
    47: "illegal parameter",
    48: "unknown authority",
    49: "access denied",
    50: "decode error",
    51: "decrypt error",
    70: "protocol version",
    80: "internal error",
    90: "user canceled",
    115: "unknown PSK identity",
    116: "certificate required",
}


def _explain_handshake(words: str, peer: str) -> TLSError:
    """Say why a handshake failed, by OpenSSL's words for it."""
    for known, (message, hint) in _HANDSHAKE.items():
        if known in words:
            return TLSError(message.format(peer=peer), hint=hint and hint.format(peer=peer))
    return TLSError(f"the TLS handshake with the {peer} failed: {words}")


def explain_alert(number: int) -> str:
    """Say what a peer's alert is (RFC 8446, section 6)."""
    return f"the peer broke TLS off: {_ALERTS.get(number, f'alert {number}')}"


def explain_stream(words: str, peer: str) -> TLSError:
    """Say what went wrong after the handshake, by OpenSSL's words for it.

    In TLS 1.3 a client has done its part when the server looks at its certificate, so that the
    server's refusal may come as late as this.
    """
    if "alert" in words:
        return _explain_handshake(words, peer)
    return TLSError(f"what the {peer} sent is no valid TLS: {words}")


def explain_failure(error: SSL.Error, judgement: Judgement) -> TLSError:
    """Say why a handshake failed: what our own judgement was, or else by OpenSSL's words."""
    if judgement.failure:
        message, hint = judgement.failure
        return TLSError(message, hint=hint)
    words, role = reasons(error), judgement.role
    if isinstance(error, SSL.ZeroReturnError):
        return TLSError(f"the {role} took leave in the TLS handshake, and does not say why")
    if judgement.has_keys and (failure := _key_error(words, judgement)):
        return failure
    return _explain_handshake(words, role)


def _key_error(words: str, judgement: Judgement) -> TLSError | None:
    """Say what is wrong with a pre-shared key, if OpenSSL's words are about that."""
    if judgement.own_user is not None:
        for known, (message, hint) in _KEY_ALERTS.items():
            if known in words:
                return TLSError(message.format(user=judgement.own_user), hint=hint)
    elif judgement.user is not None and any(each in words for each in _WRONG_KEY):
        user = ascii(judgement.user)
        return TLSError(f"the client has another pre-shared key for {user} than we have")
    elif words in _NO_KEY and judgement.unknown_user is not None:
        return TLSError(f"the client is {judgement.unknown_user!a}, who has no key here")
    elif words in _NO_KEY:
        return TLSError("the client offers no pre-shared key, which it has to have here")
    return None


def suspicion(judgement: Judgement) -> str:
    """Say what may be wrong with a client whose server hung up in the handshake in silence."""
    if user := judgement.own_user:
        return (
            f"perhaps it has no key, or another one, for {user}: compare the key files; "
            "its log will tell"
        )
    return "perhaps it wants a pre-shared key (--tls-psk FILE): its log will tell"
