"""Metrics of attached devices, for Prometheus: what `nbdlink watch` shows, as numbers.

Times and counts are those of the block layer, which counts since the device was made: they go on
when a device is detached and attached again, and begin anew when the module is loaded again or,
for times, after 49 days' worth of milliseconds. Prometheus knows what to do with both.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from nbdlink.kernel import statistics
from nbdlink.link.watch import Link, Observer
from nbdlink.transport.exposition import Family

_STATES = ("attached", "stalled", "dead", "unknown")


def device_families(observer: Observer | None = None) -> Sequence[Family]:
    """Look at all attached devices, and give what there is to say of them.

    Args:
        observer: who looks, and remembers for how long a device has been silent; without one,
            a device is never called stalled. It is not to be used by two threads at once.

    Returns:
        Families named `nbdlink_device_...`; every sample has the labels `device` (`nbd0`) and
        `name` (empty without one).
    """
    observer = observer or Observer()
    observer.look()
    observer.measure()
    families = _Families()
    for index in sorted(observer.links):
        families.add(observer.links[index])
    return families.all()


class DeviceMetrics:
    """The same for a listener, which may ask in several threads at once."""

    def __init__(self) -> None:
        self._observer = Observer()
        self._lock = threading.Lock()

    def __call__(self) -> Sequence[Family]:
        """Give the families of all devices, as `device_families`."""
        with self._lock:
            return device_families(self._observer)


class _Families:
    def __init__(self) -> None:
        self._all: list[Family] = []
        self.state = self._gauge("state", "1 for the state that the device is in, else 0.")
        self.size = self._gauge("size_bytes", "Size of the device.")
        self.up = self._gauge("connections", "Connections that are up.")
        self.wanted = self._gauge("connections_wanted", "Connections that it was given.")
        self.renewals = self._counter(
            "connections_renewed", "Connections replaced since it was attached."
        )
        self.in_flight = self._gauge("requests_in_flight", "Requests under way now.")
        self.requests = self._counter("requests", "Requests completed, by kind.")
        self.bytes = self._counter("bytes", "Bytes read, written and discarded.")
        self.seconds = self._counter(
            "request_seconds", "Time that completed requests took, added up, by kind."
        )
        self.busy = self._counter("busy_seconds", "Time for which any request was under way.")
        self.waited = self._counter(
            "queue_seconds", "Time under way of all requests, added up: its rate is the queue."
        )

    def _gauge(self, name: str, words: str) -> Family:
        self._all.append(Family(f"nbdlink_device_{name}", "gauge", words))
        return self._all[-1]

    def _counter(self, name: str, words: str) -> Family:
        self._all.append(Family(f"nbdlink_device_{name}_total", "counter", words))
        return self._all[-1]

    def add(self, link: Link) -> None:
        """Add the samples of a link."""
        labels = {"device": f"nbd{link.index}", "name": link.name}
        for state in _STATES:
            self.state.add(state == link.state, state=state, **labels)
        self.size.add(link.size, **labels)
        self.up.add(link.live, **labels)
        self.wanted.add(link.total, **labels)
        self.renewals.add(link.renewals, **labels)
        sample = statistics.sample(link.index)
        if sample is None:
            return  # it has gone meanwhile
        self.in_flight.add(sample.in_flight, **labels)
        for kind in ("read", "write", "discard", "flush"):
            done: statistics.Operations = getattr(sample, kind)
            self.requests.add(done.count, kind=kind, **labels)
            self.seconds.add(done.milliseconds / 1000, kind=kind, **labels)
            if kind != "flush":
                self.bytes.add(done.bytes, kind=kind, **labels)
        self.busy.add(sample.busy / 1000, **labels)
        self.waited.add(sample.waited / 1000, **labels)

    def all(self) -> list[Family]:
        """Give every family."""
        return self._all
