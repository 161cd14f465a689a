"""Run one command in a throw-away virtual machine.

    python -m tests.vm.boot --kernel 6.1 -- COMMAND [ARGUMENT ...]

The command runs as root in a copy of this machine's files, in the present directory, with
udevd running and the module nbd loaded. Its stdout and stderr come through as they are, its
stdin is empty. Nothing that it writes stays, but for the directories given with --rw.

With --systemd, process 1 is systemd, which starts as little as it takes to be real: no network
beyond loopback, no timers, nothing of what this machine has enabled. The files of --tree are laid
over the guest's before that. The module nbd is not loaded.

The exit status is the command's; 124 if it took too long, 125 if the machine did not come up
or died under it, 130 if it was interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import selectors
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import TimedOutError, VMError, initramfs, program, qemu, show
from .kernels import META_PACKAGES, Kernel
from .kernels import get as get_kernel

_HERE = Path(__file__).parent
_CONSOLE_TAIL = 40  # lines
SYSTEMD_SECONDS = 600.0
"""For a guest to come up whose services have to be up first."""
# Handed on to the guest's command when set here. PATH is not: pyenv and its like do not work
# for a root whose home is another.
_ENVIRONMENT = ("CI", "COLUMNS", "HYPOTHESIS_PROFILE", "NO_COLOR", "PYTEST_ADDOPTS", "TERM")


def run(
    kernel: Kernel,
    command: Sequence[str],
    *,
    memory: str = "2G",
    cpus: int = 2,
    writable: Sequence[Path] = (),
    environment: Mapping[str, str] | None = None,
    timeout: float | None = None,
    console_log: Path | None = None,
    systemd: bool = False,
    tree: Path | None = None,
) -> int:
    """Boot a kernel, run a command in it, and return the command's exit status.

    Args:
        kernel: what to boot.
        command: program and arguments.
        memory: the guest's, as QEMU writes it; its files live there too.
        cpus: how many.
        writable: directories of this machine that the command may change.
        environment: variables for the command, beside those that are always handed on.
        timeout: seconds that the command may take, without the time to boot.
        console_log: where to keep what the kernel said.
        systemd: whether systemd is to be process 1.
        tree: a directory whose files are laid over the guest's before systemd starts.

    Raises:
        VMError: the machine did not come up, died, or took longer than `timeout`
            (then it is a TimedOutError).
    """
    # One file for both here? Then one pipe for both there, so that their order is kept.
    together = os.path.sameopenfile(1, 2)
    powered = power_on(
        kernel,
        command,
        memory=memory,
        cpus=cpus,
        writable=writable,
        environment=environment,
        console_log=console_log,
        systemd=systemd,
        tree=tree,
        together=together,
    )
    with powered as machine:
        watch = Watch(machine, {"out": 1, "err": 2})
        watch.until_up(SYSTEMD_SECONDS if systemd else 180.0)
        return watch.status(timeout)


@dataclass(frozen=True, slots=True)
class Powered:
    """A guest that has been switched on.

    Attributes:
        name: the kernel and how it runs, for people.
        process: QEMU.
        ends: the sockets that the guest's ports lead to, by their names.
        console: the file with what the kernel says.
    """

    name: str
    process: subprocess.Popen[bytes]
    ends: Mapping[str, socket.socket]
    console: Path


@contextlib.contextmanager
def power_on(
    kernel: Kernel,
    command: Sequence[str],
    *,
    memory: str = "2G",
    cpus: int = 2,
    writable: Sequence[Path] = (),
    environment: Mapping[str, str] | None = None,
    console_log: Path | None = None,
    systemd: bool = False,
    tree: Path | None = None,
    together: bool = False,
    ports: Sequence[str] = ("out", "err", "ctl"),
) -> Iterator[Powered]:
    """Switch a guest on that will run a command; it is killed at the end of the block.

    See `run` for the arguments.

    Args:
        together: whether the command's stdout and stderr are one.
        ports: names of the virtio ports; with "in" the command has a standard input.

    Raises:
        VMError: as `run`; one that is raised in the block is given what the kernel and QEMU said.
    """
    accel = qemu.accelerator(kernel)
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nbdlink-vm-")))
        console = work / "console"
        stages = {
            "guest.sh": "systemd.sh" if systemd else "guest.sh",
            **{name: name for name in ("job.sh", "ports.sh")},
        }
        files = {
            "/init": (_HERE / "stage1.sh").read_bytes(),
            **{f"/job/{name}": (_HERE / source).read_bytes() for name, source in stages.items()},
            "/job/command": _script(
                command,
                {"NBDLINK_MACHINE": accel.name, **(environment or {})},
                together=together,
            ),
            "/job/rw": b"".join(os.fsencode(path.resolve()) + b"\n" for path in writable),
            **({} if tree is None else {"/job/tree": b""}),
        }
        initrd = work / "initrd"
        initrd.write_bytes(initramfs.build(kernel, files))
        shares = [("root", Path("/"), False), ("modules", kernel.modules, False)]
        shares += [(f"rw{n}", path.resolve(), True) for n, path in enumerate(writable)]
        if tree is not None:
            shares.append(("tree", tree.resolve(), False))
        ours, theirs = {}, {}
        for name in ports:
            ours[name], theirs[name] = map(stack.enter_context, socket.socketpair())
        line = qemu.command(
            kernel,
            accel,
            initrd=initrd,
            console=console,
            memory=memory,
            cpus=cpus,
            shares=shares,
            ports=[(name, end.fileno()) for name, end in theirs.items()],
        )
        complaints = stack.enter_context((work / "qemu").open("w+"))
        process = stack.enter_context(
            subprocess.Popen(
                line,
                stdin=subprocess.DEVNULL,
                stdout=complaints,
                stderr=complaints,
                pass_fds=[end.fileno() for end in theirs.values()],
                start_new_session=True,  # Ctrl-C is for this process to act on
            )
        )
        stack.callback(process.kill)
        for end in theirs.values():
            end.close()
        try:
            yield Powered(f"{kernel.release} ({accel.name})", process, ours, console)
        except VMError as error:
            process.kill()
            process.wait()
            complaints.seek(0)
            error.detail += complaints.read()
            raise
        finally:
            if console_log is not None and console.exists():
                console_log.write_bytes(console.read_bytes())


class Watch:
    """Follow a guest from power-on to the end of its command.

    Args:
        machine: the guest.
        sinks: descriptors that what the ports say is passed on to meanwhile, by their names.
    """

    def __init__(self, machine: Powered, sinks: Mapping[str, int]) -> None:
        self._process = machine.process
        self._ends = machine.ends
        self._sinks = sinks
        self._console = machine.console
        self._name = machine.name
        self._lines = b""
        self._booted_at = 0
        self._selector = selectors.DefaultSelector()
        for key in ("ctl", *sinks):
            end = machine.ends[key]
            end.setblocking(False)
            self._selector.register(end, selectors.EVENT_READ, sinks.get(key))

    def until_up(self, patience: float = 180.0) -> None:
        """Wait until the command runs; at most so many seconds."""
        started = time.monotonic()
        with show.waiting(f"booting Debian's kernel {self._name}"):
            # Without KVM it takes about 6 seconds on an idle machine, with systemd 15.
            answer = self._answer(started + patience, f"did not come up within {patience:g} s")
        if answer != "ready":
            raise VMError(f"the guest gave up: {answer}", detail=self.kernel_log())
        show.say(f"{self._name} is up after {time.monotonic() - started:.1f} s")
        self._booted_at = self._console.stat().st_size

    def status(self, timeout: float | None) -> int:
        """The exit status of the command, whose output is passed on meanwhile."""
        deadline = None if timeout is None else time.monotonic() + timeout
        answer = self._answer(deadline, f"the command did not end within {timeout} s")
        word, _, number = answer.partition(" ")
        if word != "exit":
            raise VMError(f"the guest gave up: {answer}", detail=self.kernel_log())
        # What was written before that is in the sockets by now: a write to a virtio port
        # returns when the host has taken the data.
        for key, sink in self._sinks.items():
            self._pass_on(self._ends[key], sink)
        return int(number)

    def kernel_log(self) -> str:
        """The last lines that the kernel said; those since the boot, once it is done."""
        if not self._console.exists():
            return ""
        said = self._console.read_bytes()[self._booted_at :].decode(errors="replace")
        lines = ["".join(filter(str.isprintable, line)) for line in said.splitlines()]
        return "".join([f"{line}\n" for line in lines if line][-_CONSOLE_TAIL:])

    def _answer(self, deadline: float | None, late: str) -> str:
        while b"\n" not in self._lines:
            remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
            events = self._selector.select(remaining)
            if not events:
                raise TimedOutError(f"kernel {self._name}: {late}", detail=self.kernel_log())
            for event, _ in events:
                end = event.fileobj
                assert isinstance(end, socket.socket)
                if event.data is None:
                    data = end.recv(4096)
                    if not data:
                        raise self._death()
                    self._lines += data
                elif not self._pass_on(end, event.data):
                    self._selector.unregister(end)
        line, _, self._lines = self._lines.partition(b"\n")
        return line.decode()

    @staticmethod
    def _pass_on(end: socket.socket, sink: int) -> bool:
        """Copy what has arrived; False at the end of the stream."""
        with contextlib.suppress(BlockingIOError):
            while data := end.recv(1 << 16):
                view = memoryview(data)
                while view:
                    view = view[os.write(sink, view) :]
            return False
        return True

    def _death(self) -> VMError:
        status = self._process.wait()
        if panic := re.search(r"Kernel panic - not syncing: (.*)", self.kernel_log()):
            return VMError(f"kernel {self._name} panicked: {panic[1]}", detail=self.kernel_log())
        how = f"was killed by signal {-status}" if status < 0 else f"ended with {status}"
        return VMError(
            f"kernel {self._name}: the machine died (QEMU {how})", detail=self.kernel_log()
        )


def _script(command: Sequence[str], extra: Mapping[str, str], *, together: bool) -> bytes:
    paths = [str(Path(sys.executable).parent)]
    paths += [f"{top}/{name}" for top in ("/usr/local", "/usr", "") for name in ("sbin", "bin")]
    variables = {
        "HOME": "/root",
        "LANG": "C.UTF-8",
        # Tells the kernel tests that no device here is anybody's.
        "NBDLINK_THROWAWAY_MACHINE": "1",
        "PATH": ":".join(paths),
        "USER": "root",
        **{name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        **extra,
    }
    lines = ["#!/bin/sh", f"cd {shlex.quote(str(Path.cwd()))} || exit 125"]
    if together:
        lines.append("exec 2>&1")
    words = ["env", "-i", *(f"{name}={value}" for name, value in variables.items()), *command]
    lines.append(f"exec {shlex.join(words)}")
    return "\n".join(lines).encode() + b"\n"


def main() -> int:
    """Parse the command line and run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.vm.boot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kernel", default="6.1", choices=META_PACKAGES, help="default: 6.1")
    parser.add_argument("--memory", default="2G", help="default: 2G")
    parser.add_argument("--cpus", type=int, default=2, help="default: 2")
    parser.add_argument("--rw", action="append", default=[], type=Path, metavar="DIRECTORY")
    parser.add_argument("--timeout", type=float, metavar="SECONDS")
    parser.add_argument("--console", type=Path, metavar="FILE", help="keep the kernel's messages")
    parser.add_argument("--systemd", action="store_true", help="systemd as process 1")
    parser.add_argument("--tree", type=Path, metavar="DIRECTORY", help="laid over the files")
    parser.add_argument("command", nargs="+", metavar="COMMAND")
    options = parser.parse_args()
    for directory in options.rw:
        if not directory.is_dir():
            parser.error(f"--rw: {directory} is no directory")
    if options.tree and not (options.systemd and options.tree.is_dir()):
        parser.error("--tree: it takes a directory, and --systemd")
    return program.reported(
        lambda: run(
            get_kernel(options.kernel),
            options.command,
            memory=options.memory,
            cpus=options.cpus,
            writable=options.rw,
            timeout=options.timeout,
            console_log=options.console,
            systemd=options.systemd,
            tree=options.tree,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
