"""Guests with systemd as process 1, in which nbdlink is installed by `nbdlink setup`.

Each test module has a guest for itself, whose tests go on where the ones before have left it: a
boot takes longer than a test. What a guest attaches is served in it, by nbdkit as a service that
is there before "the network", from images on this machine.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from nbdlink.link import installation
from tests.vm import UnavailableError, kernels
from tests.vm.machine import machine

RESULTS = Path("build/test-results")

_SERVER = """\
[Unit]
Description=A server that is elsewhere
DefaultDependencies=no
Before=network-online.target
[Service]
Slice=-.slice
KillSignal=SIGKILL
ExecStart=@/usr/bin/nbdkit @nbdkit -f -p {port} {options} file {image}
ExecStartPost=/bin/bash -c 'until (exec 3<>/dev/tcp/127.0.0.1/{port}) 2>/dev/null; do :; done'
"""
_KEYS = "/etc/nbdlink.psk"


class Site:
    """The files that a guest will find, and the images that are served in it.

    Attributes:
        tree: what is laid over the guest's files.
        images: a folder of this machine that the guest may write.
    """

    def __init__(self, folder: Path) -> None:
        self.tree = folder / "tree"
        self.images = folder / "images"
        self.images.mkdir()
        self.tree.mkdir()
        installation.install(self.tree, str(Path(sys.executable).with_name("nbdlink")))
        self._fstab = ""
        self._links = ""
        units = self.tree / "etc/systemd/system"
        units.mkdir(parents=True)
        (units / "network-online.target.wants").mkdir()
        keys = self.tree / _KEYS.lstrip("/")
        keys.write_text(f"guest:{secrets.token_hex(32)}\n")
        keys.chmod(0o600)
        self._port = 10809

    def add(
        self, name: str, *, options: str = "", partition: bool = False, tls_road: str | None = None
    ) -> None:
        """Add a link, the service server-NAME, and its mount on /mnt/NAME.

        Args:
            name: the link's.
            options: further ones for fstab, with a comma in front.
            partition: whether the file system is in a partition.
            tls_road: who does TLS, if anybody does.
        """
        self._port += 1
        image = self.images / f"{name}.img"
        with image.open("wb") as file:
            file.truncate(24 << 20)
        offset = 0
        if partition:
            offset = 1 << 20
            table = "label: gpt\nsize=20M\n"
            subprocess.run(["/sbin/sfdisk", "-q", image], input=table, text=True, check=True)
        mkfs = ["/sbin/mkfs.ext4", "-q", "-E", f"offset={offset}", image, "20M"]
        subprocess.run(mkfs, check=True)
        target = f"localhost:{self._port}"
        self._links += f"[link.{name}]\n"
        if tls_road:
            self._links += f'target = "nbds://guest@{target}"\n'
            self._links += f'tls-psk = "{_KEYS}"\ntls-road = "{tls_road}"\n'
        else:
            self._links += f'target = "nbd://{target}"\n'
        (self.tree / "etc/nbdlink.toml").write_text(self._links)
        source = f"/dev/disk/by-nbdlink/{name}{'-part1' if partition else ''}"
        # Under emulation, and with others at work, 90 seconds may not be enough.
        self._fstab += (
            f"{source} /mnt/{name} ext4 _netdev,x-systemd.device-timeout=600{options} 0 0\n"
        )
        (self.tree / "etc/fstab").write_text(self._fstab)
        (self.tree / "mnt" / name).mkdir(parents=True)
        tls = f"--tls=require --tls-psk={_KEYS}" if tls_road else ""
        units = self.tree / "etc/systemd/system"
        unit = units / f"server-{name}.service"
        unit.write_text(_SERVER.format(port=self._port, options=tls, image=image))
        wants = units / "network-online.target.wants"
        (wants / unit.name).symlink_to(f"../{unit.name}")

    def enable(self, unit: str) -> None:
        """Do what `systemctl enable` does."""
        subprocess.run(
            ["systemctl", f"--root={self.tree}", "enable", unit], check=True, capture_output=True
        )

    def fsck(self, name: str, *, partition: bool = False) -> subprocess.CompletedProcess[str]:
        """Check the file system on an image, without mending anything."""
        offset = "?offset=1048576" if partition else ""
        return subprocess.run(
            ["/sbin/e2fsck", "-f", "-n", f"{self.images / name}.img{offset}"],
            capture_output=True,
            text=True,
            check=False,
        )

    def content(self, name: str, path: str, *, partition: bool = False) -> str:
        """Read a file of the file system on an image."""
        offset = "?offset=1048576" if partition else ""
        return subprocess.run(
            ["/sbin/debugfs", "-R", f"cat {path}", f"{self.images / name}.img{offset}"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return Site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def booted(site, request):
    """Give a function that boots the guest of this module."""
    series = os.environ.get("NBDLINK_KERNEL", "6.12")
    log = RESULTS / f"systemd-{request.module.__name__.rpartition('_')[2]}.console"
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        kernel = kernels.get(series)
        powered = machine(kernel, tree=site.tree, writable=[site.images], console_log=log)
        guest = powered.__enter__()
    except UnavailableError as error:
        pytest.skip(str(error))
    yield guest
    powered.__exit__(None, None, None)
