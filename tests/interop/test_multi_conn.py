"""What MULTI_CONN promises, with several real clients of `nbdlink serve` at once.

The specification promises two things (transmission flags, CAN_MULTI_CONN): what is written and
acknowledged on one connection is seen on the others, and FLUSH on one covers what was
acknowledged on any. It promises no order between requests that are in flight together, and
neither it nor Linux promises that a read sees all or nothing of a write that it overlaps with in
time: ext4 copies out of the page cache without a lock. So no test here looks for torn blocks.
"""

from __future__ import annotations

import os
import re
import subprocess

import pytest

from .ours import TIMEOUT, full, libnbd, need, result, start_libnbd

pytestmark = pytest.mark.interop

SIZE = 8 << 20

# Served by threads of one process, and by processes.
PROCESSES = [["--processes", "0"], ["--processes", "3"]]


@pytest.fixture(params=PROCESSES, ids=["threads", "processes"])
def processes(request):
    return request.param


def test_several_connections_are_promised_to_several_clients_only(run, program, tmp_path):
    image = full(tmp_path / "image", 4096)
    for shared, status in ((0, 0), (1, 2), (2, 0)):
        uri = program("-e", shared, image).uri
        done = run("nbdinfo", "--can", "multi-conn", uri, check=False)
        assert done.returncode == status, f"-e {shared}: {done.stderr}"


# What one has written the others see.


def rounds_of_four(uri, size, seed, rounds):
    """Change a place on one connection, and look at it from another, again and again."""
    import random

    import nbd

    rand = random.Random(seed)
    handles = []
    for _ in range(4):
        h = nbd.NBD()
        h.add_meta_context("base:allocation")
        h.connect_uri(uri)
        assert h.can_multi_conn()
        handles.append(h)
    for number in range(rounds):
        writer, reader = rand.sample(handles, 2)
        longest = rand.choice((10, 4096, 4096, 4096, 70000, 300000))
        count = rand.randint(1, longest)
        at = rand.randrange(size - count)
        what = rand.choice(("write", "write", "write", "zero", "no hole", "fua"))
        data = bytes(count)
        if what == "zero":
            writer.zero(count, at)
        elif what == "no hole":
            writer.zero(count, at, nbd.CMD_FLAG_NO_HOLE)
        else:
            data = rand.randbytes(count)
            writer.pwrite(data, at, nbd.CMD_FLAG_FUA if what == "fua" and number % 16 == 0 else 0)
        assert reader.pread(count, at) == data, f"round {number}: {what} of {count} at {at}"


@pytest.mark.parametrize("road", ["unix", "tcp"])
def test_a_change_that_is_acknowledged_is_seen_by_all(program, place, processes, road):
    uri = program(*processes, full(place / "image", SIZE), road=road).uri
    libnbd(rounds_of_four, uri, SIZE, 99, 1000)


def ping_pong(uri, rounds):
    """Have two processes tell each other what they have written, and read it."""
    import os
    import random

    import nbd

    def play(first, hear, tell):
        h = nbd.NBD()
        h.connect_uri(uri)
        for number in range(rounds):
            rand = random.Random(number)
            at, data = rand.randrange(1 << 20), rand.randbytes(rand.randint(1, 10000))
            if (number % 2 == 0) is first:
                h.pwrite(data, at)
                os.write(tell, b"x")
            else:
                assert os.read(hear, 1) == b"x"
                assert h.pread(len(data), at) == data, f"round {number}"
        h.shutdown()

    (read_a, write_a), (read_b, write_b) = os.pipe(), os.pipe()
    pid = os.fork()
    if not pid:
        os.close(read_b), os.close(write_a)
        status = 1
        try:
            play(False, read_a, write_b)
            status = 0
        finally:
            os._exit(status)
    os.close(read_a), os.close(write_b)
    play(True, read_b, write_a)
    assert os.waitpid(pid, 0)[1] == 0


def test_two_programs_read_what_the_other_one_wrote(program, tmp_path, processes):
    uri = program(*processes, full(tmp_path / "image", SIZE)).uri
    libnbd(ping_pong, uri, 2000)


def test_an_open_connection_sees_what_another_tool_wrote(run, program, tmp_path):
    uri = program(full(tmp_path / "image", SIZE)).uri

    def waits(uri):
        import sys

        import nbd

        h = nbd.NBD()
        h.connect_uri(uri)
        h.pwrite(b"\x42" * 65536, 1 << 20)
        print("written", flush=True)
        sys.stdin.readline()
        return h.pread(65536, 2 << 20) == b"\x37" * 65536

    process = start_libnbd(waits, uri)
    try:
        assert process.stdout.readline() == "written\n", process.communicate()[1]
        commands = ["-c", "read -P 0x42 1M 64k", "-c", "write -P 0x37 2M 64k"]
        said = run("qemu-io", "-f", "raw", uri, *commands)
        assert "failed" not in said
        process.stdin.write("\n")
        process.stdin.flush()
        assert result(process)
    finally:
        process.kill()


def test_block_status_sees_what_another_connection_did(program, place, processes):
    uri = program(*processes, full(place / "image", SIZE)).uri

    def statuses(uri):
        import nbd

        handles = []
        for _ in range(4):
            h = nbd.NBD()
            h.add_meta_context("base:allocation")
            h.connect_uri(uri)
            handles.append(h)
        told = []

        def look(h):
            h.block_status(1 << 20, 1 << 20, lambda _c, _at, entries, _e: told.append(entries))

        handles[0].trim(1 << 20, 1 << 20)
        for h in handles:
            look(h)
        handles[3].pwrite(bytes([1]) * (1 << 20), 1 << 20)
        for h in handles:
            look(h)
        return told

    assert libnbd(statuses, uri) == [[1 << 20, 3]] * 4 + [[1 << 20, 0]] * 4


def test_every_byte_is_somebodys(program, tmp_path, processes):
    image = full(tmp_path / "image", 1 << 20)
    image.write_bytes(bytes(1 << 20))
    uri = program(*processes, image).uri

    def scribble(uri, value):
        import nbd

        h = nbd.NBD()
        h.connect_uri(uri)
        for n in range(100):
            h.pwrite(bytes([value]) * 100000, n * 9000)
            h.pwrite(bytes([value]) * 4096, 4096 * (n % 100))
            assert set(h.pread(300000, 0)) <= {0, 1, 2, 3}
        return h.pread(1 << 20, 0)[0]

    writers = [start_libnbd(scribble, uri, value) for value in (1, 2, 3)]
    for writer in writers:
        result(writer)
    data = image.read_bytes()
    end = 99 * 9000 + 100000
    assert set(data[:end]) <= {1, 2, 3}
    assert set(data[end:]) == {0}


# What one makes durable is everybody's. strace says what the server asks of the kernel, and makes
# it fail: a reply that tells of a failure has waited for what failed.


SYNCS = re.compile(r"\b(fdatasync|fsync)\(|RWF_D?SYNC")


@pytest.fixture
def traced(run, program, tmp_path):
    """Serve an image under strace; give the URI, and a way to read the calls about the image."""
    need("strace")
    image, log = full(tmp_path / "image", SIZE), tmp_path / "trace"
    calls = "trace=pwrite64,pwritev,pwritev2,splice,fallocate,fdatasync,fsync"

    def start(*options, words=()):
        strace = ["strace", "-f", "-y", "-qq", "-o", log, "-P", image, "-e", calls, *options]
        server = program(*words, image, under=strace)

        def trace(status=0):
            server.end(status)
            before, _, _ = log.read_text().partition("--- SIGTERM")  # at the end it syncs too
            return before.splitlines()

        return server.uri, trace

    return start


def flush_of_another(uri, count):
    """Write on one connection, and flush on another; give the errors of that and two more."""
    import nbd

    handles = [nbd.NBD() for _ in range(4)]
    for h in handles:
        h.connect_uri(uri)
    handles[0].pwrite(b"x" * count, 4096)
    errors = []
    for h in (handles[1], handles[2], handles[0]):
        try:
            h.flush()
            errors.append("")
        except nbd.Error as error:
            errors.append(error.errno)
    return errors


@pytest.mark.parametrize("count", [4096, 1 << 20])
def test_flush_syncs_what_another_connection_wrote(traced, processes, count):
    uri, trace = traced(words=processes)
    assert libnbd(flush_of_another, uri, count) == ["", "", ""]
    calls = trace()
    wrote = [n for n, call in enumerate(calls) if re.search(r"\b(pwrite\w*|splice)\(", call)]
    synced = [n for n, call in enumerate(calls) if SYNCS.search(call)]
    assert wrote, calls
    assert max(wrote) < min(synced), calls
    assert len(synced) == 3, calls


def test_a_loss_that_one_connection_was_told_of_is_told_to_all(traced, processes):
    uri, trace = traced("-e", "inject=fdatasync:error=EIO", words=processes)
    assert libnbd(flush_of_another, uri, 4096) == ["EIO"] * 3
    # The kernel would not tell it a second time, and was not asked.
    assert sum(bool(SYNCS.search(call)) for call in trace(status=1)) == 1


@pytest.mark.parametrize(
    ("command", "count", "fua"),
    [
        ("pwrite", 512, True),
        ("pwrite", 100000, True),
        ("pwrite", 1 << 20, True),
        ("zero", 4096, True),
        ("trim", 4096, True),
        ("pwrite", 512, False),
    ],
)
def test_only_fua_syncs_by_itself(traced, command, count, fua):
    uri, trace = traced()

    def change(uri, command, count, fua):
        import nbd

        h = nbd.NBD()
        h.connect_uri(uri)
        what = b"x" * count if command == "pwrite" else count
        getattr(h, command)(what, 4096, nbd.CMD_FLAG_FUA if fua else 0)

    libnbd(change, uri, command, count, fua)
    calls = trace()
    assert any(SYNCS.search(call) for call in calls) is fua, calls


# Clients that do not know of each other.


def test_a_client_that_is_killed_in_a_write_disturbs_nobody(program, tmp_path, processes):
    uri = program(*processes, full(tmp_path / "image", SIZE)).uri

    def write_for_ever(uri):
        import nbd

        h = nbd.NBD()
        h.connect_uri(uri)
        data = bytes([1]) * (2 << 20)
        while True:
            h.aio_pwrite(data, 0)
            h.aio_pwrite(data[:100000], 3 << 20)
            print("writing", flush=True)
            while h.aio_in_flight() > 4:
                h.poll(-1)

    def goes_on(uri, size, rounds):
        import random
        import sys

        import nbd

        h = nbd.NBD()
        h.connect_uri(uri)
        rand = random.Random(5)
        for number in range(rounds):
            if number == rounds // 2:
                print("half", flush=True)
                sys.stdin.readline()
            data = rand.randbytes(rand.randint(1, 50000))
            at = rand.randrange(size // 2, size - len(data))
            h.pwrite(data, at)
            assert h.pread(len(data), at) == data
        h.flush()
        return set(h.pread(1 << 20, 0)) == {1}

    killed, living = start_libnbd(write_for_ever, uri), start_libnbd(goes_on, uri, SIZE, 1000)
    try:
        for _ in range(5):
            assert killed.stdout.readline() == "writing\n", killed.communicate()[1]
        assert living.stdout.readline() == "half\n", living.communicate()[1]
        killed.kill()
        living.stdin.write("\n")
        living.stdin.flush()
        assert result(living)
    finally:
        killed.kill()
        killed.communicate()
        living.kill()


def test_a_copy_and_fio_share_an_export(program, tmp_path):
    need("nbdcopy", "fio")
    image = full(tmp_path / "image", SIZE)
    source = full(tmp_path / "source", SIZE // 2, seed=2)
    uri = program(image, road="tcp").uri
    fio = ["fio", "--name=one", "--ioengine=nbd", f"--uri={uri}", "--rw=randrw", "--iodepth=16"]
    fio += ["--bsrange=512-64k", f"--offset={SIZE // 2}", f"--size={SIZE // 2}"]
    fio += ["--verify=crc32c", "--verify_fatal=1", f"--aux-path={tmp_path}"]
    copy = ["nbdcopy", "--connections=8", "--request-size=65536", "--flush", str(source), uri]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    others = [subprocess.Popen(words, cwd=tmp_path, **pipes) for words in (fio, copy)]
    for other in others:
        said, _ = other.communicate(timeout=TIMEOUT)
        assert other.returncode == 0, said
    assert image.read_bytes()[: SIZE // 2] == source.read_bytes()


def test_qemu_and_fio_write_at_once_and_both_are_right(run, program, place):
    need("fio", "qemu-img")
    image = full(place / "image", SIZE)
    uri = program(image).uri
    fio = ["fio", "--name=one", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bs=4k"]
    fio += [f"--offset={SIZE // 2}", f"--size={SIZE // 2}", "--iodepth=16", "--verify=md5"]
    fio += ["--verify_fatal=1", f"--aux-path={place}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    other = subprocess.Popen(fio, cwd=place, env={**os.environ, "TMPDIR": str(place)}, **pipes)
    bench = ["-w", "-c", "1024", "-d", "32", "-s", "4096", "--pattern=85", "--flush-interval=256"]
    run("qemu-img", "bench", "-f", "raw", *bench, uri)
    said, _ = other.communicate(timeout=TIMEOUT)
    assert other.returncode == 0, said
    assert image.read_bytes()[: SIZE // 2] == b"\x55" * (SIZE // 2)
