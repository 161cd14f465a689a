"""What a supervisor would do about a link, and when."""

from __future__ import annotations

import pytest

from nbdlink.errors import ConfigError, TransportError
from nbdlink.link.health import Health
from nbdlink.link.spec import LinkSpec
from nbdlink.link.supervisor.backoff import Backoff
from nbdlink.link.supervisor.watched import MEASURE_SECONDS, RETURN_SECONDS, Watched
from nbdlink.uri import Target

SPEC = LinkSpec(Target("h"), name="data")
WELL, HURT, DEAD = Health((0, 1), ()), Health((0,), (1,)), Health((), (0, 1))
AWAY = TransportError("h:10809: connection refused")


def link(**fields):
    return Watched("data", backoff=Backoff(first=1, jitter=0, quick=100), **fields)


def seen(**fields):
    found = link(**fields)
    found.seen(0.0)
    return found


@pytest.mark.parametrize(
    ("fields", "act"),
    [
        ({"spec": SPEC}, "attach"),
        ({"spec": SPEC, "detached": True}, None),
        ({}, None),
        ({"spec": SPEC, "index": 0, "health": WELL}, None),
        ({"index": 0, "health": HURT}, "renew"),
        ({"index": 0, "health": DEAD}, "renew"),
        ({"index": 0, "health": None}, None),
        ({"index": 0, "health": WELL, "strayed": (1,)}, "return"),
        ({"index": 0, "health": HURT, "strayed": (1,)}, "renew"),
        ({"index": 0, "health": WELL, "measurable": True}, "measure"),
        ({"index": 0, "health": DEAD, "measurable": True}, "renew"),
    ],
)
def test_what_is_done_at_once(fields, act):
    assert seen(**fields).next_act(0.0) == act


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"spec": SPEC}, "waiting"),
        ({"spec": SPEC, "detached": True}, "detached"),
        ({"index": 0, "health": WELL}, "attached"),
        ({"index": 0, "health": HURT}, "degraded"),
        ({"index": 0, "health": DEAD}, "dead"),
        ({"index": 0, "health": None}, "attached"),
    ],
)
def test_the_word_for_its_state(fields, word):
    assert link(**fields).state == word


def test_nothing_is_done_twice_at_once():
    found = seen(index=0, health=DEAD)
    found.begin("renew", 0.0)
    found.seen(0.0)
    assert (found.next_act(9.0), found.next_time()) == (None, None)


def test_a_failure_is_tried_again_after_a_pause():
    found = seen(index=0, health=DEAD)
    found.begin("renew", 0.0)
    found.failed(AWAY, 5.0)
    assert (found.next_act(5.9), found.next_time(), found.next_act(6.0)) == (None, 6.0, "renew")


def test_being_looked_at_does_not_shorten_the_pause():
    found = seen(index=0, health=DEAD)
    found.begin("renew", 0.0)
    found.failed(AWAY, 5.0)
    found.seen(5.1)
    assert found.next_time() == 6.0


def test_what_takes_a_person_is_tried_rarely():
    found = seen(spec=SPEC)
    found.begin("attach", 0.0)
    found.failed(ConfigError("wrong"), 5.0)
    assert found.next_time() == 35.0


def test_the_same_trouble_is_news_once():
    found = seen(index=0, health=DEAD)
    told = []
    for _ in range(3):
        found.begin("renew", 0.0)
        told.append(found.failed(TransportError("connection refused"), 1.0))
    found.begin("renew", 0.0)
    told.append(found.failed(TransportError("timed out"), 1.0))
    assert told == [True, False, False, True]


def test_a_trouble_is_over_when_all_is_well():
    found = seen(index=0, health=DEAD)
    found.begin("renew", 0.0)
    found.failed(AWAY, 5.0)
    found.health = WELL
    found.seen(6.0)
    assert (found.trouble, found.due) == (None, None)


def test_a_hint_ends_the_pause():
    found = seen(spec=SPEC)
    found.begin("attach", 0.0)
    found.failed(ConfigError("wrong"), 5.0)
    assert found.hurry(6.0)
    assert found.next_act(6.0) == "attach"


def test_a_hint_about_a_link_that_is_well_means_nothing():
    found = seen(index=0, health=WELL)
    assert not found.hurry(6.0)
    assert found.next_act(6.0) is None


def test_a_route_that_stays_closed_is_not_tried_all_the_time():
    found = seen(index=0, health=WELL, strayed=(1,))
    found.begin("return", 10.0)
    found.failed(AWAY, 11.0)
    assert found.next_act(11.0 + RETURN_SECONDS / 2) is None
    assert found.next_act(10.0 + RETURN_SECONDS) == "return"


def test_a_return_that_failed_is_no_reason_to_renew():
    found = seen(index=0, health=WELL, strayed=(1,))
    found.begin("return", 10.0)
    found.failed(AWAY, 11.0)
    assert found.due is None


def test_the_size_is_looked_at_now_and_then():
    found = seen(index=0, health=WELL, measurable=True)
    found.begin("measure", 100.0)
    found.done(101.0)
    assert found.next_time() == 100.0 + MEASURE_SECONDS


def test_most_attempts_do_not_wait_for_long():
    found = seen(index=0, health=DEAD)
    patience = []
    for _ in range(8):
        patience.append(found.begin("renew", 0.0))
        found.failed(AWAY, 1.0)
    assert patience.count(None) == 2


@pytest.mark.parametrize(
    "fields",
    [
        {"index": 0, "health": WELL, "measurable": True, "strayed": (1,)},
        {"index": 0, "health": None, "measurable": True},
        {"index": 0, "health": None, "strayed": (1,)},
        {"index": None, "detached": True, "measurable": True, "strayed": (1,)},
    ],
)
def test_when_its_time_has_come_there_is_something_to_do(fields):
    found = seen(**fields)
    time = found.next_time()
    assert time is None or found.next_act(time), "who waits for this would not wait at all"


def test_a_size_that_cannot_be_asked_for_is_told_once():
    found = seen(index=0, health=WELL, measurable=True)
    told = []
    for _ in range(3):
        found.begin("measure", 0.0)
        told.append(found.failed(TransportError("connection refused"), 1.0))
        found.seen(2.0)
    found.begin("measure", 3.0)
    found.done(4.0)
    found.begin("measure", 5.0)
    told.append(found.failed(TransportError("connection refused"), 6.0))
    assert told == [True, False, False, True]
