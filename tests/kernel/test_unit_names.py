"""Names that are nonsense on any machine, and looking without a descriptor left."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from nbdlink import kernel
from nbdlink.errors import KernelError
from nbdlink.kernel import sysfs


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("nbd0p1", "nbd0p1 is a partition of /dev/nbd0"),
        ("/dev/nbd12p3", "/dev/nbd12p3 is a partition of /dev/nbd12"),
        ("/dev/null", "/dev/null is not an nbd device"),
        ("null", "null is not an nbd device"),
        ("/", "/ is not an nbd device"),
        ("nbd", "nbd: no such file or directory"),
        ("nbd01", "nbd01: no such file or directory"),
        ("nbd-1", "nbd-1: no such file or directory"),
        ("/dev/disk/by-label/absent", "/dev/disk/by-label/absent: no such file or directory"),
        ("/dev/null/nbd0", "/dev/null/nbd0: not a directory"),
        ("x" * 5000, "file name too long"),
    ],
)
def test_nonsense(name, complaint):
    with pytest.raises(KernelError, match=complaint):
        kernel.index_of(name)


def test_a_device_yet_to_be_made():
    assert kernel.index_of("/dev/nbd77", must_exist=False) == 77


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"block_size": 0}, "a block size of 0"),
        ({"block_size": 256}, "a block size of 256"),
        ({"block_size": 1000}, "a block size of 1000"),
        ({"block_size": 1 << 20}, "a block size of 1048576"),
        ({"size": 0}, "a device of 0 bytes"),
        ({"size": -512}, "a device of -512 bytes"),
        ({"size": 1 << 63}, "a device of 9223372036854775808 bytes"),
        ({"sockets": ()}, "at least one connection"),
        ({"sockets": (3, 4)}, "no MULTI_CONN flag"),
        ({"timeout": 0}, "a timeout of 0 seconds"),
        ({"dead_timeout": -1}, "a dead timeout of -1 seconds"),
    ],
)
def test_bindings_the_kernel_would_refuse_or_misunderstand(fields, complaint):
    good = {"sockets": (3,), "size": 4096, "transmission_flags": 1}
    with pytest.raises(KernelError, match=complaint):
        kernel.Binding(**{**good, **fields})


def test_several_sockets_with_the_flag():
    assert kernel.Binding((3, 4), 4096, 1 | 256).sockets == (3, 4)


def test_the_face_knows_its_names():
    for name in kernel.__all__:
        assert getattr(kernel, name).__module__.startswith(("nbdlink.kernel", "typing"))


def test_the_face_knows_no_others():
    with pytest.raises(AttributeError, match="'nonsense'"):
        kernel.nonsense  # noqa: B018


@pytest.mark.parametrize("look", [sysfs.pid, lambda _: sysfs.live_links()])
def test_no_device_is_taken_for_free_if_nobody_can_look(look, monkeypatch):
    monkeypatch.setattr(sysfs, "_BLOCK", Path("/proc"))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(KernelError, match="too many open files"):
            look(0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
