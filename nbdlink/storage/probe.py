"""What format an image has, by the first bytes of its file.

A guest that has a raw image can write these bytes, too. So a format that was only found may be
believed, but an image that was found to be raw must stay it: see `FirstSector`.

The signs are those of QEMU's drivers (`bdrv_probe`), so that both come to the same result.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable
from typing import Final

SECTOR: Final = 512
"""Bytes that are looked at."""

RAW: Final = "raw"

_U32 = struct.Struct(">I")
_VDI_MAGIC: Final = b"\x7f\x10\xda\xbe"
_VMDK_TEXT: Final = re.compile(rb"(?:#[^\n]*\n| +\r?\n)*version=[123]\r?\n")


def _qcow(*versions: int) -> Callable[[bytes], bool]:
    def test(head: bytes) -> bool:
        return head.startswith(b"QFI\xfb") and _U32.unpack_from(head, 4)[0] in versions

    return test


def _begins(*magics: bytes) -> Callable[[bytes], bool]:
    return lambda head: head.startswith(magics)


def _is_vmdk(head: bytes) -> bool:
    return head.startswith((b"KDMV", b"COWD")) or _VMDK_TEXT.match(head) is not None


_TESTS: Final[dict[str, Callable[[bytes], bool]]] = {
    "qcow2": _qcow(2, 3),
    "qcow": _qcow(1),
    "vmdk": _is_vmdk,
    "vdi": lambda head: head[0x40:0x44] == _VDI_MAGIC,
    "vpc": _begins(b"conectix"),
    "vhdx": _begins(b"vhdxfile"),
    "qed": _begins(b"QED\0"),
    "luks": lambda head: head.startswith(b"LUKS\xba\xbe\0\x01"),
    "parallels": lambda head: (
        head.startswith((b"WithoutFreeSpace", b"WithouFreSpacExt")) and head[16:20] == b"\x02\0\0\0"
    ),
    "bochs": lambda head: (
        head.startswith(b"Bochs Virtual HD Image\0")
        and head[32:40] == b"Redolog\0"
        and head[48:56] == b"Growing\0"
    ),
    "cloop": _begins(
        b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"
    ),
}

KNOWN: Final = (RAW, *_TESTS)
"""The formats that are told apart."""


def format_of(head: bytes) -> str:
    """Give the format of an image.

    Args:
        head: what its file begins with, 512 bytes or all that there are.
    """
    head = head[:SECTOR].ljust(SECTOR, b"\0")
    return next((name for name, test in _TESTS.items() if test(head)), RAW)


def probe(path: str | os.PathLike[str]) -> str:
    """Look what format the image in a file has; raw if it cannot be read."""
    try:
        # Not blocking: whoever serves it will say that it is a FIFO.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return RAW
    try:
        return format_of(os.pread(fd, SECTOR, 0))
    except OSError:
        return RAW
    finally:
        os.close(fd)
