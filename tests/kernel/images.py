"""Images as bytes: a partition table, a file system, a swap area."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

SECTOR = 512
_MBR_ENTRY = struct.Struct("<B3sB3sII")


def with_partitions(size: int, *parts: tuple[int, int]) -> bytearray:
    """Make an image whose MBR lists (first sector, sectors)."""
    image = bytearray(size)
    for number, (first, sectors) in enumerate(parts):
        entry = _MBR_ENTRY.pack(0, b"\0\2\0", 0x83, b"\0\3\0", first, sectors)
        image[446 + 16 * number : 462 + 16 * number] = entry
    image[510:512] = b"\x55\xaa"
    return image


def with_filesystem(size: int, folder: Path) -> bytearray:
    """Make an ext4 image."""
    path = folder / "ext4.img"
    path.write_bytes(bytes(size))
    subprocess.run(
        ["/sbin/mkfs.ext4", "-q", "-F", "-O", "^has_journal", str(path)],
        check=True,
        capture_output=True,
    )
    return bytearray(path.read_bytes())


def with_swap(size: int, folder: Path) -> bytearray:
    """Make a swap area."""
    path = folder / "swap.img"
    path.write_bytes(bytes(size))
    path.chmod(0o600)
    subprocess.run(["/sbin/mkswap", str(path)], check=True, capture_output=True)
    return bytearray(path.read_bytes())
