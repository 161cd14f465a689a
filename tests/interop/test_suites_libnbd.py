"""libnbd's Python module against `nbdlink serve`: what no tool of its asks for.

The functions that a test hands to `libnbd` run in Debian's Python, one after the other with the
test; see `ours.start_libnbd`. They keep to libnbd 1.14.
"""

from __future__ import annotations

import pytest

from .ours import allocated, full, layout, libnbd, serving, sparse

pytestmark = pytest.mark.interop

SIZE = 8 << 20


@pytest.fixture(params=["unix", "tcp"])
def road(request):
    return request.param


@pytest.fixture(scope="module")
def small_uri(tmp_path_factory):
    """The URI of a small export, for tests that only ask."""
    folder = tmp_path_factory.mktemp("small")
    with serving(folder, full(folder / "image", 4096)) as server:
        yield server.uri


# Styles of replies.


def test_without_structured_replies_reads_are_the_same(program, tmp_path):
    image = sparse(tmp_path / "image")

    def differences(uri, path):
        from pathlib import Path

        import nbd

        h = nbd.NBD()
        h.set_request_structured_replies(False)
        h.connect_uri(uri)
        assert not h.get_structured_replies_negotiated()
        assert not h.can_df()
        data = Path(path).read_bytes()
        spans = [(0, len(data)), (1, 100), ((1 << 20) - 5, 4096), (0, 1 << 20), (3 << 20, 1 << 20)]
        return [
            (at, count)
            for at, count in [(at, min(count, len(data) - at)) for at, count in spans]
            if h.pread(count, at) != data[at : at + count]
        ]

    assert libnbd(differences, program(image).uri, str(image)) == []


def test_without_structured_replies_there_is_no_block_status(program, tmp_path):
    def error(uri):
        import nbd

        h = nbd.NBD()
        h.set_request_structured_replies(False)
        h.add_meta_context("base:allocation")
        h.connect_uri(uri)
        assert not h.can_meta_context("base:allocation")
        h.set_strict_mode(0)
        try:
            h.block_status(4096, 0, lambda *_: 0)
        except nbd.Error as failed:
            assert len(h.pread(512, 0)) == 512
            return failed.errno

    assert libnbd(error, program(full(tmp_path / "image")).uri) in ("EINVAL", "ENOTSUP")


def read_in_chunks(uri, offset, length, flags):
    """Give the chunks that a read is answered with, in the order of their places."""
    import nbd

    h = nbd.NBD()
    h.connect_uri(uri)
    chunks = []

    def chunk(data, at, kind, error):
        chunks.append((at, len(data), kind))
        assert kind != nbd.READ_HOLE or not any(data)

    assert nbd.READ_DATA == 1
    assert nbd.READ_HOLE == 2
    h.pread_structured(length, offset, chunk, flags)
    return sorted(chunks)


DF = 1 << 2
HOLE = 2


def test_holes_of_a_long_read_are_not_sent(program, place):
    image = sparse(place / "image")
    chunks = libnbd(read_in_chunks, program(image).uri, 0, SIZE, 0)
    ends = [at + count for at, count, _ in chunks]
    assert [at for at, _, _ in chunks] == [0, *ends[:-1]]
    assert ends[-1] == SIZE
    holes = [(at, count) for at, count, kind in chunks if kind == HOLE]
    assert holes == [(at, count) for at, count, is_data in layout(image) if not is_data]


def test_a_read_that_may_not_be_fragmented_is_one_chunk(program, place):
    uri = program(sparse(place / "image")).uri
    chunks = libnbd(read_in_chunks, uri, 0, SIZE, DF)
    assert [(at, count) for at, count, _ in chunks] == [(0, SIZE)]


# Commands and their flags. Each gives what the server says of the range afterwards.


def change(uri, command, flags, offset, length):
    """Do one command with flags by name; give the block status of where it was."""
    import nbd

    h = nbd.NBD()
    h.add_meta_context("base:allocation")
    h.connect_uri(uri)
    bits = 0
    for flag in flags:
        bits |= getattr(nbd, f"CMD_FLAG_{flag}")
    try:
        getattr(h, command)(length, offset, bits)
    except nbd.Error as error:
        return error.errno
    told = []
    h.block_status(length, offset, lambda _context, _at, entries, _error: told.extend(entries))
    if command == "zero":
        assert h.pread(length, offset) == bytearray(length)
    return told


MB = 1 << 20
A_HOLE = [MB, 3]
DATA = [MB, 0]


@pytest.mark.parametrize("flags", [[], ["FUA"], ["FAST_ZERO"]], ids=repr)
def test_zeroes_are_a_hole(program, place, flags):
    image = full(place / "image")
    uri = program(image).uri
    assert libnbd(change, uri, "zero", flags, MB, MB) == A_HOLE
    assert allocated(image) <= SIZE - MB + 65536


@pytest.mark.parametrize("flags", [["NO_HOLE"], ["NO_HOLE", "FUA"]], ids=repr)
def test_zeroes_that_shall_be_no_hole_keep_their_space(program, place, flags):
    image = full(place / "image")
    # What the file system then tells of them, holes or data, is its own business.
    assert libnbd(change, program(image).uri, "zero", flags, MB, MB)[0::2]
    assert allocated(image) >= SIZE


@pytest.mark.parametrize("flags", [[], ["FUA"]], ids=repr)
def test_what_is_trimmed_is_a_hole(program, place, flags):
    image = full(place / "image")
    assert libnbd(change, program(image).uri, "trim", flags, MB, MB) == A_HOLE


def test_caching_changes_nothing(program, place):
    image = full(place / "image")
    before = image.read_bytes()
    assert libnbd(change, program(image).uri, "cache", [], MB, MB) == DATA
    assert image.read_bytes() == before


def test_one_extent_if_one_is_asked_for(program, place):
    image = sparse(place / "image")

    def extents(uri, size):
        import nbd

        h = nbd.NBD()
        h.add_meta_context("base:allocation")
        h.connect_uri(uri)
        told, at, entries = [], 0, []

        def hear(_context, _at, new, _error):
            entries[:] = new

        while at < size:
            h.block_status(size - at, at, hear, nbd.CMD_FLAG_REQ_ONE)
            assert len(entries) == 2
            told.append((at, entries[0], entries[1] == 0))
            at += entries[0]
        return told

    assert list(map(tuple, libnbd(extents, program(image).uri, SIZE))) == layout(image)


# Many at once.


def against_a_model(uri, size, seed, rounds, structured):
    """Keep up to 64 commands in flight that do not overlap, and compare with a bytearray."""
    import random

    import nbd

    rand = random.Random(seed)
    h = nbd.NBD()
    h.set_request_structured_replies(structured)
    h.connect_uri(uri)
    model = bytearray(h.pread(size, 0))
    busy, seen = {}, dict.fromkeys(("read", "write", "zero", "flush", "cache", "refused"), 0)

    def finish(least):
        while len(busy) > least:
            for cookie in list(busy):
                if h.aio_command_completed(cookie):
                    _, _, check = busy.pop(cookie)
                    if check:
                        check()
            if len(busy) > least:
                h.poll(-1)

    def compare(buffer, at, count):
        assert buffer.to_bytearray() == model[at : at + count], f"read of {count} at {at}"

    for _ in range(rounds):
        finish(63)
        longest = rand.choice((512, 4096, 70000, 300000, 2 << 20))
        count = rand.randint(1, longest)
        at = rand.randrange(size - count)
        while any(at < stop and start < at + count for start, stop, _ in busy.values()):
            finish(len(busy) - 1)
        what = rand.choice(("read", "read", "read", "write", "write", "zero", "flush", "cache"))
        fua = nbd.CMD_FLAG_FUA if rand.random() < 0.02 else 0
        check = None
        if what == "read":
            buffer = nbd.Buffer(count)
            cookie = h.aio_pread(buffer, at)

            def check(buffer=buffer, at=at, count=count):
                compare(buffer, at, count)

        elif what == "write":
            data = rand.randbytes(count)
            model[at : at + count] = data
            cookie = h.aio_pwrite(data, at, flags=fua)
        elif what == "zero":
            model[at : at + count] = bytes(count)
            flags = rand.choice((0, nbd.CMD_FLAG_NO_HOLE))
            cookie = h.aio_zero(count, at, flags=fua | flags)
        elif what == "flush":
            if rand.random() < 0.8:
                continue
            at = count = 0
            cookie = h.aio_flush()
        else:
            cookie = h.aio_cache(count, at)
        busy[cookie] = at, at + count, check
        seen[what] += 1
    finish(0)
    assert h.pread(size, 0) == model
    return seen


@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
def test_random_commands_do_what_a_model_does(program, place, road, structured):
    image = sparse(place / "image")
    uri = program(image, road=road).uri
    seen = libnbd(against_a_model, uri, SIZE, 1234, 500, structured)
    assert min(seen[what] for what in ("read", "write", "zero", "flush", "cache")) > 0


# What must not be asked.


def refusals(uri, cases):
    """Ask for what is not allowed, with libnbd's own checks off; give each one's errno.

    After each, the connection must still answer.
    """
    import nbd

    h = nbd.NBD()
    h.add_meta_context("base:allocation")
    h.connect_uri(uri)
    h.set_strict_mode(0)
    errors = []
    for name, arguments in cases:
        call = getattr(h, name)
        if name == "pwrite":
            arguments[0] = b"x" * arguments[0]
        if name == "block_status":
            arguments.insert(2, lambda *_: 0)
        try:
            call(*arguments)
        except nbd.Error as error:
            errors.append(error.errno)
        else:
            errors.append("")
        assert len(h.pread(512, 0)) == 512
    return errors


BIG = 1 << 27
UNKNOWN = 1 << 9
ILLEGAL = [
    ("EINVAL", "pread", [512, BIG]),
    ("EINVAL", "pread", [512, BIG - 511]),
    ("EINVAL", "pread", [512, (1 << 63) - 512]),
    ("EINVAL", "pread", [(32 << 20) + 1, 0]),
    ("EINVAL", "pread", [512, 0, UNKNOWN]),
    ("ENOSPC", "pwrite", [512, BIG]),
    ("ENOSPC", "pwrite", [512, BIG - 511]),
    ("ENOSPC", "pwrite", [1 << 20, BIG - 4096]),
    ("EINVAL", "pwrite", [(32 << 20) + 1, 0]),
    ("EINVAL", "pwrite", [512, 0, UNKNOWN]),
    ("ENOSPC", "zero", [512, BIG - 511]),
    ("EINVAL", "zero", [512, 0, UNKNOWN]),
    ("EINVAL", "trim", [512, BIG - 511]),
    ("EINVAL", "trim", [512, 0, UNKNOWN]),
    ("EINVAL", "cache", [512, BIG - 511]),
    ("EINVAL", "cache", [512, 0, UNKNOWN]),
    ("EINVAL", "flush", [UNKNOWN]),
    ("EINVAL", "block_status", [512, BIG - 511]),
    ("EINVAL", "block_status", [0, 0]),
    ("EINVAL", "block_status", [512, 0, UNKNOWN]),
]


def test_what_is_not_allowed_is_refused_and_the_connection_lives(program, place, road):
    image = place / "image"
    with image.open("wb") as file:
        file.truncate(BIG)
    uri = program(image, road=road).uri
    errors = libnbd(refusals, uri, [case[1:] for case in ILLEGAL])
    assert list(zip(errors, ILLEGAL, strict=True)) == [(case[0], case) for case in ILLEGAL]
    assert allocated(image) == 0


def test_flags_that_mean_nothing_to_a_command_are_refused(program, tmp_path):
    uri = program(full(tmp_path / "image")).uri
    cases = [("pwrite", [512, 0, DF]), ("trim", [512, 0, 1 << 4]), ("pread", [512, 0, 1 << 1])]
    assert libnbd(refusals, uri, cases) == ["EINVAL"] * 3


def test_requests_about_nothing_are_fine(program, tmp_path):
    image = full(tmp_path / "image")
    before = image.read_bytes()
    cases = [(name, [0, 512]) for name in ("pread", "pwrite", "zero", "trim", "cache")]
    assert libnbd(refusals, program(image).uri, cases) == [""] * 5
    assert image.read_bytes() == before


# Before the transmission.


def test_one_handshake_can_ask_everything(program, tmp_path):
    a, b = full(tmp_path / "a", 1 << 20), full(tmp_path / "b", 2 << 20)

    def asked(uri):
        import nbd

        h = nbd.NBD()
        h.set_opt_mode(True)
        h.set_full_info(True)
        h.connect_uri(uri)
        listed = []
        h.opt_list(lambda name, description: listed.append((name, description)))
        sizes = []
        for name, _ in listed:
            h.set_export_name(name)
            h.opt_info()
            assert h.get_canonical_export_name() == name
            sizes.append(h.get_size())
        h.set_export_name("nope")
        errors = []
        for call in (h.opt_info, h.opt_go):
            try:
                call()
            except nbd.Error as error:
                errors.append(error.errno)
            assert h.aio_is_negotiating()
        h.set_export_name("b")
        h.opt_go()
        return [listed, sizes, errors, h.get_size(), len(h.pread(4096, (2 << 20) - 4096))]

    assert libnbd(asked, program(a, b).uri) == [
        [["a", ""], ["b", ""]],
        [1 << 20, 2 << 20],
        ["ENOENT", "ENOENT"],
        2 << 20,
        4096,
    ]


@pytest.mark.parametrize(
    ("queries", "answer"),
    [
        ([], ["base:allocation"]),
        (["base:"], ["base:allocation"]),
        (["base:allocation"], ["base:allocation"]),
        (["base:allocation", "base:"], ["base:allocation"]),
        (["base:nope"], []),
        (["base:alloc"], []),
        (["qemu:dirty-bitmap:x", "base:allocation"], ["base:allocation"]),
        (["qemu:"], []),
    ],
    ids=str,
)
def test_contexts_are_listed_by_query(small_uri, queries, answer):
    def listed(uri, queries):
        import nbd

        h = nbd.NBD()
        h.set_opt_mode(True)
        h.connect_uri(uri)
        for query in queries:
            h.add_meta_context(query)
        names = []
        h.opt_list_meta_context(names.append)
        h.opt_abort()
        return names

    assert libnbd(listed, small_uri, queries) == answer


@pytest.mark.parametrize(
    ("queries", "granted"),
    [
        (["base:allocation"], True),
        (["x:y", "base:allocation"], True),
        (["base:"], False),
        (["base:alloc"], False),
    ],
    ids=str,
)
def test_only_a_context_by_its_full_name_is_granted(small_uri, queries, granted):
    def granted_to(uri, queries):
        import nbd

        h = nbd.NBD()
        for query in queries:
            h.add_meta_context(query)
        h.connect_uri(uri)
        assert len(h.pread(512, 0)) == 512
        return h.can_meta_context("base:allocation")

    assert libnbd(granted_to, small_uri, queries) is granted


def test_a_client_may_leave_in_the_handshake(program, tmp_path):
    def leave(uri):
        import nbd

        h = nbd.NBD()
        h.set_opt_mode(True)
        h.connect_uri(uri)
        h.opt_abort()
        assert h.aio_is_closed()
        other = nbd.NBD()
        other.connect_uri(uri)
        return other.get_size()

    assert libnbd(leave, program(full(tmp_path / "image", 4096)).uri) == 4096
