"""Run the tests: on this machine, and those marked `kernel` in a virtual machine per kernel.

    python -m tests.vm.suite [--host] [--kernel SERIES ...] [--systemd SERIES]
        [-- PYTEST-ARGUMENT ...]

Those marked `systemd` run here and boot virtual machines themselves.

Two parts run at a time, as each keeps about one processor busy. What they print is shown part by
part, as it comes if it is their turn. Each part leaves a JUnit file in the results folder.

The last line counts all of them: "N passed, N failed, N skipped". A part that ended badly
without a failed test (the machine died, no test ran) counts as one failure. A part that cannot
run here counts as one skip with its reason, and in CI, where nothing may be skipped, as a
failure.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import os
import re
import subprocess
import sys
import threading
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import UnavailableError, VMError, boot, kernels, program, qemu, show

_RESULTS = Path("build/test-results")
_SPREAD = (
    (
        "test_faults.py",
        "test_documents.py",
        "test_attach_peers.py",
        "test_serve_attach.py",
        "test_watch.py",
    ),
    ("test_renew.py", "test_supervisor.py", "test_mirror.py"),
)
"""Tests that take many minutes under emulation: of several kernels each runs one of these parts,
the first one, which starts earlier, a little more. What depends on the kernel's version in them is
the rest's business."""
_GUEST_SECONDS = 2700.0
_AT_A_TIME = 2
_GLANCE = 0.5
"""Seconds between two looks at whether a part has printed something."""


@dataclass(frozen=True, slots=True)
class Counts:
    """How the tests of a part ended."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.passed + other.passed, self.failed + other.failed, self.skipped + other.skipped
        )

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"

    @staticmethod
    def parse(line: str) -> Counts:
        """The counts that a line tells; one failure if it tells none."""
        found = re.fullmatch(r"(\d+) passed, (\d+) failed, (\d+) skipped\n?", line)
        return Counts(*map(int, found.groups())) if found else Counts(failed=1)


def on_host(results: Path, arguments: Sequence[str]) -> Counts:
    """Run everything but the kernel tests on this machine."""
    report = _fresh(results / "host.xml")
    command = [*_pytest(report, "not kernel and not systemd", arguments)]
    return _judged("host", report, subprocess.run(command, stdin=subprocess.DEVNULL).returncode)


def in_guest(series: str, results: Path, arguments: Sequence[str]) -> Counts:
    """Run the kernel tests under one kernel, in a virtual machine."""
    report = _fresh(results / f"kernel-{series}.xml")
    name = f"kernel {series}"
    try:
        status = boot.run(
            kernels.get(series),
            [*_pytest(report, "kernel", arguments), "tests/kernel"],
            writable=[results],
            timeout=_GUEST_SECONDS,
            console_log=results / f"kernel-{series}.console",
        )
    except UnavailableError as error:
        show.complain(error)
        in_ci = bool(os.environ.get("CI"))
        show.say(f"{name}: {'failed' if in_ci else 'skipped'}: {error}")
        return Counts(failed=1) if in_ci else Counts(skipped=1)
    except VMError as error:
        show.complain(error)
        status = program.BROKEN
    return _judged(name, report, status)


def with_systemd(series: str, results: Path, arguments: Sequence[str]) -> Counts:
    """Run the tests that boot virtual machines with systemd."""
    report = _fresh(results / "systemd.xml")
    command = [*_pytest(report, "systemd", arguments), "tests/systemd"]
    environment = {**os.environ, "NBDLINK_KERNEL": series}
    done = subprocess.run(command, stdin=subprocess.DEVNULL, env=environment)
    return _judged("systemd", report, done.returncode)


class _Aside:
    """A part that runs in a process of its own, for this one to follow."""

    def __init__(self, words: Sequence[str], results: Path, arguments: Sequence[str]) -> None:
        """Plan the part that `words` name on the command line of this program."""
        self.name = " ".join(words).removeprefix("--")
        results.mkdir(parents=True, exist_ok=True)
        stem = self.name.replace(" ", "-")  # with a version's dot in it
        self._log, self._closing_line = results / f"{stem}.log", results / f"{stem}.counts"
        # What one that dies leaves empty says the right thing, too.
        for path in (self._log, self._closing_line):
            path.write_text("")
        self._command = ["setpriv", "--pdeathsig", "TERM", "--", sys.executable, "-m"]
        self._command += [__spec__.name, *words, "--results", str(results)]
        self._command += ["--closing-line", str(self._closing_line), "--", *arguments]
        self._process: subprocess.Popen[bytes] | None = None
        self._starting = threading.Lock()
        self._is_ended = False
        self._error: Exception | None = None
        self._is_over = threading.Event()

    def run(self) -> None:
        """Run it to its end, in a thread of its own."""
        show.say(f"tests: {self.name}")
        try:
            with self._log.open("wb") as sink:
                with self._starting:
                    if self._is_ended:
                        return
                    self._process = subprocess.Popen(
                        self._command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink
                    )
                self._process.wait()
        except OSError as error:
            self._error = error
        finally:
            self._is_over.set()

    def follow(self) -> Counts:
        """Show what it prints, as it comes, until it is over."""
        with self._log.open("rb") as source:
            is_over = False
            while not is_over:
                is_over = self._is_over.wait(_GLANCE)  # before the last look
                sys.stdout.buffer.write(source.read())
                sys.stdout.flush()
        if self._error is not None:
            show.say(f"{self.name}: {self._error}")
        return Counts.parse(self._closing_line.read_text())

    def end(self) -> None:
        """Have it end, if it still runs."""
        with self._starting:
            self._is_ended = True
            if self._process is not None:
                self._process.terminate()


def _side_by_side(parts: Sequence[_Aside], counts: dict[str, Counts]) -> None:
    """Run all parts, some at a time; note how each of them has ended."""
    with concurrent.futures.ThreadPoolExecutor(_AT_A_TIME) as pool:
        running = [pool.submit(part.run) for part in parts]
        try:
            for part in parts:
                show.say(f"this is {part.name}:")
                counts[part.name] = part.follow()
        finally:
            for future in running:
                future.cancel()
            for part in parts:
                part.end()


def _prepare(series: Sequence[str]) -> None:
    """Do once, and where a person can watch, what the guests would do at the same time."""
    # Whatever is wrong, each guest reports it for itself.
    with contextlib.suppress(VMError):
        for each in series:
            qemu.accelerator(kernels.get(each))


def _pytest(report: Path, marker: str, arguments: Sequence[str]) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-m", marker, f"--junitxml={report}"]
    # Seen from inside, stdout is never a terminal in a guest.
    if sys.stdout.isatty():
        command.append("--color=yes")
    return [*command, *arguments]


def _fresh(report: Path) -> Path:
    report.parent.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    return report.resolve()


def _judged(name: str, report: Path, status: int) -> Counts:
    counts = _count(report)
    if status and not counts.failed:
        show.say(f"{name}: pytest ended with status {status}, which counts as a failure")
        counts += Counts(failed=1)
    elif not (counts.passed or counts.failed):
        show.say(f"{name}: no test ran, which counts as a failure")
        counts += Counts(failed=1)
    return counts


def _count(report: Path) -> Counts:
    if not report.exists():
        return Counts()
    counts = Counts()
    # One by one, as a test whose teardown fails too is in the file's own sums twice.
    for case in ET.parse(report).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            counts += Counts(failed=1)
        elif "skipped" in kinds:
            counts += Counts(skipped=1)
        else:
            counts += Counts(passed=1)
    return counts


def _left_to_others(series: str, kernels: Sequence[str]) -> list[str]:
    """Give the arguments that leave out what another one of the kernels runs."""
    mine = list(kernels).index(series)
    return [
        f"--ignore=tests/kernel/{file}"
        for number, part in enumerate(_SPREAD)
        for file in part
        if number % len(kernels) != mine
    ]


def main() -> int:
    """Parse the command line, run the parts, and print the closing line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.vm.suite",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--host", action="store_true", help="the tests that take no kernel of ours")
    parser.add_argument("--kernel", action="append", default=[], choices=kernels.META_PACKAGES)
    parser.add_argument("--systemd", choices=kernels.META_PACKAGES)
    parser.add_argument("--results", type=Path, default=_RESULTS, help=f"default: {_RESULTS}")
    parser.add_argument("--closing-line", type=Path, help="write it to a file, do not print it")
    parser.add_argument("arguments", nargs="*", metavar="PYTEST-ARGUMENT")
    options = parser.parse_args()
    if not (options.host or options.kernel or options.systemd):
        parser.error("name a part: --host, --kernel, --systemd")
    parts: dict[str, Counts] = {}

    def run() -> int:
        results, arguments = options.results, options.arguments
        systemd = [options.systemd] if options.systemd else []
        if options.host + len(systemd) + len(options.kernel) > 1:
            _prepare([*options.kernel, *systemd])
            if sys.stdout.isatty():  # which none of the parts can see
                arguments = ["--color=yes", *arguments]
            asides = [_Aside(["--host"], results, arguments)] if options.host else []
            # Its machines are switched on and off all the time, and leave room for the host's.
            asides += [_Aside(["--systemd", series], results, arguments) for series in systemd]
            for series in options.kernel:
                others = _left_to_others(series, options.kernel)
                asides.append(_Aside(["--kernel", series], results, [*arguments, *others]))
            _side_by_side(asides, parts)
        elif options.host:
            parts["host"] = on_host(results, arguments)
        elif systemd:
            parts[f"systemd {options.systemd}"] = with_systemd(options.systemd, results, arguments)
        else:
            (series,) = options.kernel
            parts[f"kernel {series}"] = in_guest(series, results, arguments)
        return 0

    status = program.reported(run)
    for name, counts in parts.items():
        show.say(f"{name}: {counts}")
    total = sum(parts.values(), Counts())
    if status:
        total += Counts(failed=1)
    if options.closing_line:
        options.closing_line.write_text(f"{total}\n")
    else:
        print(total, flush=True)
    return status or bool(total.failed)


if __name__ == "__main__":
    sys.exit(main())
