"""From a description of what is to be served to the storage that serves it.

The layers, from the file up; each is there only if it has something to do:

    file            `RawStorage`, or `DirectStorage` without the page cache; a raw image is no more
                    than that, and a window of it belongs to it. Or `RemoteStorage`, an export
    first sector    keeps an image that was found to be raw from becoming something else
    format          qcow2, or one that can only be read
    overlay         writes go to a temporary file
    window          a part of what is below
    policy          durability, zeroes, and space that is given back
    write behind    writes are acknowledged before they are done
    locked ranges   what overlaps is done one after the other
    block sizes     clients are asked for larger blocks

Only a raw file and its policy leave the engine its fast roads (`Storage.plain_file`), and only a
qcow2 image and its policy say what they do at once (`Storage.at_once`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from nbdlink.errors import ConfigError, StorageError
from nbdlink.storage.base import Storage
from nbdlink.storage.blocksize import BlockSized, BlockSizes
from nbdlink.storage.chain import NO_CHAIN, Chain, Wanted
from nbdlink.storage.direct import (
    DirectFile,
    DirectStorage,
    UnsafeDirectFile,
    UnsafeFile,
)
from nbdlink.storage.firstsector import FirstSector
from nbdlink.storage.foreign import FORMATS as FOREIGN
from nbdlink.storage.foreign import ForeignStorage
from nbdlink.storage.imagefile import ImageFile, PosixFile
from nbdlink.storage.layer import Layer
from nbdlink.storage.locks import Use, lock
from nbdlink.storage.mirror.places import refuse_alone
from nbdlink.storage.overlay import Overlay
from nbdlink.storage.policy import DetectZeroes, Policy
from nbdlink.storage.probe import KNOWN, RAW, SECTOR, format_of, probe
from nbdlink.storage.rangelocks import LockedRanges
from nbdlink.storage.raw import RawStorage
from nbdlink.storage.window import Window
from nbdlink.storage.writebehind import LEAST_MEMORY, WriteBehind
from nbdlink.uri import Target

if TYPE_CHECKING:
    from nbdlink.client.security import TLSOptions

_log = logging.getLogger("nbdlink.storage")

AioMode = Literal["threads", "native", "io_uring"]
Discard = Literal["ignore", "unmap"]


class Cache(NamedTuple):
    """How writes come to the disk.

    Attributes:
        direct: not by way of the page cache (O_DIRECT).
        write_through: before they are answered.
        flushes: at the latest when a client flushes; else whenever the system likes.
    """

    direct: bool = False
    write_through: bool = False
    flushes: bool = True


CACHE_MODES: Final = {
    "none": Cache(direct=True),
    "writeback": Cache(),
    "writethrough": Cache(write_through=True),
    "directsync": Cache(direct=True, write_through=True),
    "unsafe": Cache(flushes=False),
}
"""qemu-nbd's words."""

AIO_MODES: Final[tuple[AioMode, ...]] = ("threads", "native", "io_uring")
DETECT_ZEROES: Final[tuple[DetectZeroes, ...]] = ("off", "on", "unmap")

SERVED: Final = (RAW, "qcow2", *FOREIGN)
"""The formats that can be served."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a storage.

    Attributes:
        offset: bytes to leave out at the front.
        size: bytes, or None for all that follow.
    """

    offset: int = 0
    size: int | None = None


@dataclass(frozen=True, slots=True)
class StorageSpec:
    """What is to be opened, and how.

    Attributes:
        path: of a file or a block device, or for messages the target's URI.
        format: one of `SERVED`, or None to find out.
        parts: windows of it, from the lowest to the highest.
        read_only: whether to open it for reading only.
        overlay: whether writes go to a temporary file.
        snapshot: an internal snapshot, to be read only; or None.
        chain: what is said of a qcow2 image's data file and of what lies behind it.
        cache: how writes come to the disk.
        aio: which way requests take to the kernel, in qemu-nbd's words.
        discard: whether space is given back.
        detect_zeroes: whether writes of zeroes are looked for.
        locking: whether to take QEMU's locks, and to heed them.
        device: whether it has to be a block device (or must not be one); None for either.
        target: an export of another server, which lies there instead of a file; or None.
        tls: what is demanded of TLS on the way to it, beside what the target says; or None.
        write_behind: bytes of writes that may be acknowledged before they are done; None for
            none.
        lock_ranges: whether requests that overlap are done one after the other.
        block_sizes: what clients are asked for; None for what the storage needs.
        is_member: whether it is opened by its mirror; others may not write to a mirror's member.
    """

    path: str
    format: str | None = None
    parts: tuple[Part, ...] = ()
    read_only: bool = False
    overlay: bool = False
    snapshot: Wanted | None = None
    chain: Chain = NO_CHAIN
    cache: Cache = CACHE_MODES["writeback"]
    aio: AioMode = "threads"
    discard: Discard = "unmap"
    detect_zeroes: DetectZeroes = "off"
    locking: bool = True
    device: bool | None = None
    target: Target | None = None
    tls: TLSOptions | None = None
    write_behind: int | None = None
    lock_ranges: bool = False
    block_sizes: BlockSizes | None = None
    is_member: bool = False

    def check(self) -> None:
        """Look whether it makes sense, before anything is opened.

        Raises:
            ConfigError: it asks for what contradicts itself, or for what there is not.
        """
        if self.format is not None and self.format not in KNOWN:
            raise ConfigError(
                f"{self.format!r} is not a format", hint=f"there are {', '.join(SERVED)}"
            )
        if self.detect_zeroes == "unmap" and self.discard != "unmap":
            raise ConfigError(
                "detect-zeroes=unmap gives space back, which discard=ignore forbids",
                hint="say --discard unmap as well, or --detect-zeroes on",
            )
        if self.aio == "native" and not self.cache.direct:
            raise ConfigError(
                "aio=native goes without the page cache only", hint="say --cache none"
            )
        if self.aio != "threads":
            raise ConfigError(
                f"aio={self.aio} is not available: requests are done in threads here",
                hint="leave --aio out",
            )
        if self.write_behind is not None:
            if self.cache.write_through:
                raise ConfigError(
                    "write-behind acknowledges before it writes, and writethrough and directsync "
                    "only when all is durable",
                    hint="say --cache none or writeback",
                )
            if self.write_behind < LEAST_MEMORY:
                raise ConfigError(
                    f"{self.write_behind} bytes are too few for write-behind",
                    hint="give it 1M or more; the default is 32M",
                )
        if self.snapshot is not None and self.format not in (None, "qcow2"):
            raise ConfigError(f"{self.format} images have no internal snapshots")
        if self.chain != NO_CHAIN and self.format != "qcow2":
            raise ConfigError("backing and data-file are for qcow2 images", hint="say driver=qcow2")


def open_storage(spec: StorageSpec) -> Storage:
    """Open what `spec` describes.

    Raises:
        ConfigError: the description makes no sense.
        StorageError: it cannot be opened, or not in this way.
    """
    spec.check()
    if not (spec.is_member or spec.read_only or spec.overlay or spec.snapshot is not None):
        refuse_alone(spec.path)
    if spec.target is not None:
        return _open_remote(spec, spec.target)
    _check_kind(spec)
    kind = probe(spec.path) if spec.format is None else spec.format
    with contextlib.ExitStack() as undo:
        if kind == RAW:
            storage, parts = _open_raw(spec), spec.parts[1:]
        else:
            storage, parts = _open_format(spec, kind), spec.parts
        undo.callback(storage.close)
        if kind == "qcow2":
            # Its file sees to that, see `_open_qcow2`.
            spec = replace(spec, cache=spec.cache._replace(flushes=True))
        storage = layered(spec, storage, parts, undo)
        undo.pop_all()
        return storage


def layered(
    spec: StorageSpec, storage: Storage, parts: tuple[Part, ...], undo: contextlib.ExitStack
) -> Storage:
    """Lay what was asked for on a storage; `undo` learns what has to be closed if that fails."""
    if spec.overlay:
        storage = Overlay(storage)
        undo.callback(storage.close)
    for part in parts:
        if part != Part():
            storage = Window(storage, part.offset, part.size)
    storage = _with_policy(spec, storage)
    if spec.write_behind is not None and not storage.read_only:
        storage = WriteBehind(storage, spec.write_behind)
    if spec.lock_ranges:
        storage = LockedRanges(storage)
    if spec.block_sizes is not None:
        storage = BlockSized(storage, spec.block_sizes)
    return storage


def _open_remote(spec: StorageSpec, target: Target) -> Storage:
    from nbdlink.storage.remote import RemoteStorage
    from nbdlink.storage.remotefile import RemoteFile

    read_only = spec.read_only or spec.overlay or spec.snapshot is not None
    with contextlib.ExitStack() as undo:
        storage: Storage
        storage = remote = RemoteStorage.open(target, read_only=read_only, tls=spec.tls)
        undo.callback(remote.close)
        kind = format_of(remote.head(SECTOR)) if spec.format is None else spec.format
        if kind == "qcow2":
            image = RemoteFile(remote, flushes=spec.cache.flushes)
            storage = _open_qcow2(spec, read_only=read_only, within=image)
            undo.callback(storage.close)
            spec = replace(spec, cache=spec.cache._replace(flushes=True))
        elif kind != RAW:
            raise StorageError(
                f"{spec.path}: {kind} images within an export cannot be served",
                hint="-f raw serves the bytes of the export as they are",
            )
        elif spec.snapshot is not None:
            raise _no_snapshots(spec)
        elif spec.format is None and not read_only:
            _warn_of_raw(spec)
            storage = FirstSector(remote)
            undo.callback(storage.close)
        storage = layered(spec, storage, spec.parts, undo)
        undo.pop_all()
        return storage


def _check_kind(spec: StorageSpec) -> None:
    if spec.device is None:
        return
    with contextlib.suppress(OSError):  # said better by who opens it
        if stat.S_ISBLK(Path(spec.path).stat().st_mode) != spec.device:
            kind = "is not a block device" if spec.device else "is a block device"
            driver = "file" if spec.device else "host_device"
            raise StorageError(f"{spec.path} {kind}", hint=f"its driver is {driver}")


def _open_raw(spec: StorageSpec) -> Storage:
    if spec.snapshot is not None:
        raise _no_snapshots(spec)
    part = spec.parts[0] if spec.parts else Part()
    read_only = spec.read_only or spec.overlay
    kind = DirectStorage if spec.cache.direct else RawStorage
    raw = kind.open(
        spec.path,
        offset=part.offset,
        size=part.size,
        read_only=read_only,
        locking=spec.locking,
    )
    if spec.format is not None or read_only or part.offset >= SECTOR:
        return raw
    _warn_of_raw(spec)
    return FirstSector(raw)


def _no_snapshots(spec: StorageSpec) -> StorageError:
    return StorageError(f"{spec.path} is a raw image, and these have no internal snapshots")


def _warn_of_raw(spec: StorageSpec) -> None:
    _log.warning(
        "%s: no format was given, and it was found to be raw; what would make its first sector "
        "look like another format cannot be written. Say -f raw to do without that",
        spec.path,
    )


def _open_format(spec: StorageSpec, kind: str) -> Storage:
    if kind not in SERVED:
        raise StorageError(
            f"{spec.path}: {kind} images cannot be served",
            hint="-f raw serves the bytes of the file as they are",
        )
    if kind != "qcow2" and not spec.read_only and not spec.overlay:
        raise StorageError(
            f"{spec.path}: {kind} images can only be read",
            hint="serve it with -r (--read-only), or with -s for writes that are thrown away",
        )
    if spec.snapshot is not None and kind != "qcow2":
        raise StorageError(f"{spec.path}: {kind} images have no internal snapshots here")
    read_only = spec.read_only or spec.overlay or spec.snapshot is not None
    if kind == "qcow2":
        return _open_qcow2(spec, read_only=read_only)
    return _open_foreign(spec, kind)


def _open_qcow2(spec: StorageSpec, *, read_only: bool, within: ImageFile | None = None) -> Storage:
    from nbdlink.storage.qcow2 import Qcow2Storage

    direct, _, flushes = spec.cache

    def open_file(path: Path, for_reading: bool) -> ImageFile:
        # Called for the image, the file with its data, and images that it is based on. What is
        # not to be made durable is to be written nevertheless, so the file is who leaves it out.
        kind = PosixFile if flushes or direct else UnsafeFile
        file = kind.open(path, read_only=for_reading)
        try:
            if spec.locking:
                lock(file.fd, path, Use.FORMAT_READ if for_reading else Use.FORMAT_WRITE)
            if not direct:
                return file
            return (DirectFile if flushes else UnsafeDirectFile).of(file)
        except BaseException:
            file.close()
            raise

    def open_raw(path: Path) -> Storage:
        kind = DirectStorage if direct else RawStorage
        return kind.open(path, read_only=True, locking=spec.locking)

    name = spec.path
    if spec.target is not None:
        name = f"{spec.target.address}/{spec.target.export}"  # a URI would not survive as a path
    storage = Qcow2Storage.open(
        name,
        read_only=read_only,
        snapshot=spec.snapshot,
        chain=spec.chain,
        discard=spec.discard == "unmap",
        open_file=open_file,
        open_raw=open_raw,
        within=within,
    )
    for warning in storage.warnings:
        _log.warning("%s", warning)
    return storage


def _open_foreign(spec: StorageSpec, kind: str) -> Storage:
    if not spec.locking:
        return ForeignStorage.open(spec.path, kind)
    with contextlib.ExitStack() as undo:
        fd = _open_to_lock(spec.path)
        undo.callback(os.close, fd)
        lock(fd, spec.path, Use.FORMAT_READ)
        storage = Locked(ForeignStorage.open(spec.path, kind), fd)
        undo.pop_all()
        return storage


def _with_policy(spec: StorageSpec, storage: Storage) -> Storage:
    _, write_through, flushes = spec.cache
    if (write_through, flushes, spec.discard, spec.detect_zeroes) == (False, True, "unmap", "off"):
        return storage
    return Policy(
        storage,
        write_through=write_through,
        flushes=flushes,
        discards=spec.discard == "unmap",
        detect_zeroes=spec.detect_zeroes,
    )


class Locked(Layer):
    """A storage whose file is kept locked by a descriptor of its own."""

    def __init__(self, below: Storage, fd: int) -> None:
        """Keep `fd` open for as long as `below` is."""
        super().__init__(below)
        self._fd = fd

    def close(self) -> None:
        """Close the storage, and let others have its file."""
        fd, self._fd = self._fd, -1
        try:
            self.below.close()
        finally:
            if fd >= 0:
                os.close(fd)

    def disown(self) -> None:
        """Let go of the file that is locked, too."""
        os.close(self._fd)
        super().disown()


def _open_to_lock(path: str) -> int:
    """Open a file to lock it.

    Raises:
        StorageError: it cannot be opened.
    """
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        words = (error.strerror or str(error)).lower()
        raise StorageError(f"{path} cannot be opened: {words}", hint="check the path") from None
