"""One line of what was found."""

from __future__ import annotations

from nbdlink.errors import TransportError
from nbdlink.link.checkup.finding import failed


def test_the_doctor_sends_nobody_to_the_doctor():
    error = TransportError("no answer", hint="`nbdlink doctor store1` walks the way there")
    assert failed("options", error, "its log may tell why").remedy == "its log may tell why"


def test_an_errors_own_advice_comes_first():
    error = TransportError("no answer", hint="start the server")
    assert failed("options", error, "its log may tell why").remedy == "start the server"
