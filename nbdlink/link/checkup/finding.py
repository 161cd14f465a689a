"""One line of what was found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nbdlink.errors import NBDError

Status = Literal["ok", "warning", "failed"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: what.
        status: "failed" if it does not work because of this.
        found: what is there.
        remedy: what to do about it, or None.
    """

    check: str
    status: Status
    found: str
    remedy: str | None = None


def failed(check: str, error: NBDError, otherwise: str | None = None) -> Finding:
    """Make a finding of an error, with its own advice or else this one."""
    hint = error.hint
    if hint and "nbdlink doctor" in hint:
        hint = None  # that is who says it
    return Finding(check, "failed", str(error), hint or otherwise)
