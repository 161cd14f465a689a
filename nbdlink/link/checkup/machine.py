"""What a machine needs in order to attach devices, tried one thing at a time.

No device is touched, and nothing is loaded but what attaching would load: `nbd` itself, by root,
and what the kernel loads itself when it is tried (`tls`, socket diagnosis). Each finding says how
to mend what is missing, because whoever asks has a device that does not come up.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from nbdlink import kernel
from nbdlink.errors import NBDError
from nbdlink.kernel import module, sockets, sysfs, udev, usage
from nbdlink.link import installation, record
from nbdlink.link.checkup.clock import examine_clock
from nbdlink.link.checkup.finding import Finding, failed
from nbdlink.link.config import files
from nbdlink.toml.document import CONFIGURATION

_CAP_SYS_ADMIN = 21
_ALL_USERS = ["0", "0", "4294967295"]
"""The mapping of users where there is none: in the first user namespace."""

_MODULES = Path("/lib/modules")


def examine() -> Iterator[Finding]:
    """Look at everything, the most fundamental first."""
    yield _kernel_module()
    yield _rights()
    if module.loaded():
        yield _netlink()
        yield _moves()
        yield _nodes()
        yield _partitions()
        yield _free_device()
        yield from _devices()
    yield _udev()
    yield _rules_and_units()
    yield _records()
    yield _configuration()
    yield _kernel_tls()
    yield examine_clock()


def _kernel_module() -> Finding:
    check = "kernel module"
    release = os.uname().release
    if module.loaded():
        return Finding(check, "ok", f"nbd is in Linux {release}")
    if os.geteuid() == 0:
        # As attaching would: only then it is known whether it can be.
        try:
            module.require()
        except NBDError as error:
            return missing_module(str(error), release)
        return Finding(check, "ok", f"nbd is in Linux {release}; it has been loaded just now")
    modprobe = shutil.which("modprobe", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if modprobe is None:
        return Finding(
            check,
            "failed",
            "nbd is not loaded, and there is no modprobe to load it",
            "install kmod",
        )
    # -n: only look whether it could be loaded.
    done = subprocess.run([modprobe, "-n", "nbd"], capture_output=True, check=False)
    if done.returncode == 0:
        return Finding(
            check,
            "warning",
            f"nbd is not loaded in Linux {release}, but it can be",
            "none is needed: attaching loads it; or as root: modprobe nbd",
        )
    return missing_module(f"Linux {release} has no nbd module", release)


def missing_module(found: str, release: str, modules: Path = _MODULES) -> Finding:
    """Say what to do about a driver that is not to be had.

    Args:
        found: what is wrong.
        release: of the running kernel.
        modules: the folder with a folder of modules for each kernel.
    """
    others = sorted(path.parent.name for path in modules.glob("*/modules.dep"))
    if (modules / release).is_dir():
        remedy = (
            "this kernel was built without nbd, or its package of extra modules is missing "
            "(Ubuntu: linux-modules-extra, Fedora: kernel-modules-extra); or use another kernel"
        )
        if any((modules / release).rglob("nbd.ko*")):
            remedy = (
                "the module is there, and was refused: `dmesg` tells why (a signature that Secure "
                "Boot does not know, another kernel's module), or /etc/modprobe.d forbids it"
            )
    elif others:
        remedy = (
            f"there are modules for {', '.join(others)} only: the kernel was updated, so reboot; "
            "or install those of the kernel that is running"
        )
    else:
        remedy = (
            "install the kernel's modules (Debian: the linux-image package that is running), or "
            "use a kernel that has nbd; in a container the host has to load it"
        )
    return Finding("kernel module", "failed", found, remedy)


def _rights() -> Finding:
    capabilities = 0
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            capabilities = int(line.split()[1], 16)
    if not capabilities >> _CAP_SYS_ADMIN & 1:
        return Finding(
            "rights",
            "failed",
            "no CAP_SYS_ADMIN, which attaching and detaching take",
            "run it as root",
        )
    if Path("/proc/self/uid_map").read_text().split() != _ALL_USERS:
        return Finding(
            "rights",
            "failed",
            "CAP_SYS_ADMIN of a user namespace only, which attaching takes of the whole machine",
            "run it as the machine's root, outside of the container",
        )
    return Finding("rights", "ok", "CAP_SYS_ADMIN, which attaching takes")


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
    held = [str(opener) for n in free for opener in usage.openers(n)]
    if held:
        return Finding(
            "free devices",
            "warning",
            f"{len(free)} of {len(indices)}, but {held[0]}, so that it cannot be attached",
            "end that program, or attach another device",
        )
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
                f"nbdlink doctor {state.path} tells why; `nbdlink reconnect` renews it, "
                "`nbdlink detach --force` gives it up",
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
    return Finding("records", "warning", f"{where} cannot be written", "run it as root")


def _configuration() -> Finding:
    check = "configuration"
    try:
        links = files.load().links
    except NBDError as error:
        return failed(check, error)
    if not links:
        return Finding(check, "ok", f"{CONFIGURATION} names no links")
    noun = "link" if len(links) == 1 else "links"
    return Finding(check, "ok", f"{len(links)} {noun}: {', '.join(links)}")


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
