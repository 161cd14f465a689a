"""A network that fails, between devices and servers that are both on this machine."""

from __future__ import annotations

import contextlib
import shutil
import subprocess

MISSING = [program for program in ("nft", "tc") if shutil.which(program) is None]
"""What has to be installed for this."""


@contextlib.contextmanager
def swallowing():
    """Have all packets of the loopback device vanish."""
    _run("tc", "qdisc", "add", "dev", "lo", "root", "netem", "loss", "100%")
    try:
        yield
    finally:
        _run("tc", "qdisc", "del", "dev", "lo", "root")


@contextlib.contextmanager
def resetting(port: int):
    """Have all packets from and to a TCP port answered with a reset."""
    rules = f"""
        table ip nbdlink-faults {{
            chain out {{
                type filter hook output priority 0;
                tcp dport {port} reject with tcp reset;
                tcp sport {port} reject with tcp reset;
            }}
        }}"""
    _run("nft", "-f", "-", said=rules)
    try:
        yield
    finally:
        _run("nft", "delete", "table", "ip", "nbdlink-faults")


def _run(*words: str, said: str | None = None):
    done = subprocess.run(words, input=said, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
