"""Run the tests: on this machine, and those marked `kernel` in a virtual machine per kernel.

    python -m tests.vm.suite [--host] [--kernel SERIES ...] [--systemd SERIES]
        [-- PYTEST-ARGUMENT ...]

Those marked `systemd` run here and boot virtual machines themselves.

The machines run side by side, as each keeps about one processor busy: the first one streams
what pytest prints, the others show it when they are done. Each part leaves a JUnit file in the
results folder.

The last line counts all of them: "N passed, N failed, N skipped". A part that ended badly
without a failed test (the machine died, no test ran) counts as one failure. A part that cannot
run here counts as one skip with its reason, and in CI, where nothing may be skipped, as a
failure.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import UnavailableError, VMError, boot, kernels, program, qemu, show

_RESULTS = Path("build/test-results")
_SPREAD = (("test_faults.py", "test_documents.py"), ("test_renew.py", "test_supervisor.py"))
"""Tests that take many minutes under emulation, in parts that take as long: of several kernels
each runs one. What depends on the kernel's version in them is the rest's business."""
_GUEST_SECONDS = 2700.0


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


@dataclass(frozen=True, slots=True)
class _Aside:
    """Tests that run in a process of their own, for this one to wait for."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    closing_line: Path

    def counts(self) -> Counts:
        with show.waiting(f"{self.name} is still at it"):
            self.process.wait()
        sys.stdout.flush()
        sys.stdout.buffer.write(self.log.read_bytes())
        sys.stdout.flush()
        # What it leaves empty when it dies says the right thing, too.
        return Counts.parse(self.closing_line.read_text())


@contextlib.contextmanager
def _aside(kind: str, series: str, results: Path, arguments: Sequence[str]) -> Iterator[_Aside]:
    results.mkdir(parents=True, exist_ok=True)
    closing_line = results / f"{kind}-{series}.counts"
    closing_line.write_text("")
    log = results / f"{kind}-{series}.log"
    command = ["setpriv", "--pdeathsig", "TERM", "--", sys.executable, "-m", __spec__.name]
    command += [f"--{kind}", series, "--results", str(results), "--closing-line", str(closing_line)]
    with (
        log.open("wb") as sink,
        subprocess.Popen(
            [*command, "--", *arguments], stdin=subprocess.DEVNULL, stdout=sink, stderr=sink
        ) as process,
    ):
        try:
            yield _Aside(f"{kind} {series}", process, log, closing_line)
        finally:
            process.terminate()


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
        machines = [
            ("kernel", series, [*options.arguments, *_left_to_others(series, options.kernel)])
            for series in options.kernel
        ]
        systemd = [("systemd", options.systemd, options.arguments)] if options.systemd else []
        if len(machines) + len(systemd) > 1:
            _prepare([series for _, series, _ in (*machines, *systemd)])
        with contextlib.ExitStack() as stack:

            def start(kind: str, series: str, arguments: Sequence[str]) -> _Aside:
                show.say(f"tests under {kind} {series}")
                return stack.enter_context(_aside(kind, series, options.results, arguments))

            # Its machines are switched on and off all the time, and leave room for the host's.
            asides = [start(*each) for each in systemd if options.host or machines]
            if options.host:
                show.say("tests on this machine")
                parts["host"] = on_host(options.results, options.arguments)
            asides += [start(*each) for each in machines[1:]]
            for kind, series, arguments in (machines or ([] if asides else systemd))[:1]:
                show.say(f"tests under {kind} {series}")
                here = in_guest if kind == "kernel" else with_systemd
                parts[f"{kind} {series}"] = here(series, options.results, arguments)
            for aside in asides:
                parts[aside.name] = aside.counts()
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
