"""When the scheduling policy is changed, with a clock and rates of the test's own."""

from __future__ import annotations

import pytest

from nbdlink.server.pace import Pace


class Play:
    """Looks at a connection every 64 receives."""

    def __init__(self):
        self.now = 100.0
        self.requests = self.inboxes = 0
        self.pace = Pace(self.now)
        self.seconds = {False: 0.0, True: 0.0}

    def run(self, seconds, ordinary, batch, per_inbox=2):
        """Let time pass, with so many requests per second under each policy."""
        end = self.now + seconds
        while self.now < end:
            rate = batch if self.pace.batch else ordinary
            elapsed = 64 * per_inbox / rate
            self.now += elapsed
            self.seconds[self.pace.batch] += elapsed
            self.inboxes += 64
            self.requests += 64 * per_inbox
            self.pace.look(self.now, self.requests, self.inboxes)
        return self.pace.batch


@pytest.fixture
def play():
    return Play()


def test_it_is_kept_while_it_pays(play):
    play.run(100, 50_000, 80_000)
    assert play.seconds[True] > 95


def test_it_is_hardly_used_if_it_does_not_pay(play):
    play.run(1000, 50_000, 50_000)
    assert play.seconds[True] < 1


def test_it_is_given_up_at_once_if_somebody_keeps_the_processor(play):
    # One request every four milliseconds, as a hog's time slice allows.
    play.run(1000, 50_000, 250)
    assert play.seconds[True] < 20  # of a thousand


def test_a_client_that_is_not_busy_does_not_bring_it_about(play):
    play.run(1000, 2000, 80_000, per_inbox=1)
    assert play.seconds[True] == 0


def test_it_is_given_up_when_the_client_gets_slow(play):
    play.run(5, 50_000, 80_000)
    assert play.pace.batch
    assert not play.run(0.5, 1000, 1000, per_inbox=1)


def test_it_is_tried_again_after_it_did_not_pay(play):
    play.run(10, 50_000, 50_000)
    play.run(30, 50_000, 80_000)
    assert play.pace.batch
