"""Completion: what fits at the cursor, and real shells in which somebody presses Tab."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nbdlink.cli.candidates import candidates, split
from nbdlink.cli.main import VERBS, main
from nbdlink.link import record

from .programs import serving

SCRIPTS = Path(__file__).parents[2] / "completions"
SHELLS = ("bash", "zsh", "fish")


@pytest.fixture(autouse=True)
def patience(request, monkeypatch):
    """Have a busy machine be waited for, but for the tests of what nobody waits for."""
    if "bad_server" not in request.fixturenames:
        monkeypatch.setenv("NBDLINK_COMPLETION_TIMEOUT", "60")


def fitting(*words):
    return [value for value, _ in candidates(words[:-1], words[-1]).values]


def test_verbs():
    assert fitting("de") == ["detach"]


def test_every_verb():
    assert fitting("") == list(VERBS)


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["serve", "--det"], "--detect-zeroes"),
        (["serve", "disk.img", "--onc"], "--once"),
        (["serve", "--cache", "writet"], "writethrough"),
        (["serve", "--config", "--onc"], "--once"),
        (["serve", "--config", "--cache", "writet"], "writethrough"),
        (["serve", "--cache=writet"], "--cache=writethrough"),
        (["attach", "--tls", "req"], "require"),
        (["qemu-nbd", "--dis"], "--discard"),
        (["completion", "f"], "fish"),
        (["qemu-nbd", "--aio", "io"], "io_uring"),
        # As they were begun, with one hyphen or two.
        (["nbd-client", "-bl"], "-block-size"),
        (["nbd-client", "--bl"], "--block-size"),
        (["enbd-server", "-CA"], "-CAfile"),
    ],
)
def test_options_and_choices(words, value):
    assert value in fitting(*words)


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_is_offered(verb):
    assert "--verbose" in fitting(verb, "--")


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["serve", ""], "files"),
        (["serve", "-k", ""], "files"),
        (["serve", "--config", ""], "files"),
        (["serve", "--tls-certificates", ""], "folders"),
        (["copy", "./d"], "files"),
        (["attach", "host", "--tls-psk", "k"], "files"),
        (["list", ""], None),
        (["serve", "--", "--o"], "files"),
        (["nonsense", ""], None),
        (["nbd-client", "-u", ""], "files"),
        (["nbd-client", "-certfile", ""], "files"),
        (["enbd-server", "4017", ""], "files"),
        (["enbd-server", "4017", "a", "-CApath", ""], "folders"),
    ],
)
def test_where_files_fit(words, what):
    found = candidates(words[:-1], words[-1])
    assert (found.values, found.files) == ([], what)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("nbdlink det", ["nbdlink", "det"]),
        ("nbdlink detach ", ["nbdlink", "detach", ""]),
        ("nbdlink serve 'my d", ["nbdlink", "serve", "my d"]),
        ('nbdlink serve "my d', ["nbdlink", "serve", "my d"]),
        (r"nbdlink serve my\ d", ["nbdlink", "serve", "my d"]),
    ],
)
def test_an_unfinished_line_is_split(line, words):
    assert split(line) == words


@pytest.fixture
def known(tmp_path, monkeypatch):
    """Have one link that is configured and one of which there is a record."""
    from nbdlink.link.config import files

    path = tmp_path / "nbdlink.toml"
    path.write_text('[link.data]\ntarget = "nbd://store1/data"\n')
    path.chmod(0o600)
    (tmp_path / "nbdtab").write_text("nbd7 store1 data\n")
    found = files.load(path, tmp_path / "none", tmp_path / "nbdtab")
    monkeypatch.setattr(files, "load", lambda: found)
    monkeypatch.setattr(record, "DIRECTORY", tmp_path)


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["attach", "--name", ""], ["data", "nbdtab-nbd7"]),
        (["supervise", "d"], ["data"]),
        (["attach", "nbd:"], ["nbd://store1/data"]),
        (["attach", "--path", "nbd://s"], ["nbd://store1/data"]),
        (["info", "sto"], ["store1/"]),
        (["exports", ""], ["store1"]),
        (["nbd-client", ""], ["store1", "nbd7"]),
    ],
)
def test_configured_links(words, values):
    assert fitting(*words) == values


def test_a_host_goes_on_with_an_export(known):
    assert candidates(["attach"], "sto").goes_on


@pytest.fixture
def devices(monkeypatch):
    """Have three devices, of which nbd1 is attached."""
    monkeypatch.setattr("nbdlink.kernel.sysfs.indices", lambda: [0, 1, 2])
    monkeypatch.setattr("nbdlink.kernel.sysfs.pid", lambda index: 7 if index == 1 else None)


@pytest.mark.usefixtures("known", "devices")
@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["detach", ""], ["/dev/nbd1"]),
        (["nbd-client", "-d", ""], ["/dev/nbd1"]),
        (["nbd-client", "-check", "/dev/"], ["/dev/nbd1"]),
        (["nbd-client", "host", "10809", ""], ["/dev/nbd0", "/dev/nbd2"]),
        (["qemu-nbd", "-d", ""], ["/dev/nbd1"]),
        (["qemu-nbd", "-c", ""], ["/dev/nbd0", "/dev/nbd2"]),
        (["serve", "--attach=/dev"], ["--attach=/dev/nbd0", "--attach=/dev/nbd2"]),
    ],
)
def test_devices(words, values):
    assert fitting(*words) == values


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Give the address of a server with the exports `data` and `my disk`."""
    folder = tmp_path_factory.mktemp("exports")
    image = folder / "image"
    image.write_bytes(bytes(4096))
    words = ["-f", "raw", "-b", "127.0.0.1", "-p", "0", "--processes", "0"]
    with serving(*words, f"data={image}", f"my disk={image}", lines=2) as (_, lines):
        yield lines[0].split()[0].removeprefix("nbd://").partition("/")[0]


def test_the_exports_of_a_server(server):
    assert fitting("attach", f"{server}/") == [f"{server}/data", f"{server}/my disk"]


def test_the_exports_of_a_server_in_a_uri(server):
    assert fitting("map", f"nbd://{server}/my") == [f"nbd://{server}/my%20disk"]


def test_the_exports_of_a_server_that_has_been_named(server):
    assert fitting("attach", server, "--export", "") == ["data", "my disk"]


def test_the_exports_of_a_server_for_nbd_client(server):
    assert fitting("nbd-client", *server.split(":"), "-N", "d") == ["data"]


@pytest.fixture(params=["silent", "refusing", "no such host"])
def bad_server(request):
    """Give an address where nobody tells exports."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        if request.param == "silent":
            listener.listen()  # the kernel accepts, and nobody ever says a word
        yield (
            "nosuchhost.invalid"
            if request.param == "no such host"
            else (f"127.0.0.1:{listener.getsockname()[1]}")
        )


@pytest.mark.parametrize("shell", SHELLS)
def test_a_server_that_tells_nothing_is_passed_over_in_silence(shell, bad_server):
    line = f"nbdlink attach {bad_server}/"
    words = [line, str(len(line)), ":="] if shell == "bash" else line.split()[1:]
    done = subprocess.run(
        [sys.executable, "-m", "nbdlink", "complete", shell, *words],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("value", ["", "x", "nan", "-1", "1e99"])
def test_a_timeout_that_makes_no_sense_does_no_harm(value, monkeypatch, capsys):
    monkeypatch.setenv("NBDLINK_COMPLETION_TIMEOUT", value)
    assert main(["complete", "zsh", "det"]) == 0
    assert capsys.readouterr().out == "values\ndetach\tunbind devices\n"


@pytest.mark.parametrize("words", [[], ["bash"], ["bash", "a", "b", "c"], ["zsh"], ["fish"]])
def test_what_makes_no_sense_is_passed_over_in_silence(words, capsys):
    assert main(["complete", *words]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_printed(shell, capsys):
    assert main(["completion", shell]) == 0
    assert capsys.readouterr().out == (SCRIPTS / f"nbdlink.{shell}").read_text()


@pytest.mark.parametrize("words", [["zsh", "det"], ["zsh", "serve", "--cac"]])
def test_a_key_press_waits_for_no_library(words):
    code = (
        "import sys; from nbdlink.cli.main import main; main(['complete', *sys.argv[1:]]);"
        "print([n for n in ('rich', 'pyroute2', 'OpenSSL', 'asyncio') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


_STARTS = {
    "bash": (
        ["bash", "--norc", "--noprofile", "-i"],
        'bind -x \'"\\C-x": printf "%s\\n" "$READLINE_LINE" >>"$LINES_FILE"\'\n',
    ),
    "zsh": (
        ["zsh", "-f", "-i"],
        "autoload -Uz compinit; compinit -u -D\n"
        'tell() { print -r -- "$BUFFER" >>"$LINES_FILE" }; zle -N tell; bindkey "^X" tell\n',
    ),
}


class Shell:
    """A shell on a terminal, whose line is written to a file when Ctrl-X is pressed."""

    def __init__(self, name, folder, before="", load=None):
        command, begin = _STARTS[name]
        load = f"source {SCRIPTS / f'nbdlink.{name}'}" if load is None else load
        self._file = folder / "lines"
        self._file.touch()
        binaries = Path(sys.executable).parent
        environment = {
            **os.environ,
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "LINES_FILE": str(self._file),
            "TERM": "dumb",
            "HISTFILE": "/dev/null",
        }
        pid, self._terminal = pty.fork()
        if pid == 0:
            os.chdir(folder)
            os.execvpe(command[0], command, environment)
        self._process = pid
        self.said = ""
        # The words are in pieces, so that the terminal's echo of them is not what is waited for.
        self.type(f"{before}{begin}{load}\nPS1='re''ady> '\n")
        while "ready> " not in self.said:
            self._listen()

    def _listen(self):
        if select.select([self._terminal], [], [], 0.05)[0]:
            self.said += os.read(self._terminal, 65536).decode(errors="replace")

    def type(self, text):
        os.write(self._terminal, text.encode())

    def line(self, text):
        """Type `text` and Tab; give the line as it is then."""
        self.type(f"{text}\t\x18")
        while not (lines := self._file.read_text()).endswith("\n"):
            self._listen()
        return lines.splitlines()[-1]

    def close(self):
        os.kill(self._process, 9)
        os.close(self._terminal)
        os.waitpid(self._process, 0)


@pytest.fixture(params=["bash", "zsh"])
def shell(request, tmp_path):
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    for name in ("disk.img", "my image"):
        (tmp_path / name).touch()
    (tmp_path / "keys").mkdir()
    started = Shell(request.param, tmp_path)
    yield started
    started.close()


def test_a_shell_completes_verbs(shell):
    assert shell.line("nbdlink det") == "nbdlink detach "


def test_a_shell_completes_options(shell):
    assert shell.line("nbdlink serve --detec") == "nbdlink serve --detect-zeroes "


def test_a_shell_completes_values_of_options(shell):
    assert shell.line("nbdlink serve --cache=writet") == "nbdlink serve --cache=writethrough "


def test_a_shell_completes_files(shell):
    assert shell.line("nbdlink serve di") == "nbdlink serve disk.img "


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("nbdlink serve data=di", "nbdlink serve data=disk.img "),
        ("nbdlink serve --pid-file=di", "nbdlink serve --pid-file=disk.img "),
        ("nbdlink serve --tls-certificates=ke", "nbdlink serve --tls-certificates=keys/"),
        ("nbdlink serve -- di", "nbdlink serve -- disk.img "),
        ("nbdlink serve 'my i", "nbdlink serve 'my image' "),
        (r"nbdlink serve data=my\ i", r"nbdlink serve data=my\ image "),
    ],
)
def test_a_shell_completes_files_in_any_place(shell, typed, completed):
    assert shell.line(typed) == completed


def test_a_shell_completes_exports(shell, server):
    assert shell.line(f"nbdlink attach {server}/da") == f"nbdlink attach {server}/data "


def test_a_shell_completes_exports_of_a_uri(shell, server):
    typed = shell.line(f"nbdlink info nbd://{server}/da")
    assert typed.rstrip() == f"nbdlink info nbd://{server}/data"


def test_a_shell_completes_names_with_spaces(shell, server):
    assert shell.line(f"nbdlink info {server}/my") == f"nbdlink info {server}/my\\ disk "


def test_a_shell_is_told_no_errors(shell):
    assert shell.line("nbdlink attach 127.0.0.1:1/d") == "nbdlink attach 127.0.0.1:1/d"
    assert "rror" not in shell.said
    assert "refused" not in shell.said


def test_zsh_finds_the_script_where_it_is_installed(tmp_path):
    if shutil.which("zsh") is None:
        pytest.skip("zsh is not installed")
    shutil.copy(SCRIPTS / "nbdlink.zsh", tmp_path / "_nbdlink")
    started = Shell("zsh", tmp_path, before=f"fpath=({tmp_path} $fpath)\n", load="")
    assert started.line("nbdlink det") == "nbdlink detach "
    started.close()


def fish(line, **options):
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    script = f"source {SCRIPTS / 'nbdlink.fish'}; complete -C $argv[1]"
    done = subprocess.run(
        ["fish", "--no-config", "-c", script, line],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path},
        **options,
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("nbdlink det", ["detach\tunbind devices"]),
        ("nbdlink serve --cache writet", ["writethrough"]),
        ("nbdlink serve --cache=writet", ["--cache=writethrough"]),
        ("nbdlink attach 127.0.0.1:1/d", []),
    ],
)
def test_fish_completes(line, found):
    assert fish(line) == found


def test_fish_completes_files(tmp_path):
    (tmp_path / "disk.img").touch()
    assert [line.split("\t")[0] for line in fish("nbdlink serve di", cwd=tmp_path)] == ["disk.img"]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("nbdlink serve data=di", "data=disk.img"),
        ("nbdlink serve --pid-file=di", "--pid-file=disk.img"),
        ("nbdlink serve --tls-certificates=ke", "--tls-certificates=keys/"),
        ("nbdlink serve -- di", "disk.img"),
        ("nbdlink serve 'my i", "my image"),
        (r"nbdlink serve data=my\ i", "data=my image"),
    ],
)
def test_fish_completes_files_in_any_place(tmp_path, line, found):
    for name in ("disk.img", "my image"):
        (tmp_path / name).touch()
    (tmp_path / "keys").mkdir()
    assert [each.split("\t")[0] for each in fish(line, cwd=tmp_path)] == [found]


def test_fish_completes_exports(server):
    found = fish(f"nbdlink attach {server}/")
    assert [line.split("\t")[0] for line in found] == [f"{server}/data", f"{server}/my disk"]
