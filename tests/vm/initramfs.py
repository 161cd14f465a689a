"""The initramfs of the machine: busybox, the modules that mounting the root takes, the job.

It is a cpio archive in the "newc" format (Documentation/driver-api/early-userspace/
buffer-format.rst in the kernel's sources), made anew for each boot: it is small.
"""

from __future__ import annotations

import lzma
import stat
from collections.abc import Mapping
from pathlib import Path

from . import UnavailableError
from .kernels import Kernel

# In the order to load them; what a kernel has built in is not among its modules.
_MODULES = ("virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay")

_BUSYBOX = ("/bin/busybox", "/usr/bin/busybox")


def build(kernel: Kernel, files: Mapping[str, bytes]) -> bytes:
    """An initramfs for a kernel, with `files` (absolute path: content) in it.

    A file is executable if it starts with "#!".

    Raises:
        UnavailableError: busybox is not here.
    """
    modules = {path.name.split(".ko")[0] + ".ko": path for path in _load_order(kernel)}
    archive = [_entry(name, stat.S_IFDIR | 0o755) for name in ("bin", "dev", "modules", "job")]
    archive += [
        _entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
        _entry("dev/null", stat.S_IFCHR | 0o666, device=(1, 3)),
        _entry("bin/busybox", stat.S_IFREG | 0o755, _busybox()),
        _entry("modules/order", stat.S_IFREG | 0o644, "\n".join(modules).encode()),
    ]
    for name, path in modules.items():
        content = path.read_bytes()
        if path.suffix == ".xz":  # busybox's insmod cannot unpack
            content = lzma.decompress(content)
        archive.append(_entry(f"modules/{name}", stat.S_IFREG | 0o644, content))
    for name, content in files.items():
        mode = 0o755 if content.startswith(b"#!") else 0o644
        archive.append(_entry(name.lstrip("/"), stat.S_IFREG | mode, content))
    archive.append(_entry("TRAILER!!!", 0))
    return b"".join(archive)


def _busybox() -> bytes:
    for name in _BUSYBOX:
        if (path := Path(name)).exists():
            content = path.read_bytes()
            if b"/ld-linux" not in content[:4096]:
                return content
    raise UnavailableError(
        "no static busybox on this machine", hint="install the package busybox-static"
    )


def _load_order(kernel: Kernel) -> list[Path]:
    needs: dict[str, list[str]] = {}
    by_name: dict[str, str] = {}
    for line in (kernel.modules / "modules.dep").read_text().splitlines():
        path, _, others = line.partition(":")
        needs[path] = others.split()
        by_name[Path(path).name.split(".ko")[0]] = path
    order: list[Path] = []
    for name in _MODULES:
        if name in by_name:
            # modules.dep lists all that a module needs, the nearest first.
            for path in [*reversed(needs[by_name[name]]), by_name[name]]:
                if kernel.modules / path not in order:
                    order.append(kernel.modules / path)
    return order


def _entry(
    name: str, mode: int, content: bytes = b"", *, device: tuple[int, int] = (0, 0)
) -> bytes:
    encoded = name.encode() + b"\0"
    fields = (0, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(encoded), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
    return _padded(header) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
