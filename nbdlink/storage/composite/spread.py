"""Storages whose bytes are spread over members, each byte in one of them.

A request is divided by member. What a member has of it is one range there, whatever it is here,
so each member is asked once; those of a long request at the same time.
"""

from __future__ import annotations

import abc
import errno
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from nbdlink.errors import StorageError
from nbdlink.protocol.chunks import Extent
from nbdlink.protocol.constants import ALLOCATION_CONTEXT, DEPTH_CONTEXT, MAX_EXPORT_SIZE
from nbdlink.storage.base import Storage
from nbdlink.storage.composite.together import Threads, one_by_one

_LONG: Final = 256 << 10
"""Bytes from which on it pays to have another thread copy them."""


class Share(NamedTuple):
    """What one member has of a request.

    Attributes:
        member: the storage.
        offset: bytes from its start.
        length: bytes.
        begin: where in the request the first of them belongs.
    """

    member: Storage
    offset: int
    length: int
    begin: int


class Spread(Storage):
    """A storage of which every byte is in one of several members.

    Where a byte is does not change when it grows: so only at the end something may come to it.
    """

    def __init__(self, members: Sequence[Storage], name: str) -> None:
        """Take over open members; subclasses say which of their bytes is where.

        Raises:
            StorageError: there are too few.
        """
        if len(members) < 2:
            raise StorageError(
                f"{name} alone: it takes two storages or more", hint="name all of them"
            )
        self.members = tuple(members)
        self.name = name
        self.read_only = any(member.read_only for member in members)
        self.minimum_block = max(member.minimum_block for member in members)
        self.preferred_block = max(member.preferred_block for member in members)
        self.maximum_payload = min(member.maximum_payload for member in members)
        self.can_trim = any(member.can_trim for member in members)
        self.can_zero = all(member.can_zero for member in members)
        self.can_fast_zero = all(member.can_fast_zero for member in members)
        self.can_cache = any(member.can_cache for member in members)
        self.can_multi_conn = all(member.can_multi_conn for member in members)
        self.is_rotational = any(member.is_rotational for member in members)
        self.may_fork = all(member.may_fork for member in members)
        self.contexts = tuple(
            context
            for context in (ALLOCATION_CONTEXT, DEPTH_CONTEXT)
            if all(context in member.contexts for member in members)
        )
        self._are_files = all(member.plain_file for member in members)
        self._threads = Threads("nbd-spread")

    @property
    def is_sparse(self) -> bool:
        """Whether one of them may have holes."""
        return any(member.is_sparse for member in self.members)

    @is_sparse.setter
    def is_sparse(self, value: bool) -> None:
        for member in self.members:
            member.is_sparse = value

    @abc.abstractmethod
    def shares(self, offset: int, length: int) -> list[Share]:
        """Divide a range among the members; each is there once at most."""

    @abc.abstractmethod
    def spans(self, share: Share, offset: int) -> list[tuple[int, int]]:
        """Tell where a share's bytes belong in a request at `offset`: begin and end, in order."""

    def _each(self, shares: Sequence[Share], do: Callable[[Share], None], length: int) -> None:
        """Do something to every share; raise what went wrong first."""
        if len(shares) == 1:
            do(shares[0])
            return
        jobs = [functools.partial(do, share) for share in shares]
        # Files in the page cache answer faster than a thread wakes up.
        quick = self._are_files and length < _LONG
        for failure in one_by_one(jobs) if quick else self._threads.all(jobs):
            if failure is not None:
                raise failure

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Read from each member what it has."""

        def read(share: Share) -> None:
            spans = self.spans(share, offset)
            if len(spans) == 1:
                begin, end = spans[0]
                share.member.read_into(buffer[begin:end], share.offset)
                return
            found, at = memoryview(bytearray(share.length)), 0
            share.member.read_into(found, share.offset)
            for begin, end in spans:
                buffer[begin:end] = found[at : at + end - begin]
                at += end - begin

        self._each(self.shares(offset, len(buffer)), read, len(buffer))

    def write(self, buffer: memoryview, offset: int, fua: bool) -> None:
        """Write to each member what belongs there."""

        def write(share: Share) -> None:
            spans = self.spans(share, offset)
            if len(spans) == 1:
                begin, end = spans[0]
                share.member.write(buffer[begin:end], share.offset, fua)
            else:
                data = b"".join([buffer[begin:end] for begin, end in spans])
                share.member.write(memoryview(data), share.offset, fua)

        length = _LONG if fua else len(buffer)
        self._each(self.shares(offset, len(buffer)), write, length)

    def zero(self, offset: int, length: int, *, may_trim: bool, fast: bool, fua: bool) -> None:
        """Zero in each member; a fast one is refused unless all can."""
        if fast and not self.can_fast_zero:
            raise OSError(errno.ENOTSUP, f"{self.name}: no fast way to write zeroes")
        changed = False

        def zero(share: Share) -> None:
            nonlocal changed
            try:
                share.member.zero(share.offset, share.length, may_trim=may_trim, fast=fast, fua=fua)
            except OSError as error:
                if not fast or error.errno != errno.ENOTSUP or not changed:
                    raise
                # Some of it is zeroes already, so it is too late to refuse.
                share.member.zero(
                    share.offset, share.length, may_trim=may_trim, fast=False, fua=fua
                )
            changed = True

        shares = self.shares(offset, length)
        if fast:
            for share in shares:
                zero(share)
        else:
            self._each(shares, zero, _LONG)

    def trim(self, offset: int, length: int, fua: bool) -> None:
        """Trim in each member."""
        self._each(
            self.shares(offset, length),
            lambda share: share.member.trim(share.offset, share.length, fua),
            _LONG,
        )

    def cache(self, offset: int, length: int) -> None:
        """Have each member read ahead."""
        for share in self.shares(offset, length):
            share.member.cache(share.offset, share.length)

    def flush(self) -> None:
        """Flush all members."""
        self._all([member.flush for member in self.members])

    def close(self) -> None:
        """Close all members."""
        self._all([member.close for member in self.members])
        self._threads.close()

    def disown(self) -> None:
        """Have all members let go of their files."""
        for member in self.members:
            member.disown()

    def _all(self, jobs: Sequence[Callable[[], None]]) -> None:
        for failure in self._threads.all(jobs):
            if failure is not None:
                raise failure


class Linear(Spread):
    """Storages one after the other."""

    def __init__(self, members: Sequence[Storage]) -> None:
        """Lay them end to end.

        Each is cut to a multiple of the largest block that any of them demands, and no shorter:
        what is served is the sum.

        Raises:
            StorageError: there are fewer than two, one has no whole block, or they are more than
                the protocol can serve.
        """
        super().__init__(members, " + ".join(member.name for member in members))
        self._starts = []
        self.size = 0
        for member in members:
            self._starts.append(self.size)
            self.size += _blocks(member, self.minimum_block)
        _check_size(self)

    def notice_growth(self) -> None:
        """Grow with the last member."""
        last = self.members[-1]
        last.notice_growth()
        size = self._starts[-1] + _blocks(last, self.minimum_block)
        self.size = max(self.size, min(size, _most(self.minimum_block)))

    def shares(self, offset: int, length: int) -> list[Share]:
        """Give each member's part: one span each."""
        found = []
        end = offset + length
        for member, begin, stop in zip(
            self.members, self._starts, [*self._starts[1:], self.size], strict=True
        ):
            first, last = max(offset, begin), min(end, stop)
            if first < last:
                found.append(Share(member, first - begin, last - first, first - offset))
        return found

    def spans(self, share: Share, offset: int) -> list[tuple[int, int]]:
        """Give the one that it is."""
        return [(share.begin, share.begin + share.length)]

    def extents(self, context: str, offset: int, length: int) -> Iterator[Extent]:
        """Tell what each member tells, one after the other."""
        for share in self.shares(offset, length):
            yield from share.member.extents(context, share.offset, share.length)


class Stripe(Spread):
    """Storages between which the bytes alternate, a unit at a time."""

    def __init__(self, members: Sequence[Storage], unit: int) -> None:
        """Alternate between them; all are cut to the size of the smallest.

        Args:
            members: the storages; another order shows other data.
            unit: bytes; another unit shows other data. It need be no power of two.

        Raises:
            StorageError: there are fewer than two, the unit does not go with their blocks, the
                smallest is less than a unit, or they are more than the protocol can serve.
        """
        super().__init__(members, " | ".join(member.name for member in members))
        if unit < 1 or unit % self.minimum_block:
            raise StorageError(
                f"{self.name}: {unit} bytes cannot be the unit of stripes",
                hint=f"use a multiple of {self.minimum_block}, such as 64K",
            )
        self.unit = unit
        self._row = unit * len(members)
        self.size = self._size()
        _check_size(self)

    def _size(self) -> int:
        return min(_blocks(member, self.unit) for member in self.members) * len(self.members)

    def notice_growth(self) -> None:
        """Grow by the rows for which all members have room."""
        for member in self.members:
            member.notice_growth()
        self.size = max(self.size, min(self._size(), _most(self._row)))

    def shares(self, offset: int, length: int) -> list[Share]:
        """Give each member's units: they lie one behind the other there."""
        unit, count, end = self.unit, len(self.members), offset + length
        found = []
        first = offset // unit
        for number in range(first, min(first + count, -(-end // unit))):
            begin = max(offset, number * unit)
            row, turn = divmod(number, count)
            start = row * unit + begin % unit
            size = self._rest(turn, end) - start
            found.append(Share(self.members[turn], start, size, begin - offset))
        return found

    def spans(self, share: Share, offset: int) -> list[tuple[int, int]]:
        """Give one for each unit."""
        # The first may begin within a unit; as many bytes were before it in the member.
        count = min(self.unit - share.offset % self.unit, share.length)
        begin, left = share.begin, share.length - count
        found = [(begin, begin + count)]
        begin = begin + count - self.unit
        while left:
            begin += self._row
            count = min(self.unit, left)
            found.append((begin, begin + count))
            left -= count
        return found

    def extents(self, context: str, offset: int, length: int) -> Iterator[Extent]:
        """Put together what the members tell, unit by unit, or by rows where all say the same."""
        at, end = offset, offset + length
        members = self.members
        # What each tells of its part of the range, as far as it was asked for.
        told: dict[int, Iterator[Extent]] = {}
        left = [Extent(0, 0)] * len(members)
        while at < end:
            number, within = divmod(at, self.unit)
            row, turn = divmod(number, len(members))
            if not left[turn].length:
                if turn not in told:
                    start = row * self.unit + within
                    rest = self._rest(turn, end) - start
                    told[turn] = members[turn].extents(context, start, rest)
                left[turn] = next(told[turn])
                continue
            flags = left[turn].flags
            rows = 0
            if not turn and not within and {each.flags for each in left} == {flags}:
                rows = min(each.length for each in left) // self.unit
            if rows:
                rows = min(rows, (end - at) // self._row)
            if rows:
                count = rows * self._row
                left = [Extent(each.length - rows * self.unit, each.flags) for each in left]
            else:
                count = min(self.unit - within, end - at, left[turn].length)
                left[turn] = Extent(left[turn].length - count, flags)
            yield Extent(count, flags)
            at += count

    def _rest(self, turn: int, end: int) -> int:
        """Give where, in the member of that turn, a range that ends at `end` has its end."""
        row, within = divmod(end, self._row)
        return row * self.unit + max(0, min(self.unit, within - turn * self.unit))


def _blocks(member: Storage, block: int) -> int:
    """Give the bytes of a member that are whole blocks.

    Raises:
        StorageError: there is none.
    """
    size = member.size // block * block
    if not size:
        raise StorageError(f"{member.name} is too small: it has less than {block} bytes")
    return size


def _most(block: int) -> int:
    """Give the most bytes that can be served, in whole blocks."""
    return MAX_EXPORT_SIZE // block * block


def _check_size(storage: Storage) -> None:
    if storage.size > MAX_EXPORT_SIZE:
        raise StorageError(
            f"{storage.name}: {storage.size} bytes are more than the protocol can serve"
        )
