"""The record of a mirror: whatever part of a change comes to the disk, it can be read."""

from __future__ import annotations

import errno
import itertools
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdlink.errors import StorageError
from nbdlink.storage.mirror import record
from nbdlink.storage.mirror.copies import Copies
from nbdlink.storage.mirror.record import REGIONS, Entry, RecordFile, State, peek, region_size


def first():
    return State.first(1 << 20, 4096, [Entry("/a"), Entry("/b", state="rebuilding")])


def test_a_new_copy_has_the_regions_from_the_beginning(tmp_path, monkeypatch):
    path = tmp_path / "a.mirror"
    state = State.first(1 << 20, 4096, [Entry(str(tmp_path / "a"))])
    copies = Copies(state, {}, writable=True)
    with monkeypatch.context() as patch:  # as if it crashed before
        patch.delattr(RecordFile, "write_regions")
        copies.write(state, {3})
    copies.close()
    assert opened(path) == (state, {3})


@pytest.fixture
def made(tmp_path):
    path = tmp_path / "a.mirror"
    RecordFile.create(path, first())
    return path


def opened(path):
    """Give state and regions of a record."""
    file = RecordFile.open(path, writable=False)
    try:
        return file.state, file.regions
    finally:
        file.close()


def test_it_says_what_was_written(made):
    file = RecordFile.open(made, writable=True)
    state = file.state
    for _ in range(5):
        state = state.changed([entry.become("stale", "why") for entry in state.members])
        file.write(state)
    file.write_regions({0, 9, REGIONS - 1}, durably=True)
    file.close()
    assert opened(made) == (state, {0, 9, REGIONS - 1})
    assert peek(made) == state


@given(
    st.lists(
        st.one_of(st.just("state"), st.sets(st.integers(0, REGIONS - 1), max_size=4)), max_size=6
    )
)
@settings(max_examples=30)
def test_every_prefix_of_the_writes_leaves_a_readable_record(tmp_path_factory, changes):
    folder = tmp_path_factory.mktemp("record")
    path = folder / "a.mirror"
    RecordFile.create(path, first())
    before = path.read_bytes()
    written = []
    file = RecordFile.open(path, writable=True)
    allowed = [(file.state, set())]
    genuine = record._write

    def write(fd, data, position):
        written.append((bytes(data), position, len(allowed) - 1))
        genuine(fd, data, position)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "_write", write)
        for change in changes:
            state, regions = allowed[-1]
            allowed.append((state, regions))  # what is under way
            if change == "state":
                state = state.changed(state.members)
                file.write(state)
            else:
                regions = set(change)
                file.write_regions(regions, durably=True)
            allowed[-1] = (state, regions)
    file.close()
    image = bytearray(before)
    torn = folder / "torn"
    for data, position, number in written:
        old, new = allowed[number - 1], allowed[number]
        for length in sorted({0, 1, 16, 31, 40, *range(0, len(data), 512), len(data)}):
            cut = image.copy()
            cut[position : position + length] = data[:length]
            torn.write_bytes(cut)
            state, regions = opened(torn)
            assert state in (old[0], new[0])
            assert old[1] & new[1] <= regions <= old[1] | new[1]
        image[position : position + len(data)] = data
    path.write_bytes(image)
    assert opened(path) == allowed[-1]


def test_what_could_not_be_written_leaves_the_state_before(made, monkeypatch):
    file = RecordFile.open(made, writable=True)
    states = [file.state]
    for _ in range(3):
        states.append(states[-1].changed(states[-1].members))
    file.write(states[1])

    def torn(fd, data, position):
        os.pwrite(fd, data[: len(data) // 2], position)
        raise OSError(errno.EIO, "no")

    # However often it fails, it is the same slot that is torn.
    for state in states[2:]:
        with monkeypatch.context() as patch:
            patch.setattr(record, "_write", torn)
            with pytest.raises(OSError, match="no"):
                file.write(state)
        assert peek(made) == states[1]
    file.write(states[3])
    file.close()
    assert peek(made) == states[3]


def test_who_serves_it_keeps_others_off(made):
    file = RecordFile.open(made, writable=True)
    for writable in (True, False):
        with pytest.raises(StorageError, match="in use"):
            RecordFile.open(made, writable=writable)
    assert peek(made) == file.state
    file.close()


def test_two_may_read_it(made):
    files = [RecordFile.open(made, writable=False) for _ in range(2)]
    for file in files:
        file.close()


@pytest.mark.parametrize("data", [b"", b"x" * 200000, b"nbdlink mirror 1" * 9000])
def test_what_is_none_is_refused(tmp_path, data):
    path = tmp_path / "a.mirror"
    path.write_bytes(data)
    with pytest.raises(StorageError, match="no record of a mirror"):
        RecordFile.open(path, writable=True)
    assert peek(path) is None


def test_all_of_it_is_allocated_when_it_is_made(made):
    assert made.stat().st_blocks * 512 >= made.stat().st_size == 139264


def test_a_state_knows_what_came_before_it():
    one = first()
    two, other = one.changed(one.members), one.changed(one.members)
    three = two.changed(two.members)
    assert three.has(one)
    assert three.has(two)
    assert not two.has(three)
    assert not three.has(other)


@pytest.mark.parametrize("size", [1, 1 << 40, (1 << 40) + 1, (1 << 63) - 1])
def test_there_are_never_too_many_regions(size):
    region = region_size(size)
    assert -(-size // region) <= REGIONS
    assert region >= 16 << 20


def test_a_region_that_a_failed_change_took_out_is_recorded_again(made, monkeypatch):
    regions = {0, REGIONS - 1}  # in two sectors of the bitmap
    file = RecordFile.open(made, writable=True)
    file.write_regions(regions, durably=True)
    genuine, count = os.pwrite, itertools.count()

    def fail_the_second(fd, data, position):
        if next(count):
            raise OSError(errno.EIO, "gone")
        return genuine(fd, data, position)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail_the_second)
        with pytest.raises(OSError, match="gone"):
            file.write_regions(set(), durably=False)
    file.write_regions(regions, durably=True)
    file.close()
    assert opened(made)[1] == regions
