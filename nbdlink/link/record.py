"""What is known of an attached device beyond what the kernel tells: its name and its export.

One JSON file a device in /run/nbdlink, written whole or not at all. A record is believed only
while the kernel shows the same backend identifier and the same process (who attached it or, on
the ioctl road, holds it) for the device; one that is left over from an earlier use is nobody's.

Beside it, readable by root only, the number by which the server knows the device's channels
(`nbdlink.protocol.claim`). And for each link that was detached on purpose a mark, so that no
supervisor brings it back.

Whoever changes a device's connections holds its lock meanwhile (`held`), so that two never renew
the same one.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import cache, partial
from pathlib import Path
from typing import IO, Any, Final, Literal, get_origin, get_type_hints

from nbdlink.errors import ConfigError, DeviceBusyError, NBDError, is_shortage

DIRECTORY = Path(os.environ.get("NBDLINK_RUNTIME_DIRECTORY", "/run/nbdlink"))

TLSRoad = Literal["auto", "kernel", "relay"]
TLS_ROADS: Final = ("auto", "kernel", "relay")

_POLL_SECONDS: Final = 0.005


@dataclass(frozen=True, slots=True)
class Channel:
    """What is known of a connection that the kernel has.

    Attributes:
        tls: "none", "kernel" or "relay".
        version: "TLSv1.3" or "TLSv1.2", or None without TLS.
        cipher: the suite, or None.
        reason: why it is not the kernel that does TLS, or None.
        route: the URI that it was made to, or None if that is not known.
        cookie: by which the kernel's socket is known (`nbdlink.kernel.sockets`), or None.
        network: the network namespace in which that socket can be seen, or None.
        generation: how many attempts at a connection there were before it in its place.
        renewals: how many of them the kernel was given.
        relay: number of the process that does TLS for it, or None.
    """

    tls: str = "none"
    version: str | None = None
    cipher: str | None = None
    reason: str | None = None
    route: str | None = None
    cookie: int | None = None
    network: int | None = None
    generation: int = 0
    renewals: int = 0
    relay: int | None = None


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
        channels: what is known of each connection, in the order in which the kernel got them.
        spec: what was asked for (`nbdlink.link.spec.describe`), or empty if that is not known.
        size: the export's size in bytes, or None if that is not known.
        flags: its transmission flags.
        signature: what the server told to tell exports apart, or None.
        fences: whether the server lets nothing of a channel's predecessor live.
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
    channels: tuple[Channel, ...] = ()
    spec: dict[str, Any] = field(default_factory=dict, hash=False)
    size: int | None = None
    flags: int = 0
    signature: str | None = None
    fences: bool = False

    @property
    def title(self) -> str:
        """What it is called in messages."""
        return f"{self.name} (/dev/nbd{self.index})" if self.name else f"/dev/nbd{self.index}"

    def describes(self, backend: str | None, pid: int | None) -> bool:
        """Tell whether the device is still the one that was recorded.

        Args:
            backend: the backend identifier that the kernel shows.
            pid: the process that the kernel shows; None if nothing is attached.
        """
        if self.identifier and backend != self.identifier:
            return False
        # Of the netlink road it is who attached the device, as long as it is attached; so it
        # tells the link's uses apart. (It may be unknown there, in a container.)
        return pid == self.pid if self.pid is not None else bool(self.identifier)


def network() -> int | None:
    """Give what tells the network namespace of this process from others."""
    try:
        return Path("/proc/self/ns/net").stat().st_ino
    except OSError:
        return None


def write(record: Record) -> None:
    """Keep a record, atomically.

    Raises:
        NBDError: the directory cannot be written; the device works all the same.
    """
    import json

    # Neither `asdict`, which copies deeply, nor indented, which is not done in C: a record is
    # written twice while a device waits for a renewal, and was a third of its time.
    data = {each: getattr(record, each) for each in Record.__slots__}
    data["channels"] = [
        {each: getattr(channel, each) for each in Channel.__slots__} for channel in record.channels
    ]
    _write(_path(record.index), json.dumps(data) + "\n", 0o644)


def write_session(index: int, session: str) -> None:
    """Keep the secret by which the server knows a device's channels.

    Raises:
        NBDError: the directory cannot be written.
    """
    _write(_path(index).with_suffix(".session"), session, 0o600)


def read_session(index: int) -> str | None:
    """Give the secret by which the server knows a device's channels; None if there is none."""
    try:
        return _path(index).with_suffix(".session").read_text(encoding="ascii").strip() or None
    except (OSError, ValueError):
        return None


def _write(path: Path, text: str, mode: int) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_native_id()}")
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        temporary.touch(mode=mode)
        temporary.chmod(mode)  # whatever the umask
        temporary.write_text(text)
        temporary.rename(path)
    except OSError as error:
        # A supervisor tries again and again, each time in another thread.
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise NBDError(f"{path}: cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def locked(name: str, *, wait: bool = True) -> Iterator[None]:
    """Keep other processes and threads from attaching a link of this name meanwhile.

    Args:
        name: the link's.
        wait: for somebody who is at it.

    Raises:
        DeviceBusyError: somebody is, and it is not to be waited for.
        NBDError: the directory cannot be written, so names cannot be kept.
    """
    import fcntl

    hint = "run it as root, or attach without --name"
    with _lock_file(f"name-{name}.lock", hint) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise DeviceBusyError(f"the link {name!r} is being attached") from None
        yield


@contextlib.contextmanager
def held(index: int, wait: float = 0.0) -> Iterator[None]:
    """Keep other processes and threads from changing a device's connections meanwhile.

    Args:
        index: N of /dev/nbdN.
        wait: seconds to wait for somebody who is at it.

    Raises:
        DeviceBusyError: somebody still is.
        NBDError: the directory cannot be written.
    """
    import fcntl

    deadline = time.monotonic() + wait
    with _lock_file(f"nbd{index}.lock", "run it as root") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise DeviceBusyError(
                        f"/dev/nbd{index}: another process is renewing its connections",
                        hint="try again in a moment",
                    ) from None
                time.sleep(_POLL_SECONDS)  # a lock that is waited for knows no deadline
            else:
                break
        yield


def _lock_file(name: str, hint: str) -> IO[str]:
    # Whoever may open it may hold the lock, even for reading only; so nobody else may.
    try:
        DIRECTORY.mkdir(mode=0o755, parents=True, exist_ok=True)
        return open(DIRECTORY / name, "w", opener=partial(os.open, mode=0o600))
    except OSError as error:
        raise NBDError(
            f"{DIRECTORY} cannot be written, where locks are kept: {error.strerror}", hint=hint
        ) from None


def read(index: int) -> Record | None:
    """Give what was recorded of a device, or None if nothing (readable) was.

    What a later version has recorded besides is left out.

    Raises:
        NBDError: it cannot be read now, for want of a descriptor.
    """
    import json

    try:
        data: dict[str, Any] = json.loads(_path(index).read_text())
        known = _known(Record, data)
        known["channels"] = tuple(
            Channel(**_known(Channel, each)) for each in data.get("channels", ())
        )
        found = Record(**known)
    except OSError as error:
        if is_shortage(error):
            raise NBDError(
                f"{_path(index)} cannot be read: {os.strerror(error.errno or 0).lower()}"
            ) from None
        return None
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    return found if found.index == index and _is_sound(found) else None


def _is_sound(found: Record | Channel) -> bool:
    """Tell whether each value is of its kind: who reads them does not look."""
    of_channel = isinstance(found, Channel)
    return all(
        isinstance(getattr(found, name), kind) for name, kind in _kinds(of_channel).items()
    ) and (isinstance(found, Channel) or all(map(_is_sound, found.channels)))


@cache
def _kinds(of_channel: bool) -> dict[str, Any]:
    hints = get_type_hints(Channel if of_channel else Record)
    return {
        name: float | int if hint is float else _PLAIN.get(get_origin(hint), hint)
        for name, hint in hints.items()
    }


_PLAIN: Final[dict[Any, Any]] = {tuple: tuple, dict: dict}


def _known(kind: type[Any], data: dict[str, Any]) -> dict[str, Any]:
    return {each.name: data[each.name] for each in fields(kind) if each.name in data}


def read_all() -> list[Record]:
    """Give every readable record, by index."""
    stems = (path.stem[3:] for path in DIRECTORY.glob("nbd[0-9]*.json"))
    found = (read(int(stem)) for stem in stems if stem.isdigit())
    return sorted((record for record in found if record), key=lambda record: record.index)


def remove(index: int) -> None:
    """Forget a device."""
    for path in (_path(index), _path(index).with_suffix(".session")):
        with contextlib.suppress(OSError):
            path.unlink()


def mark_detached(name: str) -> None:
    """Note that a link was detached on purpose, so that no supervisor brings it back."""
    with contextlib.suppress(NBDError):  # then there is no supervisor of this machine either
        _write(_mark(name), "", 0o644)


def unmark_detached(name: str) -> None:
    """Forget that a link was detached on purpose."""
    with contextlib.suppress(OSError):
        _mark(name).unlink()


def is_detached(name: str) -> bool:
    """Tell whether a link was detached on purpose."""
    return _mark(name).exists()


def _mark(name: str) -> Path:
    return DIRECTORY / "detached" / name


def check_name(name: str) -> str:
    """Give `name` back if it can name a link.

    Raises:
        ConfigError: it could be mistaken for a path or a device, or cannot be a file's name.
    """
    if not name or len(name) > 64 or not all(c.isalnum() or c in "-_.:@" for c in name):
        raise ConfigError(
            f"{name!r} cannot name a link", hint="use up to 64 letters, digits, and - _ . : @"
        )
    if name.startswith("."):
        raise ConfigError(f"{name!r} cannot name a link", hint="it would be hidden, or a folder")
    if name.startswith("nbd") and name[3:].isdigit():
        raise ConfigError(f"{name!r} is the name of a device", hint="choose another name")
    return name


def _path(index: int) -> Path:
    return DIRECTORY / f"nbd{index}.json"
