"""`nbdlink qemu-nbd`: the examples of qemu-nbd's manual to the letter, and what is different.

The examples listen on fixed ports of all addresses, so each has a network of its own.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID

import nbdlink
from nbdlink.cli import qemu_nbd, serve
from nbdlink.cli.main import build_parser, main
from nbdlink.uri import Target
from tests import credentials
from tests.certificates import Authority

from .programs import in_a_network, run

SIZE = 3 << 20
OURS = [sys.executable, "-m", "nbdlink", "qemu-nbd"]

ONE_SHOT = "qemu-nbd -f qcow2 file.qcow2"

WITH_TLS = r"""
qemu-nbd \
  --object tls-creds-x509,id=tls0,endpoint=server,dir=/path/to/qemutls \
  --object 'authz-simple,id=auth0,identity=CN=laptop.example.com,,\
            O=Example Org,,L=London,,ST=London,,C=GB' \
  --tls-creds tls0 --tls-authz auth0 \
  -t -x subset -p 10810 \
  --image-opts driver=raw,offset=1M,size=1M,file.driver=file,file.filename=file.raw
"""

DAEMON = r"""
qemu-nbd --fork --persistent --shared=5 --socket=/path/to/sock \
  --read-only --format=qcow2 file.qcow2
"""

DEVICE = "qemu-nbd -c /dev/nbd0 -f qcow2 file.qcow2"
NO_DEVICE = "qemu-nbd -d /dev/nbd0"

LIST = r"""
qemu-nbd \
  --object tls-creds-psk,id=tls0,dir=/tmp/keys,username=eblake,endpoint=client \
  --tls-creds tls0 -L -b remote.example.com
"""


def words_of(example, **places):
    """Give the words of an example as a shell would, with paths and hosts of this test."""
    for place, here in places.items():
        example = example.replace(place, str(here))
    script = f'set -- {example.strip()}\nprintf "%s\\0" "$@"'
    told = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout
    program, *words = told.removesuffix("\0").split("\0")
    assert program == "qemu-nbd"
    return words


def parsed(words):
    """Give what becomes of a command line of qemu-nbd, as `serve` understands it."""
    subparsers = next(a for a in build_parser()._actions if a.dest == "verb")
    arguments = subparsers.choices["qemu-nbd"].parse_intermixed_args(words)
    import argparse

    parser = argparse.ArgumentParser()
    serve.add_arguments(parser, "serve")
    return parser.parse_intermixed_args(qemu_nbd.serve_words(arguments))


@pytest.fixture
def folder(tmp_path):
    """A place with file.raw, and the same in file.qcow2."""
    raw = tmp_path / "file.raw"
    raw.write_bytes(os.urandom(SIZE))
    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img is not installed")
    subprocess.run(
        ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, tmp_path / "file.qcow2"],
        check=True,
    )
    return tmp_path


CLIENT = """
"${server[@]}" & server=$!
until "${client[@]}" 2>client.log; do kill -0 $server; done
"""


STRANGER = """
"${server[@]}" & server=$!
until grep -q "may not use this server" client.log
do kill -0 $server; "${client[@]}" 2>client.log || true; done
"""


@pytest.mark.interop
def test_one_client_of_a_qcow2_image_and_the_end(folder):
    script = f"""
    server=("$@") client=(qemu-img convert -O raw nbd://localhost out.raw)
    {CLIENT}
    wait $server
    """
    assert in_a_network(script, *OURS, *words_of(ONE_SHOT), cwd=folder) == ""
    assert (folder / "out.raw").read_bytes() == (folder / "file.raw").read_bytes()


@pytest.mark.interop
@pytest.mark.parametrize("friend", [True, False])
def test_a_part_of_a_raw_image_for_one_certificate(folder, friend):
    authority = Authority()
    parts = [("COMMON_NAME", "laptop.example.com"), ("ORGANIZATION_NAME", "Example Org")]
    parts += [("LOCALITY_NAME", "London"), ("STATE_OR_PROVINCE_NAME", "London")]
    parts += [("COUNTRY_NAME", "GB" if friend else "DE")]
    subject = x509.Name([x509.NameAttribute(getattr(NameOID, name), text) for name, text in parts])
    client = authority.issue(subject, role="client", names=())
    server = authority.write_directory(folder / "server", server=authority.issue())
    authority.write_directory(folder / "client", client=client)
    uri = "nbds://localhost:10810/subset?tls-certificates=client"
    script = f"""
    server=("$@") client=({shlex.join(OURS[:3])} copy '{uri}' out.raw)
    {CLIENT if friend else STRANGER}
    kill $server
    wait $server
    """
    words = words_of(WITH_TLS, **{"/path/to/qemutls": server})
    in_a_network(script, *OURS, *words, cwd=folder)
    if friend:
        assert (folder / "out.raw").read_bytes() == (folder / "file.raw").read_bytes()[1 << 20 :][
            : 1 << 20
        ]
    else:
        assert not (folder / "out.raw").exists()


@pytest.mark.interop
def test_a_daemon_for_five_readers_at_a_socket(folder):
    socket, pid_file = folder / "sock", folder / "pid"
    words = words_of(DAEMON, **{"/path/to/sock": socket})
    done = run(*OURS, *words, f"--pid-file={pid_file}", cwd=folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    pid = int(pid_file.read_text())
    try:
        with nbdlink.connect(Target(socket=str(socket))) as nbd:
            assert nbd.pread(SIZE, 0) == (folder / "file.raw").read_bytes()
            assert nbd.export.read_only
    finally:
        os.kill(pid, signal.SIGTERM)


def test_a_device_is_served_in_the_background():
    found = parsed(words_of(DEVICE))
    assert (found.attach, found.format, found.storage) == ("/dev/nbd0", "qcow2", ["./file.qcow2"])
    assert (found.socket, found.fork, found.once) == ("/var/lock/qemu-nbd-nbd0", True, True)


def test_a_device_is_detached(monkeypatch):
    said = []
    monkeypatch.setattr("nbdlink.kernel.sysfs.exists", lambda index: True)
    monkeypatch.setattr("nbdlink.kernel.sysfs.pid", lambda index: 1)
    monkeypatch.setattr("nbdlink.link.attach.detach", lambda *a, **o: said.append((a, o)) or "x")
    assert main(["qemu-nbd", *words_of(NO_DEVICE)]) == 0
    assert said == [(("/dev/nbd0",), {"force": False})]


def test_what_is_not_attached_is_detached_already(monkeypatch, capsys):
    monkeypatch.setattr("nbdlink.kernel.sysfs.exists", lambda index: True)
    monkeypatch.setattr("nbdlink.kernel.sysfs.pid", lambda index: None)
    assert main(["qemu-nbd", *words_of(NO_DEVICE)]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.interop
def test_another_server_is_asked_with_a_pre_shared_key(folder):
    key = b"k" * 32
    keys = credentials.write_keys(folder / "keys" / "keys.psk", eblake=key).parent
    offer = "--object tls-creds-psk,id=tls0,endpoint=server,dir=keys --tls-creds tls0 -t"
    places = {"/tmp/keys": keys, "remote.example.com": "localhost"}
    asked = shlex.join([*OURS, *words_of(LIST, **places)])
    theirs = shlex.join(["qemu-nbd", *words_of(LIST, **places)])
    script = f"""
    server=("$@") client=({asked})
    {CLIENT}
    echo theirs
    {theirs}
    kill $server
    wait $server
    """
    said = in_a_network(
        script, *OURS, *shlex.split(offer), "-x", "a", "-f", "raw", "file.raw", cwd=folder
    )
    ours, theirs = said.split("theirs\n")
    assert ours == theirs
    assert "export: 'a'" in ours


# Defaults.


def test_its_defaults_are_qemu_nbds():
    found = parsed(["file.raw"])
    assert (found.shared, found.once, found.persistent, found.bind) == (1, True, False, ["0.0.0.0"])
    assert (found.port, found.discard, found.cache, found.format) == (None, "ignore", None, None)


@pytest.mark.parametrize(
    ("typed", "understood"),
    [
        ("-n x", {"nocache": True}),
        ("-s x", {"snapshot": True}),
        ("-A -B one -B two x", {"allocation_depth": True, "bitmap": ["one", "two"]}),
        ("-l 1 x", {"load_snapshot": "1"}),
        ("-e 0 -t x", {"shared": 0, "persistent": True, "once": False}),
        ("x -o 1M -D words", {"offset": "1M", "description": "words"}),
        ("-k /s x", {"socket": "/s", "bind": []}),
        ("-k /s -p 1 -b ::1 x", {"socket": "/s", "bind": [], "port": None}),
        ("-fraw -k/s -xfoo -rt -e5 x", {"format": "raw", "shared": 5, "read_only": True}),
        ("--aio io_uring x", {"aio": "threads"}),
        ("-T nbd_negotiate* -T nbd_* x", {"trace": ["enable=nbd_server", "nbd_*"]}),
        ("-T bdrv_co_*,file=f x", {"trace": []}),
        ("--cache=unsafe --discard=unmap x", {"cache": "unsafe", "discard": "unmap"}),
        ("-c /dev/nbd3 -v x", {"attach": "/dev/nbd3", "fork": False}),
        ("a=b", {"storage": ["./a=b"]}),
        ("file:x", {"storage": ["./x"]}),
        ("/a:b", {"storage": ["/a:b"]}),
        ("nbd://h:1/x?y", {"storage": ["nbd://h:1/x?y"]}),
        ("nbd:h:10810", {"storage": ["nbd://h:10810"]}),
        ("nbd:[::1]:10809:exportname=a", {"storage": ["nbd://[::1]/a"]}),
        ("nbd:unix:/s:exportname=a:b", {"storage": ["nbd+unix:///a%3Ab?socket=/s"]}),
    ],
)
def test_each_option_becomes_one_of_serve(typed, understood):
    found = vars(parsed(typed.split()))
    assert {name: found[name] for name in understood} == understood


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("", "an image is missing"),
        ("-L x", "takes no image"),
        ("-L -o 1M", "--list goes without --offset"),
        ("--tls-hostname h x", "--list only"),
        ("--selinux-label l x", "--selinux-label is not available"),
        ("ssh://host/x", "ssh: is no file"),
        ("nbd:host", "nbd: is no file"),
        ("nbd://h:x", "is not a port"),
        ("--aio native -f raw x", "--aio native goes without the page cache only"),
        ("--detect-zeroes unmap -f raw x", "discard=ignore forbids"),
        ("-n --cache unsafe x", "--nocache is --cache none"),
        ("--image-opts -f raw driver=raw,file.filename=x", "names the format itself"),
        ("--tls-creds t x", "no object with credentials has this id"),
        ("--object nonsense,id=a x", "--object nonsense: there is no such type"),
        ("--object secret,id=a x", "say either data or file"),
        ("--object authz-simple,identity=x x", "the id is missing"),
        ("--object tls-creds-x509,id=a,priority=N x", "priority is not understood"),
        ("--object tls-creds-x509,id=a,dir=d --tls-creds a x", "are a client's"),
        ("-l snapshot.id=1,nonsense=2 x", "nonsense is not understood"),
        ("-T nonsense=x x", "nonsense is not understood"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(typed, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x").write_bytes(bytes(4096))
    assert main(["qemu-nbd", *typed.split()]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert says in lines[0]
    assert len(lines) <= 2


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("--aio io_uring", "not needed: --aio io_uring: requests are done in threads"),
        ("-n --aio native", "not needed: --aio native: requests are done in threads"),
        ("-k s -p 1", "not done: --port and --bind"),
        ("-T bdrv_co_*", "not done: --trace bdrv_co_*: nothing of that name"),
    ],
)
def test_what_is_not_needed_is_explained_in_a_line(typed, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["qemu-nbd", *typed.split(), "-f", "raw", "missing"]) == 1
    assert capsys.readouterr().err.splitlines()[0].startswith(f"nbdlink: {says}")


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["qemu-nbd", "-V"])
    assert caught.value.code == 0
    assert "qemu-nbd" in capsys.readouterr().out
