"""Exports that come, go and change while a service runs."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import subprocess
import sys
import threading

import pytest

from nbdlink.client.negotiate import Negotiation
from nbdlink.errors import ConfigError, StorageError
from nbdlink.server import Service
from nbdlink.server.offer import ExportPlan, Offer
from nbdlink.transport.stream import listen_unix
from nbdlink.uri import Target

from .fakes import FLUSH, OPT_GO, READ, REP_ACK, MemoryStorage, RawClient, export_request


class Site:
    """A service whose exports are those of `plans`, once it is told to `renew`."""

    def __init__(self, path):
        self.path = path
        self.opened = []  # every storage that was opened
        self.beside = []  # the names of exports that have company
        self.plans = [self.plan("a"), self.plan("b")]
        self.offer = Offer(self.plans, self.read, self.accompany)
        self.offer.begin()
        self.mistake = None
        self.service = Service(self.offer.catalogue, [listen_unix(str(path))], offer=self.offer)

    def plan(self, name, what="memory", **facts):
        return ExportPlan(name, what, facts, lambda: self.open(what))

    def open(self, what):
        if what == "missing":
            raise StorageError("missing cannot be opened")
        if what == "too much":
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        self.opened.append(MemoryStorage())
        return self.opened[-1]

    def read(self):
        if self.mistake:
            raise self.mistake
        return self.plans

    @contextlib.contextmanager
    def accompany(self, export):
        self.beside.append(export.name)
        yield
        self.beside.remove(export.name)

    def renew(self, *plans):
        self.plans = plans
        self.service.renew()

    def client(self, name, **options):
        return RawClient(self.service, name=name.encode(), **options)

    def listed(self):
        """Give what a newcomer is told there is, with descriptions."""
        with Negotiation(Target(socket=str(self.path))) as negotiation:
            return {each.name: each.description for each in negotiation.list_exports()}


@pytest.fixture
def site(tmp_path, nothing_leaks):
    site = Site(tmp_path / "socket")
    with site.service:
        yield site


def test_one_that_came_is_served(site):
    site.renew(*site.plans, site.plan("c"))
    with site.client("c") as client:
        assert client.ask(READ, 0, 9) == (0, site.opened[2].data[:9])


def test_the_order_is_that_of_the_configuration(site):
    site.renew(site.plan("c"), *reversed(site.plans))
    assert list(site.listed()) == ["c", "b", "a"]


def test_one_that_went_is_not_found(site):
    site.renew(site.plan("a"))
    assert list(site.listed()) == ["a"]


def test_one_that_went_goes_on_for_who_has_it(site):
    with site.client("b") as client:
        site.renew(site.plan("a"))
        assert client.ask(READ, 0, 9)[0] == 0


def test_one_that_nobody_uses_is_closed_at_once(site):
    site.renew(site.plan("a"))
    assert [storage.closed for storage in site.opened] == [False, True]


def test_one_that_somebody_uses_is_closed_when_the_last_has_left(site, eventually):
    with site.client("b"):
        with site.client("b"):
            site.renew(site.plan("a"))
        eventually(lambda: len(site.service.sessions) == 1)
        assert not site.opened[1].closed
    eventually(lambda: site.opened[1].closed)


def test_it_is_flushed_before_it_is_closed(site):
    site.renew(site.plan("a"))
    assert site.opened[1].calls == [("flush",)]


def test_a_flush_that_fails_is_told(site, caplog):
    site.opened[1].failing["flush"] = errno.EIO
    site.renew(site.plan("a"))
    assert "memory: not made durable: Input/output error" in caplog.text


def test_who_is_in_the_handshake_may_have_been_told_of_it(site, eventually):
    with site.client("", handshake=False) as client:
        client.receive(18)
        site.renew(site.plan("a"))
        assert not site.opened[1].closed
    eventually(lambda: site.opened[1].closed)


def test_who_has_chosen_another_one_does_not_keep_it_open(site, eventually):
    with site.client("", handshake=False) as client:
        client.receive(18)
        site.renew(site.plan("a"))
        client.send(b"\0\0\0\3")
        assert client.option(OPT_GO, export_request(b"a"))[-1][0] == REP_ACK
        eventually(lambda: site.opened[1].closed)
        assert client.ask(READ, 0, 9)[0] == 0


def test_who_came_later_keeps_nothing_open(site, eventually):
    with site.client("b") as client:
        site.renew(site.plan("a"))
        with site.client("a"):
            client.sock.close()
            eventually(lambda: site.opened[1].closed)


def test_one_that_comes_back_is_what_it_was(site):
    plans = site.plans
    with site.client("b"):
        site.renew(site.plan("a"))
        site.renew(*plans)
        with site.client("b") as client:
            assert client.ask(READ, 0, 9) == (0, site.opened[1].data[:9])


def test_another_one_cannot_have_its_name_while_it_is_used(site, caplog):
    with site.client("b") as client:
        site.renew(site.plan("a"))
        site.renew(site.plan("a"), site.plan("b", "other"))
        assert list(site.listed()) == ["a"]
        assert client.ask(READ, 0, 9)[0] == 0
    assert "export 'b': clients still use what had this name before" in caplog.text


def test_the_name_is_free_afterwards(site, eventually):
    with site.client("b"):
        site.renew(site.plan("a"))
    eventually(lambda: site.opened[1].closed)
    site.renew(site.plan("a"), site.plan("b", "other"))
    with site.client("b") as client:
        assert client.ask(READ, 0, 9) == (0, site.opened[2].data[:9])


def test_what_the_server_decides_may_change(site):
    site.renew(site.plan("a", description="new words"), site.plan("b"))
    assert site.listed() == {"a": "new words", "b": ""}


def test_the_storage_stays_open_then(site):
    with site.client("a") as client:
        site.renew(site.plan("a", description="new words"), site.plan("b"))
        assert client.ask(READ, 0, 9) == (0, site.opened[0].data[:9])
    assert len(site.opened) == 2


def test_what_it_is_made_of_stays(site, caplog):
    site.renew(site.plan("a", "other", description="new words"), site.plan("b"))
    assert site.listed() == {"a": "", "b": ""}
    assert "export 'a': it is made of something else now, and stays as it was" in caplog.text


def test_a_mistake_changes_nothing(site, caplog):
    site.mistake = ConfigError("nbdlink.toml:3: a mistake", hint="mend it")
    site.renew(site.plan("c"))
    assert list(site.listed()) == ["a", "b"]
    assert "the exports stay as they are: nbdlink.toml:3: a mistake (mend it)" in caplog.text


def test_one_that_cannot_be_opened_is_no_other_ones_loss(site, caplog):
    site.renew(site.plan("x", "missing"), *site.plans, site.plan("c"))
    assert list(site.listed()) == ["a", "b", "c"]
    assert "export 'x': missing cannot be opened" in caplog.text


def test_nor_is_one_that_fails_in_another_way(site, caplog):
    site.renew(site.plan("c"), site.plan("x", "too much"), *site.plans)
    assert list(site.listed()) == ["c", "a", "b"]
    assert "export 'x': Too many open files" in caplog.text


def test_it_is_tried_again_the_next_time(site):
    site.renew(*site.plans, site.plan("x", "missing"))
    site.renew(*site.plans, site.plan("x"))
    assert list(site.listed()) == ["a", "b", "x"]


def test_a_context_that_is_missing_keeps_it_out(site, caplog):
    facts = {"further_contexts": ("qemu:dirty-bitmap:x",)}
    site.renew(*site.plans, site.plan("c", **facts))
    assert list(site.listed()) == ["a", "b"]
    assert site.opened[2].closed
    assert "export 'c': memory has no bitmap 'x' that can be used" in caplog.text


def test_company_is_there_as_long_as_the_export(site, eventually):
    assert site.beside == ["a", "b"]
    with site.client("b"):
        site.renew(site.plan("a"), site.plan("c"))
        assert site.beside == ["a", "b", "c"]
    eventually(lambda: site.beside == ["a", "c"])


def test_what_is_still_used_at_the_end_is_flushed_and_closed(tmp_path, nothing_leaks):
    site = Site(tmp_path / "socket")
    with site.service, site.client("b") as client:
        site.renew(site.plan("a"))
        assert client.ask(FLUSH)[0] == 0
        site.service.stop()
        assert site.service.join(20)
    assert [(storage.calls[-1], storage.closed) for storage in site.opened] == [
        (("flush",), True),
        (("flush",), True),
    ]


class EndingSite(Site):
    """Its service ends while its configuration is read."""

    def read(self):
        self.service.stop()
        assert self.service.join(20)
        return super().read()


def test_nothing_comes_once_the_service_has_ended(tmp_path, nothing_leaks):
    site = EndingSite(tmp_path / "socket")
    with site.service:
        site.renew(*site.plans, site.plan("c"))
    assert len(site.opened) == 2, "nobody would close it"


def test_nothing_is_closed_twice_when_the_service_has_ended(tmp_path, nothing_leaks, caplog):
    site = EndingSite(tmp_path / "socket")
    with site.service:
        site.renew(site.plan("a"))
    assert "not made durable" not in caplog.text


# Signals.

PROGRAM = """
import logging, sys
from nbdlink.server import Service
from nbdlink.server.offer import ExportPlan, Offer
from nbdlink.storage.raw import RawStorage
from nbdlink.transport.stream import listen_unix
logging.basicConfig(level=logging.INFO, format="%(message)s")
folder, kind = sys.argv[1:]
class DeadStorage(RawStorage):
    def flush(self):
        print("flushing", flush=True)
        sys.stdin.read()
def read():
    if kind == "bug" and not bugs:
        bugs.append(1)
        raise ZeroDivisionError
    return plans[:1]
bugs = []
plans = [
    ExportPlan("a", "a", {}, lambda: RawStorage.open(folder + "/a")),
    ExportPlan("b", "b", {}, lambda: DeadStorage.open(folder + "/b")),
]
offer = Offer(plans, read)
service = Service(offer.catalogue, [listen_unix(folder + "/socket")], offer=offer)
sys.exit(service.run(lambda: print("ready", flush=True)))
"""


class Program:
    """A program whose export "b" goes at SIGHUP, and whose flush then does not come back."""

    def __init__(self, folder, kind="-"):
        for name in "ab":
            (folder / name).write_bytes(bytes(4096))
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(folder), kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout.readline() == "ready\n"

    def hang_up(self):
        self.process.send_signal(signal.SIGHUP)

    def logs(self, words):
        """Wait until the program has said `words` in a line of its log."""
        return any(words in line for line in self.process.stderr)


@pytest.fixture
def program(tmp_path):
    with contextlib.ExitStack() as stack:

        def start(*words):
            program = Program(tmp_path, *words)
            stack.enter_context(program.process)
            stack.callback(program.process.kill)
            return program

        yield start


def test_a_disk_that_does_not_answer_keeps_no_signal_from_being_heard(program):
    program = program()
    program.hang_up()
    assert program.process.stdout.readline() == "flushing\n"
    program.process.send_signal(signal.SIGTERM)
    assert program.logs("told to stop by SIGTERM")
    program.process.send_signal(signal.SIGTERM)
    assert program.process.wait(20) == 1


def test_a_bug_ends_nothing_and_it_may_be_tried_again(program):
    program = program("bug")
    program.hang_up()
    assert program.logs("unexpected ZeroDivisionError")
    program.hang_up()
    assert program.process.stdout.readline() == "flushing\n"


def test_one_that_cannot_be_closed_keeps_no_other_from_it(
    tmp_path, nothing_leaks, caplog, monkeypatch
):
    monkeypatch.setattr("nbdlink.server.offer._PATIENCE", 0.05)
    site = Site(tmp_path / "socket")
    flushing, dead = threading.Event(), threading.Event()

    def flush():
        flushing.set()
        dead.wait()

    site.opened[1].flush = flush
    with site.service:
        renewal = threading.Thread(target=site.renew, args=(site.plan("a"),))
        renewal.start()
        assert flushing.wait(20)
        site.service.stop()
        assert site.service.join(20)
    assert site.opened[0].closed
    assert "cannot be closed, and is left behind" in caplog.text
    dead.set()
    renewal.join()


def test_without_a_configuration_nothing_changes(tmp_path, nothing_leaks, caplog):
    offer = Offer([ExportPlan("", "memory", {}, MemoryStorage)])
    listener = listen_unix(str(tmp_path / "socket"))
    caplog.set_level(logging.DEBUG, "nbdlink.server")
    with Service(offer.catalogue, [listener], offer=offer) as service:
        service.renew()
        with RawClient(service) as client:
            assert client.ask(READ, 0, 9)[0] == 0
