"""An image that was found to be raw, and stays it.

Whoever may write to a raw image can write the beginning of another format there. The next time
nobody says what format the image has, it would be taken for that, and what the format refers to
(any file of the host, as a backing file) would be given to whoever wrote it. So a write to the
first sector that makes it look like a format is refused, as QEMU does. Only who says that the
image is raw may do without.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from nbdlink.storage.base import PlainFile
from nbdlink.storage.layer import Layer
from nbdlink.storage.probe import RAW, SECTOR, format_of
from nbdlink.storage.raw import RawStorage

if TYPE_CHECKING:
    from nbdlink.storage.remote import RemoteStorage


class FirstSector(Layer):
    """A raw storage whose first sector has no other format.

    Requests that do not touch that sector are none of its business, and as fast as ever.
    """

    def __init__(self, below: RawStorage | RemoteStorage) -> None:
        """Watch over the first sector of a file, or of an export."""
        super().__init__(below)
        self._file = below
        # How much of the sector can be reached.
        self._front = max(0, SECTOR - below.start)
        # Two who write half of it each must not come in between. Threads exclude each other by
        # the one, processes that are forked later by the other, which belongs to the process.
        self._lock = threading.Lock()
        self._shared = os.memfd_create("nbdlink-first-sector")

    @property
    def plain_file(self) -> PlainFile | None:
        """The file, of which the first sector is not to be written by others."""
        plain = self._file.plain_file
        return plain and plain._replace(guarded=self._front)

    @contextlib.contextmanager
    def _checked(self, offset: int, content: bytes) -> Iterator[None]:
        """Check what the sector would become, and hold it while it does.

        Args:
            offset: where in the storage.
            content: what will be there.

        Raises:
            OSError: EPERM if it would look like a format.
        """
        with self._lock:
            fcntl.lockf(self._shared, fcntl.LOCK_EX)
            try:
                head = bytearray(self._file.head(SECTOR))
                begin = self._file.start + offset
                head[begin : begin + len(content)] = content
                found = format_of(bytes(head))
                if found != RAW:
                    raise OSError(
                        errno.EPERM,
                        f"{self.name} would look like a {found} image then, and its format was "
                        "not given (-f raw)",
                    )
                yield
            finally:
                fcntl.lockf(self._shared, fcntl.LOCK_UN)

    def write(self, buffer: memoryview, offset: int, fua: bool) -> None:
        """Write; EPERM if the first sector would look like a format."""
        if offset >= self._front:
            self.below.write(buffer, offset, fua)
            return
        with self._checked(offset, bytes(buffer[: self._front - offset])):
            self.below.write(buffer, offset, fua)

    def zero(self, offset: int, length: int, *, may_trim: bool, fast: bool, fua: bool) -> None:
        """Zero; EPERM if the first sector would look like a format."""
        with contextlib.ExitStack() as held:
            if offset < self._front:
                zeroes = bytes(min(length, self._front - offset))
                held.enter_context(self._checked(offset, zeroes))
            self.below.zero(offset, length, may_trim=may_trim, fast=fast, fua=fua)

    def trim(self, offset: int, length: int, fua: bool) -> None:
        """Trim; EPERM if the first sector would look like a format."""
        with contextlib.ExitStack() as held:
            if offset < self._front:
                zeroes = bytes(min(length, self._front - offset))
                held.enter_context(self._checked(offset, zeroes))
            self.below.trim(offset, length, fua)

    def close(self) -> None:
        """Close the storage."""
        shared, self._shared = self._shared, -1
        if shared >= 0:
            os.close(shared)
        super().close()

    def disown(self) -> None:
        """Let go of what is shared, too."""
        os.close(self._shared)
        super().disown()
