"""A client in bytes for servers with TLS: it says what it likes before, behind and inside."""

from __future__ import annotations

import contextlib
import functools
import struct

from nbdlink.server.security import ServerSecurity
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
        stream.release()
        stream.settimeout(TIMEOUT)
        self.sock = stream

    def go(self, name=b""):
        from .fakes import OPT_GO, export_request

        replies = self.option(OPT_GO, export_request(name))
        assert replies[-1][0] == REP_ACK, replies

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
