"""`nbdlink serve --mirror` and its like, and `nbdlink mirror`, as somebody types them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import time

import pytest

import nbdlink
from nbdlink.storage.mirror.opening import open_mirror
from nbdlink.storage.open import StorageSpec

from .programs import end, run, serving
from .programs import nbdlink as program

SIZE = 1 << 20


@pytest.fixture(autouse=True)
def _directories(tmp_path, monkeypatch):
    monkeypatch.setenv("NBDLINK_STATE_DIRECTORY", str(tmp_path / "state"))
    monkeypatch.setenv("NBDLINK_RUNTIME_DIRECTORY", str(tmp_path / "run"))


@pytest.fixture
def members(tmp_path):
    """Two files of zeroes."""
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_bytes(bytes(SIZE))
    return paths


def served(tmp_path, *words):
    return serving("-f", "raw", "-k", tmp_path / "socket", *words)


def states(sheet):
    return [each["state"] for each in sheet["members"]]


def status(member):
    (sheet,) = json.loads(program("mirror", "status", "--json", member).stdout)
    return sheet


def until_good(member):
    deadline = time.monotonic() + 60
    while states(sheet := status(member)) != ["good", "good"]:
        assert time.monotonic() < deadline, sheet
    return sheet


@pytest.fixture
def degraded(members):
    """A mirror whose second member has been dropped, and lacks something."""
    mirror = open_mirror([StorageSpec(str(path), format="raw") for path in members])
    mirror.wait_until_built(lambda _: None, 1.0)
    with mirror.lock:
        mirror.membership.drop(mirror.members[1], "writing failed: no reason")
    mirror.write(memoryview(b"x" * SIZE), 0, False)
    mirror.close()
    return members


def test_a_mirror_is_served_and_told_of(tmp_path, members):
    with served(tmp_path, "--mirror", *members) as (process, (line,)):
        assert line.endswith(f" is mirror of {members[0]}, {members[1]} (1M)")
        sheet = until_good(members[1])
        assert sheet["server"] == process.pid
        assert sheet["health"] == "good"
        assert [each["address"] for each in sheet["members"]] == list(map(str, members))
        with nbdlink.connect(line.split(" is ")[0]) as nbd:
            nbd.pwrite(b"x" * SIZE, 0)
        status_, log = end(process)
        assert status_ == 0, log
    assert members[0].read_bytes() == members[1].read_bytes() == b"x" * SIZE
    assert status(members[0])["server"] is None
    assert not list((tmp_path / "run").glob("*.sock"))


def test_status_without_a_member_tells_of_all_that_are_served(tmp_path, members):
    assert json.loads(program("mirror", "status", "--json").stdout) == []
    with served(tmp_path, "--mirror", *members):
        until_good(members[0])
        (sheet,) = json.loads(program("mirror", "status", "--json").stdout)
        assert states(sheet) == ["good", "good"]


@pytest.mark.parametrize("by", ["not served", "served by process"])
def test_status_says_why_a_member_is_stale(tmp_path, degraded, by):
    with contextlib.ExitStack() as stack:
        if by != "not served":
            stack.enter_context(served(tmp_path, "--mirror", *degraded))
        said = program("mirror", "status", degraded[0]).stdout.splitlines()
    assert re.match(rf"mirror [0-9a-f]{{16}}: 1M, degraded, {by}", said[0])
    assert said[1].split() == ["MEMBER", "STATE", "HAS", "SINCE", "WHY"]
    assert said[2].split()[:3] == [str(degraded[0]), "good", "100%"]
    assert said[3].split()[:3] == [str(degraded[1]), "stale", "-"]
    assert said[3].endswith("writing failed: no reason")


def test_a_member_is_rebuilt_in_the_server(tmp_path, degraded):
    with served(tmp_path, "--mirror", *degraded) as (process, _):
        done = program("mirror", "rebuild", "--progress", degraded[1])
        assert done.stdout == f"{degraded[1]} is good\n", done.stderr
        assert str(degraded[1]) in done.stderr
        assert states(status(degraded[0])) == ["good", "good"]
        end(process)
    assert degraded[1].read_bytes() == b"x" * SIZE


def test_a_member_is_rebuilt_without_a_server(degraded):
    done = program("mirror", "rebuild", "--json", degraded[1])
    assert states(json.loads(done.stdout)) == ["good", "good"], done.stderr
    assert degraded[1].read_bytes() == b"x" * SIZE
    assert states(status(degraded[1])) == ["good", "good"]


def test_a_rebuild_can_be_left_to_the_server(tmp_path, degraded):
    with served(tmp_path, "--mirror", *degraded):
        assert program("mirror", "rebuild", "--no-wait", degraded[1]).returncode == 0
        until_good(degraded[0])


@pytest.mark.parametrize("running", [True, False], ids=["served", "not served"])
def test_another_file_takes_the_place_of_a_member(tmp_path, degraded, running):
    new = tmp_path / "new"
    new.write_bytes(os.urandom(SIZE + 512))
    words = ["mirror", "rebuild", "--replace", degraded[1], new]
    if running:
        with served(tmp_path, "--mirror", *degraded) as (process, _):
            done = program(*words)
            end(process)
    else:
        done = program(*words)
    assert done.stdout == f"{new} is good\n", done.stderr
    assert new.read_bytes()[:SIZE] == b"x" * SIZE
    # From now on it is the member, and the old one is none.
    assert [m["address"] for m in status(new)["members"]] == [str(degraded[0]), str(new)]
    done = program("serve", "-f", "raw", "-k", tmp_path / "s", "--mirror", *degraded)
    assert done.returncode == 1
    assert "b is no member of the mirror" in done.stderr
    with served(tmp_path, "--mirror", degraded[0], new):
        assert states(status(new)) == ["good", "good"]


def test_the_only_good_member_is_not_replaced(tmp_path, degraded):
    new = tmp_path / "new"
    new.write_bytes(bytes(SIZE))
    done = program("mirror", "rebuild", "--replace", degraded[0], new)
    assert done.returncode == 1
    assert "a is the only member that has everything" in done.stderr
    assert states(status(degraded[0])) == ["good", "stale"]


def test_what_cannot_be_rebuilt_is_told(tmp_path, degraded):
    os.truncate(degraded[1], 512)
    with served(tmp_path, "--mirror", *degraded):
        done = program("mirror", "rebuild", degraded[1])
    assert done.returncode == 1
    assert "b cannot be rebuilt: it has 512 bytes, and the mirror 1048576" in done.stderr


def test_a_member_of_another_mirror_does_not_take_a_place(tmp_path, degraded):
    others = [tmp_path / "c", tmp_path / "d"]
    for path in others:
        path.write_bytes(bytes(SIZE))
    open_mirror([StorageSpec(str(path), format="raw") for path in others]).close()
    done = program("mirror", "rebuild", "--replace", degraded[1], others[0])
    assert done.returncode == 1
    assert f"{others[0]}.mirror is the record of another mirror" in done.stderr
    assert others[0].read_bytes() == bytes(SIZE)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mirror"], "the following arguments are required"),
        (["mirror", "mend"], "invalid choice"),
        (["mirror", "rebuild"], "it is not said what is to be rebuilt"),
        (["mirror", "rebuild", "a", "--replace", "b", "c"], "it is not said what"),
        (["mirror", "status", "--no-wait"], "are for `nbdlink mirror rebuild`"),
        (["serve", "--linear", "--mirror", "a", "b"], "not allowed with argument"),
        (["serve", "--stripe-unit", "4K", "a", "b"], "--stripe-unit is for --stripe"),
        (["serve", "--degraded", "--stripe", "a", "b"], "--degraded is for --mirror"),
        (["serve", "--size", "1M,-", "a", "b"], "for several storages that become one export"),
        (["serve", "--mirror", "--size", "1M", "a", "b"], "1 sizes were given for 2 storages"),
        (["serve", "--mirror", "--size", "-,-,1M", "a", "b"], "3 sizes were given for 2 storages"),
        (["serve", "--mirror", "--image-opts", "a", "b"], "--image-opts is for a single storage"),
        (["serve", "-f", "raw", "--mirror", "a"], "a mirror takes two members or more"),
        (["serve", "-f", "raw", "--mirror", "a", "./a"], "a member of the mirror is named twice"),
    ],
)
def test_a_wrong_command_line_is_told(tmp_path, members, words, said):
    done = program(*words, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mirror", "status", "lonely"], "lonely belongs to no mirror that is known here"),
        (["serve", "-f", "raw", "--linear", "a"], "it takes two storages or more"),
        (["serve", "-f", "raw", "--stripe", "--stripe-unit", "2M", "a", "b"], "is too small"),
        (["serve", "-r", "-f", "raw", "--mirror", "a", "b"], "there is no record of this mirror"),
    ],
)
def test_what_fails_is_told(tmp_path, members, words, said):
    done = program(*words, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert said in done.stderr
    assert "hint" in done.stderr or "--linear" in words or "2M" in words


def test_a_good_member_that_is_missing_stops_the_server(tmp_path, members):
    with served(tmp_path, "--mirror", *members) as (process, _):
        until_good(members[0])
        end(process)
    shutil.move(members[1], tmp_path / "elsewhere")
    words = ["--mirror", *members]
    done = program("serve", "-f", "raw", "-k", tmp_path / "socket", *words)
    assert done.returncode == 1
    assert "b, a good member of the mirror, is not there: it cannot be opened" in done.stderr
    assert "--degraded goes on without it" in done.stderr
    with served(tmp_path, "--degraded", *words):
        assert states(status(members[0])) == ["good", "stale"]


def test_writes_that_are_thrown_away_leave_a_mirror_alone(tmp_path, degraded):
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with (
        served(tmp_path, "-s", "--mirror", *degraded) as (_, (line,)),
        nbdlink.connect(line.split(" is ")[0]) as nbd,
    ):
        nbd.pwrite(b"y" * 4096, 0)
        assert nbd.pread(4096, 0) == b"y" * 4096
        assert nbd.pread(4096, 4096) == b"x" * 4096
    after = {path: path.read_bytes() for path in before}
    assert before == after


def test_windows_lie_on_the_whole(tmp_path, members):
    members[1].write_bytes(b"x" * SIZE)
    with (
        served(tmp_path, "--linear", "-o", "1020K", "--size", "-,8K", *members) as (_, (line,)),
        nbdlink.connect(line.split(" is ")[0]) as nbd,
    ):
        assert nbd.pread(nbd.size, 0) == bytes(4096) + b"x" * 8192


def test_metrics_tell_of_members(tmp_path, degraded):
    metrics = tmp_path / "metrics"
    with served(tmp_path, "--metrics", metrics, "--mirror", *degraded):
        said = run("curl", "-sf", "--unix-socket", metrics, "http://x/metrics").stdout
    assert f'nbdlink_mirror_member_good{{export="",member="{degraded[0]}"}} 1' in said
    assert f'nbdlink_mirror_member_good{{export="",member="{degraded[1]}"}} 0' in said


@pytest.mark.parametrize("sent", [b"", b"{}\n", b"no json\n", b'{"do": 1}\n', b"x" * 100000])
def test_nonsense_at_the_socket_does_no_harm(tmp_path, members, sent):
    with served(tmp_path, "--mirror", *members) as (process, _):
        sheet = until_good(members[0])
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(tmp_path / "run" / f"mirror-{sheet['mirror']}.sock"))
            answer = ""
            with contextlib.suppress(ConnectionError):  # it need not take all of it
                sock.sendall(sent)
                sock.shutdown(socket.SHUT_WR)
                answer = sock.makefile().read()
        assert answer == "" or "does not understand" in answer
        assert states(status(members[0])) == ["good", "good"]
        code, log = end(process)
        assert code == 0
        assert "Traceback" not in log


def test_members_are_completed_with_what_they_are_worth(degraded, tmp_path):
    good, stale = degraded
    with served(tmp_path, "--mirror", good, stale):
        done = program("complete", "zsh", "mirror", "rebuild", "")
    assert done.stdout == f"values\n{good}\tgood\n{stale}\tstale\n"
