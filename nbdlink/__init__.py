"""Remote NBD exports as local block devices, and the server to match.

From a script::

    import nbdlink

    with nbdlink.connect("nbd://store1/data") as nbd:
        first = nbd.pread(512, 0)

    device = nbdlink.attach("nbd://store1/data", "/dev/nbd0")
    nbdlink.detach(device.path)

Errors are `nbdlink.errors.NBDError` and its kinds. Nothing below is imported before it is
used: most of the time that a short command takes would go into imports.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbdlink.version import __version__

if TYPE_CHECKING:
    from nbdlink.client.connection import Connection, connect
    from nbdlink.errors import NBDError
    from nbdlink.link.attach import attach, detach
    from nbdlink.uri import Target

__all__ = ["Connection", "NBDError", "Target", "__version__", "attach", "connect", "detach"]

_HOMES = {
    "Connection": "nbdlink.client.connection",
    "NBDError": "nbdlink.errors",
    "Target": "nbdlink.uri",
    "attach": "nbdlink.link.attach",
    "connect": "nbdlink.client.connection",
    "detach": "nbdlink.link.attach",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
