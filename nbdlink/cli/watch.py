"""`nbdlink watch`: what links do and what happens to them, as it happens.

One loop waits for the kernel's events, for the clock, for keys and for signals, and does nothing
in between. What is seen is in `nbdlink.link.watch`, what it looks like in `nbdlink.cli.screen`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import selectors
import signal
import socket
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from nbdlink.errors import ConfigError, KernelError

if TYPE_CHECKING:
    from nbdlink.cli.screen import Line, View
    from nbdlink.kernel.events import Event, Events
    from nbdlink.link.watch import Link, Notice, Observer

_LEAST_INTERVAL = 0.1
_PAUSE = 0.1
"""Seconds between two looks at what the kernel says, so that a flood of events costs little."""

_NOTICES_KEPT = 200
_SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGWINCH,
    signal.SIGTSTP,
    signal.SIGCONT,
)


def add_arguments(parser: argparse.ArgumentParser, _verb: str) -> None:
    """Fill the parser."""
    parser.add_argument(
        "what", nargs="*", metavar="DEVICE|NAME", help="/dev/nbdN or a link's name (all)"
    )
    parser.add_argument(
        "-i",
        "--interval",
        metavar="S",
        type=_interval,
        default=1.0,
        help="seconds between two measurements (1)",
    )
    parser.add_argument(
        "-n", "--count", metavar="N", type=_count, help="end after so many measurements"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, an object a line")
    parser.set_defaults(run=run_watch)


def _interval(text: str) -> float:
    from nbdlink.sizes import parse_seconds

    seconds = parse_seconds(text)
    if seconds < _LEAST_INTERVAL:
        raise ConfigError(f"{text!r} is too short", hint=f"say {_LEAST_INTERVAL:g} or more")
    return seconds


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text[:10]) > 0):
        raise ConfigError(f"{text!r} is not a number of measurements", hint="say 1 or more")
    return int(text)


def run_watch(arguments: argparse.Namespace) -> int:
    """Show links until `q`, Ctrl-C or the last measurement."""
    from nbdlink.cli import output
    from nbdlink.link.watch import Observer

    observer = Observer(arguments.what)
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(_Signals())
        events, unheard = _listen(stack)
        display: _Display
        paints = not arguments.json and output.can_paint()
        for line in [] if paints else unheard:
            print(f"nbdlink: not heard: {output.printable(line)}", file=sys.stderr)
        if arguments.json:
            display = _JSONLines()
        elif paints:
            display = _Painting(arguments.interval, unheard)
            stack.enter_context(display)
        else:
            display = _Text(arguments.interval)
        _Loop(observer, display, signals, events, arguments.interval, arguments.count).run()
    return 0


def _listen(stack: contextlib.ExitStack) -> tuple[Events | None, list[str]]:
    from nbdlink.kernel.events import Events

    try:
        events = stack.enter_context(Events())
    except KernelError as error:
        # Looking at every interval finds the same, but later.
        return None, [str(error)]
    return events, events.unheard


class _Display(ABC):
    """Where it is shown.

    Attributes:
        keys: a descriptor on which keys arrive, or None.
    """

    keys: int | None = None

    @abstractmethod
    def show(self, observer: Observer, notices: list[Notice], *, measured: bool) -> None:
        """Show what there is now; `measured` if the rates are new."""

    def suspend(self) -> None:  # noqa: B027 (most displays have none to give)
        """Give the terminal back, as the process is about to be stopped."""

    def resume(self) -> None:  # noqa: B027
        """Take it again; also if its size has changed."""


class _Loop:
    """Waits for whatever comes first, and has it shown."""

    def __init__(
        self,
        observer: Observer,
        display: _Display,
        signals: _Signals,
        events: Events | None,
        interval: float,
        count: int | None,
    ) -> None:
        self._observer = observer
        self._display = display
        self._signals = signals
        self._events = events
        self._interval = interval
        self._left = count

    def run(self) -> None:
        """Return when it is to end."""
        self._observer.look()  # what has been attached all the time is no news
        self._observer.measure()
        self._display.show(self._observer, [], measured=False)
        due = time.monotonic() + self._interval
        deaf_until = 0.0
        with selectors.DefaultSelector() as selector:
            selector.register(self._signals, selectors.EVENT_READ)
            if self._display.keys is not None:
                selector.register(self._display.keys, selectors.EVENT_READ)
            while True:
                now = time.monotonic()
                listening = self._events is not None and now >= deaf_until
                self._listen(selector, listening)
                until = due if listening or self._events is None else min(due, deaf_until)
                ready = {key.fileobj for key, _ in selector.select(max(0.0, until - now))}
                if self._signals in ready and self._ends(self._signals.read()):
                    return
                if self._display.keys in ready and self._quits(selector):
                    return
                if self._events in ready:
                    deaf_until = time.monotonic() + _PAUSE
                    self._show(self._heard())
                if time.monotonic() >= due:
                    self._show(self._heard(), measure=True)
                    if self._left == 0:
                        return
                    # After a stop of the process, no measurement is made up for.
                    due = max(due + self._interval, time.monotonic())

    def _listen(self, selector: selectors.BaseSelector, listening: bool) -> None:
        if self._events is None:
            return
        registered = self._events in (key.fileobj for key in selector.get_map().values())
        if listening and not registered:
            selector.register(self._events, selectors.EVENT_READ)
        elif registered and not listening:
            selector.unregister(self._events)

    def _heard(self) -> list[Event]:
        return [] if self._events is None else self._events.read()

    def _show(self, heard: list[Event], *, measure: bool = False) -> None:
        notices = self._observer.look(heard)
        if measure:
            notices += self._observer.measure()
            if self._left is not None:
                self._left -= 1
        self._display.show(self._observer, notices, measured=measure)

    def _ends(self, numbers: set[int]) -> bool:
        if numbers & {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}:
            return True
        if signal.SIGTSTP in numbers:
            self._display.suspend()
            self._signals.stop()
            self._display.resume()
        elif numbers & {signal.SIGCONT, signal.SIGWINCH}:
            self._display.resume()
        else:
            return False
        self._display.show(self._observer, [], measured=False)
        return False

    def _quits(self, selector: selectors.BaseSelector) -> bool:
        assert self._display.keys is not None
        try:
            typed = os.read(self._display.keys, 1024)
        except OSError:
            typed = b""
        if not typed:
            selector.unregister(self._display.keys)  # the terminal has gone
            self._display.keys = None
        return b"q" in typed.lower()


class _Signals:
    """Signals as something to wait for, so that none arrives in the middle of anything."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._before: dict[int, Any] = {}

    def fileno(self) -> int:
        """Give the descriptor that is readable after a signal."""
        return self._reader.fileno()

    def read(self) -> set[int]:
        """Give the signals that have come."""
        try:
            return set(self._reader.recv(4096))
        except BlockingIOError:
            return set()

    def stop(self) -> None:
        """Be stopped, as Ctrl-Z has it; returns when it goes on."""
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, _noted)

    def __enter__(self) -> _Signals:
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in _SIGNALS:
            before = signal.getsignal(number)
            if before is not signal.SIG_IGN:  # as nohup and shells without job control have it
                self._before[number] = signal.signal(number, _noted)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        self._reader.close()
        self._writer.close()


def _noted(_number: int, _frame: FrameType | None) -> None:
    """Do nothing: the number is in the socket already."""


class _JSONLines(_Display):
    """An object a line; the keys are documented in nbdlink-watch(8)."""

    def __init__(self) -> None:
        self._shown: dict[int, Link] = {}
        self._first = True

    def show(self, observer: Observer, notices: list[Notice], *, measured: bool) -> None:
        from nbdlink.cli.output import print_json_line
        from nbdlink.link import watch

        now = time.time()
        if self._first:
            for word in observer.missing:
                print_json_line(watch.absent_as_json(word, now))
        self._first = False
        for notice in notices:
            print_json_line(watch.notice_as_json(notice))
        for index, link in observer.links.items():
            if self._shown.get(index) != link:
                print_json_line(watch.link_as_json(link, now))
        self._shown = dict(observer.links)
        if measured:
            for link, activity in _each(observer):
                sample = watch.rates_as_json(link, activity, now) if activity else None
                if sample is not None:
                    print_json_line(sample)


class _Text(_Display):
    """A table for each measurement, and a line for each event, as they come."""

    def __init__(self, interval: float) -> None:
        self._interval = interval

    def show(self, observer: Observer, notices: list[Notice], *, measured: bool) -> None:
        from nbdlink.cli import output, screen

        for notice in notices:
            print(screen.notice_line(notice), flush=True)
        if not measured:
            return
        view = _view(observer, self._interval)
        print(screen.clock(view.moment))
        if view.links or view.missing:
            output.print_table(*screen.plain_table(view))
        else:
            print("nothing is attached")
        print(flush=True)


class _Painting(_Display):
    """The whole screen of a terminal."""

    def __init__(self, interval: float, unheard: list[str]) -> None:
        from nbdlink.cli import output, screen

        self._screen = output.Screen()
        self._keyboard = _Keyboard()
        self._interval = interval
        self._unheard = unheard
        drawable = screen.UNICODE
        characters = drawable.dot + drawable.trend + drawable.rule + drawable.more
        self._glyphs = drawable if output.can_print(characters) else screen.ASCII
        self._notices: deque[Notice] = deque(maxlen=_NOTICES_KEPT)

    def __enter__(self) -> _Painting:
        self.keys = self._keyboard.take()
        self._screen.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        # The terminal may have gone, which is a reason to end and not an error.
        with contextlib.suppress(OSError):
            self._screen.__exit__(None, None, None)
        self._keyboard.give_back()

    def show(self, observer: Observer, notices: list[Notice], *, measured: bool) -> None:
        self._notices += notices
        self._screen.paint(self._picture(observer))

    def _picture(self, observer: Observer) -> list[Line]:
        from nbdlink.cli import output, screen

        view = _view(observer, self._interval, list(self._notices), self._unheard)
        columns, lines = output.screen_size()
        return screen.picture(view, columns, lines, self._glyphs)

    def suspend(self) -> None:
        self.__exit__()

    def resume(self) -> None:
        self.__enter__()


class _Keyboard:
    """Keys one by one and unechoed, if stdin is a terminal."""

    def __init__(self) -> None:
        self._before: list[Any] | None = None

    def take(self) -> int | None:
        """Have keys told at once; give the descriptor on which they arrive, if there is one."""
        import termios
        import tty

        if sys.stdin is None or not sys.stdin.isatty():
            return None
        descriptor = sys.stdin.fileno()
        with contextlib.suppress(termios.error):
            if self._before is None:
                self._before = termios.tcgetattr(descriptor)
                tty.setcbreak(descriptor, termios.TCSADRAIN)
            return descriptor
        return None

    def give_back(self) -> None:
        """Have the terminal as it was."""
        import termios

        if self._before is not None:
            with contextlib.suppress(termios.error):
                termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, self._before)
            self._before = None


def _each(observer: Observer) -> Iterator[tuple[Link, Any]]:
    for index in sorted(observer.links):
        yield observer.links[index], observer.activity.get(index)


def _view(
    observer: Observer,
    interval: float,
    notices: list[Notice] | None = None,
    unheard: list[str] | None = None,
) -> View:
    from nbdlink.cli.screen import View

    return View(
        list(_each(observer)),
        observer.missing,
        notices or [],
        time.time(),
        interval,
        os.uname().nodename,
        unheard or [],
    )
