"""Netlink messages in packets, whole and broken."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdlink.kernel import nlmsg


def padded(data):
    return data + bytes(-len(data) % 4)


@given(st.lists(st.tuples(st.integers(16, 500), st.binary(max_size=50)), max_size=5))
def test_messages_come_back(sent):
    packet = b"".join(padded(nlmsg.message(kind, nlmsg.REQUEST, body)) for kind, body in sent)
    found = [(kind, whole[nlmsg.HEADER.size :]) for kind, whole in nlmsg.messages(packet)]
    assert found == sent


@given(st.lists(st.tuples(st.integers(0, 0x3FFF), st.binary(max_size=50)), max_size=5))
def test_attributes_come_back(sent):
    assert list(nlmsg.attributes(b"".join(padded(nlmsg.attribute(*each)) for each in sent))) == sent


@given(st.binary(max_size=100))
def test_noise_comes_to_an_end(noise):
    list(nlmsg.messages(noise))
    list(nlmsg.attributes(noise))


@pytest.mark.parametrize(
    ("body", "errno"), [(b"", 0), (struct.pack("=i", 0), 0), (struct.pack("=i", -22), 22)]
)
def test_what_an_answer_ends_with(body, errno):
    assert nlmsg.error_of(nlmsg.message(nlmsg.ERROR, 0, body)) == errno
