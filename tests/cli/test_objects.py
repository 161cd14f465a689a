"""`--object`, `--tls-creds` and `--trace` of `nbdlink serve`: QEMU's words for what there is."""

from __future__ import annotations

import argparse
import base64
import os

import pytest

import nbdlink
from nbdlink.cli.objects import apply_objects
from nbdlink.client.security import Security, TLSOptions
from nbdlink.errors import ConfigError, NBDError, OptionError
from nbdlink.transport.tlsfiles import CredentialFiles
from nbdlink.uri import Target
from tests import credentials
from tests.certificates import Authority, write_secret

from .programs import end, serving
from .programs import nbdlink as program

SIZE = 1 << 20
PASSPHRASE = b"correct horse"


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return credentials.make(tmp_path_factory.mktemp("credentials"))


@pytest.fixture(scope="module")
def locked(tmp_path_factory):
    """A server's directory with a key that has a passphrase."""
    authority = Authority()
    identity = authority.issue()
    folder = authority.write_directory(tmp_path_factory.mktemp("locked"), server=identity)
    write_secret(folder / "server-key.pem", identity.key_pem(PASSPHRASE))
    return folder


def connect(path, files):
    target = Target(socket=str(path), tls=True)
    options = TLSOptions(files=files, hostname="localhost")
    return nbdlink.connect(target, security=Security(target, options))


def x509(folder, *more):
    told = ",".join(["tls-creds-x509,id=tls0,endpoint=server", f"dir={folder}", *more])
    return ["--object", told, "--tls-creds", "tls0"]


def test_certificates_are_asked_for_unless_it_is_said_otherwise(image, tmp_path, files):
    path = tmp_path / "socket"
    with serving("-f", "raw", "-k", path, *x509(files.server), image):
        with connect(path, CredentialFiles(directory=str(files.client))) as nbd:
            assert nbd.size == SIZE
        with pytest.raises(NBDError):
            connect(path, CredentialFiles(directory=str(files.trust)))


def test_certificates_are_not_asked_for_if_it_is_said(image, tmp_path, files):
    path = tmp_path / "socket"
    words = x509(files.server, "verify-peer=off")
    with (
        serving("-f", "raw", "-k", path, *words, image),
        connect(path, CredentialFiles(directory=str(files.trust))) as nbd,
    ):
        assert nbd.size == SIZE


def test_only_who_is_named_may_come(image, tmp_path, files):
    path = tmp_path / "socket"
    words = [*x509(files.server), "--object", "authz-simple,id=a,identity=CN=me"]
    with serving("-f", "raw", "-k", path, *words, "--tls-authz", "a", image):
        with connect(path, CredentialFiles(directory=str(files.client))) as nbd:
            assert nbd.size == SIZE
        with pytest.raises(OptionError, match="may not use"):
            connect(path, CredentialFiles(directory=str(files.other)))


@pytest.mark.parametrize(
    ("rules", "comes"),
    [
        ("rules.0.match=CN=me,rules.0.policy=allow", True),
        ("rules.0.match=CN=*,rules.0.policy=allow,rules.0.format=glob", True),
        ("rules.0.match=CN=*,rules.0.policy=allow", False),
        ("rules.0.match=CN=?,rules.0.policy=allow,rules.0.format=glob", False),
        ("rules.0.match=CN=[m]e,rules.0.policy=allow,rules.0.format=glob", False),
        ("policy=allow,rules.0.match=CN=me,rules.0.policy=deny", False),
        ("policy=allow,rules.0.match=CN=you,rules.0.policy=deny", True),
        (
            "rules.1.match=*,rules.1.policy=allow,rules.1.format=glob,"
            "rules.0.match=CN=me,rules.0.policy=deny",
            False,
        ),
        ("policy=deny", False),
    ],
)
def test_rules_say_who_may_come(rules, comes):
    found = argparse.Namespace(
        object=[f"authz-list,id=a,{rules}"], tls_creds=None, tls_authz=["a", "CN=other"]
    )
    apply_objects(found, "server")
    listed, other = found.tls_authz
    assert (listed.admits("CN=me"), other) == (comes, "CN=other")


def test_rules_are_heeded(image, tmp_path, files):
    path = tmp_path / "socket"
    rules = "rules.0.match=CN=m*,rules.0.policy=allow,rules.0.format=glob"
    words = [*x509(files.server), "--object", f"authz-list,id=a,{rules}"]
    with serving("-f", "raw", "-k", path, *words, "--tls-authz", "a", image):
        with connect(path, CredentialFiles(directory=str(files.client))) as nbd:
            assert nbd.size == SIZE
        with pytest.raises(OptionError, match="may not use"):
            connect(path, CredentialFiles(directory=str(files.other)))


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ("policy=maybe", "policy=maybe: say allow or deny"),
        ("rules.0.match=x", "rules.0.match or rules.0.policy is missing"),
        ("rules.1.match=x,rules.1.policy=allow", "rules.0.match or rules.0.policy is missing"),
        ("rules.0.match=x,rules.0.policy=x", "rules.0.policy=x: say allow or deny"),
        ("rules.0.match=x,rules.0.policy=allow,rules.0.format=re", "format=re: say glob or exact"),
        ("rules.0.nonsense=x", "rules.0.nonsense is not understood"),
        ("rules.x.match=x", "rules.x.match is not understood"),
    ],
)
def test_rules_that_make_no_sense_are_refused(told, says):
    found = argparse.Namespace(object=[f"authz-list,id=a,{told}"], tls_creds=None, tls_authz=[])
    with pytest.raises(ConfigError) as caught:
        apply_objects(found, "server")
    assert says in str(caught.value)


def test_pre_shared_keys(image, tmp_path, files):
    path = tmp_path / "socket"
    words = ["--object", f"tls-creds-psk,id=t,endpoint=server,dir={files.keys.parent}"]
    with serving("-f", "raw", "-k", path, *words, "--tls-creds", "t", image):
        given = CredentialFiles(psk=str(files.keys), username="alice")
        with connect(path, given) as nbd:
            assert nbd.size == SIZE


def test_an_export_behind_tls_is_served_on(image, tmp_path, files):
    """The one server has the keys as a server, the other one as its client."""
    first, second = tmp_path / "first", tmp_path / "second"
    folder = files.keys.parent
    ours = ["--object", f"tls-creds-psk,id=t,endpoint=server,dir={folder}", "--tls-creds", "t"]
    theirs = ["--object", f"tls-creds-psk,id=t,endpoint=client,dir={folder},username=alice"]
    options = f"driver=raw,size=4K,file.driver=nbd,file.path={first},file.tls-creds=t"
    with (
        serving("-f", "raw", "-k", first, *ours, image),
        serving("-k", second, *theirs, "--image-opts", options),
        nbdlink.connect(Target(socket=str(second))) as nbd,
    ):
        assert nbd.pread(4096, 0) == image.read_bytes()[:4096]
        assert nbd.size == 4096


@pytest.mark.parametrize("way", ["data", "file", "base64", "base64 file"])
def test_a_secret_is_the_passphrase_of_a_key(image, tmp_path, locked, way):
    coded = base64.b64encode(PASSPHRASE).decode()
    file = write_secret(tmp_path / "secret", coded.encode() if "64" in way else PASSPHRASE)
    secret = {
        "data": f"data={PASSPHRASE.decode()}",
        "file": f"file={file}",
        "base64": f"data={coded},format=base64",
        "base64 file": f"file={file},format=base64",
    }[way]
    path = tmp_path / "socket"
    words = ["--object", f"secret,id=s,{secret}"]
    words += x509(locked, "verify-peer=off", "passwordid=s")
    with (
        serving("-f", "raw", "-k", path, *words, image),
        connect(path, CredentialFiles(authority=str(locked / "ca-cert.pem"))) as nbd,
    ):
        assert nbd.size == SIZE


def test_a_wrong_secret_is_said_and_not_shown(image, tmp_path, locked):
    words = ["--object", "secret,id=s,data=wrong-one"]
    words += x509(locked, "verify-peer=off", "passwordid=s")
    done = program("serve", "-k", tmp_path / "socket", *words, image)
    assert done.returncode == 1
    assert "passphrase" in done.stderr
    assert "wrong-one" not in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--object", "tls-creds-x509,dir=d"], "the id is missing"),
        (["--object", "secret,id=a,data=b", "--object", "secret,id=a,data=b"], "given twice"),
        (["--object", "tls-creds-x509,id=a,dir=d,dir=e"], "dir is given twice"),
        (["--object", "tls-creds-anon,id=a"], "tls-creds-anon: there is no such type"),
        (["--object", "secret,id=a,data=!,format=base64"], "not base64"),
        (["--object", "secret,id=a,file=/nonexistent,format=base64"], "/nonexistent: no such"),
        (["--object", "secret,id=a,data=b,keyid=c"], "keyid is not understood"),
        (["--object", "tls-creds-x509,id=a,endpoint=server", "--tls-creds", "a"], "dir=DIR"),
        (["--tls-creds", "a"], "no object with credentials"),
        (
            [
                "--object",
                "tls-creds-x509,id=a,dir=d,endpoint=server,passwordid=p",
                *["--tls-creds", "a"],
            ],
            "no secret has this id",
        ),
    ],
)
def test_what_is_not_understood_is_said(image, words, says):
    done = program("serve", *words, image)
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.splitlines()) <= 2


# Traces.


def test_a_trace_goes_to_its_file(image, tmp_path):
    log = tmp_path / "trace"
    words = ["-T", f"nbd_server,file={log}", "-f", "raw", "-k", tmp_path / "socket"]
    with serving(*words, image) as (process, (line,)):
        nbdlink.connect(line.split(" is ")[0]).close()
        end(process)
    assert "connected to export ''" in log.read_text()


def test_events_are_read_from_a_file(image, tmp_path):
    (tmp_path / "events").write_text("# what is wanted\nnbd_s*\n")
    words = ["-T", f"events={tmp_path / 'events'}", "-f", "raw", "-k", tmp_path / "socket"]
    with serving(*words, image) as (process, (line,)):
        nbdlink.connect(line.split(" is ")[0]).close()
        _, said = end(process)
    assert "connected to export ''" in said


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("nothing*", "nothing of that name"),
        ("events=/nonexistent", "/nonexistent cannot be opened"),
        ("file=/nonexistent/x", "/nonexistent/x cannot be opened"),
        ("foo=bar", "foo is not understood"),
    ],
)
def test_a_trace_that_cannot_be_is_said(image, word, says):
    done = program("serve", "-T", word, image)
    assert done.returncode == 2
    assert says in done.stderr
