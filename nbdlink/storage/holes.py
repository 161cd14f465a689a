"""Where a file has data, and where holes."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator


def data_and_holes(fd: int, position: int, end: int) -> Iterator[tuple[int, bool]]:
    """Tell data from holes as the file system does, without gaps.

    The offset that lseek sets belongs to all who share the open file; so nobody may use it.

    Yields:
        Bytes, and whether they are data. What is behind the end of the file is a hole.

    Raises:
        OSError: the file system cannot tell.
    """
    while position < end:
        try:
            data = min(os.lseek(fd, position, os.SEEK_DATA), end)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            data = end  # no data from here to the end of the file
        if data > position:
            yield data - position, False
        if data == end:
            return
        position = min(os.lseek(fd, data, os.SEEK_HOLE), end)
        if position > data:  # somebody may have made a hole of it since
            yield position - data, True
