"""File to file: the kernel copies, and shares the blocks where the file system can."""

from __future__ import annotations

import errno
import os

from nbdlink.copy.engine import Lane, Supply
from nbdlink.copy.files import FileDestination, FileSource, failed

REQUEST_SIZE = 16 * 1024 * 1024
"""Bytes at a time: enough to share blocks in long runs, and still progress to be seen."""

_CANNOT = frozenset({errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF})
"""How kernels and file systems say that copy_file_range is not for these two files."""


class RangeLane(Lane):
    """Copies segments from a file to a file."""

    def __init__(self, supply: Supply, source: FileSource, destination: FileDestination) -> None:
        super().__init__(supply)
        self._source = source
        self._destination = destination

    def _work(self) -> None:
        while segment := self._supply.take():
            if segment.zero:
                self._destination.zero(segment.offset, segment.length)
            else:
                end = segment.offset + segment.length
                at = segment.offset
                while at < end:
                    count = self._copy(at, end - at)
                    if not count:  # not for these files, or the source has shrunk
                        self._copy_by_hand(at, end - at)
                        count = end - at
                    at += count
                self.data += segment.length
            self.done += segment.length

    def _copy(self, offset: int, length: int) -> int:
        try:
            return os.copy_file_range(self._source.fd, self._destination.fd, length, offset, offset)
        except OSError as error:
            if error.errno in _CANNOT:
                return 0
            raise failed(self._destination.name, "written", offset, error) from None

    def _copy_by_hand(self, offset: int, length: int) -> None:
        buffer = memoryview(bytearray(min(length, 1 << 20)))
        for at in range(0, length, len(buffer)):
            part = buffer[: min(len(buffer), length - at)]
            self._source.read(part, offset + at)
            self._destination.write(part, offset + at)
