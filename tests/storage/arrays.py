"""What every storage is: an array of bytes. A script of requests leaves in it what it says."""

from __future__ import annotations

from hypothesis import strategies as st

SIZE = 40 << 10


def scripts(size=SIZE, most=8):
    """Give a strategy for lists of requests to a storage of that size."""
    ranges = st.tuples(st.integers(0, size), st.integers(0, size)).map(sorted)
    requests = st.one_of(
        st.tuples(st.just("write"), ranges, st.booleans(), st.integers(0, 255)),
        st.tuples(st.just("zero"), ranges, st.booleans(), st.booleans()),
        st.tuples(st.just("trim"), ranges, st.booleans(), st.none()),
        st.tuples(st.just("cache"), ranges, st.none(), st.none()),
    )
    return st.lists(requests, max_size=most)


def read(storage, offset=0, length=None):
    """Read a range, or up to the end."""
    buffer = bytearray(storage.size - offset if length is None else length)
    storage.read_into(memoryview(buffer), offset)
    return bytes(buffer)


def write(storage, data, offset, fua=False):
    """Write bytes."""
    storage.write(memoryview(data), offset, fua)


def play(storage, model, script):
    """Send a script's requests to a storage, and do the same to a bytearray."""
    for what, (begin, end), flag, detail in script:
        length = end - begin
        if what == "write":
            data = bytes([detail]) * length
            write(storage, data, begin, fua=flag)
            model[begin:end] = data
        elif what == "zero":
            storage.zero(begin, length, may_trim=flag, fast=False, fua=detail)
            model[begin:end] = bytes(length)
        elif what == "trim":
            storage.trim(begin, length, flag)
            model[begin:end] = read(storage, begin, length)  # anything is right there
        else:
            storage.cache(begin, length)


def told(storage, context="base:allocation", offset=0, length=None):
    """Give what a context says, as (offset, length, flags) with like neighbours made one."""
    length = storage.size - offset if length is None else length
    found = []
    for extent in storage.extents(context, offset, length):
        if found and found[-1][2] == extent.flags:
            found[-1] = (found[-1][0], found[-1][1] + extent.length, extent.flags)
        else:
            found.append((offset, extent.length, extent.flags))
        offset += extent.length
    assert sum(each[1] for each in found) == length
    return found
