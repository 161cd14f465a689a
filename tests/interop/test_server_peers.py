"""Other implementations' clients against our server."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket

import pytest

from nbdlink.server import Catalogue, Export, Service
from nbdlink.storage.raw import RawStorage
from nbdlink.transport.stream import listen_unix

pytestmark = pytest.mark.interop

SIZE = 16 << 20
ROADS = [
    {},
    {"host": "127.0.0.1"},
    {"host": "::1"},
]


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


@pytest.fixture
def uri(serve, image):
    return serve({"": image}).uri()


def has_v6():
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.fixture(params=ROADS, ids=["unix", "v4", "v6"])
def uri_by_road(request, serve, image):
    if request.param.get("host") == "::1" and not has_v6():
        pytest.skip("this machine has no IPv6 loopback address")
    return serve({"": image}, **request.param).uri()


# libnbd.


def test_nbdinfo_sees_what_the_export_can(run, uri):
    (export,) = json.loads(run("nbdinfo", "--json", uri))["exports"]
    told = {key: value for key, value in export.items() if key.startswith(("can_", "is_", "bl"))}
    rotational = told.pop("is_rotational")
    assert rotational in (True, False)
    assert told == {
        "is_read_only": False,
        "can_cache": True,
        "can_df": True,
        "can_fast_zero": True,
        "can_flush": True,
        "can_fua": True,
        "can_multi_conn": True,
        "can_trim": True,
        "can_zero": True,
        "block_size_minimum": 1,
        "block_size_preferred": 4096,
        "block_size_maximum": 32 << 20,
    }
    assert export["export-size"] == SIZE


def test_nbdinfo_sees_that_an_export_is_read_only(run, serve, image):
    uri = serve({"": image}, read_only=True).uri()
    (export,) = json.loads(run("nbdinfo", "--json", uri))["exports"]
    assert export["is_read_only"]
    assert not export["can_zero"]
    assert not export["can_trim"]


def test_nbdinfo_lists_every_export(run, image, tmp_path):
    exports = [
        Export("", RawStorage.open(image)),
        Export("half", RawStorage.open(image, size=SIZE // 2), "the first half"),
        Export("a b/\u00e4", RawStorage.open(image, offset=512), read_only=True),
    ]
    listener = listen_unix(str(tmp_path / "socket"))
    with Service(Catalogue(exports), [listener]) as service:
        listed = json.loads(run("nbdinfo", "--json", "--list", service.uri()))["exports"]
        for export in exports:
            size = run("nbdinfo", "--size", service.uri(export.name))
            assert int(size) == export.size
    assert [e["export-name"] for e in listed] == [e.name for e in exports]
    assert [e["export-size"] for e in listed] == [e.size for e in exports]
    assert listed[1]["description"] == "the first half"


def test_nbdinfo_says_that_an_export_is_not_there(run, serve, image):
    done = run("nbdinfo", serve({"": image}).uri("nope"), check=False)
    assert done.returncode
    assert "for export: nope" in done.stderr


def test_nbdcopy_reads(run, uri_by_road, image, tmp_path):
    run("nbdcopy", uri_by_road, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == image.read_bytes()


def test_nbdcopy_writes(run, uri_by_road, image, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(random.Random(2).randbytes(SIZE))
    run("nbdcopy", "--flush", source, uri_by_road)
    assert image.read_bytes() == source.read_bytes()


def test_nbdcopy_writes_holes_as_holes(run, uri, image, tmp_path):
    source = tmp_path / "source"
    source.touch()
    os.truncate(source, SIZE)
    with source.open("r+b") as file:
        file.seek(SIZE // 2)
        file.write(b"island")
    run("nbdcopy", source, uri)
    assert image.read_bytes() == source.read_bytes()
    assert image.stat().st_blocks * 512 < SIZE // 2


def test_nbdcopy_from_export_to_export(run, serve, image, tmp_path):
    other = tmp_path / "other"
    other.write_bytes(bytes(SIZE))
    service = serve({"a": image, "b": other})
    run("nbdcopy", service.uri("a"), service.uri("b"))
    assert other.read_bytes() == image.read_bytes()


def test_nbddump_shows_the_content(run, serve, tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"hello, block device" + bytes(493))
    assert "hello, block dev" in run("nbddump", serve({"": path}).uri())


def nbdsh(run, uri, *lines):
    if shutil.which("nbdsh") is None:
        pytest.skip("nbdsh is not installed")
    # It runs the first python3 it finds, and only the distribution's has its module.
    run("env", "PATH=/usr/bin:/bin", "nbdsh", "-u", uri, "-c", "\n".join(lines))


def test_nbdsh_sees_every_error(run, uri, image):
    # Without libnbd's own checks, so that the requests reach the server.
    nbdsh(
        run,
        uri,
        "import errno",
        "h.set_strict_mode(0)",
        "size = h.get_size()",
        "def fails(code, call, *args, **more):",
        "    try: call(*args, **more)",
        "    except nbd.Error as e: assert e.errno == code, (e.errno, code)",
        "    else: raise AssertionError('it worked')",
        "fails('EINVAL', h.pread, 1, size)",
        "fails('ENOSPC', h.pwrite, b'x', size)",
        "fails('ENOSPC', h.zero, 2, size - 1)",
        "fails('EINVAL', h.trim, 2, size - 1)",
        "fails('EINVAL', h.flush, 1 << 7)",
        "assert len(h.pread(512, 0)) == 512",
    )
    assert len(image.read_bytes()) == SIZE


def test_nbdsh_cannot_write_what_is_read_only(run, serve, image):
    before = image.read_bytes()
    nbdsh(
        run,
        serve({"": image}, read_only=True).uri(),
        "h.set_strict_mode(0)",
        "for call in (lambda: h.pwrite(b'x' * 512, 0), lambda: h.zero(512, 0),",
        "             lambda: h.trim(512, 0)):",
        "    try: call()",
        "    except nbd.Error as e: assert e.errno == 'EPERM', e.errno",
        "    else: raise AssertionError('it worked')",
    )
    assert image.read_bytes() == before


def test_what_one_connection_wrote_another_reads(run, uri):
    nbdsh(
        run,
        uri,
        "other = nbd.NBD()",
        f"other.connect_uri({uri!r})",
        "assert h.can_multi_conn()",
        "for i in range(200):",
        "    data = bytes([i]) * 1000",
        "    h.pwrite(data, 500 * i)",
        "    assert other.pread(1000, 500 * i) == data",
        "    other.zero(10, 500 * i)",
        "    assert h.pread(10, 500 * i) == bytes(10)",
        "other.flush()",
        "other.shutdown()",
    )


def test_many_requests_in_flight_from_one_client(run, uri, image):
    nbdsh(
        run,
        uri,
        "bufs = []",
        "for i in range(500):",
        "    h.aio_pwrite(bytes([i % 256]) * 3000, 3000 * i)",
        "while h.aio_in_flight(): h.poll(-1)",
        "for i in range(500):",
        "    b = nbd.Buffer(3000)",
        "    bufs.append(b)",
        "    h.aio_pread(b, 3000 * i)",
        "while h.aio_in_flight(): h.poll(-1)",
        "assert [bytes(b.to_bytearray()) for b in bufs] == "
        "[bytes([i % 256]) * 3000 for i in range(500)]",
    )
    assert image.read_bytes()[3000 * 77 : 3000 * 78] == bytes([77]) * 3000


# qemu.


def test_qemu_img_compares(run, uri_by_road, image):
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", image, uri_by_road)


def test_qemu_img_converts_both_ways(run, uri, image, tmp_path):
    copy = tmp_path / "copy.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri, copy)
    image.write_bytes(bytes(SIZE))
    run("qemu-img", "convert", "-n", "-f", "qcow2", "-O", "raw", copy, uri)
    assert image.read_bytes() == random.Random(1).randbytes(SIZE)


def qemu_io(run, uri, *commands):
    words = [word for command in commands for word in ("-c", command)]
    said = run("qemu-io", "-f", "raw", uri, *words)
    assert "verification failed" not in said
    assert "error" not in said.lower()
    return said


def test_qemu_io_reads_the_pattern_it_wrote(run, uri, image):
    qemu_io(
        run,
        uri,
        "write -P 0x55 0 64k",
        "write -P 0xaa -f 1M 3M",
        "write -P 0x11 8191 3",
        "flush",
        "read -P 0x55 0 8191",
        "read -P 0x11 8191 3",
        "read -P 0x55 8194 57342",
        "read -P 0xaa 1M 3M",
    )
    assert image.read_bytes()[1 << 20 : 4 << 20] == b"\xaa" * (3 << 20)


@pytest.mark.parametrize("how", ["-z", "-z -u", "-z -f", "-z -n"])
def test_qemu_io_writes_zeroes(run, uri, image, how):
    before = image.read_bytes()
    qemu_io(run, uri, f"write {how} 1M 1M", "read -P 0 1M 1M")
    after = image.read_bytes()
    assert after[1 << 20 : 2 << 20] == bytes(1 << 20)
    assert after[: 1 << 20] + after[2 << 20 :] == before[: 1 << 20] + before[2 << 20 :]


def test_qemu_io_discards(run, uri, image):
    before = image.read_bytes()
    qemu_io(run, uri, "discard 1M 8M", "flush")
    after = image.read_bytes()
    assert after[: 1 << 20] + after[9 << 20 :] == before[: 1 << 20] + before[9 << 20 :]
    assert image.stat().st_blocks * 512 <= 9 << 20


def test_qemu_io_cannot_write_what_is_read_only(run, serve, image):
    uri = serve({"": image}, read_only=True).uri()
    before = image.read_bytes()
    done = run("qemu-io", "-f", "raw", uri, "-c", "write 0 512", check=False)
    assert done.returncode
    assert image.read_bytes() == before


# fio.


@pytest.mark.parametrize("size", ["4k", "512-128k"])
@pytest.mark.parametrize("road", ROADS[:2], ids=["unix", "v4"])
def test_fio_verifies(run, serve, image, tmp_path, size, road):
    key = "bsrange" if "-" in size else "bs"
    said = run(
        "fio",
        "--name=verify",
        "--ioengine=nbd",
        f"--uri={serve({'': image}, **road).uri()}",
        "--rw=randrw",
        f"--{key}={size}",
        f"--size={SIZE // 2}",
        "--iodepth=16",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--randrepeat=1",
        "--fsync=64",
        f"--aux-path={tmp_path}",
        "--output-format=json",
    )
    (job,) = json.loads(said[said.index("{") :])["jobs"]
    assert job["error"] == 0
    assert job["write"]["total_ios"] > 0
