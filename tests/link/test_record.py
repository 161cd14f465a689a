"""Records of attached devices: whole or not there, and believed only while they are true."""

from __future__ import annotations

import json
import resource
import stat
from dataclasses import replace

import pytest

from nbdlink.errors import ConfigError, NBDError
from nbdlink.link import record
from nbdlink.link.record import Record

SAMPLE = Record(
    index=3,
    name="data",
    target="nbd://store1/data",
    connections=2,
    read_only=False,
    block_size=512,
    timeout=30,
    dead_timeout=0,
    road="netlink",
    identifier="nbdlink:data",
    pid=77,
)


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "DIRECTORY", tmp_path / "run")
    return tmp_path / "run"


def test_a_record_comes_back():
    record.write(SAMPLE)
    assert record.read(3) == SAMPLE


def test_records_come_by_index():
    for index in (10, 2):
        record.write(replace(SAMPLE, index=index))
    assert [r.index for r in record.read_all()] == [2, 10]


def test_a_record_that_cannot_be_read_now_is_not_taken_for_none():
    record.write(SAMPLE)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(NBDError, match="too many open files"):
            record.read(3)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_forgotten_record_is_gone():
    record.write(SAMPLE)
    record.remove(3)
    record.remove(3)
    assert record.read(3) is None


def test_nothing_but_the_record_is_left_behind(directory):
    record.write(SAMPLE)
    record.write(SAMPLE)
    assert [path.name for path in directory.iterdir()] == ["nbd3.json"]


def test_nothing_is_left_of_a_record_that_could_not_be_written(directory):
    (directory / "nbd3.json").mkdir(parents=True)
    with pytest.raises(NBDError, match="cannot be written"):
        record.write(SAMPLE)
    assert [path.name for path in directory.iterdir()] == ["nbd3.json"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"index": 3}', '{"unknown": 1}', "\xff"])
def test_a_damaged_record_counts_as_none(directory, content):
    directory.mkdir()
    (directory / "nbd3.json").write_text(content, encoding="latin-1")
    assert record.read(3) is None
    assert record.read_all() == []


def test_a_file_that_is_no_record_is_left_alone(directory):
    directory.mkdir()
    (directory / "nbdx.json").write_text("{}")
    (directory / "nbd3x.json").write_text("{}")
    assert record.read_all() == []


def test_a_directory_that_cannot_be_made_is_reported(directory):
    directory.write_text("a file")
    with pytest.raises(NBDError, match="cannot be written"):
        record.write(SAMPLE)


@pytest.mark.parametrize(
    ("identifier", "backend", "pid", "described"),
    [
        ("nbdlink:data", "nbdlink:data", 77, True),
        ("nbdlink:data", "nbdlink:data", 1, False),
        ("nbdlink:data", "nbdlink:other", 77, False),
        ("nbdlink:data", None, 77, False),
        ("", None, 77, True),
        ("", None, 78, False),
        ("", None, None, False),
    ],
)
def test_a_record_describes_only_the_device_it_was_made_for(identifier, backend, pid, described):
    assert replace(SAMPLE, identifier=identifier).describes(backend, pid) is described


@pytest.mark.parametrize("name", ["", "a/b", "a b", "x" * 65, "nbd0", "nbd12", "a\n", "\x1b"])
def test_a_name_that_could_be_mistaken_is_refused(name):
    with pytest.raises(ConfigError):
        record.check_name(name)


@pytest.mark.parametrize("name", ["data", "nbd", "nbdx", "store-1_a.b:c@d", "x" * 64])
def test_a_name_is_given_back(name):
    assert record.check_name(name) == name


@pytest.mark.parametrize(
    "change",
    [
        {"index": 4},
        {"index": "3"},
        {"name": 5},
        {"identifier": None},
        {"spec": None},
        {"channels": [{"cookie": "7"}]},
        {"channels": [{"route": 1}]},
        {"pid": "77"},
        {"attached_at": "now"},
    ],
)
def test_a_record_with_something_of_another_kind_counts_as_none(directory, change):
    record.write(SAMPLE)
    path = directory / "nbd3.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert record.read(3) is None


def test_a_time_may_be_a_whole_number(directory):
    record.write(replace(SAMPLE, attached_at=7))
    assert record.read(3).attached_at == 7


def test_nobody_else_can_hold_a_lock(directory):
    with record.held(3), record.locked("data"):
        modes = [stat.S_IMODE(path.stat().st_mode) for path in directory.glob("*.lock")]
    assert modes == [0o600, 0o600]
