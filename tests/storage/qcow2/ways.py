"""The two ways of a request: as a worker of the server does it, and as its loop tries it first."""

from __future__ import annotations


def read(storage, offset=0, length=None):
    """Read in the long way."""
    buffer = bytearray(storage.size - offset if length is None else length)
    storage.read_into(memoryview(buffer), offset)
    return bytes(buffer)


def write(storage, data, offset):
    """Write in the long way."""
    storage.write(memoryview(data), offset, False)


def read_promptly(storage, offset, length):
    """Read at once, or in the long way if that does not go."""
    return read_at_once(storage, offset, length) or read(storage, offset, length)


def write_promptly(storage, data, offset):
    """Write at once, or in the long way if that does not go."""
    if not write_at_once(storage, data, offset):
        write(storage, data, offset)


def read_at_once(storage, offset, length):
    """Read at once; give None if that does not go."""
    buffer = bytearray(length)
    return bytes(buffer) if storage.at_once.read(memoryview(buffer), offset) else None


def write_at_once(storage, data, offset):
    """Write at once; tell whether that went."""
    return storage.at_once.write(memoryview(data), offset)
