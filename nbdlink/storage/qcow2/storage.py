"""A qcow2 image with all that lies behind it, served byte by byte.

Reads and writes of clusters that are there take no lock: the table is looked at, and the kernel
is asked (`atonce`, where requests are that must not wait). Everything that changes tables goes
through `allocation` and `clearing`, and reaches the disk by `writeback`, where it is said what a
power cut can do and what it cannot.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Self

from nbdlink.errors import StorageError
from nbdlink.protocol.chunks import Extent
from nbdlink.protocol.constants import ALLOCATION_CONTEXT, BITMAP_CONTEXT, DEPTH_CONTEXT
from nbdlink.storage.base import AtOnce, Storage
from nbdlink.storage.chain import NO_CHAIN, Chain, Wanted
from nbdlink.storage.imagefile import ImageFile
from nbdlink.storage.qcow2 import extents
from nbdlink.storage.qcow2.allocation import Writer
from nbdlink.storage.qcow2.atonce import Places, ShortWays
from nbdlink.storage.qcow2.backing import MAX_DEPTH, backing_of, probe
from nbdlink.storage.qcow2.bitmaps import Bitmaps
from nbdlink.storage.qcow2.clearing import can_clear, clear
from nbdlink.storage.qcow2.image import Image, read_header
from nbdlink.storage.qcow2.opening import (
    Access,
    OpenFile,
    OpenRaw,
    known_metadata,
    open_backing,
    open_bitmaps,
    open_data_file,
    open_plain,
    open_posix,
    prepare_for_writing,
    read_head,
    refuse_writing,
    signature_of,
)
from nbdlink.storage.qcow2.refcounts import NotAtHandError, Refcounts, has_more_clusters_than_blocks
from nbdlink.storage.qcow2.transfer import ZEROES, Reader, read_ahead, write_parts
from nbdlink.storage.qcow2.writeback import Epochs, WriteBack

_MAX_PREFERRED: Final = 1 << 20


class Qcow2Storage(Storage):
    """A qcow2 image. Made by `open`.

    Attributes:
        backing: the storage behind the image, or None.
        warnings: what a person should know of the image, a line each.
    """

    can_trim = True
    can_fast_zero = True

    def __init__(
        self,
        image: Image,
        backing: Storage | None,
        bitmaps: Bitmaps,
        *,
        read_only: bool,
        discard: bool,
    ) -> None:
        """Take over an open image; see `open`."""
        geometry = image.geometry
        self._image = image
        self._data = image.data
        self._bitmaps = bitmaps
        self._epochs = Epochs()
        self._reader = Reader(image, backing)
        self.backing = backing
        self.warnings: list[str] = []
        self.name = image.name
        self.size = image.size
        self.read_only = read_only
        self.preferred_block = max(4096, min(geometry.cluster_size, _MAX_PREFERRED))
        self.is_sparse = True
        self.contexts = (
            ALLOCATION_CONTEXT,
            DEPTH_CONTEXT,
            *(BITMAP_CONTEXT + name for name in bitmaps.consistent),
        )
        # What one process allocates another would not know.
        self.may_fork = read_only
        self.can_cache = image.data.fd is not None
        self._has_holes: bool | None = None
        self._closed = False
        self._bits = geometry.cluster_bits
        self._mask = geometry.cluster_mask
        self._writeback = WriteBack(image, self._epochs, discard=discard)
        self._writer: Writer | None = None
        self._refcounts: Refcounts | None = None
        if not read_only:
            refcounts = self._refcounts = Refcounts(
                image, known_metadata(image, bitmaps), self._writeback.give_back
            )
            self._writeback.refcounts = refcounts
            self._writer = Writer(image, refcounts, self._writeback, backing.size if backing else 0)
            bitmaps.begin_tracking()
            self.can_fast_zero = image.header.version >= 3
            self.can_trim = can_clear(self._writer, may_trim=True)
        self._places = Places(image, self._refcounts)
        self._short = ShortWays(
            image, self._epochs, self._places, bitmaps, self._reader, self._writer, backing
        )

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        read_only: bool = False,
        snapshot: Wanted | None = None,
        chain: Chain = NO_CHAIN,
        discard: bool = True,
        open_file: OpenFile = open_posix,
        open_raw: OpenRaw = open_plain,
        within: ImageFile | None = None,
    ) -> Self:
        """Open an image and everything that it needs.

        Args:
            path: of the image.
            read_only: whether to open it for reading only; what lies behind it always is.
            snapshot: the internal snapshot to serve, by id or by name; read-only.
            chain: what is said of its data file and of what lies behind it.
            discard: whether space that is not needed any more is given back to the file system.
            open_file: opens the image, its external data file, and qcow2 backing files.
            open_raw: opens raw backing files.
            within: the image itself, if it is no file by that path but has been opened already;
                it is closed whatever happens.

        Raises:
            StorageError: any of them cannot be opened, or is damaged, or needs what is not
                known here.
        """
        access = Access(open_file, open_raw, discard, within)
        return cls._open(Path(path), read_only, snapshot, chain, access, [])

    @classmethod
    def _open(
        cls,
        path: Path,
        read_only: bool,
        snapshot: Wanted | None,
        chain: Chain,
        access: Access,
        above: list[tuple[int, int] | None],
    ) -> Self:
        with contextlib.ExitStack() as opened:
            file = access.open_image(path, read_only)
            opened.callback(file.close)
            if len(above) >= MAX_DEPTH:
                raise StorageError(f"{path}: more than {MAX_DEPTH} images lie in front of it")
            if file.identity is not None and file.identity in above:
                raise StorageError(f"{path} is its own backing file")
            try:
                header = read_header(file)
                if not read_only:
                    refuse_writing(str(path), header, snapshot)
                data = open_data_file(
                    path,
                    header,
                    chain.data_file,
                    read_only=read_only,
                    open_file=access.open_file,
                )
                if data is not None:
                    opened.callback(data.close)
                image = Image.open(file, data, snapshot)
                backing = None
                warnings = []
                is_file = access.within is None
                place = backing_of(chain, str(path), header, is_file=is_file)
                if place is not None:
                    form = place.format
                    if form is None:
                        form = probe(str(place.path), read_head(place.path, access.open_file))
                        warnings.append(
                            f"{path} does not record the format of its backing file; it was"
                            f" taken for {form}"
                        )
                    if form == "raw":
                        backing = open_backing(place.path, access.open_raw)
                    else:
                        behind = chain.backing.chain if chain.backing else NO_CHAIN
                        identities = [*above, file.identity]
                        backing = cls._open(
                            place.path, True, None, behind, access.behind, identities
                        )
                    if backing is not None:
                        opened.callback(backing.close)
                if header.is_corrupt:
                    warnings.append(f"{path} is marked as corrupt")
                if header.is_dirty and read_only:
                    warnings.append(f"{path} was not closed; its refcounts may be wrong")
                if not read_only:
                    prepare_for_writing(image)
                bitmaps = open_bitmaps(image, snapshot, warnings, read_only=read_only)
                storage = cls(image, backing, bitmaps, read_only=read_only, discard=access.discard)
                storage.warnings = warnings
            except OSError as error:
                words = error.strerror or str(error)
                raise StorageError(
                    words if str(path) in words else f"{path}: {words.lower()}"
                ) from None
            opened.pop_all()
            return storage

    # Reading.

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from the image and what lies behind it."""
        users = self._epochs.users
        users.append(None)
        try:
            position = self._places.of(offset, len(buffer))
            if position:
                self._data.read_at(buffer, position)
            else:
                self._reader.read(buffer, offset)
        finally:
            users.pop()

    @property
    def at_once(self) -> AtOnce | None:
        """What needs nothing but tables in memory and the page cache."""
        data, backing = self._data, self.backing
        if data.nowait is None:
            return None
        below = backing.at_once if backing else None
        return AtOnce(
            self._short.read,
            None if self.read_only else self._short.write,
            in_memory=data.in_memory and (not backing or (below is not None and below.in_memory)),
            nowait=data.nowait and (not below or below.nowait),
        )

    def cache(self, offset: int, length: int) -> None:
        """Have the kernel read ahead what can be read without unpacking it."""
        read_ahead(self._image, self.backing, offset, length)

    # Writing.

    def write(self, buffer: memoryview, offset: int, fua: bool) -> None:
        """Write `buffer`, to new clusters where there are none of its own."""
        if self._image.damage is not None:
            self._image.check_damage()
        length = len(buffer)
        if self._bitmaps.is_tracking:
            self._bitmaps.mark(offset, length)
        self._write(buffer, offset)
        if fua:
            self.flush()

    def _write(self, buffer: memoryview, offset: int) -> None:
        users = self._epochs.users
        users.append(None)
        try:
            position = self._places.to_overwrite(offset, len(buffer))
            if position:
                self._data.write_at(buffer, position)
                return
        finally:
            users.pop()
        if self._writeback.is_crowded:
            self._writeback.sync()
        users = self._epochs.users
        users.append(None)
        try:
            assert self._writer is not None
            write_parts(self._reader, self._writer, buffer, offset, self._writer.prepare)
        finally:
            users.pop()

    # Zeroes and holes.

    def zero(self, offset: int, length: int, *, may_trim: bool, fast: bool, fua: bool) -> None:
        """Zero a range, without writing where the format can say it."""
        self._image.check_damage()
        writer = self._writer
        assert writer is not None
        if length:
            clears = can_clear(writer, may_trim=may_trim)
            if self._image.header.raw_data_file:
                self._zero_data_file(offset, length, may_trim=may_trim, fast=fast)
            elif clears:
                if self._bitmaps.is_tracking:
                    self._bitmaps.mark(offset, length)
                self._zero_clusters(offset, offset + length, may_trim=may_trim)
            elif fast:
                raise OSError(errno.ENOTSUP, f"{self.name}: no fast way to write zeroes")
            else:
                self._write_zeroes(offset, offset + length)
        if fua:
            self.flush()

    def _zero_clusters(self, offset: int, end: int, *, may_trim: bool) -> None:
        writer = self._writer
        assert writer is not None
        granule = self._image.geometry.granule
        inner = -(-offset // granule) * granule
        outer = end if end == self.size else end // granule * granule
        if inner >= outer:
            self._write_zeroes(offset, end)
            return
        self._write_zeroes(offset, inner)
        self._write_zeroes(outer, end)
        for begin, limit in clear(writer, inner, outer, may_trim=may_trim):
            self._write_zeroes(begin, limit)

    def _write_zeroes(self, offset: int, end: int) -> None:
        """Write zeroes where the guest does not see them already."""
        writer = self._writer
        assert writer is not None
        while offset < end:
            run = self._image.run_at(offset, end - offset)
            limit = offset + run.length
            if not writer.reads_as_zeroes(run.kind, offset):
                if self._bitmaps.is_tracking:
                    self._bitmaps.mark(offset, run.length)
                while offset < limit:
                    count = min(limit - offset, len(ZEROES))
                    self._write(ZEROES[:count], offset)
                    offset += count
            offset = limit

    def _zero_data_file(self, offset: int, length: int, *, may_trim: bool, fast: bool) -> None:
        # The file has to read as zeroes by itself. A cluster that is not allocated does so for
        # readers of either kind, and stays that way.
        if self._bitmaps.is_tracking:
            self._bitmaps.mark(offset, length)
        if not self._data.zero_at(offset, length, may_trim=may_trim):
            if fast:
                raise OSError(errno.ENOTSUP, f"{self.name}: no fast way to write zeroes")
            self._write_zeroes(offset, offset + length)

    def trim(self, offset: int, length: int, fua: bool) -> None:
        """Give clusters back that are within the range as a whole."""
        self._image.check_damage()
        writer = self._writer
        assert writer is not None
        size = self._mask + 1
        inner = -(-offset // size) * size
        end = offset + length
        outer = end if end == self.size else end // size * size
        if inner < outer and self.can_trim:
            if self._bitmaps.is_tracking:
                self._bitmaps.mark(inner, outer - inner)
            if self._image.header.raw_data_file:
                self._data.zero_at(inner, outer - inner, may_trim=True)
            else:
                clear(writer, inner, outer, may_trim=True)
        if fua:
            self.flush()

    # What others want to know.

    @property
    def signature(self) -> str | None:
        """A word for the image's file, which tells the image from the file as it is."""
        return signature_of(self._image)

    def extents(self, context: str, offset: int, length: int) -> Iterator[Extent]:
        """Tell what a context says, see `extents` for those that there are."""
        if context.startswith(BITMAP_CONTEXT):
            name = context.removeprefix(BITMAP_CONTEXT)
            found = self._bitmaps.extents(name, offset, length)
        elif context == DEPTH_CONTEXT:
            found = extents.depth(self._image, self.backing, offset, length)
        else:
            if self._has_holes is None:
                self._has_holes = has_more_clusters_than_blocks(self._image)
            if not self._has_holes and self._places.of(offset, length):
                return iter((Extent(length, 0),))  # asked for before every short read
            found = extents.allocation(
                self._image, self.backing, offset, length, look_below=self._has_holes
            )
        return extents.merged(found)

    # Durability.

    def flush(self) -> None:
        """Make all writes durable, and all tables that lead to them."""
        if not self.read_only:
            self._writeback.sync()

    def close(self) -> None:
        """Write all tables back, store bitmaps, and close all files.

        A raw file leaves to the kernel what was not flushed; tables in memory have nobody else.

        Raises:
            OSError: the tables could not be written; everything is closed all the same.
        """
        closed, self._closed = self._closed, True
        if closed:
            return
        try:
            if not self.read_only and self._image.damage is None:
                self._writeback.sync()
                if self._bitmaps.is_tracking:
                    self._bitmaps.store(self._new_cluster, self._writeback.sync)
                # What the first turn has freed is counted so only now.
                self._writeback.sync()
        finally:
            self._image.file.close()
            self._data.close()
            if self.backing is not None:
                self.backing.close()

    def disown(self) -> None:
        """Let go of all files, as they are."""
        self._image.file.disown()
        self._data.disown()
        if self.backing is not None:
            self.backing.disown()

    def _new_cluster(self) -> int:
        writer = self._writer
        assert writer is not None
        refcounts = writer.refcounts
        with self._image.lock:
            while True:
                try:
                    return refcounts.allocate(1, for_metadata=True).first << self._bits
                except NotAtHandError:
                    refcounts.fetch()
