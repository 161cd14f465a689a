"""`python -m nbdlink` is the same as `nbdlink`."""

from nbdlink.cli.main import run

run()
