"""What systemd says of the units themselves; this takes no virtual machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nbdlink.link import installation

UNITS = sorted(path.name for path in (Path(__file__).parents[2] / "systemd").iterdir())
SERVICES = [name for name in UNITS if name != "nbdlink-shutdown.service"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    installation.install(root, str(Path(sys.executable).with_name("nbdlink")))
    return root / installation.UNITS


@pytest.mark.parametrize("name", UNITS)
def test_systemd_finds_nothing_wrong(installed, name):
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", installed / name], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("name", SERVICES)
def test_it_is_hardened(installed, name):
    # 3.2 is what CAP_SYS_ADMIN, the network and the owners of keys leave; 9.6 is no hardening.
    done = subprocess.run(
        [
            *("systemd-analyze", "security", "--offline=true", "--threshold=33", "--no-pager"),
            installed / name,
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", [name for name in SERVICES if name != "nbdlink-serve.service"])
def test_relays_outlive_it(installed, name):
    assert "\nKillMode=process\n" in (installed / name).read_text()
