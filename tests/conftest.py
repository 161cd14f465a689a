"""What all tests share: where the kernel tests run, and that nothing is skipped in CI."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
from hypothesis import settings

_IN_CI = bool(os.environ.get("CI"))


# How long an example takes says nothing on a machine that does other work too.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


def _why_no_kernel() -> str | None:
    # Never on somebody's own machine: the kernel tests detach every nbd device that they find.
    if not os.environ.get("NBDLINK_THROWAWAY_MACHINE"):
        return "detaches all nbd devices; `make kernel-test` runs it in a virtual machine"
    if os.geteuid() != 0 or not Path("/sys/module/nbd").exists():
        return "needs root and the module nbd"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if reason := _why_no_kernel():
        for item in items:
            if item.get_closest_marker("kernel"):
                item.add_marker(pytest.mark.skip(reason=reason))


# Who starts the tests in the background of a script has SIGINT ignored, and all that we start
# would inherit that. Programs are given the handler's default again, as exec does.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def eventually() -> Callable[..., None]:
    """Wait until something holds that no event tells of; fail if it never does."""

    def wait(
        condition: Callable[[], object], what: str = "it never came true", seconds: float = 20
    ) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, what
            time.sleep(0.005)

    return wait


# In CI everything is there that a test may need, so that a skip is a mistake.


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if _IN_CI and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {_reason(report)}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if _IN_CI and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {_reason(report)}"
    return report


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    # pytest gives a skip as (file, line, reason).
    return str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
