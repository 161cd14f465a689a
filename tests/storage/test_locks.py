"""QEMU's locks: ours keep its programs out, and theirs us, and neither more than need be."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import shutil
import subprocess
import sys

import pytest

from nbdlink.errors import StorageError
from nbdlink.storage.locks import Use, lock
from nbdlink.storage.raw import RawStorage

pytestmark = pytest.mark.interop

SIZE = 4 << 20


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    return path


@pytest.fixture
def qcow2(tmp_path):
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, SIZE)
    return path


def run(*words):
    if shutil.which(words[0]) is None:
        pytest.skip(f"{words[0]} is not installed")
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=60)


@contextlib.contextmanager
def locked(path, use):
    """Lock a file as one of our servers would."""
    fd = os.open(path, os.O_RDONLY)
    try:
        lock(fd, path, use)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def qemu_io(path, kind, *words):
    """Have qemu-io hold an image open; its prompt comes when it does."""
    if shutil.which("qemu-io") is None:
        pytest.skip("qemu-io is not installed")
    process = subprocess.Popen(
        ["qemu-io", *words, "-f", kind, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        assert select.select([process.stdout], [], [], 60)[0]
        assert process.stdout.read1() == b"qemu-io> "
        yield process
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(60)


@contextlib.contextmanager
def guest(path, *, share="off"):
    """Have a virtual machine hold a disk, as a guest does that runs."""
    program = shutil.which("qemu-system-x86_64")
    if program is None:
        pytest.skip("qemu-system-x86_64 is not installed")
    process = subprocess.Popen(
        [
            program, "-nodefaults", "-display", "none", "-accel", "tcg", "-S", "-qmp", "stdio",
            "-drive", f"if=none,id=d,file={path},format=raw",
            "-device", f"virtio-blk-pci,drive=d,share-rw={share}",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(b'{"execute": "qmp_capabilities"}')
            process.stdin.flush()
        # The greeting may come before the disk is looked at; the answer does not.
        yield b"return" in process.stdout.readline() + process.stdout.readline()
    finally:
        process.kill()
        process.communicate()


def test_a_guests_image_is_not_written_to(image):
    with guest(image) as runs:
        assert runs
        with pytest.raises(StorageError) as caught:
            RawStorage.open(image)
    assert str(image) in str(caught.value)
    assert "is in use by qemu-system-x86" in str(caught.value)
    assert "is a guest running?" in str(caught.value)


def test_nothing_is_copied_onto_a_guests_image(image, tmp_path):
    before = image.read_bytes()
    (tmp_path / "other").write_bytes(b"x" * len(before))
    words = ["nbdlink", "copy", tmp_path / "other", image]
    with guest(image):
        done = subprocess.run(
            [sys.executable, "-m", *map(str, words)], capture_output=True, text=True
        )
    assert (done.returncode, "is a guest running?" in done.stderr) == (1, True)
    assert image.read_bytes() == before


def test_a_guests_image_may_be_read(image):
    with guest(image):
        RawStorage.open(image, read_only=True).close()


def test_a_guest_that_shares_its_disk_is_no_hindrance(image):
    with guest(image, share="on"):
        RawStorage.open(image).close()


def test_a_guest_does_not_get_an_image_that_we_write_to(image):
    storage = RawStorage.open(image)
    try:
        with guest(image) as runs:
            assert not runs
    finally:
        storage.close()


def test_a_guest_gets_an_image_that_we_read(image):
    storage = RawStorage.open(image, read_only=True)
    try:
        with guest(image) as runs:
            assert runs
    finally:
        storage.close()


def test_two_of_ours_share_a_raw_image(image):
    first, second = RawStorage.open(image), RawStorage.open(image)
    first.close()
    second.close()


def test_qemu_writes_to_a_raw_image_beside_us(image):
    # As with two of qemu-nbd: writing is shared by all but guests.
    storage = RawStorage.open(image)
    try:
        assert run("qemu-io", "-f", "raw", "-c", "write 0 512", image).returncode == 0
        with qemu_io(image, "raw"):
            RawStorage.open(image).close()
    finally:
        storage.close()


def test_qemu_makes_a_raw_image_larger_beside_us(image):
    storage = RawStorage.open(image)
    try:
        done = run("qemu-img", "resize", "-q", "-f", "raw", image, 2 * SIZE)
        assert done.returncode == 0, done.stderr
        storage.notice_growth()
        assert storage.size == 2 * SIZE
    finally:
        storage.close()


@pytest.mark.parametrize("ours", [Use.FORMAT_READ, Use.FORMAT_WRITE])
def test_qemu_does_not_write_to_an_image_of_a_format_that_we_use(qcow2, ours):
    with locked(qcow2, ours):
        done = run("qemu-io", "-f", "qcow2", "-c", "write 0 512", qcow2)
    assert done.returncode != 0
    assert "Is another process using the image" in done.stderr


@pytest.mark.parametrize(("ours", "works"), [(Use.FORMAT_READ, True), (Use.FORMAT_WRITE, False)])
def test_qemu_reads_an_image_of_a_format_that_we_read_only(qcow2, ours, works):
    with locked(qcow2, ours):
        done = run("qemu-img", "info", qcow2)
    assert (done.returncode == 0) is works


@pytest.mark.parametrize(
    ("theirs", "ours", "works"),
    [
        ([], Use.FORMAT_WRITE, False),
        ([], Use.FORMAT_READ, False),
        (["-r"], Use.FORMAT_WRITE, False),
        (["-r"], Use.FORMAT_READ, True),
    ],
)
def test_we_heed_what_qemu_does_to_an_image_of_a_format(qcow2, theirs, ours, works):
    with (
        qemu_io(qcow2, "qcow2", *theirs),
        contextlib.nullcontext() if works else pytest.raises(StorageError, match="is in use by"),
        locked(qcow2, ours),
    ):
        pass


def test_only_one_of_ours_has_an_image_of_a_format(qcow2):
    with (
        locked(qcow2, Use.FORMAT_WRITE),
        pytest.raises(StorageError, match="is in use"),
        locked(qcow2, Use.FORMAT_WRITE),
    ):
        pass


def test_a_lock_lives_on_in_a_forked_process(image):
    reader, writer = os.pipe()
    storage = RawStorage.open(image)
    child = os.fork()
    if not child:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    os.close(reader)
    storage.close()
    try:
        with guest(image) as runs:
            assert not runs
    finally:
        os.close(writer)
        os.waitpid(child, 0)


def test_a_program_that_locks_the_whole_file_is_heeded(image):
    with image.open("r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        # Of another process, as the locks of lockf belong to one.
        code = (
            "import sys; from nbdlink.storage.raw import RawStorage; RawStorage.open(sys.argv[1])"
        )
        done = run(sys.executable, "-c", code, image)
    assert "is in use" in done.stderr


def test_a_file_system_without_such_locks_is_none_of_our_business(image, monkeypatch):
    def refuse(*_):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with locked(image, Use.FORMAT_WRITE), locked(image, Use.FORMAT_WRITE):
        pass
