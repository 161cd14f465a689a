"""A server in a process of its own, to be measured, starved, and lost without harm to the tests."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
from nbdlink.server import serve_in_thread
from nbdlink.storage.raw import RawStorage

class GeneralStorage(RawStorage):
    plain_file = None  # every request comes by the storage, in a worker's thread
    def lend(self, offset, length):
        raise AssertionError

kind, image, folder, transport, credentials = sys.argv[1:]
security = None
if credentials:
    from nbdlink.server.security import ServerSecurity
    from nbdlink.transport.tlsfiles import CredentialFiles
    security = ServerSecurity("require", CredentialFiles(directory=credentials))
storage = (GeneralStorage if kind == "general" else RawStorage).open(image)
unix = folder + "/socket" if transport == "unix" else None
with serve_in_thread({"": storage}, unix=unix, grace=0.5, security=security) as service:
    print(unix or service.addresses[0][1], flush=True)
    sys.stdin.read()
"""

TINY = """
set -e
mount -t tmpfs -o size=1M none "$1"
truncate -s 16M "$1/image"
shift
exec "$@"
"""


class Server:
    """A process that serves one file.

    Attributes:
        addresses: as `RawClient` needs them.
        pid: the process.
    """

    def __init__(self, folder, image, *, kind="plain", transport="unix", prefix=(), credentials=""):
        program = [sys.executable, "-c", PROGRAM, kind, image, folder, transport]
        self._process = subprocess.Popen(
            [*prefix, *program, str(credentials)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        where = self._process.stdout.readline().strip()
        assert where, self._process.communicate()[1]
        self.addresses = [where if transport == "unix" else ("127.0.0.1", int(where))]

    def memory(self):
        """Give the bytes of memory that are the process's own."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        (line,) = (line for line in status.splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) * 1024

    def state(self):
        """Give how many threads and descriptors it has."""
        here = Path(f"/proc/{self.pid}")
        return tuple(len(os.listdir(here / name)) for name in ("task", "fd"))  # noqa: PTH208

    def is_alive(self):
        return self._process.poll() is None

    def end(self):
        """Have it stop in order; give its status and log."""
        try:
            _, log = self._process.communicate(timeout=20)
        finally:
            self._process.kill()
        return self._process.returncode, log


@contextlib.contextmanager
def served(folder, image, **options):
    """Serve a file in a process of its own; it must end in order."""
    server = Server(str(folder), str(image), **options)
    try:
        yield server
    except BaseException:
        server._process.kill()
        server._process.communicate()
        raise
    status, log = server.end()
    assert status == 0, log
    assert "Traceback" not in log


@contextlib.contextmanager
def served_from_a_tiny_disk(folder, **options):
    """Serve a file of 16 MiB from a file system that has room for 1 MiB of it."""
    disk = folder / "disk"
    disk.mkdir()
    # Who is not root may mount in a user namespace, where the system allows those.
    unshare = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
    prefix = [*unshare, "sh", "-c", TINY, "sh", str(disk)]
    with served(folder, disk / "image", prefix=prefix, **options) as server:
        yield server
