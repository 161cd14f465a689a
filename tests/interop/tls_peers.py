"""TLS servers of other implementations, each serving one file on TCP.

All of them take a directory in the layout that `tests.certificates` writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from nbdlink.uri import Target
from tests.interop.peers import _greets, _running


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextlib.contextmanager
def nbdkit(image: Path, credentials: Path, *more: str) -> Iterator[Target]:
    """Serve `image` by nbdkit; `credentials` is a directory, or a file of pre-shared keys."""
    target = Target("localhost", free_port())
    kind = "certificates" if credentials.is_dir() else "psk"
    command = ["nbdkit", "-f", "-i", "127.0.0.1", "-p", str(target.port), "--tls=require"]
    command += [f"--tls-{kind}={credentials}", *more, "file", str(image)]
    with _running(command, dataclasses.replace(target, host="127.0.0.1")):
        yield dataclasses.replace(target, tls=True)


def _spare_the_search(folder: Path) -> None:
    """Give qemu a prime number, for which it would look for a minute under emulation."""
    path = folder / "dh-params.pem"
    if not path.exists():
        words = ["openssl", "genpkey", "-genparam", "-algorithm", "DH"]
        words += ["-pkeyopt", "group:ffdhe2048", "-out", str(path)]
        subprocess.run(words, check=True, capture_output=True)


@contextlib.contextmanager
def qemu_nbd(image: Path, credentials: Path, *more: str, verify: bool = False) -> Iterator[Target]:
    """Serve `image` by qemu-nbd, under the name "data"."""
    target = Target("localhost", free_port(), export="data")
    _spare_the_search(credentials if credentials.is_dir() else credentials.parent)
    peer = "yes" if verify else "no"
    creds = f"tls-creds-x509,id=tls0,endpoint=server,dir={credentials},verify-peer={peer}"
    if not credentials.is_dir():
        creds = f"tls-creds-psk,id=tls0,endpoint=server,dir={credentials.parent}"
    command = ["qemu-nbd", "-b", "127.0.0.1", "-p", str(target.port), "-t", "-e", "0"]
    command += ["-f", "raw", "-x", "data", "--object", creds, "--tls-creds", "tls0", *more]
    with _running([*command, str(image)], dataclasses.replace(target, host="127.0.0.1")):
        yield dataclasses.replace(target, tls=True)


@contextlib.contextmanager
def nbd_server(image: Path, credentials: Path) -> Iterator[Target]:
    """Serve `image` by nbd-server, which wants a certificate of the client as well."""
    target = Target("127.0.0.1", free_port(), export="data")
    config = image.parent / "nbd-server-tls.conf"
    config.write_text(
        f"[generic]\nport = {target.port}\nlistenaddr = 127.0.0.1\nallowlist = true\n"
        f"force_tls = true\ncacertfile = {credentials}/ca-cert.pem\n"
        f"certfile = {credentials}/server-cert.pem\nkeyfile = {credentials}/server-key.pem\n"
        f"[data]\nexportname = {image}\nflush = true\nfua = true\ntrim = true\n"
    )
    pid_file = image.parent / "nbd-server-tls.pid"
    subprocess.run(["nbd-server", "-C", str(config), "-p", str(pid_file)], check=True, timeout=60)
    try:
        end = time.monotonic() + 60
        while not (pid_file.exists() and _greets(target)):
            if time.monotonic() > end:
                raise RuntimeError(f"nbd-server does not listen on {target}")
            time.sleep(0.02)
        yield dataclasses.replace(target, host="localhost", tls=True)
    finally:
        os.kill(int(pid_file.read_text()), signal.SIGTERM)


TLSPeer = Callable[[Path, Path], contextlib.AbstractContextManager[Target]]

TLS_PEERS: dict[str, TLSPeer] = {
    "nbdkit": nbdkit,
    "qemu-nbd": qemu_nbd,
    "nbd-server": nbd_server,
}
