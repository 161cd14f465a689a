"""The options of `nbdlink serve` that make one export of several storages."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from nbdlink.cli.storage import storage_spec
from nbdlink.errors import ConfigError
from nbdlink.sizes import parse_size

if TYPE_CHECKING:
    from nbdlink.storage.composite.opening import Arrangement
    from nbdlink.storage.open import StorageSpec


def add_several_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that put storages together."""
    group = parser.add_argument_group("one export of several storages")
    kinds = group.add_mutually_exclusive_group()
    for kind, words in (
        ("linear", "one after the other"),
        ("stripe", "alternating by --stripe-unit"),
        ("mirror", "each has everything"),
    ):
        kinds.add_argument(
            f"--{kind}",
            dest="several",
            action="store_const",
            const=kind,
            help=f"all STORAGEs are one export: {words}",
        )
    group.add_argument(
        "--stripe-unit",
        metavar="SIZE",
        help="bytes in a storage before the next one's turn (the block size: 4K)",
    )
    group.add_argument(
        "--degraded",
        action="store_true",
        help="serve a mirror without good members that are missing; they have to be rebuilt then",
    )


def join_sizes(words: list[str]) -> list[str]:
    """Have argparse take `--size -,512M` for an option with its value, not for two options."""
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] == "--size" and word.startswith("-,"):
            joined[-1] = f"--size={word}"
        else:
            joined.append(word)
    return joined


def check_several(arguments: argparse.Namespace) -> None:
    """Look whether the options go together.

    Raises:
        ConfigError: they do not.
    """
    kind = arguments.several
    for option, wanted in (("stripe_unit", "stripe"), ("degraded", "mirror")):
        if getattr(arguments, option) and kind != wanted:
            raise ConfigError(f"--{option.replace('_', '-')} is for --{wanted}")
    if kind is None:
        if arguments.size is not None and "," in arguments.size:
            raise ConfigError(
                f"--size {arguments.size} is for several storages that become one export",
                hint="say --linear, --stripe or --mirror, or serve each by a server of its own",
            )
        return
    for option in ("image_opts", "load_snapshot", "bitmap"):
        if getattr(arguments, option):
            raise ConfigError(f"--{option.replace('_', '-')} is for a single storage")


def one_of_several(arguments: argparse.Namespace) -> tuple[Arrangement, list[StorageSpec]]:
    """Give how all operands are put together to one storage, and what each of them is.

    Raises:
        ConfigError: the options do not go together.
    """
    from nbdlink.storage.blocksize import BlockSizes
    from nbdlink.storage.composite.opening import DEFAULT_UNIT, Arrangement

    members: dict[str, Any] = vars(arguments) | {"size": None}
    specs = [storage_spec(argparse.Namespace(**members), word) for word in arguments.storage]
    sizes: tuple[int | None, ...] = ()
    if arguments.size is not None:
        words = arguments.size.split(",")
        sizes = tuple(None if word.strip() == "-" else parse_size(word) for word in words)
    unit = DEFAULT_UNIT
    if arguments.stripe_unit is not None:
        unit = parse_size(arguments.stripe_unit)
    elif arguments.block_size is not None:
        unit = BlockSizes.parse(arguments.block_size).minimum
    return Arrangement(arguments.several, sizes, unit, arguments.degraded), specs
