"""Threads for requests that may take long, so that they do not hold up their neighbours.

Each connection has its own few threads, made when they are needed and gone when they are not.
A client that does not take its replies so blocks its own threads and nobody else's. What all
connections together may use is bounded by a `Budget`; a request for which there is nothing
left is done by the connection's own thread, which is slower and never wrong.
"""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Callable
from typing import Final

THREADS: Final = 16
"""Requests of one connection that are worked on at once; nbdkit's default too."""
_QUEUE: Final = 256
"""Requests of one connection that are worked on or wait for it; twice what kernels send."""
_MUCH: Final = 1 << 20
"""Bytes that a connection's jobs have held, from which on malloc is told to let go of them."""
_LINGER: Final = 5.0
"""Seconds that a thread waits for another request before it ends."""


class Budget:
    """What the workers of all connections may use together.

    Attributes:
        threads: how many more may be started.
        bytes: how many more bytes may lie in the buffers of waiting requests.
    """

    def __init__(self, threads: int = 256, bytes: int = 256 << 20) -> None:
        """Begin with everything unused."""
        self.threads = threads
        self.bytes = bytes
        self._lock = threading.Lock()

    def take(self, *, threads: int = 0, bytes: int = 0) -> bool:
        """Take something out, or nothing if there is too little left."""
        with self._lock:
            if threads > self.threads or bytes > self.bytes:
                return False
            self.threads -= threads
            self.bytes -= bytes
            return True

    def give(self, *, threads: int = 0, bytes: int = 0) -> None:
        """Put something back."""
        with self._lock:
            self.threads += threads
            self.bytes += bytes


# Memory and threads belong to the process, whatever services run in it.
_PROCESS: Final = Budget()


class Workers:
    """One connection's threads. Only the connection's own thread submits and joins.

    Attributes:
        pending: requests that were submitted and have not been finished; whoever reads 0 in
            the connection's thread knows that no worker does anything.
    """

    def __init__(self, name: str, budget: Budget = _PROCESS) -> None:
        """Prepare; no thread is started before there is work."""
        self.pending = 0
        self._name = name
        self._budget = budget
        self._threads = 0
        self._closing = False
        self._held = 0  # bytes that jobs have held, all in all
        self._jobs: queue.SimpleQueue[tuple[Callable[[], None], int] | None] = queue.SimpleQueue()
        self._changed = threading.Condition(threading.Lock())

    def reserve(self, size: int) -> bool:
        """Take memory for a job that is about to be submitted; False if there is none left."""
        return self._budget.take(bytes=size)

    def release(self, size: int) -> None:
        """Give back memory that was reserved for a job that was not submitted."""
        self._budget.give(bytes=size)

    def submit(self, job: Callable[[], None], size: int) -> bool:
        """Have a thread do a job; False if there is no thread or no place to be had for it.

        Args:
            job: must not raise.
            size: bytes of memory that it holds on to, which `reserve` has given. They are
                released with the job's end, or here if the job is not taken.
        """
        with self._changed:
            if self.pending >= self._threads < THREADS:
                self._start()
            # Without an end to the queue, a client that reads no replies could fill the memory
            # with requests that hold none: flushes, or reads of a byte.
            if not self._threads or self.pending >= _QUEUE:
                self.release(size)
                return False
            self.pending += 1
            self._held += size
            self._jobs.put((job, size))
        return True

    def _start(self) -> None:
        if not self._budget.take(threads=1):
            return
        self._threads += 1
        try:
            threading.Thread(target=self._work, name=self._name, daemon=True).start()
        except RuntimeError:  # the system has no more
            self._threads -= 1
            self._budget.give(threads=1)

    def _work(self) -> None:
        try:
            while (job := self._next()) is not None:
                do, size = job
                try:
                    do()
                finally:
                    del do, job  # and with it the buffer
                    self._budget.give(bytes=size)
                    with self._changed:
                        self.pending -= 1
                        if not self.pending:
                            self._changed.notify_all()
        finally:
            self._budget.give(threads=1)
            if not self._threads and self._held > _MUCH:
                self._held = 0
                _malloc_trim()(0)

    def _next(self) -> tuple[Callable[[], None], int] | None:
        """Wait for a job; None once this thread is to end, which is noted then."""
        while True:
            try:
                job = self._jobs.get(timeout=_LINGER)
            except queue.Empty:
                job = None
            if job is not None:
                return job
            with self._changed:
                # Jobs are put in under the lock, so none can slip in behind this look.
                if self._closing or self._jobs.empty():
                    self._threads -= 1
                    return None

    def join(self) -> None:
        """Wait until everything submitted is finished, and let the threads end."""
        with self._changed:
            self._changed.wait_for(lambda: not self.pending)
            self._closing = True
            for _ in range(self._threads):
                self._jobs.put(None)


@functools.cache
def _malloc_trim() -> Callable[[int], object]:
    """Give the function that has malloc give free memory back to the system.

    By itself it keeps what threads that are gone have freed: hundreds of megabytes once a few
    clients have read much at once. Other C libraries than glibc have no such function.
    """
    # Looked up at first use: ctypes takes longer to import than a short command may last.
    import ctypes

    return getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)
