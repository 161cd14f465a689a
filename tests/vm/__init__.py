"""A throw-away virtual machine that runs a stock Debian kernel over this machine's own files.

The kernel comes from the Debian archive and is only unpacked, never installed (`kernels`).
QEMU boots it with a small initramfs (`initramfs`, `stage1.sh`, `guest.sh`) whose root is this
machine's root directory, read-only, with an overlay in the guest's memory on top: the guest
sees every program and the project as they are here, may write anywhere, and leaves nothing
behind. `boot` runs one command in it, `suite` the tests.

Why not virtme-ng, which does the same: its root is mounted over 9p without a cache, which
makes every import of Python four times slower under software emulation; it triggers a full
udev coldplug, which doubles the time to boot; and it wants a writable /proc/self/fd/1.
"""

from __future__ import annotations


class VMError(Exception):
    """The machine could not be made or did not do what it was asked.

    Attributes:
        hint: what to do next, in one line, or None.
        detail: more lines to show, such as the end of a log, or the empty string.
    """

    def __init__(self, message: str, *, hint: str | None = None, detail: str = "") -> None:
        super().__init__(message)
        self.hint = hint
        self.detail = detail


class UnavailableError(VMError):
    """What the machine is made of is not here: no fault of what was to be tried in it."""


class TimedOutError(VMError, TimeoutError):
    """What ran in the machine did not end in time."""
