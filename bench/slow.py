"""A delayed storage behind nbdlink's server: `python -m bench.slow SOCKET MILLISECONDS EVERY`.

What bench/slow_plugin.c is for nbdkit: every so-manieth block of 4 KiB takes a while to read,
and so does a flush; everything else is there at once. It stands for every storage that is no
raw file, so it has nothing but the methods that each has.
"""

from __future__ import annotations

import sys
import time

from nbdlink.server import Catalogue, Export, Service
from nbdlink.storage.base import Storage
from nbdlink.transport.stream import listen_unix


class SlowStorage(Storage):
    name = "slow"
    size = 256 << 20
    read_only = False

    def __init__(self, seconds: float, every: int) -> None:
        self._seconds = seconds
        self._every = every

    def _wait(self, offset: int) -> None:
        if offset // 4096 % self._every == 0:
            time.sleep(self._seconds)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        self._wait(offset)
        buffer[:] = bytes(len(buffer))

    def write(self, buffer: memoryview, offset: int, fua: bool) -> None:
        self._wait(offset)

    def flush(self) -> None:
        time.sleep(self._seconds)

    def close(self) -> None:
        pass


def main() -> int:
    path, milliseconds, every = sys.argv[1:]
    storage = SlowStorage(int(milliseconds) / 1000, int(every))
    return Service(Catalogue([Export("", storage)]), [listen_unix(path)]).run()


if __name__ == "__main__":
    sys.exit(main())
