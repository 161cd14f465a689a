"""Every test of this folder needs QEMU's tools."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from .qemu import MISSING

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(
                pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
            )
            item.add_marker(pytest.mark.interop)


@pytest.fixture
def folder(tmp_path):
    """Give a folder in memory where there is one; images are small, and there are many."""
    memory = Path("/dev/shm")
    if not memory.is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)
