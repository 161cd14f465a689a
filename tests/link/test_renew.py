"""What a renewal knows without a kernel: which export is the same, and which way is a channel's."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nbdlink.client.security import TLSOptions
from nbdlink.errors import ForeignExportError
from nbdlink.link.health import strayed
from nbdlink.link.identity import is_proved
from nbdlink.link.record import Channel, Record
from nbdlink.link.renew import _moved
from nbdlink.link.spec import LinkSpec, describe
from nbdlink.uri import Target

HERE, THERE = Target("here", export="x"), Target("there", export="x")
SPEC = LinkSpec(HERE, paths=(THERE,), connections=3)
SAMPLE = Record(
    index=3,
    name="data",
    target=str(HERE),
    connections=3,
    read_only=False,
    block_size=512,
    timeout=30,
    dead_timeout=0,
    road="netlink",
    identifier="nbdlink:data",
    pid=77,
    spec=describe(SPEC),
)


def over(*routes):
    return replace(SAMPLE, channels=tuple(Channel(route=route and str(route)) for route in routes))


@pytest.mark.parametrize(
    ("routes", "away"),
    [
        ((HERE, THERE, HERE), ()),
        ((THERE, THERE, HERE), (0,)),
        ((HERE, HERE, THERE), (1, 2)),
        ((None, None, None), ()),
    ],
)
def test_which_channels_have_strayed(routes, away):
    assert strayed(over(*routes)) == away


@pytest.mark.parametrize(
    ("expected", "told", "route", "proved"),
    [
        ("mine", "mine", HERE, True),
        ("mine", "mine", THERE, True),
        ("auto:1", "auto:1", HERE, True),
        ("auto:1", "auto:2", THERE, False),
        ("mine", None, HERE, False),
        (None, "mine", HERE, False),
    ],
)
def test_what_a_signature_proves(expected, told, route, proved):
    assert is_proved(replace(SAMPLE, signature=expected), route, told) is proved


@pytest.mark.parametrize(
    ("expected", "told", "route"),
    [("mine", "yours", HERE), ("mine", "yours", THERE), ("auto:1", "auto:2", HERE)],
)
def test_what_a_signature_disproves(expected, told, route):
    with pytest.raises(ForeignExportError, match=f"signature is '{told}', not '{expected}'"):
        is_proved(replace(SAMPLE, signature=expected), route, told)


def test_a_move_leaves_no_way_back():
    assert _moved(SPEC, Target("third", export="x")).routes == (Target("third", export="x"),)


def test_a_move_keeps_the_export_unless_another_is_named():
    assert _moved(SPEC, Target("third")).target.export == "x"
    assert _moved(SPEC, Target("third", export="y")).target.export == "y"


def test_a_move_does_not_leave_tls():
    before = replace(HERE, tls=True, username="me", tls_psk_file="/keys")
    moved = _moved(LinkSpec(before, tls=TLSOptions(hostname="h")), Target("third", export="x"))
    assert moved.target == replace(before, host="third")
    assert moved.tls.hostname == "h"
