"""Requests and simple replies: the codec, and the rules."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nbdlink.errors import LocalProtocolError, RemoteProtocolError
from nbdlink.protocol.constants import (
    Command,
    CommandFlag,
    Error,
    HeaderStyle,
    TransmissionFlag,
    command_name,
    option_name,
    reply_name,
)
from nbdlink.protocol.transmission import (
    RequestHeader,
    RequestRules,
    known_error,
)

F = TransmissionFlag
EVERYTHING = (
    F.HAS_FLAGS
    | F.SEND_FLUSH
    | F.SEND_FUA
    | F.SEND_TRIM
    | F.SEND_WRITE_ZEROES
    | F.SEND_CACHE
    | F.SEND_FAST_ZERO
)
u16 = st.integers(0, 0xFFFF)
u32 = st.integers(0, 0xFFFF_FFFF)
u64 = st.integers(0, 0xFFFF_FFFF_FFFF_FFFF)


@given(command=u16, cookie=u64, offset=u64, length=u32, flags=u16)
def test_a_request_comes_back(command, cookie, offset, length, flags):
    header = RequestHeader(command, cookie, offset, length, flags)
    assert RequestHeader.parse(header.pack()) == header
    assert header.payload_length == (length if command == Command.WRITE else 0)


def test_a_request_that_does_not_fit_is_not_packed():
    with pytest.raises(LocalProtocolError, match="NBD_CMD_READ"):
        RequestHeader(Command.READ, 0, 0, 1 << 32).pack()


def test_a_request_with_another_magic_is_refused():
    with pytest.raises(RemoteProtocolError, match="0x00000000"):
        RequestHeader.parse(bytes(28))


@given(command=u16, cookie=u64, offset=u64, length=u64, flags=u16)
@example(command=Command.WRITE, cookie=1, offset=2, length=3, flags=0)
def test_an_extended_request_comes_back(command, cookie, offset, length, flags):
    header = RequestHeader(command, cookie, offset, length, flags)
    back = RequestHeader.parse(header.pack(HeaderStyle.EXTENDED), HeaderStyle.EXTENDED)
    payload = CommandFlag.PAYLOAD_LEN if command == Command.WRITE else 0
    assert back == RequestHeader(command, cookie, offset, length, flags | payload)


def test_an_extended_request_that_does_not_fit_is_not_packed():
    with pytest.raises(LocalProtocolError, match="NBD_CMD_TRIM"):
        RequestHeader(Command.TRIM, 0, 0, 1 << 64).pack(HeaderStyle.EXTENDED)


def test_an_extended_request_with_another_magic_is_refused():
    with pytest.raises(RemoteProtocolError, match="0x00000000"):
        RequestHeader.parse(bytes(32), HeaderStyle.EXTENDED)


def test_block_status_takes_selected_contexts():
    asking = RequestRules(1 << 20, EVERYTHING, 1, 1 << 16, has_contexts=True)
    assert asking.check(Command.BLOCK_STATUS, CommandFlag.REQ_ONE, 0, 1 << 20) == 0


def rules(size=1 << 20, flags=EVERYTHING, minimum=1, maximum=1 << 16):
    return RequestRules(size, flags, minimum, maximum)


@pytest.mark.parametrize(
    ("command", "flags", "offset", "length", "error"),
    [
        (Command.READ, 0, 0, 1, 0),
        (Command.READ, 0, (1 << 20) - 1, 1, 0),
        (Command.READ, 0, (1 << 20) - 1, 2, Error.EINVAL),
        (Command.READ, 0, 0xFFFF_FFFF_FFFF_FFFF, 0xFFFF_FFFF, Error.EINVAL),
        (Command.READ, 0, 0, (1 << 16) + 1, Error.EINVAL),
        (Command.READ, CommandFlag.DF, 0, 1, Error.EINVAL),
        (Command.READ, CommandFlag.FUA, 0, 1, 0),
        (Command.READ, 0x8000, 0, 1, Error.EINVAL),
        (Command.WRITE, 0, (1 << 20) - 1, 2, Error.ENOSPC),
        (Command.WRITE, CommandFlag.FUA, 0, 1, 0),
        (Command.WRITE, CommandFlag.NO_HOLE, 0, 1, Error.EINVAL),
        (Command.WRITE_ZEROES, CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO, 0, 1 << 20, 0),
        (Command.WRITE_ZEROES, 0, 1, 1 << 20, Error.ENOSPC),
        (Command.TRIM, 0, 1, 1 << 20, Error.EINVAL),
        (Command.TRIM, 0, 0, 1 << 20, 0),
        (Command.CACHE, 0, 0, 1 << 20, 0),
        (Command.FLUSH, 0, 0, 0, 0),
        (Command.FLUSH, 0, 1, 0, Error.EINVAL),
        (Command.FLUSH, 0, 0, 1, Error.EINVAL),
        (Command.BLOCK_STATUS, 0, 0, 1, Error.EINVAL),
        (Command.RESIZE, 0, 0, 1, Error.EINVAL),
        (99, 0, 0, 0, Error.EINVAL),
        (0xFFFF, 0xFFFF, 0, 0, Error.EINVAL),
    ],
)
def test_a_request_gets_the_error_it_deserves(command, flags, offset, length, error):
    assert rules().check(command, flags, offset, length) == error


@pytest.mark.parametrize("command", [Command.WRITE, Command.TRIM, Command.WRITE_ZEROES])
@pytest.mark.parametrize("flags", [F.READ_ONLY, F.READ_ONLY | EVERYTHING])
def test_writing_to_a_read_only_export_is_not_permitted(command, flags):
    assert rules(flags=flags).check(command, 0, 0, 512) == Error.EPERM


@pytest.mark.parametrize(
    "command", [Command.FLUSH, Command.TRIM, Command.WRITE_ZEROES, Command.CACHE]
)
def test_what_was_not_announced_is_invalid(command):
    assert rules(flags=F.HAS_FLAGS).check(command, 0, 0, 0) == Error.EINVAL


@pytest.mark.parametrize("flag", [CommandFlag.FUA, CommandFlag.FAST_ZERO])
def test_a_flag_that_was_not_announced_is_invalid(flag):
    limited = rules(flags=F.HAS_FLAGS | F.SEND_WRITE_ZEROES)
    assert limited.check(Command.WRITE_ZEROES, flag, 0, 0) == Error.EINVAL


@given(shift=st.integers(0, 16), offset=st.integers(0, 1 << 18), length=st.integers(0, 1 << 16))
def test_a_promised_alignment_is_kept(shift, offset, length):
    error = rules(minimum=1 << shift).check(Command.READ, 0, offset, length)
    aligned = offset % (1 << shift) == 0 and length % (1 << shift) == 0
    assert error == (0 if aligned else Error.EINVAL)


@given(command=u16, flags=u16, offset=u64, length=u32)
def test_every_request_gets_an_error_that_the_specification_has(command, flags, offset, length):
    assert rules().check(command, flags, offset, length) in {0, *Error}


@pytest.mark.parametrize(("value", "known"), [(0, 0), (5, 5), (28, 28), (1234, 22), (2, 22)])
def test_an_unknown_error_counts_as_einval(value, known):
    assert known_error(value) == known


@pytest.mark.parametrize(
    ("name", "number", "words"),
    [
        (option_name, 7, "NBD_OPT_GO"),
        (option_name, 77, "option 77"),
        (reply_name, 0x8000_0006, "NBD_REP_ERR_UNKNOWN"),
        (reply_name, 77, "reply type 0x4d"),
        (command_name, 6, "NBD_CMD_WRITE_ZEROES"),
        (command_name, 77, "command 77"),
    ],
)
def test_numbers_are_named_as_the_specification_names_them(name, number, words):
    assert name(number) == words
