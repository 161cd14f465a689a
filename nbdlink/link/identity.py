"""Whether it is still the same: the export that a server offers, and the device that is renewed.

An export's size and flags must be what the device was attached to, and its signature, where the
server tells one. A device is the one that was recorded for as long as nobody has detached it.
"""

from __future__ import annotations

from typing import Final

from nbdlink.client.export import NegotiatedExport
from nbdlink.errors import ForeignExportError, KernelError
from nbdlink.kernel import sysfs
from nbdlink.link import record
from nbdlink.link.record import Record
from nbdlink.link.spec import SECTOR
from nbdlink.protocol.constants import TransmissionFlag
from nbdlink.uri import Target

_NEEDED: Final = (
    TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    | TransmissionFlag.SEND_TRIM
    | TransmissionFlag.SEND_WRITE_ZEROES
    | TransmissionFlag.CAN_MULTI_CONN
)
"""What the kernel was told of a server, and goes on believing of its successor."""


def verify(known: Record, route: Target, export: NegotiatedExport) -> None:
    """Refuse an export that is not the one that the device was attached to.

    Raises:
        ForeignExportError: the message says in what they differ.
    """
    same = known.name or f"/dev/nbd{known.index}"
    where = f"{route.address}: the export {route.export!r} is not the one that {same} has"
    proved = is_proved(known, route, export.testimony.signature)
    size = export.size if known.size is None else known.size
    # Whole sectors: the size of a device that was adopted is the kernel's, which knows no others.
    if export.size < size or (export.size // SECTOR > size // SECTOR and not proved):
        raise ForeignExportError(
            f"{where}: it has {export.size} bytes, not {known.size}",
            hint=f"if it is the same and has grown: nbdlink resize {same}",
        )
    if export.minimum_block > known.block_size:
        raise ForeignExportError(
            f"{where}: it demands blocks of {export.minimum_block} bytes, not {known.block_size}"
        )
    if export.read_only and not known.read_only:
        raise ForeignExportError(f"{where}: it is read-only")
    missing = TransmissionFlag(known.flags) & _NEEDED & ~export.flags
    if missing:
        words = ", ".join(str(flag.name) for flag in TransmissionFlag if flag & missing)
        raise ForeignExportError(f"{where}: it lacks {words}")


def is_proved(known: Record, route: Target, told: str | None) -> bool:
    """Tell whether what is offered on a route is proved to be what a device was attached to.

    Args:
        known: the device.
        route: where it is offered.
        told: its signature there, or None.

    Raises:
        ForeignExportError: it is proved not to be.
    """
    expected = known.signature
    if expected is None or told is None:
        return False
    made_up = expected.startswith("auto:") or told.startswith("auto:")
    if made_up and known.target != str(route):
        return False  # two servers of the same data make up different ones
    if expected != told:
        same = known.name or f"/dev/nbd{known.index}"
        raise ForeignExportError(
            f"{route.address}: the export {route.export!r} is not the one that {same} has: its "
            f"signature is {told!r}, not {expected!r}",
            hint=f"if it is meant: nbdlink detach {same}, and attach it again",
        )
    return True


def is_true(known: Record) -> bool:
    """Tell whether a record still describes its device.

    Does not look at the connections, as `kernel.status` does: there that takes a while if none
    is alive, and this is asked when none is.
    """
    pid = sysfs.pid(known.index)
    return pid is not None and known.describes(sysfs.backend(known.index), pid)


def require_same(known: Record) -> None:
    """Make sure that a device has not been detached since its record was read.

    Raises:
        KernelError: it has, and may have been attached to something else.
    """
    now = record.read(known.index)
    if now is None or now.attached_at != known.attached_at or not is_true(known):
        raise KernelError(f"{known.title} has been detached meanwhile")


def known_of(index: int) -> Record:
    """Give the record of a device whose connections can be renewed.

    Raises:
        KernelError: there is none, or they cannot be.
    """
    known = record.read(index)
    path = f"/dev/nbd{index}"
    if sysfs.pid(index) is None:
        raise KernelError(f"{path} is not attached", hint="`nbdlink list` shows what is attached")
    if known is None or not is_true(known) or not known.spec:
        raise KernelError(
            f"{path}: it is not known what it is attached to",
            hint=f"nbdlink detach {path}, and attach it again",
        )
    if known.road != "netlink":
        raise KernelError(
            f"{path} was attached by ioctls: its connections cannot be renewed",
            hint=f"nbdlink detach {path}, and attach it again",
        )
    return known
