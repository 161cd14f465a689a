"""The options about TLS that several commands have in common."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from nbdlink.errors import ConfigError
from nbdlink.link.record import TLS_ROADS
from nbdlink.transport.tlsfiles import POLICIES, CredentialFiles, Policy

if TYPE_CHECKING:
    from nbdlink.client.security import TLSOptions
    from nbdlink.server.security import ServerSecurity


def add_client_arguments(parser: argparse.ArgumentParser, *, road: bool = False) -> None:
    """Add a client's options; with `road` also those of a device."""
    group = parser.add_argument_group("TLS")
    group.add_argument(
        "--tls",
        choices=POLICIES,
        help="never, if the server offers it, or never without "
        "(require for nbds:// or if other options ask for TLS, else off)",
    )
    _add_files(group)
    group.add_argument("--tls-username", metavar="NAME", help="which key of the key file is ours")
    group.add_argument(
        "--tls-hostname", metavar="NAME", help="the name in the server's certificate (the host's)"
    )
    group.add_argument(
        "--tls-no-verify-peer",
        action="store_true",
        help="encrypt, and do not ask who the server is: whoever is in between can read along",
    )
    if road:
        group.add_argument(
            "--tls-road",
            choices=TLS_ROADS,
            default="auto",
            help="who encrypts: the kernel, or a process of its own (the kernel if it can)",
        )


def client_options(arguments: argparse.Namespace) -> TLSOptions:
    """Give what was said to a client."""
    from nbdlink.client.security import TLSOptions

    return TLSOptions(
        policy=arguments.tls,
        files=_files(arguments, arguments.tls_username),
        hostname=arguments.tls_hostname,
        verify_peer=not arguments.tls_no_verify_peer,
    )


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a server's options."""
    group = parser.add_argument_group("TLS")
    group.add_argument(
        "--tls",
        choices=POLICIES,
        help="never, at the client's choice, or never without (require if there are credentials)",
    )
    _add_files(group)
    group.add_argument(
        "--tls-verify-peer",
        action="store_true",
        help="clients must show a certificate that --tls-ca or ca-cert.pem signed",
    )
    group.add_argument(
        "--tls-authz",
        metavar="DN",
        action="append",
        default=[],
        help="let in only who has this distinguished name (or, with a key file, this user name); "
        "may be repeated",
    )
    group.add_argument(
        "--client",
        metavar="[NAME=]DN",
        action="append",
        default=[],
        help="let only this one use the exports, or that of this name; may be repeated",
    )


def server_security(arguments: argparse.Namespace) -> ServerSecurity | None:
    """Load what was said to a server; None without TLS."""
    files = _files(arguments, None)
    mode: Policy = arguments.tls or ("require" if files.given else "off")
    said = files.given or arguments.tls_verify_peer or arguments.tls_authz or arguments.client
    if mode == "off":
        if said:
            raise ConfigError(
                "there are options for TLS, and yet no TLS",
                hint="say --tls require and name the credentials: --tls-certificates DIR",
            )
        return None
    from nbdlink.server.security import ServerSecurity

    security = ServerSecurity(
        mode,
        files,
        verify_peer=arguments.tls_verify_peer,
        allowed=arguments.tls_authz,
    )
    if arguments.client and not security.knows_peers:
        raise ConfigError(
            "--client takes clients that have to show who they are",
            hint="add --tls-verify-peer",
        )
    return security


def _add_files(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--tls-certificates",
        metavar="DIR",
        help="a directory of X.509 files, named as those of qemu and libvirt",
    )
    add("--tls-cert", metavar="FILE", help="our certificate, and those that lead to its authority")
    add("--tls-key", metavar="FILE", help="its private key")
    add("--tls-passphrase", metavar="FILE", help="a file with the passphrase of that key")
    add("--tls-ca", metavar="FILE|DIR", help="the authorities that are trusted")
    add("--tls-crl", metavar="FILE", help="the certificates that they have revoked")
    add("--tls-verify-depth", metavar="N", type=int, help="authorities in between, at most (100)")
    add("--tls-psk", metavar="FILE", help="pre-shared keys instead: lines of user:hex")


def _files(arguments: argparse.Namespace, username: str | None) -> CredentialFiles:
    depth = arguments.tls_verify_depth
    if depth is not None and not 0 <= depth <= 100:
        raise ConfigError(f"a verification depth of {depth} is not possible", hint="use 0 to 100")
    return CredentialFiles(
        directory=arguments.tls_certificates,
        certificate=arguments.tls_cert,
        key=arguments.tls_key,
        authority=arguments.tls_ca,
        revocation=arguments.tls_crl,
        passphrase=arguments.tls_passphrase,
        psk=arguments.tls_psk,
        username=username,
        verify_depth=depth,
    )
