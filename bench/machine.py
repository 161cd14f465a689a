"""On what machine the numbers were made."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path


def describe(disk: Path) -> dict[str, str]:
    """Give what a reader needs to know to place the numbers, as words by heading."""
    return {
        "processor": f"{_processor()}, {len(os.sched_getaffinity(0))} cores{_virtual()}",
        "memory": f"{_memory() / 2**20:.0f} GiB",
        "kernel": f"Linux {platform.release()}",
        "system": _system(),
        "disk": _file_system(disk),
        "load before": f"{os.getloadavg()[0]:.2f}",
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _virtual() -> str:
    flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    return " of a virtual machine" if "hypervisor" in flags else ""


def _memory() -> int:
    return int(Path("/proc/meminfo").read_text().split()[1])


def _system() -> str:
    return platform.freedesktop_os_release().get("PRETTY_NAME", "?")


def _file_system(folder: Path) -> str:
    command = ["findmnt", "--noheadings", "--output=FSTYPE", "--target", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "?"
