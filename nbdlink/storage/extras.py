"""Packages that only some images take."""

from __future__ import annotations

import sys


def installation(package: str) -> str:
    """Give the command that installs `package` where this nbdlink finds it.

    The `pip` that a shell finds is another one's than that of a virtual environment, such as
    `pipx` makes.
    """
    pip = f"{sys.executable} -m pip" if sys.prefix != sys.base_prefix else "pip"
    return f"{pip} install '{package}'"
