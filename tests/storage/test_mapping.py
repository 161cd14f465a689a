"""Pages of a file that are lent to system calls, and never looked into here."""

from __future__ import annotations

import os
import random
import socket
import sys
import tempfile
import threading

import pytest

from nbdlink.storage import mapping
from nbdlink.storage.mapping import FileMapping, is_in_memory

WINDOW = 64 << 10
SIZE = 5 * WINDOW + 777


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(mapping, "_WINDOW", WINDOW)
    (tmp_path / "file").write_bytes(os.urandom(SIZE))
    with (tmp_path / "file").open("r+b") as file:
        yield file


def sent(view):
    """Have the kernel read a view, as it is meant; give what it read."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        count = ours.sendmsg([view])
        return theirs.recv(count, socket.MSG_WAITALL)


def lend(mapping_, offset, length):
    """Give a range's bytes as the engine lends them, or None."""
    window = mapping_.window(offset)
    if not window.first <= offset <= offset + length <= window.last:
        return None
    return window.pages[offset - window.first :][:length]


@pytest.mark.parametrize("start", [0, 1, 4095, WINDOW - 1, WINDOW + 5])
def test_a_window_shows_what_is_there(file, start):
    content = os.pread(file.fileno(), SIZE, 0)
    lent = FileMapping(file.fileno(), start, SIZE - start)
    rng = random.Random(start)
    for _ in range(50):
        offset = rng.randrange(SIZE - start)
        length = rng.randrange(1, min(10_000, SIZE - start - offset) + 1)
        view = lend(lent, offset, length)
        crosses = (start + offset) // WINDOW != (start + offset + length - 1) // WINDOW
        assert (view is None) == crosses
        if view is not None:
            assert sent(view) == content[start + offset :][:length]
    lent.close()


def test_a_window_shows_later_writes(file):
    view = lend(FileMapping(file.fileno(), 0, SIZE), 100, 5)
    os.pwrite(file.fileno(), b"later", 100)
    assert sent(view) == b"later"


def windows(lent):
    return [lend(lent, at, 10) is not None for at in range(0, SIZE, WINDOW)]


def test_a_window_makes_room_for_another_only_now_and_then(file, monkeypatch):
    monkeypatch.setattr(mapping, "_WINDOWS", 2)
    monkeypatch.setattr(mapping, "_TURN", 1000)
    assert windows(FileMapping(file.fileno(), 0, SIZE)) == [True] * 3 + [False] * 3


def test_a_stream_of_reads_takes_its_windows_along(file, monkeypatch):
    monkeypatch.setattr(mapping, "_WINDOWS", 2)
    monkeypatch.setattr(mapping, "_TURN", 0)
    assert windows(FileMapping(file.fileno(), 0, SIZE)) == [True] * 6


def test_a_view_outlives_the_mapping(file):
    lent = FileMapping(file.fileno(), 0, SIZE)
    view = lend(lent, 0, 100)
    lent.close()
    assert sent(view) == os.pread(file.fileno(), 100, 0)


def test_what_was_truncated_cannot_be_mapped(file):
    lent = FileMapping(file.fileno(), 0, SIZE)
    os.truncate(file.fileno(), WINDOW)
    assert lend(lent, 2 * WINDOW, 10) is None


def test_what_is_truncated_after_mapping_is_a_bad_address(file):
    lent = FileMapping(file.fileno(), 0, SIZE)
    view = lend(lent, WINDOW, WINDOW)
    os.truncate(file.fileno(), WINDOW)
    with pytest.raises(OSError, match="Bad address"):
        sent(view)


def test_threads_may_map_at_the_same_time(file):
    content = os.pread(file.fileno(), SIZE, 0)
    failures = []

    def look(lent, seed):
        rng = random.Random(seed)
        try:
            for _ in range(20):
                offset = rng.randrange(5) * WINDOW
                assert sent(lend(lent, offset, 10)) == content[offset : offset + 10]
        except BaseException as failure:
            failures.append(failure)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for seed in range(20):
            lent = FileMapping(file.fileno(), 0, SIZE)
            threads = [threading.Thread(target=look, args=(lent, seed + i)) for i in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures


def test_what_is_in_the_page_cache_is_known_to_be(file):
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
    lent = FileMapping(file.fileno(), 5, SIZE - 5)
    assert os.pread(file.fileno(), SIZE, 0)
    assert lent.is_cached(0, SIZE - 5, 200)
    assert {lent.seen[0], lent.seen[SIZE // 4096]} == {200}


def test_what_lies_behind_the_end_is_not_in_the_page_cache(file):
    lent = FileMapping(file.fileno(), 0, SIZE)
    os.truncate(file.fileno(), WINDOW)
    lent.nowait = 0
    assert not lent.is_cached(WINDOW, 1, 200)
    assert not lent.is_cached(0, WINDOW + 1, 200)


def test_a_descriptor_tells_whether_its_file_lies_in_memory(file):
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as other:
        assert is_in_memory(other.fileno())
    assert not is_in_memory(-1)
