"""The Debian package: what is in it, what lintian says, and that it runs with Debian's libraries.

That it can be installed, upgraded and purged is tried by `make deb-test`, in a Debian of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nbdlink.version import __version__
from tests import certificates

from .conftest import PROJECT

PYTHON = "/usr/bin/python3"


def test_its_version_is_that_of_the_program():
    changelog = (PROJECT / "debian" / "changelog").read_text()
    assert re.match(r"nbdlink \((.*)\)", changelog)[1] == __version__


def test_what_builds_it_is_installed_before():
    control = (PROJECT / "debian" / "control").read_text()
    needed = re.findall(r"[a-z][a-z0-9-]+", re.search(r"(?ms)^Build-Depends: (.*?)^\S", control)[1])
    script = (PROJECT / "vagrant" / "provision.sh").read_text()
    installed = " ".join(re.findall(r'(?m)^deb="(.*)"$', script)).split()
    # Names that another package provides; the last is needed by every build, and so not written.
    real = {"debhelper-compat": "debhelper", "dh-sequence-python3": "dh-python"}
    assert {real.get(name, name) for name in needed} | {"build-essential"} <= set(installed)


def test_lintian_has_nothing_to_say(package):
    command = ["lintian", "--allow-root", "--fail-on", "error,warning", package[1]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    ("folder", "place"),
    [
        ("systemd", "lib/systemd/system/{}"),
        ("udev", "lib/udev/rules.d/{}"),
        ("man", "usr/share/man/man{1}/{0}.gz"),
    ],
)
def test_every_file_is_where_debian_wants_it(unpacked, folder, place):
    for path in (PROJECT / folder).iterdir():
        assert (unpacked / place.format(path.name, path.suffix[1:])).is_file()


@pytest.mark.parametrize(
    ("shell", "place"),
    [
        ("bash", "bash-completion/completions/nbdlink"),
        ("zsh", "zsh/vendor-completions/_nbdlink"),
        ("fish", "fish/vendor_completions.d/nbdlink.fish"),
    ],
)
def test_completions_are_where_shells_look(unpacked, shell, place):
    ours = PROJECT / "completions" / f"nbdlink.{shell}"
    assert (unpacked / "usr/share" / place).read_text() == ours.read_text()


def test_links_are_left_alone_by_an_upgrade(package, tmp_path):
    """Look at the scripts: a stop of one of these units would detach devices."""
    subprocess.run(["dpkg-deb", "--control", package[0], tmp_path], check=True)
    scripts = "".join(path.read_text() for path in tmp_path.glob("p*"))
    assert set(re.findall(r"nbdlink\S*\.service", scripts)) == {
        "nbdlink.service",
        "nbdlink-serve.service",
    }


def nbdlink(unpacked, *words, **options):
    """Run the program of the package by Debian's Python, with nothing but Debian's libraries."""
    for name in ("pyroute2", "pyudev", "OpenSSL", "rich"):
        if not Path(f"/usr/lib/python3/dist-packages/{name}").is_dir():
            pytest.skip(f"python3-{name.lower()} is not installed")
    path = f"{unpacked}/usr/lib/python3/dist-packages"
    return subprocess.Popen(
        [PYTHON, "-s", unpacked / "usr/bin/nbdlink", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        **options,
    )


def test_it_runs_with_debians_libraries(unpacked):
    process = nbdlink(unpacked, "--version")
    assert process.communicate() == (f"nbdlink {__version__}\n", "")


def test_it_draws_with_debians_libraries(unpacked):
    out, err = nbdlink(unpacked, "doctor").communicate()
    assert "kernel module" in out
    assert err == ""


def test_its_netlink_messages_are_those_of_the_kernel(unpacked):
    """Have Debian's pyroute2 write the message that the newest one writes."""
    code = (
        "from nbdlink.kernel import netlink as n\n"
        "m = n._NBDMessage()\n"
        "m['cmd'] = 1\n"
        "m['attrs'] = [('NBD_ATTR_INDEX', 7), ('NBD_ATTR_SIZE_BYTES', 1 << 40),\n"
        "    ('NBD_ATTR_SOCKETS', {'attrs': [('NBD_SOCK_ITEM', {'attrs':\n"
        "    [('NBD_SOCK_FD', 5)]})]}), ('NBD_ATTR_BACKEND_IDENTIFIER', 'nbdlink:x')]\n"
        "m.encode()\n"
        "print(m.data.hex())\n"
    )
    nbdlink(unpacked, "--version").communicate()  # skips where they are missing
    old, new = (
        subprocess.run(
            [python, "-c", code], capture_output=True, text=True, env=environment, check=True
        ).stdout
        for python, environment in (
            (PYTHON, {"PYTHONPATH": f"{unpacked}/usr/lib/python3/dist-packages"}),
            (sys.executable, dict(os.environ)),
        )
    )
    assert old == new


@pytest.fixture(params=["keys", "certificates"])
def tls(request, tmp_path):
    """Give the options of a server and a client, for each kind of credentials."""
    if request.param == "keys":
        keys = certificates.write_secret(tmp_path / "keys.psk", f"web1:{'ab' * 32}\n".encode())
        return ["--tls-psk", keys], ["--tls-psk", keys, "--tls-username", "web1"]
    authority = certificates.Authority()
    server, client = authority.issue(), authority.issue("web1", names=(), role="client")
    authority.revoke(authority.issue("web2", role="client"))
    pki = authority.write_directory(
        tmp_path / "pki", server=server, client=client, revocations=authority.revocations()
    )
    return ["--tls-certificates", pki, "--tls-verify-peer"], ["--tls-certificates", pki]


def test_tls_works_with_debians_libraries(unpacked, tls, tmp_path):
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 16))
    serve, ask = tls
    words = ["-f", "raw", "-b", "127.0.0.1", "-p", "0", *serve, image]
    server = nbdlink(unpacked, "serve", *words)
    try:
        uri = server.stdout.readline().split()[0]
        out, err = nbdlink(unpacked, "info", *ask, uri).communicate()
    finally:
        server.terminate()
        server.communicate()
    assert err == ""
    assert "TLS: TLSv1.3" in out
