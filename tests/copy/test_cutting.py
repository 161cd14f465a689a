"""How data is cut: zeroes in it, segments of it, and what two ends say together."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nbdlink.copy.engine import Segment, Supply, segments, stream_segments
from nbdlink.copy.verify import both
from nbdlink.copy.zeroes import is_zero, runs
from nbdlink.protocol.chunks import Extent

BLOCK = 8
block = st.sampled_from([bytes(BLOCK), bytes(BLOCK - 1) + b"x", b"x" * BLOCK, b"x" + bytes(7)])


@given(blocks=st.lists(block, max_size=12), tail=st.binary(max_size=BLOCK - 1))
@example(blocks=[b"x" * BLOCK, bytes(BLOCK)], tail=b"\0")
def test_runs_are_zeroes_where_whole_blocks_are(blocks, tail):
    data = b"".join(blocks) + tail
    found = list(runs(memoryview(data), BLOCK))
    assert b"".join(data[begin:end] for begin, end, _ in found) == data
    assert all(zero != other for (*_, zero), (*_, other) in itertools.pairwise(found))
    for begin, end, zero in found:
        assert begin % BLOCK == 0
        assert end % BLOCK == 0 or end == len(data)
        pieces = [data[at : min(at + BLOCK, end)] for at in range(begin, end, BLOCK)]
        assert all(not any(piece) for piece in pieces) if zero else all(map(any, pieces))


def test_zeroes_that_are_not_looked_for_are_data():
    assert list(runs(memoryview(bytes(100)), 0)) == [(0, 100, False)]


@pytest.mark.parametrize("length", [1, 4096, (1 << 20) + 1, 3 << 20])
def test_a_single_byte_makes_it_data(length):
    data = bytearray(length)
    assert is_zero(memoryview(data))
    data[-1] = 1
    assert not is_zero(memoryview(data))


extents = st.lists(st.builds(Extent, st.integers(1, 60), st.integers(0, 3)), max_size=12)


@given(extents=extents, rest=st.integers(0, 20), alignment=st.sampled_from([1, 4, 16]))
def test_segments_fill_the_source_and_zeroes_are_only_what_is_said_to_be(extents, rest, alignment):
    size = sum(extent.length for extent in extents) + rest
    said = [extent.flags & 2 for extent in extents for _ in range(extent.length)] + [0] * rest
    found = list(segments(iter(extents), size, alignment=alignment, length=32))
    at = 0
    for segment in found:
        assert segment.offset == at
        assert segment.length > 0
        assert segment.zero or segment.length <= 32
        assert at % alignment == 0
        at += segment.length
        if segment.zero:
            assert all(said[segment.offset : at])
    assert at == size
    if alignment == 1:
        assert sum(s.length for s in found if s.zero) == sum(map(bool, said))


def test_a_stream_is_cut_for_as_long_as_somebody_takes():
    found = stream_segments(10)
    assert [next(found) for _ in range(3)] == [Segment(at, 10, False) for at in (0, 10, 20)]


def test_a_supply_that_was_stopped_gives_no_more():
    supply = Supply(stream_segments(10))
    assert supply.take() is not None
    supply.stop(ValueError("the first"))
    supply.stop(ValueError("the second"))
    assert supply.take() is None
    assert str(supply.failure) == "the first"


@given(left=extents, right=extents)
def test_two_ends_are_zero_where_both_say_so(left, right):
    def spread(extents):
        return [extent.flags for extent in extents for _ in range(extent.length)]

    together = [a & b for a, b in zip(spread(left), spread(right), strict=False)]
    assert spread(both(iter(left), iter(right))) == together
