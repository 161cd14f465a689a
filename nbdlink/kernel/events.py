"""Hearing what the kernel says about nbd devices, as it happens.

Two of its voices are listened to:

- the multicast group `nbd_mc_group` of the generic-netlink family, on which the driver tells that
  a connection died (LINK_DEAD, with the device's index and nothing else);
- the uevents of the block devices, which tell that a device appeared, vanished, was attached or
  detached ("changed"; the driver has no word for either), or has another size.

LINK_DEAD is sent in the machine's first network namespace only (`nbd_mcast_index` of `nbd.c`
calls `genlmsg_multicast`, which is `init_net`). Elsewhere nothing is heard of it: Linux 6.1 does
not show the family there at all, 6.12 lets one join the group, which stays silent. Uevents are
heard in all of them.

The family exists while the module is loaded, and has another number at each load. The kernel
announces families on a group whose number is fixed, so that one is listened to from the
beginning, and `nbd_mc_group` is joined again whenever its family comes back.

What a socket has no room for is lost, and the kernel says so; then who listens has to look at
everything again, as after the start. The order of things is therefore: make the listener, look
at everything, then read what happens.
"""

from __future__ import annotations

import errno
import select
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from nbdlink.errors import KernelError
from nbdlink.kernel import module, nlmsg

if TYPE_CHECKING:
    from nbdlink.kernel.udev import Uevents

# The messages are so few and so short that they are taken apart here: pyroute2 would be imported
# for six numbers. `include/uapi/linux/genetlink.h`, `include/uapi/linux/nbd-netlink.h`.
_NETLINK_GENERIC = 16
_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1
_GENERIC = struct.Struct("=BBH")  # struct genlmsghdr: command, version, reserved
_NUMBER = struct.Struct("=I")

_CONTROL = 0x10
"""GENL_ID_CTRL, both the number of the family `nlctrl` and that of its group `notify`."""

_NEWFAMILY, _GETFAMILY, _NEWMCAST_GRP = 1, 3, 7
_FAMILY_ID, _FAMILY_NAME, _MCAST_GROUPS = 1, 2, 7
_GROUP_NAME, _GROUP_ID = 1, 2

_NBD = b"nbd"
_NBD_GROUP = b"nbd_mc_group"
_LINK_DEAD, _INDEX = 4, 1

_RECEIVE_BYTES = 1 << 16
_MOST_AT_ONCE = 512
"""Messages taken in one go, so that a flood of them cannot keep a loop from its other duties."""


class EventKind(StrEnum):
    """What may happen."""

    DEAD = "dead"
    """A connection of the device has died; which one is not told."""

    ADDED = "added"
    """The kernel made the device; nothing is attached to it yet."""

    REMOVED = "removed"
    """The device is no more."""

    CHANGED = "changed"
    """It was attached, detached, or its partitions were read anew."""

    RESIZED = "resized"
    """It has another size, without having been detached."""

    LOST = "lost"
    """Something was not heard: look at everything again."""


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened.

    Attributes:
        kind: what it is.
        index: N of `/dev/nbdN`, or None if it concerns all of them.
    """

    kind: EventKind
    index: int | None = None


class Events:
    """Listens from its making on; can be given to `selectors`, and read without waiting.

    Needs no rights.

    Attributes:
        unheard: what cannot be heard from here, a line each that says why; empty if all is well.
            That the module is not loaded is no such reason.

    Raises:
        KernelError: nothing at all can be heard.
    """

    def __init__(self) -> None:
        self.unheard: list[str] = []
        self._links = self._hear_links()
        self._uevents = self._hear_uevents()
        if self._links is None and self._uevents is None:
            raise KernelError(f"no event of the kernel can be heard: {'; '.join(self.unheard)}")
        self._family: int | None = None
        # One descriptor for both, as it can be waited for itself.
        self._poll = select.epoll()
        for source in (self._links, self._uevents):
            if source is not None:
                self._poll.register(source.fileno(), select.EPOLLIN)
        self._ask_for_family()
        # Joins the group. Events are not kept: who made this has not looked at anything yet.
        list(self._read_links())

    def fileno(self) -> int:
        """Give the descriptor that is readable when there is something to read."""
        return self._poll.fileno()

    def read(self) -> list[Event]:
        """Give what has happened since the last time, without waiting; often nothing.

        The same event is told once for all the times that it happened meanwhile. The order is
        kept among the connections that died, and among the rest.
        """
        return list(dict.fromkeys([*self._read_links(), *self._read_uevents()]))

    def wait(self, seconds: float | None) -> list[Event]:
        """Wait until something happens, at most so long; then `read`."""
        self._poll.poll(seconds)
        return self.read()

    def close(self) -> None:
        """Stop listening."""
        self._poll.close()
        if self._links is not None:
            self._links.close()
        if self._uevents is not None:
            self._uevents.close()
        self._links = self._uevents = None

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _hear_links(self) -> socket.socket | None:
        try:
            sock = socket.socket(
                socket.AF_NETLINK,
                socket.SOCK_RAW | socket.SOCK_NONBLOCK,
                _NETLINK_GENERIC,
            )
        except OSError as error:
            self.unheard.append(f"generic netlink: {error.strerror}")
            return None
        sock.bind((0, 0))
        sock.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, _CONTROL)
        return sock

    def _hear_uevents(self) -> Uevents | None:
        from nbdlink.kernel.udev import Uevents

        try:
            return Uevents()
        except (ImportError, OSError) as error:
            self.unheard.append(f"uevents: {error}")
            return None

    def _ask_for_family(self) -> None:
        """Have the kernel announce the family, to us alone; no family, no harm.

        Not without the driver: asking for its family would load it (seen with Linux 6.12), and
        who only listens shall change nothing. Its own announcement will be heard.
        """
        if self._links is None or not module.loaded():
            return
        name = _NBD + b"\0"
        attribute = nlmsg.attribute(_FAMILY_NAME, name)
        body = _GENERIC.pack(_GETFAMILY, 1, 0) + attribute
        self._links.send(nlmsg.message(_CONTROL, nlmsg.REQUEST, body))

    def _read_links(self) -> Iterator[Event]:
        for _ in range(_MOST_AT_ONCE):
            if self._links is None:
                return
            try:
                packet = self._links.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise KernelError(
                        f"listening to the kernel: {error.strerror}", errno=error.errno or 0
                    ) from None
                # Among the lost may be the family's announcement.
                self._ask_for_family()
                yield Event(EventKind.LOST)
                continue
            for kind, command, attributes in _told(packet):
                yield from self._heard(kind, command, attributes)

    def _heard(self, kind: int, command: int, attributes: dict[int, bytes]) -> Iterator[Event]:
        if kind == _CONTROL and command in (_NEWFAMILY, _NEWMCAST_GRP):
            if attributes.get(_FAMILY_NAME, b"").rstrip(b"\0") == _NBD and self._join(attributes):
                # Between the module's load and now connections may have come and gone.
                yield Event(EventKind.LOST)
        elif kind == self._family and command == _LINK_DEAD and _INDEX in attributes:
            (index,) = _NUMBER.unpack(attributes[_INDEX])
            yield Event(EventKind.DEAD, index)

    def _join(self, family: dict[int, bytes]) -> bool:
        """Join the driver's group if the announcement tells it; tell whether it did."""
        assert self._links is not None
        for _, group in nlmsg.attributes(family.get(_MCAST_GROUPS, b"")):
            described = dict(nlmsg.attributes(group))
            if described.get(_GROUP_NAME, b"").rstrip(b"\0") != _NBD_GROUP:
                continue
            (number,) = _NUMBER.unpack(described[_GROUP_ID])
            try:
                self._links.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, number)
            except OSError:
                return False  # it has gone again, which will be announced
            (self._family,) = struct.unpack_from("=H", family[_FAMILY_ID])
            return True
        return False

    def _read_uevents(self) -> Iterator[Event]:
        for _ in range(_MOST_AT_ONCE):
            if self._uevents is None:
                return
            try:
                uevent = self._uevents.receive()
            except OSError:  # ENOBUFS, or one that could not be understood
                yield Event(EventKind.LOST)
                continue
            if uevent is None:
                return
            kind = _KINDS.get(uevent.action)
            if uevent.partition:
                kind = EventKind.CHANGED
            elif uevent.resized:
                kind = EventKind.RESIZED
            if kind is not None:
                yield Event(kind, uevent.index)


_KINDS = {"add": EventKind.ADDED, "remove": EventKind.REMOVED, "change": EventKind.CHANGED}


def _told(packet: bytes) -> Iterator[tuple[int, int, dict[int, bytes]]]:
    """Take a datagram apart: the family, the command and the attributes of each message."""
    for kind, whole in nlmsg.messages(packet):
        body = whole[nlmsg.HEADER.size :]
        if kind >= _CONTROL and len(body) >= _GENERIC.size:
            command, _, _ = _GENERIC.unpack_from(body)
            yield kind, command, dict(nlmsg.attributes(body[_GENERIC.size :]))
