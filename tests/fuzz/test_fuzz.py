"""A short fuzz, the same each time; `python -m tests.fuzz` goes on from there."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from . import target as target_
from .streams import conversation
from .target import Target


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    target = Target(tmp_path_factory.mktemp("fuzz"))
    yield target
    target.close()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_whatever_clients_say_the_server_lives(target, seed):
    target.converse(seed)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.binary(max_size=300), st.integers(0, 3))
def test_whatever_bytes_come_the_server_lives(target, data, style):
    begin = b"\0\0\0\3"
    if style < 3:
        go = b"IHAVEOPT" + bytes([0, 0, 0, 7, 0, 0, 0, 6]) + bytes(6)
        change = {0: b"", 1: b"\x08", 2: b"\x0b"}[style]
        begin += (b"IHAVEOPT\0\0\0" + change + bytes(4) if change else b"") + go
    for catalogue in target._catalogues:
        target._converse(catalogue, begin + data, random.Random(1))


def test_equal_seeds_say_the_same():
    said = {conversation(random.Random(seed)) for seed in range(50)}
    assert len(said) > 40
    assert said == {conversation(random.Random(seed)) for seed in range(50)}


def test_a_bug_would_be_found(target, monkeypatch):
    def bug(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(target_.MemoryStorage, "read_into", bug)
    with pytest.raises(ZeroDivisionError):
        target._converse(
            target._catalogues[0],
            b"\0\0\0\3IHAVEOPT" + bytes([0, 0, 0, 7, 0, 0, 0, 6]) + bytes(6)
            + bytes.fromhex("25609513 0000 0000 0000000000000007 0000000000000000 00000010"),
            random.Random(1),
        )  # fmt: skip
