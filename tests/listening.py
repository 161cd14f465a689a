"""Whether somebody listens, told without a connection: some servers end with their first client."""

from __future__ import annotations

from pathlib import Path

_ACCEPTS = 1 << 16  # __SO_ACCEPTCON, include/uapi/linux/net.h


def is_listening(path: Path) -> bool:
    """Tell whether a Unix socket is listened on. That its file is there says it is bound only."""
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        words = line.split(maxsplit=7)
        if len(words) == 8 and words[7] == str(path) and int(words[3], 16) & _ACCEPTS:
            return True
    return False
