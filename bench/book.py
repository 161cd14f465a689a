"""The book of results: raw numbers in JSON, written as they come."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.idle import Idle
from bench.latency import Latency
from bench.results import Result


@dataclass
class Book:
    """Everything that one run found out.

    Attributes:
        date: when, as words.
        machine: where, as words by heading.
        servers: who took part: version and options by name.
        clients: versions by name.
        rounds: how often each server was measured.
        seconds: how long at a time.
        size: bytes of the served files.
        results: rates and processor time, by row.
        latency: how slow requests hold others up.
        idle: what idle connections cost, by server.
        output: the folder to write to, or None.
    """

    date: str
    machine: dict[str, str]
    servers: dict[str, str]
    clients: dict[str, str]
    rounds: int
    seconds: float
    size: int
    results: list[Result] = field(default_factory=list)
    latency: list[Latency] = field(default_factory=list)
    idle: dict[str, Idle] = field(default_factory=dict)
    output: Path | None = None

    def save(self) -> None:
        """Write the numbers; whoever reads them meanwhile finds the old ones or the new ones."""
        if self.output is None:
            return
        data = asdict(self)
        del data["output"]
        self.output.mkdir(parents=True, exist_ok=True)
        path = self.output / "server.json"
        new = path.with_suffix(".new")
        new.write_text(_dumps(data) + "\n")
        new.replace(path)

    @classmethod
    def load(cls, path: Path) -> Book:
        """Read what `save` wrote."""
        data: dict[str, Any] = json.loads(path.read_text())
        data["results"] = [Result.from_json(one) for one in data["results"]]
        data["latency"] = [Latency(**one) for one in data["latency"]]
        data["idle"] = {name: Idle(**one) for name, one in data["idle"].items()}
        return cls(**data, output=path.parent)


def _dumps(data: Any, depth: int = 0) -> str:
    """Write JSON with one line per sample, so that changes can be looked at."""
    if isinstance(data, float):
        return f"{data:.6g}"
    flat = isinstance(data, dict | list) and data
    if not flat or (isinstance(data, dict) and set(data) >= {"requests", "cpu"}):
        return json.dumps(
            {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in data.items()}
            if isinstance(data, dict)
            else data,
            ensure_ascii=False,
        )
    if isinstance(data, list) and all(isinstance(one, float) for one in data):
        return f"[{', '.join(map(_dumps, data))}]"
    inner = "\n" + " " * (depth + 1)
    if isinstance(data, list):
        return f"[{inner}{f',{inner}'.join(_dumps(one, depth + 1) for one in data)}\n{' ' * depth}]"
    lines = (f"{json.dumps(key)}: {_dumps(one, depth + 1)}" for key, one in data.items())
    return f"{{{inner}{f',{inner}'.join(lines)}\n{' ' * depth}}}"
