"""From an export's address to a block device, and back.

The way of a device: negotiate every connection first, so that nothing is bound unless the
server has agreed to all of it; then hand the sockets to the kernel and close our copies. From
then on the kernel speaks to the server by itself, and this process may end.
"""

from __future__ import annotations

import contextlib
import mmap
from dataclasses import asdict, dataclass, replace
from typing import Literal

from nbdlink import kernel
from nbdlink.client.export import NegotiatedExport
from nbdlink.client.negotiate import DEFAULT_TIMEOUT, negotiate
from nbdlink.client.security import NO_OPTIONS, Security, TLSOptions
from nbdlink.errors import (
    ConfigError,
    DeviceBusyError,
    KernelError,
    NBDError,
    RemoteProtocolError,
)
from nbdlink.link import channel, record
from nbdlink.link.channel import TLSRoad
from nbdlink.protocol.constants import TransmissionFlag
from nbdlink.transport.stream import Wire
from nbdlink.uri import Target

Road = Literal["auto", "netlink", "ioctl"]

MAX_CONNECTIONS = 64
"""More sockets than this are a typing error: the kernel keeps a thread's worth of state each."""

_SECTOR = 512
_LONGEST = 86400
_LONGEST_IDENTIFIER = 512


@dataclass(frozen=True, slots=True)
class LinkSpec:
    """What an administrator asks for.

    Attributes:
        target: server and export.
        device: `/dev/nbdN`, or None to let the kernel pick a free one.
        name: the link's name, or None.
        connections: how many sockets to spread requests over.
        read_only: bind it read-only even if the export could be written.
        block_size: logical block size in bytes, or None for 512 or the server's minimum.
        timeout: seconds after which a request is given up on its connection.
        dead_timeout: seconds for which I/O waits once no connection is left.
        road: netlink, ioctl, or whichever there is.
        negotiation_timeout: seconds for connecting and negotiating each connection.
        wait: seconds to wait for the partitions, or None not to wait at all.
        tls: what is demanded of TLS, beside what the target says.
        tls_road: who does it: "kernel", "relay", or "auto" for the kernel if it can.
    """

    target: Target
    device: str | None = None
    name: str | None = None
    connections: int = 1
    read_only: bool = False
    block_size: int | None = None
    timeout: int = 30
    dead_timeout: int = 0
    road: Road = "auto"
    negotiation_timeout: float = DEFAULT_TIMEOUT
    wait: float | None = 30.0
    tls: TLSOptions = NO_OPTIONS
    tls_road: TLSRoad = "auto"


def attach(
    target: Target | str,
    device: str | None = None,
    *,
    name: str | None = None,
    connections: int = 1,
    read_only: bool = False,
    block_size: int | None = None,
    timeout: int = 30,
    dead_timeout: int = 0,
    road: Road = "auto",
    wait: float | None = 30.0,
    tls: TLSOptions = NO_OPTIONS,
    tls_road: TLSRoad = "auto",
) -> kernel.Device:
    """Bind an export to a block device; see `LinkSpec` for the arguments.

    Returns:
        The device; its node and its partitions are there.

    Raises:
        ConfigError: the arguments contradict each other or what the server offers.
        TransportError, RemoteProtocolError, OptionError: no such export to be had.
        TLSError: TLS is demanded, and there is none, or the two do not come to terms.
        KernelError: the kernel refuses, or the device did not appear in time.
    """
    place = Target.parse(target) if isinstance(target, str) else target
    spec = LinkSpec(
        place, device, name, connections, read_only, block_size, timeout, dead_timeout, road
    )
    return attach_spec(replace(spec, wait=wait, tls=tls, tls_road=tls_road))


def attach_spec(spec: LinkSpec) -> kernel.Device:
    """Bind an export as `spec` says; see `attach`."""
    check(spec)
    security = Security(spec.target, spec.tls, for_kernel=spec.tls_road != "relay")
    if security.policy == "require":
        # The same link, however TLS was asked for; and never the same as one without.
        spec = replace(spec, target=replace(spec.target, tls=True))
    elif security.policy == "off" and spec.tls_road != "auto":
        raise ConfigError(
            f"--tls-road {spec.tls_road}, and yet no TLS is asked for",
            hint="say nbds:// or --tls require",
        )
    index = kernel.index_of(spec.device, must_exist=False) if spec.device else None
    with contextlib.ExitStack() as stack:
        if spec.name:
            # Two at once must not both find the name unused.
            stack.enter_context(record.locked())
            if existing := _same_link(spec, index):
                return existing
        wires, export = _negotiate_all(spec, security, stack)
        _binding(spec, index, [wire.fileno() for wire in wires], export)  # before a relay starts
        name = spec.name or (f"nbd{index}" if index is not None else spec.target.address)
        channels = channel.prepare(wires, spec.tls_road, name, stack)
        binding = _binding(spec, index, [sock.fileno() for sock in channels.sockets], export)
        device = kernel.attach(binding, road=spec.road, wait=spec.wait)
        try:
            record.write(_record(spec, binding, device, channels))
        except NBDError as error:
            # The device is there and works; only its name and its target will not be known.
            _warn(str(error))
    if tail := export.size % binding.block_size:
        _warn(
            f"{device.path}: the export's last {tail} bytes do not fill a block; they are cut off"
        )
    return device


def _warn(message: str) -> None:
    import logging  # takes longer than the whole hand-over; the good case needs none

    logging.getLogger("nbdlink.link").warning("%s", message)


def _record(
    spec: LinkSpec, binding: kernel.Binding, device: kernel.Device, channels: channel.Channels
) -> record.Record:
    # From what is known already: to ask the kernel again would cost more in imports than in
    # system calls.
    netlink = device.road == "netlink"
    return record.Record(
        index=device.index,
        name=spec.name,
        target=str(spec.target),
        connections=spec.connections,
        read_only=bool(binding.transmission_flags & TransmissionFlag.READ_ONLY),
        block_size=binding.block_size,
        timeout=spec.timeout,
        dead_timeout=spec.dead_timeout,
        road=device.road,
        identifier=binding.identifier or "" if netlink else "",
        pid=device.pid,
        channels=[asdict(known) for known in channels.known],
        relay=channels.relay,
        tls=_demands(spec),
    )


def _demands(spec: LinkSpec) -> dict[str, object]:
    """Give what is demanded of TLS, as a record keeps it."""
    return {**asdict(spec.tls), "road": spec.tls_road} if spec.target.tls else {}


def check(spec: LinkSpec) -> None:
    """Refuse numbers and names that no server and no kernel could make good.

    Raises:
        ConfigError: the message says which, and what is possible.
    """
    if spec.name is not None:
        record.check_name(spec.name)
    if not 1 <= spec.connections <= MAX_CONNECTIONS:
        raise ConfigError(
            f"{spec.connections} connections are not possible", hint=f"use 1 to {MAX_CONNECTIONS}"
        )
    size = spec.block_size
    if size is not None and (not _SECTOR <= size <= mmap.PAGESIZE or size & (size - 1)):
        raise ConfigError(
            f"a block size of {size} bytes is not possible",
            hint=f"the kernel takes a power of two from {_SECTOR} to {mmap.PAGESIZE}",
        )
    if not 1 <= spec.timeout <= _LONGEST:
        # 0 would not mean "none": the kernel then falls back to 30 seconds.
        raise ConfigError(f"a timeout of {spec.timeout} seconds is not possible (1 to {_LONGEST})")
    if not 0 <= spec.dead_timeout <= _LONGEST:
        raise ConfigError(
            f"a dead timeout of {spec.dead_timeout} seconds is not possible (0 to {_LONGEST})"
        )


def _same_link(spec: LinkSpec, index: int | None) -> kernel.Device | None:
    """Find the live device of the same link, which makes attaching by name idempotent."""
    for known, state in attached_records():
        if known.name != spec.name:
            continue
        same = known.target == str(spec.target) and index in (None, known.index)
        if same and spec.target.tls and known.tls != _demands(spec):
            raise DeviceBusyError(
                f"the link {spec.name!r} is already {state.path}, with other options for TLS",
                hint=f"nbdlink detach {spec.name}, or choose another --name",
            )
        if same and state.state is kernel.DeviceState.ATTACHED:
            return kernel.Device(known.index, state.path, state.partitions, known.road)
        what = f"is already {state.path} ({known.target}, {state.state})"
        raise DeviceBusyError(
            f"the link {spec.name!r} {what}",
            hint=f"nbdlink detach {spec.name}, or choose another --name",
        )
    return None


def attached(*, probe: bool = False) -> list[kernel.DeviceStatus]:
    """Give every device that is in use, whoever attached it.

    Args:
        probe: read a block of each to see whether it lives; bounded in time.
    """
    free = kernel.DeviceState.FREE
    return [state for state in kernel.devices(probe=probe) if state.state is not free]


def attached_records() -> list[tuple[record.Record, kernel.DeviceStatus]]:
    """Give every record that still describes its device, with the device's state."""
    found = []
    for known in record.read_all():
        with contextlib.suppress(KernelError):
            state = kernel.status(known.index)
            if state.state is not kernel.DeviceState.FREE and known.describes(
                state.backend, state.pid
            ):
                found.append((known, state))
    return found


def _negotiate_all(
    spec: LinkSpec, security: Security, stack: contextlib.ExitStack
) -> tuple[list[Wire], NegotiatedExport]:
    """Negotiate every connection; the server must say the same on each."""
    wires: list[Wire] = []
    first: NegotiatedExport | None = None
    for number in range(spec.connections):
        wire, export = negotiate(spec.target, timeout=spec.negotiation_timeout, security=security)
        stack.callback(wire.close)
        wires.append(wire)
        if first is None:
            first = export
            if spec.connections > 1 and not export.flags & TransmissionFlag.CAN_MULTI_CONN:
                raise ConfigError(
                    f"{spec.target.address}: the export {spec.target.export!r} does not promise "
                    "that several connections see the same data",
                    hint="use one connection (-C 1)",
                )
        elif (export.size, export.flags) != (first.size, first.flags):
            raise RemoteProtocolError(
                f"{spec.target.address}: connection {number + 1} was told {export.size} bytes and "
                f"flags {int(export.flags):#x}, the first {first.size} and {int(first.flags):#x}"
            )
    assert first is not None
    return wires, first


def _binding(
    spec: LinkSpec, index: int | None, descriptors: list[int], export: NegotiatedExport
) -> kernel.Binding:
    minimum = max(_SECTOR, export.minimum_block)
    block_size = minimum if spec.block_size is None else spec.block_size
    if minimum > mmap.PAGESIZE:
        raise ConfigError(
            f"{spec.target.address}: the server demands blocks of {minimum} bytes; the kernel "
            f"takes at most {mmap.PAGESIZE}"
        )
    if block_size < export.minimum_block:
        raise ConfigError(
            f"{spec.target.address}: a block size of {block_size} is below the server's minimum "
            f"of {export.minimum_block}",
            hint=f"use --block-size {minimum}",
        )
    if export.size < block_size:
        raise ConfigError(
            f"{spec.target.address}: the export {spec.target.export!r} has only {export.size} "
            "bytes, less than one block"
        )
    flags = export.flags | (TransmissionFlag.READ_ONLY if spec.read_only else 0)
    return kernel.Binding(
        sockets=tuple(descriptors),
        size=export.size,
        transmission_flags=int(flags),
        block_size=block_size,
        timeout=spec.timeout,
        dead_timeout=spec.dead_timeout,
        identifier=_identifier(spec),
        index=index,
    )


def _identifier(spec: LinkSpec) -> str:
    """Give what the kernel shall show as the device's backend.

    The kernel prints it into one page without looking at its length (`backend_show` in
    drivers/block/nbd.c), so what is long is told by its digest.
    """
    text = f"nbdlink:{spec.name or spec.target}"
    if len(text.encode()) <= _LONGEST_IDENTIFIER:
        return text
    import hashlib

    return f"nbdlink:sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def detach(device: str, *, force: bool = False, wait: float = 10.0) -> str:
    """Unbind a device, by its path or by its link's name; give the path.

    Args:
        device: `/dev/nbdN`, `nbdN` or a link's name.
        force: do it even if the device is mounted or held. Unwritten data is lost.
        wait: seconds to wait until the device is really gone.

    Raises:
        DeviceInUseError: it is mounted or held; the message says by whom.
        KernelError: nothing is attached there, or the kernel refuses.
    """
    index = find(device)
    kernel.detach(index, force=force, wait=wait)
    record.remove(index)
    return f"/dev/nbd{index}"


def find(device: str) -> int:
    """Give the index of a device, named by path or by its link's name.

    Raises:
        KernelError: there is neither such a device nor such a link.
    """
    for known, _ in attached_records():
        if known.name == device:
            return known.index
    if "/" not in device and not device.removeprefix("nbd").isdigit():
        raise KernelError(
            f"there is no link named {device!r}", hint="`nbdlink list` shows what is attached"
        )
    return kernel.index_of(device)
