"""A server in a process of its own, one write of which is held up until the test lets it go."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading

from nbdlink.protocol.claim import Claim

from ..transport.pairs import authority, identity
from .fakes import OPT_GO, REP_ACK, TIMEOUT, RawClient, export_request
from .tls_client import TLSClient

OPT_STRUCTURED_REPLY, OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT = 8, 9, 10
REP_META_CONTEXT = 4
ERR_POLICY, ERR_SHUTDOWN = 0x80000002, 0x80000007
SESSION = "0123456789abcdef" * 2
GHOST = b"ghost" + bytes(4091)

PROGRAM = """
import logging, os, sys
from nbdlink.server import *
from nbdlink.server.security import ServerSecurity
from nbdlink.storage.raw import RawStorage
from nbdlink.transport.stream import listen_tcp, listen_unix
from nbdlink.transport.tlsfiles import CredentialFiles
logging.basicConfig(level=logging.INFO, format="%(message)s")
folder, processes, credentials, mode, seconds, kind = sys.argv[1:]
class GatedStorage(RawStorage):
    plain_file = None  # every write comes by here
    def write(self, buffer, offset, fua):
        if bytes(buffer[:5]) == b"ghost":
            try:
                os.unlink(folder + "/closed")
            except FileNotFoundError:
                pass
            else:
                print("entered", flush=True)
                open(folder + "/gate").read()
        super().write(buffer, offset, fua)
security = None
if credentials:
    security = ServerSecurity(mode, CredentialFiles(directory=credentials))
storage = (RawStorage if kind == "plain" else GatedStorage).open(folder + "/image")
# Only over TCP can the kernel have the keys, if it can at all.
listeners = listen_tcp("127.0.0.1", 0) if security else [listen_unix(folder + "/socket")]
service = Service(Catalogue([Export("", storage)]), listeners,
                  processes=int(processes), security=security, grace=20,
                  negotiation_timeout=float(seconds))
where = service.addresses[0][1] if security else "ready"
sys.exit(service.run(lambda: print(where, flush=True)))
"""


class GatedServer:
    """`RawClient`s come to `addresses`; the first write of `GHOST` waits for `open_gate`.

    A plain one has no gate, and the engine's own ways to the file.
    """

    def __init__(
        self,
        folder,
        *,
        processes=0,
        tls=False,
        mode="require",
        seconds=TIMEOUT,
        plain=False,
        size=1 << 20,
    ):
        self.folder = folder
        self.image = folder / "image"
        self.image.write_bytes(bytes(size))
        self.addresses = [str(folder / "socket")]
        self.client = functools.partial(TLSClient if tls else RawClient, self)
        (folder / "closed").touch()
        os.mkfifo(folder / "gate")
        credentials = ""
        if tls:
            credentials = str(authority().write_directory(folder, server=identity("server")))
        kind = "plain" if plain else "gated"
        words = [str(folder), str(processes), credentials, mode, str(seconds), kind]
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log = []
        self._heard = threading.Condition()
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()
        said = self.process.stdout.readline().strip()
        assert said, self.log
        if tls:
            self.addresses = [("127.0.0.1", int(said))]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _listen(self):
        for line in self.process.stderr:
            with self._heard:
                self.log.append(line)
                self._heard.notify_all()

    def logs(self, words):
        """Wait until the server has said something."""
        with self._heard:
            assert self._heard.wait_for(lambda: any(words in line for line in self.log), TIMEOUT), (
                self.log
            )

    def entered(self):
        """Wait until the ghost is at the gate."""
        assert self.process.stdout.readline() == "entered\n", self.log

    def open_gate(self):
        with (self.folder / "gate").open("w"):
            pass

    def end(self):
        """Have it stop in order; give its log."""
        self.process.terminate()
        assert self.process.wait(TIMEOUT) == 0, self.log
        self._thread.join()
        return "".join(self.log)

    def close(self):
        self.process.kill()
        self.process.wait()
        self._thread.join()
        self.process.stdout.close()
        self.process.stderr.close()


def meta_query(name, *queries):
    """Give the data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    parts = [name, *(query.encode() for query in queries)]
    packed = [len(part).to_bytes(4, "big") + part for part in parts]
    packed.insert(1, len(queries).to_bytes(4, "big"))
    return b"".join(packed)


def introduced(client):
    """Do the beginning of a handshake, unless the client did that itself; give the client."""
    if type(client) is RawClient:
        assert client.receive(18) == b"NBDMAGICIHAVEOPT\x00\x03"
        client.send(b"\0\0\0\3")
    return client


def claim(client, generation, *, channel=0, session=SESSION, name=b"", notice=None):
    """Make a claim; give the contexts that are told."""
    query = Claim(session, channel, generation, notice).query
    *told, last = client.option(OPT_LIST_META_CONTEXT, meta_query(name, query))
    assert last == (REP_ACK, b"")
    assert all(kind == REP_META_CONTEXT and data[:4] == bytes(4) for kind, data in told)
    return [data[4:].decode() for _, data in told]


def go(client, name=b""):
    """Choose an export; give kind and words of the last reply."""
    kind, words = client.option(OPT_GO, export_request(name))[-1]
    return kind, words.decode()


def claimed(client, generation, **options):
    """Make a claim on a new connection, and choose the export; give the client."""
    introduced(client)
    claim(client, generation, **options)
    answer = go(client, options.get("name", b""))
    assert answer == (REP_ACK, ""), answer
    return client
