"""What was asked for comes back from its description, and two are told apart by it."""

from __future__ import annotations

import json

import pytest

from nbdlink.client.security import TLSOptions
from nbdlink.errors import ConfigError
from nbdlink.link.spec import LinkSpec, describe, differences, restore
from nbdlink.transport.tlsfiles import CredentialFiles
from nbdlink.uri import Target

PLAIN = LinkSpec(Target("h", export="x"), "/dev/nbd3", "data", wait=30.0)
FULL = LinkSpec(
    Target("h", 10810, export="x y", tls=True),
    "/dev/nbd3",
    "data",
    connections=4,
    read_only=True,
    block_size=4096,
    timeout=6,
    dead_timeout=99,
    road="netlink",
    tls=TLSOptions("require", CredentialFiles(directory="/pki", verify_depth=2), "other", False),
    tls_road="relay",
    paths=(Target("i", export="x y", tls=True), Target(socket="\0abstract", tls=True)),
)


@pytest.mark.parametrize("spec", [PLAIN, FULL])
def test_a_specification_comes_back(spec):
    kept = json.loads(json.dumps(describe(spec)))
    assert restore(kept, "data", "/dev/nbd3") == spec


def test_the_device_and_the_name_do_not_make_it_another():
    other = LinkSpec(PLAIN.target, None, "other", wait=None)
    assert differences(describe(PLAIN), describe(other)) == []


def test_what_differs_is_named():
    other = LinkSpec(PLAIN.target, connections=2, dead_timeout=9)
    assert differences(describe(PLAIN), describe(other)) == ["connections", "dead-timeout"]


def test_options_of_tls_do_not_matter_without_it():
    other = LinkSpec(PLAIN.target, tls=TLSOptions(hostname="h"))
    assert differences(describe(PLAIN), describe(other)) == []


@pytest.mark.parametrize("kept", [{}, {"target": "h"}, {**describe(PLAIN), "tls": {"strange": 1}}])
def test_what_another_version_kept_is_told(kept):
    with pytest.raises(ConfigError, match="/dev/nbd3: what was recorded"):
        restore(kept, None, "/dev/nbd3")
