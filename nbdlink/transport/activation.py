"""What a service manager hands to a program, and what it wants to hear from it.

Sockets are handed over by systemd's protocol, which libnbd speaks as well (`nbdinfo [ nbdlink
serve disk.img ]`): the environment has the process's id in LISTEN_PID and the number of
descriptors in LISTEN_FDS; they begin at 3 (sd_listen_fds(3)). The other way round, a program
tells how it is doing in datagrams to the socket that NOTIFY_SOCKET names (sd_notify(3)).
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import MutableMapping
from typing import Final

from nbdlink.errors import ConfigError

_FIRST: Final = 3
"""The first descriptor of the protocol (SD_LISTEN_FDS_START)."""
_FAMILIES: Final = frozenset({socket.AF_INET, socket.AF_INET6, socket.AF_UNIX})
_HINT: Final = "a .socket unit for it says ListenStream=, and not Accept=yes"


def inherited_sockets(
    environment: MutableMapping[str, str] | None = None,
) -> list[socket.socket]:
    """Take over the listening sockets that were handed to this very process, if any.

    The variables of the protocol are removed from the environment, so that no child believes
    they are meant for it, and the descriptors are closed on exec.

    Args:
        environment: where to look; the process's own by default.

    Raises:
        ConfigError: there are some, and one is not what can be accepted on.
    """
    environment = os.environ if environment is None else environment
    pid = environment.pop("LISTEN_PID", "")
    count = environment.pop("LISTEN_FDS", "")
    environment.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()):
        return []  # left over from another program's start
    if not (count.isascii() and count.isdigit()) or len(count) > 9:
        raise ConfigError(f"LISTEN_FDS={count!r} is not a number", hint="unset it")
    return [_listener(_FIRST + number) for number in range(int(count))]


def _listener(descriptor: int) -> socket.socket:
    who = f"descriptor {descriptor}, handed over by LISTEN_FDS,"
    try:
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            raise ConfigError(f"{who} is not a socket", hint=_HINT)
        os.set_inheritable(descriptor, False)
        sock = socket.socket(fileno=descriptor)
    except OSError:
        raise ConfigError(f"{who} is not open", hint="LISTEN_FDS says too many") from None
    fault = _fault(sock)
    if fault:
        sock.detach()
        raise ConfigError(f"{who} {fault}", hint=_HINT)
    return sock


def _fault(sock: socket.socket) -> str | None:
    if sock.family not in _FAMILIES:
        return "is a socket, but neither TCP nor Unix"
    if sock.type != socket.SOCK_STREAM:
        return "is not a stream socket"
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return "is a socket that does not listen"
    return None


def notify(state: str) -> None:
    """Tell the service manager about a change, if it wants to know.

    Args:
        state: lines of `VARIABLE=value`, as sd_notify(3) lists them.
    """
    name = os.environ.get("NOTIFY_SOCKET", "")
    if name[:1] not in ("/", "@"):
        return
    address = "\0" + name[1:] if name.startswith("@") else name
    # A service manager that has gone, or does not listen, is no reason to fail or to wait.
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock,
    ):
        sock.setblocking(False)
        sock.sendto(state.encode(), address)


def watchdog_seconds() -> float | None:
    """Give the time within which the service manager wants to hear of us (sd_watchdog_enabled)."""
    text = os.environ.get("WATCHDOG_USEC", "")
    pid = os.environ.get("WATCHDOG_PID", "")
    if not text.isdigit() or not int(text) or (pid and pid != str(os.getpid())):
        return None
    return int(text) / 1e6
