"""Other implementations' clients over TLS against `nbdlink serve`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import socket
import ssl
import struct
import subprocess
import threading
import time
from pathlib import Path

import pytest

from nbdlink.uri import Target
from tests import credentials
from tests.certificates import DAY, NOW, Authority

from .ours import libnbd, serving
from .peers import _running
from .test_suites_fio import fio

pytestmark = pytest.mark.interop

SIZE = 4 << 20


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return credentials.make(tmp_path_factory.mktemp("credentials"))


@dataclasses.dataclass
class Served:
    """A server of ours, and the file that it serves.

    Attributes:
        image: the file.
        target: the export, with its TLS.
        server: the process.
    """

    image: object
    target: Target
    server: object


MODES = {
    "tcp": ("tcp", "x509"),
    "unix": ("unix", "x509"),
    "psk": ("tcp", "psk"),
    "unix+psk": ("unix", "psk"),
    "choosy": ("tcp", "x509"),
}


@pytest.fixture(scope="module")
def serve(tmp_path_factory, files):
    """Start a server of a certain mode when it is first asked for, and give it."""
    running = {}
    with contextlib.ExitStack() as stack:

        def give(mode):
            if mode not in running:
                road, kind = MODES[mode]
                folder = tmp_path_factory.mktemp("served")
                image = folder / "disk.img"
                image.write_bytes(random.Random(mode).randbytes(SIZE))
                words = ["--tls-psk", files.keys]
                if kind == "x509":
                    words = ["--tls-certificates", files.server]
                if mode == "choosy":
                    words += ["--tls-verify-peer", "--tls-authz", "CN=me"]
                words = ["-x", "disk", "-D", "words", "-v", *words, image]
                server = stack.enter_context(serving(folder, *words, road=road, exports=1))
                target = Target.parse(server.uri)
                if road == "tcp":
                    target = dataclasses.replace(target, host="localhost")
                running[mode] = Served(image, target, server)
            return running[mode]

        yield give


def with_files(target, mode, files, *, client=None):
    """Give the URI with the client's credentials in it, as libnbd and nbdlink take it."""
    if MODES[mode][1] == "psk":
        return str(dataclasses.replace(target, username="alice", tls_psk_file=str(files.keys)))
    return str(dataclasses.replace(target, tls_certificates=str(client or files.client)))


@pytest.fixture(params=list(MODES))
def uri(request, serve, files):
    return with_files(serve(request.param).target, request.param, files)


# libnbd.


def test_nbdinfo_sees_the_export_behind_tls(run, uri):
    said = json.loads(run("nbdinfo", "--json", uri))
    assert said["TLS"] is True
    (export,) = said["exports"]
    assert (export["export-name"], export["export-size"]) == ("disk", SIZE)
    assert export["contexts"] == ["base:allocation"]
    run("nbdinfo", "--is", "tls", uri)


def test_nbdinfo_lists_over_tls(run, uri):
    (export,) = json.loads(run("nbdinfo", "--json", "--list", uri))["exports"]
    assert (export["export-name"], export["description"]) == ("disk", "words")


@pytest.mark.parametrize("mode", list(MODES))
def test_nbdcopy_gets_what_the_file_has(run, serve, files, mode, tmp_path):
    served = serve(mode)
    run("nbdcopy", "--connections=3", with_files(served.target, mode, files), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == served.image.read_bytes()


@pytest.mark.parametrize("mode", ["tcp", "unix", "psk"])
def test_nbdcopy_fills_the_export(run, serve, files, mode, tmp_path):
    served = serve(mode)
    source = tmp_path / "source"
    source.write_bytes(os.urandom(SIZE))
    run("nbdcopy", "--flush", source, with_files(served.target, mode, files))
    assert served.image.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("mode", ["tcp", "psk"])
def test_libnbd_writes_trims_and_reads(serve, files, mode):
    def converse(uri, size):
        import nbd

        handle = nbd.NBD()
        handle.add_meta_context("base:allocation")
        handle.set_uri_allow_local_file(True)
        handle.connect_uri(uri)
        handle.pwrite(b"w" * 70001, 4097)
        handle.zero(65536, 1 << 20)
        handle.trim(65536, 2 << 20)
        handle.flush()
        seen = []
        handle.block_status(size, 0, lambda *said: seen.append(said[1]) and 0)
        whole = bytes(handle.pread(size, 0))
        told = [handle.get_tls_negotiated(), len(seen), whole[4097:74098] == b"w" * 70001]
        told.append(whole[1 << 20 : (1 << 20) + 65536] == bytes(65536))
        handle.shutdown()
        return told

    served = serve(mode)
    told = libnbd(converse, with_files(served.target, mode, files), SIZE)
    assert told == [True, 1, True, True]
    assert served.image.read_bytes()[4097:74098] == b"w" * 70001


def test_libnbd_has_sixteen_requests_in_flight(serve, files):
    def converse(uri):
        import nbd

        handle = nbd.NBD()
        handle.set_uri_allow_local_file(True)
        handle.connect_uri(uri)
        buffers = [nbd.Buffer(200_000) for _ in range(16)]
        for n, buffer in enumerate(buffers):
            handle.aio_pread(buffer, n * 200_000)
        while handle.aio_in_flight():
            handle.poll(-1)
        whole = handle.pread(16 * 200_000, 0)
        return b"".join(buffer.to_bytearray() for buffer in buffers) == whole

    assert libnbd(converse, with_files(serve("tcp").target, "tcp", files))


@pytest.mark.parametrize("least", ["allow", "require"])
@pytest.mark.parametrize("offer", ["off", "allow", "require"])
def test_libnbd_gets_tls_where_there_is_some_and_fails_where_it_demands_it(
    program, files, tmp_path, least, offer
):
    def converse(uri, least):
        import nbd

        handle = nbd.NBD()
        handle.set_uri_allow_local_file(True)
        handle.set_tls({"allow": nbd.TLS_ALLOW, "require": nbd.TLS_REQUIRE}[least])
        handle.set_tls_psk_file(uri["keys"])
        handle.set_tls_username("bob")
        try:
            handle.connect_unix(uri["socket"])
        except nbd.Error as error:
            return error.string
        return handle.get_tls_negotiated()

    (tmp_path / "disk.img").write_bytes(bytes(SIZE))
    words = [] if offer == "off" else ["--tls", offer, "--tls-psk", files.keys]
    server = program(*words, tmp_path / "disk.img", exports=1)
    uri = {"keys": str(files.keys), "socket": Target.parse(server.uri).socket}
    told = libnbd(converse, uri, least)
    if (least, offer) == ("require", "off"):
        assert "TLS" in told
    else:
        assert told is (offer != "off")


@pytest.mark.parametrize("mode", ["tcp", "psk"])
def test_clients_without_tls_1_3_are_spoken_to_in_1_2(run, serve, files, mode, tmp_path):
    settings = tmp_path / "gnutls.conf"
    settings.write_text("[overrides]\ndisabled-version = tls1.3\n")
    environment = {**os.environ, "GNUTLS_SYSTEM_PRIORITY_FILE": str(settings)}
    served = serve(mode)
    uri = with_files(served.target, mode, files)
    run("nbdcopy", uri, tmp_path / "copy", env=environment)
    assert (tmp_path / "copy").read_bytes() == served.image.read_bytes()


# qemu.


def creds(mode, files):
    """Give the object that holds a client's credentials for qemu's programs."""
    if MODES[mode][1] == "psk":
        folder = files.keys.parent
        return f"tls-creds-psk,id=tls0,endpoint=client,dir={folder},username=alice"
    return f"tls-creds-x509,id=tls0,endpoint=client,dir={files.client}"


def image_opts(target):
    """Give a target as qemu's --image-opts takes it."""
    place = f"server.type=inet,server.host={target.host},server.port={target.port}"
    if target.socket:
        place = f"server.type=unix,server.path={target.socket},tls-hostname=localhost"
    return f"driver=nbd,{place},export={target.export},tls-creds=tls0"


def qemu_img(run, verb, served, mode, files, *words):
    secret = ["--object", creds(mode, files), "--image-opts"]
    return run("qemu-img", verb, *secret, *words, image_opts(served.target))


@pytest.fixture(params=list(MODES))
def mode(request):
    return request.param


def test_qemu_img_knows_the_size(run, serve, files, mode):
    said = json.loads(qemu_img(run, "info", serve(mode), mode, files, "--output=json"))
    assert said["virtual-size"] == SIZE


def test_qemu_img_finds_no_difference(run, serve, files, mode):
    served = serve(mode)
    local = f"driver=raw,file.driver=file,file.filename={served.image}"
    assert qemu_img(run, "compare", served, mode, files, local) == "Images are identical.\n"


def test_qemu_img_converts_from_the_export(run, serve, files, mode, tmp_path):
    served = serve(mode)
    words = ["--object", creds(mode, files), "--image-opts", "-O", "raw"]
    run("qemu-img", "convert", *words, image_opts(served.target), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == served.image.read_bytes()


def test_qemu_img_converts_to_the_export(run, serve, files, mode, tmp_path):
    served = serve(mode)
    source = tmp_path / "source"
    source.write_bytes(os.urandom(SIZE))
    words = ["--object", creds(mode, files), "--target-image-opts", "-n", "-f", "raw"]
    run("qemu-img", "convert", *words, source, image_opts(served.target))
    assert served.image.read_bytes() == source.read_bytes()


def test_qemu_nbd_lists_the_exports(run, serve, files, mode):
    target = serve(mode).target
    place = ["-k", target.socket] if target.socket else ["-b", target.host, "-p", target.port]
    if target.socket:
        place += ["--tls-hostname", "localhost"]
    said = run("qemu-nbd", "-L", *place, "--object", creds(mode, files), "--tls-creds", "tls0")
    assert "exports available: 1" in said
    assert "export: 'disk'" in said
    assert f"size:  {SIZE}" in said
    assert "base:allocation" in said


# nbdkit as a client.


@contextlib.contextmanager
def relayed(target, mode, files, folder):
    """Have nbdkit pass an export on without TLS, on a Unix socket; give that."""
    relay = Target(socket=str(folder / "relay"))
    command = ["nbdkit", "-f", "-U", relay.socket, "nbd", "tls=require", "export=disk"]
    if target.socket:
        command += [f"socket={target.socket}"]
    else:
        command += [f"hostname={target.host}", f"port={target.port}"]
    if MODES[mode][1] == "psk":
        command += [f"tls-psk={files.keys}", "tls-username=bob"]
    else:
        command += [f"tls-certificates={files.client}"]
    with _running(command, relay):
        yield relay


def test_nbdkit_passes_the_export_on(run, serve, files, mode, tmp_path):
    served = serve(mode)
    with relayed(served.target, mode, files, tmp_path) as relay:
        run("nbdcopy", str(relay), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == served.image.read_bytes()


# fio lets no URI name local files, so that it cannot do TLS itself: nbdkit does it for it.


@pytest.mark.parametrize("mode", ["tcp", "psk"])
def test_fio_reads_over_tls_what_it_wrote(run, serve, files, tmp_path, mode):
    with relayed(serve(mode).target, mode, files, tmp_path) as relay:
        how = ["--verify=crc32c", "--bsrange=512-256k", "--verify_backlog=32"]
        job = ["--name=one", "--rw=randwrite", "--size=2M", *how]
        (told,) = fio(run, str(relay), tmp_path, *job)
    assert told["read"]["total_ios"] > 0


# What a client sees of TLS itself. OpenSSL's s_client knows no NBD, so Python begins it.


def begin(target):
    """Connect and come to the point where TLS begins."""
    sock = socket.create_connection((target.host, target.port), timeout=30)
    assert sock.recv(18, socket.MSG_WAITALL)[:16] == b"NBDMAGICIHAVEOPT"
    sock.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 5, 0))
    reply = sock.recv(20, socket.MSG_WAITALL)
    assert struct.unpack(">QIII", reply) == (0x3E889045565A9, 5, 1, 0), "STARTTLS is refused"
    return sock


def context(files, *, most=ssl.TLSVersion.TLSv1_3, least=ssl.TLSVersion.TLSv1_2):
    made = ssl.create_default_context(cafile=str(files.trust / "ca-cert.pem"))
    made.minimum_version, made.maximum_version = least, most
    return made


@contextlib.contextmanager
def tls(served, made):
    """Do the handshake as a client with a context of Python's."""
    with begin(served.target) as sock, made.wrap_socket(sock, server_hostname="localhost") as it:
        yield it


def test_tls_1_3_is_chosen_where_both_know_it(serve, files):
    with tls(serve("tcp"), context(files)) as it:
        assert it.version() == "TLSv1.3"


def test_tls_1_2_is_spoken_with_who_knows_no_other(serve, files):
    with tls(serve("tcp"), context(files, most=ssl.TLSVersion.TLSv1_2)) as it:
        assert it.version() == "TLSv1.2"
        # Forward secrecy, and nothing that can be tampered with.
        assert it.cipher()[0].startswith(("ECDHE-", "DHE-"))
        assert "GCM" in it.cipher()[0] or "CHACHA20" in it.cipher()[0]


@pytest.mark.parametrize("version", ["TLSv1", "TLSv1_1"])
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_older_versions_are_refused(serve, files, version):
    old = ssl.TLSVersion[version]
    made = context(files, most=old, least=old)
    made.set_ciphers("DEFAULT:@SECLEVEL=0")
    with pytest.raises(ssl.SSLError, match="ALERT_PROTOCOL_VERSION"), tls(serve("tcp"), made):
        pass


def test_nothing_is_compressed(serve, files):
    made = context(files, most=ssl.TLSVersion.TLSv1_2)
    made.options &= ~ssl.OP_NO_COMPRESSION
    with tls(serve("tcp"), made) as it:
        assert it.compression() is None


def test_ciphers_that_authenticate_nothing_are_refused(serve, files):
    made = context(files, most=ssl.TLSVersion.TLSv1_2)
    made.set_ciphers("aNULL:eNULL:@SECLEVEL=0")
    with pytest.raises(ssl.SSLError, match="HANDSHAKE_FAILURE"), tls(serve("tcp"), made):
        pass


@pytest.mark.parametrize("most", ["TLSv1_2", "TLSv1_3"])
def test_no_session_is_resumed(serve, files, most):
    made = context(files, most=ssl.TLSVersion[most])
    session = None
    for _ in range(2):
        with begin(serve("tcp").target) as sock:
            it = made.wrap_socket(sock, server_hostname="localhost", session=session)
            with it:
                it.sendall(struct.pack(">8sII", b"IHAVEOPT", 3, 0))
                assert it.recv(20)  # by then a ticket would have come
                assert not it.session_reused
                session = it.session


def test_renegotiation_is_refused(run, serve, files):
    # Python cannot ask for it; s_client can, and sees TLS with this in front of it.
    target = serve("tcp").target
    with begin(target) as sock, socket.create_server(("127.0.0.1", 0)) as listener:
        process = start_s_client(listener.getsockname()[1], files)
        with listener.accept()[0] as other:
            said = converse(process, sock, other)
    assert "no renegotiation" in said, said


def start_s_client(port, files):
    words = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-tls1_2"]
    words += ["-CAfile", str(files.trust / "ca-cert.pem")]
    return subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def converse(process, *ends):
    """Copy bytes between two sockets while s_client asks for a renegotiation."""
    ends[0].settimeout(30), ends[1].settimeout(30)
    threads = [threading.Thread(target=copy, args=pair) for pair in (ends, tuple(reversed(ends)))]
    for thread in threads:
        thread.start()
    while (line := process.stdout.readline()) and "Verify return code" not in line:
        pass
    said, _ = process.communicate("R\n", timeout=30)
    for thread in threads:
        thread.join(30)
    return said


def copy(source, target):
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def test_the_chain_is_shown_up_to_the_authority_that_clients_have(tmp_path, run):
    root = Authority("Root")
    between = Authority("Between", parent=root)
    nearest = Authority("Nearest", parent=between)
    server = nearest.issue()
    folder = root.write_directory(tmp_path / "pki", server=server)
    (tmp_path / "disk.img").write_bytes(bytes(SIZE))
    words = ["--tls-certificates", folder, tmp_path / "disk.img"]
    with serving(tmp_path, *words, road="tcp", exports=1) as started:
        port = Target.parse(started.uri).port
        made = ssl.create_default_context(cafile=str(folder / "ca-cert.pem"))
        with (
            begin(Target("localhost", port)) as sock,
            made.wrap_socket(sock, server_hostname="localhost") as it,
        ):
            chain = it._sslobj.get_unverified_chain()
        run("nbdinfo", f"nbds://localhost:{port}?tls-certificates={folder}")
    shown = [each.get_info()["subject"][0][0][1] for each in chain]
    assert shown == ["localhost", "Nearest", "Between"]


# Who is not let in, as others see it and as our log tells it.


def has_clients(port):
    """Tell whether a server of this machine has connections that it has not closed."""
    for name in ("tcp", "tcp6"):
        for row in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            _, local, _, state, *_ = row.split()
            if int(local.rpartition(":")[2], 16) == port and state in ("01", "08"):
                return True  # established, or closed by the other side
    return False


@pytest.fixture
def told(tmp_path, files, run):
    """Serve, run a program that has to fail, and give what our log says about that."""
    (tmp_path / "disk.img").write_bytes(bytes(SIZE))

    def told(words, command):
        words = [*words, "-v", tmp_path / "disk.img"]
        with serving(tmp_path, *words, road="tcp", exports=1) as server:
            port = Target.parse(server.uri).port
            done = run(*(str(word).replace("PORT", str(port)) for word in command), check=False)
            deadline = time.monotonic() + 30
            while has_clients(port):  # it says why before it closes
                assert time.monotonic() < deadline, "the server keeps the connection"
                time.sleep(0.01)
            said = server.end()
        assert done.returncode != 0, done.stdout
        return said

    return told


def test_a_plain_client_is_told_of_in_the_log(told, files):
    said = told(["--tls-certificates", files.server], ["nbdinfo", "nbd://localhost:PORT"])
    assert "refused: it came without TLS, which is demanded here" in said


def test_a_client_without_a_certificate_is_told_of_in_the_log(told, files):
    words = ["--tls-certificates", files.server, "--tls-verify-peer"]
    said = told(words, ["nbdinfo", f"nbds://localhost:PORT?tls-certificates={files.trust}"])
    assert "the client has shown no certificate" in said


@pytest.mark.parametrize(
    ("dates", "words"),
    [
        ({"not_after": NOW - 3 * DAY}, "the client's certificate CN=late expired on"),
        ({"not_before": NOW + 3 * DAY}, "the client's certificate CN=late is valid only from"),
    ],
    ids=["expired", "not yet valid"],
)
def test_a_client_whose_time_is_not_now_is_told_of_by_name(told, files, tmp_path, dates, words):
    late = files.authority.issue("late", role="client", **dates)
    folder = files.authority.write_directory(tmp_path / "late", client=late)
    server = ["--tls-certificates", files.server, "--tls-verify-peer"]
    assert words in told(server, ["nbdinfo", f"nbds://localhost:PORT?tls-certificates={folder}"])


def test_a_client_that_may_not_come_is_told_of_by_name(told, files):
    words = ["--tls-certificates", files.server, "--tls-verify-peer", "--tls-authz", "CN=me"]
    said = told(words, ["nbdinfo", f"nbds://localhost:PORT?tls-certificates={files.other}"])
    assert "refused: CN=other may not use this server" in said


@pytest.mark.parametrize("program", ["nbdinfo", "qemu-img"])
def test_a_client_that_does_not_believe_us_is_told_of_in_the_log(told, files, tmp_path, program):
    stranger = Authority("Another CA").write_directory(tmp_path / "trust")
    command = ["nbdinfo", f"nbds://localhost:PORT?tls-certificates={stranger}"]
    if program == "qemu-img":
        secret = f"tls-creds-x509,id=tls0,endpoint=client,dir={stranger}"
        place = "driver=nbd,server.type=inet,server.host=localhost,server.port=PORT,tls-creds=tls0"
        command = ["qemu-img", "info", "--object", secret, "--image-opts", place]
    said = told(["--tls-certificates", files.server], command)
    assert "perhaps it does not believe our certificate" in said


@pytest.mark.parametrize(
    ("user", "key", "words"),
    [
        ("alice", b"z" * 32, "the client has another pre-shared key for 'alice' than we have"),
        ("mallory", b"a" * 32, "the client is 'mallory', who has no key here"),
    ],
)
def test_a_wrong_key_is_told_of_in_the_log(told, files, tmp_path, user, key, words):
    wrong = credentials.write_keys(tmp_path / "keys.psk", **{user: key})
    uri = f"nbds://{user}@localhost:PORT?tls-psk-file={wrong}"
    assert words in told(["--tls-psk", files.keys], ["nbdinfo", uri])


@pytest.mark.parametrize(
    ("user", "key", "words"),
    [
        ("alice", b"z" * 32, "the client has another pre-shared key for 'alice' than we have"),
        ("mallory", b"a" * 32, "the client is 'mallory', who has no key here"),
    ],
)
def test_nor_does_a_wrong_key_fit_in_tls_1_2(told, files, tmp_path, monkeypatch, user, key, words):
    settings = tmp_path / "gnutls.conf"
    settings.write_text("[overrides]\ndisabled-version = tls1.3\n")
    monkeypatch.setenv("GNUTLS_SYSTEM_PRIORITY_FILE", str(settings))
    wrong = credentials.write_keys(tmp_path / "keys.psk", **{user: key})
    uri = f"nbds://{user}@localhost:PORT?tls-psk-file={wrong}"
    assert words in told(["--tls-psk", files.keys], ["nbdinfo", uri])


def test_a_client_with_certificates_where_keys_are_shared_is_told_of(told, files):
    uri = f"nbds://localhost:PORT?tls-certificates={files.client}"
    assert "offers no pre-shared key" in told(["--tls-psk", files.keys], ["nbdinfo", uri])


def test_a_client_with_keys_where_certificates_are_shown_is_told_of(told, files):
    uri = f"nbds://alice@localhost:PORT?tls-psk-file={files.keys}"
    said = told(["--tls-certificates", files.server], ["nbdinfo", uri])
    assert "it broke TLS off" in said or "does not trust the authority" in said
