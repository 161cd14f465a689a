"""`nbdlink enbd-server`: the examples of enbd-server's manual, and what becomes of each option."""

from __future__ import annotations

import argparse
import os
import shlex
import sys

import pytest

from nbdlink.cli import enbd_server, serve
from nbdlink.cli.main import build_parser, main
from tests.certificates import Authority

from .programs import in_a_network

SIZE = 1 << 20
OURS = [sys.executable, "-m", "nbdlink", "enbd-server"]

MIRROR = "4017 /a/f1 /a/f2 -1 -b 4096 -i nbd"
WITH_TLS = "4017 /a/f1 -CAfile /b/cacert.pem -cert /b/mycert.pem"
"""The two examples of the manual; in the second it leaves port and file out."""


def translated(typed):
    """Give the words for `serve`."""
    subparsers = next(a for a in build_parser()._actions if a.dest == "verb")
    words = enbd_server.prepare(shlex.split(typed))
    return enbd_server.serve_words(subparsers.choices["enbd-server"].parse_intermixed_args(words))


def understood(typed):
    """Give what `serve` makes of them."""
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser, "serve")
    return vars(parser.parse_intermixed_args(translated(typed)))


@pytest.fixture
def folder(tmp_path):
    """A place with two files of the same size."""
    for name in ("f1", "f2"):
        (tmp_path / name).write_bytes(os.urandom(SIZE))
    return tmp_path


BEGIN = """
mount -t tmpfs none /run
mount -t tmpfs none /var/lib
"$@"
"""


@pytest.mark.interop
def test_the_example_with_a_mirror(folder):
    (folder / "f2").write_bytes((folder / "f1").read_bytes())
    (folder / "new").write_bytes(os.urandom(SIZE))
    script = f"""
    {BEGIN}
    nbdcopy new nbd://localhost:4017
    kill $(cat /var/run/nbd-server-nbd.pid)
    while test -e /var/run/nbd-server-nbd.pid; do sleep 0.01; done
    """
    words = shlex.split(MIRROR.replace("/a/", f"{folder}/"))
    in_a_network(script, *OURS, *words, cwd=folder, mounts=True)
    for name in ("f1", "f2"):
        assert (folder / name).read_bytes() == (folder / "new").read_bytes()


@pytest.mark.interop
def test_a_server_goes_to_the_background_and_is_found_by_its_signature(folder):
    pid_file = "/var/run/nbd-server-nbd.pid"
    script = f"""
    {BEGIN}
    "$@" 2>again && exit 1
    nbdinfo --json nbd://localhost:4017 >info
    nbdcopy nbd://localhost:4017 out
    kill $(cat {pid_file})
    while test -e {pid_file}; do sleep 0.01; done
    """
    words = shlex.split(MIRROR.replace("/a/f2 -1", "").replace("/a/", f"{folder}/"))
    in_a_network(script, *OURS, *words, cwd=folder, mounts=True)
    assert (folder / "out").read_bytes() == (folder / "f1").read_bytes()
    assert '"block_size_minimum": 4096' in (folder / "info").read_text()
    wrong, hint = (folder / "again").read_text().splitlines()
    assert f"{pid_file} belongs to process" in wrong
    assert hint == "  hint: stop it, or choose another -i ID"


@pytest.mark.interop
def test_a_server_with_a_signature_keeps_its_clients_beyond_a_reboot(folder):
    script = f"""
    {BEGIN}
    tr '\\0' '\\n' </proc/$(cat /var/run/nbd-server-nbd.pid)/cmdline >words
    ls -d /var/lib/nbdlink >made
    kill $(cat /var/run/nbd-server-nbd.pid)
    """
    words = shlex.split(MIRROR.replace("/a/f2 -1", "").replace("/a/", f"{folder}/"))
    in_a_network(script, *OURS, *words, cwd=folder, mounts=True)
    assert (folder / "made").read_text() == "/var/lib/nbdlink\n"


@pytest.mark.interop
def test_the_example_with_tls(folder):
    authority = Authority()
    pki = authority.write_directory(folder / "b", server=authority.issue())
    (pki / "mycert.pem").write_bytes(
        (pki / "server-cert.pem").read_bytes() + (pki / "server-key.pem").read_bytes()
    )
    (pki / "mycert.pem").chmod(0o600)
    (pki / "ca-cert.pem").rename(pki / "cacert.pem")
    trust = authority.write_directory(folder / "trust")
    copy = [*OURS[:3], "copy", f"nbds://localhost:4017?tls-certificates={trust}", "out"]
    script = f"""
    {BEGIN}
    nbdinfo nbd://localhost:4017 2>&1 && exit 1
    {shlex.join(copy)}
    kill $(ss -Hltnp | sed -n 's/.*pid=\\([0-9]*\\).*/\\1/p;q')
    while ss -Hltn | grep -q .; do sleep 0.01; done
    """
    # Without a signature there is no pid file, but nobody else listens in this network.
    words = WITH_TLS.replace("/b/", f"{pki}/").replace("/a/", f"{folder}/")
    in_a_network(script, *OURS, *shlex.split(words), cwd=folder, mounts=True)
    assert (folder / "out").read_bytes() == (folder / "f1").read_bytes()


def test_the_example_with_a_mirror_becomes_one():
    words = translated(MIRROR)
    assert words[-3:] == ["--mirror", "/a/f1", "/a/f2"]
    assert {"--port=4017", "--block-size=4096", "--signature=nbd", "--format=raw"} <= set(words)


@pytest.mark.parametrize(
    ("typed", "becomes"),
    [
        ("1 a b", ["--linear", "./a", "./b"]),
        ("1 a b -l", ["--linear", "./a", "./b"]),
        ("1 a b -0", ["--stripe-unit=1024", "--stripe", "./a", "./b"]),
        ("1 a b -0 -b 4096", ["--stripe-unit=4096", "--stripe", "./a", "./b"]),
        ("1 a b -r1", ["--mirror", "./a", "./b"]),
        ("1 a b -s 2G,-,512M", None),
        ("1 a b -s -,512M", ["--linear", "./a", "./b"]),
        ("1 a -1", ["./a"]),
    ],
)
def test_several_files_become_one_export(typed, becomes):
    if becomes is None:
        with pytest.raises(Exception, match="more sizes than there are files"):
            translated(typed)
    else:
        assert translated(typed)[-len(becomes) :] == becomes


@pytest.mark.parametrize("sizes", ["2G,-", "2G,auto", "2G,"])
def test_a_list_of_sizes_is_handed_on(sizes):
    assert "--size=2G,-" in translated(f"1 a b -s {sizes}")


def test_what_is_no_size_is_an_operand():
    assert translated("1 a auto")[-3:] == ["--linear", "./a", "./auto"]


@pytest.mark.parametrize(
    ("typed", "means"),
    [
        ("4017 a", {"port": range(4017, 4018), "storage": ["./a"], "fork": True}),
        ("4017 a", {"negotiation_timeout": 90.0, "block_size": None, "cache": None}),
        ("4017 a -t 5", {"negotiation_timeout": 5.0}),
        ("4017 a -t 0", {"negotiation_timeout": 86400.0}),
        ("4017 a -v", {"fork": False}),
        ("4017 a -r", {"read_only": True}),
        ("4017 a -y", {"cache": "writethrough"}),
        ("4017 a -n", {"cache": "none"}),
        ("4017 a -ny", {"cache": "directsync"}),
        ("4017 a -a", {"write_behind": True}),
        ("4017 a -ay", {"write_behind": False, "cache": "writethrough"}),
        ("4017 a -K", {"lock_ranges": True}),
        ("4017 a -b 1024", {"block_size": "1024"}),
        ("4017 a -i x/y", {"signature": ["x/y"], "pid_file": None}),
        ("4017 a -s 2G", {"size": "2G"}),
        ("4017 a 512M", {"size": "512M", "storage": ["./a"]}),
        ("4017 a 1024", {"size": "1024"}),
        ("4017 a -s -", {"size": None}),
        ("4017 a=b", {"storage": ["./a=b"]}),
        ("4017 -F -1500 -w 1000 -h8192 a", {"port": range(4017, 4018), "storage": ["./a"]}),
        ("4017 -F 1-2 -h 0 a", {"storage": ["./a"]}),
        ("4017 a -cert c", {"tls": "require", "tls_cert": "c", "tls_key": "c"}),
        ("4017 a -cert c -keyfile k", {"tls_key": "k", "tls_verify_peer": False}),
        ("4017 a -cert c -CApath d", {"tls_ca": "d", "tls_verify_depth": None}),
        ("4017 a -cert c -CAfile f -verify 2", {"tls_verify_peer": True, "tls_verify_depth": 2}),
        ("4017 a -cert c -verify 0", {"tls_verify_peer": False}),
    ],
)
def test_each_option_becomes_one_of_serve(typed, means):
    found = understood(typed)
    assert {name: found[name] for name in means} == means


def test_a_file_that_looks_like_a_size_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "512M").touch()
    assert translated("1 a 512M")[-3:] == ["--linear", "./a", "./512M"]


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("x a", "'x' is not a port"),
        ("0 a", "'0' is not a port"),
        ("1 a -b 512", "-b 512 is not a block size"),
        ("1 a -i ''", "the signature has 0 characters"),
        (f"1 a -i {'x' * 129}", "the signature has 129 characters"),
        ("1 a -s 5X", "-s 5X is no size"),
        ("1 a -t x", "'x' is not a time"),
        ("1 a -CAfile f", "TLS is asked for without a certificate"),
        ("1 a -cert c -CAfile f -CApath d", "-CAfile and -CApath exclude each other"),
        ("1 a -cert c -verify x", "-verify x is not a depth"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(typed, says, capsys):
    assert main(["enbd-server", *shlex.split(typed)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert says in lines[0]
    assert len(lines) <= 2


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("-w 1000", "not needed: -w: a flush waits"),
        ("-F 5000", "not needed: -F: all"),
        ("-h 0", "not needed: -h: a request"),
        ("-a -y", "not done: -a: with -y"),
    ],
)
def test_what_is_not_needed_is_explained_in_a_line(option, says, capsys):
    assert main(["enbd-server", "4017", "/nonexistent", "-v", *option.split()]) == 1
    told, *_ = capsys.readouterr().err.splitlines()
    assert told.startswith(f"nbdlink: {says}")
