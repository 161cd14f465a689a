"""Numbers: samples, their medians, and ratios that a noisy machine leaves standing.

All servers are measured in turn, round after round. A ratio is taken within each round, where
both sides had the same weather, and the median of the rounds' ratios counts.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.contestants import OURS, YARDSTICK

GIB = 1 << 30

NOT_BELOW = 0.95
"""Ratio to the yardstick that must be reached."""
CPU_SHARE = 2 / 3
"""Processor time per small request that is allowed, of the best peer's, from depth 16."""
IOPS_FACTOR = 1.5
"""Rate of small requests, of the best peer's, from depth 16 where the client leaves room."""


@dataclass(frozen=True)
class Sample:
    """One measurement of one server.

    Attributes:
        requests: how many were answered; 0 if the client does not say.
        bytes: how many were read or written.
        seconds: how long it took.
        cpu: seconds of processor time that it cost the server.
        p99: seconds that 99 of 100 requests took at most; 0 if the client does not say.
        others: the share of the processors that somebody else took meanwhile.
    """

    requests: int
    bytes: int
    seconds: float
    cpu: float
    p99: float = 0.0
    others: float = 0.0

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.bytes / self.seconds

    @property
    def cost(self) -> float:
        """Processor seconds per byte."""
        return self.cpu / self.bytes


@dataclass(frozen=True)
class Ratio:
    """Ours by theirs: the median of the rounds, the lowest and the highest, and whose it is."""

    median: float
    low: float
    high: float
    other: str


@dataclass
class Result:
    """What one row gave.

    Attributes:
        name: the row's.
        block: bytes per request; 0 if whole files are copied.
        depth: requests in flight per connection; 0 likewise.
        transport: "unix", "tcp" or "tls".
        rounds: samples by contestant; None where one failed.
        ours: the contestant whose ratios are told.
        goals: whether the project's goals are for this row.
    """

    name: str
    block: int
    depth: int
    transport: str
    rounds: dict[str, list[Sample | None]] = field(default_factory=dict)
    ours: str = OURS
    goals: bool = True

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Result:
        rounds = {
            name: [Sample(**sample) if sample else None for sample in samples]
            for name, samples in data.pop("rounds").items()
        }
        return cls(**data, rounds=rounds)

    def rate(self, name: str) -> float | None:
        """Give the median of bytes per second."""
        rates = [sample.rate for sample in self.rounds.get(name, ()) if sample]
        return statistics.median(rates) if rates else None

    def cost(self, name: str) -> float | None:
        """Give the median of processor seconds per byte."""
        costs = [sample.cost for sample in self.rounds.get(name, ()) if sample]
        return statistics.median(costs) if costs else None

    @property
    def others(self) -> float:
        """The share of the processors that strangers took, in the median measurement."""
        samples = [one.others for column in self.rounds.values() for one in column if one]
        return statistics.median(samples) if samples else 0.0

    @property
    def peers(self) -> list[str]:
        """Who is compared with us: not the yardstick, nor other versions of us."""
        return [
            name
            for name in self.rounds
            if name not in (self.ours, YARDSTICK)
            and not name.startswith("nbdlink at ")
            and self.rate(name)
        ]

    def rate_ratio(self, other: str | None = None) -> Ratio | None:
        """Compare our rate with another's, or with that of the peer with the highest median."""
        if other is None:
            other = max(self.peers, key=lambda name: self.rate(name) or 0, default=None)
        return self._ratio(other, "rate")

    def cost_ratio(self, other: str | None = None) -> Ratio | None:
        """Compare our processor time with another's, or with the most frugal peer's."""
        if other is None:
            other = min(self.peers, key=lambda name: self.cost(name) or 0, default=None)
        return self._ratio(other, "cost")

    def _ratio(self, other: str | None, what: str) -> Ratio | None:
        if other is None or other not in self.rounds or self.ours not in self.rounds:
            return None
        pairs = zip(self.rounds[self.ours], self.rounds[other], strict=False)
        ratios = [getattr(a, what) / getattr(b, what) for a, b in pairs if a and b and b.cpu]
        if not ratios:
            return None
        return Ratio(statistics.median(ratios), min(ratios), max(ratios), other)

    def missed(self) -> list[tuple[str, str]]:
        """Say which of the project's goals this row misses: a key word, and plain words."""
        if not self.goals:
            return []
        words = []
        rate, cost = self.rate_ratio(), self.cost_ratio()
        yardstick = self.rate_ratio(YARDSTICK)
        small = 0 < self.block <= 4096
        if rate and round(rate.median, 2) < 1:
            words.append(("rate", f"{rate.median:.2f} of the rate of {rate.other} {_span(rate)}"))
        if self.transport == "tls" or self.is_image:
            return words  # their goals are about the rate; ciphers cost everybody the same
        if cost and small and self.depth >= 16 and round(cost.median, 2) > round(CPU_SHARE, 2):
            words.append(
                (
                    "CPU",
                    f"{cost.median:.2f} of the CPU per request of {cost.other} {_span(cost)}, "
                    "should be at most 0.67",
                )
            )
        if cost and not small and round(cost.median, 2) > 1:
            words.append(
                ("CPU", f"{cost.median:.2f} of the CPU per GiB of {cost.other} {_span(cost)}")
            )
        if self.wants_factor and rate and self.has_room and round(rate.median, 2) < IOPS_FACTOR:
            words.append(
                (
                    "1.5",
                    f"{rate.median:.2f} of the IOPS of {rate.other} {_span(rate)}, should be 1.5",
                )
            )
        if yardstick and round(yardstick.median, 2) < NOT_BELOW:
            words.append(
                (
                    "yardstick",
                    f"{yardstick.median:.2f} of the rate of the C yardstick {_span(yardstick)}, "
                    "should be 0.95",
                )
            )
        return words

    @property
    def counts_requests(self) -> bool:
        """Whether requests are what to count, rather than bytes."""
        return 0 < self.block < 1 << 20

    @property
    def is_image(self) -> bool:
        """Whether a qcow2 image is served."""
        return "/qcow2-" in self.name

    @property
    def wants_factor(self) -> bool:
        small = 0 < self.block <= 4096 and self.depth >= 16
        return small and self.transport == "unix" and not self.is_image

    @property
    def has_room(self) -> bool:
        """Whether the client and the kernel leave room for 1.5 times the best peer.

        They do if the yardstick, which is all kernel and no server, gets there.
        """
        best = self.rate_ratio()
        rates = (self.rate(YARDSTICK), self.rate(best.other) if best else None)
        return bool(rates[0] and rates[1] and rates[0] / rates[1] >= IOPS_FACTOR)


def _span(ratio: Ratio) -> str:
    return f"(rounds from {ratio.low:.2f} to {ratio.high:.2f})"
