"""What a machine needs in order to attach devices, looked at one thing at a time.

Looking only: no device is touched, and no module loaded but what the kernel loads itself when it
is tried (`tls`, socket diagnosis). Each finding says how to mend what is missing, because whoever
asks has a device that does not come up.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nbdlink import kernel
from nbdlink.errors import NBDError
from nbdlink.kernel import module, sockets, sysfs, udev
from nbdlink.link import installation, record

Status = Literal["ok", "warning", "failed"]

_CAP_SYS_ADMIN = 21


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: what.
        status: "failed" if devices cannot be attached because of it.
        found: what is there.
        remedy: what to do about it, or None.
    """

    check: str
    status: Status
    found: str
    remedy: str | None = None


def examine() -> Iterator[Finding]:
    """Look at everything, the most fundamental first."""
    loaded = module.loaded()
    yield _kernel_module(loaded)
    yield _rights()
    if loaded:
        yield _netlink()
        yield _moves()
        yield _nodes()
        yield _partitions()
        yield _free_device()
        yield from _devices()
    yield _udev()
    yield _rules_and_units()
    yield _records()
    yield _kernel_tls()


def _kernel_module(loaded: bool) -> Finding:
    release = os.uname().release
    if loaded:
        return Finding("kernel module", "ok", f"nbd is in Linux {release}")
    modprobe = shutil.which("modprobe", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if modprobe is None:
        return Finding(
            "kernel module",
            "failed",
            "nbd is not loaded, and there is no modprobe to load it",
            "install kmod",
        )
    # -n: only look whether it could be loaded.
    done = subprocess.run([modprobe, "-n", "nbd"], capture_output=True, check=False)
    if done.returncode == 0:
        return Finding(
            "kernel module",
            "warning",
            f"nbd is not loaded in Linux {release}, but it can be",
            "none is needed: attaching loads it; or as root: modprobe nbd",
        )
    return Finding(
        "kernel module",
        "failed",
        f"Linux {release} has no nbd module",
        "install the kernel's modules (Debian: the linux-image package that is running), "
        "or use a kernel that has nbd",
    )


def _rights() -> Finding:
    capabilities = 0
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            capabilities = int(line.split()[1], 16)
    if capabilities >> _CAP_SYS_ADMIN & 1:
        return Finding("rights", "ok", "CAP_SYS_ADMIN, which attaching takes")
    return Finding(
        "rights",
        "failed",
        "no CAP_SYS_ADMIN, which attaching and detaching take",
        "run it as root",
    )


def _netlink() -> Finding:
    from nbdlink.kernel import netlink

    if netlink.available():
        return Finding("netlink", "ok", "the nbd family answers")
    return Finding(
        "netlink",
        "warning",
        "the kernel has no nbd netlink family, or not in this namespace",
        "none: attaching falls back to ioctls, whose devices end with their connections",
    )


def _moves() -> Finding:
    check = "live connections"
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
    ):
        number = sockets.cookie(client)
        if sockets.connected([number]) != {number}:
            return Finding(
                check,
                "warning",
                "the kernel does not tell which are dead: there is no socket diagnosis",
                "modprobe inet_diag tcp_diag unix_diag, if the kernel has those modules",
            )
        try:
            sockets.destroy(number)
        except NBDError as error:
            return Finding(
                check,
                "warning",
                f"they cannot be moved while they live: {error}",
                error.hint or "none: dead ones are renewed all the same",
            )
    return Finding(check, "ok", "can be seen and moved")


def _nodes() -> Finding:
    missing = [n for n in sysfs.indices() if not Path(f"/dev/nbd{n}").is_block_device()]
    if not missing:
        return Finding("device nodes", "ok", "every device has one in /dev")
    return Finding(
        "device nodes",
        "failed",
        f"/dev/nbd{missing[0]} does not exist",
        "mount a devtmpfs on /dev, or run udevd; a container must be given the nodes",
    )


def _partitions() -> Finding:
    try:
        most = int(Path("/sys/module/nbd/parameters/max_part").read_text())
    except (OSError, ValueError):
        return Finding("partitions", "ok", "the kernel's default applies")
    if most > 0:
        return Finding("partitions", "ok", f"up to {most} a device")
    return Finding(
        "partitions",
        "warning",
        "the module was loaded with max_part=0: there will be none",
        "modprobe -r nbd; modprobe nbd max_part=16",
    )


def _free_device() -> Finding:
    indices = sysfs.indices()
    free = [n for n in indices if sysfs.pid(n) is None]
    if free:
        return Finding("free devices", "ok", f"{len(free)} of {len(indices)}")
    return Finding(
        "free devices",
        "warning",
        f"all {len(indices)} are attached",
        "none is needed: over netlink the kernel makes another",
    )


def _devices() -> Iterator[Finding]:
    for state in kernel.devices():
        if state.state is kernel.DeviceState.DEAD:
            yield Finding(
                f"device {state.path}",
                "warning",
                "it has no live connection left",
                f"nbdlink detach {state.path}, and attach it again",
            )


def _udev() -> Finding:
    if udev.runs():
        return Finding("udev", "ok", "udevd runs")
    return Finding(
        "udev",
        "warning",
        "no udevd is to be heard",
        "none is needed for the devices; links in /dev/disk and rules need systemd-udevd",
    )


def _rules_and_units() -> Finding:
    check = "rules and units"
    has_systemd = Path("/run/systemd/system").is_dir()
    if not (has_systemd or udev.runs()):
        return Finding(check, "ok", "neither systemd nor udevd runs, so none are needed")
    what = "udev rules and units" if has_systemd else "udev rules"
    try:
        lacking = installation.shortfalls(units=has_systemd)
    except (NBDError, OSError) as error:
        return Finding(check, "warning", str(error), getattr(error, "hint", None))
    if not lacking:
        return Finding(check, "ok", f"the {what} are those of this nbdlink")
    more = f", and {len(lacking) - 1} more like it" if len(lacking) > 1 else ""
    return Finding(
        check,
        "warning",
        lacking[0] + more,
        "as root: nbdlink setup; without them there is no /dev/disk/by-nbdlink, and links do not "
        "come back at boot",
    )


def _records() -> Finding:
    where = record.DIRECTORY
    nearest = next(path for path in (where, *where.parents) if path.exists())
    if os.access(nearest, os.W_OK | os.X_OK):
        return Finding("records", "ok", f"{where} can be written")
    status: Status = "warning"
    return Finding("records", status, f"{where} cannot be written", "run it as root")


def _kernel_tls() -> Finding:
    from nbdlink.transport import ktls

    ciphers = {cipher: ktls.missing(cipher) for cipher in ktls.CIPHERS}
    if not any(ciphers.values()):
        return Finding("TLS in the kernel", "ok", "with all ciphers of TLS 1.3 that it can have")
    if why := ciphers[ktls.USUAL]:
        return Finding(
            "TLS in the kernel",
            "warning",
            why,
            "modprobe tls, if the kernel has that module; without it a relay process does TLS",
        )
    lacking = ", ".join(cipher for cipher, why in ciphers.items() if why)
    return Finding("TLS in the kernel", "ok", f"without {lacking}, for which there is the relay")
