"""What the server asks of a storage, whatever lies behind it.

A storage is an array of bytes that never shrinks. One object serves every connection of an
export at once, so every method may be called by many threads at the same time. Requests that
overlap in time have no order among each other, as on a disk.

The caller keeps requests inside of `0 <= offset` and `offset + length <= size`, aligns them to
`minimum_block`, and calls no method that writes while `read_only` holds. Whatever else goes
wrong is an `OSError` with its errno, for the server to translate.
"""

from __future__ import annotations

import abc
import errno
from collections.abc import Callable, Iterator
from typing import ClassVar, NamedTuple

from nbdlink.protocol.chunks import Extent
from nbdlink.protocol.constants import (
    ALLOCATION_CONTEXT,
    DEFAULT_MAXIMUM_PAYLOAD,
    DEFAULT_MINIMUM_BLOCK,
    DEFAULT_PREFERRED_BLOCK,
)
from nbdlink.storage.mapping import FileMapping


class PlainFile(NamedTuple):
    """Where a storage's bytes lie one after the other, for system calls to take directly.

    Attributes:
        fd: an open file or block device; use positions, as its own offset is everybody's.
        start: where in it the storage's first byte lies.
        in_memory: whether it lies in memory as a whole, so that nothing has to be waited for.
        mapping: the range as memory that only system calls may read.
        guarded: so many bytes at the front must be written by the storage itself, which has
            something to see to; they may be read here like the others.
    """

    fd: int
    start: int
    in_memory: bool
    mapping: FileMapping
    guarded: int = 0


class AtOnce(NamedTuple):
    """What a storage that is no plain file does without waiting, for a thread that must not wait.

    Attributes:
        read: takes a buffer and an offset. It fills the buffer as `Storage.read_into` does, or
            gives False, and then the buffer holds anything.
        write: takes a buffer and an offset. It writes as `Storage.write` does without `fua`, or
            gives False, and then it is to be written as a whole by `Storage.write`. None where
            no write is at once.
        in_memory: whether all of it lies in memory, so that nothing has to be waited for.
        nowait: whether `read` knows what would have to be waited for. Else both are a matter of
            how fast the disk is, as writes are anyway.
    """

    read: Callable[[memoryview, int], bool]
    write: Callable[[memoryview, int], bool] | None
    in_memory: bool
    nowait: bool


class Storage(abc.ABC):
    """An array of bytes that can be served. Subclasses say what they can do.

    Attributes:
        name: for messages: a path, or another word a person knows it by.
        size: bytes; it may grow, see `notice_growth`.
        read_only: whether writing is impossible.
        minimum_block: alignment in bytes that requests must have; a power of two.
        preferred_block: alignment in bytes at which requests are efficient; a power of two.
        maximum_payload: bytes in the longest read or write that is sensible.
        can_trim: whether `trim` can have an effect.
        can_zero: whether `zero` works.
        can_fast_zero: whether `zero` with `fast` is either fast or fails at once.
        can_cache: whether `cache` can have an effect.
        can_multi_conn: whether a write is seen by every thread as soon as it returned, and
            `flush` covers what any thread wrote. True for everything that keeps no cache by
            connection.
        is_rotational: whether seeking costs.
        is_sparse: whether there may be holes worth looking for before a range is read.
        waits: whether a request may take long, so that others should not have to wait for it.
            A storage in memory need not have its requests done in threads of their own.
        may_fork: whether processes forked from this one may serve it too: they see each other's
            changes, and what one learns of a failure the others learn.
        contexts: the metadata contexts of which `extents` knows.
    """

    name: str
    size: int
    read_only: bool
    minimum_block: int = DEFAULT_MINIMUM_BLOCK
    preferred_block: int = DEFAULT_PREFERRED_BLOCK
    maximum_payload: int = DEFAULT_MAXIMUM_PAYLOAD
    can_trim: bool = False
    can_zero: bool = True
    can_fast_zero: bool = False
    can_cache: bool = False
    can_multi_conn: bool = True
    is_rotational: bool = False
    is_sparse: bool = False
    waits: bool = True
    may_fork: bool = False
    contexts: tuple[str, ...] = (ALLOCATION_CONTEXT,)

    zero_chunk: ClassVar[int] = 1 << 20
    """Bytes of zeroes that the plain way of `zero` writes at a time."""

    @abc.abstractmethod
    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill the whole of `buffer` with what is at `offset`.

        Raises:
            OSError: not all of it could be read; EIO if the storage ends too early.
        """

    @abc.abstractmethod
    def write(self, buffer: memoryview, offset: int, fua: bool) -> None:
        """Write the whole of `buffer` at `offset`; if `fua`, return once it is durable.

        Raises:
            OSError: not all of it could be written, or made durable.
        """

    def zero(self, offset: int, length: int, *, may_trim: bool, fast: bool, fua: bool) -> None:
        """Make a range read as zeroes.

        Args:
            offset: bytes from the start.
            length: bytes; as long as the protocol can say, so it costs no memory.
            may_trim: whether its space may be given back.
            fast: fail at once rather than take as long as writing would.
            fua: return once it is durable.

        Raises:
            OSError: ENOTSUP if `fast` is asked for and impossible, and nothing has changed.
        """
        if fast:
            raise OSError(errno.ENOTSUP, "zeroes are no faster than writing here")
        zeroes = memoryview(bytes(min(length, self.zero_chunk)))
        end = offset + length
        while offset < end:
            count = min(end - offset, len(zeroes))
            self.write(zeroes[:count], offset, False)
            offset += count
        if fua:
            self.flush()

    def trim(self, offset: int, length: int, fua: bool) -> None:
        """Take the hint that the bytes of a range are not needed; they may become anything.

        Raises:
            OSError: it was tried and failed. A storage that cannot trim does nothing.
        """
        return

    def cache(self, offset: int, length: int) -> None:
        """Take the hint that a range will be read soon. Does not wait for it.

        Raises:
            OSError: it was tried and failed.
        """
        return

    def extents(self, context: str, offset: int, length: int) -> Iterator[Extent]:
        """Tell what a metadata context says of a range, extent by extent, without gaps.

        The extents begin at `offset`, cover `length` bytes in all, and are made as they are
        asked for. Neighbours may have the same flags. What nothing is known of is data.

        Raises:
            OSError: it could not be found out.
        """
        yield Extent(length, 0)

    @property
    def plain_file(self) -> PlainFile | None:
        """Give the file that the engine may read and write itself, or None.

        What the engine does with it must mean the same as `read_into` and `write`; if a system
        call fails or falls short it asks those again, so only they need to know the reasons.
        """
        return None

    @property
    def at_once(self) -> AtOnce | None:
        """Give what can be done without waiting, or None if nothing is known of that.

        A layer has to say so itself: it may have something to see to.
        """
        return None

    @property
    def signature(self) -> str | None:
        """What tells this storage from another under the same name, or None.

        It stays what it is for as long as the storage holds the same data, whatever restarts
        meanwhile; it begins with `auto:`.
        """
        return None

    def notice_growth(self) -> None:  # noqa: B027 - most storages cannot grow
        """Look whether the storage has become larger; then `size` and `plain_file` change.

        They do together: who takes `size` first and `plain_file` afterwards has the whole of it.
        Nothing is ever made of a storage that has become smaller.
        """

    @abc.abstractmethod
    def flush(self) -> None:
        """Make durable whatever writes have returned before, in any thread.

        Raises:
            OSError: some of it may be lost.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Give everything back. No other method may run or follow.

        Nothing has to be made durable, but writes that returned must not be lost to others: a
        format writes what it keeps in memory.

        Raises:
            OSError: that failed.
        """

    def disown(self) -> None:  # noqa: B027 - what is left open ends with the process
        """Let go of its files in a process forked off that may not serve it (see `may_fork`).

        It lives on in the process that has opened it. So nothing may be written or said: what is
        in memory here is as old as the fork. And no lock may be taken, as a thread that is not
        here may have held it then.
        """
