"""What is said of a machine that lacks something."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest

from nbdlink.errors import ConfigError
from nbdlink.link.checkup import machine
from nbdlink.link.checkup.clock import examine_clock
from nbdlink.link.config import files

RELEASE = "6.1.0-40-amd64"


def kernel(modules, release, *names):
    folder = modules / release / "kernel"
    folder.mkdir(parents=True)
    (modules / release / "modules.dep").touch()
    for name in names:
        (folder / name).touch()


def test_no_modules_at_all(tmp_path):
    found = machine.missing_module("no module", RELEASE, tmp_path)
    assert (found.status, found.found) == ("failed", "no module")
    assert "install the kernel's modules" in found.remedy
    assert "in a container the host has to load it" in found.remedy


def test_a_kernel_that_was_updated_and_not_booted(tmp_path):
    kernel(tmp_path, "6.1.0-41-amd64", "nbd.ko")
    found = machine.missing_module("no module", RELEASE, tmp_path)
    assert found.remedy.startswith("there are modules for 6.1.0-41-amd64 only")
    assert "reboot" in found.remedy


def test_a_kernel_without_nbd(tmp_path):
    kernel(tmp_path, RELEASE, "loop.ko")
    found = machine.missing_module("no module", RELEASE, tmp_path)
    assert "this kernel was built without nbd" in found.remedy


def test_a_module_that_is_refused(tmp_path):
    kernel(tmp_path, RELEASE, "nbd.ko.xz")
    found = machine.missing_module("no module", RELEASE, tmp_path)
    assert "`dmesg` tells why" in found.remedy


def test_root_of_a_user_namespace_has_no_rights():
    if subprocess.run(["unshare", "-r", "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    command = ["unshare", "-r", sys.executable, "-m", "nbdlink", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    rights = next(each for each in json.loads(done.stdout) if each["check"] == "rights")
    assert (done.returncode, rights["status"]) == (1, "failed")
    assert "of a user namespace only" in rights["found"]


def test_a_clock_that_is_behind_the_installation():
    now = datetime.now(UTC)
    found = examine_clock(now - timedelta(days=4000))
    assert found.status == "warning"
    assert "but nbdlink was installed on" in found.found
    assert "timedatectl" in found.remedy
    assert examine_clock(now).status == "ok"


def test_a_configuration_that_cannot_be_read_is_one_of_the_findings(monkeypatch):
    def load():
        raise ConfigError("/etc/nbdlink.toml:3: unknown key 'tagret'", hint="did you mean target?")

    monkeypatch.setattr(files, "load", load)
    found = next(each for each in machine.examine() if each.check == "configuration")
    assert (found.status, found.remedy) == ("failed", "did you mean target?")


def test_who_may_not_is_told_to_be_root():
    # Root without the capability, as the files of this nbdlink may be root's alone.
    without = ["setpriv", "--bounding-set=-sys_admin"] if os.geteuid() == 0 else []
    command = [*without, sys.executable, "-m", "nbdlink", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    rights = next(each for each in json.loads(done.stdout) if each["check"] == "rights")
    assert (done.returncode, rights["status"]) == (1, "failed")
    assert rights["remedy"] == "run it as root"
