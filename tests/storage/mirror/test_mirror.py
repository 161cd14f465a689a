"""A mirror: every good member has all, and what fails is dropped before anybody is told."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdlink.storage.mirror.record import peek

from ..arrays import play, read, scripts, told, write
from .conftest import REGION, SIZE, Place, regions


def recorded(path):
    """Give the states that a copy tells, by the members' names."""
    return {Path(m.address).name: m.state for m in peek(f"{path}.mirror").members}


@settings(max_examples=25)
@given(scripts(SIZE), st.integers(2, 4))
def test_members_are_what_an_array_of_bytes_is(tmp_path_factory, script, count):
    with contextlib.ExitStack() as stack:
        place = Place(tmp_path_factory.mktemp("mirror"), stack)
        names = "abcd"[:count]
        place.make(*names)
        model = bytearray(SIZE)
        mirror = place.mirror(*names)
        play(mirror, model, script)
        mirror.flush()
        assert read(mirror) == model
        assert all(place.path(name).read_bytes() == model for name in names)


@settings(max_examples=25)
@given(
    scripts(SIZE, most=4),
    st.lists(
        st.tuples(
            st.sampled_from(["read", "write", "zero", "flush"]), st.sampled_from(["a", "b", "c"])
        ),
        max_size=2,
        unique_by=lambda each: each[1],
    ),
    scripts(SIZE, most=6),
)
def test_with_two_of_three_failing_nothing_is_lost(tmp_path_factory, before, faults, after):
    with contextlib.ExitStack() as stack:
        place = Place(tmp_path_factory.mktemp("mirror"), stack)
        place.make("a", "b", "c")
        model = bytearray(SIZE)
        mirror = place.mirror("a", "b", "c")
        play(mirror, model, before)
        for what, name in faults:
            place.fail(name, what)
        play(mirror, model, after)
        mirror.flush()
        for _ in range(3):
            assert read(mirror) == model
        good = [name for name, state in place.states(mirror).items() if state == "good"]
        assert good
        assert all(place.path(name).read_bytes() == model for name in good)
        mirror.close()
        # And so it is after a restart.
        again = place.mirror("a", "b", "c")
        assert [n for n, state in place.states(again).items() if state == "good"] == good
        assert read(again) == model


# What fails is dropped.


@pytest.mark.parametrize(
    ("what", "code"),
    [("write", errno.EIO), ("write", errno.ENOSPC), ("zero", errno.EIO), ("flush", errno.EIO)],
)
@pytest.mark.parametrize("name", ["a", "b"])
def test_what_fails_is_dropped_and_recorded_before_it_is_acknowledged(place, what, code, name):
    mirror = place.mirror("a", "b")
    place.fail(name, what, code)
    other = "ab".replace(name, "")
    if what == "write":
        write(mirror, b"x" * 100, 50)
    elif what == "zero":
        mirror.zero(0, 100, may_trim=False, fast=False, fua=False)
    else:
        mirror.flush()
    expected = {name: "stale", other: "good"}
    assert recorded(place.path(other)) == recorded(place.path(name)) == expected
    assert place.states(mirror) == expected


def test_a_dropped_member_is_never_read_nor_written(place):
    mirror = place.mirror("a", "b")
    place.fail("a", "write")
    write(mirror, b"x" * SIZE, 0)
    dropped = place.storages["a"]
    place.favour(mirror, "a")
    dropped.failing.clear()
    dropped.seen.clear()
    for _ in range(20):
        assert read(mirror) == b"x" * SIZE
    write(mirror, b"y" * SIZE, 0)
    mirror.flush()
    assert dropped.seen == []


def test_a_read_that_fails_is_done_by_another_member(place):
    mirror = place.mirror("a", "b")
    write(mirror, b"x" * SIZE, 0)
    place.fail("a", "read")
    place.favour(mirror, "a")
    for _ in range(20):
        assert read(mirror) == b"x" * SIZE
    assert recorded(place.path("b")) == {"a": "stale", "b": "good"}


def test_the_last_good_member_is_never_dropped(place):
    mirror = place.mirror("a", "b")
    place.fail("a", "write")
    write(mirror, b"x" * 100, 0)
    for what in ("write", "read", "flush"):
        place.fail("b", what, errno.ENOSPC)
    for act in (
        lambda: write(mirror, b"y" * 100, 0),
        lambda: read(mirror),
        lambda: mirror.flush(),
    ):
        with pytest.raises(OSError, match="No space") as caught:
            act()
        assert caught.value.errno == errno.ENOSPC
    place.storages["b"].failing.clear()
    assert read(mirror, 0, 100) == b"x" * 100
    assert recorded(place.path("b")) == {"a": "stale", "b": "good"}


def test_when_all_fail_none_is_dropped_and_they_are_made_alike_again(place):
    mirror = place.mirror("a", "b")
    write(mirror, b"x" * SIZE, 0)
    # The second writes before it fails, so that the two have different data.
    place.fail("a", "write", errno.ENOSPC)
    failing = place.storages["b"]

    def late(offset=100):
        os.pwrite(os.open(place.path("b"), os.O_WRONLY), b"partly", offset)
        raise OSError(errno.ENOSPC, "No space")

    failing.on_write = late
    with pytest.raises(OSError, match="No space"):
        write(mirror, b"y" * 1000, 100)
    failing.on_write = lambda: None
    place.storages["a"].failing.clear()
    mirror.wait_until_built(lambda _: None, 1.0)
    assert place.states(mirror) == {"a": "good", "b": "good"}
    mirror.flush()
    assert place.path("b").read_bytes() == place.path("a").read_bytes() == b"x" * SIZE


def test_a_loss_that_cannot_be_recorded_fails_the_write(place, monkeypatch):
    mirror = place.mirror("a", "b")
    write(mirror, b"x" * SIZE, 0)
    place.fail("a", "write")

    def refuse(fd, data, position):
        raise OSError(errno.EIO, "the record's disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr("nbdlink.storage.mirror.record._write", refuse)
        for _ in range(2):
            with pytest.raises(OSError, match="record cannot be written"):
                write(mirror, b"y" * 100, 0)
        assert recorded(place.path("b")) == {"a": "good", "b": "good"}
        # Its old data is not read, recorded or not.
        assert read(mirror, 0, 100) == b"y" * 100
    write(mirror, b"z" * 100, 0)
    assert recorded(place.path("b")) == {"a": "stale", "b": "good"}


def test_a_member_whose_copy_cannot_be_written_is_dropped(place, monkeypatch):
    mirror = place.mirror("a", "b")
    genuine = os.pwrite
    inode = place.path("a.mirror").stat().st_ino

    def fail(fd, data, position):
        if os.fstat(fd).st_ino == inode:
            raise OSError(errno.EIO, "gone")
        return genuine(fd, data, position)

    monkeypatch.setattr(os, "pwrite", fail)
    write(mirror, b"x" * 100, 0)
    assert place.states(mirror) == recorded(place.path("b")) == {"a": "stale", "b": "good"}


# The bitmap.


def test_a_region_is_in_the_bitmap_before_it_is_written(place):
    mirror = place.mirror("a", "b")
    seen = []
    place.storages["a"].on_write = lambda: seen.append(
        (regions(place.path("a")), regions(place.path("b")))
    )
    write(mirror, b"x" * 2, 3 * REGION - 1)
    assert seen == [({2, 3}, {2, 3})]


def test_regions_leave_the_bitmap_after_a_flush(place):
    mirror = place.mirror("a", "b")
    write(mirror, b"x", 0)
    for storage in place.storages.values():
        storage.seen.clear()
    mirror.clean()
    assert regions(place.path("a")) == regions(place.path("b")) == set()
    assert all(storage.seen == ["flush"] for storage in place.storages.values())
    write(mirror, b"x", 0)
    assert regions(place.path("a")) == {0}


def test_a_region_that_is_written_to_meanwhile_stays(place):
    mirror = place.mirror("a", "b")
    write(mirror, b"x", 0)
    write(mirror, b"x", REGION)
    inner = place.storages["b"].below
    genuine = inner.flush

    def flush():
        genuine()
        inner.flush = genuine
        write(mirror, b"y", REGION)

    inner.flush = flush
    mirror.clean()
    assert regions(place.path("a")) == {1}


def test_a_region_that_is_being_written_stays(place):
    mirror = place.mirror("a", "b")
    place.storages["b"].on_write = mirror.clean
    write(mirror, b"x", 0)
    assert regions(place.path("a")) == {0}


def test_it_is_empty_after_a_proper_end(place):
    mirror = place.mirror("a", "b")
    write(mirror, b"x" * SIZE, 0)
    mirror.close()
    assert regions(place.path("a")) == set()


# Order.


def test_writes_that_overlap_come_to_all_members_in_the_same_order(place):
    mirror = place.mirror("a", "b")
    rounds, writers = 30, 4
    barrier = threading.Barrier(writers)
    failures = []

    def work(number):
        data = bytes([number + 1]) * 3000
        try:
            for each in range(rounds):
                barrier.wait(60)
                write(mirror, data, 100 * number + each, fua=each % 2 == 0)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    mirror.flush()
    assert not failures
    assert place.path("a").read_bytes() == place.path("b").read_bytes()


def test_a_write_waits_for_one_that_overlaps_and_is_not_in_all_members_yet(place):
    mirror = place.mirror("a", "b")
    others = []

    def interfere():
        place.storages["b"].on_write = lambda: None
        others.append(threading.Thread(target=write, args=(mirror, b"y" * 100, 50)))
        others[0].start()
        others[0].join(0.3)  # time enough to come first, if it were let

    place.storages["b"].on_write = interfere
    write(mirror, b"x" * 100, 0)
    others[0].join()
    mirror.flush()
    assert place.path("a").read_bytes() == place.path("b").read_bytes()
    assert read(mirror, 0, 150) == b"x" * 50 + b"y" * 100


def test_reads_are_spread_over_members(place):
    size = 64 << 20
    for name in "ab":
        place.path(name).touch()
        os.truncate(place.path(name), size)
    mirror = place.mirror("a", "b", region=1 << 20)
    for storage in place.storages.values():
        storage.seen.clear()
    for offset in range(0, size, 1 << 20):
        read(mirror, offset, 10)
    assert {len(storage.seen) for storage in place.storages.values()} == {32}


def test_a_member_that_is_busy_is_not_asked(place):
    mirror = place.mirror("a", "b")
    begun, go = threading.Event(), threading.Event()
    slow = place.storages["a"]
    genuine = slow.below.read_into

    def wait(buffer, offset):
        begun.set()
        go.wait(60)
        genuine(buffer, offset)

    slow.below.read_into = wait
    reader = threading.Thread(target=read, args=(mirror, 0, 10))
    reader.start()
    begun.wait(60)
    place.storages["b"].seen.clear()
    for _ in range(5):
        read(mirror, 0, 10)
    assert place.storages["b"].seen == ["read"] * 5
    go.set()
    reader.join()


def test_holes_are_told(place):
    mirror = place.mirror("a", "b")
    mirror.zero(0, SIZE, may_trim=True, fast=False, fua=False)
    assert told(mirror) == [(0, SIZE, 3)]
    place.fail("a", "read")
    assert sum(length for _, length, _ in told(mirror)) == SIZE


def test_a_member_stays_open_while_it_tells_of_holes(place):
    mirror = place.mirror("a", "b")
    extents = mirror.extents("base:allocation", 0, SIZE)
    next(extents)
    assert sum(member.users for member in mirror.members) == 1
    extents.close()
    assert sum(member.users for member in mirror.members) == 0


def test_a_trim_leaves_the_same_in_all_members(place):
    place.make("a", content=b"x" * SIZE)
    mirror = place.mirror("a", "b")
    mirror.trim(10, SIZE - 20, False)
    assert place.path("a").read_bytes() == place.path("b").read_bytes()


def test_a_fast_zero_is_refused_and_changes_nothing(place):
    mirror = place.mirror("a", "b")
    with pytest.raises(OSError, match="fast") as caught:
        mirror.zero(0, SIZE, may_trim=False, fast=True, fua=False)
    assert caught.value.errno == errno.ENOTSUP


def test_the_smallest_member_counts(place):
    place.make("b", size=SIZE + 5000)
    assert place.mirror("a", "b").size == SIZE
