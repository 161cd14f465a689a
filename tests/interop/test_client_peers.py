"""Our client against other implementations' servers."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
from pathlib import Path

import pytest

import nbdlink
from nbdlink.cli.main import main
from nbdlink.protocol.constants import TransmissionFlag

from .peers import MISSING, PEERS

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

SIZE = 8 << 20


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture(params=list(PEERS))
def peer(request, image, tmp_path):
    with PEERS[request.param](image, tmp_path) as target:
        yield target


def test_all_of_an_export_is_read(peer, image):
    with nbdlink.connect(peer) as nbd:
        assert nbd.size == SIZE
        assert nbd.pread(SIZE, 0) == image.read_bytes()


def test_writes_reach_the_image(peer, image):
    data = os.urandom(1 << 20)
    with nbdlink.connect(peer) as nbd:
        nbd.pwrite(data, 12345, fua=True)
        nbd.flush()
    assert image.read_bytes()[12345 : 12345 + len(data)] == data


def test_zeroes_reach_the_image(peer, image):
    with nbdlink.connect(peer) as nbd:
        nbd.zero(1 << 20, 4096)
        nbd.flush()
        assert nbd.pread(1 << 20, 4096) == bytes(1 << 20)
    assert image.read_bytes()[4096 : 4096 + (1 << 20)] == bytes(1 << 20)


def test_trim_is_taken(peer):
    with nbdlink.connect(peer) as nbd:
        nbd.trim(1 << 20, 1 << 20)
        nbd.flush()


def test_cache_is_taken_where_it_is_offered(peer):
    with nbdlink.connect(peer) as nbd:
        if nbd.can(TransmissionFlag.SEND_CACHE):
            nbd.cache(1 << 20, 0)
        assert nbd.pread(512, 0)


def test_requests_in_flight_all_come_back(peer, image):
    content = image.read_bytes()
    places = [random.randrange(0, SIZE - 4096) & -512 for _ in range(1000)]
    with nbdlink.connect(peer) as nbd:
        requests = [(at, nbd.submit_read(4096, at)) for at in places]
        for at, request in requests:
            assert request.result(60) == content[at : at + 4096]


def test_exports_are_listed(peer, capsys):
    assert main(["exports", "--json", str(peer)]) == 0
    listed = json.loads(capsys.readouterr().out)["exports"]
    assert [(e["export-name"], e["export-size"]) for e in listed] == [(peer.export, SIZE)]


def test_info_agrees_with_nbdinfo(peer, capsys):
    # Asked by its size alone, because nbd-server (3.24) answers the option that nbdinfo uses
    # otherwise, NBD_OPT_INFO, with a size of 0; nbdinfo --size goes into transmission.
    sized = subprocess.run(["nbdinfo", "--size", str(peer)], capture_output=True, check=True)
    said = subprocess.run(["nbdinfo", "--json", str(peer)], capture_output=True, check=True)
    theirs = json.loads(said.stdout)
    (their_export,) = theirs.pop("exports")
    if their_export["export-size"] == 0:
        their_export["export-size"] = int(sized.stdout)
        their_export["export-size-str"] = "8M"
    assert main(["info", "--json", str(peer)]) == 0
    ours = json.loads(capsys.readouterr().out)
    assert ours.pop("extended") is theirs.pop("extended", False)  # libnbd has it since 1.18
    (our_export,) = ours.pop("exports")
    # What the content looks like is not asked, and a URI can be written in several ways.
    for unshared in ("content", "uri"):
        their_export.pop(unshared, None)
    uri = our_export.pop("uri")
    assert (ours, our_export) == (theirs, their_export)
    with nbdlink.connect(uri) as nbd:
        assert nbd.size == SIZE


def test_every_json_key_of_an_export_is_in_the_manual(peer, capsys):
    page = (Path(__file__).parents[2] / "man" / "nbdlink-info.8").read_text()
    lines = re.findall(r"^\.It Li (.+)$", page, re.M)
    documented = {key for line in lines for key in line.split(" , ")}
    assert main(["info", "--json", str(peer)]) == 0
    server = json.loads(capsys.readouterr().out)
    assert {*server, *server["exports"][0]} <= documented
