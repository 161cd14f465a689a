"""A supervisor in a process of its own, and what is to be seen of its links."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import threading

from nbdlink.link import record
from nbdlink.link.health import health

from .conftest import PATIENCE
from .forked import Forked, pipe
from .supervise import run


class Supervisor:
    """A supervisor in a process of its own, whose log can be waited for.

    Attributes:
        said: all lines of its log so far.
    """

    def __init__(self, folder, names=(), port=0, under=None):
        self.config = folder / "nbdlink.toml"
        if not self.config.exists():
            self.config.write_text("")
        environment = {"NBDLINK_RUNTIME_DIRECTORY": str(record.DIRECTORY), **(under or {})}
        self.said = []
        self._lines = queue.Queue()
        reading, writing = pipe()
        self._log = os.fdopen(os.dup(reading.fileno()), encoding="utf-8")
        with reading, writing:
            self._process = Forked(
                run, (self.config, port, tuple(names)), stderr=writing, environment=environment
            )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    @property
    def pid(self):
        return self._process.pid

    def _read(self):
        for line in self._log:
            self._lines.put(line)
        self._lines.put(None)

    def until(self, pattern):
        """Wait for a line of the log that has the pattern in it; give what matched."""
        while True:
            try:
                line = self._lines.get(timeout=PATIENCE)
            except queue.Empty:
                line = None
            assert line is not None, f"{pattern!r} never came in:\n{''.join(self.said)}"
            self.said.append(line)
            if match := re.search(pattern, line):
                return match

    def log(self):
        """Give all that it has said so far, lines that nobody has waited for included."""
        with contextlib.suppress(queue.Empty):
            while (line := self._lines.get_nowait()) is not None:
                self.said.append(line)
        return "".join(self.said)

    def tell(self, number):
        self._process.send_signal(number)

    def end(self, number=signal.SIGTERM):
        """End it, unless it has ended by itself; give its exit status."""
        if number is not None and self._process.poll() is None:
            self._process.send_signal(number)
        status = self._process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        self._log.close()
        return status


def link(*servers, **settings):
    """Write a configuration of one link."""
    first, *others = [server.uri for server in servers]
    lines = [f'[link.data]\ntarget = "{first}"', f"paths = {others}"]
    settings = {"timeout": 60, **settings}
    return "\n".join([*lines, *(f"{key} = {value}" for key, value in settings.items())])


def index_of(name):
    return next((known.index for known in record.read_all() if known.name == name), None)


def live(name="data"):
    index = index_of(name)
    return None if index is None else len(health(record.read(index)).live)
