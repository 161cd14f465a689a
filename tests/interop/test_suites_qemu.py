"""qemu's tools against `nbdlink serve`: qemu-io, qemu-img, and qemu-nbd as a client."""

from __future__ import annotations

import json

import pytest

from nbdlink.uri import Target

from .ours import allocated, full, layout, sparse
from .peers import qemu_nbd_of

pytestmark = pytest.mark.interop

SIZE = 8 << 20
RAW = ("-f", "raw")


def qemu_io(run, uri, *commands, options=()):
    """Run commands, none of which may fail; give what was said."""
    words = [word for command in commands for word in ("-c", command)]
    said = run("qemu-io", *options, *RAW, uri, *words)
    for complaint in ("verification failed", "error", "failed", "command not found"):
        assert complaint not in said.lower(), said
    return said


# qemu-io.


@pytest.mark.parametrize("cache", ["none", "writeback", "directsync", "writethrough"])
def test_qemu_io_reads_what_it_wrote(run, program, place, cache):
    image = full(place / "image")
    qemu_io(
        run,
        program(image).uri,
        "write -P 0x55 0 64k",
        "write -P 0x11 8191 3",
        "writev -P 0x22 1M 512 4k 70k",
        "write -z 2M 1M",
        "write -z -u 3M 1M",
        "flush",
        "read -P 0x11 8191 3",
        "read -P 0x55 8194 57342",
        "readv -P 0x22 1M 70k 512 4k",
        "read -P 0 2M 2M",
        options=["-t", cache],
    )
    data = image.read_bytes()
    assert data[8190:8195] == b"\x55\x11\x11\x11\x55"
    assert data[2 << 20 : 4 << 20] == bytes(2 << 20)


def test_qemu_io_has_many_in_flight(run, program, place):
    image = full(place / "image")
    writes = [f"aio_write -q -P {n + 1} {n * 100000} 100000" for n in range(60)]
    reads = [f"aio_read -q -P {n + 1} {n * 100000} 100000" for n in range(60)]
    qemu_io(run, program(image).uri, *writes, "aio_flush", *reads, "aio_flush")
    assert image.read_bytes()[: 60 * 100000] == b"".join(bytes([n + 1]) * 100000 for n in range(60))


def test_qemu_io_zeroes_in_the_background(run, program, tmp_path):
    image = full(tmp_path / "image")
    commands = ["aio_write -z -u 1M 1M", "aio_write -z 3M 1M", "aio_flush", "read -P 0 1M 1M"]
    qemu_io(run, program(image).uri, *commands)
    data = image.read_bytes()
    assert data[1 << 20 : 2 << 20] == data[3 << 20 : 4 << 20] == bytes(1 << 20)


def test_qemu_io_gives_back_space(run, program, place):
    image = full(place / "image")
    qemu_io(run, program(image).uri, "discard 1M 4M", "flush", options=["-d", "unmap"])
    assert allocated(image) <= 4 << 20 | 65536


def test_qemu_io_discards_nothing_unless_it_is_told_that_it_may(run, program, place):
    image = full(place / "image")
    qemu_io(run, program(image).uri, "write -z 1M 4M", options=["-d", "ignore"])
    assert allocated(image) >= SIZE


def test_qemu_io_sees_the_length(run, program, tmp_path):
    said = qemu_io(run, program(full(tmp_path / "image")).uri, "length", "map")
    assert said.splitlines()[0] == "8 MiB"
    assert "8 MiB (0x800000) bytes     allocated at offset 0 bytes" in said


# qemu-img.


def mapped(run, where):
    return json.loads(run("qemu-img", "map", "--output=json", *RAW, where))


@pytest.mark.parametrize("make", [sparse, full])
def test_qemu_img_maps_the_export_as_it_maps_the_file(run, program, place, make):
    image = make(place / "image")
    told = mapped(run, program(image).uri)
    assert told == mapped(run, image)
    assert [(one["start"], one["length"], one["data"]) for one in told] == layout(image)


def test_qemu_img_measures_the_export_as_it_measures_the_file(run, program, tmp_path):
    image = sparse(tmp_path / "image")
    command = ["qemu-img", "measure", "-O", "qcow2", "--output=json", *RAW]
    assert run(*command, program(image).uri) == run(*command, image)


def test_qemu_img_tells_about_the_export(run, program, tmp_path):
    uri = program(full(tmp_path / "image")).uri
    told = json.loads(run("qemu-img", "info", "--output=json", uri))
    assert (told["format"], told["virtual-size"]) == ("raw", SIZE)


def test_qemu_img_finds_one_other_byte(run, program, tmp_path):
    image, other = sparse(tmp_path / "image"), sparse(tmp_path / "other")
    with other.open("r+b") as file:
        file.seek(3 << 20 | 5)
        file.write(b"x")
    uri = program(image).uri
    done = run("qemu-img", "compare", *RAW, "-F", "raw", uri, other, check=False)
    assert (done.returncode, "Content mismatch at offset 3145728" in done.stdout) == (1, True)


@pytest.mark.parametrize(
    "how",
    [[], ["-W", "-m", "16"], ["-S", "0"], ["-S", "64k"], ["-t", "none", "-T", "none"]],
    ids=lambda how: " ".join(how) or "plain",
)
def test_qemu_img_converts_both_ways(run, program, tmp_path, how):
    image, copy = sparse(tmp_path / "image"), tmp_path / "copy"
    back = full(tmp_path / "back", seed=2)
    server = program(f"a={tmp_path}/image", f"b={tmp_path}/back")
    run("qemu-img", "convert", *how, *RAW, "-O", "raw", server.uris[0], copy)
    run("qemu-img", "convert", "-n", *how, *RAW, "-O", "raw", copy, server.uris[1])
    assert copy.read_bytes() == back.read_bytes() == image.read_bytes()


def test_qemu_img_converts_to_what_is_known_to_be_zero(run, program, place):
    source, image = sparse(place / "source"), place / "image"
    with image.open("wb") as file:
        file.truncate(SIZE)
    uri = program(image).uri
    run("qemu-img", "convert", "-n", "--target-is-zero", *RAW, "-O", "raw", source, uri)
    assert image.read_bytes() == source.read_bytes()
    assert layout(image) == layout(source)


def test_qemu_img_makes_holes_where_the_source_has_some(run, program, place):
    source, image = sparse(place / "source"), full(place / "image", seed=2)
    run("qemu-img", "convert", "-n", *RAW, "-O", "raw", source, program(image).uri)
    assert image.read_bytes() == source.read_bytes()
    assert layout(image) == layout(source)


def test_qemu_img_copies_blocks(run, program, tmp_path):
    image, copy = full(tmp_path / "image"), tmp_path / "copy"
    # Its count includes the blocks that it skips, unlike dd's (qemu 7.2).
    where = [f"if={program(image).uri}", f"of={copy}", "bs=64k", "skip=3", "count=13"]
    run("qemu-img", "dd", *RAW, "-O", "raw", *where)
    assert copy.read_bytes() == image.read_bytes()[3 << 16 : 13 << 16]


@pytest.mark.parametrize("road", ["unix", "tcp"])
@pytest.mark.parametrize(
    "how",
    [
        ["-c", "1000", "-d", "64", "-t", "none"],
        ["-c", "200", "-d", "16", "-s", "65536", "-S", "36864"],
        ["-c", "4", "-d", "2", "-s", "4194304"],
    ],
    ids=" ".join,
)
def test_qemu_img_bench_reads(run, program, tmp_path, road, how):
    uri = program(full(tmp_path / "image"), road=road).uri
    assert "Run completed" in run("qemu-img", "bench", *RAW, *how, uri)


@pytest.mark.parametrize(
    "flush", [[], ["--flush-interval=64"], ["--flush-interval=64", "--no-drain"]]
)
def test_qemu_img_bench_writes_its_pattern(run, program, place, flush):
    image = full(place / "image")
    how = ["-w", "-c", "1024", "-d", "64", "-t", "none", "--pattern=77", *flush]
    run("qemu-img", "bench", *RAW, *how, program(image).uri)
    assert image.read_bytes()[: 4 << 20] == b"\x4d" * (4 << 20)


# Formats on top of ours.


def test_qemu_opens_a_qcow2_file_that_is_served_as_raw(run, program, tmp_path):
    content, image = sparse(tmp_path / "content"), tmp_path / "image"
    run("qemu-img", "convert", *RAW, "-O", "qcow2", content, image)
    target = Target.parse(program("-f", "raw", image).uri)
    address = f"file.server.type=unix,file.server.path={target.socket}"
    options = f"driver=qcow2,file.driver=nbd,{address}"
    with_options = ["--image-opts", options]
    write = ["-c", "write -P 7 1M 64k", "-c", "write -z 2M 64k"]
    run("qemu-io", *with_options, *write)
    run("qemu-img", "check", *with_options)
    back = tmp_path / "back"
    run("qemu-img", "convert", *with_options, "-O", "raw", back)
    wanted = bytearray(content.read_bytes())
    wanted[1 << 20 : (1 << 20) + 65536] = b"\7" * 65536
    wanted[2 << 20 : (2 << 20) + 65536] = bytes(65536)
    assert back.read_bytes() == wanted


def test_qemu_nbd_passes_an_export_on(run, program, tmp_path):
    image, copy = sparse(tmp_path / "image"), tmp_path / "copy"
    with qemu_nbd_of(program("-r", image).uri, tmp_path, read_only=True) as target:
        run("nbdcopy", target, copy)
        told = json.loads(run("nbdinfo", "--map", "--json", target))
    assert copy.read_bytes() == image.read_bytes()
    assert [(one["offset"], one["length"], one["type"] == 0) for one in told] == layout(image)


def test_qemu_nbd_passes_writes_on(run, program, tmp_path):
    source, image = sparse(tmp_path / "source"), full(tmp_path / "image", seed=2)
    with qemu_nbd_of(program(image).uri, tmp_path) as target:
        run("nbdcopy", "--flush", source, target)
    assert image.read_bytes() == source.read_bytes()
