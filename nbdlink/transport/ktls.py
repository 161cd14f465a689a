"""In-kernel TLS: hand an established TLS 1.3 connection to the kernel with its keys.

Afterwards the descriptor is an ordinary stream socket, for the kernel's NBD driver and for
everybody else, and no process has to touch the data. What can be handed over is not looked up
by a kernel's version but tried, with a key of zeroes on a connection to ourselves.

The kernel's side: Documentation/networking/tls.rst, include/uapi/linux/tls.h. The keys come
from the traffic secrets by HKDF-Expand-Label (RFC 8446, section 7.3).

What ends such a connection: a KeyUpdate or an alert of the peer, as the driver knows neither.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import os
import socket
import struct
from dataclasses import dataclass
from typing import Any, Final

from nbdlink.errors import TLSError, TransportError
from nbdlink.transport.alerts import explain_alert
from nbdlink.transport.tls import TLSStream

_SOL_TLS: Final = 282
_TCP_ULP: Final = 31
_TLS_TX, _TLS_RX = 1, 2
_SET_RECORD_TYPE, _GET_RECORD_TYPE = 1, 2
_TLS_1_3: Final = 0x0304
_ALERT, _HANDSHAKE = 21, 22
_CLOSE_NOTIFY: Final = b"\1\0"


@dataclass(frozen=True, slots=True)
class _Cipher:
    """How the kernel wants a cipher's keys.

    Attributes:
        number: TLS_CIPHER_... in the kernel's header.
        digest: the suite's hash.
        key: bytes of the key.
        salt: bytes of the nonce that the kernel keeps apart.
    """

    number: int
    digest: str
    key: int
    salt: int

    def pack(self, key: bytes, nonce: bytes, sequence: int) -> bytes:
        """Give a `struct tls12_crypto_info_...`."""
        info = struct.pack("=HH", _TLS_1_3, self.number)
        return info + nonce[self.salt :] + key + nonce[: self.salt] + struct.pack(">Q", sequence)


USUAL: Final = "TLS_AES_128_GCM_SHA256"
_CIPHERS: Final = {
    "TLS_AES_128_GCM_SHA256": _Cipher(51, "sha256", 16, 4),
    "TLS_AES_256_GCM_SHA384": _Cipher(52, "sha384", 32, 4),
    "TLS_CHACHA20_POLY1305_SHA256": _Cipher(54, "sha256", 32, 0),
}

CIPHERS: Final = tuple(_CIPHERS)
"""The suites that a kernel may know."""


def obstacle(stream: TLSStream) -> str | None:
    """Say why a connection cannot be handed to the kernel, or None if it can.

    In that case its socket has been made ready for it, which changes nothing yet.
    """
    if stream.family not in (socket.AF_INET, socket.AF_INET6):
        return "the kernel has TLS for TCP only"
    session = stream.session
    assert session is not None
    if session.version != "TLSv1.3":
        return f"{session.version} was negotiated; the kernel is given TLS 1.3 only"
    if session.cipher not in _CIPHERS:
        return f"the kernel does not know {session.cipher}"
    if why := missing(session.cipher):
        return why
    with socket.socket(fileno=os.dup(stream.fileno())) as sock:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, _TCP_ULP, b"tls")
        except OSError as error:
            # Not while one side has ended its stream already.
            return f"the kernel does not take TLS over now ({error.strerror})"
    return None


_known: dict[str, str | None] = {}


def missing(cipher: str = USUAL) -> str | None:
    """Say why this kernel cannot do a cipher, or None if it can.

    It is tried, and once for all unless it failed for another reason than the kernel.
    """
    if cipher in _known:
        return _known[cipher]
    known = _CIPHERS[cipher]
    try:
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            sock = stack.enter_context(socket.create_connection(listener.getsockname(), 5))
            sock.setsockopt(socket.IPPROTO_TCP, _TCP_ULP, b"tls")
            info = known.pack(bytes(known.key), bytes(12), 0)
            sock.setsockopt(_SOL_TLS, _TLS_TX, info)
            sock.setsockopt(_SOL_TLS, _TLS_RX, info)
    except OSError as error:
        why = f"the kernel cannot do {cipher} ({error.strerror})"
        if error.errno == errno.ENOENT:
            why = "the kernel has no TLS (module tls)"
        if error.errno in (errno.ENOENT, errno.ENOPROTOOPT):
            _known[cipher] = why
        return why
    _known[cipher] = None
    return None


def hand_over(stream: TLSStream) -> KernelTLSSocket:
    """Give the kernel a connection's keys; the stream is of no use afterwards.

    Nothing that was received may be left in the stream, and `obstacle` must have been None.

    Raises:
        TLSError: the kernel refuses. The connection is lost then.
    """
    assert stream.session is not None
    cipher = _CIPHERS[stream.session.cipher]
    client, server = stream.secret("CLIENT"), stream.secret("SERVER")
    if client is None or server is None:
        raise TLSError("OpenSSL has not told the connection's keys")
    ours, theirs = (server, client) if stream.is_server else (client, server)
    sent, received = stream.records_sent, stream.records_received
    bare = stream.detach_socket()
    try:
        bare.setsockopt(_SOL_TLS, _TLS_TX, _info(cipher, ours, sent))
        bare.setsockopt(_SOL_TLS, _TLS_RX, _info(cipher, theirs, received))
    except OSError as error:
        bare.close()
        raise TLSError(f"the kernel does not take over TLS: {error.strerror}") from None
    return KernelTLSSocket(fileno=bare.detach())


def _info(cipher: _Cipher, secret: bytes, sequence: int) -> bytes:
    key = _expand_label(cipher.digest, secret, b"key", cipher.key)
    return cipher.pack(key, _expand_label(cipher.digest, secret, b"iv", 12), sequence)


def _expand_label(digest: str, secret: bytes, label: bytes, length: int) -> bytes:
    """HKDF-Expand-Label with an empty context, for a length of up to one digest."""
    label = b"tls13 " + label
    info = struct.pack(">HB", length, len(label)) + label + b"\0"
    return hmac.digest(secret, info + b"\1", digest)[:length]


class KernelTLSSocket(socket.socket):
    """A socket whose TLS the kernel does, for use in a process.

    Sending needs nothing special. What is no data comes as EIO from the kernel's receive, and
    is asked for then; the end of the stream must be announced.
    """

    _deaf = False

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        """Receive, as a socket does.

        Raises:
            TransportError: the connection was cut off.
            TLSError: the peer sent an alert, or new keys.
        """
        try:
            count = super().recv_into(buffer, nbytes, flags)
        except OSError as error:
            if error.errno in (errno.EBADMSG, errno.EMSGSIZE):
                raise TLSError("what the peer sent is no valid TLS") from None
            if error.errno != errno.EIO:
                raise
            self._hear_record()
            return 0
        if not count and not self._deaf:
            raise TransportError("the connection was cut off: it ended without TLS's close_notify")
        return count

    def _hear_record(self) -> None:
        """Receive a record that is no data. Only close_notify is harmless."""
        room = socket.CMSG_SPACE(1)
        data, control, _, _ = self.recvmsg(1 << 14, room)
        kind = next(
            (
                content[0]
                for level, type_, content in control
                if (level, type_) == (_SOL_TLS, _GET_RECORD_TYPE) and content
            ),
            0,
        )
        if kind == _ALERT and len(data) == 2:
            if data[1] == _CLOSE_NOTIFY[1]:
                return
            raise TLSError(explain_alert(data[1]))
        if kind == _HANDSHAKE:
            raise TLSError("the peer has changed its keys, which the kernel does not follow")
        raise TLSError("the peer sent something that is no data")

    def shutdown(self, how: int) -> None:
        """As a socket's; with SHUT_WR the end is announced first."""
        if how == socket.SHUT_RD:
            self._deaf = True
        elif how == socket.SHUT_WR:
            control = [(_SOL_TLS, _SET_RECORD_TYPE, bytes([_ALERT]))]
            with contextlib.suppress(OSError):
                self.sendmsg([_CLOSE_NOTIFY], control, socket.MSG_DONTWAIT)
        super().shutdown(how)
