"""Our server, for other implementations' clients, and a way to run those."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from nbdlink.server import serve_in_thread

from .ours import serving


@pytest.fixture
def serve(tmp_path):
    """Serve exports, by default on a Unix socket, until the test ends; give the service."""
    with contextlib.ExitStack() as stack:

        def start(exports, **options):
            if "host" not in options:
                options.setdefault("unix", tmp_path / "nbdlink.sock")
            return stack.enter_context(serve_in_thread(exports, **options))

        yield start


@pytest.fixture
def program(tmp_path):
    """Run `nbdlink serve` until the test ends; give it, see `ours.Server`."""
    numbers = itertools.count()
    with contextlib.ExitStack() as stack:

        def start(*words, **options):
            folder = tmp_path / f"server{next(numbers)}"
            folder.mkdir()
            return stack.enter_context(serving(folder, *words, **options))

        yield start


@contextlib.contextmanager
def in_memory():
    """Make a folder on a tmpfs, which knows holes but has ways of its own."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="nbdlink-") as folder:
        yield Path(folder)


@pytest.fixture(params=["disk", "tmpfs"])
def place(request, tmp_path):
    """A folder on a disk, or in memory."""
    if request.param == "disk":
        yield tmp_path
        return
    with in_memory() as folder:
        yield folder


@pytest.fixture
def run():
    """Run a program to its end; give what it printed. Fail if it fails, unless told not to."""

    def run(*command, check=True, **options):
        if shutil.which(command[0]) is None:
            pytest.skip(f"{command[0]} is not installed")
        words = [str(word) for word in command]
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=60, check=False, **options
        )
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout if check else done

    return run
