"""When a dead device is let go of while the machine goes down; the clock is the test's."""

from __future__ import annotations

import pytest

from nbdlink.link import record
from nbdlink.link.health import Health
from nbdlink.link.supervisor.farewell import GRACE_SECONDS, MARK, Farewell
from nbdlink.link.supervisor.watched import Watched


@pytest.fixture(autouse=True)
def mark(tmp_path, monkeypatch):
    """Have the machine go down, by a mark in a folder of the test's own."""
    monkeypatch.setattr(record, "DIRECTORY", tmp_path)
    path = tmp_path / MARK
    path.touch()
    return path


def link(*, live=(), dead=(), index=0):
    return Watched("data", index=index, health=Health(live=live, dead=dead))


DEAD = link(dead=(0,))
ALIVE = link(live=(0,))


def test_a_dead_device_gets_some_seconds():
    farewell = Farewell()
    farewell.overdue([DEAD], 0.0)
    assert farewell.overdue([DEAD], GRACE_SECONDS - 0.1) == []


def test_after_them_it_is_let_go_of():
    farewell = Farewell()
    farewell.overdue([DEAD], 0.0)
    assert farewell.overdue([DEAD], GRACE_SECONDS) == [DEAD]


def test_it_is_let_go_of_once():
    farewell = Farewell()
    farewell.overdue([DEAD], 0.0)
    farewell.overdue([DEAD], GRACE_SECONDS)
    assert farewell.overdue([DEAD], 10 * GRACE_SECONDS) == []


def test_one_that_recovers_begins_anew():
    farewell = Farewell()
    farewell.overdue([DEAD], 0.0)
    farewell.overdue([ALIVE], 1.0)
    assert farewell.overdue([DEAD], GRACE_SECONDS) == []


def test_while_the_machine_runs_nothing_is_let_go_of(mark):
    mark.unlink()
    farewell = Farewell()
    farewell.overdue([DEAD], 0.0)
    assert farewell.overdue([DEAD], 10 * GRACE_SECONDS) == []


@pytest.mark.parametrize(
    "kept",
    [
        pytest.param(ALIVE, id="alive"),
        pytest.param(link(live=(0,), dead=(1,)), id="half-dead"),
        pytest.param(Watched("data"), id="not-attached"),
        pytest.param(Watched("data", index=0), id="ioctl"),
    ],
)
def test_what_is_not_dead_is_kept(kept):
    farewell = Farewell()
    farewell.overdue([kept], 0.0)
    assert farewell.overdue([kept], 10 * GRACE_SECONDS) == []
