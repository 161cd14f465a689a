"""The server's side of the handshake, in memory and over a socket."""

from __future__ import annotations

import socket
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdlink.errors import LocalProtocolError, RemoteProtocolError, TransportError
from nbdlink.protocol.constants import (
    ClientFlag,
    HandshakeFlag,
    Option,
    OptionReply,
    TransmissionFlag,
)
from nbdlink.protocol.handshake import Handshake, Role, State
from nbdlink.protocol.messages import (
    BlockSizeInfo,
    ClientFlags,
    DescriptionInfo,
    ExportInfo,
    ExportListing,
    ExportNameAnswer,
    ExportRequest,
    Greeting,
    NameInfo,
    OptionRequest,
    Reply,
    parse_info,
)
from nbdlink.server import Catalogue, Export
from nbdlink.server.handshake import negotiate
from nbdlink.server.negotiate import Negotiation
from nbdlink.server.sessions import Session
from nbdlink.transport.stream import Deadline

from .fakes import MemoryStorage

BOTH = ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES
STORAGE = MemoryStorage(1 << 16, minimum_block=512)
CATALOGUE = Catalogue(
    [
        Export("", STORAGE),
        Export("data", STORAGE, "some data"),
        Export("archiv-\u00e4", STORAGE, read_only=True),
    ]
)


class Pair:
    """The client's machine and the server's, wired to each other."""

    def __init__(self, catalogue=CATALOGUE, flags=BOTH):
        self.client = Handshake(Role.CLIENT)
        self.server = Negotiation(catalogue)
        self.client.receive_data(self.server.greeting())
        self.greeting = self.client.next_message()
        assert isinstance(self.greeting, Greeting)
        self.say(ClientFlags(flags))

    def say(self, message):
        """Send a message of the client; give the server's messages."""
        return self.raw(self.client.send(message))

    def raw(self, data):
        for answer in self.server.answers(data):
            self.client.receive_data(answer)
        messages = []
        while (message := self.client.next_message()) is not None:
            messages.append(message)
        return messages

    def option(self, option, data=b""):
        replies = self.say(OptionRequest(option, data))
        assert all(isinstance(reply, Reply) for reply in replies)
        return replies

    def refusal(self, option, data=b""):
        """Give type and words of the only reply, and check that the haggling goes on."""
        (reply,) = self.option(option, data)
        assert reply.is_error
        assert self.client.state is State.HAGGLING
        assert [r.reply for r in self.option(Option.LIST)] == [2, 2, 2, 1]
        return reply.reply, reply.data.decode()


@pytest.fixture
def pair():
    return Pair()


def test_the_greeting_offers_fixed_newstyle_without_zeroes(pair):
    both = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
    assert pair.greeting.flags == both


def test_the_list_has_every_export(pair):
    *servers, last = pair.option(Option.LIST)
    assert last.reply == OptionReply.ACK
    assert [ExportListing.parse(reply.data) for reply in servers] == [
        ExportListing("", ""),
        ExportListing("data", "some data"),
        ExportListing("archiv-\u00e4", ""),
    ]


def infos(replies):
    *replies, last = replies
    assert last.reply == OptionReply.ACK
    assert all(reply.reply == OptionReply.INFO for reply in replies)
    return [parse_info(reply.data) for reply in replies]


@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
def test_size_flags_and_block_sizes_are_always_told(pair, option):
    told = infos(pair.option(option, ExportRequest("data").pack()))
    export = CATALOGUE.find("data")
    assert told == [ExportInfo(1 << 16, export.flags()), BlockSizeInfo(512, 4096, 32 << 20)]


@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
def test_name_and_description_are_told_to_who_asks(pair, option):
    told = infos(pair.option(option, ExportRequest("data", (1, 2, 3, 0, 99)).pack()))
    assert NameInfo("data") in told
    assert DescriptionInfo("some data") in told
    assert len(told) == 4


def test_no_description_is_not_told(pair):
    told = infos(pair.option(Option.INFO, ExportRequest("", (2,)).pack()))
    assert not any(isinstance(info, DescriptionInfo) for info in told)


def test_info_does_not_choose(pair):
    pair.option(Option.INFO, ExportRequest("data").pack())
    assert pair.server.session() is None
    assert pair.client.state is State.HAGGLING


def test_go_begins_transmission(pair):
    pair.option(Option.GO, ExportRequest("data").pack())
    session = pair.server.session()
    assert pair.client.state is State.TRANSMISSION
    assert session.export.name == "data"
    assert session.rules == session.export.rules()
    assert session.trailing == b""


@pytest.mark.parametrize("flags", [ClientFlag(0), ClientFlag.FIXED_NEWSTYLE, BOTH])
def test_export_name_begins_transmission(flags):
    pair = Pair(flags=flags)
    (answer,) = pair.say(OptionRequest(Option.EXPORT_NAME, "archiv-\u00e4".encode()))
    assert isinstance(answer, ExportNameAnswer)
    assert answer.size == 1 << 16
    assert answer.flags & TransmissionFlag.READ_ONLY
    assert pair.server.session().export.name == "archiv-\u00e4"


def test_what_follows_the_handshake_is_kept(pair):
    go = pair.client.send(OptionRequest(Option.GO, ExportRequest("data").pack()))
    pair.raw(go + b"first requests")
    assert pair.server.session().trailing == b"first requests"


@pytest.mark.parametrize("data", [b"", b"ignored"])
def test_abort_is_acknowledged(pair, data):
    (reply,) = pair.option(Option.ABORT, data)
    assert reply.reply == OptionReply.ACK
    assert pair.server.ended


# Refusals, after which the haggling goes on.


@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
@pytest.mark.parametrize("name", ["nope", "DATA", "data ", "x" * 4096])
def test_a_name_that_is_not_there(pair, option, name):
    reply, words = pair.refusal(option, ExportRequest(name).pack())
    assert reply == OptionReply.ERR_UNKNOWN
    assert words.startswith("there is no export ")
    assert len(words) < 150


@pytest.mark.parametrize(
    "option",
    [
        Option.PEEK_EXPORT,
        Option.STARTTLS,
        0,
        12,
        0xFFFF_FFFF,
    ],
)
def test_an_option_that_is_not_served(pair, option):
    reply, words = pair.refusal(option)
    assert reply == OptionReply.ERR_UNSUP
    assert words.endswith("is not supported")


@pytest.mark.parametrize(
    ("option", "data", "words"),
    [
        (Option.LIST, b"x", "takes no data"),
        (Option.STARTTLS, b"x", "takes no data"),
        (Option.GO, b"", "too few"),
        (Option.GO, bytes(5), "too few"),
        (Option.GO, struct.pack(">IH", 1, 0), "longer than the option"),
        (Option.GO, struct.pack(">IH", 0xFFFF_FFFF, 0), "longer than the option"),
        (Option.GO, struct.pack(">IH", 0, 1), "1 information requests"),
        (Option.INFO, struct.pack(">IHH", 0, 0, 3), "0 information requests"),
        (Option.INFO, struct.pack(">I2sH", 2, b"\xff\xfe", 0), "not valid UTF-8"),
        (Option.INFO, struct.pack(">I2sH", 2, b"a\0", 0), "NUL"),
        (Option.INFO, struct.pack(">I4096sHB", 4096, b"x" * 4096, 0, 0), "announces 0"),
        (Option.INFO, struct.pack(">I", 4097) + b"x" * 4097 + bytes(2), "4097 bytes long"),
    ],
)
def test_malformed_data(pair, option, data, words):
    reply, said = pair.refusal(option, data)
    assert reply == OptionReply.ERR_INVALID
    assert words in said


@pytest.mark.parametrize("option", [Option.LIST, Option.GO, Option.STARTTLS, 77])
def test_too_much_data(pair, option):
    pair.client.send(OptionRequest(option))  # the client's machine cannot send as much
    length = 64 * 1024 + 1
    (reply,) = pair.raw(b"IHAVEOPT" + struct.pack(">II", option, length) + bytes(length))
    assert reply.reply == OptionReply.ERR_TOO_BIG
    assert len(pair.option(Option.LIST)) == 4


def test_a_client_may_try_again_after_refusals(pair):
    for number in range(100):
        assert pair.refusal(Option.GO, ExportRequest(f"no {number}").pack())
    assert pair.option(Option.GO, ExportRequest("data").pack())[-1].reply == OptionReply.ACK


def test_too_many_exports_to_list():
    pair = Pair(Catalogue(Export(str(i), STORAGE) for i in range(16 * 1024)))
    (reply,) = pair.option(Option.LIST)
    assert reply.reply == OptionReply.ERR_TOO_BIG
    assert pair.option(Option.GO, ExportRequest("77").pack())[-1].reply == OptionReply.ACK


def test_as_many_exports_as_can_be_listed():
    pair = Pair(Catalogue(Export(str(i), STORAGE) for i in range(16 * 1024 - 1)))
    assert len(pair.option(Option.LIST)) == 16 * 1024


# Clients that break the protocol are hung up on.


@pytest.mark.parametrize(
    "data",
    [
        b"nope",
        b"\xff" * 100,
        b"data\0",
        b"x" * 4097,
        b"x" * (64 * 1024 + 1),
    ],
    ids=["unknown", "not UTF-8", "NUL", "long", "oversized"],
)
def test_export_name_has_no_error_reply(pair, data):
    with pytest.raises(RemoteProtocolError):
        pair.raw(b"IHAVEOPT" + struct.pack(">II", Option.EXPORT_NAME, len(data)) + data)
    assert pair.server.session() is None


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"IHAVEOPX" + bytes(8), "instead of IHAVEOPT"),
        (b"IHAVEOPT" + struct.pack(">II", 3, 0xFFFF_FFFF), "announces 4294967295 bytes"),
        ((b"IHAVEOPT" + struct.pack(">II", 77, 0)) * 1025, "more than 1024 options"),
    ],
)
def test_what_cannot_be_answered(pair, data, words):
    with pytest.raises(RemoteProtocolError, match=words):
        list(pair.server.answers(data))


@pytest.mark.parametrize("flags", [4, 0x8000_0000, 0xFFFF_FFFF])
def test_flags_that_were_not_offered(flags):
    server = Negotiation(CATALOGUE)
    server.greeting()
    with pytest.raises(RemoteProtocolError, match="not offered"):
        list(server.answers(struct.pack(">I", flags)))


def test_other_options_need_fixed_newstyle():
    server = Negotiation(CATALOGUE)
    server.greeting()
    with pytest.raises(RemoteProtocolError, match="fixed newstyle"):
        list(server.answers(struct.pack(">I", 0) + b"IHAVEOPT" + struct.pack(">II", 3, 0)))


# However the bytes come.

SCRIPT = (
    struct.pack(">I", 3)
    + b"".join(
        b"IHAVEOPT" + struct.pack(">II", option, len(data)) + data
        for option, data in [
            (Option.LIST, b""),
            (Option.STRUCTURED_REPLY, b""),
            (Option.INFO, ExportRequest("data", (1, 2)).pack()),
            (Option.GO, b"garbage"),
            (Option.GO, ExportRequest("data").pack()),
        ]
    )
    + b"trailing"
)


def run(pieces):
    server = Negotiation(CATALOGUE)
    said = server.greeting()
    for piece in pieces:
        said += b"".join(server.answers(piece))
    return said, server.session()


def test_the_bytes_may_come_one_by_one():
    assert run(SCRIPT[i : i + 1] for i in range(len(SCRIPT))) == run([SCRIPT])


def test_the_bytes_may_be_split_anywhere():
    whole = run([SCRIPT])
    for i in range(1, len(SCRIPT)):
        assert run([SCRIPT[:i], SCRIPT[i:]]) == whole


options = st.builds(
    lambda option, data: b"IHAVEOPT" + struct.pack(">II", option, len(data)) + data,
    st.one_of(st.integers(0, 12), st.integers(0, 0xFFFF_FFFF)),
    st.one_of(
        st.binary(max_size=40),
        st.builds(
            lambda name, asked: ExportRequest(name, tuple(asked)).pack(),
            st.sampled_from(["", "data", "nope"]),
            st.lists(st.integers(0, 5), unique=True),
        ),
        st.builds(
            lambda length, rest: struct.pack(">I", length) + rest,
            st.integers(0, 0xFFFF_FFFF),
            st.binary(max_size=20),
        ),
    ),
)
garbage = st.one_of(options, st.binary(max_size=60))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 3), st.lists(garbage, max_size=8), st.integers(1, 100))
def test_garbage_breaks_nothing_but_the_protocol(flags, parts, size):
    data = struct.pack(">I", flags) + b"".join(parts)
    server = Negotiation(CATALOGUE)
    server.greeting()
    said = ""
    try:
        for i in range(0, len(data), size):
            for answer in server.answers(data[i : i + size]):
                assert answer
            if server.session() or server.ended:
                break
    except RemoteProtocolError as error:
        said = str(error)
    assert said.isprintable()  # one line, fit for a log


def test_answers_are_made_as_they_are_taken(pair):
    # A client that asks for a thousand lists and reads none must not fill the memory.
    request = b"IHAVEOPT" + struct.pack(">II", Option.LIST, 0)
    answers = pair.server.answers(request * 1000)
    first = next(answers)
    assert first.count(b"some data") == 1


def test_nothing_is_said_out_of_turn():
    server = Negotiation(CATALOGUE)
    server.greeting()
    with pytest.raises(LocalProtocolError):
        server.greeting()


# Over a socket.


@pytest.fixture
def ends():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(20)
        yield ours, theirs


def test_a_negotiated_socket_is_left_blocking(ends):
    client, server = ends
    client.sendall(SCRIPT)
    session = negotiate(Session(1, server), Negotiation(CATALOGUE), Deadline(10))
    assert session.trailing == b"trailing"
    assert server.gettimeout() is None


@pytest.mark.parametrize(
    "said", [b"", SCRIPT[:3], SCRIPT[:4], SCRIPT[:30]], ids=["0", "3", "4", "30"]
)
def test_a_client_that_leaves_is_no_error(ends, said):
    client, server = ends
    client.sendall(said)
    client.shutdown(socket.SHUT_WR)
    assert negotiate(Session(1, server), Negotiation(CATALOGUE), Deadline(10)) is None


def test_a_client_that_aborts_is_no_error(ends):
    client, server = ends
    client.sendall(struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", Option.ABORT, 0))
    assert negotiate(Session(1, server), Negotiation(CATALOGUE), Deadline(10)) is None
    assert client.recv(1000)[18:] == Reply(Option.ABORT, OptionReply.ACK).pack()


@pytest.mark.parametrize("said", [b"", SCRIPT[:4], SCRIPT[:30]], ids=["0", "4", "30"])
def test_a_client_that_dawdles_runs_out_of_time(ends, said):
    client, server = ends
    client.sendall(said)
    with pytest.raises(TransportError, match="within"):
        negotiate(Session(1, server), Negotiation(CATALOGUE), Deadline(0.05))
