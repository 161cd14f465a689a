"""A mirror whose members have grown grows with them, in use, and whenever the power fails."""

from __future__ import annotations

import errno
import os
import threading
from dataclasses import replace

import pytest

import nbdlink
from nbdlink.errors import StorageError
from nbdlink.server import serve_in_thread
from nbdlink.storage.mirror import record
from nbdlink.storage.mirror.record import RecordFile, peek
from nbdlink.storage.open import Part

from ..arrays import read, write
from .conftest import REGION, SIZE, regions

MORE = SIZE + 3 * REGION + 1000


def grow(place, *names, size=MORE, byte=None):
    """Make members longer: of zeroes, or as disks are, of anything."""
    for name in names:
        with place.path(name).open("r+b") as file:
            file.truncate(size)
            if byte is not None:
                file.seek(SIZE)
                file.write(byte * (size - SIZE))


def built(mirror):
    mirror.wait_until_built(lambda _: None, 1.0)


def sizes(place):
    return {peek(place.path(f"{name}.mirror")).size for name in "ab"}


def test_it_grows_once_all_members_have(place):
    mirror = place.mirror("a", "b")
    grow(place, "a")
    mirror.notice_growth()
    assert mirror.size == SIZE
    grow(place, "b", size=MORE + 1)
    mirror.notice_growth()
    assert mirror.size == MORE
    assert sizes(place) == {MORE}
    write(mirror, b"x" * MORE, 0, fua=True)
    mirror.close()
    assert place.path("a").read_bytes() == b"x" * MORE
    assert place.path("b").read_bytes() == b"x" * MORE + b"\0"


def test_clients_see_it_in_use(place):
    mirror = place.mirror("a", "b")
    with serve_in_thread({"": mirror}) as service, nbdlink.connect(service.uri()) as before:
        grow(place, "a", "b")
        with nbdlink.connect(service.uri()) as nbd:
            assert nbd.size == MORE
            nbd.pwrite(b"x" * 100, MORE - 100, fua=True)
        assert before.size == SIZE
        before.pwrite(b"y", 0)


def test_the_content_of_the_first_member_counts_there(place):
    mirror = place.mirror("a", "b")
    write(mirror, b"x" * SIZE, 0)
    grow(place, "a", byte=b"a")
    grow(place, "b", byte=b"b")
    mirror.notice_growth()
    assert read(mirror) == b"x" * SIZE + b"a" * (MORE - SIZE)
    built(mirror)
    assert place.states(mirror) == {"a": "good", "b": "good"}
    place.favour(mirror, "b")
    assert read(mirror) == b"x" * SIZE + b"a" * (MORE - SIZE)


def test_it_is_read_from_no_other_member_before(place):
    mirror = place.mirror("a", "b")
    grow(place, "a", byte=b"a")
    grow(place, "b", byte=b"b")
    place.favour(mirror, "b")
    go_on = threading.Event()
    place.storages["b"].on_write = lambda: go_on.wait(30)
    mirror.notice_growth()
    assert read(mirror, SIZE) == b"a" * (MORE - SIZE)
    assert mirror.status()["health"] == "resyncing"
    go_on.set()
    built(mirror)


def test_what_is_written_there_meanwhile_is_in_all(place):
    mirror = place.mirror("a", "b")
    grow(place, "a", byte=b"a")
    grow(place, "b", byte=b"b")
    mirror.notice_growth()
    write(mirror, b"y" * 5000, SIZE + 10)
    built(mirror)
    expected = bytes(SIZE) + b"a" * 10 + b"y" * 5000 + b"a" * (MORE - SIZE - 5010)
    assert read(mirror) == expected
    mirror.close()
    assert place.path("a").read_bytes() == place.path("b").read_bytes() == expected


def test_its_regions_are_recorded_until_they_are_alike(place):
    mirror = place.mirror("a", "b")
    grow(place, "a", byte=b"a")
    grow(place, "b", byte=b"b")
    go_on = threading.Event()
    place.storages["b"].on_write = lambda: go_on.wait(30)
    mirror.notice_growth()
    mirror.clean()
    new = set(range(SIZE // REGION, MORE // REGION + 1))
    assert regions(place.path("a")) == regions(place.path("b")) == new
    go_on.set()
    built(mirror)
    mirror.clean()
    assert regions(place.path("a")) == regions(place.path("b")) == set()


def test_members_are_alike_whenever_the_power_fails(place, monkeypatch):
    paths = [place.path(name) for name in ("a", "b", "a.mirror", "b.mirror")]
    mirror = place.mirror("a", "b")
    write(mirror, b"x" * SIZE, 0)
    mirror.clean()
    grow(place, "a", byte=b"a")
    grow(place, "b", byte=b"b")
    seen = []
    genuine = record._write

    def look_and_write(fd, data, position):
        seen.append([path.read_bytes() for path in paths])
        genuine(fd, data, position)

    with monkeypatch.context() as patch:
        patch.setattr(record, "_write", look_and_write)
        mirror.notice_growth()
        built(mirror)
        mirror.close()
    assert len(seen) > 4
    for contents in seen:
        for path, content in zip(paths, contents, strict=True):
            path.write_bytes(content)
        mirror = place.mirror("a", "b", settled=False)
        mirror.notice_growth()
        assert mirror.size == MORE
        before = read(mirror)
        built(mirror)
        place.favour(mirror, "b")
        assert read(mirror) == before
        mirror.close()
        assert paths[0].read_bytes() == paths[1].read_bytes() == before


def test_a_crash_before_it_has_grown_leaves_it_as_it_was(place):
    mirror = place.mirror("a", "b")
    grow(place, "a", byte=b"a")
    grow(place, "b", byte=b"b")
    mirror.close()
    for name in "ab":
        file = RecordFile.open(place.path(f"{name}.mirror"), writable=True)
        file.write_regions({0, MORE // REGION}, durably=True)
        file.close()
    mirror = place.mirror("a", "b")
    assert mirror.status()["health"] == "good"
    assert mirror.size == SIZE


def test_growth_that_cannot_be_recorded_is_left_for_later(place, monkeypatch):
    mirror = place.mirror("a", "b")
    grow(place, "a", "b")

    def refuse(fd, data, position):
        raise OSError(errno.EIO, "the record's disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(record, "_write", refuse)
        mirror.notice_growth()
    assert (mirror.size, sizes(place)) == (SIZE, {SIZE})
    mirror.notice_growth()
    assert (mirror.size, sizes(place)) == (MORE, {MORE})


def test_a_stale_member_that_has_not_grown_is_not_rebuilt(place):
    mirror = place.mirror("a", "b")
    place.fail("b", "write")
    write(mirror, b"x", 0)
    grow(place, "a")
    mirror.notice_growth()
    assert mirror.size == MORE
    with pytest.raises(StorageError, match=f"b cannot be rebuilt: it has {SIZE} bytes, and the"):
        mirror.rebuild(str(place.path("b")))
    grow(place, "b")
    mirror.rebuild(str(place.path("b")))
    built(mirror)
    assert place.states(mirror) == {"a": "good", "b": "good"}


def test_a_member_that_comes_back_smaller_is_refused(place):
    mirror = place.mirror("a", "b")
    grow(place, "a", "b")
    mirror.notice_growth()
    mirror.close()
    os.truncate(place.path("b"), SIZE)
    with pytest.raises(StorageError, match=f"b, a good member .* it has {SIZE} bytes, and the"):
        place.mirror("a", "b")


def test_a_smaller_member_that_is_replaced_lets_it_grow(place):
    place.make("c", size=MORE)
    grow(place, "a")
    mirror = place.mirror("a", "b")
    mirror.replace(str(place.path("b")), str(place.path("c")))
    built(mirror)
    mirror.notice_growth()
    assert mirror.size == MORE
    built(mirror)
    assert place.states(mirror) == {"a": "good", "c": "good"}


def test_it_keeps_a_size_that_was_given(place, monkeypatch):
    genuine = place.spec
    monkeypatch.setattr(place, "spec", lambda name: replace(genuine(name), parts=(Part(0, SIZE),)))
    mirror = place.mirror("a", "b")
    grow(place, "a", "b")
    mirror.notice_growth()
    assert mirror.size == SIZE


def test_read_only_it_keeps_the_size_that_is_recorded(place):
    place.mirror("a", "b").close()
    grow(place, "a", "b")
    mirror = place.mirror("a", "b", read_only=True)
    mirror.notice_growth()
    assert mirror.size == SIZE


def test_regions_become_larger_where_the_bitmap_is_too_small(place, monkeypatch):
    monkeypatch.setattr(record, "REGIONS", 16)
    mirror = place.mirror("a", "b")
    size = 16 * REGION + 5000
    grow(place, "a", size=size, byte=b"a")
    grow(place, "b", size=size, byte=b"b")
    write(mirror, b"x", 9 * REGION)
    mirror.notice_growth()
    built(mirror)
    assert mirror.size == 16 * REGION
    records = {name: place.path(name).read_bytes() for name in ("a.mirror", "b.mirror")}
    mirror.close()
    for name, content in records.items():  # as if it had crashed
        place.path(name).write_bytes(content)
    mirror = place.mirror("a", "b")
    assert (mirror.region, mirror.size) == (2 * REGION, 16 * REGION)
    assert regions(place.path("a")) == {4, 5, 6, 7}
    mirror.notice_growth()
    built(mirror)
    assert mirror.size == size
    mirror.close()
    assert place.path("a").read_bytes() == place.path("b").read_bytes()
