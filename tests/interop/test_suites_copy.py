"""nbdcopy against `nbdlink serve`, by itself and through nbdkit's proxy and its filters."""

from __future__ import annotations

import subprocess

import pytest

from .ours import allocated, full, layout, need, serving, sparse

pytestmark = pytest.mark.interop

SIZE = 8 << 20
BLOCK = 64 << 10

HOW = [
    "--connections=1",
    "--connections=4",
    "--connections=8 --threads=2",
    "--requests=1",
    "--requests=128",
    "--request-size=4096",
    "--request-size=65536 --requests=256",
    "--request-size=33554432",
    "--sparse=0",
    "--sparse=65536",
    "--allocated",
    "--no-extents",
    "--synchronous",
    "--queue-size=1048576",
]


def by_name(how):
    return how.replace("--", "").replace(" ", "+")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A sparse file to read and another one to write, and the URIs of both."""
    folder = tmp_path_factory.mktemp("two")
    source, image = sparse(folder / "source"), full(folder / "image", seed=2)
    with serving(folder, source, image) as server:
        yield source, image, server.uris


@pytest.mark.parametrize("how", HOW, ids=by_name)
def test_nbdcopy_reads_every_byte(run, two, tmp_path, how):
    source, _, (uri, _) = two
    run("nbdcopy", *how.split(), uri, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("how", HOW, ids=by_name)
def test_nbdcopy_writes_every_byte(run, two, how):
    source, image, (_, uri) = two
    with image.open("r+b") as file:
        file.write(b"\xaa" * SIZE)
    run("nbdcopy", "--flush", *how.split(), source, uri)
    assert image.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("road", ["unix", "tcp"])
@pytest.mark.parametrize("make", [sparse, full])
def test_nbdcopy_reads_into_the_same_holes(run, program, place, road, make):
    source, copy = make(place / "source"), place / "copy"
    run("nbdcopy", program(source, road=road).uri, copy)
    assert copy.read_bytes() == source.read_bytes()
    assert layout(copy) == layout(source)


def test_nbdcopy_makes_holes_where_the_source_has_some(run, program, place):
    source, image = sparse(place / "source"), full(place / "image", seed=2)
    run("nbdcopy", "--flush", source, program(image).uri)
    assert image.read_bytes() == source.read_bytes()
    assert layout(image) == layout(source)


def test_nbdcopy_makes_holes_of_zeroes_that_were_written(run, program, place):
    source, image = place / "source", full(place / "image", seed=2)
    source.write_bytes(bytes(SIZE))
    run("nbdcopy", "--flush", "--sparse=4096", source, program(image).uri)
    assert image.read_bytes() == bytes(SIZE)
    assert allocated(image) == 0


def test_nbdcopy_can_keep_all_allocated(run, program, place):
    source, image = sparse(place / "source"), full(place / "image", seed=2)
    run("nbdcopy", "--flush", "--allocated", source, program(image).uri)
    assert image.read_bytes() == source.read_bytes()
    assert allocated(image) >= SIZE


def test_nbdcopy_leaves_holes_alone_that_are_known_to_be_zero(run, program, place):
    source, image = sparse(place / "source"), place / "image"
    with image.open("wb") as file:
        file.truncate(SIZE)
    run("nbdcopy", "--flush", "--destination-is-zero", source, program(image).uri)
    assert image.read_bytes() == source.read_bytes()
    assert layout(image) == layout(source)


def test_nbdcopy_reads_a_size_that_is_no_multiple_of_a_block(run, program, tmp_path):
    source, copy = full(tmp_path / "source", (1 << 20) + 777), tmp_path / "copy"
    run("nbdcopy", program(source).uri, copy)
    assert copy.read_bytes() == source.read_bytes()


def test_nbdcopy_leaves_what_lies_behind_a_shorter_source(run, program, tmp_path):
    source, image = full(tmp_path / "source", 1 << 20), full(tmp_path / "image", seed=2)
    behind = image.read_bytes()[1 << 20 :]
    run("nbdcopy", source, program(image).uri)
    assert image.read_bytes() == source.read_bytes() + behind


def test_nbdcopy_does_not_copy_what_does_not_fit(run, program, tmp_path):
    source, image = full(tmp_path / "source", SIZE + 1), full(tmp_path / "image", seed=2)
    before = image.read_bytes()
    done = run("nbdcopy", source, program(image).uri, check=False)
    assert "destination size is smaller" in done.stderr
    assert image.read_bytes() == before


def test_nbdcopy_writes_what_comes_through_a_pipe(program, tmp_path):
    need("nbdcopy")
    image = full(tmp_path / "image")
    data = full(tmp_path / "data", 3 << 20, seed=2).read_bytes()
    command = ["nbdcopy", "--", "-", program(image).uri]
    done = subprocess.run(command, input=data, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert image.read_bytes()[: 3 << 20] == data


def test_nbdcopy_reads_into_a_pipe(program, tmp_path):
    need("nbdcopy")
    image = sparse(tmp_path / "image")
    command = ["nbdcopy", "--", program(image).uri, "-"]
    done = subprocess.run(command, capture_output=True, timeout=60)
    assert done.stdout == image.read_bytes(), done.stderr


@pytest.mark.parametrize("road", ["unix", "tcp"])
def test_nbdcopy_reads_into_nothing(run, program, tmp_path, road):
    run("nbdcopy", program(full(tmp_path / "image"), road=road).uri, "null:")


@pytest.mark.parametrize("make", [sparse, full])
def test_nbdcopy_from_server_to_server(run, program, place, make):
    source, image = make(place / "source"), full(place / "image", seed=2)
    run("nbdcopy", "--flush", program(source, road="tcp").uri, program(image).uri)
    assert image.read_bytes() == source.read_bytes()


def test_nbdcopy_cannot_write_what_is_read_only(run, program, tmp_path):
    source, image = full(tmp_path / "source", seed=2), full(tmp_path / "image")
    before = image.read_bytes()
    done = run("nbdcopy", source, program("-r", image).uri, check=False)
    assert done.returncode != 0
    assert image.read_bytes() == before


# Through nbdkit, which is a client of ours then.


def through_nbdkit(run, uri, *filters, copy, check=True, more=()):
    """Run an nbdcopy by the shell, for which "$uri" is our export behind nbdkit's filters."""
    chosen = [f"--filter={one}" for one in filters]
    return run(
        *("nbdkit", "-U", "-", *chosen, "nbd", f"uri={uri}", *more, "--run", copy), check=check
    )


@pytest.mark.parametrize("more", [[], ["shared=true"]], ids=["each-its-own", "shared"])
def test_nbdkit_passes_on_reads(run, program, tmp_path, more):
    source, copy = sparse(tmp_path / "source"), tmp_path / "copy"
    through_nbdkit(run, program(source).uri, copy=f'nbdcopy "$uri" {copy}', more=more)
    assert copy.read_bytes() == source.read_bytes()
    assert layout(copy) == layout(source)


def test_nbdkit_passes_on_writes(run, program, place):
    source, image = sparse(place / "source"), full(place / "image", seed=2)
    through_nbdkit(run, program(image).uri, copy=f'nbdcopy --flush {source} "$uri"')
    assert image.read_bytes() == source.read_bytes()
    assert layout(image) == layout(source)


def test_checkwrite_agrees_that_a_copy_is_the_same(run, program, tmp_path):
    image = sparse(tmp_path / "image")
    copy = f'nbdcopy --connections=4 {image} "$uri"'
    through_nbdkit(run, program(image).uri, "checkwrite", copy=copy)


def test_checkwrite_finds_one_other_byte(run, program, tmp_path):
    image, other = sparse(tmp_path / "image"), sparse(tmp_path / "other")
    with other.open("r+b") as file:
        file.seek(3 << 20 | 5)
        file.write(b"x")
    copy = f'nbdcopy {other} "$uri"'
    done = through_nbdkit(run, program(image).uri, "checkwrite", copy=copy, check=False)
    assert "data written does not match expected" in done.stderr


def test_cow_takes_writes_for_an_export_that_is_read_only(run, program, tmp_path):
    image, other = sparse(tmp_path / "image"), full(tmp_path / "other", seed=2)
    before, back = image.read_bytes(), tmp_path / "back"
    copy = f'nbdcopy {other} "$uri" && nbdcopy "$uri" {back}'
    through_nbdkit(run, program("-r", image).uri, "cow", copy=copy, more=["shared=true"])
    assert back.read_bytes() == other.read_bytes()
    assert image.read_bytes() == before


def test_cache_writes_back_when_it_is_told_to_flush(run, program, tmp_path):
    image, other = sparse(tmp_path / "image"), full(tmp_path / "other", seed=2)
    copy = f'nbdcopy --flush {other} "$uri"'
    through_nbdkit(run, program(image).uri, "cache", copy=copy)
    assert image.read_bytes() == other.read_bytes()


def test_blocksize_splits_requests_as_small_as_can_be(run, program, tmp_path):
    image, other = full(tmp_path / "image"), full(tmp_path / "other", 2 << 20, seed=2)
    copy = f'nbdcopy --request-size=1048576 {other} "$uri"'
    more = ["maxdata=4096", "maxlen=8192"]
    through_nbdkit(run, program(image).uri, "blocksize", copy=copy, more=more)
    assert image.read_bytes()[: 2 << 20] == other.read_bytes()
