"""What is known of an attached device beyond what the kernel tells: its name and its export.

One JSON file a device in /run/nbdlink, written whole or not at all. A record is believed only
while the kernel shows the same backend identifier (or, for a device of the ioctl road, the
same holder) for the device; one that is left over from an earlier use is nobody's.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nbdlink.errors import ConfigError, NBDError

DIRECTORY = Path(os.environ.get("NBDLINK_RUNTIME_DIRECTORY", "/run/nbdlink"))


@dataclass(frozen=True, slots=True)
class Record:
    """One attached device.

    Attributes:
        index: N of /dev/nbdN.
        name: the link's name, or None.
        target: the export's URI.
        connections: how many sockets the kernel was given.
        read_only: whether read-only was asked for or announced.
        block_size: logical block size in bytes.
        timeout: seconds a request may take.
        dead_timeout: seconds I/O waits once no connection is left.
        road: "netlink" or "ioctl".
        identifier: the backend identifier that the kernel shows; empty on the ioctl road.
        pid: the process that the kernel shows for the device.
        attached_at: seconds since the epoch.
        channels: what is known of each connection (`Channel`), as far as it was recorded.
        tls: what was demanded of TLS (`TLSOptions` and the road), or empty if it is not known.
        relay: number of the process that does TLS for some of them, or None.
    """

    index: int
    name: str | None
    target: str
    connections: int
    read_only: bool
    block_size: int
    timeout: int
    dead_timeout: int
    road: str
    identifier: str
    pid: int | None
    attached_at: float = field(default_factory=time.time)
    channels: list[dict[str, str | None]] = field(default_factory=list)
    relay: int | None = None
    tls: dict[str, Any] = field(default_factory=dict)

    def describes(self, backend: str | None, pid: int | None) -> bool:
        """Tell whether the device is still the one that was recorded."""
        if self.identifier:
            return backend == self.identifier
        return self.pid is not None and pid == self.pid


def write(record: Record) -> None:
    """Keep a record, atomically.

    Raises:
        NBDError: the directory cannot be written; the device works all the same.
    """
    import json

    path = _path(record.index)
    try:
        DIRECTORY.mkdir(mode=0o755, parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(asdict(record), indent=1) + "\n")
        temporary.rename(path)
    except OSError as error:
        raise NBDError(f"{path}: cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Keep other processes from attaching links by name meanwhile.

    Raises:
        NBDError: the directory cannot be written, so names cannot be kept.
    """
    import fcntl

    try:
        DIRECTORY.mkdir(mode=0o755, parents=True, exist_ok=True)
        lock = (DIRECTORY / "lock").open("w")
    except OSError as error:
        raise NBDError(
            f"{DIRECTORY} cannot be written, and names are kept there: {error.strerror}",
            hint="run it as root, or attach without --name",
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def read(index: int) -> Record | None:
    """Give what was recorded of a device, or None if nothing (readable) was."""
    import json

    try:
        data: dict[str, Any] = json.loads(_path(index).read_text())
        return Record(**data)
    except (OSError, ValueError, TypeError):
        return None


def read_all() -> list[Record]:
    """Give every readable record, by index."""
    stems = (path.stem[3:] for path in DIRECTORY.glob("nbd[0-9]*.json"))
    found = (read(int(stem)) for stem in stems if stem.isdigit())
    return sorted((record for record in found if record), key=lambda record: record.index)


def remove(index: int) -> None:
    """Forget a device."""
    with contextlib.suppress(OSError):
        _path(index).unlink()


def check_name(name: str) -> str:
    """Give `name` back if it can name a link.

    Raises:
        ConfigError: it could be mistaken for a path or a device, or cannot be a file's name.
    """
    if not name or len(name) > 64 or not all(c.isalnum() or c in "-_.:@" for c in name):
        raise ConfigError(
            f"{name!r} cannot name a link", hint="use up to 64 letters, digits, and - _ . : @"
        )
    if name.startswith("nbd") and name[3:].isdigit():
        raise ConfigError(f"{name!r} is the name of a device", hint="choose another name")
    return name


def _path(index: int) -> Path:
    return DIRECTORY / f"nbd{index}.json"
