"""Writes that are acknowledged early: what is read and waited for, what becomes of failures."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from nbdlink.storage.writebehind import WriteBehind

from ..server.fakes import MemoryStorage
from .arrays import read, told, write

K = 1024
TIMEOUT = 30


@pytest.fixture
def below():
    """A storage whose writes wait for its gate."""
    storage = MemoryStorage(256 * K)
    storage.gate.clear()
    return storage


@pytest.fixture
def storage(below):
    layer = WriteBehind(below, 64 * K)
    yield layer
    below.gate.set()
    if not below.closed:
        with contextlib.suppress(OSError):  # of a loss, which is what some tests are about
            layer.close()


@pytest.fixture
def later():
    """Call something in a thread; give what tells of its outcome."""
    with ThreadPoolExecutor() as threads:
        yield threads.submit


def test_a_write_is_acknowledged_before_it_is_done_and_read_back(below, storage):
    before = bytes(below.data)
    write(storage, b"x" * 8 * K, 4 * K)
    assert bytes(below.data) == before
    assert read(storage, 0, 16 * K) == before[: 4 * K] + b"x" * 8 * K + before[12 * K : 16 * K]


def test_overlapping_writes_stay_in_order(below, storage):
    for number in range(8):
        write(storage, bytes([number]) * (9 - number) * K, number * 100)
    expected = bytearray(below.data[: 16 * K])
    for number in range(8):
        expected[number * 100 : number * 100 + (9 - number) * K] = (
            bytes([number]) * (9 - number) * K
        )
    assert read(storage, 0, 16 * K) == expected
    below.gate.set()
    storage.flush()
    assert below.data[: 16 * K] == expected


def test_one_write_over_another_that_waits_takes_its_place(below, storage):
    write(storage, b"a" * 4 * K, 0)
    assert below.entered.wait(TIMEOUT)
    for letter in (b"b", b"c", b"d"):
        write(storage, letter * 4 * K, 0)
    below.gate.set()
    storage.flush()
    assert below.data[: 4 * K] == b"d" * 4 * K
    assert [call for call in below.calls if call[0] == "write"] == 2 * [("write", 0, 4 * K, False)]


@pytest.mark.parametrize(
    "act",
    [
        lambda storage: storage.flush(),
        lambda storage: write(storage, b"y" * K, 128 * K, fua=True),
        lambda storage: storage.zero(128 * K, K, may_trim=False, fast=False, fua=True),
        lambda storage: storage.trim(128 * K, K, True),
    ],
    ids=["flush", "write", "zero", "trim"],
)
def test_what_is_to_be_durable_waits_for_all_that_was_acknowledged(below, storage, later, act):
    write(storage, b"x" * K, 0)
    assert below.entered.wait(TIMEOUT)
    done = later(act, storage)
    asked = len(below.calls)
    below.gate.set()
    done.result(TIMEOUT)
    assert asked == 1
    assert below.data[:K] == b"x" * K
    assert below.calls[0][0] == "write"
    assert len(below.calls) == 2


def test_what_overlaps_a_write_with_fua_does_not_keep_it_waiting_for_itself(storage, below, later):
    write(storage, b"a" * K, 0)
    assert below.entered.wait(TIMEOUT)
    first = later(write, storage, b"b" * K, 0, True)
    write(storage, b"c" * 2 * K, 0)
    below.gate.set()
    first.result(TIMEOUT)
    storage.flush()
    assert below.data[K : 2 * K] == b"c" * K


@pytest.mark.parametrize("what", ["zero", "trim"])
def test_zeroes_and_trims_keep_their_place_among_writes(below, storage, later, what):
    write(storage, b"a" * 4 * K, 0)
    assert below.entered.wait(TIMEOUT)
    if what == "zero":
        done = later(storage.zero, 0, 8 * K, may_trim=False, fast=False, fua=False)
    else:
        done = later(storage.trim, 0, 8 * K, False)
    below.gate.set()
    done.result(TIMEOUT)
    write(storage, b"b" * K, 0)
    storage.flush()
    assert [call[0] for call in below.calls] == ["write", what, "write", "flush"]
    assert below.data[:K] == b"b" * K


def test_block_status_waits_for_what_is_queued_in_its_range(below, storage, later):
    write(storage, b"x" * K, 0)
    assert told(storage, offset=128 * K, length=K) == [(128 * K, K, 0)]
    answer = later(told, storage, offset=0, length=K)
    below.gate.set()
    assert answer.result(TIMEOUT) == [(0, K, 0)]
    assert below.data[:K] == b"x" * K


def test_who_writes_more_than_there_is_memory_for_waits(below, storage, later, eventually):
    for at in range(16):
        write(storage, b"x" * 4 * K, at * 4 * K)
    more = [later(write, storage, b"y" * 4 * K, (16 + at) * 4 * K) for at in range(2)]
    eventually(lambda: len(storage._turns) == 2)
    assert not any(each.done() for each in more)
    below.gate.set()
    for each in more:
        each.result(TIMEOUT)
    storage.flush()
    assert below.data[: 72 * K] == b"x" * 64 * K + b"y" * 8 * K


def test_a_write_that_is_longer_than_the_memory_is_done_at_once(below, storage):
    below.gate.set()
    write(storage, b"x" * 65 * K, 0)
    assert below.data[: 65 * K] == b"x" * 65 * K


def test_a_failure_is_logged_and_told_by_every_flush_from_then_on(below, storage, caplog):
    below.gate.set()
    below.failing["write"] = errno.ENOSPC
    with caplog.at_level(logging.ERROR, "nbdlink.storage"):
        write(storage, b"x" * K, 3 * K)
        with pytest.raises(OSError, match="earlier writes were lost") as caught:
            storage.flush()
    assert caught.value.errno == errno.ENOSPC
    assert "1024 bytes at 3072 that were acknowledged could not be written" in caplog.text
    del below.failing["write"]
    for act in (
        storage.flush,
        lambda: write(storage, b"x", 0, fua=True),
        lambda: storage.zero(0, 1, may_trim=False, fast=False, fua=True),
        storage.close,
    ):
        with pytest.raises(OSError, match="earlier writes were lost"):
            act()


def test_after_a_failure_nothing_is_acknowledged_early(below, storage):
    below.gate.set()
    below.failing["write"] = errno.EIO
    write(storage, b"x" * K, 0)
    with pytest.raises(OSError, match="earlier writes were lost"):
        storage.flush()
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        write(storage, b"x" * K, 0)
    below.failing.clear()


def test_a_bug_below_leaves_nobody_waiting(below, storage):
    below.gate.set()
    below.failing["write"] = ZeroDivisionError()
    write(storage, b"x" * K, 0)
    with pytest.raises(OSError, match="earlier writes were lost"):
        storage.flush()
    below.failing.clear()


def test_closing_writes_all_out(below, storage, later):
    write(storage, b"x" * K, 0)
    assert below.entered.wait(TIMEOUT)
    closed = later(storage.close)
    below.gate.set()
    closed.result(TIMEOUT)
    assert below.data[:K] == b"x" * K
    assert below.closed


def test_a_reader_never_sees_an_older_write_after_a_newer_one():
    below = MemoryStorage(4 * K)
    below.data[:] = bytes(4 * K)
    storage = WriteBehind(below, 16 * K)
    stop = threading.Event()
    went_back = []

    def look():
        last = {0: 0, 2 * K: 0}
        while not stop.is_set():
            for at in last:
                number = int.from_bytes(read(storage, at, 4), "big")
                if number < last[at]:
                    went_back.append((at, last[at], number))
                last[at] = number

    reader = threading.Thread(target=look)
    reader.start()
    for number in range(1, 2000):
        # One that is replaced, and one whose neighbours overlap.
        write(storage, number.to_bytes(4, "big"), 0)
        write(storage, bytes(number % 7) + number.to_bytes(4, "big"), 2 * K - number % 7)
    stop.set()
    reader.join(TIMEOUT)
    storage.flush()
    assert not went_back
    assert below.data[2 * K : 2 * K + 4] == (1999).to_bytes(4, "big")
    storage.close()
