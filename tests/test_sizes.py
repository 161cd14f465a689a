"""Byte counts as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdlink.errors import ConfigError
from nbdlink.sizes import format_size, parse_size


@given(size=st.integers(0, (1 << 63) - 1))
def test_a_size_comes_back_exactly(size):
    assert parse_size(format_size(size)) == size


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("512", 512), ("4k", 4096), ("1MiB", 1 << 20), ("2G", 2 << 30), (" 3T ", 3 << 40)],
)
def test_a_size_is_understood(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "-1", "1.5G", "G", "1X", "1KK", "9E", "0x10", "9" * 40])
def test_nonsense_is_refused(text):
    with pytest.raises(ConfigError):
        parse_size(text)


# What nbdinfo 1.14 prints as "export-size-str".
@pytest.mark.parametrize(
    ("size", "text"),
    [(10486272, "10486272"), (1536 << 20, "1536M"), (3 << 30, "3G"), (1000, "1000"), (0, "0")],
)
def test_a_size_looks_as_nbdinfo_prints_it(size, text):
    assert format_size(size) == text
