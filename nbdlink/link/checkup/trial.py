"""Attaching an export for a moment, to see that it works."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from nbdlink import kernel
from nbdlink.client.security import NO_OPTIONS, TLSOptions
from nbdlink.errors import NBDError
from nbdlink.kernel import DeviceState
from nbdlink.link.attach import attach_spec, detach
from nbdlink.link.checkup.finding import Finding, failed
from nbdlink.link.spec import LinkSpec
from nbdlink.uri import Target

_REQUEST_SECONDS: Final = 30


def try_out(
    target: Target, options: TLSOptions = NO_OPTIONS, *, seconds: float
) -> Iterator[Finding]:
    """Attach an export read-only to a free device, read a block of it there, and detach it.

    Args:
        target: server and export.
        options: what is demanded of TLS, beside what the target says.
        seconds: for which the read may wait.

    Raises:
        ConfigError: what is demanded of TLS contradicts itself.
    """
    spec = LinkSpec(target, read_only=True, tls=options, timeout=_REQUEST_SECONDS)
    try:
        device = attach_spec(spec)
    except NBDError as error:
        yield failed("attach", error)
        return
    # Nothing is told before it is detached: who listens may be interrupted.
    try:
        state = kernel.status(device.index, probe=True, deadline=seconds)
    finally:
        detached = _detach(device.path)
    yield Finding("attach", "ok", f"it was {device.path}, by {device.road}")
    if state.state is DeviceState.ATTACHED and state.probe_errno == 0:
        yield Finding("device read", "ok", f"a block of {device.path}")
    else:
        yield Finding(
            "device read",
            "failed",
            f"a block of {device.path} could not be read: it was {state.state}",
            "see `dmesg`, and the server's log",
        )
    yield detached


def _detach(path: str) -> Finding:
    try:
        detach(path)
    except NBDError as error:
        return failed("detach", error)
    return Finding("detach", "ok", f"{path} is free again")
