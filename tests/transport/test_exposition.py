"""Prometheus' text format, read back by Prometheus' own parser, and its bounded listener."""

from __future__ import annotations

import errno
import math
import socket
import threading
import time
import urllib.error
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families as parsed

from nbdlink.errors import ConfigError, TransportError
from nbdlink.transport import exposition
from nbdlink.transport.exposition import Family, check_address, encode, serve_metrics


def family(name="nbdlink_things", kind="gauge", help="Things.", **values):
    made = Family(name, kind, help)
    for label, value in values.items():
        made.add(value, which=label)
    return made


def test_a_family_looks_as_the_format_has_it():
    made = Family("nbdlink_requests_total", "counter", "Requests answered.")
    made.add(3, export="data", kind="read")
    made.add(0.25, export="", kind="write")
    assert encode([made]) == (
        "# HELP nbdlink_requests_total Requests answered.\n"
        "# TYPE nbdlink_requests_total counter\n"
        'nbdlink_requests_total{export="data",kind="read"} 3\n'
        'nbdlink_requests_total{export="",kind="write"} 0.25\n'
    )


def test_a_sample_needs_no_label():
    made = Family("up", "gauge", "Up.")
    made.add(1)
    assert encode([made]).endswith("\nup 1\n")


@pytest.mark.parametrize(
    "text", ['say "x"', "back\\slash", "two\nlines", "\\n", '\\"', "äöü \N{GRINNING FACE}", ""]
)
def test_any_label_is_read_back(text):
    made = Family("nbdlink_things", "gauge", "Things.")
    made.add(1, name=text)
    ((sample,),) = (metric.samples for metric in parsed(encode([made])))
    assert sample.labels == {"name": text}


def test_a_file_name_that_is_no_text_does_no_harm():
    made = Family("nbdlink_things", "gauge", "Things.")
    made.add(1, name="disk\udcff.img")
    encode([made]).encode()


@pytest.mark.parametrize("help", ["one\ntwo", "back\\slash", 'quotes " stay'])
def test_any_help_is_read_back(help):
    (metric,) = parsed(encode([family(help=help, a=1)]))
    assert metric.documentation == help


@pytest.mark.parametrize(
    "value", [0, 1, -1, 0.1, 1e-9, 2**53, 1.5e300, math.inf, -math.inf, 123456789.25]
)
def test_any_number_is_read_back(value):
    ((sample,),) = (metric.samples for metric in parsed(encode([family(a=value)])))
    assert sample.value == value


def test_no_number_is_one_too():
    assert encode([family(a=math.nan)]).endswith(" NaN\n")


def test_what_is_not_known_is_left_out():
    assert encode([family(a=None), family("other", b=1)]).count("# TYPE") == 1


@pytest.mark.parametrize("name", ["", "2nd", "with-dash", "with space", "ünder"])
def test_a_wrong_name_is_a_bug(name):
    with pytest.raises(ValueError, match="cannot name a metric"):
        encode([family(name, a=1)])


@pytest.mark.parametrize("label", ["__name", "a-b", "2nd"])
def test_a_wrong_label_is_a_bug(label):
    with pytest.raises(ValueError, match="cannot name a label"):
        encode([family(**{"a": 1}), Family("x", "gauge", "", [({label: ""}, 1.0)])])


def test_a_family_twice_is_a_bug():
    with pytest.raises(ValueError, match="already"):
        encode([family(a=1), family(b=1)])


def test_a_sample_twice_is_a_bug():
    made = family(a=1)
    made.add(2, which="a")
    with pytest.raises(ValueError, match="twice"):
        encode([made])


# The listener.


@pytest.fixture
def serve(tmp_path):
    listeners = []

    def start(collect=lambda: [family(a=1)], address="127.0.0.1:0"):
        listeners.append(serve_metrics(address, collect))
        return listeners[-1]

    yield start
    for each in listeners:
        each.close()


def url(listener, path="/metrics"):
    host, port = listener.addresses[0][:2]
    return f"http://{host}:{port}{path}"


def asked(listener, words=b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"):
    with socket.create_connection(listener.addresses[0][:2], timeout=30) as sock:
        sock.sendall(words)
        answer = b""
        while heard := sock.recv(65536):
            answer += heard
    return answer


def test_a_scrape(serve):
    with urllib.request.urlopen(url(serve()), timeout=30) as response:
        assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert b'nbdlink_things{which="a"} 1\n' in response.read()


def test_every_scrape_collects_anew(serve):
    values = iter((1, 2))
    listener = serve(lambda: [family(a=next(values))])
    assert [asked(listener)[-2:-1] for _ in range(2)] == [b"1", b"2"]


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (b"GET / HTTP/1.1", b"404"),
        (b"GET /metrics/x HTTP/1.1", b"404"),
        (b"POST /metrics HTTP/1.1", b"405"),
        (b"nonsense", b"400"),
        (b"\0\xff\xfe", b"400"),
        (b"GET /metrics HTTP/1.1\r\nX: " + b"y" * 9000, b"400"),
        (b"HEAD /metrics HTTP/1.0", b"200"),
        (b"GET /metrics?x=y HTTP/1.1", b"200"),
    ],
)
def test_what_else_is_asked_is_answered_as_http_has_it(serve, request_line, status):
    answer = asked(serve(), request_line + b"\r\n\r\n")
    assert answer.split(b" ")[1] == status, answer


def test_who_says_nothing_is_left(serve, monkeypatch):
    monkeypatch.setattr(exposition, "_SECONDS", 0.2)
    assert asked(serve(), b"") == b""


def test_those_who_only_hold_on_do_not_keep_others_out_for_long(serve, monkeypatch):
    monkeypatch.setattr(exposition, "_SECONDS", 0.5)
    listener = serve()
    silent = [socket.create_connection(listener.addresses[0][:2]) for _ in range(20)]
    assert b"200 OK" in asked(listener)
    for sock in silent:
        sock.close()


def test_a_fault_of_the_collector_is_answered_and_survived(serve, caplog):
    faults = iter((True, False))
    listener = serve(lambda: 1 / 0 if next(faults) else [family(a=1)])
    assert b"500" in asked(listener)
    assert b"200 OK" in asked(listener)
    assert "division by zero" in caplog.text


def test_a_unix_socket_is_served_and_removed(serve, tmp_path):
    path = tmp_path / "metrics"
    listener = serve_metrics(str(path), lambda: [family(a=1)])
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        sock.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert sock.recv(100).startswith(b"HTTP/1.1 200 OK")
    listener.close()
    assert not path.exists()


def test_nothing_is_left_behind():
    before = set(threading.enumerate())
    with serve_metrics("127.0.0.1:0", list) as listener:
        asked(listener)
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive(), thread


def test_an_address_in_use_is_named(serve):
    _, port = serve().addresses[0]
    with pytest.raises(TransportError, match=f"metrics: .*127.0.0.1:{port}") as caught:
        serve_metrics(f"127.0.0.1:{port}", list)
    assert caught.value.hint == "choose another address for the metrics"


@pytest.mark.parametrize("address", ["", "9100", "host", "host:", "host:x", "::1:9100", "h:70000"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(ConfigError, match="no address for metrics"):
        check_address(address)


@pytest.mark.parametrize("address", [":9100", "host:9100", "[::1]:9100", "./socket", "/run/x"])
def test_what_is_an_address_is_taken(address):
    assert check_address(address) == address


class FullListener(socket.socket):
    """A listener in a process that has no more descriptors."""

    def accept(self):
        self.tried.append(time.monotonic())
        raise OSError(errno.EMFILE, "too many open files")


def test_a_client_that_cannot_be_accepted_keeps_no_core_busy(tmp_path, eventually):
    listener = FullListener(socket.AF_UNIX)
    listener.tried = []
    listener.bind(str(tmp_path / "metrics"))
    listener.listen()
    with (
        exposition.MetricsListener([listener], lambda: []),
        socket.socket(socket.AF_UNIX) as client,
    ):
        client.connect(str(tmp_path / "metrics"))
        eventually(lambda: len(listener.tried) > 2)
    assert listener.tried[2] - listener.tried[0] > exposition._GLANCE
