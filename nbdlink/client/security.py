"""What a client demands of TLS, from what was typed and from what the target says itself.

`TLSOptions` is what an administrator says, before it is known to which server. `Security` is
what follows for one target, and has the credentials once they are needed. Nothing in here
imports OpenSSL before that: most connections are made without it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from nbdlink.errors import ConfigError, TLSError
from nbdlink.transport.tlsfiles import CredentialFiles, Policy
from nbdlink.uri import Target

if TYPE_CHECKING:
    import socket

    from nbdlink.transport.stream import Deadline
    from nbdlink.transport.tls import TLSStream
    from nbdlink.transport.tlscontext import TLSContext


NO_FILES: Final = CredentialFiles()


@dataclass(frozen=True, slots=True)
class TLSOptions:
    """What was said about TLS, apart from the target.

    Attributes:
        policy: "off", "allow" (if the server offers it) or "require"; None follows from the
            target and from what else was said.
        files: credentials.
        hostname: the name that the server's certificate must have, or None for the target's.
        verify_peer: whether the server must prove who it is.
    """

    policy: Policy | None = None
    files: CredentialFiles = NO_FILES
    hostname: str | None = None
    verify_peer: bool = True


NO_OPTIONS: Final = TLSOptions()


class Security:
    """What connections to one target need of TLS.

    Attributes:
        policy: "off", "allow" or "require".
        host: the name or address that the server's certificate must have, or None for any.
    """

    def __init__(
        self, target: Target, options: TLSOptions = NO_OPTIONS, *, for_kernel: bool = False
    ) -> None:
        """Put together what was said; a word of the options counts more than the target's.

        Args:
            target: server and export.
            options: what was said besides.
            for_kernel: whether the kernel is to take TLS over. It cannot follow a change of
                keys, which servers with GnuTLS make after 2^24 records (64 to 256 GiB) of any
                cipher but ChaCha20; so that one is preferred if the kernel has it.

        Raises:
            ConfigError: the two contradict each other.
        """
        self.policy = _policy(target, options)
        self.host = options.hostname or target.tls_hostname or target.host
        if self.host is None and target.socket is None:
            self.host = "localhost"  # to which `stream.connect` connects then
        self._files = _files(target, options.files)
        self._for_kernel = for_kernel
        self._verify_peer = options.verify_peer and target.tls_verify_peer is not False
        self._context: TLSContext | None = None
        if self.policy == "off":
            return
        if target.tls_type == "anon":
            raise ConfigError(
                "anonymous TLS (tls-type=anon) keeps nobody out who is in between",
                hint="use x509 or psk",
            )
        if target.tls_type == "psk" and self._files.psk is None:
            raise ConfigError(
                "pre-shared keys need a file with the keys",
                hint="say --tls-psk FILE, or tls-psk-file= in the URI",
            )
        if target.tls_type == "x509" and self._files.psk is not None:
            raise ConfigError("tls-type is x509, and a file of pre-shared keys was given")

    @property
    def context(self) -> TLSContext:
        """The credentials, which are loaded when this is first asked for.

        Raises:
            ConfigError, TLSError: they cannot be, or are of no use.
        """
        if self._context is None:
            from nbdlink.transport.credentials import load_client
            from nbdlink.transport.tlscontext import LASTING_SUITE, TLSContext

            credentials = load_client(self._files)
            self._context = TLSContext(
                credentials,
                server=False,
                verify_peer=self._verify_peer,
                lasting=self._for_kernel and _kernel_has(LASTING_SUITE),
            )
        return self._context

    @property
    def verifies(self) -> bool:
        """Whether a server with TLS has to prove who it is."""
        return self.context.verifies or self.context.has_keys

    def suspicion(self) -> str | None:
        """Say what may be wrong if a server hangs up right behind the TLS handshake.

        In TLS 1.3 the server looks at our certificate then, and not all of them send an alert.
        """
        if self.context.has_keys:
            return None
        if self.context.has_certificate:
            return "perhaps it does not believe our certificate: its log will tell"
        return "perhaps it wants a certificate from us (--tls-certificates DIR): its log will tell"

    def begin(self, sock: socket.socket, deadline: Deadline) -> TLSStream:
        """Do the TLS handshake on a connected socket.

        Raises:
            TLSError: server and client do not come to terms.
            TransportError: the deadline passed, or the connection broke.
        """
        stream = self.context.stream(sock, host=self.host)
        stream.handshake(deadline)
        return stream


def _kernel_has(suite: str) -> bool:
    from nbdlink.transport import ktls

    return ktls.missing(suite) is None


def _policy(target: Target, options: TLSOptions) -> Policy:
    if target.tls:
        if options.policy not in (None, "require"):
            raise ConfigError(
                f"--tls {options.policy} contradicts {target.address}'s nbds://, which never "
                "goes without TLS",
                hint="say nbd:// or leave --tls out",
            )
        return "require"
    said = options.files.given or options.hostname is not None or not options.verify_peer
    if options.policy == "off" and said:
        raise ConfigError("--tls off, and yet there are options for TLS", hint="leave one out")
    # Who names credentials does not mean them to be passed over in silence.
    return options.policy or ("require" if said else "off")


def _files(target: Target, files: CredentialFiles) -> CredentialFiles:
    """Add what the target says to what was typed."""
    has_certificates = files.directory or files.certificate or files.authority
    psk = files.psk or (None if has_certificates else target.tls_psk_file)
    return replace(
        files,
        directory=files.directory or (None if files.psk else target.tls_certificates),
        psk=psk,
        # Of no use without keys, and harmless.
        username=files.username or (target.username if psk else None),
    )


def refused(address: str, words: str) -> TLSError:
    """Say that a server does not do TLS, which was demanded."""
    return TLSError(
        f"{address}: the server does not offer TLS ({words})",
        hint="have TLS enabled there, or use nbd:// where the network is trusted",
    )
