"""What this machine takes for the time, and whether anything keeps it right."""

from __future__ import annotations

import ctypes
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from nbdlink.link.checkup.finding import Finding

CHECK: Final = "clock"

_TIME_ERROR: Final = 5
"""What adjtimex(2) gives for a clock that nothing synchronises."""
_TIMEX_BYTES: Final = 512
"""More than `struct timex` has on any machine; all zero it asks, and sets nothing."""


def synchronised() -> bool | None:
    """Tell whether something synchronises the clock; None if the kernel does not say."""
    try:
        state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
    except (OSError, AttributeError):
        return None
    return None if state < 0 else state != _TIME_ERROR


def says(now: datetime | None = None, but: str = "") -> str:
    """Give what the clock says, what speaks against that, and whether anything keeps it right."""
    moment = now or datetime.now(UTC)
    alone = "; nothing synchronises it" if synchronised() is False else ""
    return f"this machine's clock says {moment:%Y-%m-%d %H:%M:%S} UTC{but}{alone}"


def examine_clock(now: datetime | None = None, installed: float | None = None) -> Finding:
    """Look whether the clock can be right: it is not if nbdlink was installed in its future.

    Args:
        now: what the clock says, or None to ask it.
        installed: when nbdlink was installed, in seconds since the epoch, or None to look.
    """
    now = now or datetime.now(UTC)
    since = datetime.fromtimestamp(installed or Path(__file__).stat().st_mtime, UTC)
    if now >= since:
        return Finding(CHECK, "ok", says(now))
    return Finding(
        CHECK,
        "warning",
        says(now, f", but nbdlink was installed on {since:%Y-%m-%d}"),
        "set it (timedatectl set-ntp true, or date -s), or no certificate can be verified",
    )
