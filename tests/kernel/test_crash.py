"""A file system on four channels survives its server, and what it has synced does.

This stands for the option `-w` of enbd-server, by which its file system was to be coherent on the
server at all times. A few cuts of each kind; `python -m tests.kernel.crash` makes more, and
`tests/server/test_power_cuts.py` hundreds without a kernel.
"""

from __future__ import annotations

import pytest

from .crash import cut_power, kill_servers, record_run

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("runtime_directory")]


def test_a_file_system_survives_when_its_server_is_killed(tmp_path):
    assert kill_servers(tmp_path, kills=2) >= 3


def test_a_file_system_survives_when_the_power_fails(tmp_path):
    cut_power(record_run(tmp_path, files=6), 6, tmp_path)
