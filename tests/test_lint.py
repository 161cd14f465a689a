"""The linters and the type checker, so that `pytest` is all there is to run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]
_SOURCES = [name for name in ("nbdlink", "tests", "bench") if (_ROOT / name).is_dir()]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["ruff", "check", *_SOURCES], id="ruff-check"),
        pytest.param(["ruff", "format", "--check", *_SOURCES], id="ruff-format"),
        pytest.param(["mypy"], id="mypy"),
        pytest.param(["mypy", "-p", "tests.vm"], id="mypy-vm"),
        pytest.param(["lint-imports"], id="lint-imports"),
    ],
)
def test_has_nothing_to_say(command: list[str]) -> None:
    program = Path(sys.executable).with_name(command[0])
    done = subprocess.run(
        [program, *command[1:]],
        cwd=_ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"
