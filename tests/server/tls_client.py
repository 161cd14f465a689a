"""A client in bytes for servers with TLS: it says what it likes before, behind and inside."""

from __future__ import annotations

import contextlib
import functools
import struct
from itertools import islice

from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from nbdlink.server.security import ServerSecurity
from nbdlink.transport.ktls import _expand_label
from nbdlink.transport.stream import Deadline
from nbdlink.transport.tlscontext import TLSContext
from nbdlink.transport.tlsfiles import CredentialFiles

from ..transport.pairs import authority, context, identity
from .fakes import OPT_STARTTLS, REP_ACK, TIMEOUT, RawClient


def security(folder, mode="require"):
    """Give what a server needs of TLS, from files in `folder`."""
    files = authority().write_directory(folder / "pki", server=identity("server"))
    return ServerSecurity(mode, CredentialFiles(directory=str(files)))


@functools.cache
def client_context() -> TLSContext:
    return context("client")


class TLSClient(RawClient):
    """A `RawClient` that begins TLS first, unless it is told not to."""

    def __init__(self, service, *, tls=True, handshake=True, flags=3, **more):
        self._begins = tls
        self._flags = flags
        super().__init__(service, handshake=False)
        try:
            assert self.receive(18) == b"NBDMAGICIHAVEOPT\x00\x03"
            self.send(struct.pack(">I", flags))
            if tls:
                assert self.option(OPT_STARTTLS) == [(REP_ACK, b"")]
                self.begin()
            if handshake:
                self.go(**more)
        except BaseException:
            self.sock.close()
            raise

    def begin(self):
        """Do the TLS handshake."""
        stream = client_context().stream(self.sock, host="localhost")
        stream.handshake(Deadline(TIMEOUT))
        self._secret = stream.secret("CLIENT")
        stream.release()
        stream.settimeout(TIMEOUT)
        self.sock = stream

    def go(self, name=b""):
        from .fakes import OPT_GO, export_request

        replies = self.option(OPT_GO, export_request(name))
        assert replies[-1][0] == REP_ACK, replies

    def new_keys(self, count):
        """Give records that change the client's keys and ask the server to change its own.

        Nothing may have been sent inside TLS before, and `sock` cannot send any more afterwards.
        """
        return b"".join(islice(self._changes_of_keys(), count))

    def _changes_of_keys(self):
        cipher = self.sock.session.cipher
        digest = "sha384" if cipher.endswith("384") else "sha256"
        kind = ChaCha20Poly1305 if "CHACHA" in cipher else AESGCM
        length = 16 if "128" in cipher else 32
        secret = self._secret
        # A KeyUpdate with update_requested, and that it is of the handshake (RFC 8446, 4.6.3).
        message = b"\x18\0\0\1\1" + b"\x16"
        header = struct.pack(">BHH", 23, 0x303, len(message) + 16)
        while True:
            # The first record under each key, whose nonce is the bare one.
            key = _expand_label(digest, secret, b"key", length)
            nonce = _expand_label(digest, secret, b"iv", 12)
            yield header + kind(key).encrypt(nonce, message, header)
            secret = _expand_label(digest, secret, b"traffic upd", len(secret))

    @property
    def bare(self):
        """The socket below TLS."""
        return getattr(self.sock, "_sock", self.sock)

    def rest(self):
        """Give what comes until the server hangs up."""
        said = b""
        with contextlib.suppress(ConnectionError):
            while piece := self.sock.recv(1 << 16):
                said += piece
        return said
