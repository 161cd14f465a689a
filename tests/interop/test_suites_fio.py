"""fio's verification against `nbdlink serve`."""

from __future__ import annotations

import json

import pytest

from .ours import full

pytestmark = pytest.mark.interop

SIZE = 8 << 20


def fio(run, uri, tmp_path, *options):
    """Run fio's jobs; give what it tells of each. Its verification has failed if it fails."""
    told = tmp_path / "told.json"
    run(
        "fio",
        "--ioengine=nbd",
        f"--uri={uri}",
        "--iodepth=32",
        "--verify_fatal=1",
        "--allow_file_create=0",
        f"--aux-path={tmp_path}",
        "--output-format=json",
        f"--output={told}",
        *options,
        cwd=tmp_path,
    )
    said = told.read_text()
    jobs = json.loads(said[said.index("{") :])["jobs"]
    assert [job["error"] for job in jobs] == [0] * len(jobs)
    return jobs


@pytest.mark.parametrize(
    ("road", "how"),
    [
        ("unix", ["--verify=sha256", "--bsrange=512-256k", "--verify_backlog=32"]),
        ("tcp", ["--verify=md5", "--bs=4k", "--verify_backlog=64", "--verify_async=2"]),
        ("unix", ["--verify=crc32c", "--bssplit=512/20:4k/40:13k/10:256k/30", "--bs_unaligned"]),
        ("tcp", ["--verify=pattern", "--verify_pattern=%o", "--bs=64k"]),
    ],
    ids=["sha256", "md5", "crc32c", "pattern"],
)
def test_fio_reads_what_it_wrote(run, program, place, tmp_path, road, how):
    uri = program(full(place / "image", SIZE), road=road).uri
    (job,) = fio(run, uri, tmp_path, "--name=one", "--rw=randwrite", f"--size={SIZE // 2}", *how)
    assert job["read"]["total_ios"] > 0


def test_fio_verifies_over_another_connection(run, program, place, tmp_path):
    uri = program(full(place / "image", SIZE)).uri
    how = ["--name=one", "--rw=randwrite", f"--size={SIZE}", "--verify=crc32c", "--bs=4k"]
    how += ["--number_ios=1000", "--end_fsync=1"]
    fio(run, uri, tmp_path, *how, "--do_verify=0")
    (job,) = fio(run, uri, tmp_path, *how, "--verify_only")
    assert job["read"]["total_ios"] > 0


def test_fio_finds_what_has_been_changed_behind_its_back(run, program, tmp_path):
    # So that the tests above do not pass because nothing is verified.
    image = full(tmp_path / "image", SIZE)
    uri = program(image).uri
    how = ["--name=one", "--rw=write", "--size=1M", "--verify=crc32c", "--bs=4k"]
    fio(run, uri, tmp_path, *how, "--do_verify=0")
    with image.open("r+b") as file:
        file.seek(123456)
        file.write(b"changed")
    with pytest.raises(AssertionError, match="verify"):
        fio(run, uri, tmp_path, *how, "--verify_only")


@pytest.mark.parametrize("road", ["unix", "tcp"])
def test_fio_jobs_of_their_own_region_do_not_disturb_each_other(run, program, tmp_path, road):
    uri = program(full(tmp_path / "image", SIZE), road=road).uri
    part = SIZE // 4
    how = ["--verify=crc32c", "--bsrange=512-64k", "--rw=randrw", f"--size={part}"]
    words = [f"--name=job{n} --offset={n * part}".split() for n in range(4)]
    jobs = fio(run, uri, tmp_path, *how, *(word for pair in words for word in pair))
    assert len(jobs) == 4


@pytest.mark.parametrize("rw", ["trimwrite", "randtrimwrite"])
def test_fio_trims_and_writes(run, program, place, tmp_path, rw):
    uri = program(full(place / "image", SIZE)).uri
    # One at a time: the write may not be in flight beside the trim of its place, as requests
    # in flight have no order.
    how = ["--name=one", f"--rw={rw}", "--size=1M", "--bs=16k", "--verify=crc32c", "--iodepth=1"]
    (job,) = fio(run, uri, tmp_path, *how)
    assert job["trim"]["total_ios"] > 0
    assert job["write"]["total_ios"] > 0
    assert job["read"]["total_ios"] > 0


def test_fio_flushes_after_every_write(run, program, tmp_path):
    uri = program(full(tmp_path / "image", SIZE)).uri
    how = ["--name=one", "--rw=randwrite", "--size=8M", "--bs=4k", "--fsync=1"]
    (job,) = fio(run, uri, tmp_path, *how, "--number_ios=100", "--verify=crc32c")
    assert job["sync"]["total_ios"] >= 99  # not after the last
