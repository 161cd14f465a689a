"""Exports: a storage under a name, with what clients may do to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from nbdlink.errors import ConfigError, LocalProtocolError
from nbdlink.protocol.constants import HeaderStyle, TransmissionFlag
from nbdlink.protocol.messages import BlockSizeInfo, ExportListing
from nbdlink.protocol.transmission import RequestRules
from nbdlink.storage.base import Storage

LONGEST_SIGNATURE: Final = 200
"""Characters in a signature that an administrator gives."""
_MADE_UP: Final = "auto:"


@dataclass(frozen=True, slots=True)
class Export:
    """A storage that clients know by a name.

    Attributes:
        name: what clients ask for; the empty name is the default export.
        storage: what is served.
        description: words for people; empty if there are none.
        read_only: whether writing is refused, even if the storage could.
        multi_conn: whether clients may be told that several connections are safe. A server
            that lets only one client in must not: the second connection would wait for ever.
        tls_only: whether it may be used over TLS only, though the server offers both.
        clients: who may use it: subjects of certificates, or users of pre-shared keys; empty
            for everybody.
        given_signature: what tells the export's data from other data, in an administrator's
            words; None to leave it to the storage.
        further_contexts: metadata contexts of QEMU's that are offered beside those that every
            export has; the storage must know them.

    Raises:
        ConfigError: the protocol cannot carry the name, the description or the block sizes, or
            the signature is of no use.
    """

    name: str
    storage: Storage
    description: str = ""
    read_only: bool = False
    multi_conn: bool = True
    tls_only: bool = False
    clients: frozenset[str] = frozenset()
    given_signature: str | None = None
    further_contexts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        try:
            ExportListing(self.name, self.description).pack()
            self.block_size.pack()
        except LocalProtocolError as error:
            raise ConfigError(f"export {self.name[:80]!r}: {error}") from None
        self._check_signature()

    def _check_signature(self) -> None:
        signature = self.given_signature
        if signature is None:
            return
        if not 1 <= len(signature) <= LONGEST_SIGNATURE:
            wrong = f"has {len(signature)} characters"
        elif not (signature.isascii() and signature.isprintable()):
            wrong = "has characters that are not printable ASCII"
        elif signature.startswith(_MADE_UP):
            wrong = f"begins with {_MADE_UP!r}, as those do that the server makes itself"
        else:
            return
        raise ConfigError(
            f"export {self.name[:80]!r}: its signature {wrong}",
            hint=f"use 1 to {LONGEST_SIGNATURE} printable ASCII characters, such as a UUID",
        )

    @property
    def contexts(self) -> tuple[str, ...]:
        """The metadata contexts that clients may select."""
        known = self.storage.contexts
        # What QEMU's tell costs more to find out, and says more of the image: only if wanted.
        general = tuple(name for name in known if not name.startswith("qemu:"))
        return general + tuple(name for name in self.further_contexts if name in known)

    @property
    def is_read_only(self) -> bool:
        """Whether writes are refused, by wish or because the storage cannot."""
        return self.read_only or self.storage.read_only

    @property
    def is_secured(self) -> bool:
        """Whether nobody may use it without TLS, which alone tells who somebody is."""
        return self.tls_only or bool(self.clients)

    @property
    def signature(self) -> str | None:
        """What tells the export's data from other data, or None."""
        if self.given_signature is not None:
            return self.given_signature
        return self.storage.signature

    @property
    def size(self) -> int:
        """Bytes that clients see: whole blocks only, since nothing else can be asked for."""
        return self.storage.size // self.storage.minimum_block * self.storage.minimum_block

    @property
    def block_size(self) -> BlockSizeInfo:
        """The size constraints of requests."""
        storage = self.storage
        return BlockSizeInfo(
            storage.minimum_block, storage.preferred_block, storage.maximum_payload
        )

    def flags(
        self, style: HeaderStyle = HeaderStyle.SIMPLE, *, with_contexts: bool = False
    ) -> TransmissionFlag:
        """Say what the export can do for a client that agreed on a style of headers.

        Args:
            style: the headers; some abilities need replies in chunks.
            with_contexts: whether the client has selected metadata contexts.
        """
        storage = self.storage
        flags = TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH | TransmissionFlag.SEND_FUA
        if style != HeaderStyle.SIMPLE:
            flags |= TransmissionFlag.SEND_DF
        if style == HeaderStyle.EXTENDED and with_contexts:
            flags |= TransmissionFlag.BLOCK_STATUS_PAYLOAD
        if storage.is_rotational:
            flags |= TransmissionFlag.ROTATIONAL
        if storage.can_cache:
            flags |= TransmissionFlag.SEND_CACHE
        if storage.can_multi_conn and self.multi_conn:
            flags |= TransmissionFlag.CAN_MULTI_CONN
        if self.is_read_only:
            return flags | TransmissionFlag.READ_ONLY
        if storage.can_trim:
            flags |= TransmissionFlag.SEND_TRIM
        if storage.can_zero:
            flags |= TransmissionFlag.SEND_WRITE_ZEROES
            if storage.can_fast_zero:
                flags |= TransmissionFlag.SEND_FAST_ZERO
        return flags

    def rules(
        self, style: HeaderStyle = HeaderStyle.SIMPLE, *, with_contexts: bool = False
    ) -> RequestRules:
        """Say what requests must keep to; for the arguments see `flags`.

        The same for every client: one that never asked for block sizes and sends unaligned
        requests gets errors, not corrupt data (specification, "Size constraints").
        """
        storage = self.storage
        return RequestRules(
            self.size,
            self.flags(style, with_contexts=with_contexts),
            storage.minimum_block,
            storage.maximum_payload,
            with_contexts,
        )


class Catalogue:
    """The exports of a server, in the order in which they are listed.

    They may change while others look: `replace` does it at one moment.
    """

    def __init__(self, exports: Iterable[Export]) -> None:
        """Collect the exports.

        Raises:
            ConfigError: there is none, or two have the same name.
        """
        self.replace(exports)
        if not self._exports:
            raise ConfigError("there is nothing to serve", hint="name a file or a block device")

    def replace(self, exports: Iterable[Export]) -> None:
        """Have these exports instead, if need be none.

        Raises:
            ConfigError: two have the same name; all stays as it is.
        """
        found: dict[str, Export] = {}
        for export in exports:
            if export.name in found:
                raise ConfigError(
                    f"two exports have the name {export.name!r}", hint="give each its own name"
                )
            found[export.name] = export
        self._exports = found

    def __iter__(self) -> Iterator[Export]:
        return iter(self._exports.values())

    def __len__(self) -> int:
        return len(self._exports)

    def find(self, name: str) -> Export | None:
        """Give the export of that very name, or None; the empty name has no other meaning."""
        return self._exports.get(name)

    @property
    def storages(self) -> list[Storage]:
        """Every storage once, however many exports show it."""
        return list({id(export.storage): export.storage for export in self}.values())
