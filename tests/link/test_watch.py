"""What is said of links between two looks: everything that happened, once, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nbdlink.errors import ConfigError
from nbdlink.kernel import statistics, sysfs
from nbdlink.kernel.events import Event, EventKind
from nbdlink.link import watch
from nbdlink.link.watch import Link, Observer, compare

LINK = Link(
    index=3,
    name="data",
    state="attached",
    size=1 << 20,
    live=4,
    total=4,
    target="nbd://store1/data",
    routes=("store1:10809",),
    tls="none",
    identity=("identifier", 17),
)
DEAD = Event(EventKind.DEAD, 3)


def told(before, after, *heard):
    before, after = ({link.index: link for link in links if link} for links in ([before], [after]))
    notices = compare(before, after, heard, 100.0)
    assert all(notice.time == 100.0 for notice in notices)
    return [(notice.event, notice.message) for notice in notices]


def test_nothing_is_told_of_nothing():
    assert told(LINK, LINK) == []
    assert told(None, None) == []


def test_attaching():
    message = "attached to nbd://store1/data, 4/4 connections"
    assert told(None, LINK) == [("attached", message)]


def test_detaching():
    assert told(LINK, None) == [("detached", "detached")]


def test_another_use_of_the_device_is_another_link():
    other = replace(LINK, identity=("other", 18), live=1, size=512)
    assert [event for event, _ in told(LINK, other)] == ["detached", "attached"]


@pytest.mark.parametrize("heard", [[], [DEAD]])
def test_a_death_is_told_whether_it_was_heard_or_only_seen(heard):
    fewer = replace(LINK, live=3)
    assert told(LINK, fewer, *heard) == [("connection-died", "a connection died, 3/4 up")]


def test_several_deaths_are_told_at_once():
    dead = replace(LINK, live=0, state="dead")
    assert told(LINK, dead, DEAD) == [
        ("connection-died", "4 connections died, 0/4 up"),
        ("state", "dead: no connection is left"),
    ]


def test_a_renewal():
    assert told(replace(LINK, live=2), LINK) == [
        ("connection-renewed", "2 connections renewed, 4/4 up")
    ]


def test_one_that_was_renewed_before_it_was_looked_at():
    assert told(LINK, replace(LINK, renewals=1), DEAD) == [
        ("connection-died", "a connection died, 4/4 up"),
        ("connection-renewed", "a connection renewed, 4/4 up"),
    ]


def test_a_record_that_is_written_late_is_no_second_renewal():
    assert told(LINK, replace(LINK, renewals=1)) == []


def test_where_connections_cannot_be_counted_the_record_tells_of_renewals():
    blind = replace(LINK, live=None, state="unknown")
    assert told(blind, replace(blind, renewals=2)) == [
        ("connection-renewed", "2 connections renewed, ?/4 up")
    ]


def test_another_size():
    assert told(LINK, replace(LINK, size=1 << 30)) == [("resized", "resized from 1M to 1G")]


def test_other_routes():
    moved = replace(LINK, routes=("store2:10809", "store3:10809"))
    assert told(LINK, moved) == [("moved", "now over store2:10809, store3:10809")]


def test_what_the_kernel_does_with_its_devices():
    events = [Event(EventKind.ADDED, 5), Event(EventKind.REMOVED, 6), Event(EventKind.LOST)]
    notices = compare({}, {}, events, 1.0)
    assert {(notice.event, notice.index) for notice in notices} == {
        ("appeared", 5),
        ("vanished", 6),
        ("lost", None),
    }


def test_a_change_that_changes_nothing_is_not_told():
    assert told(LINK, LINK, Event(EventKind.CHANGED, 3), Event(EventKind.RESIZED, 3)) == []


@pytest.mark.parametrize("word", ["", "a name", "-x/"])
def test_what_can_be_neither_a_device_nor_a_name_is_refused(word):
    with pytest.raises(Exception, match=r"neither|no such file") as caught:
        Observer([word])
    assert isinstance(caught.value, ConfigError) or "/" in word


def test_what_is_asked_for_and_not_there_is_missing():
    assert Observer(["data", "/dev/nbd4711"]).missing == ["/dev/nbd4711", "data"]


# An observer, with sysfs made of files.


@pytest.fixture
def block(monkeypatch, tmp_path):
    """A /sys/block of our own; give a function that makes a device in it or changes one."""
    monkeypatch.setattr(sysfs, "_BLOCK", tmp_path)
    monkeypatch.setattr(statistics, "_BLOCK", tmp_path)
    monkeypatch.setattr(watch.record, "DIRECTORY", tmp_path / "run")
    links = {}
    monkeypatch.setattr(sysfs, "live_links", lambda: dict(links))

    def make(index, *, live=1, reads=0, in_flight=0, size=2048, pid=17):
        device = tmp_path / f"nbd{index}"
        device.mkdir(exist_ok=True)
        for name, text in (("pid", pid), ("size", size), ("backend", f"b{index}")):
            (device / name).write_text(f"{text}\n")
        (device / "stat").write_text(f"{reads} 0 {reads * 8} {reads} 0 0 0 0 {in_flight} 0 0\n")
        links[index] = live
        return device

    return make


def test_an_observer_sees_what_is_attached(block):
    block(0)
    block(2, live=0)
    observer = Observer()
    assert [notice.event for notice in observer.look()] == ["attached", "attached"]
    assert {index: link.state for index, link in observer.links.items()} == {
        0: "attached",
        2: "dead",
    }


def test_only_what_was_asked_for_is_seen(block):
    block(0)
    block(2)
    observer = Observer(["nbd2"])
    observer.look()
    assert list(observer.links) == [2]
    assert observer.look([Event(EventKind.REMOVED, 0)]) == []


def test_deaths_that_are_heard_after_they_were_seen_are_echoes(block):
    block(0, live=4)
    observer = Observer()
    observer.look()
    block(0, live=1)
    dead = Event(EventKind.DEAD, 0)
    assert [n.message for n in observer.look([dead])] == ["3 connections died, 1/? up"]
    assert observer.look([dead]) == []


def test_a_death_that_is_heard_before_it_shows_is_waited_for(block, monkeypatch):
    block(0, live=2)
    observer = Observer()
    observer.look()
    counts = iter([2, 2])
    monkeypatch.setattr(sysfs, "live_links", lambda: {0: next(counts, 1)})
    notices = observer.look([Event(EventKind.DEAD, 0)])
    assert [n.message for n in notices] == ["a connection died, 1/? up"]


def test_a_device_on_which_nothing_moves_is_stalled(block, monkeypatch):
    monkeypatch.setattr(watch, "STALL_SECONDS", 0.0)
    block(0, in_flight=3)
    observer = Observer()
    observer.look()
    assert observer.measure() == []
    assert [notice.message[:7] for notice in observer.measure()] == ["stalled"]
    assert observer.look() == []
    assert observer.links[0].state == "stalled"
    block(0, reads=5, in_flight=0)
    monkeypatch.setattr(watch, "STALL_SECONDS", 3.0)
    assert [notice.message for notice in observer.measure()] == ["in order again"]


def test_a_device_that_goes_is_forgotten(block, tmp_path):
    device = block(0)
    observer = Observer()
    observer.look()
    observer.measure()
    (device / "pid").unlink()
    assert [notice.event for notice in observer.look()] == ["detached"]
    assert (observer.links, observer.activity) == ({}, {})


def test_samples_are_json(block):
    block(0)
    observer = Observer()
    observer.look()
    observer.measure()
    block(0, reads=100)
    observer.measure()
    sample = watch.rates_as_json(observer.links[0], observer.activity[0], 1.0)
    assert sample["read"]["requests_per_second"] > 0
    assert sample["write"] == {
        "requests_per_second": 0,
        "bytes_per_second": 0,
        "latency_ms": None,
    }


def test_metrics_can_be_asked_for_again(block):
    from nbdlink.link.metrics import DeviceMetrics

    metrics = DeviceMetrics()
    block(0)
    assert len(metrics()) == len(metrics()) > 5


def test_metrics_of_devices(block):
    from prometheus_client.parser import text_string_to_metric_families

    from nbdlink.link.metrics import device_families
    from nbdlink.transport.exposition import encode

    block(0, reads=7, in_flight=2)
    block(1, live=0)
    text = encode(device_families())
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for metric in text_string_to_metric_families(text)
        for sample in metric.samples
    }
    here = (("device", "nbd0"),)
    nameless = (("name", ""),)
    assert samples["nbdlink_device_connections", *here, *nameless] == 1
    assert samples["nbdlink_device_requests_in_flight", *here, *nameless] == 2
    reads = (*here, ("kind", "read"), *nameless)
    assert samples["nbdlink_device_requests_total", *reads] == 7
    dead = (("device", "nbd1"), *nameless, ("state", "dead"))
    assert samples["nbdlink_device_state", *dead] == 1
