"""Devices that are attached and of which nothing is recorded: known by the kernel's word."""

from __future__ import annotations

import contextlib

from nbdlink import kernel
from nbdlink.errors import ConfigError, KernelError, NBDError
from nbdlink.kernel import sysfs
from nbdlink.link import record
from nbdlink.link.attach import identifier_of, secure
from nbdlink.link.identity import is_true
from nbdlink.link.record import Record
from nbdlink.link.spec import LinkSpec, describe


def adopt(spec: LinkSpec) -> Record | None:
    """Make a record of a device that is this link by the kernel's word, and has none.

    Of its connections nothing is known but how many there are meant to be. Under which number a
    server knows them is lost, so it cannot end their ghosts when they are renewed.
    """
    identifier, name = identifier_of(spec), spec.name
    if not name:
        return None
    with contextlib.suppress(ConfigError):  # which renewing it will tell
        spec, _ = secure(spec)
    for index in sysfs.indices():
        if sysfs.pid(index) is not None and sysfs.backend(index) == identifier:
            break
    else:
        return None
    try:
        state = kernel.status(index)
    except KernelError:
        return None  # it went away just now
    known = Record(
        index=state.index,
        name=name,
        target=str(spec.target),
        connections=spec.connections,
        read_only=state.read_only,
        block_size=state.block_size,
        timeout=spec.timeout,
        dead_timeout=spec.dead_timeout,
        road=state.road or "netlink",
        identifier=identifier,
        pid=state.pid,
        channels=tuple(record.Channel() for _ in range(spec.connections)),
        spec=describe(spec),
        size=state.size,
    )
    # Whoever is attaching it just now has something better to record.
    with contextlib.suppress(NBDError), record.locked(name, wait=False):
        before = record.read(state.index)
        if before is None or not is_true(before):
            record.write(known)
            return known
    return None
