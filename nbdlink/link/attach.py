"""From an export's address to a block device, and back.

The way of a device: negotiate every connection first, so that nothing is bound unless the
server has agreed to all of it; then hand the sockets to the kernel and close our copies. From
then on the kernel speaks to the server by itself, and this process may end.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import secrets
from collections.abc import Sequence
from dataclasses import replace

from nbdlink import kernel
from nbdlink.client.export import NegotiatedExport
from nbdlink.client.opening import negotiate
from nbdlink.client.security import NO_OPTIONS, Security, TLSOptions
from nbdlink.errors import (
    ConfigError,
    DeviceBusyError,
    DeviceInUseError,
    ForeignExportError,
    KernelError,
    NBDError,
    RemoteProtocolError,
    RightsError,
)
from nbdlink.kernel import sysfs
from nbdlink.link import channel, record
from nbdlink.link.record import Channel, Record, TLSRoad
from nbdlink.link.spec import SECTOR, LinkSpec, Road, check, describe, differences
from nbdlink.protocol.claim import Claim
from nbdlink.protocol.constants import TransmissionFlag
from nbdlink.transport.stream import Wire
from nbdlink.uri import Target

_LONGEST_IDENTIFIER = 512
_ATTEMPTS = 3
"""How often a device is bound if the kernel is too busy to do it well."""
_PATIENCE = 20.0
"""Seconds to wait for who is renewing the link: a supervisor's attempt takes up to 15."""


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
    paths: Sequence[Target | str] = (),
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
    further = tuple(Target.parse(path) if isinstance(path, str) else path for path in paths)
    spec = LinkSpec(
        place, device, name, connections, read_only, block_size, timeout, dead_timeout, road
    )
    return attach_spec(replace(spec, wait=wait, tls=tls, tls_road=tls_road, paths=further))


def attach_spec(
    spec: LinkSpec, *, notice: int | None = None, unasked: bool = False
) -> kernel.Device:
    """Bind an export as `spec` says; see `attach`.

    Args:
        spec: what to bind, and how.
        notice: UDP port on which this process hears that a server is back, to be told to it.
        unasked: whether nobody has asked for it just now, so that a link that was detached on
            purpose stays so.

    Raises:
        KernelError: it was detached on purpose meanwhile.
    """
    check(spec)
    spec, securities = secure(spec)
    index = kernel.index_of(spec.device, must_exist=False) if spec.device else None
    with contextlib.ExitStack() as stack:
        if spec.name:
            # Two at once must not both find the name unused.
            stack.enter_context(record.locked(spec.name))
            if unasked and record.is_detached(spec.name):
                raise KernelError(f"the link {spec.name!r} has been detached meanwhile")
            if existing := _same_link(spec, index):
                record.unmark_detached(spec.name)
                return existing
        for _ in range(_ATTEMPTS - 1):
            try:
                return _bind(spec, securities, index, notice)
            except KernelError as error:
                if error.errno != errno.EAGAIN:
                    raise
        return _bind(spec, securities, index, notice)


def _bind(
    spec: LinkSpec,
    securities: dict[Target, Security],
    index: int | None,
    notice: int | None,
) -> kernel.Device:
    """Negotiate, and hand over to the kernel."""
    with contextlib.ExitStack() as stack:
        session = secrets.token_hex(16)
        claim = Claim(session, 0, 0, notice)
        wires, routes, export = _negotiate_all(spec, securities, claim, stack)
        _binding(spec, index, [wire.fileno() for wire in wires], export)  # before a relay starts
        name = spec.name or (f"nbd{index}" if index is not None else spec.target.address)
        channels = channel.prepare(wires, spec.tls_road, name, stack, timeout=spec.timeout)
        known = [
            replace(each, route=str(r)) for each, r in zip(channels.known, routes, strict=True)
        ]
        binding = _binding(spec, index, [sock.fileno() for sock in channels.sockets], export)
        device = kernel.attach(binding, road=spec.road, wait=spec.wait)
        try:
            record.write_session(device.index, session)
            record.write(_record(spec, binding, device, export, known))
        except NBDError as error:
            # The device is there and works; only its name and its target will not be known.
            _warn(str(error))
        record.unmark_detached(spec.name or f"nbd{device.index}")
    if tail := export.size % binding.block_size:
        _warn(
            f"{device.path}: the export's last {tail} bytes do not fill a block; they are cut off"
        )
    return device


def secure(spec: LinkSpec) -> tuple[LinkSpec, dict[Target, Security]]:
    """Find out what each route needs of TLS.

    Returns:
        The specification with `nbds` in the routes that need it, and hosts in small letters: the
        same link, however it was written, and never the same as one without TLS. And the security
        of each of its routes.

    Raises:
        ConfigError: what is demanded contradicts itself.
    """
    found: dict[Target, Security] = {}
    routes: list[Target] = []
    for route in spec.routes:
        if route.host is not None:
            route = replace(route, host=route.host.lower())
        security = Security(route, spec.tls, for_kernel=spec.tls_road != "relay")
        if security.policy == "require":
            route = replace(route, tls=True)
        elif routes and routes[0].tls:
            raise ConfigError(
                f"{route} goes without TLS, which {routes[0]} demands",
                hint="say nbds:// in all of them",
            )
        elif security.policy == "off" and spec.tls_road != "auto":
            raise ConfigError(
                f"--tls-road {spec.tls_road}, and yet no TLS is asked for",
                hint="say nbds:// or --tls require",
            )
        routes.append(route)
        found[route] = security
    tls = replace(spec.tls, policy=None) if routes[0].tls else spec.tls  # the scheme says it
    return replace(spec, target=routes[0], paths=tuple(routes[1:]), tls=tls), found


def _warn(message: str) -> None:
    import logging  # takes longer than the whole hand-over; the good case needs none

    logging.getLogger("nbdlink.link").warning("%s", message)


def _record(
    spec: LinkSpec,
    binding: kernel.Binding,
    device: kernel.Device,
    export: NegotiatedExport,
    channels: list[Channel],
) -> Record:
    # From what is known already: to ask the kernel again would cost more in imports than in
    # system calls.
    netlink = device.road == "netlink"
    signature = export.testimony.signature
    if signature is not None and signature.startswith("auto:"):
        # It is that of the first connection's server, and will be looked for at the target's.
        signature = signature if channels[0].route == str(spec.target) else None
    return Record(
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
        channels=tuple(channels),
        spec=describe(spec),
        size=export.size,
        flags=int(export.flags),
        signature=signature,
        fences=export.testimony.fences,
    )


def _same_link(spec: LinkSpec, index: int | None) -> kernel.Device | None:
    """Find the live device of the same link, which makes attaching by name idempotent."""
    for known, state in attached_records():
        if known.name != spec.name:
            continue
        if index not in (None, known.index):
            raise DeviceBusyError(
                f"the link {spec.name!r} is already {state.path} ({known.target}, {state.state})",
                hint=f"nbdlink detach {spec.name}, or choose another --name",
            )
        if changed := differences(known.spec, describe(spec)):
            move = ", or nbdlink reconnect to move it" if "target" in changed else ""
            raise DeviceBusyError(
                f"the link {spec.name!r} is already {state.path} ({known.target}); it differs in "
                f"{' and '.join(changed)}",
                hint=f"nbdlink detach {spec.name} first, or choose another --name{move}",
            )
        from nbdlink.link.health import health
        from nbdlink.link.renew import renew

        if known.road == "netlink" and health(known).dead:
            renew(known.index, wait=_PATIENCE)
        return kernel.Device(known.index, state.path, state.partitions, known.road)
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
    records = record.read_all()
    # All at once: to see that a device is dead takes a moment, and many may be.
    states = {state.index: state for state in attached()} if records else {}
    return [
        (known, state)
        for known in records
        if (state := states.get(known.index)) and known.describes(state.backend, state.pid)
    ]


def _negotiate_all(
    spec: LinkSpec,
    securities: dict[Target, Security],
    claim: Claim,
    stack: contextlib.ExitStack,
) -> tuple[list[Wire], list[Target], NegotiatedExport]:
    """Negotiate every connection; the server must say the same on each.

    With several routes the connections are spread over them. A route that leads nowhere now is
    left out as long as there is another.
    """
    wires: list[Wire] = []
    taken: list[Target] = []
    first: NegotiatedExport | None = None
    strictest: NegotiatedExport | None = None
    told: list[tuple[Target, NegotiatedExport]] = []
    open_routes = list(spec.routes)
    while len(wires) < spec.connections:
        number = len(wires)
        route = open_routes[number % len(open_routes)]
        try:
            wire, export = negotiate(
                route,
                timeout=spec.negotiation_timeout,
                security=securities[route],
                claim=replace(claim, channel=number),
            )
        except NBDError as error:
            if len(open_routes) == 1:
                raise
            _warn(str(error))
            open_routes.remove(route)
            continue
        stack.callback(wire.close)
        wires.append(wire)
        taken.append(route)
        if strictest is None or export.minimum_block > strictest.minimum_block:
            strictest = export
        if first is None:
            first = export
            if spec.connections > 1 and not export.flags & TransmissionFlag.CAN_MULTI_CONN:
                raise ConfigError(
                    f"{route.address}: the export {route.export!r} does not promise "
                    "that several connections see the same data",
                    hint="use one connection (-C 1)",
                )
        elif (export.size, export.flags) != (first.size, first.flags):
            raise RemoteProtocolError(
                f"{route.address}: connection {number + 1} was told {export.size} bytes and "
                f"flags {int(export.flags):#x}, the first {first.size} and {int(first.flags):#x}"
            )
        for before, known in told:
            if _are_foreign(before, known, route, export):
                raise ForeignExportError(
                    f"{route.address}: the export {route.export!r} is not the same one as that of "
                    f"{before.address}: its signature is {export.testimony.signature!r}, not "
                    f"{known.testimony.signature!r}"
                )
        told.append((route, export))
    assert first is not None
    assert strictest is not None
    # The kernel asks all of them in the same blocks.
    return wires, taken, replace(first, block_size=strictest.block_size)


def _are_foreign(
    one: Target, first: NegotiatedExport, other: Target, second: NegotiatedExport
) -> bool:
    """Tell whether the servers prove that these are not the same data."""
    signatures = (first.testimony.signature, second.testimony.signature)
    if None in signatures or signatures[0] == signatures[1]:
        return False
    return one == other or not any(str(each).startswith("auto:") for each in signatures)


def _binding(
    spec: LinkSpec, index: int | None, descriptors: list[int], export: NegotiatedExport
) -> kernel.Binding:
    minimum = max(SECTOR, export.minimum_block)
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
            "bytes, less than one block",
            hint="see that the server serves what is meant",
        )
    flags = export.flags | (TransmissionFlag.READ_ONLY if spec.read_only else 0)
    return kernel.Binding(
        sockets=tuple(descriptors),
        size=export.size,
        transmission_flags=int(flags),
        block_size=block_size,
        timeout=spec.timeout,
        dead_timeout=spec.dead_timeout,
        identifier=identifier_of(spec),
        index=index,
    )


def identifier_of(spec: LinkSpec) -> str:
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

    A configured link that is not attached is not attached by a supervisor either from then on,
    and it is the name that is given back.

    Args:
        device: `/dev/nbdN`, `nbdN` or a link's name.
        force: do it even if the device is mounted or held. Unwritten data is lost.
        wait: seconds to wait until the device is really gone.

    Raises:
        DeviceInUseError: it is mounted or held; the message says by whom.
        KernelError: nothing is attached there, or the kernel refuses.
    """
    try:
        index = find(device)
    except KernelError:
        if not _is_configured(device):
            raise
        record.mark_detached(device)
        try:
            # Who is attaching it just now ends the mark, and has done so after that.
            with record.locked(device):
                index = find(device)
        except NBDError:
            return device
    recorded = record.read(index)
    known = recorded
    if known is not None and not known.describes(sysfs.backend(index), sysfs.pid(index)):
        known = None  # of an earlier use: its link may be wanted
    mark = (known.name or f"nbd{index}") if known else None
    if mark:
        record.mark_detached(mark)  # first, or a supervisor brings it back meanwhile
    try:
        kernel.detach(index, force=force, wait=wait)
    except BaseException as error:  # a person's Ctrl-C in a long flush is one, too
        occupied = DeviceBusyError | DeviceInUseError if force else DeviceBusyError
        if mark and not isinstance(error, occupied):  # these have been disconnected
            refused = isinstance(error, RightsError | DeviceInUseError)
            if refused or sysfs.has_live_link(index):
                record.unmark_detached(mark)
        raise
    if record.read(index) == recorded:  # or it has been attached again just now
        record.remove(index)
    return f"/dev/nbd{index}"


def _is_configured(name: str) -> bool:
    from nbdlink.link.config import files

    with contextlib.suppress(ConfigError):
        return name in files.load().links
    return False


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
