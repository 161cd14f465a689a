"""The kernel's generic-netlink family `nbd`: connect, disconnect, reconfigure, status.

The messages are pyroute2's; the socket is our own, because pyroute2's sockets each run an
asyncio loop, whose import alone takes longer than the whole exchange. The kernel executes a
request inside `send`, so the answers are waiting when `send` returns, and there is nothing to
time out here: a call that blocks, blocks in the kernel. Callers that must not hang run it
aside (`nbdlink.kernel.bounded`).

Numbers and types: `include/uapi/linux/nbd-netlink.h`, policies in `drivers/block/nbd.c`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from threading import RLock
from typing import Any

from nbdlink.errors import DeviceBusyError, KernelError
from nbdlink.kernel import module, nlmsg


def _defer_package_initialisation() -> None:
    """Put off `pyroute2/__init__.py` until somebody wants a name from it.

    It imports the whole library (NDB, sqlite3, multiprocessing, asyncio: 100 ms); the message
    codec alone takes 6. The package is entered into `sys.modules` unexecuted, as a namespace
    that knows where its parts are, and runs its initialisation on the first access to a name
    that is neither there nor a part. So a program that uses pyroute2 for itself notices nothing.
    """
    if "pyroute2" in sys.modules:
        return
    spec = find_spec("pyroute2")
    if spec is None or spec.loader is None:
        return  # the import statement below says so better
    package = module_from_spec(spec)
    loader = spec.loader
    lock = RLock()
    begun = False

    def initialise(name: str) -> Any:
        nonlocal begun
        if not name.startswith("__") and find_spec(f"pyroute2.{name}"):
            return import_module(f"pyroute2.{name}")
        with lock:  # the same thread comes here again while the package initialises
            if not begun:
                begun = True
                loader.exec_module(package)
        try:
            return package.__dict__[name]
        except KeyError:
            raise AttributeError(f"module 'pyroute2' has no attribute {name!r}") from None

    package.__dict__["__getattr__"] = initialise
    sys.modules["pyroute2"] = package


_defer_package_initialisation()

from pyroute2.netlink import ctrlmsg, genlmsg, nla  # noqa: E402

_FAMILY = "nbd"
_VERSION = 1

_CONNECT, _DISCONNECT, _RECONFIGURE, _STATUS = 1, 2, 3, 5

_NETLINK_GENERIC = 16
_GENL_ID_CTRL = 0x10
_CTRL_CMD_GETFAMILY = 3
_RECEIVE_BYTES = 1 << 20
"""STATUS lists every device in one message; 20 bytes each, and there may be 32768."""


class FamilyMissingError(KernelError):
    """The driver is there, but its netlink family is not, or not in this network namespace."""


class _NBDMessage(genlmsg):  # type: ignore[misc]  # pyroute2 is not typed
    prefix = "NBD_ATTR_"
    nla_map = (
        ("NBD_ATTR_UNSPEC", "none"),
        ("NBD_ATTR_INDEX", "uint32"),
        ("NBD_ATTR_SIZE_BYTES", "uint64"),
        ("NBD_ATTR_BLOCK_SIZE_BYTES", "uint64"),
        ("NBD_ATTR_TIMEOUT", "uint64"),
        ("NBD_ATTR_SERVER_FLAGS", "uint64"),
        ("NBD_ATTR_CLIENT_FLAGS", "uint64"),
        ("NBD_ATTR_SOCKETS", "sockets"),
        ("NBD_ATTR_DEAD_CONN_TIMEOUT", "uint64"),
        ("NBD_ATTR_DEVICE_LIST", "device_list"),
        ("NBD_ATTR_BACKEND_IDENTIFIER", "asciiz"),
    )

    class sockets(nla):  # type: ignore[misc]  # pyroute2 looks it up by this name
        nla_map = (("NBD_SOCK_ITEM_UNSPEC", "none"), ("NBD_SOCK_ITEM", "item"))

        class item(nla):  # type: ignore[misc]
            nla_map = (("NBD_SOCK_UNSPEC", "none"), ("NBD_SOCK_FD", "uint32"))

    class device_list(nla):  # type: ignore[misc]
        nla_map = (("NBD_DEVICE_ITEM_UNSPEC", "none"), ("NBD_DEVICE_ITEM", "item"))

        class item(nla):  # type: ignore[misc]
            nla_map = (
                ("NBD_DEVICE_UNSPEC", "none"),
                ("NBD_DEVICE_INDEX", "uint32"),
                ("NBD_DEVICE_CONNECTED", "uint8"),
            )


def connect(
    sockets: Sequence[int],
    *,
    size: int,
    block_size: int,
    timeout: int,
    dead_timeout: int,
    server_flags: int,
    index: int | None = None,
    identifier: str | None = None,
) -> int:
    """Bind negotiated sockets to a device and give its index (`nbd_genl_connect`).

    Args:
        sockets: descriptors; the kernel takes references of its own.
        size: bytes.
        block_size: bytes, a power of two from 512 to the page size.
        timeout: seconds a request may take; always sent, as one left out is inherited from
            the device's previous use.
        dead_timeout: seconds that I/O waits for a renewal once no connection is left.
        server_flags: the transmission flags.
        index: which device, or None for a free one; one that does not exist is made.
        identifier: shown as `/sys/block/nbdN/backend`; without it none is set.

    Raises:
        DeviceBusyError: the device is attached, or somebody holds it open.
        RightsError, ModuleMissingError, FamilyMissingError, KernelError: as the names say.
    """
    attributes: list[tuple[str, Any]] = [] if index is None else [("NBD_ATTR_INDEX", index)]
    attributes += [
        ("NBD_ATTR_SIZE_BYTES", size),
        ("NBD_ATTR_BLOCK_SIZE_BYTES", block_size),
        ("NBD_ATTR_TIMEOUT", timeout),
        ("NBD_ATTR_DEAD_CONN_TIMEOUT", dead_timeout),
        ("NBD_ATTR_SERVER_FLAGS", server_flags),
        ("NBD_ATTR_CLIENT_FLAGS", 0),
        ("NBD_ATTR_SOCKETS", _sockets(sockets)),
    ]
    if identifier is not None:
        attributes.append(("NBD_ATTR_BACKEND_IDENTIFIER", identifier))
    name = f"/dev/nbd{index}" if index is not None else "a free nbd device"
    for reply in _request(_CONNECT, attributes, f"attaching {name}", name):
        return int(reply.get_attr("NBD_ATTR_INDEX"))
    raise KernelError(f"attaching {name}: the kernel did not say which device it took")


def disconnect(index: int) -> None:
    """Tell the server goodbye, close the sockets and fail what is in flight.

    Works on devices of either road. The device keeps its size and its configuration until
    everybody has closed it (`nbd_genl_disconnect`).

    Raises:
        RightsError, ModuleMissingError, FamilyMissingError, KernelError: as the names say.
    """
    name = f"/dev/nbd{index}"
    _request(_DISCONNECT, [("NBD_ATTR_INDEX", index)], f"detaching {name}", name)


def reconfigure(
    index: int,
    *,
    sockets: Sequence[int] = (),
    size: int | None = None,
    timeout: int | None = None,
    dead_timeout: int | None = None,
    identifier: str | None = None,
) -> None:
    """Change a device of the netlink road (`nbd_genl_reconfigure`).

    Sockets replace dead ones only; surplus ones are dropped without a word. What is None stays
    as it is, but an identifier that was set must be repeated.

    Raises:
        RightsError, ModuleMissingError, FamilyMissingError, KernelError: as the names say.
    """
    attributes: list[tuple[str, Any]] = [("NBD_ATTR_INDEX", index)]
    optional = (
        ("NBD_ATTR_SIZE_BYTES", size),
        ("NBD_ATTR_TIMEOUT", timeout),
        ("NBD_ATTR_DEAD_CONN_TIMEOUT", dead_timeout),
        ("NBD_ATTR_BACKEND_IDENTIFIER", identifier),
        ("NBD_ATTR_SOCKETS", _sockets(sockets) if sockets else None),
    )
    attributes += [(name, value) for name, value in optional if value is not None]
    name = f"/dev/nbd{index}"
    _request(_RECONFIGURE, attributes, f"reconfiguring {name}", name)


def status(index: int | None = None) -> dict[int, bool]:
    """Give the kernel's own `connected` by index, of one device or of all.

    It means "has a configuration": it is also true of an unused device that somebody merely
    holds open, and of one whose every connection is dead. Needs no rights.

    Raises:
        ModuleMissingError, FamilyMissingError, KernelError: as the names say.
    """
    attributes = [] if index is None else [("NBD_ATTR_INDEX", index)]
    found: dict[int, bool] = {}
    for reply in _request(_STATUS, attributes, "asking for the state of nbd devices", "nbd"):
        listed = reply.get_attr("NBD_ATTR_DEVICE_LIST")
        for item in listed.get_attrs("NBD_DEVICE_ITEM") if listed else ():
            number = item.get_attr("NBD_DEVICE_INDEX")
            found[int(number)] = bool(item.get_attr("NBD_DEVICE_CONNECTED"))
    return found


def available() -> bool:
    """Tell whether the family can be reached from here."""
    try:
        with _open() as sock:
            _family_id(sock)
    except KernelError:
        return False
    return True


def _sockets(descriptors: Sequence[int]) -> dict[str, Any]:
    items = [("NBD_SOCK_ITEM", {"attrs": [("NBD_SOCK_FD", fd)]}) for fd in descriptors]
    return {"attrs": items}


def _request(command: int, attributes: list[tuple[str, Any]], doing: str, name: str) -> list[Any]:
    message = _NBDMessage()
    message["cmd"] = command
    message["version"] = _VERSION
    message["attrs"] = attributes
    with _kept.opened() if _kept else _open() as sock:
        family = _family_id(sock)
        try:
            return [_decoded(_NBDMessage, data) for data in _exchange(sock, message, family)]
        except OSError as error:
            raise _explained(error, doing, name) from None


class _Kept:
    """A socket that stays open, for one thread at a time.

    The kernel carries out requests of this kind one by one anyway (`genl_mutex`).
    """

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._lock = RLock()

    @contextlib.contextmanager
    def opened(self) -> Iterator[socket.socket]:
        with self._lock:
            if self._socket is None:
                self._socket = _open()
            try:
                yield self._socket
            except KernelError:
                raise  # the answer was one
            except BaseException:
                self.close()  # nobody knows what is still to come on it
                raise

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


_kept: _Kept | None = None


@contextlib.contextmanager
def kept_open() -> Iterator[None]:
    """Use one socket for all requests meanwhile.

    A kernel may shut devices down when the socket that has configured them is closed; so
    whoever looks after devices keeps it.
    """
    global _kept
    _kept = _Kept()
    try:
        yield
    finally:
        kept, _kept = _kept, None
        kept.close()


def _open() -> socket.socket:
    try:
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_GENERIC)
    except OSError as error:
        raise FamilyMissingError(
            f"no netlink socket can be had: {error.strerror}", errno=error.errno or 0
        ) from None
    sock.bind((0, 0))
    return sock


def _family_id(sock: socket.socket) -> int:
    """Ask the kernel which number the family has; it is given out anew at every module load."""
    question = ctrlmsg()
    question["cmd"] = _CTRL_CMD_GETFAMILY
    question["version"] = 1
    question["attrs"] = [("CTRL_ATTR_FAMILY_NAME", _FAMILY)]
    try:
        for data in _exchange(sock, question, _GENL_ID_CTRL):
            return int(_decoded(ctrlmsg, data).get_attr("CTRL_ATTR_FAMILY_ID"))
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise KernelError(
                f"asking for the netlink family {_FAMILY!r}: {error.strerror}",
                errno=error.errno or 0,
            ) from None
    module.require_loaded()
    # Whether it exists outside the machine's first network namespace depends on the kernel:
    # `netnsok` of nbd.c is not set in 6.1, and is in 6.12.
    raise FamilyMissingError(
        "the kernel offers no nbd netlink family here (an old kernel, or a network namespace)",
        errno=errno.ENOENT,
        hint="use the ioctl road",
    )


def _exchange(sock: socket.socket, message: Any, message_type: int) -> list[bytes]:
    """Send a request and give the replies that precede its acknowledgement.

    Raises:
        OSError: the kernel's answer was an error.
    """
    header = message["header"]
    header["type"] = message_type
    header["flags"] = nlmsg.REQUEST | nlmsg.ACK
    header["sequence_number"] = 1
    message.encode()
    sock.send(bytes(message.data))
    replies: list[bytes] = []
    while True:
        for kind, whole in nlmsg.messages(sock.recv(_RECEIVE_BYTES)):
            if kind != nlmsg.ERROR:
                replies.append(whole)
            elif code := nlmsg.error_of(whole):
                raise OSError(code, os.strerror(code))
            else:
                return replies


def _decoded(kind: Any, data: bytes) -> Any:
    message = kind(data)
    message.decode()
    return message


_REASONS = {
    errno.EINVAL: (
        "the kernel calls it invalid",
        "possible reasons: an index beyond the last, a device that is going away or is not "
        "attached over netlink, several sockets without the MULTI_CONN flag, a block size that "
        "is no power of two from 512 to the page size, another backend identifier than it has",
    ),
    errno.EEXIST: ("the device is being made by somebody else just now", None),
    errno.ENOTSOCK: ("a descriptor is no socket", None),
    errno.EBADF: ("a descriptor is not open", None),
}


def _explained(error: OSError, doing: str, name: str) -> KernelError:
    number = error.errno or 0
    if number in (errno.EPERM, errno.EACCES):
        return module.rights_error(doing, number)
    if number == errno.EBUSY:
        return DeviceBusyError(f"{doing}: {name} is in use", errno=number)
    if number == errno.ENODEV:
        # try_module_get failed: the module is on its way out (`rmmod`).
        return KernelError(f"{doing}: the nbd module is being unloaded", errno=number)
    reason, hint = _REASONS.get(number, (os.strerror(number), None))
    return KernelError(f"{doing}: {reason}", errno=number, hint=hint)
