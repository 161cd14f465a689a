"""Rebuilding a member while the mirror is in use."""

from __future__ import annotations

import errno
import os
import random
import shutil
import threading
from dataclasses import replace

import pytest

from nbdlink.errors import StorageError
from nbdlink.storage.mirror.record import peek

from ..arrays import read, write
from .conftest import REGION, SIZE


def built(mirror):
    mirror.wait_until_built(lambda _: None, 1.0)


def without(place, name, *names, content=b"x" * SIZE):
    """Give a mirror of which a member was dropped before all was written anew."""
    mirror = place.mirror(*names)
    place.fail(name, "write")
    write(mirror, content, 0)
    return mirror


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_rebuilt_member_has_everything_and_is_good(place, name):
    mirror = without(place, name, "a", "b")
    mirror.rebuild(str(place.path(name)))
    built(mirror)
    assert place.states(mirror) == {"a": "good", "b": "good"}
    assert all(m.state == "good" for m in peek(place.path("b.mirror")).members)
    mirror.close()
    assert place.path("a").read_bytes() == place.path("b").read_bytes() == b"x" * SIZE


def test_a_new_disk_in_the_place_of_the_old_is_rebuilt(place):
    mirror = without(place, "b", "a", "b")
    place.path("b").unlink()
    place.path("b.mirror").unlink()
    place.make("b")
    mirror.rebuild(str(place.path("b")))
    built(mirror)
    mirror.close()
    assert place.path("b").read_bytes() == b"x" * SIZE
    assert place.states(place.mirror("a", "b")) == {"a": "good", "b": "good"}


def test_to_a_member_that_has_failed_all_is_written(place):
    # What it reads may be in the page cache only, see rule 11.
    mirror = place.mirror("a", "b")
    write(mirror, b"x" * SIZE, 0)
    place.fail("b", "flush")
    mirror.flush()
    mirror.rebuild(str(place.path("b")))
    built(mirror)
    assert place.states(mirror) == {"a": "good", "b": "good"}
    assert place.storages["b"].seen.count("write") == SIZE // REGION


def test_so_it_is_whatever_restarts_meanwhile(place):
    without(place, "b", "a", "b").close()
    place.path("b").write_bytes(b"x" * SIZE)
    mirror = place.mirror("a", "b")
    mirror.rebuild(str(place.path("b")))
    built(mirror)
    assert place.storages["b"].seen.count("write") == SIZE // REGION


def test_a_record_that_could_not_be_written_once_can_be_later(place, monkeypatch):
    mirror = place.mirror("a", "b")
    place.make("c")
    # A member that had been taken out comes back with its record.
    shutil.copy(place.path("b.mirror"), place.path("c.mirror"))
    inode = place.path("c.mirror").stat().st_ino
    genuine = os.pwrite

    def fail(fd, data, position):
        if os.fstat(fd).st_ino == inode:
            raise OSError(errno.ENOSPC, "full")
        return genuine(fd, data, position)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail)
        with pytest.raises(StorageError, match=r"its record .* cannot be written"):
            mirror.replace(str(place.path("b")), str(place.path("c")))
    mirror.rebuild(str(place.path("c")))
    built(mirror)
    assert place.states(mirror) == {"a": "good", "c": "good"}


def test_it_is_flushed_before_it_is_recorded_as_good(place):
    mirror = without(place, "b", "a", "b")
    genuine = place._open
    told = []

    def opened(spec):
        storage = genuine(spec)
        below = storage.below.flush

        def flush():
            told.append(peek(place.path("a.mirror")).members[1].state)
            below()

        storage.below.flush = flush
        return storage

    mirror.members[1].opener = lambda: opened(replace(place.spec("b"), is_member=True))
    mirror.rebuild(str(place.path("b")))
    built(mirror)
    assert told == ["rebuilding"]
    assert peek(place.path("a.mirror")).members[1].state == "good"


def test_a_write_that_fails_everywhere_at_last_keeps_it_from_being_good(place):
    mirror = without(place, "b", "a", "b")
    genuine, found = mirror.membership.promote, []

    def promote(member):
        if not found:
            place.fail("a", "write")
            with pytest.raises(OSError, match="error"):
                write(mirror, b"y", 0)
            place.storages["a"].failing.clear()
        genuine(member)
        found.append(member.entry.state)

    mirror.membership.promote = promote
    mirror.rebuild(str(place.path("b")))
    built(mirror)
    assert found == ["rebuilding", "good"]


def test_it_is_not_read_before_it_is_good(place):
    place.make("b")
    mirror = without(place, "b", "a", "b")
    hold, seen = threading.Event(), threading.Event()
    genuine = mirror.members[1].opener

    def opened():
        storage = genuine()

        def wait():
            seen.set()
            hold.wait(60)

        storage.on_write = wait
        return storage

    mirror.members[1].opener = opened
    mirror.rebuild(str(place.path("b")))
    seen.wait(60)
    assert place.states(mirror) == {"a": "good", "b": "rebuilding"}
    place.favour(mirror, "b")
    for _ in range(20):
        assert read(mirror, SIZE - 100, 100) == b"x" * 100
    hold.set()
    built(mirror)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("size", [3 << 20, (3 << 20) + 5])
def test_writes_meanwhile_are_never_overwritten(place, size):
    """The rebuild goes on under writes of all kinds; then all is compared byte by byte."""
    chance = random.Random(size)
    place.make("a", "b", "c", size=size)
    mirror = place.mirror("a", "b", "c", region=64 << 10)
    model = bytearray(chance.randbytes(size))
    place.fail("c", "write")
    write(mirror, bytes(model), 0)
    mirror.rebuild(str(place.path("c")))
    count = 0
    while not all(state == "good" for state in place.states(mirror).values()) or count < 200:
        begin = chance.randrange(size)
        length = min(chance.choice([1, 100, 4096, 70000]), size - begin)
        if chance.random() < 0.2:
            mirror.zero(begin, length, may_trim=True, fast=False, fua=False)
            model[begin : begin + length] = bytes(length)
        else:
            data = chance.randbytes(length)
            write(mirror, data, begin, fua=chance.random() < 0.05)
            model[begin : begin + length] = data
        count += 1
        assert read(mirror, begin, length) == model[begin : begin + length]
    mirror.close()
    for name in "abc":
        assert place.path(name).read_bytes() == model


def copying(place, mirror, name, act):
    """Have something done while the rebuild writes to a member, the first time."""
    member = next(each for each in mirror.members if each.name.endswith(name))
    genuine = member.opener

    def opened():
        storage = genuine()

        def once():
            if threading.current_thread().name == "nbd-rebuild":
                storage.on_write = lambda: None
                act()

        storage.on_write = once
        return storage

    member.opener = opened
    mirror.rebuild(member.name)
    built(mirror)


def test_a_write_waits_for_the_copy_of_what_it_changes(place):
    mirror = without(place, "b", "a", "b")
    writer = threading.Thread(target=write, args=(mirror, b"y" * 100, 50))

    def act():
        writer.start()
        writer.join(0.3)  # time enough to come first, if it were let

    copying(place, mirror, "b", act)
    writer.join()
    mirror.close()
    assert place.path("b").read_bytes() == place.path("a").read_bytes()
    assert place.path("b").read_bytes()[50:150] == b"y" * 100


def test_a_region_in_which_a_write_failed_everywhere_is_copied_again(place):
    size = 2 << 20  # which is copied in two pieces
    place.make("a", "b", size=size)
    mirror = place.mirror("a", "b", region=size)
    place.fail("b", "write")
    write(mirror, b"x" * size, 0)
    tried = []

    def partly():
        with place.path("a").open("r+b") as file:
            file.seek(100)
            file.write(b"partly")
        raise OSError(errno.ENOSPC, "No space")

    def second_piece():
        place.storages["b"].on_write = lambda: None
        place.storages["a"].on_write = partly
        with pytest.raises(OSError, match="No space"):
            write(mirror, b"y" * 100, 100)
        place.storages["a"].on_write = lambda: None
        tried.append(1)

    def first_piece():
        place.storages["b"].on_write = second_piece

    copying(place, mirror, "b", first_piece)
    assert tried
    mirror.close()
    assert place.path("b").read_bytes() == place.path("a").read_bytes()


@pytest.mark.parametrize("what", ["write", "flush"])
def test_a_member_that_fails_again_stays_stale(place, what):
    mirror = without(place, "b", "a", "b")
    genuine = mirror.members[1].opener

    def opened():
        storage = genuine()
        storage.failing[what] = errno.EIO
        return storage

    mirror.members[1].opener = opened
    mirror.rebuild(str(place.path("b")))
    built(mirror)
    assert place.states(mirror) == {"a": "good", "b": "stale"}
    assert f"{what[:4]}" in mirror.status()["members"][1]["reason"]
    write(mirror, b"y" * SIZE, 0)
    assert read(mirror) == b"y" * SIZE


def test_what_cannot_be_read_anywhere_ends_it(place):
    mirror = without(place, "b", "a", "b")
    place.fail("a", "read")
    mirror.rebuild(str(place.path("b")))
    built(mirror)
    assert place.states(mirror) == {"a": "good", "b": "stale"}
    assert "cannot be read" in mirror.status()["members"][1]["reason"]


def test_one_that_was_interrupted_is_begun_again(place):
    place.crash(
        "ab",
        """
        member = mirror.members[1]
        genuine, member.storage.write = member.storage.write, lambda *_: 1 / 0
        write(b"x" * 40960, 0)
        opener = member.opener
        def broken():
            storage = opener()
            inner = storage.write
            def write(buffer, offset, fua):
                if offset > 20000:
                    os._exit(0)
                inner(buffer, offset, fua)
            storage.write = write
            return storage
        member.opener = broken
        mirror.rebuild(member.name)
        mirror.wait_until_built(lambda _: None, 1.0)
        sys.exit("it came to its end")
        """.replace("\n        ", "\n"),
    )
    assert [m.state for m in peek(place.path("a.mirror")).members] == ["good", "rebuilding"]
    mirror = place.mirror("a", "b")
    assert place.states(mirror) == {"a": "good", "b": "good"}
    mirror.close()
    assert place.path("b").read_bytes() == place.path("a").read_bytes() == b"x" * SIZE


def test_what_is_alike_is_not_written_again(place):
    place.mirror("a", "b").close()
    mirror = place.mirror("a", degraded=True)
    write(mirror, b"x" * SIZE, 0)
    mirror.close()
    mirror = place.mirror("a", "b")
    place.path("b").write_bytes(b"x" * (SIZE // 2) + bytes(SIZE // 2))
    mirror.rebuild(str(place.path("b")))
    built(mirror)
    assert place.storages["b"].seen.count("write") == SIZE // 2 // 4096


def test_holes_stay_holes(place):
    size = 32 << 20
    for name in "ab":
        os.truncate(place.path(name), size)
    mirror = place.mirror("a", "b", region=1 << 20)
    assert place.states(mirror) == {"a": "good", "b": "good"}
    place.fail("b", "write")
    write(mirror, b"x" * 100, 5 << 20)
    mirror.rebuild(str(place.path("b")))
    built(mirror)
    mirror.close()
    assert place.path("b").stat().st_blocks * 512 < size // 8


def test_what_is_no_member_cannot_be_rebuilt(place):
    mirror = place.mirror("a", "b")
    with pytest.raises(StorageError, match="no member"):
        mirror.rebuild("/nowhere")


def test_a_member_that_was_not_named_cannot_be_rebuilt(place):
    without(place, "b", "a", "b").close()
    mirror = place.mirror("a")
    with pytest.raises(StorageError, match="was not named"):
        mirror.rebuild(str(place.path("b")))


def test_one_that_has_become_too_small_cannot_be_rebuilt(place):
    mirror = without(place, "b", "a", "b")
    os.truncate(place.path("b"), SIZE - 1)
    with pytest.raises(StorageError, match="bytes, and the mirror"):
        mirror.rebuild(str(place.path("b")))
    assert place.states(mirror) == {"a": "good", "b": "stale"}


def test_one_with_larger_blocks_than_clients_know_cannot_be_rebuilt(place):
    mirror = without(place, "b", "a", "b")
    genuine = mirror.members[1].opener

    def opened():
        storage = genuine()
        storage.minimum_block = 4096
        return storage

    mirror.members[1].opener = opened
    with pytest.raises(StorageError, match="blocks of 4096 bytes only"):
        mirror.rebuild(str(place.path("b")))
    assert place.states(mirror) == {"a": "good", "b": "stale"}
