"""nbdinfo and nbddump against `nbdlink serve`: every form of what they print."""

from __future__ import annotations

import contextlib
import json
import re
from itertools import groupby

import pytest

from .conftest import in_memory
from .ours import full, layout, serving, sparse

pytestmark = pytest.mark.interop

SIZE = 8 << 20


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    """Four files, served under their names, and the URIs; for tests that do not write."""
    folder = tmp_path_factory.mktemp("gallery")
    with in_memory() as memory, contextlib.ExitStack() as stack:
        files = {
            "sparse-disk": sparse(folder / "sparse-disk"),
            "full-disk": full(folder / "full-disk"),
            "sparse-tmpfs": sparse(memory / "sparse-tmpfs"),
            "full-tmpfs": full(memory / "full-tmpfs"),
        }
        server = stack.enter_context(serving(folder, *files.values()))
        yield {
            name: (path, uri) for (name, path), uri in zip(files.items(), server.uris, strict=True)
        }


FILES = ["sparse-disk", "full-disk", "sparse-tmpfs", "full-tmpfs"]


@pytest.fixture(params=FILES)
def exported(request, gallery):
    return gallery[request.param]


# What an export is and can.


def test_nbdinfo_prints_all_about_an_export(run, gallery):
    _, uri = gallery["sparse-tmpfs"]
    said = run("nbdinfo", uri)
    assert said.startswith("protocol: newstyle-fixed without TLS, using structured packets\n")
    lines = [line.strip() for line in said.splitlines()]
    assert 'export="sparse-tmpfs":' in lines
    assert "export-size: 8388608 (8M)" in lines
    assert lines[lines.index("contexts:") + 1] == "base:allocation"
    assert f"uri: {uri}" in lines
    for line in ("is_read_only: false", "can_df: true", "block_size_maximum: 33554432"):
        assert line in lines


def test_nbdinfo_finds_the_context_for_block_status(run, gallery):
    (export,) = json.loads(run("nbdinfo", "--json", gallery["full-disk"][1]))["exports"]
    assert export["contexts"] == ["base:allocation"]


def test_nbdinfo_lists_in_the_order_of_the_command_line(run, gallery):
    said = run("nbdinfo", "--list", gallery["full-disk"][1])
    assert re.findall(r'^export="(.*)":$', said, re.MULTILINE) == FILES


def test_nbdinfo_tells_the_description(run, program, tmp_path):
    words = "words for people, \u00e4\u4e2d"
    server = program("-x", "disk", "-D", words, full(tmp_path / "image"))
    (export,) = json.loads(run("nbdinfo", "--json", "--list", server.uri))["exports"]
    assert export["export-name"] == "disk"
    assert export["description"] == words


@pytest.mark.parametrize("size", [1, 511, 4097, (1 << 20) + 777])
def test_nbdinfo_tells_the_size_to_the_byte(run, program, tmp_path, size):
    server = program(full(tmp_path / "image", size))
    assert run("nbdinfo", "--size", server.uri) == f"{size}\n"


CAN = [
    "cache", "connect", "df", "fast-zero", "flush", "fua", "multi-conn", "read",
    "structured-reply", "trim", "write", "zero",
]  # fmt: skip


@pytest.mark.parametrize("ability", CAN)
def test_nbdinfo_can(run, gallery, ability):
    run("nbdinfo", "--can", ability, gallery["sparse-disk"][1])


def test_nbdinfo_can_do_nothing_that_writes_where_that_is_refused(run, program, tmp_path):
    server = program("-r", full(tmp_path / "image"))
    # 2 is nbdinfo's exit status for "no", 1 would be an error.
    status = {
        ability: run("nbdinfo", "--can", ability, server.uri, check=False).returncode
        for ability in CAN
    }
    refused = {"fast-zero", "trim", "write", "zero"}
    assert status == {ability: 2 if ability in refused else 0 for ability in CAN}
    run("nbdinfo", "--is", "read-only", server.uri)


def test_nbdinfo_is_neither_read_only_nor_tls(run, gallery):
    uri = gallery["sparse-disk"][1]
    for quality in ("read-only", "tls"):
        assert run("nbdinfo", "--is", quality, uri, check=False).returncode == 2


def test_nbdinfo_sees_that_memory_does_not_rotate(run, gallery):
    done = run("nbdinfo", "--is", "rotational", gallery["full-tmpfs"][1], check=False)
    assert done.returncode == 2, done.stderr


# Where data is.


def mapped(said):
    """Give an nbdinfo --map in the form of `layout`."""
    assert all(one["type"] in (0, 3) for one in said)
    return [(one["offset"], one["length"], one["type"] == 0) for one in said]


def test_nbdinfo_maps_what_the_file_has(run, exported):
    path, uri = exported
    assert mapped(json.loads(run("nbdinfo", "--map", "--json", uri))) == layout(path)


def test_nbdinfo_prints_the_same_map(run, exported):
    path, uri = exported
    rows = [line.split() for line in run("nbdinfo", "--map", uri).splitlines()]
    words = {True: ["0", "data"], False: ["3", "hole,zero"]}
    assert rows == [[str(at), str(count), *words[data]] for at, count, data in layout(path)]


def test_nbdinfo_counts_data_and_holes(run, exported):
    path, uri = exported
    totals = json.loads(run("nbdinfo", "--map", "--totals", "--json", uri))
    there = layout(path)
    wanted = {
        number: sum(count for _, count, data in there if data is is_data)
        for number, is_data in ((0, True), (3, False))
    }
    assert {one["type"]: one["size"] for one in totals} == {k: v for k, v in wanted.items() if v}
    assert len(run("nbdinfo", "--map", "--totals", uri).splitlines()) == len(totals)


def test_nbdinfo_maps_a_window_from_its_start(run, program, tmp_path):
    path = sparse(tmp_path / "image")
    server = program("-o", "64K", "--size", "192K", path)
    said = json.loads(run("nbdinfo", "--map", "--json", server.uri))
    assert mapped(said) == [(0, 128 << 10, True), (128 << 10, 64 << 10, False)]


def test_nbdinfo_maps_thousands_of_extents(run, program, place):
    path = place / "image"
    with path.open("wb") as file:
        file.truncate(5000 * 8192)
        for at in range(0, 5000 * 8192, 8192):
            file.seek(at)
            file.write(b"island")
    there = layout(path)
    assert len(there) == 10000
    server = program(path)
    assert mapped(json.loads(run("nbdinfo", "--map", "--json", server.uri))) == there


# nbddump.


def hexdump(data):
    """Print as nbddump (1.14) does: rows of 16 bytes, a star for those like the one before."""
    rows = [data[at : at + 16] for at in range(0, len(data), 16)]
    lines, at = [], 0
    for row, group in groupby(rows):
        count = len(list(group))
        halves = [row[:8].hex(" "), row[8:].hex(" ")]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        lines.append(f"{at:010x}: {halves[0]:<24} {halves[1]:<23} |{text}|")
        lines += ["*"] * (count > 1)
        at += 16 * count
    return lines


@pytest.mark.parametrize("name", ["sparse-disk", "sparse-tmpfs"])
def test_nbddump_prints_every_byte(run, gallery, name):
    path, uri = gallery[name]
    assert run("nbddump", uri).splitlines() == hexdump(path.read_bytes())
