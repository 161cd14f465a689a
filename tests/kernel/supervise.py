"""`nbdlink supervise` with a configuration of the test's: FILE PORT [NAME ...]."""

from __future__ import annotations

import sys
from pathlib import Path

from nbdlink.cli.main import complain
from nbdlink.cli.supervise import supervise
from nbdlink.errors import ConfigError, NBDError
from nbdlink.link.config import files

file, port, *names = sys.argv[1:]
nothing = Path("/nonexistent")


def load():
    return files.load(Path(file), nothing, nothing)


try:
    status = supervise(load, names, int(port), verbose=2)
except NBDError as error:
    complain(error)
    status = 2 if isinstance(error, ConfigError) else 1
sys.exit(status)
