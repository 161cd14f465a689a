"""`nbdlink copy` from the command line: what it prints, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nbdlink.cli.main import main
from nbdlink.server import serve_in_thread

from .programs import nbdlink

SIZE = 1 << 20
PAGE = Path(__file__).parents[2] / "man" / "nbdlink-copy.8"


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.img"
    with path.open("wb") as file:
        file.write(os.urandom(SIZE // 2))
        file.truncate(SIZE)
    return path


def test_nothing_is_said_where_nobody_watches(source, tmp_path, capsys):
    assert main(["copy", str(source), str(tmp_path / "new")]) == 0
    assert capsys.readouterr() == ("", "")
    assert (tmp_path / "new").read_bytes() == source.read_bytes()


def test_json_says_what_was_done_in_documented_keys(source, tmp_path, capsys):
    assert main(["copy", "--json", "--verify", str(source), str(tmp_path / "new")]) == 0
    sheet = json.loads(capsys.readouterr().out)
    assert (sheet["bytes"], sheet["data"], sheet["zeroes"]) == (SIZE, SIZE // 2, SIZE // 2)
    assert sheet["verified"] is True
    assert sheet["rate"] > 0
    assert set(sheet) <= set(re.findall(r"^\.It Li (.+)$", PAGE.read_text(), re.M))


def test_progress_is_shown_on_stderr_if_it_is_asked_for(source, tmp_path):
    done = nbdlink("copy", "--progress", source, tmp_path / "new")
    assert (done.returncode, done.stdout) == (0, "")
    assert "copying" in done.stderr
    assert re.search(r"copied 1M \(512K data, 512K zeroes\) in [\d.]+ s, ", done.stderr)


@pytest.mark.parametrize("before", [b"", b"abcd", bytes(9000)])
def test_a_stream_that_ends_in_zeroes_is_copied_to_its_end(tmp_path, before):
    new, data = tmp_path / "new", os.urandom(4096) + bytes(8192)
    new.write_bytes(before)
    command = [sys.executable, "-m", "nbdlink", "copy", "-", str(new)]
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as cat:
        with subprocess.Popen(command, stdin=cat.stdout) as copying:
            cat.stdin.write(data)
            cat.stdin.close()
        assert copying.returncode == 0
    assert new.read_bytes() == data


@pytest.mark.parametrize(
    ("words", "says"),
    [("copy - new <&-", "stdin is closed"), ("copy source.img - >&-", "stdout is closed")],
)
def test_nothing_is_copied_from_or_to_a_closed_stream(words, says, tmp_path):
    (tmp_path / "source.img").write_bytes(bytes(4096))
    done = subprocess.run(
        f"{sys.executable} -m nbdlink {words}",
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert says in done.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("head", "told"), [(b"QFI\xfb\0\0\0\3" + bytes(8184), True), (bytes(8192), False)]
)
def test_an_image_that_is_copied_as_it_is_to_a_disk_is_told(head, told, tmp_path, capsys):
    image, disk = tmp_path / "image", tmp_path / "disk"
    image.write_bytes(head)
    disk.write_bytes(bytes(8192))
    with serve_in_thread({"": disk}, unix=tmp_path / "socket") as service:
        main(["copy", "--progress", str(image), service.uri("")])
    assert ("is a qcow2 image, which is copied as it is" in capsys.readouterr().err) == told


def test_so_it_is_to_an_address_without_a_scheme(tmp_path, capsys):
    image, disk = tmp_path / "image", tmp_path / "disk"
    image.write_bytes(b"QFI\xfb\0\0\0\3" + bytes(8184))
    disk.write_bytes(bytes(8192))
    with serve_in_thread({"": disk}) as service:
        main(["copy", "--progress", str(image), service.uri("").removeprefix("nbd://")])
    assert "is a qcow2 image, which is copied as it is" in capsys.readouterr().err


def test_an_image_remains_one_in_a_file(tmp_path, capsys):
    (tmp_path / "image").write_bytes(b"QFI\xfb\0\0\0\3" + bytes(8184))
    main(["copy", "--progress", str(tmp_path / "image"), str(tmp_path / "new")])
    assert "qcow2" not in capsys.readouterr().err


def test_stdout_gets_the_data_and_nothing_else(source):
    command = [sys.executable, "-m", "nbdlink", "copy", str(source), "-"]
    done = subprocess.run(command, capture_output=True, timeout=60)
    assert (done.stdout, done.stderr) == (source.read_bytes(), b"")


def test_stdout_gets_no_more_zeroes_than_there_are_at_the_end(tmp_path):
    (tmp_path / "source.img").write_bytes(b"x" * 4096 + bytes(4196))
    command = [sys.executable, "-m", "nbdlink", "copy", str(tmp_path / "source.img"), "-"]
    done = subprocess.run(command, capture_output=True, timeout=60, check=True)
    assert done.stdout == b"x" * 4096 + bytes(4196)


def test_stdin_is_read_to_its_end(tmp_path):
    content = os.urandom(700_001)
    command = [sys.executable, "-m", "nbdlink", "copy", "-", str(tmp_path / "new")]
    subprocess.run(command, input=content, timeout=60, check=True)
    assert (tmp_path / "new").read_bytes() == content


def test_a_reader_that_leaves_early_did_not_get_it_all(source):
    command = f"{sys.executable} -m nbdlink copy {source} - | head -c 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=60)
    assert done.stdout.endswith(b"1\n")
    assert done.stderr.startswith(b"nbdlink: stdout cannot be written at ")
    assert done.stderr.count(b"\n") == 2


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["a", "a"], 2, "are the same"),
        (["nothing", "new"], 1, "nothing cannot be opened: no such file"),
        (["nbd://host/?x=y", "new"], 2, "unknown parameter"),
        (["127.0.0.1:1/x", "new"], 1, "connection refused"),
        (["a", "-", "--json"], 2, "both the data and --json"),
        (["a", "b", "-C", "65"], 2, "65 connections"),
        (["a", "b", "--sparse", "5"], 2, "blocks of zeroes of 5 bytes"),
        (["a", "b", "--request-size", "x"], 2, "'x' is not a size"),
        (["a", "/dev/full"], 1, "no space left"),
    ],
)
def test_a_mistake_gets_one_clear_line(words, status, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a").write_bytes(b"x")
    assert main(["copy", *words]) == status
    out, err = capsys.readouterr()
    assert says in err.splitlines()[0]
    assert len(err.splitlines()) <= 2
    assert out == ""


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["nothing", "new"], "an export is written as nbd://host/export"),
        (["folder/nothing", "new"], "check the path"),
        (["a", "folder/sub/new"], "make its folder first: mkdir -p folder/sub"),
        (["a", "a/new"], "check the path: a part of it is no folder"),
    ],
)
def test_a_path_that_cannot_be_opened_is_told_with_advice(
    words, advice, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("a").write_bytes(b"x")
    assert main(["copy", *words]) == 1
    assert capsys.readouterr().err.splitlines()[1] == f"  hint: {advice}"


def test_a_host_that_looks_like_a_file_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("host:1").write_bytes(b"content")
    assert main(["copy", "host:1", "new"]) == 0
    assert Path("new").read_bytes() == b"content"


def test_an_interrupted_copy_leaves_the_server_and_says_that_it_is_incomplete(tmp_path):
    # The data never ends: somebody writes to the pipe for as long as somebody reads it.
    target = tmp_path / "target.img"
    target.write_bytes(bytes(SIZE))
    with serve_in_thread({"": target}, unix=tmp_path / "socket") as service:
        command = [sys.executable, "-m", "nbdlink", "copy", "-", service.uri()]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
        )
        # As much as a pipe does not hold: it has been read from by the time this returns.
        process.stdin.write(bytes(100_000))
        process.send_signal(signal.SIGINT)
        process.wait(20)
        err = process.stderr.read().decode()
        process.stdin.close()
        process.stderr.close()
    assert process.returncode == 130
    assert "is incomplete" in err.splitlines()[0]
    assert err.splitlines()[1:] == ["nbdlink: interrupted"]


def test_a_server_that_never_answers_can_be_left(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        path = str(tmp_path / "socket")
        listener.bind(path)
        listener.listen()
        command = [sys.executable, "-m", "nbdlink", "copy", f"nbd+unix:///?socket={path}", "null:"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        connection, _ = listener.accept()
        with connection:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=20)
    assert process.returncode == 130
