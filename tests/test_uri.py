"""Targets: what people type, and NBD URIs as doc/uri.md of the NBD project has them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdlink.errors import ConfigError
from nbdlink.uri import Target

words = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=60)
hosts = st.one_of(
    st.from_regex(r"[a-z0-9][a-z0-9.-]{0,30}", fullmatch=True),
    st.just("fd00::1"),
    st.from_regex(r"fe80::1%[a-z0-9]{1,15}", fullmatch=True),
)


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("store1", Target("store1")),
        ("store1:10810", Target("store1", 10810)),
        ("store1/data", Target("store1", export="data")),
        ("store1:10810/data/more", Target("store1", 10810, export="data/more")),
        ("[fd00::1]", Target("fd00::1")),
        ("[fd00::1]:10810", Target("fd00::1", 10810)),
        ("[fd00::1]:10810/x]y", Target("fd00::1", 10810, export="x]y")),
        ("10.0.0.1", Target("10.0.0.1")),
        ("nbd:10810/a:b", Target("nbd", 10810, export="a:b")),
        ("host:0000010810", Target("host", 10810)),
        ("[fe80::1%12]/x", Target("fe80::1%12", export="x")),
        ("nbd://[fe80::1%25eb0]/x", Target("fe80::1%eb0", export="x")),
        # The examples of doc/uri.md.
        ("nbd://example.com:10809/export", Target("example.com", export="export")),
        ("nbd+unix:///export?socket=nbd.sock", Target(socket="nbd.sock", export="export")),
        ("nbd://example.com/disk", Target("example.com", export="disk")),
        ("nbd+unix:///disk?socket=sock", Target(socket="sock", export="disk")),
        ("nbd://example.com/", Target("example.com")),
        ("nbd://example.com", Target("example.com")),
        ("nbd://example.com//disk", Target("example.com", export="/disk")),
        ("nbd://example.com/hello%20world", Target("example.com", export="hello world")),
        ("nbd+unix:///?socket=%00/abstract", Target(socket="\0/abstract")),
        ("nbd://", Target("localhost")),
        ("nbd:///x", Target("localhost", export="x")),
        ("NBD://h", Target("h")),
        ("nbd://[::1]:1234/", Target("::1", 1234)),
        ("nbd+unix:///?socket=/a+b", Target(socket="/a+b")),
        ("nbd://h/?x-later=1", Target("h")),
        ("nbds://h", Target("h", tls=True)),
        ("nbds://user@h/", Target("h", tls=True, username="user")),
        ("nbds://h/?tls-verify-peer=0", Target("h", tls=True, tls_verify_peer=False)),
        (
            "nbds+unix:///?socket=/s&tls-hostname=store1&tls-type=psk&tls-psk-file=/k",
            Target(socket="/s", tls=True, tls_hostname="store1", tls_type="psk", tls_psk_file="/k"),
        ),
    ],
)
def test_a_target_is_understood(text, target):
    assert Target.parse(text) == target


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "names no server"),
        ("/run/nbd.sock", "is a path"),
        ("nbd:host:10809:exportname=data", "how QEMU once wrote it"),
        ("nbd:unix:/run/nbd.sock", "how QEMU once wrote it"),
        (":10809", "host is missing"),
        ("host:0", "not a port"),
        ("host:65536", "not a port"),
        ("host:99999999999999999999", "not a port"),
        ("host:006553599", "not a port"),
        ("host:nbd", "not a port"),
        ("host:\u0663", "not a port"),
        ("fd00::1", "needs brackets"),
        ("[fd00::1", "not closed"),
        ("[host]", "not an IPv6 address"),
        ("[::1]x", "not a port"),
        ("ho st", "not a host name"),
        ("host/a\0b", "NUL"),
        ("host/" + "x" * 4097, "too long"),
        ("http://host/", "'http' is not"),
        ("nbd+ssh://host/", "'nbd+ssh' is not"),
        ("nbd://host/#x", "fragment"),
        ("nbd://host/%ff", "not valid UTF-8"),
        ("nbd://host/%00", "NUL"),
        ("nbd://localhost%00.example/", "NUL"),
        ("nbd://u\udcff@host/", "user's name is not valid Unicode"),
        ("nbd+unix:///x", "not named"),
        ("nbd+unix:///?socket=", "not named"),
        ("nbd+unix:///?socket=/a%00b", "NUL"),
        ("nbd+unix://host/?socket=/s", "has no host"),
        ("nbd://host/?socket=/s", "belongs to a Unix socket"),
        ("nbd://host/?sokcet=/s", "unknown parameter 'sokcet'"),
        ("nbds://host/?tls-type=tls", "tls-type is 'tls'"),
        ("nbds://host/?tls-verify-peer=yes", "tls-verify-peer is 'yes'"),
        ("nbds://host/?tls-type=psk&tls-type=psk", "given twice"),
        ("nbd://host/?tls-type=psk", "without TLS"),
    ],
)
def test_nonsense_is_refused_by_name(text, says):
    with pytest.raises(ConfigError) as caught:
        Target.parse(text)
    assert says in str(caught.value)


@pytest.mark.parametrize("zone", ["12", "eb0", "25eth0"])
def test_a_zone_that_looks_percent_encoded_comes_back_from_its_uri(zone):
    target = Target(f"fe80::1%{zone}", export="data")
    assert Target.parse(str(target)) == target


def test_a_misspelt_parameter_gets_a_suggestion():
    with pytest.raises(ConfigError) as caught:
        Target.parse("nbd+unix:///?sokcet=/s")
    assert caught.value.hint == "did you mean socket?"


@given(host=hosts, port=st.integers(1, 65535), export=words, tls=st.booleans())
def test_a_tcp_target_comes_back_from_its_uri(host, port, export, tls):
    target = Target(host, port, export=export, tls=tls)
    assert Target.parse(str(target)) == target


@given(path=words.filter(bool), export=words, user=words, tls=st.booleans())
def test_a_unix_target_comes_back_from_its_uri(path, export, user, tls):
    target = Target(socket=path, export=export, tls=tls, username=user or None)
    assert Target.parse(str(target)) == target


@given(text=st.text(max_size=60))
def test_any_text_is_a_target_or_refused(text):
    try:
        target = Target.parse(text)
    except ConfigError:
        return
    assert Target.parse(str(target)) == target
