"""Configuration files: what they mean, and that each mistake in one is told with its place."""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nbdlink.client.security import TLSOptions
from nbdlink.errors import ConfigError
from nbdlink.link.attach import LinkSpec
from nbdlink.link.config.files import load
from nbdlink.link.config.settings import SETTINGS
from nbdlink.transport.tlsfiles import CredentialFiles
from nbdlink.uri import Target

PAGE = Path(__file__).parents[3] / "man" / "nbdlink.toml.5"


class Files:
    """The three places of a configuration."""

    def __init__(self, folder):
        self.folder = folder
        self.main = folder / "nbdlink.toml"
        self.directory = folder / "nbdlink.d"
        self.nbdtab = folder / "nbdtab"

    def load(self):
        return load(self.main, self.directory, self.nbdtab).links

    def say(self, text):
        self.main.write_text(text)
        return self.load()

    def tab(self, text):
        self.nbdtab.write_text(text)
        return self.load()

    def add(self, name, text):
        self.directory.mkdir(exist_ok=True)
        path = self.directory / name
        path.write_text(text)
        return path

    def refusal(self, text=None):
        """Give message and hint, the message without the folder."""
        if text is not None:
            self.main.write_text(text)
        with pytest.raises(ConfigError) as caught:
            self.load()
        return str(caught.value).replace(f"{self.folder}/", ""), caught.value.hint or ""


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


def link(text, files, head='[link.data]\ntarget = "store1/data"\n'):
    return files.say(head + text)["data"]


def test_no_files_say_nothing(files):
    assert files.load() == {}


def test_the_example_of_the_design(files):
    found = files.say("""\
[link.data]
target = "nbds://store1/data"
paths = ["nbds://store2/data"]
device = "/dev/nbd0"
connections = 4
""")["data"]
    assert found.spec == LinkSpec(
        Target.parse("nbds://store1/data"),
        "/dev/nbd0",
        "data",
        connections=4,
        dead_timeout=300,
        paths=(Target.parse("nbds://store2/data"),),
    )
    assert found.source == f"{files.main}:1"
    assert found.notes == ()


def test_every_setting_has_a_field():
    known = {
        "link": {each.name for each in fields(LinkSpec)},
        "tls": {each.name for each in fields(TLSOptions)},
        "files": {each.name for each in fields(CredentialFiles)},
        "route": {"target", "paths", "export"},
    }
    assert [key for key, each in SETTINGS.items() if each.field not in known[each.place]] == []


def test_the_example_of_the_manual(files):
    example = PAGE.read_text().split(".Bd -literal\n")[1].split(".Ed")[0]
    assert list(files.say(example)) == ["data", "scratch"]


@pytest.mark.parametrize("key", SETTINGS)
def test_the_manual_has_every_key(key):
    keys = PAGE.read_text().split(".Sh KEYS")[1].split(".Sh NBDTAB")[0]
    assert re.search(rf"^\.It Li (\S+ , )*{key} ", keys, re.MULTILINE)


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("read-only = true", "read_only", True),
        ("block-size = 1024", "block_size", 1024),
        ('block-size = "4K"', "block_size", 4096),
        ("timeout = 7", "timeout", 7),
        ("dead-timeout = 600", "dead_timeout", 600),
        ("ioctl = true", "road", "ioctl"),
        ("ioctl = false", "road", "auto"),
        ('device = "nbd3"', "device", "/dev/nbd3"),
        ('tls = "require"\ntls-road = "relay"', "tls_road", "relay"),
    ],
)
def test_a_setting_of_the_link(files, text, field, value):
    assert getattr(link(text, files).spec, field) == value


def test_settings_of_tls(files):
    spec = link(
        """\
tls = "require"
tls-cert = "/k/cert.pem"
tls-key = "/k/key.pem"
tls-ca = "/k/ca.pem"
tls-crl = "/k/crl.pem"
tls-passphrase = "/k/pass"
tls-hostname = "store"
tls-verify-peer = false
tls-verify-depth = 3
""",
        files,
    ).spec
    assert spec.tls == TLSOptions(
        "require",
        CredentialFiles(
            certificate="/k/cert.pem",
            key="/k/key.pem",
            authority="/k/ca.pem",
            revocation="/k/crl.pem",
            passphrase="/k/pass",
            verify_depth=3,
        ),
        "store",
        False,
    )


def test_settings_of_pre_shared_keys(files):
    spec = link('tls-psk = "/k/keys.psk"\ntls-username = "web1"', files).spec
    assert spec.tls.files == CredentialFiles(psk="/k/keys.psk", username="web1")


def test_what_is_built_can_be_hashed(files):
    found = link('paths = ["store2/data"]\ntls-ca = "ca.pem"', files)
    assert len({found, found}) == 1


def test_the_mapping_cannot_be_changed(files):
    with pytest.raises(TypeError):
        files.say('[link.a]\ntarget = "h"\n')["b"] = None


# Paths


def test_relative_credentials_begin_at_the_file(files):
    path = files.add("a.toml", '[link.a]\ntarget = "nbds://h"\ntls-certificates = "pki"\n')
    assert files.load()["a"].spec.tls.files.directory == str(path.parent / "pki")


@pytest.mark.parametrize(
    ("uri", "field"),
    [
        ("nbds://h?tls-certificates=x", "tls_certificates"),
        ("nbds://h?tls-psk-file=x", "tls_psk_file"),
        ("nbd+unix:///?socket=x", "socket"),
    ],
)
def test_relative_paths_in_a_uri_begin_at_the_file(files, uri, field):
    found = files.say(f'[link.a]\ntarget = "{uri}"\n')["a"]
    assert getattr(found.spec.target, field) == str(files.folder / "x")


def test_an_abstract_socket_has_no_folder(files):
    found = files.say('[link.a]\ntarget = "nbd+unix:///?socket=%00x"\n')["a"]
    assert found.spec.target.socket == "\0x"


# Defaults


def test_defaults_hold_for_all_files(files):
    files.main.write_text("[defaults]\ndead-timeout = 60\n")
    files.add("a.toml", '[link.a]\ntarget = "h"\n')
    assert files.load()["a"].spec.dead_timeout == 60


def test_a_link_overrides_defaults(files):
    head = '[defaults]\ntimeout = 5\n[link.data]\ntarget = "h"\n'
    assert link("timeout = 6", files, head).spec.timeout == 6


def test_defaults_of_a_further_file_count_more(files):
    files.main.write_text("[defaults]\ntimeout = 5\nconnections = 2\n")
    files.add("a.toml", '[defaults]\ntimeout = 6\n[link.a]\ntarget = "h"\n')
    spec = files.load()["a"].spec
    assert (spec.timeout, spec.connections) == (6, 2)


def test_defaults_of_a_further_file_hold_there_only(files):
    files.add("a.toml", "[defaults]\ntimeout = 6\n")
    files.add("b.toml", '[link.b]\ntarget = "h"\n')
    assert files.load()["b"].spec.timeout == 30


def test_defaults_are_checked_without_links(files):
    message, _ = files.refusal("[defaults]\n\ntimeout = 0\n")
    assert message.startswith("nbdlink.toml:3: timeout: a timeout of 0 seconds")


@pytest.mark.parametrize("text", ['target = "h"', 'paths = ["h"]', 'device = "/dev/nbd0"'])
def test_what_is_one_links_own_cannot_be_a_default(files, text):
    message, _ = files.refusal(f"[defaults]\n{text}\n")
    assert message == f"nbdlink.toml:2: {text.split()[0]} cannot be a default"


def test_tls_off_overrides_all_defaults_about_tls(files):
    head = '[defaults]\ntls-certificates = "pki"\ntls-road = "relay"\n[link.data]\ntarget = "h"\n'
    spec = link('tls = "off"', files, head).spec
    assert spec.tls == TLSOptions("off")
    assert spec.tls_road == "auto"


def test_a_default_tls_gives_way_to_nbds(files):
    head = '[defaults]\ntls = "allow"\n[link.data]\ntarget = "nbds://h"\n'
    assert link("", files, head).spec.tls.policy is None


def test_a_default_that_requires_tls_holds_for_all_routes(files):
    head = '[defaults]\ntls = "require"\n[link.data]\ntarget = "nbds://a"\n'
    assert link('paths = ["nbd://b"]', files, head).spec.tls.policy == "require"


def test_a_default_tls_road_says_nothing_to_links_without_tls(files):
    head = '[defaults]\ntls-road = "kernel"\n[link.data]\ntarget = "h"\n'
    assert link("", files, head).spec.tls_road == "auto"


@pytest.mark.parametrize(
    ("default", "own", "given"),
    [
        ("tls-ca", "tls-psk", "psk"),
        ("tls-psk", "tls-certificates", "directory"),
    ],
)
def test_credentials_displace_defaults_of_the_other_kind(files, default, own, given):
    head = f'[defaults]\n{default} = "/x"\n[link.data]\ntarget = "h"\n'
    assert link(f'{own} = "/y"', files, head).spec.tls.files == CredentialFiles(**{given: "/y"})


# Exports


def test_the_export_can_be_a_key_of_its_own(files):
    found = link('paths = ["b"]\nexport = "x y"', files, '[link.data]\ntarget = "a"\n')
    assert [each.export for each in (found.spec.target, *found.spec.paths)] == ["x y", "x y"]


def test_a_target_with_an_export_overrides_a_default(files):
    head = '[defaults]\nexport = "x"\n[link.data]\ntarget = "h/y"\n'
    assert link("", files, head).spec.target.export == "y"


def test_an_export_named_twice(files):
    message, _ = files.refusal('[link.a]\ntarget = "h/x"\nexport = "y"\n')
    assert message.startswith("nbdlink.toml:3: the export is named twice: 'x'")


def test_an_export_that_is_too_long(files):
    message, _ = files.refusal(f'[link.a]\ntarget = "h"\nexport = "{"x" * 4097}"\n')
    assert message == "nbdlink.toml:3: an export's name of 4097 bytes is too long (4096)"


# Routes


@pytest.mark.parametrize(
    "paths",
    ['["STORE1:10809/data"]', '["b/data", "b/data"]', '["nbds://store1/data"]'],
)
def test_the_same_way_twice(files, paths):
    message, _ = files.refusal(f'[link.a]\ntarget = "store1/data"\npaths = {paths}\n')
    assert message.startswith("nbdlink.toml:3: ")
    assert " is the same way as nbd://" in message


def test_a_route_is_not_weaker_than_the_target(files):
    message, _ = files.refusal('[link.a]\ntarget = "nbds://a"\npaths = ["nbd://b"]\n')
    assert message == "nbdlink.toml:3: nbd://b goes without TLS, which the target demands"


def test_target_and_options_contradict_each_other(files):
    message, hint = files.refusal('[link.a]\ntarget = "nbds://a"\ntls = "allow"\n')
    assert message.startswith("nbdlink.toml:2: tls allow contradicts a:10809's nbds://")
    assert hint == "say nbd:// or leave tls out"


def test_a_road_of_tls_without_tls(files):
    message, _ = files.refusal('[link.a]\ntarget = "a"\ntls-road = "kernel"\n')
    assert message == "nbdlink.toml:3: tls-road is said, and yet no TLS is asked for"


def test_credentials_are_not_loaded(files):
    assert link('tls-ca = "/does/not/exist"', files).spec.tls.files.authority == "/does/not/exist"


# Mistakes


def test_an_unknown_key_and_the_nearest(files):
    message, hint = files.refusal('[link.a]\ntarget = "h"\nconections = 4\n')
    assert message == "nbdlink.toml:3: unknown key 'conections' in [link.a]"
    assert hint == "did you mean connections?"


def test_an_unknown_key_that_is_near_nothing(files):
    _, hint = files.refusal('[link.a]\ntarget = "h"\nxyzzy = 4\n')
    assert hint.startswith("known: target, paths, export, device, ")


def test_an_unknown_table(files):
    message, hint = files.refusal('\n[lnk.a]\ntarget = "h"\n')
    assert (message, hint) == ("nbdlink.toml:2: unknown table [lnk]", "did you mean link?")


def test_a_setting_outside_of_any_table(files):
    message, hint = files.refusal("timeout = 3\n")
    assert message == "nbdlink.toml:1: unknown table [timeout]"
    assert hint == "say timeout in [link.NAME] or [defaults]"


def test_tables_of_exports_are_left_alone(files):
    assert files.say('[export.data]\nstorage = "/srv/data.qcow2"\n') == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('connections = "4"', 'connections takes a number, not the text "4"'),
        ("connections = true", "connections takes a number, not true"),
        ("connections = 4.5", "connections takes a number, not the number 4.5"),
        ("connections = [4]", "connections takes a number, not a list"),
        ("connections = {a = 4}", "connections takes a number, not a table"),
        ("connections = 2026-11-21", "connections takes a number, not a date or time"),
        ("read-only = 1", "read-only takes true or false, not the number 1"),
        ('ioctl = "yes"', 'ioctl takes true or false, not the text "yes"'),
        ('tls = "of"', 'tls takes "off", "allow" or "require", not the text "of"'),
        ("tls-ca = 3", "tls-ca takes a path, not the number 3"),
        ('tls-ca = ""', "tls-ca is empty"),
        ('tls-ca = "\\u0000"', "tls-ca takes a path, and that cannot contain NUL"),
        (
            'paths = "h"',
            'paths takes a list such as ["nbd://store2/data"], not the text "h"',
        ),
        ("paths = [3]", "paths takes a target, not the number 3"),
        ('device = "/dev/sda"', 'device takes a device such as /dev/nbd0, not the text "/dev/sda"'),
        ('device = "/dev/nbd0p1"', None),
        ('device = "/dev/nbd99999999"', "device: /dev/nbd99999999 cannot exist"),
        ("connections = 65", "connections: 65 connections are not possible"),
        ("block-size = 1000", "block-size: a block size of 1000 bytes is not possible"),
        ('block-size = "4X"', "block-size: '4X' is not a size"),
        ("block-size = true", None),
        ("timeout = 0", "timeout: a timeout of 0 seconds is not possible (1 to 86400)"),
        ("tls-verify-depth = 101", "tls-verify-depth: a verification depth of 101 is not possible"),
    ],
)
def test_a_value_that_does_not_fit(files, text, message):
    said, _ = files.refusal(f'[link.a]\ntarget = "h"\n{text}\n')
    assert said.startswith("nbdlink.toml:3: ")
    assert message is None or said == f"nbdlink.toml:3: {message}"


def test_a_bad_target(files):
    message, _ = files.refusal('[link.a]\ntarget = "h:0"\n')
    assert message == "nbdlink.toml:2: target: 'h:0': '0' is not a port (1 to 65535)"


def test_a_link_without_a_target(files):
    message, _ = files.refusal("\n[link.a]\n")
    assert message == "nbdlink.toml:2: the link 'a' has no target"


def test_a_links_name_is_not_a_devices(files):
    message, _ = files.refusal('[link.nbd0]\ntarget = "h"\n')
    assert message == "nbdlink.toml:1: 'nbd0' is the name of a device"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("link = 3", "nbdlink.toml:1: link is not a table"),
        ("[[link]]", "nbdlink.toml:1: link is not a table"),
        ("[link]\na = 3", "nbdlink.toml:2: link.a is not a table"),
        ("[[link.a]]", "nbdlink.toml:1: link.a is not a table"),
        ("defaults = 3", "nbdlink.toml:1: defaults is not a table"),
        ("export = 3", "nbdlink.toml:1: export is not a table"),
    ],
)
def test_what_should_be_a_table(files, text, message):
    assert files.refusal(text)[0] == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n= 3\n", "nbdlink.toml:2: not valid TOML: Invalid statement (column 1)"),
        ('a = "\n', 'nbdlink.toml:1: not valid TOML: Illegal character "\\n" (column 6)'),
        ("\n\na = ", "nbdlink.toml:3: not valid TOML: Invalid value (at end of document)"),
    ],
)
def test_not_toml(files, text, message):
    said, _ = files.refusal(text)
    assert said.replace("'\\n'", '"\\n"') == message


def test_nesting_without_an_end(files):
    message, _ = files.refusal("a = " + "[" * 50000)
    assert message == "nbdlink.toml: lists or tables nest too deeply"


def test_a_name_cannot_forge_a_line(files):
    message, _ = files.refusal('[link.a]\n"x\\ny" = 1\n')
    assert "\n" not in message


# Several files


def test_further_files_come_by_name(files):
    files.add("b.toml", '[link.b]\ntarget = "h"\n')
    files.add("a.toml", '[link.a]\ntarget = "h"\n')
    assert list(files.load()) == ["a", "b"]


@pytest.mark.parametrize("name", [".hidden.toml", "a.toml~", "README"])
def test_other_files_are_not_read(files, name):
    files.add(name, "=")
    assert files.load() == {}


def test_a_link_in_two_files(files):
    files.add("a.toml", '[link.x]\ntarget = "h"\n')
    files.add("b.toml", '\n\n[link.x]\ntarget = "h"\n')
    message, _ = files.refusal()
    assert message == ("nbdlink.d/b.toml:3: the link 'x' is defined already, in nbdlink.d/a.toml:1")


def test_relative_names_are_made_absolute(files, monkeypatch):
    monkeypatch.chdir(files.folder)
    files.main.write_text('[link.a]\ntarget = "h"\ntls-ca = "ca.pem"\n')
    found = load(Path("nbdlink.toml"), Path("no"), Path("no")).links["a"]
    assert found.spec.tls.files.authority == str(files.folder / "ca.pem")


# Files


def test_anybody_may_write_it(files):
    files.say("")
    files.main.chmod(0o666)
    message, hint = files.refusal()
    assert message == "nbdlink.toml: anybody may write it (its mode is 0666)"
    assert hint == f"chmod o-w {files.main}"


def test_anybody_may_write_the_folder(files):
    files.add("a.toml", "")
    files.directory.chmod(0o1777)
    message, _ = files.refusal()
    assert message == "nbdlink.d: anybody may write it (its mode is 1777)"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("name", ["main", "nbdtab"])
def test_it_belongs_to_somebody_else(files, name):
    path = getattr(files, name)
    path.write_text("")
    os.chown(path, 12345, 0)
    message, hint = files.refusal()
    assert "belongs to user 12345" in message
    assert hint.endswith(f"chown root {path}")


def test_links_are_followed(files):
    (files.folder / "real").write_text('[link.a]\ntarget = "h"\n')
    files.main.symlink_to("real")
    assert list(files.load()) == ["a"]


def test_a_link_to_nowhere_is_not_passed_over(files):
    files.main.symlink_to("nowhere")
    assert files.refusal()[0] == "the configuration nbdlink.toml: no such file or directory"


def test_a_fifo_is_not_waited_for(files):
    os.mkfifo(files.main)
    assert "is not a regular file" in files.refusal()[0]


def test_a_folder_is_no_file(files):
    files.main.mkdir()
    assert "is a directory" in files.refusal()[0]


def test_a_file_is_no_folder(files):
    files.directory.write_text("")
    assert files.refusal()[0] == "nbdlink.d: not a directory"


def test_a_path_with_nul(files):
    files.main = files.folder / "a\0b"
    assert files.refusal()[0] == "a\\x00b: a path cannot contain NUL"


def test_a_file_that_is_too_large(files):
    assert "is larger than 1 MiB" in files.refusal("#" * (1 << 20) + "\n")[0]


def test_not_utf8(files):
    files.main.write_bytes(b"\n# \xff\n")
    assert files.refusal()[0] == "nbdlink.toml:2: not valid UTF-8"


# nbdtab


def test_the_examples_of_nbdtab_5(files):
    links = files.tab("""\
# swap space, called "swapexport" on the server
# optimize for swap, and try to reconnect upon disconnect.
nbd0 nbdserver.example.com swapexport swap,persist
# other export, called "data" on the server. No options for this one.
nbd1 nbdserver.example.com data
""")
    swap, data = links["nbdtab-nbd0"], links["nbdtab-nbd1"]
    target = Target("nbdserver.example.com", export="swapexport")
    assert swap.spec == LinkSpec(target, "/dev/nbd0", "nbdtab-nbd0", dead_timeout=300)
    target = Target("nbdserver.example.com", export="data")
    assert data.spec == LinkSpec(target, "/dev/nbd1", "nbdtab-nbd1", dead_timeout=300)
    assert [note.split(":")[2] for note in swap.notes] == [
        " persist has no effect",
        " swap has no effect",
    ]
    assert (swap.source, data.notes) == (f"{files.nbdtab}:3", ())


def test_options_of_nbdtab(files):
    spec = files.tab("nbd0 h x port=1,bs=1024,conns=2,timeout=9,dead-timeout=8")["nbdtab-nbd0"].spec
    assert spec == LinkSpec(
        Target("h", 1, export="x"),
        "/dev/nbd0",
        "nbdtab-nbd0",
        connections=2,
        block_size=1024,
        timeout=9,
        dead_timeout=8,
    )


def test_tls_options_of_nbdtab(files):
    text = "nbd0 h x tls,certfile=c.pem,keyfile=/k.pem,cacertfile=/a.pem,tlshostname=n"
    assert files.tab(text)["nbdtab-nbd0"].spec.tls == TLSOptions(
        "require",
        CredentialFiles(certificate=str(files.folder / "c.pem"), key="/k.pem", authority="/a.pem"),
        "n",
    )


def test_nbdtab_has_no_defaults(files):
    files.main.write_text("[defaults]\ntimeout = 5\n")
    assert files.tab("nbd0 h x")["nbdtab-nbd0"].spec.timeout == 30


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("nbd0 2a01:4f8::2 x", Target("2a01:4f8::2", export="x")),
        ("nbd0 /run/nbd.sock x unix", Target(socket="/run/nbd.sock", export="x")),
        ("/dev/nbd0 h x#y", Target("h", export="x#y")),
        ("\tnbd0\t \th  x \t# why", Target("h", export="x")),
        ("nbd0 h a/b%20c", Target("h", export="a/b%20c")),
        ("nbd0 h x _netdev,_a=b", Target("h", export="x")),
        ("\r\nnbd0 h x\r\n", Target("h", export="x")),
    ],
)
def test_forms_of_nbdtab(files, text, target):
    assert files.tab(text)["nbdtab-nbd0"].spec.target == target


def test_no_timeout_in_nbdtab(files):
    found = files.tab("nbd0 h x timeout=0")["nbdtab-nbd0"]
    assert found.spec.timeout == 30
    assert found.notes == (
        f"{files.nbdtab}:1: timeout=0 is the kernel's own timeout here, 30 seconds",
    )


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("nbd0 h", "2 fields", "say DEVICE HOST"),
        ("nbd0 h x a, b", "5 fields", "say DEVICE HOST"),
        ("nbd0 h swap,persist", "'swap,persist' stands where the export belongs", "say DEVICE"),
        ("nbd0 h x connections=4", "unknown option 'connections'", "did you mean conns?"),
        ("nbd0 h x swapp", "unknown option 'swapp'", "did you mean swap?"),
        ("nbd0 h x swap=1", "swap takes no value", ""),
        ("nbd0 h x bs", "bs needs a value", "say bs="),
        ("nbd0 h x bs=", "bs= takes one value", ""),
        ("nbd0 h x bs=1=2", "bs= takes one value", ""),
        ("nbd0 h x bs=512,bs=512", "bs is given twice", ""),
        ("nbd0 h x swap,", "an option is empty", ""),
        ("nbd0 h x bs=700", "bs: a block size of 700 bytes is not possible", "the kernel"),
        ("nbd0 h x conns=-1", "conns takes a number, not '-1'", ""),
        ("nbd0 h x port=99999", "'nbd://h:99999/x': '99999' is not a port", ""),
        ("nbd0 h x preinit", "preinit is for servers that do not negotiate", "leave"),
        ("nbd0 /run/s x", "'/run/s' is a path, not a host", "for a Unix socket add `unix`"),
        ("sda h x", 'device takes a device such as /dev/nbd0, not the text "sda"', ""),
        ("# c\nnbd0 h x\nnbd0 h y", "the link 'nbdtab-nbd0' is defined already, in nbdtab:2", ""),
    ],
)
def test_mistakes_in_nbdtab(files, text, message, hint):
    files.nbdtab.write_text(text)
    said, proposed = files.refusal()
    assert said.startswith(f"nbdtab:{text.count(chr(10)) + 1}: {message}")
    assert proposed.startswith(hint)


# Anything


_numbers = itertools.count()
_WORDS = st.sampled_from(
    ["[", "]", "link", "defaults", ".", "a", "b", "=", "{", "}", ",", '"', "'", '"""', "'''"]
    + ["\n", "\n", " ", "\t", "#", "\\", "\r\n", "1", "true", '"h"', '"nbds://h/x"', "[link.a]\n"]
    + ["nbd0", " h ", " x ", "unix", "bs=512", "port=1", "_x", "1e999", "nan", "2026-11-21"]
    + [f"{key} = " for key in SETTINGS]
)


def _try(folder, data):
    """Have both readers read it."""
    path = folder / f"{next(_numbers)}"
    path.write_bytes(data)
    nothing = folder / "nothing"
    for places in ((path, nothing, nothing), (nothing, nothing, path)):
        try:
            links = load(*places).links
            said = f"{hash(tuple(links.values()))}"
        except ConfigError as error:
            said = f"{error}{error.hint or ''}"
        assert said.isprintable()
    path.unlink()


@given(data=st.binary(max_size=200) | st.text().map(str.encode))
@example(data=b"a = " + b"9" * 5000)
@example(data=b"\xef\xbb\xbf[link.a]\n")
def test_any_bytes_are_read_or_refused(tmp_path_factory, data):
    _try(tmp_path_factory.getbasetemp(), data)


@given(words=st.lists(_WORDS | st.text(max_size=4), max_size=30))
def test_any_words_are_read_or_refused(tmp_path_factory, words):
    _try(tmp_path_factory.getbasetemp(), "".join(words).encode())


@given(
    pairs=st.dictionaries(
        st.sampled_from(list(SETTINGS)),
        st.text(max_size=20)
        | st.integers()
        | st.booleans()
        | st.sampled_from(
            ["nbds://h/x?tls-type=psk", "h", "off", "4K", "nbd0", "x/%00", "[::1%ff]"]
        )
        | st.lists(st.text(max_size=9), max_size=3),
    )
)
def test_any_values_are_read_or_refused(tmp_path_factory, pairs):
    def written(value):
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, int):
            return str(value)
        if isinstance(value, list):
            return "[" + ", ".join(map(written, value)) + "]"
        return '"' + "".join(f"\\U{ord(each):08x}" for each in value) + '"'

    lines = [f"{key} = {written(value)}\n" for key, value in pairs.items()]
    _try(tmp_path_factory.getbasetemp(), "".join(["[link.a]\n", *lines]).encode())
