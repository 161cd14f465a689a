"""What is built once and looked at by several tests."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """Build the wheel, from a copy, as setuptools writes into the folder that it builds."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    names = ("nbdlink", "completions", "man", "systemd", "udev", "pyproject.toml", "README.md")
    for name in names:
        path = PROJECT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source)
    code = "from setuptools import build_meta; build_meta.build_wheel('..')"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def package(tmp_path_factory):
    """Build the Debian package, and give it and its .changes file."""
    for program in ("dpkg-buildpackage", "dh", "lintian"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    folder = tmp_path_factory.mktemp("deb")
    subprocess.run([PROJECT / "debian" / "build", folder], check=True, stdout=subprocess.PIPE)
    (built,) = folder.glob("*.deb")
    (changes,) = folder.glob("*.changes")
    return built, changes


@pytest.fixture(scope="session")
def unpacked(package, tmp_path_factory):
    """Unpack the Debian package into a folder."""
    folder = tmp_path_factory.mktemp("root")
    subprocess.run(["dpkg-deb", "--extract", package[0], folder], check=True)
    return folder
