"""A member of a mirror is not written to past the mirror."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nbdlink.errors import StorageError
from nbdlink.storage.composite.opening import Arrangement, open_several
from nbdlink.storage.mirror.places import CENTRAL, copy_path
from nbdlink.storage.mirror.record import Entry, RecordFile, State
from nbdlink.storage.open import StorageSpec, open_storage

SIZE = 1 << 20


@pytest.fixture
def members(tmp_path, monkeypatch):
    """Two files that have been a mirror, which has ended."""
    monkeypatch.setenv("NBDLINK_STATE_DIRECTORY", str(tmp_path / "state"))
    paths = [tmp_path / "a.img", tmp_path / "b.img"]
    for path in paths:
        path.write_bytes(bytes(SIZE))
    specs = [StorageSpec(str(path), format="raw") for path in paths]
    open_several(Arrangement("mirror"), specs).close()
    return paths


def test_it_is_not_opened_to_be_written(members):
    with pytest.raises(StorageError, match=r"a\.img is a member of the mirror"):
        open_storage(StorageSpec(str(members[0]), format="raw"))


def test_not_as_a_part_of_something_else_either(members, tmp_path):
    (tmp_path / "c.img").write_bytes(bytes(SIZE))
    specs = [StorageSpec(str(path), format="raw") for path in (members[0], tmp_path / "c.img")]
    with pytest.raises(StorageError, match=r"a\.img is a member of the mirror"):
        open_several(Arrangement("linear"), specs)


def test_not_by_another_name(members, tmp_path):
    (tmp_path / "link").symlink_to(members[1])
    with pytest.raises(StorageError, match="link is a member of the mirror"):
        open_storage(StorageSpec(str(tmp_path / "link"), format="raw"))


@pytest.mark.parametrize("how", [{"read_only": True}, {"overlay": True}])
def test_it_may_be_read(members, how):
    open_storage(StorageSpec(str(members[0]), format="raw", **how)).close()


def test_the_mirror_opens_it(members):
    specs = [StorageSpec(str(path), format="raw") for path in members]
    open_several(Arrangement("mirror"), specs).close()


def test_not_by_another_name_than_the_record_has(tmp_path, monkeypatch):
    """As /dev/sdb, which the record has as /dev/disk/by-id/..."""
    monkeypatch.setenv("NBDLINK_STATE_DIRECTORY", str(tmp_path))
    (tmp_path / "sdb").write_bytes(bytes(SIZE))
    (tmp_path / "by-id").symlink_to("sdb")
    entries = [Entry(str(tmp_path / name), "raw", keeps_copy=False) for name in ("by-id", "other")]
    (tmp_path / "mirrors").mkdir()
    state = State.first(SIZE, SIZE, entries)
    RecordFile.create(copy_path(state.mirror, CENTRAL), state)
    for name in ("sdb", "by-id"):
        with pytest.raises(StorageError, match=f"{name} is a member of the mirror"):
            open_storage(StorageSpec(str(tmp_path / name), format="raw"))


def test_without_its_record_it_is_a_file_like_others(members):
    members[0].with_name("a.img.mirror").unlink()
    open_storage(StorageSpec(str(members[0]), format="raw")).close()


def test_another_file_of_that_name_is_no_record(members):
    members[0].with_name("a.img.mirror").write_text("what I see in it")
    open_storage(StorageSpec(str(members[0]), format="raw")).close()


@pytest.fixture
def homeless(monkeypatch):
    """Be a user that the system does not know, as in some containers."""

    def unknown(number):
        raise KeyError(number)

    for name in ("NBDLINK_STATE_DIRECTORY", "XDG_STATE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.geteuid", lambda: 54321)
    monkeypatch.setattr("pwd.getpwuid", unknown)


def test_a_user_without_a_home_opens_files_like_others(tmp_path, homeless):
    (tmp_path / "c.img").write_bytes(bytes(SIZE))
    open_storage(StorageSpec(str(tmp_path / "c.img"), format="raw")).close()


def test_a_user_without_a_home_does_not_open_it_either(members, homeless):
    with pytest.raises(StorageError, match=r"a\.img is a member of the mirror"):
        open_storage(StorageSpec(str(members[0]), format="raw"))


def test_nothing_is_copied_onto_it(members, tmp_path):
    (tmp_path / "new.img").write_bytes(b"x" * SIZE)
    words = ["copy", str(tmp_path / "new.img"), str(members[0])]
    done = subprocess.run(
        [sys.executable, "-m", "nbdlink", *words], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, "is a member of the mirror" in done.stderr) == (1, True)
    assert members[0].read_bytes() == bytes(SIZE)
