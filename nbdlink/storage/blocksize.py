"""What clients are told about sizes of requests, beyond what a storage needs."""

from __future__ import annotations

from typing import NamedTuple

from nbdlink.errors import ConfigError
from nbdlink.protocol.messages import BlockSizeInfo
from nbdlink.sizes import parse_size
from nbdlink.storage.base import Storage
from nbdlink.storage.layer import Layer


class BlockSizes(NamedTuple):
    """Sizes in bytes; None leaves one to the storage.

    Attributes:
        minimum: what requests must begin and end at multiples of.
        preferred: what is efficient.
        maximum: the longest payload.
    """

    minimum: int
    preferred: int | None = None
    maximum: int | None = None

    @classmethod
    def parse(cls, text: str) -> BlockSizes:
        """Read `MINIMUM[,PREFERRED[,MAXIMUM]]`.

        Raises:
            ConfigError: it is something else.
        """
        words = text.split(",")
        if len(words) > 3:
            raise ConfigError(
                f"{text!r} are more than three block sizes",
                hint="say MINIMUM, or MINIMUM,PREFERRED,MAXIMUM",
            )
        return cls(*map(parse_size, words))


class BlockSized(Layer):
    """A storage that asks its clients for larger blocks."""

    def __init__(self, below: Storage, sizes: BlockSizes) -> None:
        """Lay it on a storage, whose own minimum counts if that is larger.

        Raises:
            ConfigError: the protocol does not allow the sizes, or the storage cannot do them.
        """
        super().__init__(below)
        self.minimum_block = max(below.minimum_block, sizes.minimum)
        self.preferred_block = max(below.preferred_block, self.minimum_block)
        if sizes.preferred is not None:
            self.preferred_block = sizes.preferred
        if sizes.maximum is not None:
            self.maximum_payload = sizes.maximum
        told = BlockSizeInfo(self.minimum_block, self.preferred_block, self.maximum_payload)
        if problem := told.problem():
            raise ConfigError(f"the protocol does not allow {problem}")
        if (
            self.maximum_payload > below.maximum_payload
            or self.maximum_payload % self.minimum_block
        ):
            raise ConfigError(
                f"{self.maximum_payload} cannot be the longest payload: it has to be a multiple of "
                f"{self.minimum_block}, and at most {below.maximum_payload}"
            )
        if below.size < self.minimum_block:
            raise ConfigError(
                f"{below.name} has {below.size} bytes, less than a block of {self.minimum_block}"
            )
