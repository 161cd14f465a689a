"""One device or link: what is wrong with it, and with the way to its server."""

from __future__ import annotations

from collections.abc import Iterator

from nbdlink import kernel
from nbdlink.errors import NBDError
from nbdlink.kernel import DeviceState, usage
from nbdlink.link import record
from nbdlink.link.checkup.finding import Finding, failed
from nbdlink.link.checkup.route import STEP_SECONDS, walk
from nbdlink.link.health import health
from nbdlink.link.record import Record
from nbdlink.link.spec import LinkSpec, restore
from nbdlink.sizes import format_size


def examine_device(index: int, *, seconds: float = STEP_SECONDS) -> Iterator[Finding]:
    """Look at a device, read a block of it, and walk every way to its server.

    Args:
        index: N of `/dev/nbdN`.
        seconds: for which each step may wait.

    Raises:
        KernelError: there is no such device.
    """
    # Before a block is read, as who reads it may be held up, and is nobody's business then.
    openers = [str(each) for each in usage.openers(index)]
    state = kernel.status(index, probe=True, deadline=seconds)
    known = record.read(index)
    if known and not known.describes(state.backend, state.pid):
        known = None
    yield _state(state, known)
    yield from _users(state, openers)
    if state.state is DeviceState.FREE:
        return
    if known is None:
        yield Finding(
            "record",
            "warning",
            f"nothing is known of where {state.path} leads: another program attached it",
            "none is needed; attached by nbdlink it could be renewed",
        )
        return
    yield _connections(known)
    try:
        spec = restore(known.spec, known.name, state.path)
    except NBDError as error:
        yield failed("record", error)
        return
    yield from examine_link(spec, seconds=seconds)


def examine_link(spec: LinkSpec, *, seconds: float = STEP_SECONDS) -> Iterator[Finding]:
    """Walk every way to a link's export.

    Args:
        spec: the link.
        seconds: for which each step may wait.
    """
    for route in spec.routes:
        if len(spec.routes) > 1:
            yield Finding("route", "ok", str(route))
        yield from walk(route, spec.tls, seconds=seconds)


def _state(state: kernel.DeviceStatus, known: Record | None) -> Finding:
    what = f"{state.path} ({known.name})" if known and known.name else state.path
    again = f"nbdlink reconnect {known.name or state.path}" if known else "attach it again"
    match state.state:
        case DeviceState.FREE:
            return Finding("device", "ok", f"nothing is attached to {what}")
        case DeviceState.DEAD:
            return Finding(
                "device",
                "failed",
                f"{what} is dead: it has no connection left, and whoever uses it waits or fails",
                f"once the server answers: {again}; or give it up: "
                f"nbdlink detach --force {state.path}",
            )
        case DeviceState.STALLED:
            return Finding(
                "device",
                "failed",
                f"{what} is attached, but a read of it does not come back",
                f"see below whether the server answers; then: {again}",
            )
        case DeviceState.UNKNOWN:
            return Finding(
                "device",
                "warning",
                f"{what} is attached, and its connections cannot be seen from here",
                "run it as root, in the network namespace in which it was attached",
            )
    found = f"{what} is attached, {format_size(state.size)}"
    if state.probe_errno == 0:
        return Finding("device", "ok", f"{found}, and can be read")
    return Finding("device", "ok", f"{found}; to read it takes root")


def _users(state: kernel.DeviceStatus, openers: list[str]) -> Iterator[Finding]:
    """Say who uses a device, for whom detaching it would be a loss."""
    uses = [str(each) for each in usage.uses(state.index)]
    if state.state is DeviceState.FREE:
        for opener in openers:
            yield Finding(
                "use",
                "warning",
                f"{opener}, so that it cannot be attached",
                "end that program, or attach another device",
            )
        return
    for each in uses + openers:
        yield Finding("use", "ok", each)


def _connections(known: Record) -> Finding:
    found = health(known)
    live, total = len(found.live), len(found.live) + len(found.dead)
    if live == total:
        return Finding("connections", "ok", f"{live} of {total} are live")
    return Finding(
        "connections",
        "warning",
        f"{live} of {total} are live",
        f"nbdlink reconnect {known.name or f'/dev/nbd{known.index}'}, or have nbdlink supervise "
        "do that by itself",
    )
