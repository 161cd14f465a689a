"""The client's negotiation, against servers that behave and servers that do not."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from nbdlink.client.negotiate import Negotiation
from nbdlink.client.opening import negotiate, negotiate_best
from nbdlink.errors import (
    NBDError,
    OldstyleServerError,
    OptionError,
    RemoteProtocolError,
    TLSError,
    TransportError,
    is_retryable,
)
from nbdlink.protocol.constants import (
    HandshakeFlag,
    HeaderStyle,
    InfoType,
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
    Greeting,
    MetaContext,
    NameInfo,
    OptionRequest,
    Reply,
)
from nbdlink.server import serve_in_thread
from nbdlink.uri import Target

ALL = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
FLAGS = TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH
INFO = ExportInfo(1 << 20, FLAGS).pack()


def converse(connection, answers, flags=ALL, heard=None):
    """Greet, and answer each option with `answers[option]`, until transmission or the end.

    An answer of None hangs up. What the client asks goes to the list `heard`.
    """
    answers = {Option.ABORT: [OptionReply.ACK], **answers}
    machine = Handshake(Role.SERVER)
    connection.sendall(machine.send(Greeting(flags)))
    while machine.state not in (State.TRANSMISSION, State.CLOSED):
        machine.receive_data(connection.recv(65536))
        while (message := machine.next_message()) is not None:
            if isinstance(message, ClientFlags):
                continue
            if heard is not None:
                heard.append(message.option)
            for answer in answers.get(message.option, [OptionReply.ERR_UNSUP]):
                if answer is None:
                    connection.shutdown(2)
                    return
                if isinstance(answer, ExportNameAnswer):
                    connection.sendall(machine.send(answer))
                else:
                    kind, data = answer if isinstance(answer, tuple) else (answer, b"")
                    connection.sendall(machine.send(Reply(message.option, kind, data)))


def speak(answers, flags=ALL, heard=None):
    """Give a script that has the conversation and then waits for the client to leave."""

    def script(connection):
        converse(connection, answers, flags, heard)
        connection.recv(1)

    return script


GO = [(OptionReply.INFO, INFO), OptionReply.ACK]


def test_go_gives_all_that_the_server_tells(liar):
    server = liar(
        speak(
            {
                Option.GO: [
                    (OptionReply.INFO, NameInfo("canonical").pack()),
                    (OptionReply.INFO, INFO),
                    (OptionReply.INFO, b"\x77\x77unknown"),
                    (99, b"an unknown reply"),
                    (OptionReply.INFO, DescriptionInfo("words").pack()),
                    (OptionReply.INFO, BlockSizeInfo(512, 4096, 1 << 20).pack()),
                    OptionReply.ACK,
                ]
            }
        )
    )
    sock, export = negotiate(server.target, timeout=20)
    sock.close()
    assert (export.size, export.flags) == (1 << 20, FLAGS)
    assert (export.canonical_name, export.description) == ("canonical", "words")
    assert (export.minimum_block, export.preferred_block) == (512, 4096)
    assert export.maximum_payload == 1 << 20


def test_without_announced_sizes_the_specifications_defaults_hold(liar):
    sock, export = negotiate(liar(speak({Option.GO: GO})).target, timeout=20)
    sock.close()
    sizes = (export.minimum_block, export.preferred_block, export.maximum_payload)
    assert sizes == (1, 4096, 32 << 20)


@pytest.mark.parametrize("flags", list(map(HandshakeFlag, range(4))), ids=str)
def test_export_name_is_used_where_go_is_not_known(liar, flags):
    answers = {Option.EXPORT_NAME: [ExportNameAnswer(4096, FLAGS)]}
    sock, export = negotiate(liar(speak(answers, flags)).target, timeout=20)
    sock.close()
    assert (export.size, export.flags) == (4096, FLAGS)


def test_the_socket_begins_right_behind_the_handshake(liar):
    sock, _ = negotiate(liar(speak({Option.GO: GO})).target, timeout=20)
    with sock:
        assert sock.gettimeout() is None
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            sock.recv(1)


def test_bytes_that_nobody_asked_for_are_refused(liar):
    # They come with the acknowledgement in one piece, or the test would be a race.
    def script(connection):
        connection.sendall(Greeting(ALL).pack())
        connection.recv(4, 0x100)
        connection.recv(65536)
        replies = Reply(Option.GO, OptionReply.INFO, INFO), Reply(Option.GO, OptionReply.ACK)
        connection.sendall(b"".join(reply.pack() for reply in replies) + b"!")
        connection.recv(1)

    with pytest.raises(RemoteProtocolError, match="nobody asked for"):
        negotiate(liar(script).target, timeout=20)


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (OptionReply.ERR_UNKNOWN, "does not offer the export 'data'"),
        (OptionReply.ERR_POLICY, "policy"),
        (OptionReply.ERR_TLS_REQD, "demands TLS"),
        (OptionReply.ERR_SHUTDOWN, "shutting down"),
        (OptionReply.ERR_INVALID, "NBD_REP_ERR_INVALID"),
        (OptionReply.ERR_PLATFORM, "NBD_REP_ERR_PLATFORM"),
        (OptionReply.ERR_BLOCK_SIZE_REQD, "NBD_REP_ERR_BLOCK_SIZE_REQD"),
        (OptionReply.ERR_TOO_BIG, "NBD_REP_ERR_TOO_BIG"),
        (OptionReply.ERR_EXT_HEADER_REQD, "NBD_REP_ERR_EXT_HEADER_REQD"),
        (0x8000_1234, "0x80001234"),
    ],
)
def test_each_refusal_has_its_words(liar, reply, says):
    server = liar(speak({Option.GO: [(reply, b"the \x1bserver's words")]}))
    with pytest.raises(OptionError) as caught:
        negotiate(server.target, timeout=20)
    assert says in str(caught.value)
    assert "server's words" in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert caught.value.reply == reply
    assert is_retryable(caught.value) == (reply == OptionReply.ERR_SHUTDOWN)


def test_an_unknown_export_is_answered_with_what_there_is(liar):
    listing = (OptionReply.SERVER, ExportListing("other").pack())
    answers = {Option.GO: [OptionReply.ERR_UNKNOWN], Option.LIST: [listing, OptionReply.ACK]}
    with pytest.raises(OptionError) as caught:
        negotiate(liar(speak(answers)).target, timeout=20)
    assert caught.value.hint == "it offers 'other'"


def test_exports_are_listed_with_their_descriptions(liar):
    replies = [(OptionReply.SERVER, ExportListing(name, "d").pack()) for name in ("a", "b")]
    server = liar(speak({Option.LIST: [*replies, OptionReply.ACK]}))
    with Negotiation(server.target, timeout=20) as negotiation:
        assert negotiation.list_exports() == [ExportListing("a", "d"), ExportListing("b", "d")]


def test_meta_contexts_are_listed(liar):
    context = (OptionReply.META_CONTEXT, MetaContext(0, "base:allocation").pack())
    answers = {
        Option.STRUCTURED_REPLY: [OptionReply.ACK],
        Option.LIST_META_CONTEXT: [context, OptionReply.ACK],
    }
    with Negotiation(liar(speak(answers)).target, timeout=20) as negotiation:
        assert negotiation.request_structured_replies()
        assert negotiation.list_meta_contexts() == ["base:allocation"]


CONTEXT = (OptionReply.META_CONTEXT, MetaContext(7, "base:allocation").pack())


def test_a_socket_for_the_kernel_is_asked_for_nothing_the_kernel_does_not_know(liar):
    # drivers/block/nbd.c knows simple replies only; whatever is offered must be left alone.
    heard = []
    accepted = {option: [OptionReply.ACK] for option in Option}
    server = liar(speak({**accepted, Option.GO: GO}, heard=heard))
    sock, export = negotiate(server.target, timeout=20)
    sock.close()
    assert heard == [Option.GO]
    assert (export.style, export.contexts) == (HeaderStyle.SIMPLE, {})


@pytest.mark.parametrize(
    ("known", "asked", "style", "contexts"),
    [
        (
            [Option.EXTENDED_HEADERS, Option.STRUCTURED_REPLY, Option.SET_META_CONTEXT],
            [Option.EXTENDED_HEADERS, Option.SET_META_CONTEXT, Option.GO],
            HeaderStyle.EXTENDED,
            {"base:allocation": 7},
        ),
        (
            [Option.STRUCTURED_REPLY, Option.SET_META_CONTEXT],
            [
                Option.EXTENDED_HEADERS,
                Option.STRUCTURED_REPLY,
                Option.SET_META_CONTEXT,
                Option.GO,
            ],
            HeaderStyle.STRUCTURED,
            {"base:allocation": 7},
        ),
        (
            [Option.STRUCTURED_REPLY],
            [
                Option.EXTENDED_HEADERS,
                Option.STRUCTURED_REPLY,
                Option.SET_META_CONTEXT,
                Option.GO,
            ],
            HeaderStyle.STRUCTURED,
            {},
        ),
        (
            [],
            [Option.EXTENDED_HEADERS, Option.STRUCTURED_REPLY, Option.GO],
            HeaderStyle.SIMPLE,
            {},
        ),
    ],
)
def test_the_best_is_asked_for_first(liar, known, asked, style, contexts):
    heard = []
    answers = {option: [OptionReply.ACK] for option in known}
    if Option.SET_META_CONTEXT in known:
        answers[Option.SET_META_CONTEXT] = [CONTEXT, OptionReply.ACK]
    server = liar(speak({**answers, Option.GO: GO}, heard=heard))
    sock, export = negotiate_best(server.target, timeout=20)
    sock.close()
    assert heard == asked
    assert (export.style, export.contexts) == (style, contexts)
    assert export.rules.has_contexts == bool(contexts)


@pytest.mark.parametrize("flags", list(map(HandshakeFlag, range(4))), ids=str)
def test_a_server_that_knows_no_options_is_used_as_it_is(liar, flags):
    answers = {Option.EXPORT_NAME: [ExportNameAnswer(4096, FLAGS)]}
    sock, export = negotiate_best(liar(speak(answers, flags)).target, timeout=20)
    sock.close()
    assert (export.size, export.style) == (4096, HeaderStyle.SIMPLE)


@pytest.mark.parametrize("option", [Option.EXTENDED_HEADERS, Option.SET_META_CONTEXT])
def test_a_server_that_hangs_up_on_an_option_is_asked_for_less(liar, option):
    answers = {Option.STRUCTURED_REPLY: [OptionReply.ACK], option: [None], Option.GO: GO}
    server = liar(speak(answers))
    sock, export = negotiate_best(server.target, timeout=20)
    sock.close()
    assert export.style == HeaderStyle.SIMPLE
    assert server.connections == 2


@pytest.mark.parametrize("option", [Option.EXTENDED_HEADERS, Option.SET_META_CONTEXT])
def test_a_server_that_falls_silent_is_given_up_once(liar, option):
    answers = {Option.STRUCTURED_REPLY: [OptionReply.ACK], option: []}
    server = liar(speak(answers))
    with pytest.raises(TransportError, match="no answer within"):
        negotiate_best(server.target, timeout=0.2)
    assert server.connections == 1


def test_extended_headers_come_with_go_only(liar):
    answers = {Option.EXTENDED_HEADERS: [OptionReply.ACK]}
    with pytest.raises(OptionError):
        negotiate_best(liar(speak(answers)).target, timeout=20)


def test_contexts_are_selected_for_one_export_only(liar):
    answers = {
        Option.STRUCTURED_REPLY: [OptionReply.ACK],
        Option.SET_META_CONTEXT: [CONTEXT, OptionReply.ACK],
        Option.GO: GO,
    }
    with Negotiation(liar(speak(answers)).target, timeout=20) as negotiation:
        negotiation.request_structured_replies()
        assert negotiation.set_meta_contexts(["base:allocation"], "x") == {"base:allocation": 7}
        assert negotiation.go("data").contexts == {}


def test_a_context_that_is_selected_twice_is_a_lie(liar):
    answers = {
        Option.STRUCTURED_REPLY: [OptionReply.ACK],
        Option.SET_META_CONTEXT: [CONTEXT, CONTEXT, OptionReply.ACK],
    }
    with Negotiation(liar(speak(answers)).target, timeout=20) as negotiation:
        negotiation.request_structured_replies()
        with pytest.raises(RemoteProtocolError, match="twice"):
            negotiation.set_meta_contexts(["base:allocation"])


def test_looking_around_does_not_fail_where_nothing_is_known(liar):
    with Negotiation(liar(speak({})).target, timeout=20) as negotiation:
        assert not negotiation.request_structured_replies()
        assert negotiation.list_meta_contexts() == []
        with pytest.raises(OptionError):
            negotiation.info()


def test_leaving_says_abort(liar):
    heard = []

    def script(connection):
        connection.sendall(Greeting(ALL).pack())
        connection.recv(4)
        heard.append(connection.recv(65536))

    server = liar(script)
    Negotiation(server.target, timeout=20).close()
    server.close()
    assert heard == [OptionRequest(Option.ABORT).pack()]


def full_conversation():
    """What a server sends up to transmission."""
    return b"".join(
        (
            Greeting(ALL).pack(),
            Reply(Option.GO, OptionReply.INFO, INFO).pack(),
            Reply(Option.GO, OptionReply.INFO, BlockSizeInfo(1, 4096, 1 << 25).pack()).pack(),
            Reply(Option.GO, OptionReply.ACK).pack(),
        )
    )


def test_a_server_that_hangs_up_at_any_byte_is_reported_and_nothing_leaks(liar):
    wire = full_conversation()
    cuts = iter(range(len(wire)))

    def script(connection):
        connection.sendall(wire[: next(cuts)])
        connection.shutdown(1)
        while connection.recv(65536):
            pass

    server = liar(script)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(len(wire)):
        with pytest.raises((RemoteProtocolError, TransportError)):
            negotiate(server.target, timeout=20)
    assert server.connections == len(wire)
    # One more than before at most: the liar may not have closed its last connection yet.
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1


def test_a_server_that_says_nothing_is_given_up(liar):
    target = liar(lambda connection: connection.recv(1)).target
    with pytest.raises(TransportError, match="no answer within") as caught:
        negotiate(target, timeout=0.2)
    assert caught.value.hint == f"`nbdlink doctor {target}` walks the way there step by step"


def test_a_server_that_dribbles_is_given_up_all_the_same(liar):
    def script(connection):
        connection.sendall(Greeting(ALL).pack())
        while True:
            connection.sendall(Reply(Option.GO, 99).pack())
            connection.recv(1)

    with pytest.raises(NBDError):
        negotiate(liar(script).target, timeout=0.2)


@pytest.mark.parametrize(
    ("wire", "error", "says"),
    [
        (b"SSH-2.0-OpenSSH", RemoteProtocolError, "not an NBD server"),
        (b"\0" * 16, RemoteProtocolError, "not an NBD server"),
        (
            struct.pack(">QQQI", 0x4E42444D41474943, 0x0000420281861253, 1 << 20, 0) + bytes(124),
            OldstyleServerError,
            "oldstyle",
        ),
        (
            Greeting(ALL).pack() + struct.pack(">QIII", 0x3E889045565A9, 7, 3, 0xFFFF_FFFF),
            RemoteProtocolError,
            "announces 4294967295 bytes",
        ),
    ],
)
def test_a_lie_is_named_together_with_the_server(liar, wire, error, says):
    def script(connection):
        # The greeting first and alone, as a server does; the rest once the client has spoken.
        connection.sendall(wire[:18])
        if len(wire) > 18:
            connection.recv(4)
            connection.recv(65536)
            connection.sendall(wire[18:])
        connection.recv(1)

    server = liar(script)
    with pytest.raises(error, match=says) as caught:
        negotiate(server.target, timeout=20)
    assert str(caught.value).startswith(server.target.address)


@pytest.mark.parametrize(
    ("info", "says"),
    [
        (struct.pack(">HQH", InfoType.EXPORT, 1 << 63, 1), "2\\^63"),
        (struct.pack(">HQ", InfoType.EXPORT, 1), "NBD_INFO_EXPORT has 10 bytes"),
        (struct.pack(">HIII", InfoType.BLOCK_SIZE, 0, 0, 0), "minimum block size of 0"),
        (struct.pack(">H", InfoType.NAME) + b"\xff", "UTF-8"),
    ],
)
def test_a_lie_in_the_information_is_refused(liar, info, says):
    answers = {Option.GO: [(OptionReply.INFO, INFO), (OptionReply.INFO, info), OptionReply.ACK]}
    with pytest.raises(RemoteProtocolError, match=says):
        negotiate(liar(speak(answers)).target, timeout=20)


def test_tls_is_never_given_up_silently(tmp_path):
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    with serve_in_thread({"": path}) as service:
        port = service.addresses[0][1]
        with pytest.raises(TLSError, match="does not offer TLS"):
            negotiate(Target("127.0.0.1", port, tls=True))


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (Target(socket="/nonexistent/socket"), "no such file"),
        (Target(socket="/" + "x" * 200), "too long"),
        (Target("127.0.0.1", 1), "connection refused"),
        (Target("host.invalid"), "cannot be resolved|resolution"),
        (Target(".".join(["long"] * 60)), "cannot be resolved|resolution"),
        (Target("a..b"), "not a host name|cannot be resolved"),
    ],
)
def test_a_server_that_cannot_be_reached_is_named_with_the_reason(target, says):
    with pytest.raises(TransportError, match=says) as caught:
        negotiate(target, timeout=20)
    assert is_retryable(caught.value)
