"""`nbdlink serve --config`: what its files may say, and what SIGHUP does."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

import pytest

import nbdlink
from nbdlink.cli.main import build_parser
from nbdlink.cli.serveconfig import EXPORT_KEYS, SERVER_KEYS
from nbdlink.client.negotiate import Negotiation
from nbdlink.client.security import Security, TLSOptions
from nbdlink.errors import NBDError, OptionError
from nbdlink.protocol.constants import TransmissionFlag
from nbdlink.transport.tlsfiles import CredentialFiles
from nbdlink.uri import Target

from .programs import end, run, serving

# Options of a command line that have no key, as it is told nowhere but there.
_NO_KEY = {
    "help", "config", "export-name", "client", "linear", "stripe", "mirror", "persistent", "once",
    "fork", "attach", "trace", "nocache", "object", "tls-creds", "verbose", "signature",
}  # fmt: skip


class Site:
    """A folder with a configuration, and images to serve."""

    def __init__(self, folder):
        self.folder = folder
        self.file = folder / "nbdlink.toml"
        for name in ("one", "two", "three"):
            (folder / f"{name}.img").write_bytes(name.encode().ljust(1 << 16, b"\0"))

    def say(self, text):
        self.file.write_text(text)

    def says(self, text):
        """Give exit status and words of a server that has this file, and does not like it."""
        self.say(text)
        words = ("serve", "-k", self.folder / "socket", "--config", self.file)
        done = run(sys.executable, "-m", "nbdlink", *words)
        return done.returncode, done.stderr.replace(f"{self.folder}/", "")

    @contextlib.contextmanager
    def serving(self, *words, lines=1):
        words = ("-k", self.folder / "socket", "--config", self.file, *words)
        with serving(*words, lines=lines) as (process, _):
            yield Server(self, process)


class Server:
    """A server that has a configuration."""

    def __init__(self, site, process):
        self.site = site
        self.process = process

    def target(self, name=""):
        return Target(socket=str(self.site.folder / "socket"), export=name)

    def connect(self, name):
        return nbdlink.connect(str(self.target(name)))

    def listed(self):
        with Negotiation(self.target()) as negotiation:
            return [export.name for export in negotiation.list_exports()]

    def hang_up(self):
        """Have the files read anew; give what the server says to it."""
        self.process.send_signal(signal.SIGHUP)
        return self.process.stderr.readline()

    def holders(self, image):
        """Give the processes of the server that have an image open."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        path = str(self.site.folder / image)
        found = set()
        for each in (pid, *children):
            for fd in Path(f"/proc/{each}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):  # closed just now
                    if str(fd.readlink()) == path:
                        found.add(int(each))
        return found


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


@pytest.fixture(autouse=True)
def no_pid_files(tmp_path, monkeypatch):
    monkeypatch.setenv("NBDLINK_RUNTIME_DIRECTORY", str(tmp_path / "run"))


ONE = '[export.one]\nstorage = "one.img"\nformat = "raw"\n'
TWO = '[export.two]\nstorage = "two.img"\nformat = "raw"\n'


# What it serves.


def test_the_exports_are_served_under_their_names(site):
    site.say(ONE + TWO)
    with site.serving(lines=2) as server:
        for name in ("one", "two"):
            with server.connect(name) as nbd:
                assert nbd.pread(len(name), 0) == name.encode()


def test_paths_begin_in_the_folder_of_the_file(site, monkeypatch):
    site.say(ONE)
    monkeypatch.chdir("/")
    with site.serving() as server, server.connect("one") as nbd:
        assert nbd.pread(3, 0) == b"one"


def test_the_default_export_has_an_empty_name(site):
    site.say('[export.""]\nstorage = "one.img"\n')
    with site.serving() as server, server.connect("") as nbd:
        assert nbd.pread(3, 0) == b"one"


def test_a_description_is_told(site):
    site.say(ONE + 'description = "words"\n')
    with site.serving() as server, Negotiation(server.target("one")) as negotiation:
        assert negotiation.info().description == "words"


def test_read_only(site):
    site.say(ONE + "read-only = true\n")
    with site.serving() as server, server.connect("one") as nbd:
        assert nbd.can(TransmissionFlag.READ_ONLY)


def test_a_part_of_a_storage(site):
    site.say(ONE + 'offset = 1\nsize = "2"\n')
    with site.serving() as server, server.connect("one") as nbd:
        assert nbd.pread(nbd.size, 0) == b"ne"


def test_several_storages_as_one(site):
    site.say('[export.both]\nlinear = ["one.img", "two.img"]\nformat = "raw"\n')
    with site.serving() as server, server.connect("both") as nbd:
        assert (nbd.size, nbd.pread(3, 1 << 16)) == (2 << 16, b"two")


def test_image_options(site):
    path = site.folder / "one.img"
    site.say(
        f'[export.one]\nimage-opts = true\nstorage = "driver=raw,offset=1,file.filename={path}"\n'
    )
    with site.serving() as server, server.connect("one") as nbd:
        assert nbd.pread(2, 0) == b"ne"


def test_options_of_the_command_line_hold_for_all_that_say_nothing(site):
    site.say(ONE + TWO + "read-only = false\n")
    with (
        site.serving("-r", lines=2) as server,
        server.connect("one") as one,
        server.connect("two") as two,
    ):
        assert [each.can(TransmissionFlag.READ_ONLY) for each in (one, two)] == [True, False]


def test_links_are_left_alone(site):
    site.say('[link.data]\ntarget = "nbd://store1"\n[defaults]\ntimeout = 9\n' + ONE)
    with site.serving() as server:
        assert server.listed() == ["one"]


def test_the_files_of_etc(site, monkeypatch, tmp_path):
    from nbdlink.cli import serveconfig

    monkeypatch.setattr(serveconfig, "CONFIGURATION", site.file)
    monkeypatch.setattr(serveconfig, "DIRECTORY", tmp_path / "more")
    (tmp_path / "more").mkdir()
    site.say(ONE)
    (tmp_path / "more" / "two.toml").write_text(TWO)
    parser = build_parser("serve")
    arguments = parser.parse_args(["serve", "--config"])
    configuration = serveconfig.ServerConfiguration(arguments)
    assert [plan.name for plan in configuration.plans(None)] == ["one", "two"]


# [server].


def test_the_server_is_told_where_to_listen(site, tmp_path):
    site.say(f'[server]\nsocket = "{tmp_path}/other"\n' + ONE)
    with serving("--config", site.file) as (_, (line,)):
        assert line.startswith(f"nbd+unix:///one?socket={tmp_path}/other is ")


def test_the_command_line_counts_more(site, tmp_path):
    site.say(f'[server]\nsocket = "{tmp_path}/other"\nshared = 1\n' + ONE)
    with (
        site.serving("-e", 0) as server,
        server.connect("one") as one,
        server.connect("one") as two,
    ):
        assert one.pread(3, 0) == two.pread(3, 0)
    assert not (tmp_path / "other").exists()


def test_a_number_and_a_range_of_ports(site):
    site.say('[server]\nport = 0\nbind = ["127.0.0.1"]\n' + ONE)
    with serving("--config", site.file) as (_, (line,)):
        assert line.startswith("nbd://127.0.0.1:")


# Who may come.


def _options(user):
    """Write and give what a user of `keys.psk` says."""
    return TLSOptions(files=CredentialFiles(psk="keys.psk", username=user))


@pytest.fixture
def keys(site, monkeypatch):
    monkeypatch.chdir(site.folder)
    keys = site.folder / "keys.psk"
    keys.write_text("web1:" + "11" * 32 + "\nweb2:" + "22" * 32 + "\n")
    keys.chmod(0o600)
    return '[server]\ntls-psk = "keys.psk"\n'


def _names(server, user):
    target = server.target()
    with Negotiation(target, security=Security(target, _options(user))) as negotiation:
        return [export.name for export in negotiation.list_exports()]


def test_an_export_is_for_its_clients_only(site, keys):
    site.say(keys + ONE + 'clients = ["web1"]\n' + TWO)
    with site.serving(lines=2) as server:
        assert (_names(server, "web1"), _names(server, "web2")) == (["one", "two"], ["two"])


def test_clients_of_nobody_knows_who(site):
    status, words = site.says(ONE + 'clients = ["CN=web1"]\n')
    assert (status, words.splitlines()[0]) == (
        2,
        "nbdlink: nbdlink.toml:4: clients do not have to show who they are",
    )


@pytest.mark.parametrize("processes", [0, 3])
def test_sighup_takes_a_client_away(site, keys, processes):
    site.say(keys + ONE + 'clients = ["web1", "web2"]\n')
    with site.serving("--processes", processes) as server:
        assert _names(server, "web2") == ["one"]
        site.say(keys + ONE + 'clients = ["web1"]\n')
        server.hang_up()
        assert "export 'one' has changed" in server.process.stderr.readline()
        # More than there are processes, each of which would have to know.
        assert [_names(server, "web2") for _ in range(5)] == [[]] * 5


@pytest.mark.parametrize("processes", [0, 3])
def test_sighup_adds_and_removes_exports_of_a_server_with_tls(site, keys, processes):
    site.say(keys + ONE + TWO)
    with site.serving("--processes", processes, lines=2) as server:
        site.say(keys + ONE + TWO.replace("two", "three"))
        server.hang_up()
        assert "export 'two' is not offered" in server.process.stderr.readline()
        assert "export 'three' is offered now" in server.process.stderr.readline()
        found = [_names(server, "web1") for _ in range(5)]
        assert found == [["one", "three"]] * 5


# SIGHUP.


def test_sighup_adds_an_export(site):
    site.say(ONE)
    with site.serving() as server:
        site.say(ONE + TWO)
        assert server.hang_up() == (
            f"nbdlink: export 'two' is offered now: {site.folder}/two.img (64K)\n"
        )
        with server.connect("two") as nbd:
            assert nbd.pread(3, 0) == b"two"


def test_sighup_closes_the_file_of_an_export_in_all_processes(site, eventually):
    site.say(ONE + TWO)
    with site.serving("--processes", 3, lines=2) as server:
        assert len(server.holders("two.img")) == 4
        with contextlib.ExitStack() as stack:
            # One in each process.
            clients = [stack.enter_context(server.connect("two")) for _ in range(4)]
            site.say(ONE)
            server.hang_up()
            assert [client.pread(3, 0) for client in clients] == [b"two"] * 4
            assert len(server.holders("two.img")) == 4
        eventually(lambda: server.holders("two.img") == set())
        assert len(server.holders("one.img")) == 4


def test_an_export_that_went_is_told_to_be_unknown(site):
    site.say(ONE + TWO)
    with site.serving(lines=2) as server:
        site.say(ONE)
        server.hang_up()
        with pytest.raises(OptionError, match="there is no export 'two'"):
            server.connect("two")


def test_a_mistake_in_the_file_changes_nothing(site):
    site.say(ONE)
    with site.serving() as server:
        site.say(ONE + "sise = 1\n")
        said = server.hang_up()
        assert said == (
            f"nbdlink: the exports stay as they are: {site.file}:4: unknown key 'sise' in "
            "[export.one] (did you mean size?)\n"
        )
        assert server.listed() == ["one"]


def test_a_changed_server_table_is_told_to_take_a_restart(site):
    site.say(ONE)
    with site.serving() as server:
        site.say("[server]\nshared = 3\n" + ONE)
        assert server.hang_up() == (
            "nbdlink: [server] says something else now, which takes a restart\n"
        )


def test_it_is_found_by_a_daemon_too(site, monkeypatch, eventually):
    site.say(ONE)
    monkeypatch.chdir(site.folder)
    words = ("--fork", "--pid-file", "pid", "-k", "socket", "--config", "nbdlink.toml")
    done = run(sys.executable, "-m", "nbdlink", "serve", *words)
    assert (done.returncode, done.stderr) == (0, "")
    pid = int((site.folder / "pid").read_text())
    try:
        site.say(ONE + TWO)
        os.kill(pid, signal.SIGHUP)
        eventually(lambda: Server(site, None).listed() == ["one", "two"])
    finally:
        os.kill(pid, signal.SIGTERM)
        eventually(lambda: not (site.folder / "pid").exists())


def test_a_mirror_that_came_can_be_asked(site):
    site.say(ONE)
    with site.serving() as server:
        (site.folder / "three.img").write_bytes((site.folder / "two.img").read_bytes())
        site.say(ONE + '[export.m]\nmirror = ["two.img", "three.img"]\nformat = "raw"\n')
        server.process.send_signal(signal.SIGHUP)
        assert any("export 'm' is offered now" in line for line in server.process.stderr)
        done = run(sys.executable, "-m", "nbdlink", "mirror", "status")
        assert f"served by process {server.process.pid}" in done.stdout


def test_a_signature_that_came_keeps_a_second_server_away(site):
    site.say(ONE)
    with site.serving() as server:
        site.say(ONE + TWO + 'signature = "mine"\n')
        server.hang_up()
        words = ("serve", "--signature", "mine", "-k", site.folder / "x", site.folder / "three.img")
        done = run(sys.executable, "-m", "nbdlink", *words)
        assert f"belongs to process {server.process.pid}" in done.stderr


def test_it_ends_in_order(site):
    site.say(ONE + TWO)
    with site.serving(lines=2) as server:
        site.say(ONE)
        server.hang_up()
        assert end(server.process) == (0, "")


# Mistakes.


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "nbdlink.toml: there is no export to serve"),
        ('storage = "one.img"', "nbdlink.toml:1: unknown table [storage]"),
        ("[exports.a]", "nbdlink.toml:1: unknown table [exports]"),
        ("[export]\na = 1", "nbdlink.toml:2: export.a is not a table"),
        ("export = 1", "nbdlink.toml:1: export is not a table"),
        ("[export.a]", "nbdlink.toml:1: the export 'a' has no storage"),
        (
            '[export.a]\nstorage = "one.img"\nmirror = ["two.img"]',
            "nbdlink.toml:1: the export 'a' has storage and mirror",
        ),
        ("[export.a]\nfoo = 1", "nbdlink.toml:2: unknown key 'foo' in [export.a]"),
        ("[export.a]\nstorage = 1", "nbdlink.toml:2: storage takes a text, not the number 1"),
        ('[export.a]\nstorage = ""', "nbdlink.toml:2: storage is empty"),
        ("[export.a]\nmirror = []", "nbdlink.toml:2: mirror is empty"),
        ('[export.a]\nstorage = "a\\u0000b"', "nbdlink.toml:2: storage takes a text, and that"),
        (ONE + 'read-only = "yes"', 'read-only takes true or false, not the text "yes"'),
        (ONE + 'cache = "fast"', 'nbdlink.toml:4: cache takes one of "none", "writeback",'),
        (ONE + "size = []", "nbdlink.toml:4: size takes a text or a number, not a list"),
        (ONE + 'size = "12Q"', "nbdlink.toml:1: size: '12Q' is not a size"),
        (ONE + 'bitmap = [1]', "bitmap takes a text or a list of texts, not the number 1"),
        (ONE + 'stripe-unit = "4K"', "nbdlink.toml:1: stripe-unit is for stripe"),
        (ONE + "clients = []", "nbdlink.toml:4: clients is empty"),
        (ONE + 'signature = "a\\nb"', "its signature has characters that are not printable"),
        ("[server]\nport = 70000\n" + ONE, "nbdlink.toml:2: port: '70000' is not a port"),
        ("[server]\nport = true\n" + ONE, "port takes a text or a number, not true"),
        ("[server]\nshared = 0x" + "f" * 999 + "\n" + ONE, "not one that large"),
        ('[server]\nshared = "x"\n' + ONE, 'shared takes a whole number, not the text "x"'),
        ("[server]\nshared = 2.5\n" + ONE, "shared takes a whole number, not the number 2.5"),
        ("[server]\nstorage = 1\n" + ONE, "unknown key 'storage' in [server]"),
        ("server = 1\n" + ONE, "nbdlink.toml:1: server is not a table"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_place(site, text, words):
    status, said = site.says(text)
    assert status == 2
    assert words in said


def test_an_image_that_is_missing(site):
    status, said = site.says('[export.a]\nstorage = "nope.img"\n')
    assert (status, "nope.img cannot be opened: no such file" in said) == (1, True)


def test_two_files_may_not_have_the_same_export(site, monkeypatch, tmp_path):
    from nbdlink.cli import serveconfig

    monkeypatch.setattr(serveconfig, "CONFIGURATION", site.file)
    monkeypatch.setattr(serveconfig, "DIRECTORY", tmp_path / "more")
    (tmp_path / "more").mkdir()
    site.say(ONE)
    (tmp_path / "more" / "again.toml").write_text("\n" + ONE)
    arguments = build_parser("serve").parse_args(["serve", "--config"])
    with pytest.raises(NBDError, match=r"again.toml:2: the export 'one' is defined already, in"):
        serveconfig.ServerConfiguration(arguments)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["x.img"], "a STORAGE and --config"),
        (["-x", "a"], "--export-name and --config"),
        (["--signature", "a"], "--signature and --config"),
        (["--client", "CN=a"], "--client and --config"),
        (["--size", "1"], "--size and --config"),
        (["--linear"], "--linear and --config"),
        (["-c", "/dev/nbd0"], "--attach and --config"),
    ],
)
def test_what_is_said_of_one_export_belongs_into_the_file(site, words, said):
    site.say(ONE)
    done = run(sys.executable, "-m", "nbdlink", "serve", f"--config={site.file}", *words)
    assert (done.returncode, done.stderr.startswith(f"nbdlink: {said}: the exports")) == (2, True)


def test_a_file_that_anybody_may_write_is_refused(site):
    site.say(ONE)
    site.file.chmod(0o666)
    words = ("serve", "--config", site.file)
    done = run(sys.executable, "-m", "nbdlink", *words)
    assert (done.returncode, "anybody may write it" in done.stderr) == (2, True)


def test_every_option_has_a_key_or_none_for_a_reason():
    (subparsers,) = (a for a in build_parser("serve")._actions if a.dest == "verb")
    options = {
        max(action.option_strings, key=len).removeprefix("--")
        for action in subparsers.choices["serve"]._actions
        if action.option_strings
    }
    assert options - _NO_KEY == {*SERVER_KEYS, *EXPORT_KEYS}
