"""New connections for devices in use: what is dead is replaced, and nothing else is let in."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from nbdlink import kernel
from nbdlink.cli.main import main
from nbdlink.client.opening import negotiate
from nbdlink.errors import (
    DeviceInUseError,
    ForeignExportError,
    KernelError,
    OptionError,
    TransportError,
)
from nbdlink.kernel import device, sockets, sysfs
from nbdlink.link import record
from nbdlink.link.attach import detach
from nbdlink.link.health import Health, health
from nbdlink.link.renew import _Attempt, renew
from nbdlink.protocol.claim import Claim
from nbdlink.uri import Target
from tests.certificates import Authority
from tests.interop.peers import MISSING

from .conftest import PATIENCE, free_all, until
from .restarts import Restartable

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.usefixtures("runtime_directory"),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

SIZE = 8 << 20


@pytest.fixture
def serve(image, tmp_path):
    """Start a server of the image, or of another file; all of them end with the test."""
    started = []

    def start(kind="nbdlink", *options, file=image, credentials=None):
        server = Restartable(kind, file, tmp_path, *options, credentials=credentials)
        started.append(server)
        return server.start()

    yield start
    for server in started:
        server.kill()


@pytest.fixture(params=["nbdkit", "nbdlink"])
def server(request, serve):
    return serve(request.param)


@pytest.fixture
def attach(capsys):
    """Attach as an administrator would; give the device's index."""

    def attach(target, *options):
        words = ["attach", str(target), "--dead-timeout", "100", "--timeout", "60", *options]
        assert main(words) == 0, capsys.readouterr().err
        device = capsys.readouterr().out.strip()
        return int(device.removeprefix("/dev/nbd"))

    yield attach
    free_all()


def all_dead(index):
    return not health(record.read(index)).live


def content(index):
    return Path(f"/dev/nbd{index}").read_bytes()


def test_a_kernel_that_is_too_busy_is_asked_again(serve, attach, image, monkeypatch):
    """It may not listen on some of the connections, for ever: nobody has used them yet."""
    undone = []
    look, undo = sysfs.live_links, device._undo
    monkeypatch.setattr(sysfs, "live_links", lambda: look() if undone else {0: 1})
    monkeypatch.setattr(device, "_undo", lambda *what: undone.append(what) or undo(*what))
    index = attach(serve().uri, "/dev/nbd0", "-C", "2")
    assert undone == [(0, "netlink")]
    assert content(index) == image.read_bytes()


def test_dead_connections_are_replaced(server, attach):
    index = attach(server.uri, "-C", "2")
    server.kill()
    until(lambda: all_dead(index))
    server.start()
    assert renew(index).renewed == (0, 1)
    assert sysfs.settled_links({index}) == {index: 2}


def test_the_disk_is_the_same_afterwards(server, attach, image):
    index = attach(server.uri)
    server.kill()
    until(lambda: all_dead(index))
    server.start()
    renew(index)
    assert content(index) == image.read_bytes()


def test_what_is_read_while_the_server_is_away_arrives_when_it_is_back(server, attach, image):
    index = attach(server.uri)
    server.kill()
    until(lambda: all_dead(index))
    read = []
    reader = threading.Thread(target=lambda: read.append(content(index)))
    reader.start()
    server.start()
    renew(index)
    reader.join(PATIENCE)
    assert read == [image.read_bytes()]


def test_only_the_dead_one_of_four_is_replaced(server, attach):
    index = attach(server.uri, "-C", "4")
    before = record.read(index).channels
    sockets.destroy(before[2].cookie)
    until(lambda: health(record.read(index)).dead == (2,))
    assert renew(index).renewed == (2,)
    after = record.read(index).channels
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, True, False, True]
    assert (after[2].generation, after[2].renewals) == (1, 1)


def test_with_nothing_dead_nothing_is_done(server, attach):
    index = attach(server.uri, "-C", "2")
    assert renew(index).renewed == ()


def test_all_of_them_can_be_replaced_while_they_live(server, attach, image):
    index = attach(server.uri, "-C", "3")
    before = {each.cookie for each in record.read(index).channels}
    assert renew(index, everything=True).renewed == (0, 1, 2)
    assert not before & {each.cookie for each in record.read(index).channels}
    assert content(index) == image.read_bytes()


def test_a_live_connection_of_a_device_that_never_waits_can_be_replaced(server, attach, image):
    index = attach(server.uri, "--dead-timeout", "0")
    with subprocess.Popen(
        ["dd", f"if=/dev/nbd{index}", "of=/dev/null", "bs=4k", "iflag=direct"],
        stderr=subprocess.PIPE,
        text=True,
    ) as reader:
        renew(index, everything=True)
        _, said = reader.communicate(timeout=PATIENCE * 2)
    assert reader.returncode == 0, said


def test_without_a_server_it_fails_and_can_be_tried_again(server, attach):
    index = attach(server.uri)
    server.kill()
    until(lambda: all_dead(index))
    with pytest.raises(TransportError, match="connection refused"):
        renew(index)
    server.start()
    assert renew(index).renewed == (0,)


def test_no_generation_is_used_twice(server, attach):
    index = attach(server.uri)
    server.kill()
    until(lambda: all_dead(index))
    for _ in range(2):
        with pytest.raises(TransportError):
            renew(index)
    server.start()
    renew(index)
    (channel,) = record.read(index).channels
    assert (channel.generation, channel.renewals) == (3, 1)


def test_no_channel_is_renewed_while_the_server_still_has_another_ones_past(serve, attach):
    """What was on its way on that one would be sent again on the first, and be overtaken."""
    server = serve()
    index = attach(server.uri, "-C", "2")
    claim = Claim(record.read_session(index), 1, 2)
    wire, _ = negotiate(server.target, claim=claim)  # it refuses the next one, of generation 1
    with wire:
        sockets.destroy(record.read(index).channels[0].cookie)
        until(lambda: all_dead(index))
        with pytest.raises(OptionError, match="comes too late"):
            renew(index)
        assert sysfs.settled_links({index}) == {index: 0}


def test_another_size_is_another_export(serve, attach, tmp_path):
    server = serve("nbdkit")
    index = attach(server.uri)
    server.kill()
    os.truncate(server.image, SIZE * 2)
    server.start()
    until(lambda: all_dead(index))
    with pytest.raises(ForeignExportError, match=f"it has {SIZE * 2} bytes, not {SIZE}"):
        renew(index)
    assert health(record.read(index)).dead == (0,)


def test_another_signature_is_another_export(serve, attach):
    server = serve("nbdlink", "--signature", "mine")
    index = attach(server.uri)
    server.kill()
    until(lambda: all_dead(index))
    server.start("--signature", "yours")
    with pytest.raises(ForeignExportError, match="its signature is 'yours', not 'mine'"):
        renew(index)


def test_a_file_that_was_replaced_is_another_export(serve, attach, image):
    server = serve("nbdlink")
    index = attach(server.uri)
    server.kill()
    until(lambda: all_dead(index))
    other = image.with_name("other")
    other.write_bytes(bytes(SIZE))
    other.rename(image)
    server.start()
    with pytest.raises(ForeignExportError, match="signature"):
        renew(index)


def test_read_only_is_not_the_same(serve, attach):
    server = serve("nbdlink")
    index = attach(server.uri)
    server.kill()
    until(lambda: all_dead(index))
    server.start("-r")
    with pytest.raises(ForeignExportError, match="it is read-only"):
        renew(index)


def test_an_export_that_grew_is_taken_over_if_it_is_proved_to_be_the_same(serve, attach):
    server = serve("nbdlink", "--signature", "mine")
    index = attach(server.uri, "-C", "2")
    server.kill()
    until(lambda: all_dead(index))
    os.truncate(server.image, SIZE * 2)
    server.start()
    assert renew(index).grown_to == SIZE * 2
    assert (sysfs.size(index), record.read(index).size) == (SIZE * 2, SIZE * 2)


def test_a_server_moves(serve, attach, image):
    here, there = serve("nbdkit"), serve("nbdkit")
    index = attach(here.uri, "-C", "2")
    assert main(["reconnect", f"/dev/nbd{index}", there.uri]) == 0
    here.kill()
    assert content(index) == image.read_bytes()
    assert record.read(index).target == there.uri


@pytest.mark.parametrize("lost", [{"cookie": None}, {"network": 1}])
def test_what_cannot_be_ended_does_not_move(serve, attach, lost):
    """The kernel takes no new connection for one that lives, and says nothing."""
    index = attach(serve("nbdkit").uri)
    known = record.read(index)
    record.write(replace(known, channels=(replace(known.channels[0], **lost),)))
    with pytest.raises(KernelError, match="cannot be ended, as its socket is not known"):
        renew(index, everything=True, target=serve("nbdkit").target)
    assert record.read(index).target == known.target


def test_a_move_to_nowhere_changes_nothing(serve, attach, image, capsys):
    here = serve("nbdkit")
    index = attach(here.uri)
    assert main(["reconnect", f"/dev/nbd{index}", "127.0.0.1:1/data"]) == 1
    assert "connection refused" in capsys.readouterr().err
    assert record.read(index).target == here.uri
    assert content(index) == image.read_bytes()


def test_a_dead_route_is_left_for_another_one(serve, attach, image):
    here, there = serve("nbdkit"), serve("nbdkit")
    index = attach(here.uri, "--path", there.uri, "-C", "2")
    here.kill()
    until(lambda: health(record.read(index)).dead == (0,))
    renewal = renew(index)
    assert (renewal.renewed, renewal.strayed) == ((0,), (0,))
    assert [each.route for each in record.read(index).channels] == [there.uri, there.uri]


def test_a_channel_goes_back_to_its_route(serve, attach):
    here, there = serve("nbdkit"), serve("nbdkit")
    index = attach(here.uri, "--path", there.uri, "-C", "2")
    here.kill()
    until(lambda: health(record.read(index)).dead == (0,))
    renew(index)
    here.start()
    assert renew(index, also=[0]).strayed == ()
    assert [each.route for each in record.read(index).channels] == [here.uri, there.uri]


def test_a_name_brings_a_dead_link_back(server, attach, capsys):
    index = attach(server.uri, "--name", "data")
    server.kill()
    until(lambda: all_dead(index))
    server.start()
    assert attach(server.uri, "--name", "data") == index
    assert health(record.read(index)).live == (0,)


def test_what_differs_from_the_link_of_that_name_is_told(server, attach, capsys):
    attach(server.uri, "--name", "data")
    assert main(["attach", server.uri, "--name", "data", "-C", "2"]) == 1
    assert "it differs in connections and timeout and dead-timeout" in capsys.readouterr().err


@pytest.mark.parametrize("road", ["kernel", "relay"])
def test_connections_with_tls_are_replaced(serve, attach, image, tmp_path, road):
    authority = Authority()
    credentials = authority.write_directory(
        tmp_path / "pki", server=authority.issue(), client=authority.issue("me", role="client")
    )
    server = serve("nbdlink", credentials=credentials)
    index = attach(
        server.uri, "-C", "2", "--tls-certificates", str(credentials), "--tls-road", road
    )
    server.kill()
    until(lambda: all_dead(index))
    server.start()
    assert renew(index).renewed == (0, 1)
    assert {each.tls for each in record.read(index).channels} == {road}
    assert content(index) == image.read_bytes()


@pytest.mark.parametrize("road", ["kernel", "relay"])
def test_live_connections_with_tls_are_replaced(serve, attach, image, tmp_path, road):
    authority = Authority()
    credentials = authority.write_directory(
        tmp_path / "pki", server=authority.issue(), client=authority.issue("me", role="client")
    )
    server = serve("nbdlink", credentials=credentials)
    index = attach(
        server.uri, "-C", "2", "--tls-certificates", str(credentials), "--tls-road", road
    )
    assert renew(index, everything=True).renewed == (0, 1)
    assert content(index) == image.read_bytes()


def test_a_device_of_the_ioctl_road_is_told_apart(server, attach):
    index = attach(server.uri, "--ioctl")
    with pytest.raises(KernelError, match="was attached by ioctls"):
        renew(index)


def test_nothing_is_renewed_that_is_not_attached():
    with pytest.raises(KernelError, match="/dev/nbd3 is not attached"):
        renew(3)


def test_what_others_have_attached_is_left_alone(server, attach, tmp_path):
    index = attach(server.uri)
    record.remove(index)
    with pytest.raises(KernelError, match="it is not known what it is attached to"):
        renew(index)


def test_the_secret_of_a_device_is_roots(server, attach):
    index = attach(server.uri)
    mode = (record.DIRECTORY / f"nbd{index}.session").stat().st_mode
    assert stat.S_IMODE(mode) == 0o600


def test_a_device_grows_with_its_export(server, attach, capsys, image):
    index = attach(server.uri, "-C", "2")
    os.truncate(image, SIZE * 2)
    assert main(["resize", f"/dev/nbd{index}"]) == 0
    assert sysfs.size(index) == SIZE * 2
    assert content(index) == image.read_bytes()


def test_a_resize_that_fails_halfway_changes_nothing(serve, attach, capsys, image):
    server = serve("nbdkit")  # whose connections have to be renewed for it
    index = attach(server.uri)
    os.truncate(image, SIZE * 2)
    server.restart()

    def refuse(*_, **__):
        raise TransportError("the server has gone again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nbdlink.link.resize.renew", refuse)
        assert main(["resize", f"/dev/nbd{index}"]) == 1
    assert record.read(index).size == sysfs.size(index) == SIZE


def test_a_device_is_not_made_larger_than_its_export(server, attach, capsys):
    index = attach(server.uri)
    assert main(["resize", f"/dev/nbd{index}", "1G"]) == 2
    assert f"the export has only {SIZE} bytes" in capsys.readouterr().err


def test_a_device_does_not_shrink_unasked(serve, attach, capsys):
    server = serve("nbdkit")
    index = attach(server.uri)
    os.truncate(server.image, SIZE // 2)
    assert main(["resize", f"/dev/nbd{index}"]) == 2
    assert f"the export has {SIZE // 2} bytes now, less than the device" in capsys.readouterr().err
    assert sysfs.size(index) == SIZE


def test_partitions_follow_a_resize(serve, attach, image):
    server = serve("nbdlink")
    index = attach(server.uri)
    os.truncate(image, SIZE * 2)
    main(["resize", f"/dev/nbd{index}"])
    subprocess.run(
        ["sfdisk", "-q", f"/dev/nbd{index}"],
        input=b"label: gpt\nstart=2048\n",
        check=True,
        capture_output=True,
    )
    until(lambda: Path(f"/dev/nbd{index}p1").exists())
    (partition,) = sysfs.partitions(index)
    assert partition.size > SIZE


def test_info_tells_what_each_connection_is(server, attach, capsys):
    index = attach(server.uri, "-C", "2")
    sockets.destroy(record.read(index).channels[1].cookie)
    until(lambda: health(record.read(index)).dead == (1,))
    main(["info", "--json", f"/dev/nbd{index}"])
    told = json.loads(capsys.readouterr().out)["channels"]
    assert [(each["route"], each["alive"]) for each in told] == [
        (server.uri, True),
        (server.uri, False),
    ]


def test_a_target_with_a_name_is_the_same_as_its_uri(server, attach):
    index = attach(str(Target.parse(server.uri)), "--name", "data")
    assert attach(server.uri, "--name", "data") == index


def test_a_server_that_a_device_has_moved_to_can_be_restarted(serve, attach, image, tmp_path):
    copy = tmp_path / "copy.img"
    copy.write_bytes(image.read_bytes())
    here, there = serve("nbdlink"), serve("nbdlink", file=copy)
    index = attach(here.uri)
    here.kill()
    until(lambda: all_dead(index))
    assert main(["reconnect", f"/dev/nbd{index}", there.uri]) == 0
    there.restart()
    until(lambda: all_dead(index))
    assert renew(index).renewed == (0,), "the first server's own signature says nothing about it"


def test_a_device_moves_to_the_export_of_the_same_name(serve, attach):
    here, there = serve("nbdlink"), serve("nbdlink")
    index = attach(here.uri)
    here.kill()
    until(lambda: all_dead(index))
    assert main(["reconnect", f"/dev/nbd{index}", f"127.0.0.1:{there.port}"]) == 0
    assert record.read(index).target == there.uri


def test_nothing_leads_back_to_where_a_device_has_left(serve, attach):
    here, other, there = serve("nbdkit"), serve("nbdkit"), serve("nbdkit")
    index = attach(here.uri, "--path", other.uri)
    here.kill()
    until(lambda: all_dead(index))
    assert main(["reconnect", f"/dev/nbd{index}", there.uri]) == 0
    there.kill()
    until(lambda: all_dead(index))
    with pytest.raises(TransportError, match=f":{there.port}: connection refused"):
        renew(index)


def test_exports_with_different_signatures_are_not_one_device(serve, capsys):
    one, other = serve("nbdlink", "--signature", "one"), serve("nbdlink", "--signature", "other")
    assert main(["attach", one.uri, "--path", other.uri, "-C", "2"]) == 1
    assert "its signature is 'other', not 'one'" in capsys.readouterr().err


def test_a_device_that_was_detached_meanwhile_gets_nothing(server, attach):
    index = attach(server.uri, "--name", "old")
    attempt = _Attempt(record.read(index), None, None, None)
    detach("old")
    assert main(["attach", server.uri, f"/dev/nbd{index}", "--name", "new"]) == 0
    before = record.read(index)
    with pytest.raises(KernelError, match="has been detached meanwhile"):
        attempt.run([0], Health((), (0,)))
    assert record.read(index) == before


def test_a_name_brings_a_link_back_that_is_half_dead(serve, attach):
    here, there = serve("nbdkit"), serve("nbdkit")
    words = (here.uri, "--path", there.uri, "-C", "2", "--name", "data")
    index = attach(*words)
    here.kill()
    until(lambda: health(record.read(index)).dead == (0,))
    assert attach(*words) == index
    assert health(record.read(index)).dead == ()


def test_a_name_of_the_ioctl_road_changes_nothing(server, attach):
    index = attach(server.uri, "--ioctl", "--name", "data")
    assert attach(server.uri, "--ioctl", "--name", "data") == index


def test_a_detach_that_was_refused_leaves_no_mark(server, attach):
    index = attach(server.uri, "--name", "data")
    holder = os.open(f"/dev/nbd{index}", os.O_RDWR | os.O_EXCL)
    try:
        with pytest.raises(DeviceInUseError):
            detach("data")
    finally:
        os.close(holder)
    assert not record.is_detached("data")


def test_a_detach_that_was_interrupted_leaves_no_mark(serve, attach, monkeypatch):
    attach(serve().uri, "--name", "data")

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(kernel, "detach", interrupt)
    with pytest.raises(KeyboardInterrupt):
        detach("data")
    assert not record.is_detached("data")


def test_who_detaches_anothers_device_does_not_detach_the_link_before_it(serve, attach):
    server = serve()
    index = attach(server.uri, "--name", "data")
    before = record.read(index)
    kernel.detach(index)
    attach(server.uri, f"/dev/nbd{index}", "--name", "other")
    record.write(before)  # as if another program had attached it
    detach(f"/dev/nbd{index}")
    assert not record.is_detached("data")


def test_a_detach_forgets_only_what_it_has_detached(server, attach, monkeypatch):
    index = attach(server.uri, "--name", "old")
    told = record.read(index)
    again = replace(told, name="new", attached_at=told.attached_at + 1)

    def detach_and_lose_a_race(*_, **__):
        record.write(again)

    monkeypatch.setattr(kernel, "detach", detach_and_lose_a_race)
    detach("old")
    assert record.read(index) == again
