"""Our server, for other implementations' clients, and a way to run those."""

from __future__ import annotations

import contextlib
import shutil
import subprocess

import pytest

from nbdlink.server import serve_in_thread


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
def run():
    """Run a program to its end; give what it printed. Fail if it fails, unless told not to."""

    def run(*command, check=True):
        if shutil.which(command[0]) is None:
            pytest.skip(f"{command[0]} is not installed")
        done = subprocess.run(
            [str(word) for word in command], capture_output=True, text=True, timeout=60, check=False
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout if check else done

    return run
