"""Prometheus metrics: the text format, and a listener that serves it and nothing else.

The format is version 0.0.4 of "Exposition formats" in Prometheus' documentation: families of
samples, each with a line of HELP and one of TYPE before them.

The listener answers `GET /metrics`. Whoever may connect to it may ask, so it is bounded in
everything: few clients at a time, a short request, a deadline for the whole exchange, and the
connection ends after the answer.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import select
import selectors
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, Self

from nbdlink.errors import ConfigError, TransportError
from nbdlink.transport import stream
from nbdlink.transport.stream import Deadline

_log = logging.getLogger("nbdlink.metrics")

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_NAME: Final = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*\Z")
_LABEL: Final = re.compile(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*\Z")
_MOST_CLIENTS: Final = 4
_LONGEST_REQUEST: Final = 8192
_SECONDS: Final = 5.0
_GLANCE: Final = 0.1
"""Seconds after which a listener that has too many clients looks whether it is to end."""


@dataclass(frozen=True, slots=True)
class Family:
    """Samples of one meaning.

    Attributes:
        name: of the metric, in base units: `..._seconds`, `..._bytes`; a counter's ends in
            `_total`.
        kind: "counter", which only grows while the process lives, or "gauge".
        help: what it says, in a sentence.
        samples: values by their labels.
    """

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    samples: list[tuple[Mapping[str, str], float]] = field(default_factory=list)

    def add(self, value: float | None, **labels: str | None) -> None:
        """Add a sample; no value, no sample. A label without a value is left empty."""
        if value is not None:
            self.samples.append(({key: text or "" for key, text in labels.items()}, value))


def encode(families: Iterable[Family]) -> str:
    """Write families as text; those without samples are left out.

    Raises:
        ValueError: a name is none, or a sample is there twice: a bug of who made them.
    """
    lines: list[str] = []
    known: set[str] = set()
    for family in families:
        if not _NAME.match(family.name) or family.name in known:
            raise ValueError(f"{family.name!r} cannot name a metric, or does so already")
        known.add(family.name)
        if not family.samples:
            continue
        lines.append(f"# HELP {family.name} {_escape(family.help)}")
        lines.append(f"# TYPE {family.name} {family.kind}")
        seen: set[str] = set()
        for labels, value in family.samples:
            series = family.name + _labels(labels)
            if series in seen:
                raise ValueError(f"{series} is there twice")
            seen.add(series)
            lines.append(f"{series} {_number(value)}")
    return "".join(f"{line}\n" for line in lines)


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    for name in labels:
        if not _LABEL.match(name):
            raise ValueError(f"{name!r} cannot name a label")
    words = [f'{name}="{_escape(text, quotes=True)}"' for name, text in sorted(labels.items())]
    return "{" + ",".join(words) + "}"


def _escape(text: str, *, quotes: bool = False) -> str:
    # File names that are no text come as lone surrogates, which UTF-8 has no bytes for.
    text = text.encode("utf-8", "backslashreplace").decode()
    text = text.replace("\\", "\\\\").replace("\n", "\\n")
    return text.replace('"', '\\"') if quotes else text


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value == int(value) else repr(float(value))


# The listener.


class MetricsListener:
    """Answers `GET /metrics` with what `collect` gives, in threads of its own.

    Attributes:
        addresses: what it listens on: (host, port) or a path.
    """

    def __init__(
        self, listeners: list[socket.socket], collect: Callable[[], Iterable[Family]]
    ) -> None:
        """Take over listening sockets; `collect` is called in any thread, several at a time."""
        self.addresses = [sock.getsockname() for sock in listeners]
        self._listeners = listeners
        self._collect = collect
        self._places = threading.BoundedSemaphore(_MOST_CLIENTS)
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._accept, name="metrics", daemon=True)
        for sock in listeners:
            sock.setblocking(False)
        self._thread.start()

    def close(self) -> None:
        """Listen no more; answers under way may still be given."""
        self._wake.close()
        self._thread.join()
        self._woken.close()
        for sock, address in zip(self._listeners, self.addresses, strict=True):
            sock.close()
            if sock.family == socket.AF_UNIX or isinstance(address, str):
                with contextlib.suppress(OSError):
                    Path(address).unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        with selectors.DefaultSelector() as selector:
            for sock in (self._woken, *self._listeners):
                selector.register(sock, selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select()]
                if self._woken in ready:
                    return
                for listener in ready:
                    assert isinstance(listener, socket.socket)
                    # The others wait in the kernel's queue.
                    if self._places.acquire(timeout=_GLANCE) and not self._begin(listener):
                        self._places.release()
                        # Out of descriptors, most likely. The client stays in the queue, so trying
                        # again at once would keep a core busy.
                        poll = select.poll()
                        poll.register(self._woken, select.POLLIN)
                        poll.poll(_GLANCE * 1000)

    def _begin(self, listener: socket.socket) -> bool:
        try:
            client, _ = listener.accept()
        except OSError:
            return False  # it has changed its mind
        thread = threading.Thread(
            target=self._serve, args=(client,), name="metrics-client", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:
            client.close()
            return False
        return True

    def _serve(self, client: socket.socket) -> None:
        try:
            with client:
                deadline = Deadline(_SECONDS)
                request = b""
                while b"\r\n\r\n" not in request and len(request) < _LONGEST_REQUEST:
                    heard = stream.receive(client, deadline, _LONGEST_REQUEST)
                    if not heard:
                        return
                    request += heard
                stream.send(client, self._answer(request), deadline)
                client.shutdown(socket.SHUT_WR)
        except (TransportError, OSError) as error:
            _log.debug("a scrape broke off: %s", error)
        finally:
            self._places.release()

    def _answer(self, request: bytes) -> bytes:
        head, complete, _ = request.partition(b"\r\n\r\n")
        words = head.split(b"\r\n", 1)[0].split(b" ")
        if not complete or len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return _response("400 Bad Request", "this is no request of HTTP/1.1\n")
        method, target, _ = words
        if target.partition(b"?")[0] != b"/metrics":
            return _response("404 Not Found", "the metrics are at /metrics\n")
        if method not in (b"GET", b"HEAD"):
            return _response("405 Method Not Allowed", "use GET\n", "Allow: GET, HEAD")
        try:
            text = encode(self._collect())
        except Exception as error:
            # Nothing that is asked of a device or a storage may end who serves it.
            _log.error("metrics cannot be collected: %s: %s", type(error).__name__, error)
            return _response("500 Internal Server Error", "the log says more\n")
        answer = _response("200 OK", text, content_type=CONTENT_TYPE)
        return answer if method == b"GET" else answer.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"


def serve_metrics(address: str, collect: Callable[[], Iterable[Family]]) -> MetricsListener:
    """Begin to serve metrics; there must be no fork after it, as it starts a thread.

    Args:
        address: `HOST:PORT`, `:PORT` for all addresses of this machine, `[V6]:PORT`, or the
            path of a Unix socket, with a slash in it. Port 0 lets the system choose.
        collect: gives all families, at every scrape.

    Raises:
        ConfigError: the address is none.
        TransportError: it cannot be listened on.
    """
    return MetricsListener(_listen(address), collect)


def check_address(address: str) -> str:
    """Give `address` back if metrics can be served on such a one.

    Raises:
        ConfigError: it is no address.
    """
    _parse(address)
    return address


def _listen(address: str) -> list[socket.socket]:
    path, host, port = _parse(address)
    try:
        return [stream.listen_unix(path)] if path else stream.listen_tcp(host, port)
    except TransportError as error:
        raise TransportError(
            f"metrics: {error}", hint="choose another address for the metrics"
        ) from None


def _parse(address: str) -> tuple[str | None, str | None, int]:
    if "/" in address:
        return address, None, 0
    host, colon, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        colon = ""
    if not colon or not (port.isascii() and port.isdigit()) or int(port[:6]) > 65535:
        raise ConfigError(
            f"{address!r} is no address for metrics",
            hint="say HOST:PORT, :PORT, [V6]:PORT, or a path with a slash in it",
        )
    return None, host or None, int(port)


def _response(
    status: str, body: str, *headers: str, content_type: str = "text/plain; charset=utf-8"
) -> bytes:
    data = body.encode()
    lines = [
        f"HTTP/1.1 {status}",
        f"Content-Type: {content_type}",
        f"Content-Length: {len(data)}",
        "Connection: close",
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data
