"""Copying from and to servers that can do little, refuse, or die."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os

import pytest

from nbdlink.copy import ends
from nbdlink.copy.engine import Tuning
from nbdlink.copy.image import CopySpec, copy
from nbdlink.errors import ConfigError, NBDError, RequestError
from nbdlink.protocol.constants import Command, Option, OptionReply, TransmissionFlag
from nbdlink.protocol.messages import BlockSizeInfo, ExportInfo
from nbdlink.protocol.transmission import REQUEST, RequestHeader, pack_simple_reply

from ..client.conftest import Liar
from ..client.test_connection import read_exactly
from ..client.test_negotiate import converse

F = TransmissionFlag
SIZE = 1 << 20


class Disk:
    """A server with an image in memory, which does as it is told.

    `fail(header)` gives an error for a request, None to die at once, or 0 to carry it out.
    """

    def __init__(self, path, *, flags=F.HAS_FLAGS, minimum=1, fail=lambda header: 0):
        self.content = bytearray(os.urandom(SIZE))
        self.seen = []
        self._infos = [
            (OptionReply.INFO, ExportInfo(SIZE, flags).pack()),
            (OptionReply.INFO, BlockSizeInfo(minimum, max(minimum, 4096), 1 << 16).pack()),
            OptionReply.ACK,
        ]
        self._fail = fail
        self._liar = Liar(path, self._serve)
        self.uri = str(self._liar.target)

    def _serve(self, connection):
        converse(connection, {Option.GO: self._infos})
        with contextlib.suppress(EOFError):
            while True:
                header = RequestHeader.parse(read_exactly(connection, REQUEST.size))
                payload = read_exactly(connection, header.payload_length)
                if header.command == Command.DISC:
                    return
                self.seen.append((Command(header.command), header.offset, header.length))
                error = self._fail(header)
                if error is None:
                    return
                data = b""
                span = slice(header.offset, header.offset + header.length)
                if not error and header.command == Command.READ:
                    data = bytes(self.content[span])
                elif not error and header.command == Command.WRITE:
                    self.content[span] = payload
                elif not error and header.command == Command.WRITE_ZEROES:
                    self.content[span] = bytes(header.length)
                connection.sendall(pack_simple_reply(error, header.cookie) + data)

    def close(self):
        self._liar.close()


@pytest.fixture
def disk(tmp_path):
    numbers = itertools.count()
    with contextlib.ExitStack() as stack:

        def start(**options):
            made = Disk(tmp_path / f"disk{next(numbers)}", **options)
            stack.callback(made.close)
            return made

        yield start


@pytest.fixture
def source(tmp_path):
    """A file of data, then a hole, then data that fills no block."""
    path = tmp_path / "source.img"
    with path.open("wb") as file:
        file.write(os.urandom(400_000))
        file.seek(800_000)
        file.write(os.urandom(100_123))
    return path


def test_zeroes_are_sent_to_a_server_that_cannot_make_them(disk, source):
    server = disk()
    rest = server.content[900_123:]
    copy(CopySpec(str(source), server.uri, verify=True))
    assert server.content == source.read_bytes() + rest
    assert {command for command, *_ in server.seen} == {Command.READ, Command.WRITE}


def test_zeroes_are_not_sent_to_a_server_that_makes_them(disk, source):
    server = disk(flags=F.HAS_FLAGS | F.SEND_WRITE_ZEROES)
    copy(CopySpec(str(source), server.uri))
    assert server.content.startswith(source.read_bytes())
    zeroed = sum(length for command, _, length in server.seen if command == 6)
    assert zeroed >= 390_000


@pytest.mark.parametrize("minimum", [512, 4096, 65536])
def test_the_servers_blocks_are_kept_to_and_what_is_behind_the_end_stays(disk, source, minimum):
    server = disk(flags=F.HAS_FLAGS | F.SEND_WRITE_ZEROES, minimum=minimum)
    rest = server.content[900_123:]
    copy(CopySpec(str(source), server.uri, verify=True))
    assert server.content == source.read_bytes() + rest
    assert all(offset % minimum == length % minimum == 0 for _, offset, length in server.seen)


def test_of_zeroes_at_the_end_only_what_fills_no_block_is_sent(disk, tmp_path):
    source = tmp_path / "source.img"
    source.touch()
    os.truncate(source, 500_000)
    server = disk(flags=F.HAS_FLAGS | F.SEND_WRITE_ZEROES, minimum=4096)
    rest = server.content[500_000:]
    copy(CopySpec(str(source), server.uri))
    assert server.content == bytes(500_000) + rest
    written = [(offset, length) for command, offset, length in server.seen if command == 1]
    assert written == [(500_000 // 4096 * 4096, 4096)]


def test_all_is_flushed_in_the_end_after_every_write(disk, source):
    server = disk(flags=F.HAS_FLAGS | F.SEND_FLUSH)
    copy(CopySpec(str(source), server.uri))
    commands = [command for command, *_ in server.seen]
    assert commands.index(Command.FLUSH) == len(commands) - 1


@pytest.mark.parametrize("verify", [False, True])
def test_a_server_that_lets_fewer_connections_in_than_suit_us_is_enough(
    disk, source, verify, monkeypatch
):
    monkeypatch.setattr(ends, "DEFAULT_CONNECTIONS", 3)
    monkeypatch.setattr(ends, "FURTHER_TIMEOUT", 0.1)
    server = disk(flags=F.HAS_FLAGS | F.CAN_MULTI_CONN)  # which serves one after the other
    summary = copy(CopySpec(str(source), server.uri, verify=verify))
    assert server.content.startswith(source.read_bytes())
    assert summary.connections == 1


def test_connections_that_were_asked_for_have_to_be_there(disk, source, monkeypatch):
    monkeypatch.setattr(ends, "DEFAULT_TIMEOUT", 0.1)
    server = disk(flags=F.HAS_FLAGS | F.CAN_MULTI_CONN)
    with pytest.raises(NBDError, match=r"no answer within 0\.1 seconds"):
        copy(CopySpec(str(source), server.uri, connections=2))


def test_it_is_told_that_a_server_cannot_flush(disk, source):
    assert copy(CopySpec(str(source), disk().uri)).unflushed


@pytest.mark.parametrize(
    ("flags", "flush"), [(F.HAS_FLAGS | F.SEND_FLUSH, True), (F.HAS_FLAGS, False)]
)
def test_nothing_is_unflushed_that_was_flushed_or_need_not_be(disk, source, flags, flush):
    assert not copy(CopySpec(str(source), disk(flags=flags).uri, flush=flush)).unflushed


def test_nothing_is_flushed_if_nobody_wants_it(disk, source):
    server = disk(flags=F.HAS_FLAGS | F.SEND_FLUSH)
    copy(CopySpec(str(source), server.uri, flush=False))
    assert Command.FLUSH not in [command for command, *_ in server.seen]


@pytest.mark.parametrize("command", [Command.WRITE, Command.WRITE_ZEROES, Command.FLUSH])
def test_any_refused_request_fails_the_copy(disk, source, command):
    def fail(header):
        return errno.ENOSPC if header.command == command else 0

    flags = F.HAS_FLAGS | F.SEND_FLUSH | F.SEND_WRITE_ZEROES
    server = disk(flags=flags, fail=fail)
    with pytest.raises(RequestError, match="no space left") as caught:
        copy(CopySpec(str(source), server.uri))
    assert "is incomplete" in caught.value.hint


def test_a_read_error_names_the_offset(disk, tmp_path):
    server = disk(fail=lambda header: errno.EIO if header.offset == 1 << 19 else 0)
    tuning = Tuning(request_size=1 << 16)
    with pytest.raises(RequestError, match=f"65536 bytes at {1 << 19}: input/output error"):
        copy(CopySpec(server.uri, str(tmp_path / "new"), tuning=tuning))


@pytest.mark.parametrize("dies_at", [0, 1 << 16, 9 << 16])
def test_a_server_that_dies_is_an_error_and_no_hang(disk, tmp_path, dies_at):
    server = disk(fail=lambda header: None if header.offset == dies_at else 0)
    with pytest.raises(NBDError, match=r"closed the connection|reset|broken pipe"):
        copy(CopySpec(server.uri, str(tmp_path / "new"), tuning=Tuning(request_size=1 << 16)))


@pytest.mark.parametrize("which", [0, 1])
def test_between_two_servers_either_may_die(disk, which):
    dying, living = disk(fail=lambda header: None if header.offset else 0), disk()
    ends = [dying.uri, living.uri] if which == 0 else [living.uri, dying.uri]
    with pytest.raises(NBDError, match=r"closed the connection|reset|broken pipe"):
        copy(CopySpec(*ends, tuning=Tuning(request_size=1 << 16)))


def test_two_servers_are_copied_on_one_thread(disk):
    one, other = disk(), disk()
    copy(CopySpec(one.uri, other.uri, tuning=Tuning(request_size=4096), verify=True))
    assert one.content == other.content


def test_a_server_that_promises_nothing_is_given_one_connection(disk, source):
    assert copy(CopySpec(str(source), disk().uri)).connections == 1
    with pytest.raises(ConfigError, match="several connections"):
        copy(CopySpec(str(source), disk().uri, connections=2))
