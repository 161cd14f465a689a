"""Mirrors of small files, whose regions are small too, and members that can be made to fail."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from nbdlink.storage.layer import Layer
from nbdlink.storage.mirror.opening import open_mirror
from nbdlink.storage.mirror.record import RecordFile
from nbdlink.storage.open import StorageSpec, open_storage

SIZE = 40 << 10
REGION = 4096


class Faulty(Layer):
    """A storage that fails to do what it is told to, with the errno it is told.

    Attributes:
        failing: errno by the name of the method.
        seen: what it was asked for, in order.
    """

    def __init__(self, below):
        super().__init__(below)
        self.failing = {}
        self.seen = []
        self.on_write = lambda: None

    @property
    def plain_file(self):
        return None

    def _do(self, what):
        self.seen.append(what)
        if what in self.failing:
            raise OSError(self.failing[what], os.strerror(self.failing[what]))

    def read_into(self, buffer, offset):
        self._do("read")
        super().read_into(buffer, offset)

    def write(self, buffer, offset, fua):
        self._do("write")
        self.on_write()
        super().write(buffer, offset, fua)

    def zero(self, offset, length, **options):
        self._do("zero")
        super().zero(offset, length, **options)

    def flush(self):
        self._do("flush")
        super().flush()


def regions(path):
    """Give the regions in the bitmap of the record beside a member."""
    fd = os.open(f"{path}.mirror", os.O_RDONLY)
    try:
        return RecordFile(path, fd, writable=False).regions
    finally:
        os.close(fd)


class Place:
    """A folder with members, and mirrors of them."""

    def __init__(self, folder, stack):
        self.folder = folder
        self.stack = stack
        self.storages = {}

    def path(self, name):
        return self.folder / name

    def make(self, *names, size=SIZE, content=None):
        for name in names:
            self.path(name).write_bytes(bytes(size) if content is None else content)

    def spec(self, name):
        word = name if "://" in str(name) else str(self.path(name))
        return StorageSpec(word, format="raw")

    def _open(self, spec):
        storage = Faulty(open_storage(spec))
        self.storages[Path(spec.path).name] = storage
        return storage

    def mirror(self, *names, settled=True, **options):
        """Open a mirror of these, and wait until its members are alike."""
        options = {"region": REGION, "idle": 3600.0, "opened": self._open} | options
        mirror = open_mirror([self.spec(name) for name in names], **options)
        self.stack.callback(mirror.close)
        if settled:
            mirror.wait_until_built(lambda _: None, 1.0)
        return mirror

    def states(self, mirror):
        """Give the state of every member, by its name."""
        return {Path(m["address"]).name: m["state"] for m in mirror.status()["members"]}

    def favour(self, mirror, name):
        """Have a member read before all others, if it may be read."""
        with mirror.lock:
            for member in mirror.members:
                member.in_flight += 0 if Path(member.name).name == name else 100

    def fail(self, name, what, code=errno.EIO):
        self.storages[name].failing[what] = code

    def crash(self, names, body):
        """Have another process open a mirror, do something, and end as if killed."""
        source = f"""
            import os, sys
            from nbdlink.storage.mirror.opening import open_mirror
            from nbdlink.storage.open import StorageSpec
            specs = [StorageSpec(path, format="raw") for path in {self.paths(names)!r}]
            mirror = open_mirror(specs, region={REGION}, idle=3600.0)
            mirror.wait_until_built(lambda _: None, 1.0)
            def write(data, offset, fua=False):
                mirror.write(memoryview(data), offset, fua)
        """
        source = textwrap.dedent(source) + textwrap.dedent(body) + "\nos._exit(0)\n"
        done = subprocess.run(
            [sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr

    def paths(self, names):
        return [str(self.path(name)) for name in names]


@pytest.fixture(autouse=True)
def _state(tmp_path, monkeypatch):
    monkeypatch.setenv("NBDLINK_STATE_DIRECTORY", str(tmp_path / "state"))


@pytest.fixture
def place(tmp_path):
    """A folder with two members that are alike and empty: a and b."""
    with contextlib.ExitStack() as stack:
        place = Place(tmp_path, stack)
        place.make("a", "b")
        yield place
