"""What a person sees while the machine is prepared: on a terminal a live line, else plain lines.

All of it goes to stderr, so that the stdout of a guest's command stays its own.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from . import VMError

console = Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """Print one line."""
    console.print(f"vm: {text}", markup=False, soft_wrap=True)


def complain(error: VMError) -> None:
    """Print an error: its detail, what went wrong, what to do next."""
    for line in error.detail.splitlines():
        console.print(f"    | {line}", markup=False, soft_wrap=True)
    say(f"error: {error}")
    if error.hint:
        say(f"hint: {error.hint}")


@contextlib.contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show that something of unknown length is going on, with the seconds it takes."""
    if not console.is_terminal:
        say(f"{text} ...")
        yield
        return
    with Progress(
        SpinnerColumn(),
        TextColumn("vm: {task.description}", markup=False),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    ) as progress:
        progress.add_task(text, total=None)
        yield


@contextlib.contextmanager
def downloading(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a download of `total` bytes.

    Yields:
        A function to be told how many bytes have arrived so far.
    """
    if not console.is_terminal:
        say(f"{text}: {total / 1e6:.0f} MB ...")
        told = time.monotonic()

        def tell(done: int) -> None:
            nonlocal told
            if time.monotonic() - told >= 5:
                told = time.monotonic()
                say(f"{text}: {done / 1e6:.0f} of {total / 1e6:.0f} MB")

        yield tell
        return
    with Progress(
        TextColumn("vm: {task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    ) as progress:
        task = progress.add_task(text, total=total)
        yield lambda done: progress.update(task, completed=done)
