"""The command `nbdlink`, and `python -m nbdlink`.

There is next to nothing to import in here: whoever presses Ctrl-C at once, while the rest is still
being imported, is to see no more than one who does it later.
"""

import sys


def run() -> None:
    """Be the console script."""
    try:
        from nbdlink.cli.main import main

        status = main()
    except KeyboardInterrupt:
        # A second Ctrl-C would interrupt what is said of the first.
        import signal

        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if sys.stderr is not None:
            print("nbdlink: interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


if __name__ == "__main__":
    run()
