"""The two machines of vagrant/: that Vagrant takes the file; starting them takes minutes."""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib

import pytest

from .conftest import PROJECT


@pytest.mark.parametrize("driver", ["kvm", "qemu"])
def test_vagrant_takes_the_file(driver, tmp_path):
    if shutil.which("vagrant") is None:
        pytest.skip("vagrant is not installed")
    environment = {
        **os.environ,
        "NBDLINK_DRIVER": driver,
        "VAGRANT_DEFAULT_PROVIDER": "libvirt",
        "VAGRANT_HOME": str(tmp_path / "home"),
        "VAGRANT_DOTFILE_PATH": str(tmp_path / "dot"),
        "VAGRANT_CHECKPOINT_DISABLE": "1",
    }
    done = subprocess.run(
        ["vagrant", "validate"],
        cwd=PROJECT / "vagrant",
        capture_output=True,
        text=True,
        env=environment,
    )
    assert (done.returncode, done.stdout) == (0, "Vagrantfile validated successfully.\n")


@pytest.mark.parametrize(
    "name", ["environment.sh", "make-box.sh", "provision.sh", "serve.sh", "suite.sh"]
)
def test_the_shell_can_read_a_script(name):
    assert subprocess.run(["sh", "-n", PROJECT / "vagrant" / name]).returncode == 0


def test_pip_brings_what_the_tests_bound():
    lines = (PROJECT / "vagrant" / "requirements.txt").read_text().splitlines()
    wanted = {line for line in lines if not line.startswith("#")}
    assert wanted
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    assert wanted <= set(project["optional-dependencies"]["dev"])
