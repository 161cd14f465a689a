"""Where things of a mirror lie: copies of its record, and the socket at which it is talked to.

Beside every regular file that is a member lies a copy, so that whoever has the file has the
record as well, and on the same disk, so that losing the one is losing the other. For members
beside which nothing can lie (devices, exports of other servers) one copy more is kept in the
state directory of this machine.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import Final

from nbdlink.errors import ConfigError, NBDError, StorageError
from nbdlink.storage.mirror.record import Entry, State, peek
from nbdlink.uri import Target, is_uri

SUFFIX: Final = ".mirror"
CENTRAL: Final = ""
"""The owner of the copy in the state directory: all members that cannot have their own."""
_DEVICE: Final = "device:"
_UDEV_TRAITS: Final = ("ID_SERIAL", "ID_WWN", "ID_PART_ENTRY_UUID", "DM_UUID", "MD_UUID")


def canonical(word: str) -> str:
    """Give the one way to write a member's address.

    Files are called by their real path, as their record has to lie beside them; devices by the
    path that was given, since the real one changes with the order in which they are found.
    """
    if is_uri(word):
        return str(Target.parse(word))
    path = Path(word)
    return os.path.abspath(path) if path.is_block_device() else os.path.realpath(path)  # noqa: PTH100 - no symbolic link is to be followed


def keeps_copy(address: str) -> bool:
    """Tell whether a copy of the record lies beside a member."""
    if is_uri(address) or address.startswith("/dev/"):
        return False
    return not Path(address).is_block_device()


def state_directory() -> Path:
    """Give where this user's programs keep what must not be lost.

    Raises:
        ConfigError: that is not told, and the user has no home.
    """
    if told := os.environ.get("NBDLINK_STATE_DIRECTORY"):
        return Path(told)
    if os.geteuid() == 0:
        return Path("/var/lib/nbdlink")
    if home := os.environ.get("XDG_STATE_HOME"):
        return Path(home) / "nbdlink"
    try:
        return Path.home() / ".local/state/nbdlink"
    except RuntimeError:
        raise ConfigError(
            f"user {os.geteuid()} has no home to keep records of mirrors in",
            hint="say another directory: NBDLINK_STATE_DIRECTORY=/path",
        ) from None


def runtime_directory() -> Path:
    """Give where sockets lie, for as long as the machine runs."""
    if told := os.environ.get("NBDLINK_RUNTIME_DIRECTORY"):
        return Path(told)
    if os.geteuid() == 0:
        return Path("/run/nbdlink")
    told = os.environ.get("XDG_RUNTIME_DIR")
    return Path(told) / "nbdlink" if told else state_directory()


def control_socket(mirror: str) -> Path:
    """Give the socket at which the server of a mirror listens to `nbdlink mirror`."""
    return runtime_directory() / f"mirror-{mirror}.sock"


def known_mirrors() -> dict[str, State | None]:
    """Give the numbers of the mirrors that this user serves, or has records of in one place."""
    paths = runtime_directory().glob("mirror-*.sock")
    found: dict[str, State | None] = {
        path.stem.removeprefix("mirror-"): None for path in sorted(paths)
    }
    for path in central_copies():
        if state := peek(path):
            found[state.mirror] = state
    return found


def owner(entry: Entry) -> str:
    """Give whose copy a member needs: its own, or the one of all that have none."""
    return entry.address if entry.keeps_copy else CENTRAL


def copy_path(mirror: str, owner: str) -> Path:
    """Give where a copy lies."""
    if owner == CENTRAL:
        return state_directory() / "mirrors" / (mirror + SUFFIX)
    return Path(owner + SUFFIX)


def central_copies() -> list[Path]:
    """Give the copies in the state directory."""
    try:
        folder = state_directory()
    except ConfigError:
        return []  # nor was there ever a place for one
    return sorted((folder / "mirrors").glob("*" + SUFFIX))


def copies_that_name(addresses: set[str]) -> list[Path]:
    """Give the copies that tell of members with these addresses.

    Those beside them, and those in the state directory that have one of them as a member.
    """
    beside = [Path(each + SUFFIX) for each in sorted(addresses) if not is_uri(each)]
    found = [path for path in beside if path.exists()]
    for path in central_copies():
        state = peek(path)
        if state and addresses & {entry.address for entry in state.members}:
            found.append(path)
    return found


def refuse_alone(word: str) -> None:
    """Refuse to write to a storage past the mirror of which it is a member.

    The mirror would believe that it has what the others have.

    Raises:
        StorageError: it is in a mirror's record.
    """
    try:
        names = {canonical(word)} if is_uri(word) else {canonical(word), os.path.realpath(word)}
        states = {path: peek(path) for path in [*copies_that_name(names), *central_copies()]}
    except (OSError, ValueError, NBDError):
        return  # the word is no good, which is said better by who opens it
    for path, state in states.items():
        if state and any(_is_called(entry.address, names) for entry in state.members):
            raise StorageError(
                f"{word} is a member of the mirror {state.mirror}, which would not know of what is "
                "written to it alone",
                hint="serve the mirror, or only read it; if there is no mirror any more, remove "
                f"{path}",
            )


def _is_called(address: str, names: set[str]) -> bool:
    """Tell whether a member has one of these names; a device may be recorded by a link to it."""
    return address in names or (not is_uri(address) and os.path.realpath(address) in names)


def device_identity(path: str) -> str | None:
    """Give what tells a block device from others that come by its path later, or None."""
    try:
        status = os.stat(path)  # noqa: PTH116 - a member's address is a word
    except OSError:
        return None
    if not stat.S_ISBLK(status.st_mode):
        return None
    number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    traits = []
    try:
        for line in Path(f"/run/udev/data/b{number}").read_text(errors="replace").splitlines():
            kind, _, setting = line.partition(":")
            if kind == "E" and setting.partition("=")[0] in _UDEV_TRAITS:
                traits.append(setting)
    except OSError:
        pass
    for name in ("wwid", "serial", "device/wwid", "device/serial", "loop/backing_file"):
        try:
            text = Path(f"/sys/dev/block/{number}/{name}").read_text(errors="replace").strip()
        except OSError:
            continue
        traits.append(f"{name} {text}")
    if not traits:
        return None
    return _DEVICE + hashlib.blake2b("\n".join(sorted(traits)).encode(), digest_size=16).hexdigest()


def is_device_identity(identity: str) -> bool:
    """Tell whether `device_identity` gave this."""
    return identity.startswith(_DEVICE)
