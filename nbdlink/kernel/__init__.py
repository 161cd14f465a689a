"""The kernel's side of a block device: sockets and numbers in, /dev/nbdN out.

    attach, Binding, Device, Road          bind negotiated sockets to a device
    detach                                 and let them go
    reconfigure, resize                    change what is attached
    status, devices, DeviceStatus, DeviceState, Partition   look without touching
    index_of                               which device a name means

Nothing is imported before it is used: netlink and udev libraries take longer to import than a
device to attach.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbdlink.kernel.device import Binding, Device, Road, attach, reconfigure, resize
    from nbdlink.kernel.release import detach
    from nbdlink.kernel.state import DeviceState, DeviceStatus, devices, status
    from nbdlink.kernel.sysfs import Partition, index_of

__all__ = [
    "Binding",
    "Device",
    "DeviceState",
    "DeviceStatus",
    "Partition",
    "Road",
    "attach",
    "detach",
    "devices",
    "index_of",
    "reconfigure",
    "resize",
    "status",
]

_HOMES = {
    "Binding": "device",
    "Device": "device",
    "DeviceState": "state",
    "DeviceStatus": "state",
    "Partition": "sysfs",
    "Road": "device",
    "attach": "device",
    "detach": "release",
    "devices": "state",
    "index_of": "sysfs",
    "reconfigure": "device",
    "resize": "device",
    "status": "state",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    # Kept, so that this is paid once a name.
    globals()[name] = value
    return value
