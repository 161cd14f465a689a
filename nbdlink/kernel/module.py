"""Whether the running kernel has the nbd driver, and loading it."""

from __future__ import annotations

import os
from pathlib import Path

from nbdlink.errors import ModuleMissingError, RightsError

MAJOR = 43
"""NBD_MAJOR of `include/uapi/linux/major.h`."""

LOAD_SECONDS = 30.0

_DEVICES = Path("/proc/devices")
_MODPROBE = Path("/proc/sys/kernel/modprobe")


def loaded() -> bool:
    """Tell whether the driver is there, built in or as a module (`/proc/devices`)."""
    try:
        return f"\n{MAJOR:3} nbd\n" in _DEVICES.read_text()
    except OSError:
        return False


def require() -> None:
    """Make sure that the driver is there; loads the module if that is possible.

    Raises:
        ModuleMissingError: it is not, and `modprobe nbd` did not help.
    """
    if loaded():
        return
    if os.geteuid() != 0:
        raise ModuleMissingError(
            "the nbd kernel module is not loaded, and loading it takes root",
            hint="as root: modprobe nbd",
        )
    complaint = _modprobe()
    if not loaded():
        raise ModuleMissingError(
            f"the nbd kernel module is not loaded, and `modprobe nbd` failed: {complaint}",
            hint=f"install the kernel modules that belong to Linux {os.uname().release}; "
            "`nbdlink doctor` tells more",
        )


def require_loaded() -> None:
    """Make sure that the driver is there, without changing anything.

    Raises:
        ModuleMissingError: it is not.
    """
    if not loaded():
        raise ModuleMissingError(
            "the nbd kernel module is not loaded",
            hint="as root: modprobe nbd; `nbdlink doctor` tells whether it can be",
        )


def rights_error(what: str, errno: int) -> RightsError:
    """Give the one error for a caller that may not do `what`."""
    hint = "run it as root (CAP_SYS_ADMIN)"
    if os.geteuid() == 0:
        hint = "root of a container is not enough: CAP_SYS_ADMIN of the whole machine is needed"
    return RightsError(f"{what}: not permitted", errno=errno, hint=hint)


def _modprobe() -> str:
    """Run the modprobe that the kernel itself would run; give its complaint in one line."""
    import subprocess

    try:
        # The administrator's choice; an empty one means that nothing shall be loaded.
        program = _MODPROBE.read_text().strip()
    except OSError:
        program = "/sbin/modprobe"
    if not program or not Path(program).exists():
        return "there is no modprobe"
    try:
        done = subprocess.run(
            [program, "nbd"], capture_output=True, text=True, timeout=LOAD_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return " ".join(done.stderr.split()) or f"exit status {done.returncode}"
