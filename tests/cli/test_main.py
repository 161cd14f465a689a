"""The command line as a whole: exit codes, errors in one line, manual pages, lazy imports."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nbdlink.cli.main import VERBS, main
from nbdlink.version import __version__

MAN = Path(__file__).parents[2] / "man"


def nbdlink(*words, **options):
    command = [sys.executable, "-m", "nbdlink", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, **options)


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"nbdlink {__version__}\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "VERB"),
        (["nonsense"], "'nonsense'"),
        (["list", "--nonsense"], "--nonsense"),
        (["info"], "TARGET|DEVICE"),
        (["serve", "--cache", "x", "y"], "--cache"),
        (["qemu-nbd", "--cache", "x", "y"], "--cache"),
    ],
)
def test_a_wrong_command_line_ends_with_2_and_two_lines(words, says, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    what, hint = capsys.readouterr().err.splitlines()
    assert says in what
    verb = f" {words[0]}" if words and words[0] in VERBS else ""
    assert hint == f"  hint: see nbdlink{verb} --help"


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["atach", "store1"], "attach"),
        (["exports", "--jsn", "store1"], "--json"),
        (["serve", "--prot=10809", "disk.img"], "--port"),
        (["serve", "--cache", "nne", "disk.img"], "none"),
        (["mirror", "stats"], "status"),
    ],
)
def test_a_slip_is_told_with_what_was_meant(words, meant, capsys):
    with pytest.raises(SystemExit):
        main(words)
    assert capsys.readouterr().err.splitlines()[1:] == [f"  hint: did you mean {meant}?"]


def test_a_verb_that_there_is_not_does_not_bring_a_list_of_all(capsys):
    with pytest.raises(SystemExit):
        main(["nonsense"])
    assert capsys.readouterr().err.startswith("nbdlink: there is no verb 'nonsense'\n")


@pytest.mark.parametrize(
    ("place", "says"),
    [
        (("-b", "192.0.2.1"), "ip address"),
        (("-k", "no/such/folder/socket"), "mkdir -p no/such/folder"),
    ],
)
def test_a_server_that_cannot_listen_says_what_next(place, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("disk.img").write_bytes(bytes(4096))
    assert main(["serve", "-f", "raw", "-p", "0", *place, "disk.img"]) == 1
    assert says in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "next_"),
    [
        (["attach", "/dev/nbd0", "store1/data"], "nbdlink attach store1/data /dev/nbd0"),
        (["info", "--tls-psk", "no/file", "nbds://store1"], "`man nbdlink-tls`"),
        (["serve", "-f", "raw", ""], "name a file"),
        (["serve", "-f", "qcow2", "-r", __file__], "`qemu-img info`"),
    ],
)
def test_a_beginners_mistake_is_told_with_what_next(words, next_, capsys):
    assert main(words)
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"  hint: {next_}")


def test_a_file_where_a_server_is_wanted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("disk.invalid").write_bytes(bytes(4096))
    for word in ("disk.invalid", "./disk.invalid"):
        assert main(["map", word])
        assert "nbdlink serve" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["info", "nbd://host/?sokcet=x"], 2, "unknown parameter 'sokcet'"),
        (["exports", "127.0.0.1:1"], 1, "connection refused"),
        (["info", "nbds://127.0.0.1:1"], 1, "connection refused"),
        (["attach", "h", "-C", "0"], 2, "0 connections"),
        (["attach", "h", "-C", "65"], 2, "65 connections"),
        (["attach", "h", "--timeout", "0"], 2, "timeout of 0"),
        (["attach", "h", "--dead-timeout", "-1"], 2, "dead timeout of -1"),
        (["attach", "h", "--block-size", "x"], 2, "'x' is not a size"),
        (["serve", "x", "--offset", "y"], 2, "--offset: 'y' is not a size"),
        (["serve", "x", "--size", "y"], 2, "--size: 'y' is not a size"),
        (["attach", "h/a", "-x", "b"], 2, "named twice"),
        (["attach", "h", "--name", "a/b"], 2, "cannot name a link"),
        (["attach", "h", "--name", "nbd0"], 2, "name of a device"),
        (["detach"], 2, "name what to detach"),
        (["detach", "--all", "x"], 2, "name what to detach"),
        (["detach", "nosuchlink"], 1, "no link named 'nosuchlink'"),
        (["serve", "/nonexistent"], 1, "/nonexistent cannot be opened"),
        (["serve", "/dev/null"], 1, "character device"),
        (["serve", "/"], 1, "is a directory"),
        (["serve", "x=", "y"], 2, "names no storage"),
        (["serve", "a", "b", "-x", "c"], 2, "for a single storage"),
        (["serve", "a", "-p", "65536"], 2, "'65536' is not a port"),
        (["serve", "a", "-e", "-1"], 2, "cannot be negative"),
        (["serve", "a", "--negotiation-timeout", "0"], 2, "is not a time in seconds"),
        (["serve", "a", "-o", "-5"], 2, "is not a size"),
        (["serve", "-b", "a..b", str(MAN / "nbdlink.8")], 1, "is not a host name"),
        (["info", "h", "--timeout", "nan"], 2, "'nan' is not a time"),
        (["info", "h", "--timeout", "inf"], 2, "'inf' is not a time"),
        (["exports", "h", "--timeout", "-1"], 2, "'-1' is not a time"),
        (["attach", "h", "--block-size", "0"], 2, "block size of 0"),
        (["attach", "h", "--block-size", "8K"], 2, "block size of 8192"),
        (["attach", "h", "/dev/nbd4294967296"], 1, "cannot exist"),
        (["doctor", "--tls", "require"], 2, "yet no TARGET"),
        (["doctor", "nbds://h", "--tls", "off"], 2, "contradicts"),
        (["doctor", "/dev/nbd4294967296"], 1, "cannot exist"),
    ],
)
def test_a_mistake_gets_one_clear_line_and_its_status(words, status, says, capsys):
    assert main(words) == status
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert says in lines[0]
    assert lines[0].startswith("nbdlink: ")
    assert len(lines) <= 2
    assert out == ""


def test_a_mistake_cannot_steer_the_terminal(capsys):
    assert main(["info", "ho\x1b[2Jst"]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_output_into_a_closed_pipe_is_no_error(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "nbdlink", "list", "--json"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=100)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("words", [["list", "--json"], ["doctor"]])
def test_output_that_cannot_be_written_is_said(words):
    command = [sys.executable, "-m", "nbdlink", *words]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=100)
    assert done.returncode == 1
    assert done.stderr == "nbdlink: the output cannot be written: no space left on device\n"


@pytest.mark.parametrize("words", ["list", "doctor 127.0.0.1:1"])
def test_a_closed_stdout_is_no_bug(words):
    command = f"{sys.executable} -m nbdlink {words} >&-"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, timeout=100)
    assert b"bug" not in done.stderr


def test_a_closed_stdout_is_no_error():
    command = f"{sys.executable} -m nbdlink list --json >&-"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, timeout=100)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_bug_of_ours_is_one_line_that_can_be_reported(monkeypatch, capsys):
    def broken(_):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("nbdlink.cli.show.run_list", broken)
    assert main(["list"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "nbdlink: unexpected ZeroDivisionError: division by zero"
    assert "-vv" in lines[1]


def test_an_interrupted_command_ends_with_130(tmp_path):
    # A listener that never answers: the command waits in its handshake until it is interrupted.
    with socket.socket(socket.AF_UNIX) as listener:
        path = str(tmp_path / "socket")
        listener.bind(path)
        listener.listen()
        command = [sys.executable, "-m", "nbdlink", "info", f"nbd+unix:///?socket={path}"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        connection, _ = listener.accept()
        with connection:
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=100)
    assert (process.returncode, err) == (130, "nbdlink: interrupted\n")


def test_who_interrupts_at_once_sees_no_more(tmp_path):
    # An import that is interrupted, as one of the many before the command begins may be.
    (tmp_path / "argparse.py").write_text("import _signal\n_signal.raise_signal(2)\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{MAN.parent}"}
    done = nbdlink("list", env=environment)
    assert (done.returncode, done.stderr) == (130, "nbdlink: interrupted\n")


def test_a_second_interrupt_changes_nothing():
    # It comes while the first is told of.
    program = (
        "import sys, _signal\n"
        "class Slow:\n"
        "    def write(self, text): _signal.raise_signal(2); sys.__stderr__.write(text)\n"
        "    def flush(self): pass\n"
        "import nbdlink.cli.main, nbdlink.__main__\n"
        "sys.stderr = Slow()\n"
        "nbdlink.cli.main.main = lambda: _signal.raise_signal(2)\n"
        "nbdlink.__main__.run()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "nbdlink: interrupted\n")


@pytest.mark.parametrize("page", sorted(MAN.iterdir()), ids=lambda page: page.name)
def test_an_example_is_one_line_of_80_columns(page):
    # `man` leaves two columns free at the end, and the macro indents by eleven.
    examples = [line[4:] for line in page.read_text().splitlines() if line.startswith(".Dl ")]
    assert [each for each in examples if len(re.sub(r"\\(.)", r"\1", each)) > 80 - 2 - 11] == []


@pytest.mark.parametrize("verb", VERBS)
def test_help_fits_a_terminal_of_80_columns(verb):
    done = nbdlink(verb, "--help", env={**os.environ, "COLUMNS": "80"})
    assert done.returncode == 0
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_options_may_stand_between_the_target_and_the_device(capsys):
    words = ["attach", "host", "--name", "x", "/dev/nbd0", "--timeout", "0"]
    assert main(words) == 2
    assert "a timeout of 0 seconds is not possible" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "unneeded"),
    [
        (["attach", "127.0.0.1:1"], ["rich", "pyroute2", "asyncio", "nbdlink.server"]),
        (["exports", "127.0.0.1:1"], ["rich", "pyroute2", "pyudev", "asyncio", "nbdlink.server"]),
        (["serve", "/nonexistent"], ["rich", "pyroute2", "pyudev", "asyncio", "nbdlink.client"]),
        (["detach", "nosuchlink"], ["rich", "pyroute2", "pyudev", "asyncio", "nbdlink.server"]),
    ],
)
def test_nothing_is_imported_that_a_verb_does_not_need(words, unneeded):
    code = (
        "import sys; from nbdlink.cli.main import main; main(sys.argv[1:]);"
        f"print([name for name in {unneeded!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=100
    )
    assert done.stdout.splitlines()[-1] == "[]"
