"""The way to an export: where it ends, what is said, and what is advised."""

from __future__ import annotations

import contextlib
import http.server
import socket
import threading
from dataclasses import replace

import pytest

from nbdlink.client.security import TLSOptions
from nbdlink.link.checkup import route
from nbdlink.link.checkup.route import walk
from nbdlink.server import serve_in_thread
from nbdlink.server.security import ServerSecurity
from nbdlink.transport.tlsfiles import CredentialFiles
from nbdlink.uri import Target
from tests.certificates import DAY, NOW, Authority

SIZE = 1 << 20
MOMENT = 0.2
"""Seconds to wait for what will never come."""
PATIENCE = 60.0


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    return path


def walked(target, options=None, seconds=PATIENCE):
    """Walk; give the findings by what was looked at, and the last of them."""
    if isinstance(target, str):
        target = Target.parse(target)
    found = list(walk(target, options or TLSOptions(), seconds=seconds))
    assert all(each.remedy for each in found if each.status != "ok")
    return {each.check: each for each in found}, found[-1]


@contextlib.contextmanager
def speaker(words):
    """Listen, say `words` to each client, and hang up if there are none; give the target."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    if words:
                        client.sendall(words)
                        kept.append(client)
                    else:
                        client.close()

        kept = []
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield Target("127.0.0.1", listener.getsockname()[1])
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for client in kept:
                client.close()


def test_a_good_way_ends_with_a_read(image):
    with serve_in_thread({"data": image}) as service:
        found, last = walked(service.uri("data"))
    assert {each.status for each in found.values()} == {"ok"}
    assert (last.check, last.remedy) == ("read", None)
    assert found["export"].found == "'data', 1M, read-write"


def test_a_unix_socket_that_is_not_there(tmp_path):
    _, last = walked(Target(socket=str(tmp_path / "socket")))
    assert (last.check, last.status) == ("connect", "failed")
    assert "is the server running" in last.remedy


def test_a_name_that_nobody_knows():
    _, last = walked("no-such-host.invalid")
    assert (last.check, last.status) == ("name", "failed")
    assert "getent hosts no-such-host.invalid" in last.remedy


def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    _, last = walked(f"127.0.0.1:{port}")
    assert (last.check, last.status) == ("connect", "failed")
    assert "refuses: nobody listens there" in last.found


def test_an_address_that_does_not_answer_is_told_though_another_does(image, monkeypatch):
    with serve_in_thread({"": image}) as service:
        port = Target.parse(service.uri()).port
        answers = [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in ("127.0.0.2", "127.0.0.1")
        ]
        real = socket.getaddrinfo

        def resolve(host, *more, **options):
            return answers if host == "store" else real(host, *more, **options)

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        found = list(walk(Target("store", port), seconds=PATIENCE))
    assert found[0].found == "store is 127.0.0.2, 127.0.0.1"
    assert [(each.check, each.status) for each in found[1:3]] == [
        ("connect", "warning"),
        ("connect", "ok"),
    ]
    assert "every connection tries it first" in found[1].remedy


@pytest.mark.parametrize(
    ("words", "who"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "an SSH server"),
        (b"220 mail.example.com ESMTP\r\n", "a mail or FTP server"),
        (b"RFB 003.008\n", "something that begins with 'RFB 003.008"),
        (b"NBDMAGIX", "something that begins with 'NBDMAGIX'"),
        (b"\x1b[2J", "something that begins with"),
    ],
)
def test_who_speaks_first_and_is_no_nbd_server_is_named(words, who):
    with speaker(words) as target:
        _, last = walked(target)
    assert (last.check, last.status) == ("greeting", "failed")
    assert who in last.found
    assert last.found.isprintable()


def test_a_server_that_hangs_up_at_once():
    with speaker(b"") as target:
        _, last = walked(target)
    assert "hangs up at once" in last.found
    assert "allow list" in last.remedy


def test_a_server_that_says_nothing():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        _, last = walked(Target("127.0.0.1", listener.getsockname()[1]), seconds=MOMENT)
    assert "says nothing for 0.2 seconds" in last.found
    assert "one at a time" in last.remedy


class Web(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_a_web_server_is_known_though_it_waits_for_the_client(monkeypatch):
    def silence(*_):
        raise TimeoutError

    monkeypatch.setattr(route, "_peek", silence)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Web) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            _, last = walked(Target("127.0.0.1", server.server_address[1]))
        finally:
            server.shutdown()
            thread.join()
    assert last.found.endswith("is no NBD server, but a web server")


def test_an_export_that_is_not_offered_is_told_with_the_nearest(image):
    with serve_in_thread({"data": image, "other": image}) as service:
        _, last = walked(service.uri("dta"))
    assert (last.check, last.status, last.remedy) == ("export", "failed", "did you mean 'data'?")


def test_where_none_is_near_all_are_told(image):
    with serve_in_thread({"data": image, "other": image}) as service:
        _, last = walked(service.uri("xyz"))
    assert last.remedy == "it offers 'data', 'other'"


def test_an_export_too_small_for_a_device(tmp_path):
    small = tmp_path / "small"
    small.write_bytes(bytes(100))
    with serve_in_thread({"": small}) as service:
        found, _ = walked(service.uri())
    assert found["size"].status == "failed"


def test_a_tail_that_a_device_lacks(tmp_path):
    odd = tmp_path / "odd"
    odd.write_bytes(bytes(SIZE + 100))
    with serve_in_thread({"": odd}) as service:
        found, last = walked(service.uri())
    assert (found["size"].status, last.status) == ("warning", "ok")
    assert "the last 100 do not fill a sector" in found["size"].found


# TLS.


@pytest.fixture(scope="module")
def authority():
    return Authority()


@pytest.fixture
def secured(authority, image, tmp_path):
    """Serve with a certificate; give a function that walks there."""

    def walk_to(options=None, host="localhost", verify_peer=False, **certificate):
        folder = authority.write_directory(
            tmp_path / "server", server=authority.issue(**certificate)
        )
        files = CredentialFiles(directory=str(folder))
        security = ServerSecurity("require", files, verify_peer=verify_peer)
        with serve_in_thread({"": image}, security=security) as service:
            target = replace(Target.parse(service.uri()), host=host, tls=options is not False)
            return walked(target, options or None)

    return walk_to


@pytest.fixture
def trust(authority, tmp_path):
    folder = authority.write_directory(tmp_path / "trust")
    return TLSOptions(files=CredentialFiles(directory=str(folder)))


def test_a_good_way_with_tls(secured, trust):
    found, last = secured(trust, not_after=NOW + 30 * DAY)
    assert {each.status for each in found.values()} == {"ok"}
    assert found["TLS"].found.endswith("CN=localhost, verified")
    assert last.check == "read"


def test_tls_that_the_server_demands(secured):
    _, last = secured(False)
    assert (last.check, last.status) == ("TLS", "failed")
    assert last.remedy == "say nbds:// or --tls require"


def test_tls_that_the_server_does_not_have(image, trust):
    with serve_in_thread({"": image}) as service:
        _, last = walked(replace(Target.parse(service.uri()), tls=True), trust)
    assert (last.check, last.status) == ("TLS", "failed")
    assert "does not offer TLS" in last.found


def test_a_certificate_for_another_host(secured, trust):
    found, _ = secured(trust, name="store1", names=("store1", "store2"))
    assert found["TLS"].status == "failed"
    assert found["TLS"].found.endswith("is for store1, store2, not for localhost")
    assert found["TLS"].remedy == "if that is the server you mean, say --tls-hostname store1"


def test_a_certificate_that_expires_soon(secured, trust):
    found, last = secured(trust, not_after=NOW + 3 * DAY)
    assert found["certificate"].status == "warning"
    assert last.check == "read"


def test_an_authority_that_is_not_trusted(secured, tmp_path):
    folder = Authority("Another").write_directory(tmp_path / "another")
    found, _ = secured(TLSOptions(files=CredentialFiles(directory=str(folder))))
    assert "an authority that is not trusted" in found["TLS"].found
    assert "clock" not in found


def test_a_certificate_that_the_server_wants(secured, trust):
    _, last = secured(trust, verify_peer=True)
    assert (last.check, last.status) == ("TLS", "failed")
    assert "--tls-certificates DIR" in last.remedy


def test_credentials_that_are_not_there(image, tmp_path):
    with serve_in_thread({"": image}) as service:
        _, last = walked(
            replace(Target.parse(service.uri()), tls=True),
            TLSOptions(files=CredentialFiles(directory=str(tmp_path / "none"))),
        )
    assert (last.check, last.status) == ("credentials", "failed")
