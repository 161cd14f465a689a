"""Who it is that listens where an NBD server was expected.

An NBD server speaks first, with "NBDMAGIC". So do SSH, SMTP and others, each with words of its
own; HTTP and TLS wait for the client, and are known by their answers.
"""

from __future__ import annotations

import contextlib
from typing import Final

from nbdlink.errors import TransportError
from nbdlink.transport import stream
from nbdlink.transport.stream import Deadline
from nbdlink.transport.tlsfiles import printable
from nbdlink.uri import Target

_REQUEST: Final = b"GET / HTTP/1.0\r\n\r\n"
# A client's hello of TLS 1.2 (RFC 5246, section 7.4.1.2): no session, three suites, nothing
# compressed. It is answered by a hello or by an alert.
_HELLO_BODY: Final = b"\x03\x03" + bytes(32) + b"\0" + b"\0\x06\xc0\x2f\xc0\x2b\0\x2f" + b"\x01\0"
_HELLO: Final = (
    b"\x16\x03\x01"
    + (len(_HELLO_BODY) + 4).to_bytes(2, "big")
    + b"\x01"
    + len(_HELLO_BODY).to_bytes(3, "big")
    + _HELLO_BODY
)
_TLS_RECORDS: Final = (b"\x15\x03", b"\x16\x03")
_SHOWN: Final = 24
"""Bytes of an unknown server's first words that are shown."""


def name_speaker(words: bytes) -> str:
    """Say who greets with these words, which are not those of an NBD server."""
    if words.startswith(b"SSH-"):
        return "an SSH server"
    if words.startswith(b"HTTP/"):
        return "a web server"
    if words.startswith(_TLS_RECORDS):
        return "a server that begins with TLS, as HTTPS does and NBD does not"
    if words.startswith(b"220"):
        return "a mail or FTP server"
    if words.startswith(b"@RSYNCD"):
        return "an rsync server"
    return f"something that begins with {printable(ascii(words[:_SHOWN])[2:-1])!r}"


def provoke(target: Target, seconds: float) -> str | None:
    """Speak to a server that has not said a word; say who it is, or None if it stays silent.

    Args:
        target: the server.
        seconds: for which each of two questions may wait.

    Raises:
        TransportError: it cannot be reached any more.
    """
    if answer := _ask(target, _REQUEST, seconds):
        if b"HTTPS" in answer:
            return "a web server with TLS (HTTPS)"
        return name_speaker(answer)
    if answer := _ask(target, _HELLO, seconds):
        return name_speaker(answer)
    return None


def _ask(target: Target, question: bytes, seconds: float) -> bytes:
    deadline = Deadline(seconds)
    with stream.connect(target, deadline) as sock, contextlib.suppress(TransportError):
        stream.send(sock, question, deadline)
        return stream.receive(sock, deadline)
    return b""
