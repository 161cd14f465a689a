"""Programs of ours in processes of their own, which need not start Python first.

Under emulation that takes ten seconds, each time, and there are hundreds of them in these tests.
So they are forked from one process that has everything imported. Each is a session of its own,
as it would be under a service manager; only its command line is not its own.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["nbdlink.cli.main", "nbdlink.cli.serve", "nbdlink.server", "tests.kernel.supervise"]
)


class Forked:
    """A running program; the methods are those of `subprocess.Popen`."""

    def __init__(self, program, arguments, *, stderr, environment=None):
        """Start it.

        Args:
            program: a function of its arguments; what it returns is the exit status.
            arguments: picklable.
            stderr: a path to append to, or the writing end of a pipe (`Connection`).
            environment: what it has besides that of the tests.
        """
        self._process = _context.Process(
            target=_run, args=(program, arguments, stderr, environment or {}), daemon=True
        )
        self._process.start()
        self.pid = self._process.pid

    def poll(self):
        return self._process.exitcode

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout)
        return self._process.exitcode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def pipe():
    """Give the ends of a pipe: to read from, and for `stderr`."""
    return _context.Pipe(duplex=False)


def _run(program, arguments, stderr, environment):
    os.setsid()
    os.environ.update(environment)
    if hasattr(stderr, "fileno"):
        os.dup2(stderr.fileno(), 2)
        stderr.close()
    else:
        os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), 2)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    raise SystemExit(program(*arguments))
