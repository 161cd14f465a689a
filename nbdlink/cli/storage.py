"""The options about what is served, in the letters of qemu-nbd where it has them."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from nbdlink.errors import ConfigError
from nbdlink.sizes import parse_size
from nbdlink.uri import Target, is_uri

if TYPE_CHECKING:
    from nbdlink.storage.chain import Wanted
    from nbdlink.storage.open import StorageSpec

_CACHE_MODES = ("none", "writeback", "writethrough", "directsync", "unsafe")
_AIO_MODES = ("threads", "native", "io_uring")


def add_storage_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what lies behind an export, and what becomes of requests."""
    add = parser.add_argument_group("storage").add_argument
    add(
        "-f",
        "--format",
        metavar="FORMAT",
        help="raw, qcow2, or to be read only vmdk, vdi, vpc, vhdx (found out)",
    )
    add(
        "--image-opts",
        action="store_true",
        help="STORAGE is driver=FORMAT,file.filename=PATH and the like, as QEMU takes it",
    )
    add("-o", "--offset", metavar="SIZE", default="0", help="begin this far into the storage")
    add("--size", metavar="SIZE", help="export this much (up to the storage's end)")
    add(
        "-s",
        "--snapshot",
        action="store_true",
        help="have writes go to a temporary file, which is thrown away at the end",
    )
    add(
        "-l",
        "--load-snapshot",
        metavar="ID|NAME",
        help="serve an internal snapshot of the image, read-only",
    )
    add(
        "--cache",
        metavar="MODE",
        choices=_CACHE_MODES,
        help="writeback (default), none, writethrough, directsync or unsafe",
    )
    add("-n", "--nocache", action="store_true", help="the same as --cache none")
    add("--aio", metavar="MODE", choices=_AIO_MODES, default="threads", help="threads, no other")
    add(
        "--discard",
        metavar="MODE",
        choices=("ignore", "off", "unmap", "on"),
        default="unmap",
        help="unmap: give space back if a client says so (default); or ignore",
    )
    add(
        "--detect-zeroes",
        metavar="MODE",
        choices=("off", "on", "unmap"),
        default="off",
        help="on: store writes of zeroes as zeroes; unmap: give their space back; or off (default)",
    )
    add(
        "-A",
        "--allocation-depth",
        action="store_true",
        help="offer the metadata context qemu:allocation-depth",
    )
    add(
        "-B",
        "--bitmap",
        metavar="NAME",
        action="append",
        default=[],
        help="offer the image's bitmap as qemu:dirty-bitmap:NAME; may be repeated",
    )
    add(
        "--block-size",
        metavar="MIN[,PREFERRED[,MAX]]",
        help="what clients' requests must be aligned to, should be, and how long they may be",
    )
    add(
        "--write-behind",
        action="store_true",
        help="acknowledge writes before they are done; flushes wait for them",
    )
    add(
        "--write-behind-memory",
        metavar="SIZE",
        help="how much is held for that (32M)",
    )
    add(
        "--lock-ranges",
        action="store_true",
        help="do requests that overlap one after the other, over all connections",
    )


def storage_spec(arguments: argparse.Namespace, word: str) -> StorageSpec:
    """Give the description of a storage.

    Args:
        arguments: the command line.
        word: the operand that names it: a path or an NBD URI, or with `--image-opts` options.

    Raises:
        ConfigError: the options contradict each other.
    """
    from nbdlink.cli.objects import client_tls
    from nbdlink.storage.blocksize import BlockSizes
    from nbdlink.storage.imageopts import discard_mode, parse_image_options
    from nbdlink.storage.open import CACHE_MODES, Part, StorageSpec

    if arguments.nocache and arguments.cache not in (None, "none"):
        raise ConfigError(
            f"--nocache is --cache none, and --cache {arguments.cache} is not",
            hint="leave one of them out",
        )
    spec = StorageSpec(
        word,
        format=arguments.format,
        read_only=arguments.read_only,
        overlay=arguments.snapshot,
        snapshot=_snapshot(arguments.load_snapshot),
        cache=CACHE_MODES["none" if arguments.nocache else arguments.cache or "writeback"],
        aio=arguments.aio,
        discard=discard_mode(arguments.discard),
        detect_zeroes=arguments.detect_zeroes,
        block_sizes=BlockSizes.parse(arguments.block_size) if arguments.block_size else None,
        write_behind=_write_behind(arguments),
        lock_ranges=arguments.lock_ranges,
    )
    if arguments.image_opts:
        if arguments.format is not None:
            raise ConfigError(
                "--image-opts names the format itself", hint="say driver=FORMAT, and not --format"
            )
        spec = parse_image_options(
            word, spec, lambda name, host: client_tls(arguments.object, name, host)
        )
    elif not word:
        raise ConfigError("an empty path names no storage", hint="name a file or a device")
    elif is_uri(word):
        target = Target.parse(word)
        spec = replace(spec, path=str(target), target=target)
    size = None if arguments.size is None else _size("--size", arguments.size)
    part = Part(_size("--offset", arguments.offset), size)
    if part != Part():
        spec = replace(spec, parts=(*spec.parts, part))
    spec.check()
    return spec


def _write_behind(arguments: argparse.Namespace) -> int | None:
    """Give how many bytes may be acknowledged before they are written, or None for none."""
    from nbdlink.storage.writebehind import DEFAULT_MEMORY

    if not arguments.write_behind:
        if arguments.write_behind_memory is not None:
            raise ConfigError(
                "--write-behind-memory is for --write-behind", hint="say that as well"
            )
        return None
    memory = arguments.write_behind_memory
    return DEFAULT_MEMORY if memory is None else _size("--write-behind-memory", memory)


def _size(option: str, word: str) -> int:
    try:
        return parse_size(word)
    except ConfigError as error:
        raise ConfigError(f"{option}: {error}", hint=error.hint) from None


def further_contexts(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Give the metadata contexts that are asked for."""
    from nbdlink.protocol.constants import BITMAP_CONTEXT, DEPTH_CONTEXT

    depth = (DEPTH_CONTEXT,) if arguments.allocation_depth else ()
    return depth + tuple(BITMAP_CONTEXT + name for name in dict.fromkeys(arguments.bitmap))


def _snapshot(word: str | None) -> Wanted | None:
    """Give id or name of a snapshot, or exactly what QEMU's longer way to say it names."""
    if word is None or not word.startswith(("snapshot.id=", "snapshot.name=")):
        return word
    from nbdlink.storage.chain import Exactly
    from nbdlink.storage.imageopts import split_options

    found: dict[str, str] = {}
    for key, value in split_options(word):
        if key not in ("snapshot.id", "snapshot.name") or not value or key in found:
            raise ConfigError(
                f"--load-snapshot {word}: {key} is not understood",
                hint="say snapshot.id=ID,snapshot.name=NAME, or just the one or the other",
            )
        found[key] = value
    return Exactly(found.get("snapshot.id"), found.get("snapshot.name"))
