"""What the kernel says is heard, once, by who listened before it was said."""

from __future__ import annotations

import os
import selectors
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nbdlink import kernel
from nbdlink.kernel import module, sysfs
from nbdlink.kernel.events import Event, EventKind, Events

from .conftest import PATIENCE, run_python, until
from .peer import MULTI_CONN

pytestmark = pytest.mark.kernel


@pytest.fixture
def events():
    with Events() as listener:
        assert listener.unheard == []
        yield listener


def heard(events, *wanted):
    """Wait for events; give all that came until then."""
    found = []
    deadline = time.monotonic() + PATIENCE
    while not set(wanted) <= set(found):
        left = deadline - time.monotonic()
        assert left > 0, f"not all of {wanted} were heard, but {found}"
        found += events.wait(left)
    return found


def quiet(events):
    """Take what is still under way from before."""
    while events.wait(0.3):
        pass


def test_a_lost_connection_is_heard(attach, peer, events):
    device = attach(index=2, connections=2, flags=MULTI_CONN, dead_timeout=600)
    quiet(events)
    peer.kill(1)
    assert heard(events, Event(EventKind.DEAD, device.index)) == [Event(EventKind.DEAD, 2)]


def test_a_loop_is_woken(attach, peer, events):
    device = attach(dead_timeout=600)
    quiet(events)
    with selectors.DefaultSelector() as selector:
        selector.register(events, selectors.EVENT_READ)
        assert selector.select(0) == []
        peer.kill()
        assert selector.select(PATIENCE), "nothing was to be read"
        assert events.read() == [Event(EventKind.DEAD, device.index)]
        assert selector.select(0) == []


def test_attaching_is_heard(attach, events, road):
    quiet(events)
    device = attach(index=1, road=road)
    heard(events, Event(EventKind.CHANGED, device.index))


def test_detaching_is_heard(attach, events, road):
    device = attach(index=1, road=road)
    quiet(events)
    kernel.detach(device.index)
    heard(events, Event(EventKind.CHANGED, device.index))


def test_another_size_is_heard(attach, peer, events, road):
    device = attach(road=road)
    quiet(events)
    peer.data.extend(bytes(len(peer.data)))
    kernel.resize(device.index, len(peer.data))
    heard(events, Event(EventKind.RESIZED, device.index))


def test_a_new_device_is_heard(attach, events):
    device = attach(index=max(sysfs.indices()) + 1)
    heard(events, Event(EventKind.ADDED, device.index))


def test_it_works_without_udevd(without_udevd, attach, events):
    device = attach(index=0)
    heard(events, Event(EventKind.CHANGED, device.index))


def test_the_module_may_go_and_come_back(events, unloaded, attach, peer):
    heard(events, Event(EventKind.REMOVED, 0))
    quiet(events)
    unloaded()
    device = attach(index=0, dead_timeout=600)  # which loads it
    # Connections may have died before the group was joined.
    heard(events, Event(EventKind.LOST))
    quiet(events)
    peer.kill()
    heard(events, Event(EventKind.DEAD, device.index))


def test_who_listened_before_the_module_was_loaded_hears_the_devices(unloaded, attach):
    with Events() as events:
        assert events.unheard == []
        assert not module.loaded(), "listening loaded it"
        unloaded()
        attach(index=0)
        heard(events, Event(EventKind.ADDED, 0), Event(EventKind.LOST))


def test_uevents_that_were_lost_are_reported(events):
    # pyudev takes the 1 that Debian's libudev gives for an error, if another call has left errno.
    with socket.socket(fileno=os.dup(events._uevents._monitor.fileno())) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    trigger = Path("/sys/block/nbd0/uevent")
    for _ in range(50):
        trigger.write_text("change")
    found = heard(events, Event(EventKind.LOST))
    assert found.count(Event(EventKind.LOST)) == 1
    quiet(events)
    trigger.write_text("change")
    heard(events, Event(EventKind.CHANGED, 0))


def has_dropped(sock):
    """Tell whether the kernel had no room for something that it wanted to tell this socket."""
    columns = [line.split() for line in Path("/proc/net/netlink").read_text().splitlines()]
    inode = str(os.fstat(sock.fileno()).st_ino)
    (row,) = (dict(zip(columns[0], row, strict=True)) for row in columns if row[-1] == inode)
    return row["Drops"] != "0"


def test_dead_connections_that_were_lost_are_reported(attach, peer, events):
    device = attach(connections=6, flags=MULTI_CONN, dead_timeout=600)
    quiet(events)
    events._links.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)  # the kernel makes it 2304
    peer.kill()
    until(lambda: has_dropped(events._links))  # who read any earlier might keep up
    heard(events, Event(EventKind.LOST))
    quiet(events)
    with peer.connect() as sock:
        kernel.reconfigure(device.index, [sock.fileno()])
    peer.kill()
    heard(events, Event(EventKind.DEAD, device.index))


def test_nobody_may_listen():
    told = run_python(
        """if True:
        import os
        import pyudev
        from nbdlink.kernel import events, udev
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
        with events.Events() as listener:
            print(listener.unheard, listener.read(), listener._family is not None)"""
    )
    assert told == "[] [] True\n"


_ELSEWHERE = """if True:
    import sys
    from nbdlink.kernel.events import Events
    with Events() as events:
        print(events.unheard, events._family is not None, flush=True)
        sys.stdin.readline()
        found = [events.wait(10)]
        while found[-1]:
            found.append(events.wait(1))
        print(sorted({event.kind.value for each in found for event in each}))
"""


def test_another_network_namespace_hears_uevents_only(attach, peer):
    with subprocess.Popen(
        ["unshare", "--net", sys.executable, "-c", _ELSEWHERE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(kernel.__file__).parents[2])},
    ) as process:
        process.stdout.readline()
        device = attach(dead_timeout=600)
        with Events() as events:
            peer.kill()
            heard(events, Event(EventKind.DEAD, device.index))
        assert process.communicate("\n", timeout=PATIENCE)[0] == "['changed']\n"
