"""`nbdlink serve` in a process of its own, files for it to serve, and what lies in them."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest

SYSTEM_PYTHON = "/usr/bin/python3"
"""The only one that finds the module of Debian's package python3-libnbd."""

TIMEOUT = 60

# Data in a sparse file: offset and length. Two are single blocks with one block between them.
ISLANDS = ((64 << 10, 128 << 10), (1 << 20, 1 << 20), (5 << 20, 4096), (5 << 20 | 8192, 4096))


class Server:
    """`nbdlink serve`, ready for clients.

    Attributes:
        uris: of every export, in the order of the command line.
        pid: the server's, even if another program has started it.
    """

    def __init__(self, folder, words, road="unix", under=(), exports=None):
        pid_file = folder / "pid"
        listen = ["-k", folder / "socket"] if road == "unix" else ["-b", "127.0.0.1", "-p", "0"]
        command = [*under, sys.executable, "-m", "nbdlink", "serve", "--pid-file", pid_file]
        self._process = subprocess.Popen(
            [str(word) for word in [*command, *listen, *words]],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if exports is None:
            exports = sum("/" in str(word) for word in words)
        lines = [self._process.stdout.readline() for _ in range(exports)]
        self.uris = [line.partition(" is ")[0] for line in lines]
        assert all(self.uris), self._process.communicate(timeout=TIMEOUT)
        self.pid = int(pid_file.read_text())

    @property
    def uri(self):
        """The first export's."""
        return self.uris[0]

    def end(self, status=0):
        """Stop it, which must go well whatever its clients did; give what it said to stderr."""
        if self._process.returncode is not None:
            return ""
        os.kill(self.pid, signal.SIGTERM)
        _, said = self._process.communicate(timeout=TIMEOUT)
        assert self._process.returncode == status, said
        assert "Traceback" not in said, said
        return said


@contextlib.contextmanager
def serving(folder, *words, **options):
    """Serve, from options and paths (with a slash in them) as `nbdlink serve` takes them.

    Where options have paths too, say how many `exports` there are.
    """
    server = Server(folder, words, **options)
    try:
        yield server
    finally:
        server.end()


def sparse(path, size=8 << 20):
    """Make a file of a few islands and a last block, with holes between them."""
    with path.open("wb") as file:
        file.truncate(size)
        for offset, length in (*ISLANDS, (size - 65536, 65536)):
            file.seek(offset)
            file.write(random.Random(offset).randbytes(length))
    return path


def full(path, size=8 << 20, seed=1):
    """Make a file without holes."""
    path.write_bytes(random.Random(seed).randbytes(size))
    return path


def layout(path):
    """Tell where a file has data and holes: (offset, length, whether it is data) of each."""
    found = []
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        at = 0
        while at < size:
            try:
                data = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                data = size  # ENXIO: there is none behind
            if data > at:
                found.append((at, data - at, False))
            if data < size:
                at = os.lseek(file.fileno(), data, os.SEEK_HOLE)
                found.append((data, at - data, True))
            else:
                at = size
    return found


def allocated(path):
    """Give the bytes that a file takes on the disk."""
    return path.stat().st_blocks * 512


def need(*programs):
    """Skip the test if one is not there."""
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


def start_libnbd(function, *arguments):
    """Start a function of a test in Debian's Python, where it can import `nbd`.

    It sees nothing of its module, takes and gives what JSON can carry, and imports for itself.
    """
    need(SYSTEM_PYTHON)
    lines, first = inspect.getsourcelines(function)
    # Placed so that a traceback shows the lines of the test.
    source = "\n" * (first - 1) + textwrap.dedent("".join(lines))
    program = (
        "import json, sys\n"
        "try: import nbd\n"
        "except ImportError: sys.exit(77)\n"
        "name, file, source, arguments = json.loads(sys.argv[1])\n"
        "exec(compile(source, file, 'exec'))\n"
        "given = globals()[name](*arguments)\n"
        "print(json.dumps(given))\n"
    )
    words = json.dumps([function.__name__, inspect.getfile(function), source, arguments])
    return subprocess.Popen(
        [SYSTEM_PYTHON, "-c", program, words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(process):
    """Wait for what `start_libnbd` started; give what the function gave."""
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
    if process.returncode == 77:
        pytest.skip("python3-libnbd is not installed")
    assert process.returncode == 0, out + err
    return json.loads(out.splitlines()[-1])


def libnbd(function, *arguments):
    """Run a function of a test in Debian's Python to its end; give what it gave."""
    return result(start_libnbd(function, *arguments))
