"""An image is an array of bytes, whatever is done to it in whatever order.

NBDLINK_MODEL_EXAMPLES sets how many orders are tried.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from nbdlink.storage.qcow2 import Qcow2Storage

from . import qemu

K = 1024
SIZE = 300 * K + 512
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None

offsets = st.integers(0, SIZE - 1) | st.integers(0, SIZE // 4096).map(lambda n: n * 4096)
ways = st.sampled_from(["at once", "plain", "fua"])
lengths = st.integers(1, 3000) | st.integers(1, 30).map(lambda n: n * 4096)


class QcowMachine(RuleBasedStateMachine):
    """Requests, with QEMU looking at the image between."""

    @initialize(
        options=st.sampled_from(
            [
                "cluster_size=4k",
                "cluster_size=512",
                "cluster_size=64k",
                "compat=0.10,cluster_size=4k",
                "extended_l2=on,cluster_size=16k",
                "cluster_size=4k,refcount_bits=8,lazy_refcounts=on",
            ]
        ),
        backing=st.sampled_from([None, "raw", "qcow2"]),
        bitmap=st.booleans(),
    )
    def create(self, options, backing, bitmap):
        self.folder = Path(tempfile.mkdtemp(dir=MEMORY))
        self.path = self.folder / "disk.qcow2"
        self.model = bytearray(SIZE)
        self.snapshots = {}
        if backing:
            data = bytes(range(256)) * 800
            raw = self.folder / "base.raw"
            raw.write_bytes(data)
            if backing == "qcow2":
                qemu.run("qemu-img", "convert", "-O", "qcow2", raw, self.folder / "base.qcow2")
            self.model[: len(data)] = data
        qemu.create(self.path, SIZE, options=options, backing=backing and f"base.{backing}",
                    backing_format=backing)  # fmt: skip
        if bitmap and "0.10" not in options:
            qemu.run("qemu-img", "bitmap", "--add", "-g", "4k", "-f", "qcow2", self.path, "b")
        self.storage = Qcow2Storage.open(self.path)

    def _range(self, offset, length):
        offset = min(offset, SIZE - 1)
        return offset, min(length, SIZE - offset)

    @rule(offset=offsets, length=lengths, byte=st.integers(1, 255), how=ways)
    def write(self, offset, length, byte, how):
        offset, length = self._range(offset, length)
        data = memoryview(bytes([byte]) * length)
        if how != "at once" or not self.storage.at_once.write(data, offset):
            self.storage.write(data, offset, how == "fua")
        self.model[offset : offset + length] = bytes([byte]) * length

    @rule(offset=offsets, length=lengths, may_trim=st.booleans())
    def zero(self, offset, length, may_trim):
        offset, length = self._range(offset, length)
        self.storage.zero(offset, length, may_trim=may_trim, fast=False, fua=False)
        self.model[offset : offset + length] = bytes(length)

    @rule(offset=offsets, length=lengths)
    def trim(self, offset, length):
        offset, length = self._range(offset, length)
        self.storage.trim(offset, length, False)
        # Anything may be there, but what is there has to stay.
        self.model[offset : offset + length] = self.read(offset, length)

    @rule()
    def flush(self):
        self.storage.flush()

    @rule(offset=offsets, length=lengths)
    def look_at_once(self, offset, length):
        offset, length = self._range(offset, length)
        buffer = bytearray(length)
        if self.storage.at_once.read(memoryview(buffer), offset):
            assert buffer == self.model[offset : offset + length]

    @rule()
    def look(self):
        assert self.read(0, SIZE) == self.model

    @rule()
    def extents_do_not_lie(self):
        at = 0
        for length, flags in self.storage.extents("base:allocation", 0, SIZE):
            if flags & 2:
                assert not any(self.model[at : at + length])
            at += length
        assert at == SIZE

    @rule()
    def reopen(self):
        self.storage.close()
        qemu.check(self.path)
        self.storage = Qcow2Storage.open(self.path)

    @precondition(lambda self: len(self.snapshots) < 3)
    @rule()
    def snapshot(self):
        self.storage.close()
        name = f"s{len(self.snapshots)}"
        qemu.run("qemu-img", "snapshot", "-c", name, self.path)
        self.snapshots[name] = bytes(self.model)
        self.storage = Qcow2Storage.open(self.path)

    def read(self, offset, length):
        buffer = bytearray(length)
        self.storage.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def teardown(self):
        if not hasattr(self, "storage"):
            return
        try:
            self.storage.close()
            qemu.check(self.path)
            assert qemu.content(self.path)[:SIZE] == self.model
            for name, content in self.snapshots.items():
                storage = Qcow2Storage.open(self.path, read_only=True, snapshot=name)
                found = bytearray(SIZE)
                storage.read_into(memoryview(found), 0)
                storage.close()
                assert found == content
        finally:
            shutil.rmtree(self.folder)


def test_an_image_is_an_array_of_bytes():
    examples = int(os.environ.get("NBDLINK_MODEL_EXAMPLES", "25"))
    run_state_machine_as_test(
        QcowMachine,
        settings=settings(max_examples=examples, stateful_step_count=25, deadline=None),
    )
