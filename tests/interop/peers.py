"""Servers of other implementations, each serving one file, for clients to be tested with.

They run with Debian's packages' own defaults, on a Unix socket where they can, and are ready
when the `with` block begins.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from nbdlink.uri import Target


def _greets(target: Target) -> bool:
    """Tell whether the server answers; False if it does not even listen yet.

    Listening is not enough: nbd-server listens, and then looks for a large prime number (for
    TLS) before it accepts anybody, which can take ten seconds under emulation.
    """
    family = socket.AF_UNIX if target.socket else socket.AF_INET
    with socket.socket(family) as probe:
        probe.settimeout(60)
        try:
            probe.connect(target.socket or (target.host, target.port))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        return probe.recv(8) == b"NBDMAGIC"


@contextlib.contextmanager
def _running(command: list[str], target: Target) -> Iterator[Target]:
    """Start a server in the foreground, wait until it listens, and end it afterwards."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + 60
        while not _greets(target):
            if process.poll() is not None:
                said = process.stdout.read().decode(errors="replace") if process.stdout else ""
                raise RuntimeError(f"{command[0]} ended with {process.returncode}: {said}")
            if time.monotonic() > end:
                raise RuntimeError(f"{command[0]} does not listen on {target}")
            # None of these servers tells when it listens; the kernel has no event for it.
            time.sleep(0.02)
        yield target
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout:
            process.stdout.close()


@contextlib.contextmanager
def nbdkit(image: Path, folder: Path) -> Iterator[Target]:
    """Serve `image` by nbdkit's file plugin."""
    target = Target(socket=str(folder / "nbdkit.sock"))
    command = ["nbdkit", "-f", "-U", str(target.socket), "file", str(image)]
    with _running(command, target):
        yield target


@contextlib.contextmanager
def qemu_nbd_of(uri: str, folder: Path, *, read_only: bool = False) -> Iterator[Target]:
    """Have qemu-nbd pass an export on, as a client of another server."""
    target = Target(socket=str(folder / "qemu.sock"), export="passed on")
    command = ["qemu-nbd", "-k", str(target.socket), "-t", "-e", "0", "-f", "raw"]
    command += ["-x", "passed on", *(["-r"] if read_only else []), uri]
    with _running(command, target):
        yield target


@contextlib.contextmanager
def qemu_nbd(image: Path, folder: Path, *, shared: int = 0) -> Iterator[Target]:
    """Serve `image` by qemu-nbd under a name, to `shared` clients at a time (0: any number)."""
    target = Target(socket=str(folder / "qemu.sock"), export="data")
    command = ["qemu-nbd", "-k", str(target.socket), "-t", "-e", str(shared), "-f", "raw"]
    command += ["-x", "data", "-D", "a description", str(image)]
    with _running(command, target):
        yield target


@contextlib.contextmanager
def nbd_server(image: Path, folder: Path) -> Iterator[Target]:
    """Serve `image` by nbd-server, which listens on TCP."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    target = Target("127.0.0.1", port, export="data")
    config = folder / "nbd-server.conf"
    config.write_text(
        f"[generic]\nport = {port}\nlistenaddr = 127.0.0.1\nallowlist = true\n"
        f"[data]\nexportname = {image}\nflush = true\nfua = true\ntrim = true\n"
    )
    pid_file = folder / "nbd-server.pid"
    # In the foreground (-d) it serves one client and ends, so it goes to the background here.
    subprocess.run(["nbd-server", "-C", str(config), "-p", str(pid_file)], check=True, timeout=60)
    try:
        end = time.monotonic() + 60
        while not (pid_file.exists() and _greets(target)):
            if time.monotonic() > end:
                raise RuntimeError(f"nbd-server does not listen on {target}")
            time.sleep(0.02)
        yield target
    finally:
        os.kill(int(pid_file.read_text()), signal.SIGTERM)


Peer = Callable[[Path, Path], contextlib.AbstractContextManager[Target]]

PEERS: dict[str, Peer] = {"nbdkit": nbdkit, "qemu-nbd": qemu_nbd, "nbd-server": nbd_server}
MISSING = [name for name in PEERS if shutil.which(name) is None]
