"""What is imported when: start-up time is most of the time of a short command."""

from __future__ import annotations

import subprocess
import sys

import pytest


def imported_by(code):
    script = f"import sys\n{code}\nprint(*sys.modules)"
    command = [sys.executable, "-c", script]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()


@pytest.mark.parametrize(
    "code",
    [
        "import nbdlink.kernel",
        "from nbdlink import kernel; kernel.devices()",
        "from nbdlink.kernel import Binding, attach, detach, status, index_of",
    ],
)
def test_neither_library_is_imported_before_it_is_used(code):
    assert not {"pyroute2", "pyudev", "asyncio"} & set(imported_by(code))


def test_netlink_takes_the_codec_of_pyroute2_and_not_all_of_it():
    modules = imported_by("import nbdlink.kernel.netlink")
    assert "pyroute2.netlink" in modules
    assert not {"pyroute2.ndb", "asyncio", "sqlite3"} & set(modules)


@pytest.mark.parametrize(
    "code",
    [
        "from pyroute2 import IPRoute",
        "import pyroute2; pyroute2.IPRoute",
        "import pyroute2; pyroute2.netlink.nlmsg",
        "from pyroute2.netlink.generic import GenericNetlinkSocket",
        "import pyroute2; pyroute2.__version__",
    ],
)
def test_a_program_that_uses_pyroute2_itself_notices_nothing(code):
    imported_by(f"import nbdlink.kernel.netlink\n{code}")
    imported_by(f"{code}\nimport nbdlink.kernel.netlink")


def test_a_name_that_pyroute2_lacks_is_still_an_attribute_error():
    imported_by(
        "import nbdlink.kernel.netlink, pyroute2\n"
        "try:\n pyroute2.nonsense\nexcept AttributeError: pass\nelse: raise SystemExit(1)"
    )


@pytest.mark.parametrize("script", ["flush", "holder", "probe"])
def test_the_detached_programs_stand_alone(script):
    # They run without site-packages, by path.
    code = (
        "import importlib.util, runpy, sys; from pathlib import Path\n"
        "runpy.run_path(sys.argv[1], run_name='other')"
    )
    import nbdlink.kernel

    path = f"{nbdlink.kernel.__path__[0]}/{script}.py"
    subprocess.run([sys.executable, "-I", "-S", "-c", code, path], check=True)
