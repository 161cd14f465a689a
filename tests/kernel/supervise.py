"""`nbdlink supervise` with a configuration of the test's: FILE PORT [NAME ...]."""

from __future__ import annotations

import sys
from pathlib import Path

from nbdlink.cli.supervise import supervise
from nbdlink.link import config

file, port, *names = sys.argv[1:]
nothing = Path("/nonexistent")


def load():
    return config.load(Path(file), nothing, nothing)


sys.exit(supervise(load, names, int(port), verbose=2))
