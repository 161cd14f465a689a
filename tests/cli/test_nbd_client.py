"""`nbdlink nbd-client`: what becomes of each option, and what a server is asked.

The devices are in `tests/kernel/test_nbd_client.py`.
"""

from __future__ import annotations

import argparse
import os
import shlex

import pytest

from nbdlink.cli import attach, nbd_client
from nbdlink.cli.main import build_parser, main
from nbdlink.uri import Target
from tests.certificates import Authority

from .programs import nbdlink, run, serving


def parsed(typed):
    subparsers = next(a for a in build_parser()._actions if a.dest == "verb")
    arguments = subparsers.choices["nbd-client"].parse_intermixed_args(shlex.split(typed))
    nbd_client._take_old_style(arguments)
    return arguments


def understood(typed):
    """Give what `attach` makes of it."""
    parser = argparse.ArgumentParser()
    attach.add_arguments(parser, "attach")
    return vars(parser.parse_intermixed_args(nbd_client.attach_words(parsed(typed))))


@pytest.mark.parametrize(
    ("typed", "means"),
    [
        # The examples of its manual.
        ("server.domain.com 2000 /dev/nbd0", {"target": "nbd://server.domain.com:2000"}),
        ("swapserver.domain.com 2001 /dev/nbd1 -swap", {"device": "/dev/nbd1"}),
        # And of scripts.
        ("h /dev/nbd0", {"target": "nbd://h", "device": "/dev/nbd0", "supervise": False}),
        ("h /dev/nbd0 -N data", {"target": "nbd://h/data"}),
        ("-N data h 10809 /dev/nbd0", {"target": "nbd://h/data"}),
        ("-name data h 10809 /dev/nbd0", {"target": "nbd://h/data"}),
        ("--name=data h 10809 /dev/nbd0", {"target": "nbd://h/data"}),
        ("-unix /s /dev/nbd0 -N x", {"target": "nbd+unix:///x?socket=/s"}),
        ("-u /s /dev/nbd0", {"target": "nbd+unix://?socket=/s"}),
        ("h /dev/nbd0 -C 4 -b 4096 -t 60", {"connections": 4, "block_size": "4096"}),
        ("h /dev/nbd0 -connections 4 -block-size 512 -timeout 60", {"timeout": 60}),
        ("h /dev/nbd0 -t 0", {"timeout": None}),
        ("h 2000 /dev/nbd0 bs=1024 timeout=7", {"block_size": "1024", "timeout": 7}),
        ("h /dev/nbd0 -R", {"read_only": True}),
        ("h /dev/nbd0 -readonly -L", {"read_only": True, "ioctl": True}),
        ("h /dev/nbd0 -p", {"supervise": True, "name": "nbd-client-nbd0"}),
        ("h /dev/nbd0 -persist -nofork", {"supervise": True}),
        ("h /dev/nbd0 -m -g -s -netlink", {"target": "nbd://h"}),
        ("nbd0", {"name": "nbdtab-nbd0", "target": None, "supervise": False}),
        ("/dev/nbd0 -p", {"name": "nbdtab-nbd0", "supervise": True}),
        ("h /dev/nbd0 -x", {"tls": "require", "tls_no_verify_peer": True}),
        ("h /dev/nbd0 -A ca", {"tls": "require", "tls_ca": "ca", "tls_no_verify_peer": False}),
        ("h /dev/nbd0 -F c -A ca", {"tls_cert": "c", "tls_key": "c"}),
        ("h /dev/nbd0 -certfile c -keyfile k -cacertfile ca", {"tls_key": "k"}),
        ("h /dev/nbd0 -A ca -tlshostname n", {"tls_hostname": "n"}),
    ],
)
def test_each_option_becomes_one_of_attach(typed, means):
    found = understood(typed)
    if means.get("target"):
        means = means | {"target": str(Target.parse(means["target"]))}
        found["target"] = str(Target.parse(found["target"]))
    assert {name: found[name] for name in means} == means


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("", "0 words, where there should be HOST [PORT] DEVICE"),
        ("a 1 b c", "4 words, where there should be HOST [PORT] DEVICE"),
        ("-u a b c", "3 words, where there should be PATH DEVICE"),
        ("h x /dev/nbd0", "'x' is not a port"),
        ("h /dev/nbd0 -t soon", "-timeout takes a number"),
        ("h /dev/nbd0 -S", "-sdp is not available: the Socket Direct Protocol is gone"),
        ("h /dev/nbd0 -B 512", "-size is not available"),
        ("h /dev/nbd0 -P", "-preinit is not available"),
        ("nbd0 -R", "-readonly goes with a host"),
        ("nbd0 -N x", "-name goes with a host"),
        ("store1", "/etc/nbdtab has no line for store1"),
        ("-d /dev/nbd0 -c /dev/nbd0", "-d, -c and -l exclude each other"),
        ("-c /dev/nbd0 x", "'x' is too much"),
        ("-l", "0 words, where there should be HOST [PORT]"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(typed, says, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("nbdlink.link.config.files.NBDTAB", tmp_path / "nbdtab")
    assert main(["nbd-client", *shlex.split(typed)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert says in lines[0]
    assert len(lines) <= 2


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("-swap", "not needed: -swap"),
        ("-m", "not needed: -systemd-mark"),
        ("-g", "not needed: -no-optgo"),
        ("-x", "without -A FILE the server is not verified"),
    ],
)
def test_what_differs_is_explained_in_a_line(option, says, capsys):
    assert main(["nbd-client", "-u", "-l", "/nonexistent", option]) == 1
    first, *_ = capsys.readouterr().err.splitlines()
    assert first.startswith(f"nbdlink: {says}")


def test_a_device_is_detached(monkeypatch):
    said = []
    monkeypatch.setattr("nbdlink.link.attach.detach", lambda *a, **o: said.append((a, o)) or "x")
    assert main(["nbd-client", "-d", "/dev/nbd0"]) == 0
    assert said == [(("/dev/nbd0",), {"force": False})]


@pytest.mark.parametrize("device", ["/dev/nbd4095", "/dev/null", "/nonexistent"])
def test_what_is_not_attached_is_told_by_the_exit_status_alone(device, capsys):
    assert main(["nbd-client", "-c", device]) == 1
    assert capsys.readouterr() == ("", "")


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["nbd-client", "-V"])
    assert caught.value.code == 0
    assert "nbd-client" in capsys.readouterr().out


# Lists.


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(4096))
    return path


@pytest.mark.interop
def test_what_a_server_exports_is_listed_as_by_nbd_client(image):
    with serving("-b", "127.0.0.1", "-p", 0, f"a={image}", f"b={image}", lines=2) as (_, lines):
        port = Target.parse(lines[0].partition(" is ")[0]).port
        theirs = run("nbd-client", "-l", "127.0.0.1", port)
        ours = nbdlink("nbd-client", "-l", "127.0.0.1", port)
    assert (ours.returncode, ours.stdout, ours.stderr) == (0, theirs.stdout, "")
    assert "a\nb\n" in ours.stdout


def test_a_list_is_asked_over_tls(image, tmp_path):
    authority = Authority()
    pki = authority.write_directory(tmp_path / "pki", server=authority.issue())
    words = ["-b", "127.0.0.1", "-p", 0, "--tls-certificates", pki, f"data={image}"]
    with serving(*words) as (_, (line,)):
        port = Target.parse(line.partition(" is ")[0]).port
        done = nbdlink("nbd-client", "-l", "localhost", port, "-A", pki / "ca-cert.pem")
        refused = nbdlink("nbd-client", "-l", "localhost", port)
    assert (done.returncode, done.stdout.splitlines()[1:]) == (0, ["data"])
    assert refused.returncode == 1
