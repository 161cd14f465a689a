"""What a device and the data on it outlive: servers, connections and supervisors that end badly.

While it happens the device is used by the oracle, by fio with verification or through ext4. What
is promised: within the dead timeout no request fails, and whatever was acknowledged stays, on the
device and in the server's file. Rounds are few here, as a round takes seconds in a guest under
emulation; `python -m tests.kernel.soak` does the same for hours.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal

import pytest

from nbdlink import kernel
from nbdlink.cli.main import main
from nbdlink.link import record
from nbdlink.link.health import health
from nbdlink.link.renew import renew
from tests.certificates import Authority
from tests.interop.peers import MISSING

from . import faults
from .conftest import until
from .faults import suffer
from .firewall import MISSING as FIREWALL_MISSING
from .oracle import Oracle
from .workloads import FileSystem, Fio

missing = MISSING + FIREWALL_MISSING

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.usefixtures("runtime_directory"),
    pytest.mark.timeout(400),  # a round of a fault takes many seconds on a busy machine
    pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}"),
]

MANY = 6
FEW = 2


@pytest.fixture
def world(tmp_path):
    """Make a world; all of it is gone after the test."""
    with contextlib.ExitStack() as stack:
        yield lambda *words, **options: stack.enter_context(
            faults.world(tmp_path, *words, **options)
        )


@pytest.fixture
def watch():
    """Have an oracle use a device; it is stopped in any case."""
    started = []

    def start(here, **options):
        started.append(Oracle(here.device, **options).start())
        return started[-1]

    yield start
    for each in started:
        each.stopping()


# The server ends.


@pytest.mark.parametrize(
    ("kind", "rounds"), [("nbdlink", FEW), ("nbdkit", MANY), ("qemu-nbd", MANY)]
)
def test_nothing_is_lost_when_the_server_is_killed_again_and_again(world, watch, kind, rounds):
    here = world(kind)
    seer = watch(here)
    suffer(here, faults.crash, rounds, seer)
    seer.check(here.server.image)


def test_fio_finds_nothing_wrong(world):
    here = world("nbdkit", connections=4)
    fio = Fio(here.device, 0, 4 << 20).start()
    suffer(here, faults.crash, FEW, fio)
    fio.check()


def test_a_file_system_stays_whole(world, tmp_path):
    here = world("nbdkit")
    files = FileSystem(here.device, tmp_path / "mnt").start()
    try:
        suffer(here, faults.crash, MANY, files)
        files.check()
    finally:
        files.unmount()


@pytest.mark.parametrize("road", ["kernel", "relay"])
def test_nothing_is_lost_with_tls(world, watch, tmp_path, road):
    authority = Authority()
    credentials = authority.write_directory(
        tmp_path / "pki", server=authority.issue(), client=authority.issue("me", role="client")
    )
    here = world(credentials=credentials, road=road)
    assert {each.tls for each in record.read(here.index).channels} == {road}
    seer = watch(here)
    suffer(here, faults.crash, 2, seer)
    seer.check(here.server.image)
    assert {each.tls for each in record.read(here.index).channels} == {road}


def test_after_the_dead_timeout_requests_fail_and_later_do_not(world, watch):
    here = world("nbdkit", timeout=1, dead_timeout=2)
    seer = watch(here, may_fail=True)
    here.server.kill()
    seer.fails()
    assert {error.errno for error in seer.failed} == {errno.EIO}
    here.server.start()
    here.healed()
    seer.moves_on()
    already = len(seer.failed)
    seer.moves_on()
    seer.check(here.server.image)
    assert len(seer.failed) == already


def test_a_server_that_stands_still_is_not_given_up_too_early(world, watch):
    here = world("nbdkit", timeout=20)
    seer = watch(here)
    cookies = [each.cookie for each in record.read(here.index).channels]
    suffer(here, faults.stutter, FEW, seer)
    seer.check(here.server.image)
    assert [each.cookie for each in record.read(here.index).channels] == cookies


def test_a_server_that_stood_still_lets_nothing_old_overtake(world, watch):
    """What was on its way when it froze was sent again; our server drops the first one."""
    here = world("nbdlink")
    seer = watch(here)
    suffer(here, faults.freeze, FEW, seer)
    seer.check(here.server.image)


def test_an_export_that_was_swapped_gets_nothing_and_the_right_one_all(world, watch):
    here = world("nbdlink")
    seer = watch(here)
    here.server.kill()
    image = here.server.image
    aside = image.rename(image.with_name("aside"))
    image.touch()
    os.truncate(image, faults.SIZE)
    here.server.start()
    here.supervisor.until("is not the one that data has: its signature")
    here.server.kill()
    assert not any(image.read_bytes())
    aside.rename(image)
    here.server.start()
    here.supervisor.tell(signal.SIGTERM)
    here.supervisor.end()
    here.supervise()  # a person has mended it; the old one would look again in half a minute
    seer.moves_on()
    seer.check(image)


# A connection ends.


def test_nothing_is_lost_when_one_of_four_connections_ends(world, watch):
    here = world("nbdkit", connections=4)
    seer = watch(here)
    suffer(here, faults.cut_one, MANY, seer)
    seer.check(here.server.image)


def test_nothing_is_lost_when_the_network_resets_everything(world, watch):
    here = world("nbdkit")
    seer = watch(here)
    suffer(here, faults.rejected, FEW, seer)
    seer.check(here.server.image)


@pytest.mark.parametrize("kind", ["nbdlink", "nbdkit"])
def test_nothing_old_arrives_out_of_a_black_hole(world, watch, kind):
    """What dead connections still had to send must not reach the disk after what came later.

    Not even if the server does not fence, or the channel has no successor yet: TCP must have
    forgotten it before the kernel sends it again.
    """
    here = world(kind)
    seer = watch(here)
    suffer(here, faults.black_hole, FEW, seer)
    seer.check(here.server.image)


# The supervisor ends.


@pytest.mark.parametrize("fault", [faults.orphan, faults.interrupt])
def test_nothing_is_lost_when_the_supervisor_is_killed(world, watch, fault):
    here = world("nbdkit")
    seer = watch(here)
    suffer(here, fault, FEW, seer)
    seer.check(here.server.image)


class Killed(BaseException):
    """What ends a renewal as SIGKILL does: nothing that could still be done is done."""


@pytest.mark.parametrize("step", ["before", "after"])
def test_a_renewal_that_is_broken_off_leaves_nothing_wrong(world, monkeypatch, step):
    """Not even if the kernel has got the connections and nobody could write it down."""
    here = world("nbdkit")
    here.supervisor.end(signal.SIGKILL)
    here.server.restart()
    until(lambda: not here.health().live)
    reconfigure = kernel.reconfigure

    def broken_off(*words, **options):
        if step == "after":
            reconfigure(*words, **options)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(kernel, "reconfigure", broken_off)
        with pytest.raises(Killed):
            renew(here.index)
    renew(here.index)
    assert health(record.read(here.index)).live == (0, 1)


# A server moves.


def test_a_device_moves_between_servers_without_a_failed_request(world, watch):
    # Between our own: nbdkit may end by itself at the end of a busy connection, and then the
    # server to move to is away for a moment.
    here = world("nbdlink", dead_timeout=0)
    there = here.another_server()
    seer = watch(here)
    for target in (there, here.server, there):
        assert main(["reconnect", here.device, target.uri]) == 0
        seer.moves_on()
    seer.check(here.server.image)
