"""What connections cost while nobody uses them: memory, and processor time."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from bench import wire
from bench.processes import Server, cpu_seconds, memory

CONNECTIONS = 64
SECONDS = 10.0


@dataclass(frozen=True)
class Idle:
    """What one server's idle connections cost.

    Attributes:
        memory_before: bytes (PSS of all its processes) before anybody came.
        memory_after: with all connections, each of which has read one block.
        cpu: seconds of processor time in `seconds` of idleness.
        seconds: how long it was watched.
        connections: how many there were.
    """

    memory_before: int
    memory_after: int
    cpu: float
    seconds: float
    connections: int

    @property
    def per_connection(self) -> float:
        return (self.memory_after - self.memory_before) / self.connections


def measure(servers: Sequence[Server], seconds: float = SECONDS) -> dict[str, Idle]:
    """Hold idle connections to all servers at the same time, and look what that costs each."""
    with contextlib.ExitStack() as undo:
        held: dict[str, tuple[Server, int]] = {}
        for server in servers:
            before = memory(server.pid)
            try:
                for _ in range(CONNECTIONS):
                    sock = undo.enter_context(wire.connected(server))
                    # So that it has what serving takes.
                    wire.at_once(sock, [(wire.READ, 0)])
            except OSError as error:
                print(f"  {server.name}: {error}", file=sys.stderr)
            else:
                held[server.name] = server, before
        time.sleep(1)  # for what the last request leaves to do
        spent = {name: cpu_seconds(server.pid) for name, (server, _) in held.items()}
        start = time.monotonic()
        time.sleep(seconds)
        watched = time.monotonic() - start
        return {
            name: Idle(
                before,
                memory(server.pid),
                cpu_seconds(server.pid) - spent[name],
                watched,
                CONNECTIONS,
            )
            for name, (server, before) in held.items()
        }
