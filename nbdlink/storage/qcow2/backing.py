"""What lies behind an image: backing files and external data files, by the names recorded in it.

Names of backing files are relative to the folder of the image that records them, and names of
data files to the current one, as QEMU 7.2 has it (`qcow2_do_open` does not join the two). What is
said to whoever opens an image counts more than what it records (`Chain`). All of the chain is
opened for reading only.

A missing backing format is found out by looking at the file, as QEMU does. That is not safe
where a guest can write to a raw backing file: it may write a header there that names any file
of this machine. QEMU's tools record the format nowadays, and an image that does not can be
given it with `qemu-img rebase -u -F`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final, NamedTuple

from nbdlink.errors import StorageError
from nbdlink.storage.chain import Chain
from nbdlink.storage.qcow2.header import Header, is_qcow2

MAX_DEPTH: Final = 200
"""Images in the longest chain."""

_MAGICS: Final = (
    (b"KDMV", "vmdk"),
    (b"# Disk DescriptorFile", "vmdk"),
    (b"<<< ", "vdi"),
    (b"vhdxfile", "vhdx"),
    (b"conectix", "vpc"),
    (b"QED\0", "qed"),
    (b"QFI\xfb\0\0\0\1", "qcow"),
    (b"LUKS\xba\xbe", "luks"),
    (b"WithoutFreeSpace", "parallels"),
    (b"WithouFreSpacExt", "parallels"),
)


class Place(NamedTuple):
    """Where a recorded name leads.

    Attributes:
        path: of the file.
        format: `raw` or `qcow2`, or None if it has to be found out.
    """

    path: Path
    format: str | None


def backing_of(chain: Chain, image: str, header: Header, *, is_file: bool) -> Place | None:
    """Tell where an image's backing file is; None if it has none.

    Args:
        chain: what is said of it.
        image: path of the image.
        header: what it records.
        is_file: whether the image is a file, and thereby in a folder.

    Raises:
        StorageError: it is nothing that can be opened here.
    """
    said = chain.backing
    if said is not None and said.path is not None:
        return Place(said.path, said.format or header.backing_format)
    if not chain.has_backing or header.backing_file is None:
        if said is not None:
            raise StorageError(
                f"{image} records no backing file", hint="say backing.file.filename=PATH"
            )
        return None
    format_ = (said and said.format) or header.backing_format
    return place_of(image, header.backing_file, format_, is_file=is_file)


def place_of(image: str, name: str, format_: str | None, *, is_file: bool = True) -> Place:
    """Follow a recorded name.

    Args:
        image: path of the image that records it.
        name: what is recorded.
        format_: the format, or None.
        is_file: whether the image is a file, and thereby in a folder.

    Raises:
        StorageError: it is nothing that can be opened here.
    """
    if name.startswith("json:"):
        name, within = _json_name(image, name)
        format_ = within or format_
    name = name.removeprefix("file:")
    scheme = name.split(":", 1)[0]
    if ":" in name and "/" not in scheme and not (Path(image).parent / name).exists():
        raise StorageError(
            f"{image}: its backing file {name!r} is reached by {scheme}, not as a file",
            hint="only local files can back an image",
        )
    if format_ in ("file", "host_device"):
        format_ = "raw"
    if format_ not in (None, "raw", "qcow2"):
        raise StorageError(
            f"{image}: its backing file {name!r} is in the format {format_}",
            hint="raw and qcow2 can back an image",
        )
    if not is_file and not Path(name).is_absolute():
        raise StorageError(
            f"{image}: its backing file {name!r} is recorded without a folder, and an export is "
            "in none",
            hint="say where it is: --image-opts driver=qcow2,backing.file.filename=PATH,...",
        )
    return Place(Path(image).parent / name, format_)


def _json_name(image: str, name: str) -> tuple[str, str | None]:
    refusal = StorageError(
        f"{image}: its backing file is described by {name!r}",
        hint="of such names only driver, file.driver and file.filename are understood",
    )
    try:
        options: Any = json.loads(name.removeprefix("json:"))
    except (ValueError, RecursionError):
        raise refusal from None
    if not isinstance(options, dict):
        raise refusal
    flat = _flat(options)
    driver = flat.pop("driver", None)
    below = flat.pop("file.driver", "file")
    path = flat.pop("file.filename", None)
    if driver in ("file", "host_device") and path is None:
        path, driver = flat.pop("filename", None), "raw"
    known = below in ("file", "host_device") and isinstance(path, str) and not flat
    if not known or driver not in (None, "raw", "qcow2"):
        raise refusal
    assert isinstance(path, str)
    return path, driver


def _flat(options: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in options.items():
        if key == "file" and isinstance(value, dict):
            flat |= {f"file.{inner}": v for inner, v in value.items()}
        else:
            flat[key] = value
    return flat


def probe(path: str, head: bytes) -> str:
    """Tell the format of a file by its first bytes: `qcow2`, or `raw` if nothing else.

    Raises:
        StorageError: it is in a format that cannot back an image here.
    """
    if is_qcow2(head):
        return "qcow2"
    for magic, word in _MAGICS:
        if head.startswith(magic):
            raise StorageError(
                f"{path} is in the format {word}", hint="raw and qcow2 can back an image"
            )
    return "raw"
