"""Writes that are lost behind an answer: whoever flushes must be told, however many do at once."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from nbdlink.storage.lost import LostWrites, Witness

# A device that takes writes into the page cache, and has no room when they are written back.
DISK = """
set -e
mount -t tmpfs -o size=4M none "$1" || exit 77
truncate -s 64M "$1/image"
device=$(losetup -f --show "$1/image") || exit 77
trap 'losetup -d "$device"' EXIT
head -c 8M /dev/zero >"$1/rest" 2>/dev/null || true
shift
"$@" "$device"
"""

PROGRAM = """
import os, sys, threading
from nbdlink.storage.raw import RawStorage

ROUNDS = 15
kind, device = sys.argv[1:]

def flush(storage, told, number):
    try:
        storage.flush()
    except OSError as error:
        told[number] = error.errno

def in_threads(storage):
    told = [0] * 6
    start, done = threading.Barrier(len(told)), threading.Event()

    def work(number):
        start.wait()
        flush(storage, told, number)

    def keep_the_interpreter_busy():
        while not done.is_set():
            pass

    busy = threading.Thread(target=keep_the_interpreter_busy)
    busy.start()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(told))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    busy.join()
    return told

def in_processes(storage):
    told = []
    children = []
    gate, go = os.pipe()
    for _ in range(4):
        heard, say = os.pipe()
        if not os.fork():
            os.close(go)
            os.read(gate, 1)
            os.write(say, bytes([min(in_threads(storage))]))
            os._exit(0)
        os.close(say)
        children.append(heard)
    storage.write(memoryview(os.urandom(4096)), place, False)
    os.close(go)
    os.close(gate)
    for heard in children:
        told += os.read(heard, 1)
        os.close(heard)
        os.wait()
    return told

for turn in range(ROUNDS):
    storage = RawStorage.open(device, locking=False)
    place = (turn + 1) << 20
    if kind == "processes":
        told = in_processes(storage)
    else:
        storage.write(memoryview(os.urandom(4096)), place, False)
        told = in_threads(storage)
    storage.close()
    if not all(told):
        sys.exit(f"in turn {turn} not all were told: {told}")
"""


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_all_who_flush_at_once_are_told_what_is_lost(tmp_path, kind):
    if os.geteuid() != 0:
        pytest.skip("takes a loop device")
    words = ["unshare", "-m", "sh", "-c", DISK, "sh", tmp_path, sys.executable, "-c", PROGRAM, kind]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    if done.returncode == 77:
        pytest.skip(f"there is no loop device, or nothing may be mounted: {done.stderr}")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_loss_that_has_no_common_number_is_kept_too():
    lost = LostWrites("disk")
    lost.note(OSError(526, "Unknown error 526"))  # ESERVERFAULT, as NFS gives it
    with pytest.raises(OSError, match="earlier writes were lost") as caught:
        lost.check()
    assert caught.value.errno == errno.EIO


def test_a_witness_that_nobody_keeps_is_closed(tmp_path):
    with (tmp_path / "file").open("wb") as file:
        witness = Witness.of(file.fileno())
        fd = witness._fd
        del witness
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
