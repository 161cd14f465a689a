"""What tells files apart: it stays with the file, and another file has another."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from nbdlink.storage import fingerprint as module
from nbdlink.storage.fingerprint import fingerprint
from nbdlink.storage.raw import RawStorage

FOLDERS = [tempfile.gettempdir(), "/dev/shm"]


@pytest.fixture(params=[folder for folder in FOLDERS if Path(folder).is_dir()])
def path(request):
    with tempfile.TemporaryDirectory(dir=request.param) as folder:
        path = Path(folder) / "image"
        path.write_bytes(bytes(4096))
        if of(path) is None:
            pytest.skip(f"the file system of {request.param} knows neither generation nor birth")
        yield path


def of(path, start=0):
    fd = os.open(path, os.O_RDONLY)
    try:
        return fingerprint(fd, start)
    finally:
        os.close(fd)


def test_a_file_keeps_it(path):
    before = of(path)
    path.write_bytes(bytes(8192))
    path.chmod(0o600)
    os.utime(path, (1, 1))
    path = path.rename(path.with_name("other"))
    assert of(path) == before


def test_a_file_in_its_place_has_another(path):
    before = of(path)
    # Where the first one is gone, the new one likely gets its inode.
    path.unlink()
    path.write_bytes(bytes(4096))
    assert of(path) != before


def test_two_files_have_different_ones(path):
    other = path.with_name("other")
    other.write_bytes(bytes(4096))
    assert of(other) != of(path)


def test_another_window_has_another(path):
    assert of(path, 512) != of(path)


@pytest.mark.parametrize("missing", ["_generation", "_birth"])
def test_one_trait_is_enough(path, missing, monkeypatch):
    monkeypatch.setattr(module, missing, lambda fd: None)
    before = of(path)
    path.unlink()
    path.write_bytes(bytes(4096))
    assert of(path) != before or before is None  # tmpfs knows no generation


def test_without_any_there_is_none(path, monkeypatch):
    monkeypatch.setattr(module, "_generation", lambda fd: None)
    monkeypatch.setattr(module, "_birth", lambda fd: None)
    storage = RawStorage.open(path)
    assert storage.signature is None
    storage.close()


def test_a_storage_has_it_as_its_signature(path):
    storage = RawStorage.open(path)
    assert storage.signature == f"auto:{of(path)}"
    storage.close()
