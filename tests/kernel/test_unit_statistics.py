"""Counters of the block layer: read as documented, and made into rates without surprises."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nbdlink.kernel.statistics import Operations, Rate, parse, rates

# From a machine: Linux 6.1, `cat /sys/block/sda/stat`.
LINE = "  200 0 3200 100 50 7 800 25 3 90 126 4 0 16 1 6 12\n"

BEFORE = parse(LINE, 10.0)


def later(**changes):
    return replace(BEFORE, time=12.0, **changes)


def test_every_field_is_where_the_kernels_manual_says():
    assert BEFORE.read == Operations(200, 3200 * 512, 100)
    assert BEFORE.write == Operations(50, 800 * 512, 25)
    assert BEFORE.discard == Operations(4, 16 * 512, 1)
    assert BEFORE.flush == Operations(6, 0, 12)
    assert (BEFORE.in_flight, BEFORE.busy, BEFORE.waited) == (3, 90, 126)


def test_an_old_kernels_eleven_fields_will_do():
    old = parse("1 0 8 4 1 0 8 4 0 3 8", 0.0)
    assert (old.discard, old.flush) == (Operations(), Operations())


@pytest.mark.parametrize("text", ["", "1 2 3", "a b c d e f g h i j k", "\0" * 40])
def test_anything_else_is_no_sample(text):
    assert parse(text, 0.0) is None


def test_rates_are_per_second():
    found = rates(BEFORE, later(read=Operations(1200, 3200 * 512 + (8 << 20), 2100)))
    assert found.read == Rate(500.0, 4 << 20, 2.0)
    assert found.write == Rate(0.0, 0.0, None)


def test_latency_over_all_kinds_is_weighed_by_their_number():
    found = rates(BEFORE, later(read=Operations(203, 0, 103), flush=Operations(7, 0, 12 + 9)))
    assert found.per_second == 2.0
    assert found.latency == (3 * 1 + 9) / 4


def test_no_request_has_no_latency():
    assert rates(BEFORE, later()).latency is None


def test_the_queue_is_the_time_waited_over_the_time_passed():
    assert rates(BEFORE, later(waited=126 + 8000)).queue_depth == 4.0


def test_a_hanging_device_shows_what_is_under_way():
    found = rates(BEFORE, later(in_flight=16))
    assert (found.in_flight, found.per_second) == (16, 0.0)


def test_utilisation_is_never_more_than_everything():
    assert rates(BEFORE, later(busy=90 + 2004)).utilisation == 1.0
    assert rates(BEFORE, later(busy=90 + 500)).utilisation == 0.25


def test_times_that_begin_anew_are_followed():
    top = replace(BEFORE, waited=2**32 - 1000, read=Operations(200, 0, 2**32 - 50))
    found = rates(top, later(waited=1000, read=Operations(202, 0, 50)))
    assert (found.queue_depth, found.read.latency) == (1.0, 50.0)


def test_counters_that_went_back_give_no_rates():
    assert rates(BEFORE, later(read=Operations(3, 4096, 1))) is None


def test_no_time_gives_no_rates():
    assert rates(BEFORE, BEFORE) is None
