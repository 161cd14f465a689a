"""A service on a Unix socket, with a storage that tests can look into."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import pytest

from nbdlink.server import serve_in_thread

from .fakes import MemoryStorage
from .programs import Program


@pytest.fixture
def storage():
    return MemoryStorage()


@pytest.fixture
def nothing_leaks(eventually):
    """Check that what is set up after this leaves no thread and no descriptor behind."""

    def state():
        return threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))

    before = state()
    yield
    eventually(lambda: state() == before, f"{before} threads and descriptors became {state()}")


@pytest.fixture
def serve(tmp_path, nothing_leaks):
    """Serve exports until the test ends; give the service. It must leave nothing behind."""
    with contextlib.ExitStack() as stack:
        count = 0

        def start(exports, **options):
            nonlocal count
            count += 1
            options.setdefault("unix", tmp_path / f"nbd{count}.sock")
            return stack.enter_context(serve_in_thread(exports, **options))

        yield start


@pytest.fixture
def service(serve, storage):
    """A service with one export, named by the empty name."""
    return serve({"": storage})


@pytest.fixture
def program(tmp_path):
    """Run services in processes of their own until the test ends; give each as it is ready."""
    with contextlib.ExitStack() as stack:

        def start(**options):
            program = Program(tmp_path, **options)
            stack.callback(program.process.communicate)
            stack.callback(program.process.kill)
            return program

        yield start
