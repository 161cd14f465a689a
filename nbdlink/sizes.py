"""Byte counts as people write them: `512M`, `2G`, `1048576`."""

from __future__ import annotations

from nbdlink.errors import ConfigError

_UNITS = "KMGTPE"


def parse_size(text: str) -> int:
    """Read a byte count with an optional binary unit (K is 1024 bytes), as qemu's tools do.

    Raises:
        ConfigError: it is not one, or no file could be that large.
    """
    number = text.strip().upper().removesuffix("B").removesuffix("I")
    power = 0
    if number and number[-1] in _UNITS:
        power = _UNITS.index(number[-1]) + 1
        number = number[:-1]
    if not (number.isascii() and number.isdigit()) or len(number) > 20:
        raise ConfigError(f"{text!r} is not a size", hint="say for example 4096, 512M or 2G")
    size = int(number) << 10 * power
    if size >= 1 << 63:
        raise ConfigError(f"{text!r}: no storage can be that large (2^63 bytes)")
    return size


def parse_seconds(text: str) -> float:
    """Read a time in seconds, more than nothing and at most a day.

    Raises:
        ConfigError: it is not one.
    """
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 86400:  # false for nan, too
        raise ConfigError(f"{text!r} is not a time in seconds", hint="say 0.1 to 86400")
    return seconds


def format_size(size: int) -> str:
    """Write a byte count exactly, in the largest unit that needs no fraction."""
    unit = -1
    while size and size % 1024 == 0 and unit < len(_UNITS) - 1:
        size //= 1024
        unit += 1
    return f"{size}{_UNITS[unit]}" if unit >= 0 else str(size)
