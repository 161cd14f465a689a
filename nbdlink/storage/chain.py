"""What a person says of an image beside its path: a snapshot of it, and the files behind it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple


class Exactly(NamedTuple):
    """A snapshot that is named by its id, by its name, or by both, and not by either of them."""

    id: str | None = None
    name: str | None = None


Wanted = str | Exactly
"""A snapshot: by a word that is an id or else a name, or exactly."""


@dataclass(frozen=True, slots=True)
class Backing:
    """What is said of a backing file.

    Attributes:
        path: where it is; None where the image says.
        format: `raw` or `qcow2`; None for what the image says.
        chain: what is said of the files behind it.
    """

    path: Path | None
    format: str | None
    chain: Chain


@dataclass(frozen=True, slots=True)
class Chain:
    """What is said of the files behind an image; it counts more than what the image records.

    Attributes:
        data_file: its external data file; None for the one that it records.
        backing: its backing file; None for the one that it records.
        has_backing: whether it may have one at all.
    """

    data_file: Path | None = None
    backing: Backing | None = None
    has_backing: bool = True


NO_CHAIN: Final = Chain()
