"""What pip and pipx install: a wheel that brings all that `nbdlink setup` puts in its place."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from nbdlink.version import __version__

from .conftest import PROJECT


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Install the wheel into an environment of its own, as pipx does.

    What it depends on is taken from the environment of the tests by a path file, for the network
    and the minutes that it would take; that it is declared is another test's matter.
    """
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    command = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-index"]
    command += ["--disable-pip-version-check", "--no-deps", wheel]
    subprocess.run(command, check=True)
    libraries = next(path for path in sys.path if path.endswith("site-packages"))
    (packages / "libraries.pth").write_text(f"{libraries}\n")
    return folder


def nbdlink(folder, *words):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [folder / "bin" / "nbdlink", *words], capture_output=True, text=True, env=environment
    )


def test_the_program_runs(installed):
    done = nbdlink(installed, "--version")
    assert (done.stdout, done.stderr) == (f"nbdlink {__version__}\n", "")


def test_it_runs_from_the_wheel(installed):
    code = "import nbdlink; print(nbdlink.__file__)"
    done = subprocess.run(
        [installed / "bin" / "python", "-c", code], capture_output=True, text=True, cwd="/"
    )
    assert done.stdout.startswith(str(installed))


def test_setup_installs_all_of_the_project(installed, tmp_path):
    done = nbdlink(installed, "setup", "--root", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    for folder in ("man", "systemd", "udev"):
        assert {path.name for path in (PROJECT / folder).iterdir()} <= names
    assert {"nbdlink", "_nbdlink", "nbdlink.fish"} <= names


def test_the_units_start_the_installed_program(installed, tmp_path):
    nbdlink(installed, "setup", "--root", tmp_path)
    unit = tmp_path / "usr/local/lib/systemd/system/nbdlink.service"
    assert f"ExecStart={installed}/bin/nbdlink supervise\n" in unit.read_text()


def test_undo_leaves_nothing(installed, tmp_path):
    nbdlink(installed, "setup", "--root", tmp_path)
    done = nbdlink(installed, "setup", "--undo", "--root", tmp_path)
    assert done.returncode == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_is_there(installed, shell):
    done = nbdlink(installed, "completion", shell)
    assert done.stdout == (PROJECT / "completions" / f"nbdlink.{shell}").read_text()


def test_types_are_there(wheel):
    assert "nbdlink/py.typed" in zipfile.ZipFile(wheel).namelist()


def test_nothing_but_the_package_and_its_data_is_there(wheel):
    tops = {Path(name).parts[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert tops == {
        "nbdlink",
        f"nbdlink-{__version__}.dist-info",
        f"nbdlink-{__version__}.data",
    }


def test_all_that_is_imported_is_declared():
    """Ask import-linter's own graph which libraries the package uses."""
    import tomllib

    import grimp

    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]["images"]
    names = {word.split(">")[0] for word in [*project["dependencies"], *extras]}
    provide = {"pyOpenSSL": "OpenSSL", "dissect.hypervisor": "dissect"}
    graph = grimp.build_graph("nbdlink", include_external_packages=True)
    used = {name for name in graph.modules if not name.startswith("nbdlink")}
    foreign = {name.partition(".")[0] for name in used} - set(sys.stdlib_module_names)
    assert foreign == {provide.get(name, name) for name in names}
