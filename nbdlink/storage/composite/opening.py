"""From several descriptions of storages to one storage that is made of them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from nbdlink.errors import ConfigError
from nbdlink.storage.base import Storage
from nbdlink.storage.composite.spread import Linear, Stripe
from nbdlink.storage.open import CACHE_MODES, Part, StorageSpec, layered, open_storage

Kind = Literal["linear", "stripe", "mirror"]

DEFAULT_UNIT: Final = 4096
"""Bytes in a unit of stripes: the block size that exports prefer."""


@dataclass(frozen=True, slots=True)
class Arrangement:
    """How storages are put together.

    Attributes:
        kind: end to end, in stripes, or as copies of each other.
        sizes: bytes of each member that are used, None for all; or empty for all of all.
        unit: bytes in a unit of stripes.
        degraded: whether a mirror may go on without good members; see
            `nbdlink.storage.mirror.opening`.
    """

    kind: Kind
    sizes: tuple[int | None, ...] = ()
    unit: int = DEFAULT_UNIT
    degraded: bool = False


def open_several(arrangement: Arrangement, specs: Sequence[StorageSpec]) -> Storage:
    """Open several storages as one.

    Format, cache and what becomes of space are each member's; overlay, windows and all that lies
    above them, which have to be the same in all descriptions, lie on the whole.

    Raises:
        ConfigError: the descriptions do not go together.
        StorageError: one cannot be opened, or not in this way.
    """
    sizes = arrangement.sizes or (None,) * len(specs)
    if len(sizes) != len(specs):
        raise ConfigError(
            f"{len(sizes)} sizes were given for {len(specs)} storages",
            hint="give one for each, in their order; - for all of it: 2G,-,512M",
        )
    whole = specs[0]
    members = [
        replace(
            spec,
            parts=() if size is None else (Part(0, size),),
            read_only=spec.read_only or spec.overlay,
            overlay=False,
            write_behind=None,
            lock_ranges=False,
            block_sizes=None,
        )
        for spec, size in zip(specs, sizes, strict=True)
    ]
    on_top = replace(whole, cache=CACHE_MODES["writeback"], discard="unmap", detect_zeroes="off")
    with contextlib.ExitStack() as undo:
        storage: Storage
        if arrangement.kind == "mirror":
            from nbdlink.storage.mirror.opening import open_mirror

            storage = open_mirror(
                members, read_only=members[0].read_only, degraded=arrangement.degraded
            )
        else:
            opened = []
            for spec in members:
                opened.append(open_storage(spec))
                undo.callback(opened[-1].close)
            if arrangement.kind == "linear":
                storage = Linear(opened)
            else:
                storage = Stripe(opened, arrangement.unit)
        undo.callback(storage.close)
        storage = layered(on_top, storage, whole.parts, undo)
        undo.pop_all()
        return storage
