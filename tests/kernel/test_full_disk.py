"""A server whose disk is full; here because it takes a file system that may be filled."""

from __future__ import annotations

import errno
import subprocess

import pytest

import nbdlink
from nbdlink.errors import RequestError
from nbdlink.server import serve_in_thread

pytestmark = pytest.mark.kernel


@pytest.fixture
def image(tmp_path):
    """A file of 8 MiB on a file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", folder], check=True)
    path = folder / "disk.img"
    with path.open("wb") as file:
        file.truncate(8 << 20)
    yield path
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("fua", [False, True])
def test_it_is_told_and_forgotten_once_there_is_room(image, fua):
    with serve_in_thread({"": image}) as service:
        with nbdlink.connect(service.uri()) as nbd:
            with pytest.raises(RequestError) as caught:
                nbd.pwrite(bytes(range(256)) * (4 << 12), 0, fua=fua)
            assert caught.value.errno == errno.ENOSPC
            nbd.trim(nbd.size, 0)
            nbd.pwrite(b"there is room again", 0, fua=True)
            nbd.flush()
        with nbdlink.connect(service.uri()) as another:
            another.flush()
            assert another.pread(5, 0) == b"there"
    assert service.status == 0
