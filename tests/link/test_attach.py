"""What makes two links the same, however they were written."""

from __future__ import annotations

import contextlib

import pytest

from nbdlink.client.security import TLSOptions
from nbdlink.errors import ConfigError, ForeignExportError
from nbdlink.link.attach import _negotiate_all, secure
from nbdlink.link.spec import LinkSpec, describe, differences
from nbdlink.protocol.claim import Claim
from nbdlink.server import serve_in_thread
from nbdlink.transport.tlsfiles import CredentialFiles
from nbdlink.uri import Target
from tests.server.fakes import MemoryStorage

FILES = CredentialFiles(directory="/pki")
SECURE = Target("h", export="x", tls=True)


def described(spec):
    return describe(secure(spec)[0])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (LinkSpec(Target("Store1")), LinkSpec(Target("store1"))),
        (LinkSpec(Target("h"), tls=TLSOptions("require")), LinkSpec(Target("h", tls=True))),
        (
            LinkSpec(Target("h", export="x"), tls=TLSOptions(files=FILES)),
            LinkSpec(SECURE, tls=TLSOptions("require", FILES)),
        ),
    ],
)
def test_the_same_link_can_be_written_in_several_ways(one, other):
    assert differences(described(one), described(other)) == []


def test_what_was_recorded_is_the_same_when_it_is_read_again():
    spec, _ = secure(LinkSpec(Target("H"), paths=(Target("I"),), tls=TLSOptions("require")))
    assert secure(spec)[0] == spec


def test_no_way_goes_without_tls_if_the_first_does_not():
    with pytest.raises(ConfigError, match="nbd://i/x goes without TLS, which nbds://h/x demands"):
        secure(LinkSpec(SECURE, paths=(Target("i", export="x"),)))


class Signed(MemoryStorage):
    """A storage that says what it is."""

    signature = None

    def __init__(self, signature):
        super().__init__()
        self.signature = signature


def negotiated(*storages):
    """Give what comes of connections to servers of these, all of them said to be one export."""
    with contextlib.ExitStack() as stack:
        services = [stack.enter_context(serve_in_thread({"": storage})) for storage in storages]
        first, *others = [Target.parse(service.uri()) for service in services]
        spec, securities = secure(LinkSpec(first, paths=tuple(others), connections=len(storages)))
        return _negotiate_all(spec, securities, Claim("0" * 32, 0, 0), stack)[2]


def test_the_blocks_suit_every_route():
    storages = [MemoryStorage(minimum_block=minimum) for minimum in (512, 4096, 1)]
    assert negotiated(*storages).minimum_block == 4096


def test_no_two_routes_lead_to_different_exports():
    with pytest.raises(ForeignExportError, match="its signature is 'other', not 'one'"):
        negotiated(MemoryStorage(), Signed("one"), Signed("other"))
