"""What `nbdlink mirror` asks a server, when the server is short of something."""

from __future__ import annotations

import errno
import os
import socket
import threading
from types import SimpleNamespace

import pytest

from nbdlink.errors import StorageError
from nbdlink.server import mirrors


class Listener(socket.socket):
    """A listener in a process that has no descriptors for the first client."""

    has_failed = False

    def accept(self):
        if not self.has_failed:
            self.has_failed = True
            raise OSError(errno.EMFILE, "too many open files")
        return super().accept()


def listen(path):
    listener = Listener(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    return listener


def test_a_server_without_descriptors_answers_once_it_has_some(
    tmp_path, monkeypatch, nothing_leaks
):
    monkeypatch.setattr(mirrors, "control_socket", lambda name: tmp_path / name)
    monkeypatch.setattr(mirrors, "listen_unix", listen)
    monkeypatch.setattr(mirrors, "_PATIENCE", 20)
    mirror = SimpleNamespace(mirror="m", status=lambda: {"members": []})
    with mirrors.MirrorControl(mirror):
        assert mirrors.ask("m", do="status") == {"members": [], "server": os.getpid()}


class Thread(threading.Thread):
    """A thread in a system that has none for the first client."""

    has_failed = False

    def start(self):
        if self.name == "mirror-client" and not Thread.has_failed:
            Thread.has_failed = True
            raise RuntimeError("can't start new thread")
        super().start()


def test_a_server_without_threads_answers_once_it_has_some(tmp_path, monkeypatch, nothing_leaks):
    monkeypatch.setattr(mirrors, "control_socket", lambda name: tmp_path / name)
    monkeypatch.setattr(mirrors, "_PATIENCE", 20)
    monkeypatch.setattr("threading.Thread", Thread)
    monkeypatch.setattr(Thread, "has_failed", False)
    mirror = SimpleNamespace(mirror="m", status=lambda: {"members": []})
    with mirrors.MirrorControl(mirror):
        with pytest.raises(StorageError):
            mirrors.ask("m", do="status")
        assert mirrors.ask("m", do="status") == {"members": [], "server": os.getpid()}
