"""The way to an export, walked step by step, with what to do where it ends.

All of it takes one connection, as some servers serve one client at a time, and qemu-nbd ends when
its first one has left. Only where something is wrong there is a second: to hear who it is that
does not greet as NBD servers do, or to see the certificate that is not believed.
"""

from __future__ import annotations

import difflib
import errno
import mmap
import socket
import time
from collections.abc import Generator, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from nbdlink.client.connection import Connection
from nbdlink.client.negotiate import Negotiation
from nbdlink.client.security import NO_OPTIONS, Security, TLSOptions
from nbdlink.errors import (
    NBDError,
    OptionError,
    RemoteProtocolError,
    TLSError,
    TransportError,
)
from nbdlink.link.checkup import clock
from nbdlink.link.checkup.finding import Finding, failed
from nbdlink.link.checkup.stranger import name_speaker, provoke
from nbdlink.link.spec import SECTOR
from nbdlink.protocol.constants import (
    INIT_PASSWD,
    HeaderStyle,
    OptionReply,
    TransmissionFlag,
)
from nbdlink.sizes import format_size
from nbdlink.transport import stream
from nbdlink.transport.stream import Deadline, reason
from nbdlink.uri import Target

if TYPE_CHECKING:
    from cryptography import x509

STEP_SECONDS: Final = 5.0
"""For which one step may wait."""

_MAGIC: Final = INIT_PASSWD.to_bytes(8, "big")
_EXPIRES_SOON: Final = timedelta(days=14)
_PIECEMEAL: Final = 0.01
_READ: Final = 4096
"""Bytes that are read from the export's start and from its end."""

_LOG: Final = "its log may tell why"

Steps = Generator[Finding, None, "socket.socket | None"]


def walk(
    target: Target, options: TLSOptions = NO_OPTIONS, *, seconds: float = STEP_SECONDS
) -> Iterator[Finding]:
    """Walk the way to `target` as far as it goes: to what fails, or to a read of blocks.

    Args:
        target: server and export.
        options: what is demanded of TLS, beside what the target says.
        seconds: for which each step may wait.

    Raises:
        ConfigError: what is demanded of TLS contradicts itself.
    """
    security = Security(target, options)
    if security.policy != "off":
        try:
            security.context  # noqa: B018  # loads the credentials
        except NBDError as error:
            yield failed("credentials", error)
            return
    sock = yield from _connect(target, seconds)
    if sock is None:
        return
    if unfit := _greeting(sock, target, seconds):
        sock.close()
        yield unfit
        return
    yield Finding("greeting", "ok", "an NBD server")
    yield from _talk(target, security, options, sock, seconds)


# To the server.


def _connect(target: Target, seconds: float) -> Steps:
    if target.socket is not None:
        try:
            sock = stream.connect(target, Deadline(seconds))
        except TransportError as error:
            yield failed("connect", error)
            return None
        yield Finding("connect", "ok", f"{target.address} takes connections")
        return sock
    host = target.host or "localhost"
    try:
        found = socket.getaddrinfo(host, target.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        yield _unresolved(host, error)
        return None
    addresses = list(dict.fromkeys(_shown(each[4]) for each in found))
    if addresses != [host]:
        yield Finding("name", "ok", f"{host} is {', '.join(addresses)}")
    failures: list[Finding] = []
    for address in addresses:
        place = replace(target, host=address)
        begun = time.monotonic()
        try:
            sock = stream.connect(place, Deadline(seconds))
        except TransportError as error:
            failures.append(_unreachable(place, error, seconds))
            continue
        took = (time.monotonic() - begun) * 1000
        for each in failures:
            yield replace(
                each,
                status="warning",
                remedy=f"{each.remedy}; until then every connection tries it first",
            )
        yield Finding("connect", "ok", f"{place.address} takes connections, in {took:.1f} ms")
        return sock
    yield from failures
    return None


def _shown(address: tuple[Any, ...]) -> str:
    """Give an address of a socket without its port; a v6 one with the interface, if that counts."""
    scope = address[3] if len(address) == 4 else 0
    return f"{address[0]}%{scope}" if scope and "%" not in address[0] else str(address[0])


def _unresolved(host: str, error: OSError | UnicodeError) -> Finding:
    if isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN:
        return Finding(
            "name",
            "failed",
            f"no name server answers, so nobody knows the address of {host}",
            "see /etc/resolv.conf and whether the network is up, or use an address",
        )
    words = reason(error) if isinstance(error, OSError) else "it is not a host name"
    return Finding(
        "name",
        "failed",
        f"{host}: {words}",
        f"check the spelling (`getent hosts {host}`), add it to /etc/hosts, or use an address",
    )


def _unreachable(place: Target, error: TransportError, seconds: float) -> Finding:
    """Say why an address was not reached."""
    cause = error.__context__
    number = cause.errno if isinstance(cause, OSError) else None
    way = f"`ip route get {place.host}` shows the way that is taken"
    if isinstance(cause, TimeoutError):
        return Finding(
            "connect",
            "failed",
            f"{place.address} did not answer within {seconds:g} seconds: a firewall swallows the "
            "packets, or the machine is off",
            f"let TCP port {place.port} through, there and here (`nft list ruleset`), and see "
            f"whether `ping {place.host}` is answered",
        )
    if number == errno.ECONNREFUSED:
        return Finding(
            "connect",
            "failed",
            f"{place.address} refuses: nobody listens there, or a firewall says so",
            "start the server, check the port (there: `ss -ltn`), and see that it does not "
            "listen on 127.0.0.1 only",
        )
    if number == errno.ENETUNREACH:
        return Finding(
            "connect",
            "failed",
            f"{place.address}: this machine has no route there",
            f"see that the network is up; {way}",
        )
    if number == errno.EHOSTUNREACH:
        return Finding(
            "connect",
            "failed",
            f"{place.address}: no route to host: it is off, or a firewall on the way refuses",
            f"{way}; a firewall there has to let TCP port {place.port} through",
        )
    return failed("connect", error, way)


def _greeting(sock: socket.socket, target: Target, seconds: float) -> Finding | None:
    """Look at the first words, and leave them where they are; say what is wrong with them."""
    try:
        said = _peek(sock, seconds)
    except TimeoutError:
        sock.close()
        return _silent(target, seconds)
    except OSError as error:
        return Finding(
            "greeting",
            "failed",
            f"{target.address} breaks the connection off: {reason(error)}",
            _LOG,
        )
    if said == _MAGIC:
        return None
    if not said:
        return Finding(
            "greeting",
            "failed",
            f"{target.address} takes the connection and hangs up at once",
            "it may let only some clients in (an allow list), or have as many as it takes; "
            "or it is a proxy whose server is gone: its log will tell",
        )
    return Finding(
        "greeting",
        "failed",
        f"{target.address} is no NBD server, but {name_speaker(said)}",
        "check host and port; NBD's is 10809",
    )


def _peek(sock: socket.socket, seconds: float) -> bytes:
    """Give the first bytes that come: as many as the magic has, unless they are others."""
    deadline = Deadline(seconds)
    while True:
        sock.settimeout(deadline.left())
        said = sock.recv(64, socket.MSG_PEEK)
        if len(said) >= len(_MAGIC) or not said or not _MAGIC.startswith(said):
            return _MAGIC if said.startswith(_MAGIC) else said
        time.sleep(_PIECEMEAL)  # nothing tells when there are more bytes to be peeked at


def _silent(target: Target, seconds: float) -> Finding:
    try:
        who = provoke(target, seconds)
    except TransportError:
        who = None
    if who is not None:
        return Finding(
            "greeting",
            "failed",
            f"{target.address} is no NBD server, but {who}",
            "check host and port; NBD's is 10809",
        )
    return Finding(
        "greeting",
        "failed",
        f"{target.address} takes the connection and says nothing for {seconds:g} seconds",
        "it may have a client already and serve one at a time (qemu-nbd: -e 0), be overloaded, "
        "or be a proxy whose server is gone",
    )


# With the server.


def _talk(
    target: Target,
    security: Security,
    options: TLSOptions,
    sock: socket.socket,
    seconds: float,
) -> Iterator[Finding]:
    try:
        negotiation = Negotiation(target, timeout=seconds, security=security, sock=sock)
    except TLSError as error:
        yield failed("TLS", error)
        yield from _unbelieved(target, security, options, seconds)
        return
    except NBDError as error:
        yield failed("negotiation", error, _LOG)
        return
    with negotiation:
        yield from _tls(negotiation)
        try:
            negotiation.request_best()
            names = _listed(negotiation)
        except OptionError as error:
            check = "TLS" if error.reply == OptionReply.ERR_TLS_REQD else "options"
            yield failed(check, error, _LOG)
            return
        except TLSError as error:
            # In TLS 1.3 a server looks at our certificate when we are through.
            yield failed("TLS", error)
            return
        except (TransportError, RemoteProtocolError) as error:
            if negotiation.tls is not None:
                yield failed("TLS", error, security.suspicion() or _LOG)
                return
        else:
            yield _options(negotiation, names)
            yield from _choose(negotiation, names, seconds)
            return
    yield Finding(
        "options",
        "warning",
        "it hangs up on options that it does not know, as old servers do",
        "none is needed; newer servers tell more, and are faster",
    )
    try:
        negotiation = Negotiation(target, timeout=seconds, security=security)
    except NBDError as error:
        yield failed("negotiation", error, _LOG)
        return
    with negotiation:
        yield from _choose(negotiation, None, seconds)


def _listed(negotiation: Negotiation) -> list[str] | None:
    """Give the names of the exports, or None if the server does not tell.

    Raises:
        OptionError: it wants TLS before it says anything.
    """
    try:
        return [each.name for each in negotiation.list_exports()]
    except OptionError as error:
        if error.reply == OptionReply.ERR_TLS_REQD:
            raise
        return None


def _options(negotiation: Negotiation, names: list[str] | None) -> Finding:
    if not negotiation.fixed:
        return Finding(
            "options",
            "warning",
            "the server knows the old newstyle negotiation only, which has none",
            "none is needed; newer servers tell more, and are faster",
        )
    headers = {
        HeaderStyle.EXTENDED: "extended headers",
        HeaderStyle.STRUCTURED: "structured replies",
        HeaderStyle.SIMPLE: "simple replies only",
    }[negotiation.style]
    if names is None:
        return Finding("options", "ok", f"{headers}; it does not tell which exports there are")
    what = "1 export" if len(names) == 1 else f"{len(names)} exports"
    return Finding("options", "ok", f"{headers}, {what}")


def _tls(negotiation: Negotiation) -> Iterator[Finding]:
    session = negotiation.tls
    if session is None:
        if negotiation.target.socket is None:
            yield Finding("TLS", "ok", "not used: the connection is not encrypted")
        return
    verified = "verified" if negotiation.security.verifies else "not verified"
    peer = session.peer or "a pre-shared key"
    yield Finding("TLS", "ok", f"{session.version}, {session.cipher}, {peer}, {verified}")
    if session.certificate is not None:
        yield from _dates(session.certificate)


def _unbelieved(
    target: Target, security: Security, options: TLSOptions, seconds: float
) -> Iterator[Finding]:
    """Look at the certificate of a server with which there was no TLS, believing nothing."""
    if security.context.has_keys or not security.verifies:
        return
    unverified = Security(
        replace(target, tls_verify_peer=None), replace(options, verify_peer=False)
    )
    try:
        with Negotiation(target, timeout=seconds, security=unverified) as negotiation:
            session = negotiation.tls
    except NBDError:
        return  # it was not the certificate
    if session is not None and session.certificate is not None:
        yield from _dates(session.certificate)


def _dates(certificate: x509.Certificate) -> Iterator[Finding]:
    """Compare a certificate's dates with this machine's clock."""
    from nbdlink.transport.identity import describe
    from nbdlink.transport.verification import names_of

    now = datetime.now(UTC)
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    names = ", ".join(names_of(certificate)) or "no host"
    found = f"{describe(certificate)}, for {names}, valid from {begin:%Y-%m-%d} to {end:%Y-%m-%d}"
    if now < begin:
        yield Finding("certificate", "failed", found, "see the clocks of both machines")
        yield Finding(
            clock.CHECK,
            "failed",
            clock.says(now, ", which is before the certificate's time"),
            "set this machine's clock (timedatectl set-ntp true, or date -s) if it is slow; "
            "else the certificate was made with a clock that is fast",
        )
    elif now > end:
        yield Finding("certificate", "failed", found, "have it renewed, and the server reload it")
        yield Finding(
            clock.CHECK,
            "failed",
            clock.says(now, ", which is after the certificate's time"),
            "set this machine's clock (timedatectl set-ntp true, or date -s) if it is fast",
        )
    elif end - now < _EXPIRES_SOON:
        yield Finding("certificate", "warning", found, "have it renewed: it expires soon")
    else:
        yield Finding("certificate", "ok", found)


# The export.


def _choose(negotiation: Negotiation, names: list[str] | None, seconds: float) -> Iterator[Finding]:
    target = negotiation.target
    try:
        export = negotiation.go()
        wire = negotiation.detach_socket()
    except OptionError as error:
        yield _not_offered(target.export, names, error)
        return
    except RemoteProtocolError as error:
        yield failed("export", error, "perhaps it does not offer it, or not to this machine")
        return
    except NBDError as error:
        yield failed("export", error, _LOG)
        return
    if not isinstance(wire, socket.socket):
        wire.release()
    access = "read-only" if export.read_only else "read-write"
    shown = repr(target.export) if target.export else "the default export"
    with Connection(target, wire, export) as connection:
        yield Finding("export", "ok", f"{shown}, {format_size(export.size)}, {access}")
        yield from _limits(connection)
        if export.size:
            yield _read(connection, seconds)


def _not_offered(name: str, names: list[str] | None, error: OptionError) -> Finding:
    near = difflib.get_close_matches(name, names or [], 1)
    if error.reply == OptionReply.ERR_UNKNOWN and near:
        return Finding("export", "failed", str(error), f"did you mean {near[0]!r}?")
    return failed("export", error, _LOG)


def _limits(connection: Connection) -> Iterator[Finding]:
    """Say what of an export a device cannot have."""
    export = connection.export
    if export.size < SECTOR:
        yield Finding(
            "size",
            "failed",
            f"{export.size} bytes, which is less than a block: there is nothing to attach",
            "see what the server serves",
        )
    elif tail := export.size % SECTOR:
        yield Finding(
            "size",
            "warning",
            f"{export.size} bytes: the last {tail} do not fill a sector, and a device lacks them",
            f"make it a multiple of {SECTOR} bytes",
        )
    if export.minimum_block > mmap.PAGESIZE:
        yield Finding(
            "block size",
            "failed",
            f"the server demands blocks of {export.minimum_block} bytes; the kernel takes at most "
            f"{mmap.PAGESIZE}",
            "see the server's options; nbdkit has --filter=blocksize",
        )
    if not export.read_only and not connection.can(TransmissionFlag.SEND_FLUSH):
        yield Finding(
            "flush",
            "warning",
            "the server cannot flush: what was written may be lost if it or its machine fails",
            "have it enabled there (nbd-server: flush = true)",
        )


def _read(connection: Connection, seconds: float) -> Finding:
    """Read what is first and last."""
    size = connection.size
    block = max(_READ, connection.export.minimum_block)
    length = min(block, size)
    last = (size - 1) // block * block
    begun = time.monotonic()
    try:
        connection.submit_read(length, 0).wait(seconds)
        took = (time.monotonic() - begun) * 1000
        connection.submit_read(size - last, last).wait(seconds)
    except NBDError as error:
        return failed("read", error, f"{_LOG}; see what it serves")
    return Finding("read", "ok", f"the first block in {took:.1f} ms, and the last one")
