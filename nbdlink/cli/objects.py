"""`--object` and `--tls-creds`: credentials and who may come, in QEMU's words.

They say nothing that the options `--tls-...` cannot say; here the ones become the others.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

from nbdlink.errors import ConfigError
from nbdlink.storage.imageopts import split_options

if TYPE_CHECKING:
    from nbdlink.client.security import TLSOptions
    from nbdlink.server.security import RuleList

Endpoint = Literal["server", "client"]

_KEYS: Final = {
    "tls-creds-x509": ("dir", "endpoint", "verify-peer", "passwordid", "sanity-check"),
    "tls-creds-psk": ("dir", "endpoint", "username"),
    "secret": ("data", "file", "format"),
    "authz-simple": ("identity",),
    "authz-list": ("policy",),
}
"""The types of objects, and what each can be told beside its id."""

_RULE: Final = re.compile(r"rules\.(0|[1-9][0-9]{0,3})\.(match|policy|format)")
"""What an authz-list can be told as well."""
_POLICIES: Final = {"allow": True, "deny": False}
_FORMATS: Final = {"glob": True, "exact": False}

_CONTINUED: Final = re.compile(r"\\\n\s*")
"""How the examples of qemu-nbd's manual go on in the next line, within quotes."""

_ON: Final = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}


@dataclass
class Objects:
    """What was defined, by id.

    Attributes:
        credentials: of TLS: their type and what they were told.
        secrets: paths of files that hold them.
        identities: distinguished names, or rules about them.
    """

    credentials: dict[str, tuple[str, dict[str, str]]] = field(default_factory=dict)
    secrets: dict[str, str] = field(default_factory=dict)
    identities: dict[str, str | RuleList] = field(default_factory=dict)


def add_object_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    group = parser.add_argument_group("TLS in QEMU's words")
    group.add_argument(
        "--object",
        metavar="TYPE,id=ID,...",
        action="append",
        default=[],
        help="define tls-creds-x509, tls-creds-psk, secret, authz-simple or authz-list; "
        "may be repeated",
    )
    group.add_argument("--tls-creds", metavar="ID", help="have TLS, with these credentials")


def apply_objects(arguments: argparse.Namespace, endpoint: Endpoint) -> None:
    """Say in the options of nbdlink what objects say.

    Args:
        arguments: the command line, which is changed.
        endpoint: what the credentials have to be for.

    Raises:
        ConfigError: an object is not understood, or is missing.
    """
    objects = _define(arguments.object)
    if arguments.tls_creds is not None:
        if arguments.tls_creds not in objects.credentials:
            raise ConfigError(
                f"--tls-creds {arguments.tls_creds}: no object with credentials has this id",
                hint=f"say --object tls-creds-x509,id={arguments.tls_creds},dir=DIR,"
                f"endpoint={endpoint}",
            )
        _use(arguments, objects, *objects.credentials[arguments.tls_creds], endpoint)
    # An id of an object, or as everywhere in nbdlink a name itself.
    known = getattr(arguments, "tls_authz", [])
    arguments.tls_authz = [objects.identities.get(each, each) for each in known]


def client_tls(texts: list[str], name: str | None, hostname: str | None) -> TLSOptions:
    """Give what a client demands of TLS.

    Args:
        texts: what `--object` was given.
        name: the id of the credentials, or None for no TLS.
        hostname: the name that the server's certificate must have, or None for the host's.

    Raises:
        ConfigError: an object is not understood, or is missing.
    """
    from nbdlink.client.security import TLSOptions
    from nbdlink.transport.tlsfiles import CredentialFiles

    arguments = argparse.Namespace(
        object=texts,
        tls_creds=name,
        tls=None,
        tls_certificates=None,
        tls_psk=None,
        tls_username=None,
        tls_passphrase=None,
        tls_no_verify_peer=False,
    )
    apply_objects(arguments, "client")
    return TLSOptions(
        policy=arguments.tls,
        files=CredentialFiles(
            directory=arguments.tls_certificates,
            psk=arguments.tls_psk,
            passphrase=arguments.tls_passphrase,
            username=arguments.tls_username,
        ),
        hostname=hostname,
        verify_peer=not arguments.tls_no_verify_peer,
    )


def _use(
    arguments: argparse.Namespace,
    objects: Objects,
    kind: str,
    told: dict[str, str],
    endpoint: Endpoint,
) -> None:
    name = f"--tls-creds {arguments.tls_creds}"
    if told.get("endpoint", "client") != endpoint:
        raise ConfigError(
            f"{name}: these credentials are a {told.get('endpoint', 'client')}'s",
            hint=f"say endpoint={endpoint}",
        )
    if "dir" not in told:
        raise ConfigError(f"{name}: the directory is missing", hint="say dir=DIR")
    arguments.tls = "require"
    if kind == "tls-creds-psk":
        arguments.tls_psk = told["dir"]
        if endpoint == "client":
            # The name that QEMU and GnuTLS use where none is given.
            arguments.tls_username = told.get("username", "qemu")
        return
    arguments.tls_certificates = told["dir"]
    verify = _switch(name, "verify-peer", told.get("verify-peer", "on"))
    if endpoint == "server":
        arguments.tls_verify_peer = verify
    else:
        arguments.tls_no_verify_peer = not verify
    if secret := told.get("passwordid"):
        if secret not in objects.secrets:
            raise ConfigError(f"{name}: passwordid={secret}: no secret has this id")
        arguments.tls_passphrase = objects.secrets[secret]


def _define(texts: list[str]) -> Objects:
    objects = Objects()
    seen: set[str] = set()
    for text in texts:
        (kind, rest), *pairs = split_options(_CONTINUED.sub("", text))
        if kind == "qom-type" and rest:
            kind, rest = rest, None
        if kind not in _KEYS or rest is not None:
            raise ConfigError(
                f"--object {kind}: there is no such type", hint=f"there are {', '.join(_KEYS)}"
            )
        told: dict[str, str] = {}
        for key, value in pairs:
            is_rule = kind == "authz-list" and _RULE.fullmatch(key)
            if value is None or key in told or not (is_rule or key in ("id", *_KEYS[kind])):
                what = "is given twice" if key in told else "is not understood"
                raise ConfigError(f"--object {kind}: {key} {what}")
            told[key] = value
        name = told.pop("id", "")
        if not name or name in seen:
            what = f"the id {name!r} is given twice" if name else "the id is missing"
            raise ConfigError(f"--object {kind}: {what}", hint="say id=ID")
        seen.add(name)
        if kind == "secret":
            objects.secrets[name] = _secret(name, told)
        elif kind == "authz-simple":
            if not told.get("identity"):
                raise ConfigError(f"--object authz-simple,id={name}: the identity is missing")
            objects.identities[name] = told["identity"]
        elif kind == "authz-list":
            objects.identities[name] = _rules(name, told)
        else:
            objects.credentials[name] = kind, told
    return objects


def _rules(name: str, told: dict[str, str]) -> RuleList:
    """Read rules, which are numbered without gaps."""
    from nbdlink.server.security import Rule, RuleList

    where = f"--object authz-list,id={name}"
    otherwise = _one_of(where, "policy", told.pop("policy", "deny"), _POLICIES)
    numbered: dict[int, dict[str, str]] = {}
    for key, value in told.items():
        _, number, what = key.split(".")
        numbered.setdefault(int(number), {})[what] = value
    rules = []
    for index in range(len(numbered)):
        said, rule = numbered.get(index, {}), f"rules.{index}."
        if not {"match", "policy"} <= said.keys():
            raise ConfigError(
                f"{where}: {rule}match or {rule}policy is missing",
                hint="rules are numbered from 0, and each says whom it is about and what of them",
            )
        allow = _one_of(where, f"{rule}policy", said["policy"], _POLICIES)
        is_glob = _one_of(where, f"{rule}format", said.get("format", "exact"), _FORMATS)
        rules.append(Rule(said["match"], allow, is_glob))
    return RuleList(tuple(rules), otherwise)


def _one_of(where: str, key: str, word: str, words: dict[str, bool]) -> bool:
    if word not in words:
        raise ConfigError(f"{where}: {key}={word}: say {' or '.join(words)}")
    return words[word]


def _secret(name: str, told: dict[str, str]) -> str:
    """Give the path of a file that holds a secret."""
    where = f"--object secret,id={name}"
    coded = told.get("format", "raw")
    if coded not in ("raw", "base64"):
        raise ConfigError(f"{where}: format={coded} is not understood", hint="say raw or base64")
    if ("data" in told) == ("file" in told):
        raise ConfigError(f"{where}: say either data or file")
    if "file" in told and coded == "raw":
        return told["file"]
    try:
        if "file" in told:
            with open(told["file"], "rb") as file:  # noqa: PTH123 - any path will do
                data = file.read(1 << 16)
        else:
            data = told["data"].encode()
        if coded == "base64":
            data = base64.b64decode(data.strip(), validate=True)
    except OSError as error:
        words = (error.strerror or str(error)).lower()
        raise ConfigError(f"{where}: {told['file']}: {words}") from None
    except binascii.Error:
        raise ConfigError(f"{where}: that is not base64") from None
    # In memory, for as long as this process and those forked from it live.
    fd = os.memfd_create(f"nbdlink-secret-{name}")
    os.fchmod(fd, 0o600)
    os.write(fd, data)
    return f"/proc/self/fd/{fd}"


def _switch(name: str, key: str, word: str) -> bool:
    if word not in _ON:
        raise ConfigError(f"{name}: {key}={word} is neither on nor off")
    return _ON[word]
