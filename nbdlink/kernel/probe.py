"""Asking a device whether it lives: one block, read past the cache, within a deadline.

A read from a device whose server is silent sleeps until the request times out, and longer if
it may wait for a renewal; no signal ends it. So each device is read by a process of its own
that belongs to nobody: if it is late, it is left behind and ends when its read does.

This file is also that program, run by path as `python -I -S probe.py DEADLINE PATH...`: at its
top it imports nothing but the standard library, and little of that.
"""

from __future__ import annotations

import errno
import mmap
import os
import select
import sys
import time

_LARGEST_BLOCK = 65536


def read_a_block(indices: list[int], seconds: float) -> dict[int, int | None]:
    """Read the first block of each device.

    Args:
        indices: which devices; all are asked at once.
        seconds: how long to wait for the slowest.

    Returns:
        By index: 0 if the read worked, else its errno, or None if it has not come back.
    """
    import subprocess

    if not indices:
        return {}
    paths = [f"/dev/nbd{index}" for index in indices]
    done = subprocess.run(
        [sys.executable, "-I", "-S", __file__, str(seconds), *paths],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    results: dict[int, int | None] = dict.fromkeys(indices)
    for line in done.stdout.decode().splitlines():
        number, result = map(int, line.split())
        results[indices[number]] = result
    return results


def _read(path: str) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        # Anonymous memory begins at a page, which O_DIRECT wants; the size fits any block size.
        with mmap.mmap(-1, _LARGEST_BLOCK) as memory:
            size = min(os.lseek(fd, 0, os.SEEK_END), _block_size(path))
            count = os.preadv(fd, [memoryview(memory)[:size]], 0)
    except OSError as error:
        return error.errno or errno.EIO
    except BufferError:
        return 0  # the view is still held where mmap closes; the read was done by then
    return 0 if count else errno.ENXIO


def _block_size(path: str) -> int:
    name = path.rpartition("/")[2]
    # Not by pathlib, whose import takes longer than all this program does.
    fd = os.open(f"/sys/class/block/{name}/queue/logical_block_size", os.O_RDONLY)
    try:
        return int(os.read(fd, 32))
    finally:
        os.close(fd)


def _main(deadline: float, paths: list[str]) -> None:
    answers, answer = os.pipe()
    for number, path in enumerate(paths):
        if os.fork() == 0:
            # Nobody's child and in nobody's session, holding none of the caller's streams:
            # whoever waits for their end would wait for the read.
            os.setsid()
            null = os.open(os.devnull, os.O_RDWR)
            for stream in range(3):
                os.dup2(null, stream)
            os.close(answers)
            result = _read(path)
            try:
                os.write(answer, f"{number} {result}\n".encode())
            finally:
                os._exit(0)
    os.close(answer)
    end = time.monotonic() + deadline
    while (left := end - time.monotonic()) > 0 and select.select([answers], [], [], left)[0]:
        chunk = os.read(answers, 4096)
        if not chunk:
            break
        os.write(1, chunk)


if __name__ == "__main__":
    _main(float(sys.argv[1]), sys.argv[2:])
    os._exit(0)
