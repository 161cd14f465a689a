"""Which of the sockets that the kernel was given are still connected, and how to end one.

The nbd driver does not tell which of a device's connections are dead. But each socket has a
cookie, a number that no other one gets until the machine is booted again (SO_COOKIE), and the
socket diagnosis of the kernel (sock_diag(7)) lists sockets with their cookie and state. When
the driver gives a connection up it shuts the socket down (`nbd_mark_nsock_dead`), which shows
there; so it does when the peer has closed it. A peer that has vanished without a goodbye shows
as connected, until a request times out.

The same interface can end a TCP connection that no process has open any more (SOCK_DESTROY,
`CONFIG_INET_DIAG_DESTROY`; `ss -K` uses it). For Unix sockets there is no such thing.

The messages are fixed structures (`include/uapi/linux/inet_diag.h`, `unix_diag.h`), written out
here: pyroute2 has them too, in a module that brings asyncio along, whose import takes longer
than `nbdlink list`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Collection, Iterator
from typing import Final

from nbdlink.errors import KernelError
from nbdlink.kernel import module, nlmsg

_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_SOCK_DESTROY: Final = 21
_ESTABLISHED: Final = 1
_EVERY_STATE: Final = 0xFFF
_NO_IPV6: Final = (FileNotFoundError,)
_UDIAG_SHOW_NOTHING: Final = 0
_UNIX_DIAG_SHUTDOWN: Final = 6

_INET_REQUEST: Final = struct.Struct("=BBBBI48s")
"""struct inet_diag_req_v2: family, protocol, extensions, padding, states, socket."""
_INET_MESSAGE: Final = struct.Struct("=BBBB48sIIIII")
"""struct inet_diag_msg: family, state, timer, retransmissions, socket, expires, receive queue,
send queue, user, inode. The socket's last part is its cookie."""
_UNIX_REQUEST: Final = struct.Struct("=BBHIIIII")
"""struct unix_diag_req: family, protocol, padding, states, inode, what to show, cookie."""
_UNIX_MESSAGE: Final = struct.Struct("=BBBBIII")
"""struct unix_diag_msg: family, type, state, padding, inode, cookie."""
_SO_COOKIE: Final = 57  # include/uapi/asm-generic/socket.h; not in Python's module
_COOKIE: Final = struct.Struct("=Q")
_HALVES: Final = struct.Struct("=II")
"""A cookie as the diagnosis gives it: its lower half first, whatever the machine's order."""
_RECEIVE_BYTES: Final = 1 << 16


def cookie(sock: socket.socket) -> int:
    """Give the number by which a socket is known here, for as long as anybody has it."""
    (number,) = _COOKIE.unpack(sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, _COOKIE.size))
    return int(number)


def connected(cookies: Collection[int]) -> set[int] | None:
    """Give those of the cookies whose sockets are still connected both ways.

    Sees the sockets of its own network namespace only.

    Returns:
        A subset of `cookies`, or None if the kernel does not tell.
    """
    wanted = frozenset(cookies)
    if not wanted:
        return set()
    try:
        found = {number for number, _, _, alive in _inet() if alive and number in wanted}
        if found != wanted:
            found |= {number for number, alive in _unix() if alive and number in wanted}
    except OSError:
        return None
    return found


def destroy(number: int) -> bool:
    """End the TCP connection that has this cookie, at once: both sides see it broken.

    Returns:
        Whether there was such a connection.

    Raises:
        RightsError: CAP_NET_ADMIN is missing.
        KernelError: the kernel cannot do that.
    """
    try:
        for found, family, identity, _ in _inet():
            if found == number:
                request = _INET_REQUEST.pack(
                    family, socket.IPPROTO_TCP, 0, 0, _EVERY_STATE, identity
                )
                _send(_SOCK_DESTROY, request)
                return True
    except OSError as error:
        if error.errno == errno.ENOENT:
            return False  # it ended by itself just now
        if error.errno in (errno.EPERM, errno.EACCES):
            raise module.rights_error("ending a connection", error.errno) from None
        raise KernelError(
            f"the kernel cannot end a connection: {os.strerror(error.errno or 0).lower()}",
            errno=error.errno or 0,
            hint="it takes CONFIG_INET_DIAG_DESTROY",
        ) from None
    return False


def _inet() -> Iterator[tuple[int, int, bytes, bool]]:
    """Give cookie, family, identity and life of every TCP socket."""
    for family in (socket.AF_INET, socket.AF_INET6):
        request = _INET_REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, _EVERY_STATE, bytes(48))
        # A kernel may be without IPv6. One that is without tcp_diag does not know either, and
        # must not be believed to have no connection at all.
        with contextlib.suppress(*_NO_IPV6 if family == socket.AF_INET6 else ()):
            for body in _dump(request):
                fields = _INET_MESSAGE.unpack_from(body)
                number = _whole(*_HALVES.unpack_from(fields[4], len(fields[4]) - _HALVES.size))
                yield number, fields[0], fields[4], fields[1] == _ESTABLISHED


def _unix() -> Iterator[tuple[int, bool]]:
    """Give cookie and life of every Unix socket."""
    request = _UNIX_REQUEST.pack(
        socket.AF_UNIX, 0, 0, _EVERY_STATE, 0, _UDIAG_SHOW_NOTHING, 0xFFFFFFFF, 0xFFFFFFFF
    )
    for body in _dump(request):
        _, _, state, _, _, *halves = _UNIX_MESSAGE.unpack_from(body)
        yield _whole(*halves), state == _ESTABLISHED and not _shutdown(body[_UNIX_MESSAGE.size :])


def _whole(low: int, high: int) -> int:
    return high << 32 | low


def _shutdown(data: bytes) -> int:
    """Give which directions of a Unix socket have been shut down."""
    content = dict(nlmsg.attributes(data)).get(_UNIX_DIAG_SHUTDOWN)
    return content[0] if content else 0


def _dump(request: bytes) -> Iterator[bytes]:
    with _open() as sock:
        sock.send(nlmsg.message(_SOCK_DIAG_BY_FAMILY, nlmsg.REQUEST | nlmsg.DUMP, request))
        yield from _answers(sock)


def _send(kind: int, request: bytes) -> None:
    with _open() as sock:
        sock.send(nlmsg.message(kind, nlmsg.REQUEST | nlmsg.ACK, request))
        for _ in _answers(sock):
            pass


def _open() -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG)


def _answers(sock: socket.socket) -> Iterator[bytes]:
    """Give the bodies of the kernel's answers, to the last.

    Raises:
        OSError: the answer was an error.
    """
    while True:
        for kind, whole in nlmsg.messages(sock.recv(_RECEIVE_BYTES)):
            if kind not in (nlmsg.ERROR, nlmsg.DONE):
                yield whole[nlmsg.HEADER.size :]
            elif code := nlmsg.error_of(whole):
                raise OSError(code, os.strerror(code))
            else:
                return
