"""The files that are served: random bytes as they are, and in qcow2 images.

Each server has an image of its own, as an image in use is locked against others. The
kinds of images, which rows call places:

- "preallocated": all tables are there (preallocation=metadata), and all data is.
- "grown": its clusters were allocated in random order, as guests do.
- "growing": 16 GiB of which nothing is allocated, made anew for each measurement.
- "chain": an empty image on a raw file.
"""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path
from typing import Final

MIB: Final = 1 << 20
_GROWN: Final = "16G"
"""What an image may grow to: more than any server writes in a measurement."""
_CLUSTER: Final = 64 << 10


def make_raw(path: Path, size: int) -> None:
    """Write a file of random bytes, of which none can be left out as zeroes."""
    with path.open("wb") as file:
        for _ in range(size // MIB):
            file.write(os.urandom(MIB))
        file.flush()
        os.fsync(file.fileno())


def make_qcow2(path: Path, kind: str, source: Path) -> None:
    """Make an image, or make it anew.

    Args:
        path: of the image.
        kind: see above.
        source: a raw file: as large as the disk shall be, and what "preallocated" and "chain" show.
    """
    path.unlink(missing_ok=True)
    size = source.stat().st_size
    create = ["qemu-img", "create", "-q", "-f", "qcow2"]
    if kind == "chain":
        _run([*create, "-b", str(source), "-F", "raw", str(path)])
    elif kind == "preallocated":
        _run([*create, "-o", "preallocation=metadata", str(path), str(size)])
        _run(["qemu-img", "convert", "-n", "-f", "raw", "-O", "qcow2", str(source), str(path)])
    elif kind == "growing":
        _run([*create, str(path), _GROWN])
    else:
        _run([*create, str(path), str(size)])
        clusters = list(range(size // _CLUSTER))
        random.Random(1).shuffle(clusters)
        words = "".join(f"write -q -P {1 + n % 255} {n * _CLUSTER} {_CLUSTER}\n" for n in clusters)
        _run(["qemu-io", "-f", "qcow2", str(path)], words)


def _run(command: list[str], words: str = "") -> None:
    subprocess.run(command, check=True, input=words, text=True, stdout=subprocess.DEVNULL)
