"""`nbdlink serve` in a process of its own, and the real programs that come to see it."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys

import pytest


@contextlib.contextmanager
def serving(*words, lines=1, **options):
    """Run `nbdlink serve` and give the process, and the first lines that it prints."""
    command = [sys.executable, "-m", "nbdlink", "serve", *map(str, words)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )
    try:
        yield process, [process.stdout.readline().strip() for _ in range(lines)]
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def end(process, number=signal.SIGTERM):
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


def run(*words, **options):
    """Run a program to its end, with what it says; skip the test if it is not installed."""
    if shutil.which(str(words[0])) is None:
        pytest.skip(f"{words[0]} is not installed")
    return subprocess.run(
        list(map(str, words)), capture_output=True, text=True, timeout=60, **options
    )


def nbdlink(*words, **options):
    """Run `nbdlink` to its end."""
    return run(sys.executable, "-m", "nbdlink", *words, **options)


def in_a_network(script, *words, cwd, mounts=False):
    """Run a shell script in a network with nothing but a loopback device.

    With `mounts` it may mount what it likes as well, which nobody else sees.
    """
    flags = "-rnm" if mounts else "-rn"
    if run("unshare", flags, "true").returncode:
        pytest.skip("this user may not make networks")
    lines = f"set -e\nip link set lo up\n{script}"
    done = run("unshare", flags, "bash", "-c", lines, "bash", *words, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
