"""A guest with systemd that a test on this machine talks to: commands in, what they said out."""

from __future__ import annotations

import base64
import contextlib
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import TimedOutError, VMError, boot
from .kernels import Kernel

# One line for each script and one for its end, so that neither can be mistaken for the other.
_AGENT = """
while IFS= read -r line; do
    printf %s "$line" | base64 -d >/run/vm/script
    bash /run/vm/script </dev/null >/run/vm/said 2>&1
    printf '%s %s\\n' $? "$(base64 -w0 /run/vm/said)"
done
"""


@dataclass(frozen=True, slots=True)
class Done:
    """How a script ended in the guest.

    Attributes:
        script: what was run.
        status: its exit status.
        said: its stdout and stderr.
    """

    script: str
    status: int
    said: str


class Machine:
    """A guest that runs systemd; made by `machine`."""

    def __init__(self, powered: boot.Powered) -> None:
        self._powered = powered
        self._rest = b""

    def run(self, script: str, *, timeout: float = 120.0) -> Done:
        """Run a script with bash, as root and without input, and wait for its end.

        Raises:
            TimedOutError: it takes longer than `timeout` seconds. The guest is of no use then.
            VMError: the guest is gone.
        """
        self._powered.ends["in"].sendall(base64.b64encode(script.encode()) + b"\n")
        end = self._powered.ends["out"]
        deadline = time.monotonic() + timeout
        while b"\n" not in self._rest:
            end.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                data = end.recv(1 << 16)
            except TimeoutError:
                raise TimedOutError(
                    f"not done after {timeout} s: {script}", detail=self.console()[-3000:]
                ) from None
            if not data:
                raise VMError(f"the guest died during: {script}", detail=self.console()[-3000:])
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        status, _, said = line.decode().partition(" ")
        return Done(script, int(status), base64.b64decode(said).decode(errors="replace"))

    def check(self, script: str, *, timeout: float = 120.0) -> str:
        """Run a script that must succeed; give what it said."""
        done = self.run(f"set -e\n{script}", timeout=timeout)
        assert done.status == 0, f"{script}\nended with {done.status}:\n{done.said}"
        return done.said

    def until(self, condition: str, *, timeout: float = 120.0) -> str:
        """Wait until a script succeeds; give what it said then."""
        deadline = time.monotonic() + timeout
        while (done := self.run(condition)).status:
            if time.monotonic() > deadline:
                journal = self.run("journalctl -b --no-pager -n 60").said
                raise AssertionError(f"it never happened: {condition}\n{done.said}\n{journal}")
            time.sleep(0.1)
        return done.said

    def power_off(self, *, timeout: float = 180.0) -> float:
        """Have systemd switch the guest off; give the seconds that it took.

        Raises:
            TimedOutError: it is still on after `timeout` seconds.
        """
        started = time.monotonic()
        self._powered.ends["in"].sendall(base64.b64encode(b"systemctl poweroff --no-block") + b"\n")
        try:
            self._powered.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TimedOutError(
                f"not off after {timeout} s", detail=self.console()[-4000:]
            ) from None
        return time.monotonic() - started

    def console(self) -> str:
        """All that the kernel and systemd have said so far."""
        text = self._powered.console.read_text(errors="replace")
        return re.sub(r"\x1b\[[0-9;]*m", "", text).replace("\r", "")

    def moment(self, pattern: str) -> float:
        """When the console last said what `pattern` matches: seconds since the guest's boot."""
        said = re.findall(rf"^\[ *([0-9.]+)\] .*(?:{pattern})", self.console(), re.MULTILINE)
        assert said, f"the console never said {pattern!r}:\n{self.console()[-6000:]}"
        return float(said[-1])


@contextlib.contextmanager
def machine(
    kernel: Kernel,
    *,
    tree: Path | None = None,
    writable: Sequence[Path] = (),
    console_log: Path | None = None,
) -> Iterator[Machine]:
    """Boot a guest with systemd; it is killed at the end of the block.

    Args:
        kernel: what to boot.
        tree: a directory whose files are laid over the guest's before systemd starts.
        writable: directories of this machine that the guest may change.
        console_log: where to keep what the console said.
    """
    powered = boot.power_on(
        kernel,
        ["bash", "-c", _AGENT],
        tree=tree,
        writable=writable,
        console_log=console_log,
        systemd=True,
        ports=("in", "out", "err", "ctl"),
    )
    with powered as guest:
        boot.Watch(guest, {}).until_up(boot.SYSTEMD_SECONDS)
        guest.ends["out"].setblocking(True)
        yield Machine(guest)
