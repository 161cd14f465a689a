"""Which members of a mirror may be used at the start, whatever has happened before."""

from __future__ import annotations

import os
import shutil
import threading

import pytest

from nbdlink.errors import ConfigError, StorageError
from nbdlink.storage.mirror.record import peek

from ..arrays import read, write
from .conftest import SIZE


def drop(place, name):
    """Have a member dropped, and something written that it lacks."""
    mirror = place.mirror("a", "b")
    write(mirror, b"old" * 100, 0)
    place.fail(name, "write")
    write(mirror, b"new" * 100, 0)
    mirror.close()


def halves(place):
    """Have each half of a mirror changed where the other could not be seen."""
    place.mirror("a", "b").close()
    for name, other in ("ab", "ba"):
        hidden = place.path("hidden")
        hidden.mkdir()
        for each in (other, f"{other}.mirror"):
            place.path(each).rename(hidden / each)
        mirror = place.mirror(name, degraded=True)
        write(mirror, name.encode() * 100, 0)
        mirror.close()
        for each in (other, f"{other}.mirror"):
            (hidden / each).rename(place.path(each))
        hidden.rmdir()


# A new mirror.


def test_the_first_member_is_what_a_new_mirror_has(place):
    place.make("a", content=b"x" * SIZE)
    mirror = place.mirror("a", "b")
    assert place.states(mirror) == {"a": "good", "b": "good"}
    assert read(mirror) == place.path("b").read_bytes() == b"x" * SIZE


def test_a_new_member_is_not_read_before_it_is_rebuilt(place):
    place.make("a", content=b"x" * SIZE)
    mirror = place.mirror("a", "b", settled=False)
    place.favour(mirror, "b")
    for _ in range(20):
        assert read(mirror) == b"x" * SIZE
    assert peek(place.path("a.mirror")).members[0].state == "good"


@pytest.mark.parametrize("place_of_it", [0, SIZE // 2, SIZE - 1])
def test_other_data_is_not_overwritten(place, place_of_it):
    data = bytearray(SIZE)
    data[place_of_it] = 1
    place.make("b", content=data)
    with pytest.raises(StorageError, match="other data"):
        place.mirror("a", "b")
    assert place.path("b").read_bytes() == data
    assert not place.path("a.mirror").exists()


def test_a_member_that_is_alike_already_is_taken(place):
    place.make("a", "b", content=b"x" * SIZE)
    assert place.states(place.mirror("a", "b")) == {"a": "good", "b": "good"}


def test_one_member_is_no_mirror(place):
    with pytest.raises(ConfigError, match="two members or more"):
        place.mirror("a")


def test_a_member_cannot_be_named_twice(place):
    place.path("link").symlink_to(place.path("a"))
    with pytest.raises(ConfigError, match="twice"):
        place.mirror("a", "link")


def test_a_new_mirror_cannot_be_read_only(place):
    with pytest.raises(StorageError, match="no record"):
        place.mirror("a", "b", read_only=True)


# Members that were dropped.


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_dropped_member_stays_out_after_a_restart(place, name):
    drop(place, name)
    mirror = place.mirror("a", "b")
    place.favour(mirror, name)
    assert place.states(mirror)[name] == "stale"
    for _ in range(20):
        assert read(mirror, 0, 300) == b"new" * 100


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("degraded", [False, True])
def test_only_a_dropped_member_is_refused(place, name, degraded):
    drop(place, name)
    with pytest.raises(StorageError, match="only stale members are named"):
        place.mirror(name, degraded=degraded)


@pytest.mark.parametrize("name", ["a", "b"])
def test_without_the_dropped_member_it_starts(place, name):
    drop(place, name)
    other = "ab".replace(name, "")
    for each in (name, f"{name}.mirror"):
        place.path(each).unlink()
    assert read(place.mirror(other), 0, 300) == b"new" * 100


# Members that are missing.


@pytest.mark.parametrize("how", ["not named", "gone", "record gone", "short", "another file"])
def test_a_good_member_that_is_missing_stops_it_unless_told(place, how):
    mirror = place.mirror("a", "b")
    write(mirror, b"x" * SIZE, 0)
    mirror.close()
    names = ["a", "b"]
    if how == "not named":
        names.remove("b")
    elif how == "gone":
        place.path("b").unlink()
    elif how == "record gone":
        place.path("b.mirror").unlink()
    elif how == "short":
        os.truncate(place.path("b"), SIZE - 1)
    else:
        shutil.copy(place.path("b"), place.path("copy"))
        place.path("copy").rename(place.path("b"))
    with pytest.raises(StorageError, match=r"b, a good member of the mirror, is not there") as told:
        place.mirror(*names)
    assert "--degraded" in told.value.hint
    mirror = place.mirror(*names, degraded=True)
    assert place.states(mirror) == {"a": "good", "b": "stale"}
    assert read(mirror) == b"x" * SIZE
    mirror.close()
    # It was recorded, so from now on nobody need say it.
    assert place.states(place.mirror("a")) == {"a": "good", "b": "stale"}


def test_what_was_left_out_is_stale_when_it_comes_back(place):
    place.mirror("a", "b").close()
    mirror = place.mirror("a", degraded=True)
    write(mirror, b"x" * SIZE, 0)
    mirror.close()
    mirror = place.mirror("a", "b")
    assert place.states(mirror) == {"a": "good", "b": "stale"}
    place.favour(mirror, "b")
    for _ in range(10):
        assert read(mirror) == b"x" * SIZE


def test_halves_that_were_changed_apart_are_refused(place):
    halves(place)
    for names in (["a", "b"], ["b", "a"], ["a"], ["b"]):
        for degraded in (False, True):
            with pytest.raises(StorageError, match="split brain"):
                place.mirror(*names, degraded=degraded)


@pytest.mark.parametrize(("kept", "lost"), ["ab", "ba"])
def test_split_brain_ends_once_somebody_has_chosen(place, kept, lost):
    halves(place)
    place.path(f"{lost}.mirror").unlink()
    mirror = place.mirror("a", "b")
    assert place.states(mirror) == {kept: "good", lost: "stale"}
    assert read(mirror, 0, 100) == kept.encode() * 100
    mirror.rebuild(str(place.path(lost)))
    mirror.wait_until_built(lambda _: None, 1.0)
    mirror.close()
    assert place.path("a").read_bytes() == place.path("b").read_bytes()
    assert place.states(place.mirror("a", "b")) == {"a": "good", "b": "good"}


def test_a_second_server_is_refused(place):
    place.mirror("a", "b")
    for names in (["a", "b"], ["a"], ["b"]):
        with pytest.raises(StorageError, match="in use"):
            place.mirror(*names, degraded=True)


def test_members_of_two_mirrors_do_not_go_together(place):
    place.make("c", "d")
    place.mirror("a", "b").close()
    place.mirror("c", "d").close()
    with pytest.raises(StorageError, match="different mirrors"):
        place.mirror("a", "c")


def test_a_stranger_is_no_member(place):
    place.mirror("a", "b").close()
    place.make("c")
    with pytest.raises(StorageError, match="c is no member of the mirror"):
        place.mirror("a", "b", "c")


def test_a_damaged_record_is_not_taken_for_none(place):
    mirror = place.mirror("a", "b")
    mirror.close()
    for name in "ab":
        place.path(f"{name}.mirror").write_bytes(b"x" * 1000)
    with pytest.raises(StorageError, match="damaged"):
        place.mirror("a", "b")


def test_a_damaged_record_of_members_without_files_is_not_either(place, monkeypatch):
    monkeypatch.setattr("nbdlink.storage.mirror.places.keeps_copy", lambda address: False)
    place.mirror("a", "b").close()
    (record,) = place.folder.glob("state/mirrors/*.mirror")
    assert not place.path("a.mirror").exists()
    record.write_bytes(b"x" * 1000)
    with pytest.raises(StorageError, match="may be the record of this mirror"):
        place.mirror("a", "b")


def test_members_without_files_have_their_record_in_one_place(place, monkeypatch):
    monkeypatch.setattr("nbdlink.storage.mirror.places.keeps_copy", lambda address: False)
    drop(place, "a")
    mirror = place.mirror("a", "b")
    assert place.states(mirror) == {"a": "stale", "b": "good"}
    mirror.close()
    with pytest.raises(StorageError, match="only stale members"):
        place.mirror("a")


def test_files_may_be_renamed_with_their_records(place):
    mirror = place.mirror("a", "b")
    write(mirror, b"x" * SIZE, 0)
    mirror.close()
    for old, new in ("ac", "bd"):
        place.path(old).rename(place.path(new))
        place.path(f"{old}.mirror").rename(place.path(f"{new}.mirror"))
    mirror = place.mirror("c", "d")
    assert place.states(mirror) == {"c": "good", "d": "good"}
    assert read(mirror) == b"x" * SIZE


def test_read_only_it_changes_nothing(place):
    drop(place, "a")
    before = {path: path.read_bytes() for path in place.folder.iterdir() if path.is_file()}
    mirror = place.mirror("a", "b", read_only=True)
    assert read(mirror, 0, 300) == b"new" * 100
    with pytest.raises(StorageError, match="read-only"):
        mirror.rebuild(str(place.path("a")))
    mirror.close()
    after = {path: path.read_bytes() for path in place.folder.iterdir() if path.is_file()}
    assert before == after


# After a crash.


def differ(place):
    """Have a server die while a write is under way, which came to the second member only."""
    place.crash("ab", 'write(b"x" * 1000, 5000)')
    with place.path("b").open("r+b") as file:
        file.seek(5000)
        file.write(b"other")


def test_members_are_alike_again_after_a_crash(place):
    differ(place)
    mirror = place.mirror("a", "b")
    mirror.close()
    assert place.path("b").read_bytes() == place.path("a").read_bytes()
    assert read(place.mirror("a", "b"), 5000, 1000) == b"x" * 1000


def test_reads_do_not_change_their_minds_after_a_crash(place):
    differ(place)
    go = threading.Event()

    def opened(spec):
        storage = place._open(spec)
        genuine = storage.below.read_into

        def read_into(buffer, offset):
            if threading.current_thread().name == "nbd-rebuild" and spec.path.endswith("b"):
                go.wait(60)
            genuine(buffer, offset)

        storage.below.read_into = read_into
        return storage

    mirror = place.mirror("a", "b", settled=False, opened=opened)
    place.favour(mirror, "b")
    seen = {read(mirror, 5000, 5) for _ in range(20)}
    go.set()
    mirror.wait_until_built(lambda _: None, 1.0)
    assert seen | {read(mirror, 5000, 5) for _ in range(20)} == {b"xxxxx"}


def test_read_only_they_do_not_either(place):
    differ(place)
    mirror = place.mirror("a", "b", read_only=True, settled=False)
    place.favour(mirror, "b")
    assert {read(mirror, 5000, 5) for _ in range(200)} == {b"xxxxx"}


def test_only_regions_that_were_written_are_made_alike(place):
    place.crash("ab", 'write(b"x", 0); mirror.clean(); write(b"x" * 1000, 5000)')
    place.mirror("a", "b")
    assert place.storages["b"].seen == ["read"]


def test_a_loss_outlives_a_crash(place):
    place.crash(
        "ab",
        """
        write(b"old" * 100, 0)
        member = mirror.members[0].storage
        member.write = lambda *_: (_ for _ in ()).throw(OSError(5, "no"))
        write(b"new" * 100, 0)
        """.replace("\n        ", "\n"),
    )
    mirror = place.mirror("a", "b")
    place.favour(mirror, "a")
    assert place.states(mirror) == {"a": "stale", "b": "good"}
    assert {read(mirror, 0, 300) for _ in range(20)} == {b"new" * 100}
