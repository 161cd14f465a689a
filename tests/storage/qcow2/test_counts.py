"""Refcount blocks of all widths behave as a list of numbers."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdlink.storage.qcow2.counts import counts_of

BLOCK = 64


@pytest.mark.parametrize("order", range(7))
@given(data=st.data())
def test_a_block_is_a_list_of_numbers(order, data):
    total = BLOCK * 8 >> order
    most = (1 << (1 << order)) - 1
    counts, model = counts_of(bytes(BLOCK), order), [0] * total
    changes = st.tuples(st.integers(0, total - 1), st.integers(0, most) | st.just(1))
    for index, count in data.draw(st.lists(changes, max_size=60)):
        counts[index] = model[index] = count
    assert [counts[i] for i in range(total)] == model
    start = data.draw(st.integers(0, total - 1))
    free = [i for i in range(start, total) if not model[i]]
    assert counts.find_free(start) == (free[0] if free else -1)
    limit = data.draw(st.integers(0, total))
    assert counts.used(limit) == sum(1 for count in model[:limit] if count)
    again = counts_of(counts.pack(), order)
    assert [again[i] for i in range(total)] == model


@pytest.mark.parametrize("order", range(7))
def test_a_full_block_has_nothing_free(order):
    assert counts_of(b"\xff" * BLOCK, order).find_free(0) == -1


def test_the_first_count_is_in_the_lowest_bits():
    assert counts_of(b"\x01" + bytes(7), 0)[0] == 1
    assert counts_of(b"\x0c" + bytes(7), 1)[1] == 3
    assert counts_of(b"\xf0" + bytes(7), 2)[1] == 15


def test_wide_counts_are_big_endian():
    assert counts_of(struct.pack(">4H", 1, 2, 3, 0x1234), 4)[3] == 0x1234
    assert counts_of(struct.pack(">Q", 1 << 40), 6)[0] == 1 << 40


@pytest.mark.parametrize("order", range(7))
def test_a_count_that_does_not_fit_is_an_error(order):
    with pytest.raises(OverflowError):
        counts_of(bytes(BLOCK), order)[0] = 1 << (1 << order)
