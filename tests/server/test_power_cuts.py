"""At hundreds of moments the power fails: whatever a flush of any connection covered is there.

This stands for the option `-w` of enbd-server, which had the server wait for writes that were
missing in the sequence. `tests/kernel/test_crash.py` does the same with a file system.
"""

from __future__ import annotations

import random
import threading

import pytest

import nbdlink
from nbdlink.storage.rangelocks import LockedRanges
from nbdlink.storage.writebehind import WriteBehind

from .fakes import MemoryStorage
from .recording import Recording, cut

BLOCK = 512
EACH = 16  # blocks of a connection
CONNECTIONS = 4
ROUNDS = 150
CUTS = 300

LAYERS = {
    "plain": lambda recording: recording,
    "write behind": lambda recording: WriteBehind(recording, 1 << 20),
    "write behind, in little memory": lambda recording: WriteBehind(recording, 8192),
    "locked ranges": lambda recording: LockedRanges(WriteBehind(recording, 1 << 20)),
}


class Writer(threading.Thread):
    """One connection, which writes to its own blocks and flushes what all have written."""

    def __init__(self, uri, number, acknowledged, recording):
        super().__init__()
        self._uri, self._number = uri, number
        self._acknowledged, self._recording = acknowledged, recording
        self._dice = random.Random(number)
        self.failure = None

    def run(self):
        try:
            with nbdlink.connect(self._uri) as nbd:
                for round_ in range(1, ROUNDS):
                    self._step(nbd, round_)
        except Exception as error:  # told by the test
            self.failure = error

    def _step(self, nbd, round_):
        block = self._number * EACH + self._dice.randrange(EACH)
        fua = self._dice.random() < 0.1
        nbd.pwrite(round_.to_bytes(4, "big") * (BLOCK // 4), block * BLOCK, fua=fua)
        self._acknowledged[block] = round_
        if fua:
            self._recording.promise({block: round_})
        if self._dice.random() < 0.1:
            covered = dict(self._acknowledged)
            nbd.flush()
            self._recording.promise(covered)


@pytest.mark.parametrize("layer", LAYERS)
def test_what_a_flush_covered_is_there_after_a_cut_at_any_moment(layer, serve):
    memory = MemoryStorage(CONNECTIONS * EACH * BLOCK)
    memory.data[:] = base = bytes(memory.size)
    recording = Recording(memory)
    service = serve({"": LAYERS[layer](recording)})
    acknowledged = {}
    writers = [
        Writer(service.uri(), number, acknowledged, recording) for number in range(CONNECTIONS)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.failure is None
    dice = random.Random(1)
    log = recording.log
    for at in sorted(dice.choices(range(len(log) + 1), k=CUTS)):
        image, promised = cut(base, log, at, dice)
        for block, round_ in promised.items():
            data = bytes(image[block * BLOCK : (block + 1) * BLOCK])
            found = int.from_bytes(data[:4], "big")
            assert found >= round_, f"block {block} after {at} entries"
            assert data == found.to_bytes(4, "big") * (BLOCK // 4)
