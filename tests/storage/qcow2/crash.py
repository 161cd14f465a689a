"""A file that remembers what was written when, and every state that a power cut may leave.

The disk's rules: what was written before a flush is there; of what was written since, each
sector is there as any of the writes to it left it, or as none did, whatever the other sectors
have.
"""

from __future__ import annotations

import threading
from pathlib import Path

from nbdlink.storage.imagefile import ImageFile

SECTOR = 512


class Recorder(ImageFile):
    """A file in memory that records writes and flushes.

    Attributes:
        begin: what it was at first.
        log: pairs of position and bytes, or None for a flush.
        marks: pairs of a place in the log and a note that the test made there.
    """

    read_only = False

    def __init__(self, name, content):
        self.name = str(name)
        self.begin = bytes(content)
        self.now = bytearray(content)
        self.log = []
        self.marks = []
        self._lock = threading.Lock()

    @classmethod
    def of(cls, path):
        return cls(path, Path(path).read_bytes())

    @property
    def size(self):
        return len(self.now)

    def read_at(self, buffer, position):
        with self._lock:
            data = self.now[position : position + len(buffer)]
        buffer[:] = data.ljust(len(buffer), b"\0")

    @property
    def nowait(self):
        return True

    def read_now(self, buffer, position):
        self.read_at(buffer, position)
        return True

    def write_at(self, buffer, position):
        data = bytes(buffer)
        with self._lock:
            self._apply(self.now, position, data)
            self.log.append((position, data))

    def flush(self):
        with self._lock:
            self.log.append(None)

    def truncate(self, size):
        raise AssertionError("images do not shrink")

    def discard_at(self, position, length):
        self.write_at(bytes(length), position)

    def close(self):
        pass

    def mark(self, note):
        with self._lock:
            self.marks.append((len(self.log), note))

    @staticmethod
    def _apply(content, position, data):
        if len(content) < position + len(data):
            content.extend(bytes(position + len(data) - len(content)))
        content[position : position + len(data)] = data

    def state(self, until, rnd):
        """Give what a cut after `until` entries of the log may leave.

        Args:
            until: entries of the log that had begun.
            rnd: chooses; None has all of the writes arrive.
        """
        content = bytearray(self.begin)
        flushed = max((i for i in range(until) if self.log[i] is None), default=0)
        if rnd is None:
            flushed = until
        for entry in self.log[:flushed]:
            if entry is not None:
                self._apply(content, *entry)
        if flushed == until:
            return content
        versions = {}
        size = len(content)
        late = bytearray(content)
        for entry in self.log[flushed:until]:
            if entry is None:
                continue
            position, data = entry
            self._apply(late, position, data)
            first, last = position // SECTOR, (position + len(data) - 1) // SECTOR
            for sector in range(first, last + 1):
                versions.setdefault(sector, []).append(
                    bytes(late[sector * SECTOR : (sector + 1) * SECTOR])
                )
        # Mostly whole writes arrive or do not; sometimes each sector goes its own way.
        chance = rnd.choice((0.1, 0.5, 0.9))
        for sector, versions_of_it in versions.items():
            if rnd.random() < chance:
                data = rnd.choice(versions_of_it)
                self._apply(content, sector * SECTOR, data)
        if rnd.random() < 0.5:
            size = max(size, len(late))
            content.extend(bytes(max(0, size - len(content))))
        return content
