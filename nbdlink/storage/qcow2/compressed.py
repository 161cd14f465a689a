"""Compressed clusters: unpacking, with a few of the last ones kept.

An image never makes a compressed cluster here, and one that is overwritten becomes a standard
one, so a descriptor means the same bytes for as long as the image is open.
"""

from __future__ import annotations

import errno
import threading
import zlib
from typing import TYPE_CHECKING, Any, Final

from nbdlink.errors import StorageError
from nbdlink.storage.extras import installation
from nbdlink.storage.imagefile import ImageFile
from nbdlink.storage.qcow2.header import Compression
from nbdlink.storage.qcow2.tables import Geometry

if TYPE_CHECKING:
    from collections.abc import Callable

_KEPT: Final = 4 << 20
"""Bytes of unpacked clusters that are kept."""

_ZSTD_WINDOW: Final = 8 << 20
"""Bytes of the largest window that is accepted; QEMU's is as large as a cluster at most."""


def _inflate(data: bytes, size: int) -> bytes:
    # Raw deflate. QEMU makes it with a window of 4 KiB; reading the largest possible one costs
    # nothing, and other writers may have used it.
    return zlib.decompressobj(-15).decompress(data, size)


def _zstd(name: str) -> Callable[[bytes, int], bytes]:
    try:
        import zstandard
    except ImportError:
        raise StorageError(
            f"{name} has clusters compressed by zstd, which needs the Python package zstandard",
            hint=installation("zstandard"),
        ) from None

    def unpack(data: bytes, size: int) -> bytes:
        # One for each use: they are not safe with threads.
        unpacker: Any = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
        try:
            unpacked: bytes = unpacker.stream_reader(data).read(size)
        except zstandard.ZstdError as error:
            raise zlib.error(str(error)) from None
        return unpacked

    return unpack


class CompressedClusters:
    """Reads compressed clusters of one image."""

    def __init__(self, file: ImageFile, geometry: Geometry, method: Compression) -> None:
        """Prepare to read.

        Args:
            file: where the clusters are.
            geometry: of the image.
            method: of all compressed clusters of the image.

        Raises:
            StorageError: what the method needs is not installed.
        """
        self._file = file
        self._geometry = geometry
        self._unpack = _zstd(file.name) if method is Compression.ZSTD else _inflate
        self._kept: dict[int, bytes] = {}
        self._lock = threading.Lock()
        self._most = max(2, _KEPT // geometry.cluster_size)

    def read(self, entry: int) -> bytes:
        """Give the cluster that an L2 entry describes.

        Raises:
            OSError: EIO, it is damaged; or it cannot be read.
        """
        kept = self._kept.get(entry)
        if kept is not None:
            return kept
        offset, length = self._geometry.compressed_area(entry)
        packed = bytearray(length)
        self._file.read_at(memoryview(packed), offset)
        size = self._geometry.cluster_size
        try:
            cluster = self._unpack(bytes(packed), size)
        except (zlib.error, EOFError) as error:
            raise OSError(
                errno.EIO, f"{self._file.name}: compressed cluster at {offset:#x}: {error}"
            ) from None
        if len(cluster) != size:
            raise OSError(
                errno.EIO, f"{self._file.name}: the compressed cluster at {offset:#x} is too short"
            )
        with self._lock:
            while len(self._kept) >= self._most:
                del self._kept[next(iter(self._kept))]
            self._kept[entry] = cluster
        return cluster
