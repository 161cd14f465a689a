"""The handshake machine: both roles against each other, and each against a liar."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdlink.errors import LocalProtocolError, OldstyleServerError, RemoteProtocolError
from nbdlink.protocol.constants import (
    MAX_OPTION_DATA,
    MAX_OPTION_REPLIES,
    MAX_OPTION_REPLY_BYTES,
    MAX_OPTIONS,
    ClientFlag,
    HandshakeFlag,
    HeaderStyle,
    Option,
    OptionReply,
    TransmissionFlag,
)
from nbdlink.protocol.handshake import Handshake, Role, State
from nbdlink.protocol.messages import (
    ClientFlags,
    ExportInfo,
    ExportListing,
    ExportNameAnswer,
    ExportRequest,
    Greeting,
    OptionRequest,
    Reply,
)

ALL = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
ALL_CLIENT = ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES
INFO = Reply(Option.GO, OptionReply.INFO, ExportInfo(1 << 20, TransmissionFlag.HAS_FLAGS).pack())
GO = OptionRequest(Option.GO, ExportRequest("data").pack())


class Pair:
    """A client and a server machine, joined by a wire that splits as it is told."""

    def __init__(self, cuts=()):
        self.client = Handshake(Role.CLIENT)
        self.server = Handshake(Role.SERVER)
        self.cuts = list(cuts)

    def say(self, speaker, message):
        """Send `message` and give what arrives at the other side."""
        listener = self.server if speaker is self.client else self.client
        data = speaker.send(message)
        heard = []
        while data:
            cut = self.cuts.pop() if self.cuts else len(data)
            listener.receive_data(data[:cut])
            data = data[cut:]
            while (arrived := listener.next_message()) is not None:
                heard.append(arrived)
        assert self.client.state is self.server.state
        return heard

    def open(self, flags=ALL, client_flags=ALL_CLIENT):
        self.say(self.server, Greeting(flags))
        self.say(self.client, ClientFlags(client_flags))
        return self


@st.composite
def conversations(draw):
    """Options with their replies, ending in GO, EXPORT_NAME or ABORT."""
    turns = []
    names = st.text(st.characters(categories=["L"]), max_size=40)
    for _ in range(draw(st.integers(0, 5))):
        option = draw(st.sampled_from([Option.LIST, Option.INFO, 77]))
        replies = []
        if option == Option.LIST:
            replies = [
                Reply(option, OptionReply.SERVER, ExportListing(name).pack())
                for name in draw(st.lists(names, max_size=4))
            ]
        elif option == Option.INFO:
            replies = [Reply(option, OptionReply.INFO, INFO.data)]
        final = draw(st.sampled_from([OptionReply.ACK, OptionReply.ERR_UNSUP, 0x8000_1234]))
        turns.append(
            (OptionRequest(option, draw(st.binary(max_size=50))), [*replies, Reply(option, final)])
        )
    match draw(st.sampled_from(["go", "name", "abort"])):
        case "go":
            turns.append(
                (GO, [INFO, Reply(Option.GO, 9, b"unknown"), Reply(Option.GO, OptionReply.ACK)])
            )
        case "name":
            turns.append(
                (
                    OptionRequest(Option.EXPORT_NAME, b"x"),
                    [ExportNameAnswer(9, TransmissionFlag(1))],
                )
            )
        case "abort":
            turns.append((OptionRequest(Option.ABORT), [Reply(Option.ABORT, OptionReply.ACK)]))
    return turns


@given(turns=conversations(), cuts=st.lists(st.integers(1, 40)), zeroes=st.booleans())
def test_both_roles_agree_on_every_message_however_it_is_split(turns, cuts, zeroes):
    pair = Pair(cuts).open(client_flags=ClientFlag.FIXED_NEWSTYLE if zeroes else ALL_CLIENT)
    for request, replies in turns:
        assert pair.say(pair.client, request) == [request]
        for reply in replies:
            assert pair.say(pair.server, reply) == [reply]
    assert pair.client.state in (State.TRANSMISSION, State.CLOSED)


def transcript(role):
    """Everything the other side of `role` sends in a full conversation."""
    fresh = Pair()
    steps = [
        (fresh.server, Greeting(ALL)),
        (fresh.client, ClientFlags(ALL_CLIENT)),
        (fresh.client, OptionRequest(Option.LIST)),
        (fresh.server, Reply(Option.LIST, OptionReply.SERVER, ExportListing("data").pack())),
        (fresh.server, Reply(Option.LIST, OptionReply.ACK)),
        (fresh.client, GO),
        (fresh.server, INFO),
        (fresh.server, Reply(Option.GO, OptionReply.ACK)),
    ]
    for speaker, message in steps:
        fresh.say(speaker, message)
    other = fresh.server if role is Role.CLIENT else fresh.client
    return [message for speaker, message in steps if speaker is other]


@pytest.mark.parametrize("role", list(Role))
def test_a_peer_that_hangs_up_at_any_byte_is_reported(role):
    messages = transcript(role)
    total = len(b"".join(m.pack() for m in messages))
    for cut in range(total):
        machine = Handshake(role)
        own = {
            Role.CLIENT: [ClientFlags(ALL_CLIENT), OptionRequest(Option.LIST), GO],
            Role.SERVER: [
                Greeting(ALL),
                Reply(Option.LIST, OptionReply.ACK),
                INFO,
                Reply(Option.GO, OptionReply.ACK),
            ],
        }[role]
        wire = b"".join(m.pack() for m in messages)[:cut]
        machine_says(machine, own)
        for at in range(len(wire)):
            machine.receive_data(wire[at : at + 1])
            while machine.next_message() is not None:
                machine_says(machine, own)
        with pytest.raises(RemoteProtocolError, match="hung up"):
            machine.receive_data(b"")


def machine_says(machine, messages):
    """Let a machine say what is its turn to say."""
    while messages:
        try:
            machine.send(messages[0])
        except LocalProtocolError:
            return
        messages.pop(0)


@given(data=st.binary(max_size=300), role=st.sampled_from(Role), opened=st.booleans())
def test_random_bytes_never_raise_anything_but_a_protocol_error(data, role, opened):
    pair = Pair()
    machine = pair.client if role is Role.CLIENT else pair.server
    if opened:
        pair.open()
        if role is Role.CLIENT:
            machine.send(GO)
    elif role is Role.SERVER:
        machine.send(Greeting(ALL))
    try:
        for at in range(0, len(data), 7):
            machine.receive_data(data[at : at + 7])
            while machine.next_message() is not None:
                pass
    except RemoteProtocolError:
        assert machine.state is State.CLOSED


def test_an_oldstyle_server_is_told_apart():
    client = Handshake(Role.CLIENT)
    client.receive_data(struct.pack(">QQQI", 0x4E42444D41474943, 0x0000420281861253, 1 << 20, 0))
    with pytest.raises(OldstyleServerError):
        client.next_message()


@pytest.mark.parametrize("cut", range(1, 16))
def test_an_oldstyle_server_is_not_misjudged_before_its_magic_is_whole(cut):
    client = Handshake(Role.CLIENT)
    client.receive_data(struct.pack(">QQ", 0x4E42444D41474943, 0x0000420281861253)[:cut])
    assert client.next_message() is None


def test_something_that_is_no_nbd_server_is_told_at_its_first_bytes():
    client = Handshake(Role.CLIENT)
    client.receive_data(b"SSH-")
    with pytest.raises(RemoteProtocolError, match="not an NBD server"):
        client.next_message()


def test_a_server_that_talks_on_before_the_clients_flags_is_refused():
    client = Handshake(Role.CLIENT)
    client.receive_data(Greeting(ALL).pack() + b"more")
    assert client.next_message() == Greeting(ALL)
    with pytest.raises(RemoteProtocolError, match="out of turn"):
        client.next_message()


def test_a_client_cannot_set_flags_that_were_not_offered():
    pair = Pair()
    pair.say(pair.server, Greeting(HandshakeFlag.FIXED_NEWSTYLE))
    with pytest.raises(LocalProtocolError, match="not offered"):
        pair.client.send(ClientFlags(ALL_CLIENT))


def test_a_server_hangs_up_on_unknown_client_flags():
    server = Handshake(Role.SERVER)
    server.send(Greeting(ALL))
    server.receive_data(struct.pack(">I", 0x80))
    with pytest.raises(RemoteProtocolError, match="0x80"):
        server.next_message()


def test_a_client_ignores_unknown_handshake_flags():
    client = Handshake(Role.CLIENT)
    client.receive_data(Greeting(HandshakeFlag(0x8003)).pack())
    assert client.next_message() == Greeting(HandshakeFlag(0x8003))


def test_without_fixed_newstyle_only_export_name_may_be_sent():
    pair = Pair().open(HandshakeFlag(0), ClientFlag(0))
    with pytest.raises(LocalProtocolError, match="fixed newstyle"):
        pair.client.send(GO)
    pair.say(pair.client, OptionRequest(Option.EXPORT_NAME, b"x"))
    pair.say(pair.server, ExportNameAnswer(512, TransmissionFlag(1)))
    assert pair.client.state is State.TRANSMISSION


def test_nothing_may_be_sent_out_of_turn_and_nothing_changes():
    pair = Pair()
    with pytest.raises(LocalProtocolError, match="greeting"):
        pair.client.send(GO)
    assert pair.client.state is State.GREETING


def replied(wire):
    """A client that asked GO and then received `wire`."""
    pair = Pair().open()
    pair.client.send(GO)
    pair.client.receive_data(wire)
    return pair.client


@pytest.mark.parametrize(
    ("wire", "says"),
    [
        (struct.pack(">QIII", 0x1234, 7, 1, 0), "magic"),
        (struct.pack(">QIII", 0x3E889045565A9, 7, 3, 0xFFFF_FFFF), "4294967295 bytes"),
        (struct.pack(">QIII", 0x3E889045565A9, 7, 3, MAX_OPTION_DATA + 1), "announces"),
        (Reply(Option.LIST, OptionReply.ACK).pack(), "instead of NBD_OPT_GO"),
        (Reply(Option.GO, OptionReply.SERVER).pack(), "in reply to NBD_OPT_GO"),
        (Reply(Option.GO, OptionReply.ACK).pack(), "without telling the export's size"),
    ],
)
def test_a_lying_reply_is_refused(wire, says):
    with pytest.raises(RemoteProtocolError) as caught:
        replied(wire).next_message()
    assert says in str(caught.value)


def test_unknown_replies_are_passed_on_and_unknown_errors_end_the_option():
    client = replied(Reply(Option.GO, 99, b"x").pack() + Reply(Option.GO, 0x8000_0777).pack())
    assert client.next_message() == Reply(Option.GO, 99, b"x")
    assert client.next_message().is_error
    assert client.state is State.HAGGLING


def test_endless_replies_come_to_an_end():
    noise = Reply(Option.GO, 99)
    client = replied(noise.pack() * (MAX_OPTION_REPLIES + 1))
    for _ in range(MAX_OPTION_REPLIES):
        assert client.next_message() == noise
    with pytest.raises(RemoteProtocolError, match="more than"):
        client.next_message()


def test_replies_that_would_fill_the_memory_come_to_an_end():
    noise = Reply(Option.GO, 99, bytes(MAX_OPTION_DATA))
    client = replied(noise.pack())
    for _ in range(MAX_OPTION_REPLY_BYTES // MAX_OPTION_DATA):
        assert client.next_message() == noise
        client.receive_data(noise.pack())
    with pytest.raises(RemoteProtocolError, match="bytes of replies"):
        client.next_message()


def test_endless_options_come_to_an_end():
    pair = Pair().open()
    for _ in range(MAX_OPTIONS):
        pair.say(pair.client, OptionRequest(77))
        pair.say(pair.server, Reply(77, OptionReply.ERR_UNSUP))
    with pytest.raises(LocalProtocolError, match="more than"):
        pair.client.send(OptionRequest(77))
    pair.server.receive_data(OptionRequest(77).pack())
    with pytest.raises(RemoteProtocolError, match="more than"):
        pair.server.next_message()


def option_header(length, magic=0x49484156454F5054):
    return struct.pack(">QII", magic, 77, length)


@pytest.mark.parametrize("step", [1000, 1 << 20])
def test_an_oversized_option_is_skipped_and_named(step):
    server = Pair().open().server
    length = MAX_OPTION_DATA + 1
    wire = option_header(length) + bytes(length) + OptionRequest(78).pack()
    heard = []
    for at in range(0, len(wire), step):
        server.receive_data(wire[at : at + step])
        while (message := server.next_message()) is not None:
            heard.append(message)
            server.send(Reply(message.option, OptionReply.ERR_TOO_BIG))
    assert heard == [OptionRequest(77, b"", length), OptionRequest(78)]


@pytest.mark.parametrize(
    ("wire", "says"),
    [(option_header(0xFFFF_FFFF), "4294967295"), (option_header(0, 0x55), "IHAVEOPT")],
)
def test_a_lying_option_is_refused(wire, says):
    server = Pair().open().server
    server.receive_data(wire)
    with pytest.raises(RemoteProtocolError) as caught:
        server.next_message()
    assert says in str(caught.value)


def starting_tls():
    pair = Pair().open()
    pair.say(pair.client, OptionRequest(Option.STARTTLS))
    pair.say(pair.server, Reply(Option.STARTTLS, OptionReply.ACK))
    return pair


def test_haggling_begins_anew_once_tls_is_there():
    pair = starting_tls()
    assert pair.client.state is State.STARTING_TLS
    pair.client.tls_started()
    pair.server.tls_started()
    assert pair.say(pair.client, GO) == [GO]


def test_bytes_injected_behind_starttls_are_an_attack():
    client = starting_tls().client
    client.receive_data(b"injected")
    with pytest.raises(RemoteProtocolError, match="plain bytes"):
        client.tls_started()


def test_tls_cannot_start_unasked():
    with pytest.raises(LocalProtocolError, match="not been agreed"):
        Handshake(Role.CLIENT).tls_started()


def test_a_refused_go_leaves_the_client_haggling():
    pair = Pair().open()
    pair.say(pair.client, GO)
    pair.say(pair.server, Reply(Option.GO, OptionReply.ERR_UNKNOWN, b"no such export"))
    assert pair.client.state is State.HAGGLING


def test_bytes_behind_the_handshake_are_kept():
    pair = Pair().open()
    pair.client.send(OptionRequest(Option.EXPORT_NAME, b"x"))
    pair.client.receive_data(ExportNameAnswer(5, TransmissionFlag(1)).pack(zeroes=False) + b"tail")
    assert pair.client.next_message() == ExportNameAnswer(5, TransmissionFlag(1))
    assert pair.client.trailing_data == b"tail"
    assert pair.client.next_message() is None
    pair.client.receive_data(b"")


def test_hanging_up_on_export_name_means_no_such_export():
    pair = Pair().open()
    pair.client.send(OptionRequest(Option.EXPORT_NAME, b"x"))
    with pytest.raises(RemoteProtocolError, match="does not offer"):
        pair.client.receive_data(b"")


def test_a_closed_machine_takes_no_offence_at_the_end():
    machine = Handshake(Role.CLIENT)
    machine.close()
    machine.receive_data(b"")
    assert machine.state is State.CLOSED


def test_an_answer_to_export_name_may_arrive_in_pieces():
    pair = Pair([1] * 200).open()
    pair.say(pair.client, OptionRequest(Option.EXPORT_NAME, b"x"))
    answer = ExportNameAnswer(5, TransmissionFlag(1))
    assert pair.say(pair.server, answer) == [answer]


@pytest.mark.parametrize(
    ("options", "style"),
    [
        ([], HeaderStyle.SIMPLE),
        ([Option.STRUCTURED_REPLY], HeaderStyle.STRUCTURED),
        ([Option.EXTENDED_HEADERS], HeaderStyle.EXTENDED),
        ([Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS], HeaderStyle.EXTENDED),
        ([Option.EXTENDED_HEADERS, Option.STRUCTURED_REPLY], HeaderStyle.EXTENDED),
    ],
)
def test_the_richest_headers_that_were_acknowledged_win(options, style):
    pair = Pair().open()
    for option in options:
        pair.say(pair.client, OptionRequest(option))
        pair.say(pair.server, Reply(option, OptionReply.ACK))
    assert pair.client.style == pair.server.style == style


def test_refused_headers_are_not_used():
    pair = Pair().open()
    pair.say(pair.client, OptionRequest(Option.EXTENDED_HEADERS))
    pair.say(pair.server, Reply(Option.EXTENDED_HEADERS, OptionReply.ERR_UNSUP))
    assert pair.client.style == pair.server.style == HeaderStyle.SIMPLE


def test_tls_begins_with_simple_headers_again():
    pair = Pair().open()
    for option in (Option.EXTENDED_HEADERS, Option.STARTTLS):
        pair.say(pair.client, OptionRequest(option))
        pair.say(pair.server, Reply(option, OptionReply.ACK))
    assert pair.client.style == HeaderStyle.SIMPLE


def test_export_name_does_not_go_with_extended_headers():
    pair = Pair().open()
    pair.say(pair.client, OptionRequest(Option.EXTENDED_HEADERS))
    pair.say(pair.server, Reply(Option.EXTENDED_HEADERS, OptionReply.ACK))
    naming = OptionRequest(Option.EXPORT_NAME, b"x")
    with pytest.raises(LocalProtocolError, match="after extended headers"):
        pair.client.send(naming)
    pair.server.receive_data(naming.pack())
    with pytest.raises(RemoteProtocolError, match="after extended headers"):
        pair.server.next_message()


def test_contexts_are_not_selected_before_structured_replies():
    pair = Pair().open()
    setting = OptionRequest(Option.SET_META_CONTEXT)
    with pytest.raises(LocalProtocolError, match="before structured replies"):
        pair.client.send(setting)
    # The server hears it and answers with an error, and the negotiation goes on.
    pair.server.receive_data(setting.pack())
    assert pair.server.next_message() == setting
