"""What may happen to an attached device, one function each, and the world that it happens in.

Each does its harm, takes it back, and waits until requests are answered again. They take a
random pause here and there, not to make anything true, but so that the harm comes at another
moment each time.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nbdlink.kernel import sockets
from nbdlink.link import record
from nbdlink.link.health import Health, health
from nbdlink.link.renew import renew

from .conftest import free_all, until
from .firewall import resetting, swallowing
from .restarts import Restartable
from .supervisors import Supervisor, index_of, link

SIZE = 32 << 20
SPREAD = 0.5
"""Seconds that a random pause may take."""


@dataclass
class World:
    """A link, its server, and a supervisor that looks after it.

    Attributes:
        folder: where all of it is.
        server: the link's.
        connections: how many channels the link has.
        supervisor: the one that runs just now.
        dice: for the moments.
    """

    folder: Path
    server: Restartable
    connections: int
    dice: random.Random
    supervisor: Supervisor | None = None
    _undo: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def index(self) -> int:
        index = index_of("data")
        assert index is not None, "nothing is attached"
        return index

    @property
    def device(self) -> str:
        return f"/dev/nbd{self.index}"

    def supervise(self):
        """Start a supervisor."""
        self.supervisor = Supervisor(self.folder)

    def another_server(self, *options: str) -> Restartable:
        """Start one more server of the same file; it ends with the world."""
        server = Restartable(self.server.kind, self.server.image, self.folder, *options)
        self._undo.callback(server.kill)
        return server.start()

    def health(self) -> Health:
        """Tell which channels are connected."""
        known = record.read(self.index)
        assert known is not None
        return health(known)

    def account(self) -> str:
        """Tell what all of them have to say, for a test that failed."""
        lines = [f"channels: {self.health()}", f"server: {self.server.status()}"]
        lines += [self.server.log()[-2000:], self.supervisor.log()[-4000:]]
        return "\n".join(lines)

    def pause(self, longest: float = SPREAD):
        """Let some time pass."""
        time.sleep(self.dice.uniform(0, longest))

    def healed(self):
        """Wait until all channels are connected."""
        until(lambda: len(self.health().live) == self.connections and not self.health().dead)


@contextlib.contextmanager
def world(
    folder: Path,
    kind: str = "nbdlink",
    *,
    connections: int = 2,
    timeout: int = 2,
    dead_timeout: int = 100,
    seed: int = 1,
    credentials: Path | None = None,
    road: str = "auto",
) -> Iterator[World]:
    """Make a server with an empty disk, attach it, and free everything afterwards."""
    image = folder / "disk.img"
    image.touch()
    os.truncate(image, SIZE)
    server = Restartable(kind, image, folder, credentials=credentials)
    settings: dict[str, object] = {"timeout": timeout, "dead-timeout": dead_timeout}
    settings["connections"] = connections
    if credentials is not None:
        settings |= {"tls-certificates": f'"{credentials}"', "tls-road": f'"{road}"'}
    (folder / "nbdlink.toml").write_text(link(server, **settings))
    made = World(folder, server, connections, random.Random(seed))
    with made._undo:
        made._undo.callback(free_all)
        made._undo.callback(server.kill)
        if kind == "nbdkit":
            made._undo.enter_context(_kept_alive(server))
        made._undo.callback(lambda: made.supervisor and made.supervisor.end(signal.SIGKILL))
        server.start()
        made.supervise()
        made.supervisor.until("attached as")
        yield made


@contextlib.contextmanager
def _kept_alive(server: Restartable) -> Iterator[None]:
    """Restart a server that ends by itself, as a service manager would.

    nbdkit 1.32 does, now and then, when a connection ends on which several of its threads have
    something to send: "raw_send_socket: Assertion `sock >= 0' failed".
    """
    stopping = threading.Event()

    def keep():
        while not stopping.wait(0.2):
            server.revive()

    keeper = threading.Thread(target=keep)
    keeper.start()
    try:
        yield
    finally:
        stopping.set()
        keeper.join()


def crash(here: World):
    """Kill the server, and start it again."""
    here.server.kill()
    here.pause(SPREAD / 4)
    here.server.start()


def crash_alone(here: World):
    """Kill the server, and have it stay away for a while."""
    here.server.kill()
    until(lambda: not here.health().live)
    here.pause(2 * SPREAD)
    here.server.start()


def orphan(here: World):
    """Kill the server and the supervisor, one shortly after the other; start both again."""
    kill_server: Callable[[], object] = here.server.kill
    steps = [kill_server, lambda: here.supervisor.end(signal.SIGKILL)]
    here.dice.shuffle(steps)
    for step in steps:
        step()
        here.pause(SPREAD / 8)
    starts = [here.server.start, here.supervise]
    here.dice.shuffle(starts)
    for start in starts:
        start()


def interrupt(here: World):
    """Kill the supervisor while it renews what the server's end has cost, and start it again."""
    here.server.restart()
    here.pause()
    here.supervisor.end(signal.SIGKILL)
    here.supervise()


def freeze(here: World):
    """Have the server stand still until its connections are given up, and go on after that."""
    here.server.freeze()
    try:
        until(lambda: not here.health().live)
        here.pause()
    finally:
        here.server.thaw()


def stutter(here: World):
    """Have the server stand still for less time than its connections are given up after."""
    here.server.freeze()
    try:
        here.pause()
    finally:
        here.server.thaw()


def cut_one(here: World):
    """End one connection."""
    number = here.dice.choice(here.health().live)
    known = record.read(here.index)
    sockets.destroy(known.channels[number].cookie)


def cut_all(here: World):
    """End all connections, one right after the other."""
    for each in record.read(here.index).channels:
        sockets.destroy(each.cookie)


def black_hole(here: World):
    """Have the network swallow everything until the connections are given up."""
    with swallowing():
        until(lambda: not here.health().live)
        here.pause()


def rejected(here: World):
    """Have the network reset everything for a while."""
    with resetting(here.server.port):
        until(lambda: not here.health().live)
        here.pause()


def move(here: World):
    """Give all channels new connections while they live."""
    renew(here.index, everything=True)


FAULTS: dict[str, Callable[[World], None]] = {
    "crash": crash,
    "crash-alone": crash_alone,
    "orphan": orphan,
    "interrupt": interrupt,
    "freeze": freeze,
    "stutter": stutter,
    "cut-one": cut_one,
    "cut-all": cut_all,
    "black-hole": black_hole,
    "rejected": rejected,
    "move": move,
}


def suffer(here: World, fault: Callable[[World], None], rounds: int, *loads) -> None:
    """Have something happen again and again; after each time requests must be answered.

    Args:
        here: the world.
        fault: what happens.
        rounds: how often.
        loads: what uses the device meanwhile.
    """
    try:
        for _ in range(rounds):
            fault(here)
            for load in loads:
                load.moves_on()
        here.healed()
    except AssertionError as error:
        raise AssertionError(f"{error}\n{here.account()}") from None
