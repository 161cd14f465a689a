"""`nbdlink supervise` with a configuration of the test's."""

from __future__ import annotations

import os
from pathlib import Path

from nbdlink.cli.main import complain
from nbdlink.cli.supervise import supervise
from nbdlink.errors import ConfigError, NBDError
from nbdlink.link import record
from nbdlink.link.config import files
from nbdlink.link.supervisor import loop  # noqa: F401 - imported here once, and not in each fork

_NOTHING = Path("/nonexistent")


def run(file, port, names):
    """Be the daemon; give the exit status."""
    # Read from the environment when it was imported, which was before there was this one.
    record.DIRECTORY = Path(os.environ["NBDLINK_RUNTIME_DIRECTORY"])
    try:
        return supervise(lambda: files.load(file, _NOTHING, _NOTHING), names, port, verbose=2)
    except NBDError as error:
        complain(error)
        return 2 if isinstance(error, ConfigError) else 1
