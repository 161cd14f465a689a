"""The header of a qcow2 image: what it says, and whether an image of that kind can be served.

Pure: bytes in, a `Header` out, and small patches of bytes back. Sections named here are those of
the specification, docs/interop/qcow2.rst in QEMU's sources. Everything that a later allocation
depends on is checked against the file's size before anybody allocates it.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Final

from nbdlink.errors import StorageError

MAGIC: Final = b"QFI\xfb"
HEAD_LENGTH: Final = 112
"""Bytes that tell how long the first cluster is, and all fields that are known."""

MIN_CLUSTER_BITS: Final = 9
MAX_CLUSTER_BITS: Final = 21
MAX_L1_SIZE: Final = 32 << 20
"""Bytes in the longest L1 table; QEMU's limit."""
MAX_REFCOUNT_TABLE_SIZE: Final = 8 << 20
"""Bytes in the longest refcount table; QEMU's limit."""
MAX_SNAPSHOTS: Final = 65536
MAX_BACKING_NAME: Final = 1023
MAX_BITMAPS: Final = 65535

_BASE: Final = struct.Struct(">4sIQIIQIIQQIIQ")
_VERSION_3: Final = struct.Struct(">QQQII")
_EXTENSION: Final = struct.Struct(">II")
_BITMAPS: Final = struct.Struct(">IIQQ")
_FEATURES: Final = struct.Struct(">QQQ")
_REFCOUNT_TABLE: Final = struct.Struct(">QI")
_REFCOUNT_TABLE_AT: Final = 48
_COMPRESSION_AT: Final = 104
_FEATURE_NAME: Final = 48

_ENCRYPTION: Final = {1: "AES", 2: "LUKS"}


class Incompatible(enum.IntFlag):
    """Features that who does not know them must not open an image with."""

    DIRTY = 1 << 0
    CORRUPT = 1 << 1
    DATA_FILE = 1 << 2
    COMPRESSION = 1 << 3
    EXTENDED_L2 = 1 << 4


class Compatible(enum.IntFlag):
    """Features that may be ignored."""

    LAZY_REFCOUNTS = 1 << 0


class Autoclear(enum.IntFlag):
    """Features whose bit must be cleared by a writer that does not care for them."""

    BITMAPS = 1 << 0
    RAW_DATA_FILE = 1 << 1


class Compression(enum.IntEnum):
    """How compressed clusters are compressed."""

    DEFLATE = 0
    ZSTD = 1


class ExtensionType(enum.IntEnum):
    """Header extensions that mean something to this driver."""

    END = 0
    BACKING_FORMAT = 0xE2792ACA
    FEATURE_NAMES = 0x6803F857
    BITMAPS = 0x23852875
    ENCRYPTION = 0x0537BE77
    DATA_FILE = 0x44415441


@dataclass(frozen=True, slots=True)
class BitmapsExtension:
    """Where the bitmap directory is.

    Attributes:
        count: bitmaps.
        size: bytes of the directory.
        offset: of the directory in the file.
    """

    count: int
    size: int
    offset: int


@dataclass(frozen=True, slots=True)
class Header:
    """An image's header that has been found sane.

    Attributes:
        version: 2 or 3.
        cluster_bits: log2 of the cluster size.
        size: bytes of the virtual disk.
        l1_size: entries of the active L1 table.
        l1_offset: of the active L1 table.
        refcount_table_offset: where the refcount table starts.
        refcount_table_clusters: its length.
        refcount_order: log2 of a refcount's width in bits.
        snapshot_count: internal snapshots.
        snapshots_offset: where the snapshot table starts.
        incompatible: feature bits.
        compatible: feature bits; unknown ones are kept.
        autoclear: feature bits; unknown ones are kept until the image is written to.
        compression: of compressed clusters.
        backing_file: the recorded name, or None.
        backing_format: the recorded format, or None.
        data_file: the recorded name of the external data file, or None.
        bitmaps: the bitmaps extension, whether consistent or not, or None.
        feature_names: by kind (0, 1, 2) and bit.
    """

    version: int
    cluster_bits: int
    size: int
    l1_size: int
    l1_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    refcount_order: int = 4
    snapshot_count: int = 0
    snapshots_offset: int = 0
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    compression: Compression = Compression.DEFLATE
    backing_file: str | None = None
    backing_format: str | None = None
    data_file: str | None = None
    bitmaps: BitmapsExtension | None = None
    feature_names: dict[tuple[int, int], str] = field(default_factory=dict)

    @property
    def cluster_size(self) -> int:
        """Bytes of a cluster."""
        return 1 << self.cluster_bits

    @property
    def has_data_file(self) -> bool:
        """Whether guest clusters are in another file."""
        return bool(self.incompatible & Incompatible.DATA_FILE)

    @property
    def raw_data_file(self) -> bool:
        """Whether the external data file is a raw image by itself, and has to stay one."""
        return bool(self.autoclear & Autoclear.RAW_DATA_FILE)

    @property
    def extended_l2(self) -> bool:
        """Whether clusters are allocated in subclusters."""
        return bool(self.incompatible & Incompatible.EXTENDED_L2)

    @property
    def is_dirty(self) -> bool:
        """Whether refcounts may be wrong."""
        return bool(self.incompatible & Incompatible.DIRTY)

    @property
    def is_corrupt(self) -> bool:
        """Whether somebody has found the image damaged."""
        return bool(self.incompatible & Incompatible.CORRUPT)

    @property
    def l2_entry_size(self) -> int:
        """Bytes of an L2 entry."""
        return 16 if self.extended_l2 else 8

    @property
    def has_consistent_bitmaps(self) -> bool:
        """Whether the bitmaps extension is there and was kept up to date."""
        return self.bitmaps is not None and bool(self.autoclear & Autoclear.BITMAPS)

    def with_features(
        self, *, incompatible: int | None = None, autoclear: int | None = None
    ) -> tuple[Header, int, bytes]:
        """Give the header with other feature bits, and the patch: its position and bytes.

        Only version 3 has feature bits.
        """
        header = replace(
            self,
            incompatible=self.incompatible if incompatible is None else incompatible,
            autoclear=self.autoclear if autoclear is None else autoclear,
        )
        patch = _FEATURES.pack(header.incompatible, header.compatible, header.autoclear)
        return header, _BASE.size, patch

    def with_refcount_table(self, offset: int, clusters: int) -> tuple[Header, int, bytes]:
        """Give the header with another refcount table, and the patch: its position and bytes.

        The two fields are in the same sector, so that the change happens as a whole or not.
        """
        header = replace(self, refcount_table_offset=offset, refcount_table_clusters=clusters)
        return header, _REFCOUNT_TABLE_AT, _REFCOUNT_TABLE.pack(offset, clusters)


def is_qcow2(head: bytes) -> bool:
    """Tell whether a file that begins like this is a qcow2 image (version 2 and later)."""
    return head[:4] == MAGIC and head[4:8] not in (b"", b"\0\0\0\1")


def first_cluster(name: str, head: bytes) -> int:
    """Give the bytes of the first cluster, where the whole header is.

    Args:
        name: for messages.
        head: the first `HEAD_LENGTH` bytes.

    Raises:
        StorageError: it is not a qcow2 image, or not one that this driver knows.
    """
    magic, version, *_ = _BASE.unpack_from(head.ljust(_BASE.size, b"\0"))
    if magic != MAGIC:
        raise StorageError(
            f"{name} is not a qcow2 image", hint="`qemu-img info` tells what it is, or leave out -f"
        )
    if version not in (2, 3):
        raise StorageError(
            f"{name}: version {version} of the format is unknown",
            hint="versions 2 and 3 can be served; convert it with qemu-img convert",
        )
    bits = _BASE.unpack_from(head.ljust(_BASE.size, b"\0"))[4]
    if not MIN_CLUSTER_BITS <= bits <= MAX_CLUSTER_BITS:
        raise StorageError(f"{name}: clusters of 2^{bits} bytes; 2^9 to 2^21 are possible")
    return 1 << int(bits)


def parse_header(name: str, cluster: bytes, file_size: int) -> Header:
    """Read the header and its extensions.

    Args:
        name: for messages.
        cluster: the first cluster, see `first_cluster`.
        file_size: bytes of the whole file; no table may lie behind it.

    Raises:
        StorageError: the image is damaged, or needs what this driver does not know.
    """
    if file_size < _BASE.size:
        raise StorageError(f"{name} has {file_size} bytes only, and its header has {_BASE.size}")
    (
        *_ignored,
        version,
        backing_offset,
        backing_length,
        bits,
        size,
        crypt,
        l1_size,
        l1_offset,
        table_offset,
        table_clusters,
        snapshot_count,
        snapshots_offset,
    ) = _BASE.unpack_from(cluster)
    header = Header(
        version=version,
        cluster_bits=bits,
        size=size,
        l1_size=l1_size,
        l1_offset=l1_offset,
        refcount_table_offset=table_offset,
        refcount_table_clusters=table_clusters,
        snapshot_count=snapshot_count,
        snapshots_offset=snapshots_offset,
    )
    length = _BASE.size
    if version >= 3:
        incompatible, compatible, autoclear, order, length = _VERSION_3.unpack_from(
            cluster, _BASE.size
        )
        if length < _BASE.size + _VERSION_3.size or length % 8 or length > len(cluster):
            raise StorageError(f"{name}: the header says that it has {length} bytes")
        if order > 6:
            raise StorageError(f"{name}: refcounts of 2^{order} bits; at most 64 are possible")
        header = replace(
            header,
            incompatible=incompatible,
            compatible=compatible,
            autoclear=autoclear,
            refcount_order=order,
        )
    header = _with_extensions(name, header, cluster, length, backing_offset)
    _refuse_unknown(name, header)
    if crypt:
        what = _ENCRYPTION.get(crypt, f"method {crypt}")
        raise StorageError(
            f"{name} is encrypted ({what})",
            hint="encrypted images cannot be served; decrypt it with qemu-img convert",
        )
    header = _with_compression(name, header, cluster, length)
    if backing_offset:
        if backing_length > MAX_BACKING_NAME:
            raise StorageError(f"{name}: the backing file's name has {backing_length} bytes")
        end = backing_offset + backing_length
        if backing_offset < length or end > len(cluster):
            raise StorageError(f"{name}: the backing file's name is not in the first cluster")
        backing = _text(cluster[backing_offset:end])
        header = replace(header, backing_file=backing or None)
    _check_tables(name, header, file_size)
    _check_combinations(name, header)
    return header


def _text(data: bytes) -> str:
    # As os.fsdecode, which would make this module import os.
    return data.decode(errors="surrogateescape")


def _extensions(name: str, cluster: bytes, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    position = start
    while position + _EXTENSION.size <= end:
        kind, length = _EXTENSION.unpack_from(cluster, position)
        if kind == ExtensionType.END:
            return
        position += _EXTENSION.size
        if length > end - position:
            raise StorageError(f"{name}: header extension {kind:#010x} is too long ({length})")
        yield kind, cluster[position : position + length]
        position += -(-length // 8) * 8


def _with_extensions(
    name: str, header: Header, cluster: bytes, start: int, backing_offset: int
) -> Header:
    # The backing file's name lies behind the extensions; without one they may fill the cluster.
    end = backing_offset if start < backing_offset <= len(cluster) else len(cluster)
    for kind, data in _extensions(name, cluster, start, end):
        match kind:
            case ExtensionType.BACKING_FORMAT:
                header = replace(header, backing_format=_text(data))
            case ExtensionType.DATA_FILE:
                header = replace(header, data_file=_text(data))
            case ExtensionType.FEATURE_NAMES:
                header = replace(header, feature_names=_feature_names(data))
            case ExtensionType.BITMAPS:
                header = replace(header, bitmaps=_bitmaps(name, header, data))
    return header


def _feature_names(data: bytes) -> dict[tuple[int, int], str]:
    names = {}
    for at in range(0, len(data) - _FEATURE_NAME + 1, _FEATURE_NAME):
        words = data[at + 2 : at + _FEATURE_NAME].split(b"\0")[0].decode(errors="replace")
        # It is shown to people: no control characters.
        names[data[at], data[at + 1]] = "".join(c if c.isprintable() else "?" for c in words)
    return names


def _bitmaps(name: str, header: Header, data: bytes) -> BitmapsExtension | None:
    if len(data) != _BITMAPS.size:
        raise StorageError(f"{name}: the bitmaps extension has {len(data)} bytes, not 24")
    count, reserved, size, offset = _BITMAPS.unpack(data)
    if not header.autoclear & Autoclear.BITMAPS:
        # Written to by somebody who knew nothing of bitmaps: nothing here can be trusted.
        return None
    if reserved or not 0 < count <= MAX_BITMAPS:
        raise StorageError(f"{name}: the bitmaps extension is damaged")
    return BitmapsExtension(count, size, offset)


def _refuse_unknown(name: str, header: Header) -> None:
    known = sum(Incompatible)
    unknown = [bit for bit in range(64) if header.incompatible & ~known & 1 << bit]
    if unknown:
        words = ", ".join(header.feature_names.get((0, bit), f"bit {bit}") for bit in unknown)
        raise StorageError(
            f"{name} uses features that are not known here: {words}",
            hint="convert it with the program that made it",
        )


def _with_compression(name: str, header: Header, cluster: bytes, length: int) -> Header:
    method = cluster[_COMPRESSION_AT] if length > _COMPRESSION_AT else 0
    flagged = bool(header.incompatible & Incompatible.COMPRESSION)
    if flagged != bool(method):
        raise StorageError(f"{name}: the header contradicts itself on the compression type")
    try:
        return replace(header, compression=Compression(method))
    except ValueError:
        raise StorageError(f"{name}: compression type {method} is unknown") from None


def _check_tables(name: str, header: Header, file_size: int) -> None:
    cluster = header.cluster_size
    clusters = -(-file_size // cluster)
    for what, offset, length, limit in (
        ("L1 table", header.l1_offset, header.l1_size * 8, MAX_L1_SIZE),
        (
            "refcount table",
            header.refcount_table_offset,
            header.refcount_table_clusters * cluster,
            MAX_REFCOUNT_TABLE_SIZE,
        ),
    ):
        check_area(name, what, offset, length, limit, cluster, clusters)
    if not header.refcount_table_clusters:
        raise StorageError(f"{name} has no refcount table")
    if header.snapshot_count > MAX_SNAPSHOTS:
        raise StorageError(f"{name}: {header.snapshot_count} snapshots are too many")
    if header.snapshot_count:
        check_area(name, "snapshot table", header.snapshots_offset, 1, 1, cluster, clusters)
    if header.bitmaps:
        check_area(
            name,
            "bitmap directory",
            header.bitmaps.offset,
            header.bitmaps.size,
            MAX_BITMAPS * 1088,
            cluster,
            clusters,
        )
    covered = (cluster // header.l2_entry_size) * cluster
    if header.size > header.l1_size * covered:
        raise StorageError(f"{name}: the L1 table is too short for {header.size} bytes")
    if header.size >= 1 << 63:
        raise StorageError(f"{name}: {header.size} bytes are more than can be served")


def check_area(
    name: str, what: str, offset: int, length: int, limit: int, cluster: int, clusters: int
) -> None:
    """See that a table begins at a cluster and is inside the file.

    Args:
        name: of the file.
        what: the table, for the message.
        offset: where it starts; only an empty one may start at 0, where the header is.
        length: its bytes.
        limit: more bytes than this are refused.
        cluster: bytes of a cluster.
        clusters: clusters of the file; the last may be there in part only.

    Raises:
        StorageError: it is not so.
    """
    if length > limit:
        raise StorageError(f"{name}: the {what} has {length} bytes; {limit} are possible")
    if offset % cluster:
        raise StorageError(f"{name}: the {what} at {offset:#x} does not begin at a cluster")
    if length and (not offset or offset + length > clusters * cluster):
        raise StorageError(f"{name}: the {what} at {offset:#x} is not inside of the file")


def _check_combinations(name: str, header: Header) -> None:
    if header.extended_l2 and header.cluster_bits < 14:
        raise StorageError(f"{name}: extended L2 entries need clusters of 16 KiB or more")
    if header.has_data_file and header.snapshot_count:
        raise StorageError(f"{name} has both an external data file and snapshots")
    if header.raw_data_file and not header.has_data_file:
        raise StorageError(f"{name}: a raw external data file that is not there is promised")
    if header.raw_data_file and header.backing_file:
        raise StorageError(f"{name} has both a raw external data file and a backing file")
    if header.autoclear & Autoclear.BITMAPS and header.bitmaps is None:
        raise StorageError(f"{name}: bitmaps are promised, but not there")
