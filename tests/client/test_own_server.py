"""The connection against our own server, in each of the three styles."""

from __future__ import annotations

import os

import pytest

from nbdlink.client.connection import connect
from nbdlink.errors import LocalProtocolError
from nbdlink.protocol.chunks import Extent
from nbdlink.protocol.constants import HeaderStyle, TransmissionFlag
from nbdlink.server import serve_in_thread

SIZE = 16 << 30
DATA = Extent(1 << 20, 0)


@pytest.fixture(params=list(HeaderStyle), ids=lambda style: style.name)
def nbd(request, tmp_path):
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.write(os.urandom(1 << 20))
        file.truncate(SIZE)
    with (
        serve_in_thread({"": path}, unix=tmp_path / "socket") as service,
        connect(service.uri(), style=request.param) as connection,
    ):
        assert connection.export.style == request.param
        yield connection


def test_what_is_written_is_read(nbd):
    data = os.urandom(3 << 20)
    nbd.pwrite(data, 12345)
    buffer = bytearray(b"\xee" * (4 << 20))
    nbd.pread_into(buffer, 12345)
    assert buffer[: 3 << 20] == data
    assert not any(buffer[3 << 20 :])


def test_zeroes_of_more_than_four_gigabytes_are_written(nbd):
    nbd.pwrite(b"x" * 4096, 9 << 30)
    nbd.zero(SIZE, 0)
    assert not any(nbd.pread(4096, 9 << 30))


def test_requests_in_flight_all_come_back(nbd):
    with nbd.batch():
        writes = [nbd.submit_write(bytes([n]) * 4096, n << 20) for n in range(64)]
    for write in writes:
        write.result(20)
    reads = [nbd.submit_read(4096, n << 20) for n in range(64)]
    assert [read.result(20)[0] for read in reads] == list(range(64))


def test_what_is_allocated_is_told_where_the_style_allows(nbd):
    if nbd.export.style == HeaderStyle.SIMPLE:
        assert list(nbd.extents()) == [Extent(SIZE, 0)]
        with pytest.raises(LocalProtocolError, match="no metadata context"):
            nbd.block_status(SIZE, 0)
    else:
        assert list(nbd.extents()) == [DATA, Extent(SIZE - (1 << 20), 3)]
        assert nbd.block_status(SIZE, 0, one=True)["base:allocation"] == [DATA]


def test_a_read_in_one_piece_is_offered_with_chunks_only(nbd):
    has_chunks = nbd.export.style != HeaderStyle.SIMPLE
    assert nbd.can(TransmissionFlag.SEND_DF) == has_chunks
    if has_chunks:
        assert len(nbd.pread(1 << 20, 0, whole=True)) == 1 << 20
