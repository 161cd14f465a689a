"""Servers that come and go on one port, as those do that devices have to outlive."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading

from nbdlink.cli.main import main
from nbdlink.uri import Target
from tests.interop.peers import _greets

from .conftest import until
from .forked import Forked


class Restartable:
    """A server in a process of its own, on a port that it keeps.

    Attributes:
        target: its export.
        image: the file that is served.
    """

    def __init__(self, kind, image, folder, *options, credentials=None):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.kind, self.image, self._folder, self._options = kind, image, folder, options
        self._credentials = credentials
        self.target = Target("127.0.0.1", self.port, export="data", tls=credentials is not None)
        self._process = None
        self._lock = threading.RLock()

    @property
    def uri(self):
        return str(self.target)

    def command(self):
        """Give its words; those of ours without the first."""
        if self.kind == "nbdkit":
            return ["nbdkit", "-f", "-p", self.port, "-i", "127.0.0.1", "file", self.image]
        if self.kind == "qemu-nbd":
            words = ["qemu-nbd", "-p", self.port, "-b", "127.0.0.1", "-t", "-e", "0", "-f", "raw"]
            return [*words, "-x", "data", self.image]
        words = ["serve", "-b", "127.0.0.1", "-p", self.port]
        if self._credentials:
            words += ["--tls-certificates", self._credentials]
        return [*words, "-x", "data", *self._options, self.image]

    def start(self, *options):
        """Start it; it greets when this returns."""
        with self._lock:
            assert self._process is None
            self._options = options or self._options
            self._process = self._run([str(word) for word in self.command()])
            # Whoever is first in line gets the greeting; this server only has to be there.
            until(lambda: self._process.poll() is not None or _greets(self.target))
            assert self._process.poll() is None, self.log()
        return self

    def _run(self, words):
        path = self._folder / f"server-{self.port}.log"
        if self.kind == "nbdlink":
            return Forked(main, (words,), stderr=path)
        with path.open("a") as log:
            return subprocess.Popen(
                words, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True
            )

    def kill(self):
        """End it as a crash does."""
        with self._lock:
            if self._process is not None:
                self._process.kill()
                self._process.wait()
                self._process = None

    def revive(self):
        """Start it again if it has ended by itself."""
        with self._lock:
            if self._process is not None and self._process.poll() is not None:
                self._process = None
                self.start()

    def restart(self):
        self.kill()
        return self.start()

    def send_signal(self, number):
        self._process.send_signal(number)

    def freeze(self):
        """Have it stand still, with all of its processes, as a machine does that swaps."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def thaw(self):
        """Have it go on."""
        os.killpg(self._process.pid, signal.SIGCONT)

    def status(self):
        """Say for people whether it runs."""
        if self._process is None:
            return "was ended"
        status = self._process.poll()
        return "runs" if status is None else f"ended by itself with status {status}"

    def log(self):
        return (self._folder / f"server-{self.port}.log").read_text()
