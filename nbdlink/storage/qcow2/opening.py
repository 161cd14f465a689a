"""What is done with an image between its header and its first request."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from nbdlink.errors import StorageError
from nbdlink.storage.base import Storage
from nbdlink.storage.chain import Wanted
from nbdlink.storage.fingerprint import fingerprint
from nbdlink.storage.imagefile import ImageFile, PosixFile
from nbdlink.storage.qcow2.bitmaps import Bitmaps
from nbdlink.storage.qcow2.header import Autoclear, Header
from nbdlink.storage.qcow2.image import Image
from nbdlink.storage.qcow2.references import rebuild
from nbdlink.storage.qcow2.tables import OFFSET
from nbdlink.storage.raw import RawStorage

_MOST_METADATA: Final = 4 << 20
"""Clusters of metadata, but for L2 tables and refcount blocks: 2 GiB of the smallest ones."""

OpenFile = Callable[[Path, bool], ImageFile]
"""Opens a file by its path, for reading only or not."""

OpenRaw = Callable[[Path], Storage]
"""Opens a raw backing file by its path, for reading only."""


def open_posix(path: Path, read_only: bool) -> ImageFile:
    """Open a file as a `PosixFile`; an `OpenFile`."""
    return PosixFile.open(path, read_only=read_only)


def open_plain(path: Path) -> Storage:
    """Open a file as a `RawStorage`; an `OpenRaw`."""
    return RawStorage.open(path, read_only=True)


@dataclass(frozen=True, slots=True)
class Access:
    """How an image's files are opened.

    Attributes:
        open_file: opens images and external data files.
        open_raw: opens raw backing files.
        discard: whether space that is not needed any more is given back to the file system.
        within: the image itself, if it is open already and no file by its path; else None.
    """

    open_file: OpenFile
    open_raw: OpenRaw
    discard: bool
    within: ImageFile | None = None

    def open_image(self, path: Path, read_only: bool) -> ImageFile:
        """Open an image."""
        return self.open_file(path, read_only) if self.within is None else self.within

    @property
    def behind(self) -> Access:
        """How the images behind it are opened."""
        return replace(self, discard=False, within=None)


def refuse_writing(name: str, header: Header, snapshot: Wanted | None) -> None:
    """See that an image may be written to.

    Raises:
        StorageError: it may not.
    """
    if snapshot is not None:
        raise StorageError(
            f"{name}: a snapshot cannot be written to", hint="serve it with -r (--read-only)"
        )
    if header.is_corrupt:
        raise StorageError(
            f"{name} is marked as corrupt",
            hint="repair it with qemu-img check -r all, or serve it with -r (--read-only)",
        )


def prepare_for_writing(image: Image) -> None:
    """Do what has to be done before the first write: refcounts, and feature bits.

    Raises:
        StorageError: the image is damaged.
        OSError: the disk refuses.
    """
    header = image.header
    if header.is_dirty:
        rebuild(image)
        header = image.header
    known = int(sum(Autoclear))
    if header.autoclear & ~known:
        image.header, at, patch = header.with_features(autoclear=header.autoclear & known)
        image.file.write_at(patch, at)
        image.file.flush()


def known_metadata(image: Image, bitmaps: Bitmaps) -> set[int]:
    """Give the numbers of the clusters that hold metadata, but for refcount blocks.

    Of snapshots these are the L1 tables only: their L2 tables are safe by their refcounts.

    Raises:
        StorageError: the active L1 table names an L2 table where there can be none, or there
            is more metadata than any image has.
    """
    header = image.header
    bits = header.cluster_bits
    end = image.file.size
    areas = [
        (0, header.cluster_size),
        (header.l1_offset, header.l1_size * 8),
        (header.refcount_table_offset, header.refcount_table_clusters << bits),
        (header.snapshots_offset, image.snapshot_table_length),
    ]
    areas += [(snapshot.l1_offset, snapshot.l1_size * 8) for snapshot in image.snapshots]
    if header.bitmaps:
        areas.append((header.bitmaps.offset, header.bitmaps.size))
    areas += [(bitmap.table_offset, bitmap.table_size * 8) for bitmap in bitmaps.all]
    if sum(length for _, length in areas) >> bits > _MOST_METADATA:
        raise StorageError(
            f"{image.name} has too many tables to be written to",
            hint="serve it with -r (--read-only)",
        )
    clusters: set[int] = set()
    for offset, length in areas:
        if length:
            clusters.update(range(offset >> bits, (offset + length - 1 >> bits) + 1))
    for index, entry in enumerate(image.l1):
        offset = entry & OFFSET
        if offset:
            if offset & image.geometry.cluster_mask or offset >= end:
                raise StorageError(
                    f"{image.name}: L1 entry {index} names an L2 table at {offset:#x}",
                    hint="look at it with qemu-img check, or serve it with -r (--read-only)",
                )
            clusters.add(offset >> bits)
    return clusters


def open_data_file(
    path: Path, header: Header, given: Path | None, *, read_only: bool, open_file: OpenFile
) -> ImageFile | None:
    """Open an image's external data file.

    Args:
        path: of the image.
        header: of the image.
        given: the file to take instead of the recorded one.
        read_only: whether to open it for reading only.
        open_file: see `OpenFile`.

    Returns:
        The file, or None if the image keeps its data itself.

    Raises:
        StorageError: it cannot be opened, or nobody knows where it is.
    """
    if not header.has_data_file:
        if given is not None:
            raise StorageError(f"{path} has no external data file")
        return None
    if given is None:
        if not header.data_file:
            raise StorageError(
                f"{path} has an external data file, but does not record its name",
                hint="say where it is: --image-opts driver=qcow2,data-file.filename=PATH,...",
            )
        given = Path(header.data_file.removeprefix("file:"))  # as QEMU takes it, see `backing`
    try:
        return open_file(given, read_only)
    except StorageError as error:
        hint = error.hint
        if not given.is_absolute() and not given.exists():
            hint = "as with QEMU, this name is relative to the current directory, not the image's"
        raise StorageError(f"{path}: its data file {error}", hint=hint) from None


def signature_of(image: Image) -> str | None:
    """Give a word that tells an image, and a snapshot of it, from its file; None if it cannot.

    See `Storage.signature`.
    """
    fd = image.file.fd
    if fd is None or not stat.S_ISREG(os.fstat(fd).st_mode):
        return None
    mark = fingerprint(fd, 0)
    if mark is None:
        return None
    traits = f"qcow2\n{mark}\n{image.snapshot}"
    return "auto:" + hashlib.blake2b(traits.encode(), digest_size=16).hexdigest()


def read_head(path: Path, open_file: OpenFile) -> bytes:
    """Give the first bytes of a file, to see what it is.

    Raises:
        StorageError: it cannot be opened.
        OSError: it cannot be read.
    """
    file = open_file(path, True)
    try:
        head = bytearray(64)
        file.read_at(memoryview(head), 0)
        return bytes(head)
    finally:
        file.close()


def open_backing(path: Path, open_raw: OpenRaw) -> Storage | None:
    """Open a raw backing file; None if it is empty.

    Raises:
        StorageError: it cannot be opened.
    """
    if path.is_file() and not path.stat().st_size:
        return None  # nothing to see there, and no storage can be empty
    return open_raw(path)


def open_bitmaps(
    image: Image, snapshot: Wanted | None, warnings: list[str], *, read_only: bool
) -> Bitmaps:
    """Read the bitmaps.

    Args:
        image: of which.
        snapshot: the snapshot that was opened, if any; bitmaps are of the disk.
        warnings: takes what is wrong with them, if they need not be kept up to date.
        read_only: whether nothing will be written.

    Raises:
        StorageError: they are damaged, and the image is to be written to.
    """
    try:
        return Bitmaps(image.file, image.header, image.size, wanted=snapshot is None)
    except StorageError as error:
        if not read_only:
            raise
        warnings.append(str(error))
        return Bitmaps(image.file, image.header, image.size, wanted=False)
