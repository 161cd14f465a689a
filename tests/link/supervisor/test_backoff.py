"""When a renewal is tried again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdlink.link.supervisor.backoff import Backoff


def pauses(backoff, count):
    return [backoff.failed(100.0) - 100.0 for _ in range(count)]


def test_the_first_failure_is_answered_at_once():
    assert Backoff().failed(5.0) == 5.0


def test_each_pause_is_longer_than_the_one_before():
    backoff = Backoff(first=1, factor=2, quick=0, soon=100, longest=100, jitter=0)
    assert pauses(backoff, 5) == [0, 1, 2, 4, 8]


def test_for_some_seconds_the_pauses_stay_short():
    backoff = Backoff(first=1, factor=2, quick=4, soon=100, longest=100, jitter=0)
    now, found = 100.0, []
    for _ in range(8):
        again = backoff.failed(now)
        found.append(again - now)
        now = again
    assert found == [0, 1, 1, 1, 1, 1, 2, 4]


def test_in_the_first_minute_no_pause_is_long():
    backoff = Backoff(quick=0, jitter=0)
    early = [backoff.failed(0.0 + second) - second for second in range(60)]
    late = [backoff.failed(60.0 + second) - 60.0 - second for second in range(60)]
    assert (max(early), max(late)) == (pytest.approx(1), pytest.approx(5))


def test_slow_attempts_have_no_more_time_than_fast_ones():
    backoff = Backoff(first=1, factor=2, quick=5, soon=100, longest=100, jitter=0)
    assert [backoff.failed(at) - at for at in (100.0, 103.0, 106.0, 109.0)] == [0, 1, 1, 2]


def test_no_pause_is_longer_than_the_longest():
    backoff = Backoff(first=1, factor=2, quick=0, soon=10, longest=10, jitter=0)
    assert pauses(backoff, 2000)[-1] == 10


def test_a_success_that_lasts_begins_anew():
    backoff = Backoff(first=1, jitter=0, calm=10)
    pauses(backoff, 5)
    backoff.succeeded(200.0)
    assert backoff.failed(210.0) == 210.0


def test_a_success_that_does_not_last_changes_nothing():
    backoff = Backoff(first=1, factor=2, quick=0, soon=100, longest=100, jitter=0, calm=10)
    pauses(backoff, 3)
    backoff.succeeded(200.0)
    assert backoff.failed(209.0) == 209.0 + 4


def test_a_short_success_is_forgotten_with_its_failure():
    backoff = Backoff(first=1, factor=2, quick=0, soon=100, longest=100, jitter=0, calm=10)
    backoff.failed(0.0)
    backoff.succeeded(0.0)
    backoff.failed(1.0)
    assert backoff.failed(50.0) == 52.0


def test_a_hint_that_the_server_is_back_ends_the_waiting():
    backoff = Backoff()
    pauses(backoff, 10)
    backoff.hurry()
    assert backoff.failed(7.0) == 7.0


@given(st.integers(2, 5000), st.floats(0, 1, exclude_max=True))
def test_jitter_keeps_a_pause_near_what_it_would_be(attempts, dice):
    plain = Backoff(jitter=0, quick=0)
    shaken = Backoff(jitter=0.25, quick=0, dice=lambda: dice)
    for backoff in (plain, shaken):
        pauses(backoff, attempts)
    expected = plain.failed(100.0) - 100.0
    assert 0.7499 * expected <= shaken.failed(100.0) - 100.0 <= 1.2501 * expected
