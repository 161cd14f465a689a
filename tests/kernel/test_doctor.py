"""`nbdlink doctor` on a machine that can attach devices, and about devices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nbdlink import kernel
from nbdlink.cli.main import main
from nbdlink.server import serve_in_thread

from .conftest import until
from .restarts import Restartable

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("runtime_directory")]


@pytest.fixture
def doctor(capsys):
    """Run `doctor --json`; give its status, the findings by what was looked at, and the last."""

    def examine(*words):
        capsys.readouterr()
        status = main(["doctor", "--json", "--timeout", "60", *map(str, words)])
        found = json.loads(capsys.readouterr().out)
        return status, {each["check"]: each for each in found}, found[-1]

    yield examine
    main(["detach", "--all", "--force"])


def test_a_file_is_attached_for_trial(doctor):
    status, found, last = doctor("--attach")
    assert (status, last["check"], last["status"]) == (0, "detach", "ok")
    assert found["device read"]["status"] == "ok"
    assert all(each.state is kernel.DeviceState.FREE for each in kernel.devices())


def test_a_device_its_user_and_the_way_to_its_server(doctor, image):
    with serve_in_thread({"data": image}) as service:
        main(["attach", "--name", "link", service.uri("data"), "/dev/nbd5"])
        with Path("/dev/nbd5").open("rb"):
            status, found, last = doctor("link")
        assert (status, last["check"]) == (0, "read")
        assert "/dev/nbd5 (link) is attached, 8M, and can be read" in found["device"]["found"]
        assert "has /dev/nbd5 open" in found["use"]["found"]
        assert found["connections"]["found"] == "1 of 1 are live"


def test_a_device_whose_server_is_gone(doctor, image):
    with serve_in_thread({"data": image}) as service:
        main(["attach", "--name", "link", service.uri("data"), "/dev/nbd5"])
    until(lambda: kernel.status(5).state is kernel.DeviceState.DEAD)
    status, found, last = doctor("/dev/nbd5")
    assert (status, found["device"]["status"]) == (1, "failed")
    assert "nbdlink reconnect link" in found["device"]["remedy"]
    assert "nobody listens there" in last["found"]
    stale = doctor()[1]["device /dev/nbd5"]
    assert "nbdlink doctor /dev/nbd5 tells why" in stale["remedy"]


def test_a_free_device_that_somebody_holds_open(doctor):
    with Path("/dev/nbd5").open("rb"):
        status, found, _ = doctor("/dev/nbd5")
        assert (status, found["use"]["status"]) == (0, "warning")
        assert "so that it cannot be attached" in found["use"]["found"]
        assert "has /dev/nbd5 open" in doctor()[1]["free devices"]["found"]


def test_a_device_whose_server_stands_still(doctor, image, tmp_path, capsys):
    server = Restartable("nbdlink", image, tmp_path).start()
    try:
        main(["attach", server.uri, "/dev/nbd5"])
        server.freeze()
        capsys.readouterr()
        assert main(["doctor", "--json", "--timeout", "5", "/dev/nbd5"]) == 1
        found = {each["check"]: each for each in json.loads(capsys.readouterr().out)}
        assert "a read of it does not come back" in found["device"]["found"]
        assert "says nothing for 5 seconds" in found["greeting"]["found"]
        # Who reads that block for the doctor is no user of the device.
        assert found.get("use") is None
    finally:
        server.thaw()
        main(["detach", "--force", "/dev/nbd5"])
        server.kill()
