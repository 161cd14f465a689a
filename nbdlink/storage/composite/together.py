"""Doing something to several storages at once."""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Final

_MOST: Final = 64
"""Threads that work for one storage; what they are too few for waits."""

Job = Callable[[], None]


class Threads:
    """Threads that are made as they are needed, and do not keep the process from ending.

    That is why it is not `concurrent.futures`: a disk that hangs would hold up the exit. They
    are made at first use, after the server has forked.
    """

    def __init__(self, name: str) -> None:
        """Prepare; `name` is that of the threads."""
        self._name = name
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._running = 0
        self._idle = 0

    def all(self, jobs: Sequence[Job]) -> list[Exception | None]:
        """Do all of them at once, one in this thread; give how each failed, or None.

        Returns when the last has ended, whatever became of the others.
        """
        failures: list[Exception | None] = [None] * len(jobs)
        if not jobs:
            return failures
        left = len(jobs)
        done = threading.Event()
        lock = threading.Lock()

        def run(number: int) -> None:
            nonlocal left
            try:
                jobs[number]()
            except Exception as error:  # whoever asked decides what it means
                failures[number] = error
            with lock:
                left -= 1
                if not left:
                    done.set()

        for number in range(1, len(jobs)):
            self._hand_over(functools.partial(run, number))
        run(0)
        done.wait()
        return failures

    def _hand_over(self, job: Job) -> None:
        with self._lock:
            if self._idle:
                self._idle -= 1
            elif self._running < _MOST:
                thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                try:
                    thread.start()
                except RuntimeError:
                    if not self._running:  # nobody else would ever do it
                        job()
                        return
                else:
                    self._running += 1
        self._jobs.put(job)

    def _work(self) -> None:
        while job := self._jobs.get():
            job()
            with self._lock:
                self._idle += 1

    def close(self) -> None:
        """Have the threads end. Nothing may be asked for any more."""
        for _ in range(self._running):
            self._jobs.put(None)


def one_by_one(jobs: Sequence[Job]) -> list[Exception | None]:
    """Do them in turn; give how each failed, or None."""
    failures: list[Exception | None] = []
    for job in jobs:
        try:
            job()
        except Exception as error:  # whoever asked decides what it means
            failures.append(error)
        else:
            failures.append(None)
    return failures
