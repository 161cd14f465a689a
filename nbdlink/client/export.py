"""What a negotiation comes to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nbdlink.protocol.claim import NO_TESTIMONY, Testimony
from nbdlink.protocol.constants import (
    DEFAULT_MAXIMUM_PAYLOAD,
    DEFAULT_MINIMUM_BLOCK,
    DEFAULT_PREFERRED_BLOCK,
    HeaderStyle,
    TransmissionFlag,
)
from nbdlink.protocol.messages import BlockSizeInfo
from nbdlink.protocol.transmission import RequestRules


@dataclass(frozen=True, slots=True)
class NegotiatedExport:
    """What the server said of an export.

    Attributes:
        name: the name it was asked for by.
        size: bytes.
        flags: transmission flags.
        block_size: the size constraints that the server announced, or None.
        canonical_name: the server's own name for it, or None if not told.
        description: words for people; empty if there are none.
        style: which headers requests and replies have.
        contexts: the metadata contexts that were selected, and their ids on this connection.
        testimony: what it said to a claim (`nbdlink.protocol.claim`), if one was made.
    """

    name: str
    size: int
    flags: TransmissionFlag
    block_size: BlockSizeInfo | None = None
    canonical_name: str | None = None
    description: str = ""
    style: HeaderStyle = HeaderStyle.SIMPLE
    contexts: Mapping[str, int] = field(default_factory=dict, hash=False)
    testimony: Testimony = NO_TESTIMONY

    @property
    def minimum_block(self) -> int:
        """Alignment of requests in bytes, announced or by default."""
        return self.block_size.minimum if self.block_size else DEFAULT_MINIMUM_BLOCK

    @property
    def preferred_block(self) -> int:
        """Efficient request size in bytes, announced or by default."""
        return self.block_size.preferred if self.block_size else DEFAULT_PREFERRED_BLOCK

    @property
    def maximum_payload(self) -> int:
        """Longest read or write in bytes, announced or by default."""
        return self.block_size.maximum if self.block_size else DEFAULT_MAXIMUM_PAYLOAD

    @property
    def read_only(self) -> bool:
        """Whether the server refuses writes."""
        return bool(self.flags & TransmissionFlag.READ_ONLY)

    @property
    def rules(self) -> RequestRules:
        """The rules that requests to this export obey."""
        return RequestRules(
            self.size,
            self.flags,
            self.minimum_block,
            self.maximum_payload,
            has_contexts=bool(self.contexts),
        )
