"""The relay: a small process that does TLS for the kernel where the kernel cannot.

The kernel is given one end of a Unix socket pair for each connection; the relay has the other
end and the TLS stream, and copies between them, with a thread for each direction. When either
end closes, so does the other: the kernel takes that for a dead connection, as it would without
a relay.

The kernel's writing back of dirty pages may depend on this process. So it takes no memory that
has to be written out first (PR_SET_IO_FLUSHER), is the last that is killed when memory runs
out, and none of its memory is swapped, since what it holds is plain text. For the same reason
it leaves no core dump.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import sys
import syslog
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn

from nbdlink.errors import NBDError, TransportError
from nbdlink.transport.stream import reason, tune
from nbdlink.transport.tls import TLSStream

_CHUNK: Final = 256 * 1024
"""Bytes that are moved at a time, at most."""
_FAREWELL: Final = 5
"""Seconds that a server has to end its side once the kernel has ended ours."""
_BEGINNING: Final = 30
"""Seconds that the process has to begin."""
_STACK: Final = 256 * 1024

# From sys/mman.h and linux/prctl.h.
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
_PR_SET_DUMPABLE, _PR_SET_NAME, _PR_SET_IO_FLUSHER = 4, 15, 57


def start(streams: Sequence[TLSStream], name: str) -> tuple[int, list[socket.socket]]:
    """Start a process that relays connections, which belong to it from then on.

    It ends by itself when all of them have ended. It is forked: in a program with threads that
    may fail, if one of them holds a lock that the process needs.

    Args:
        streams: connections in transmission, whose sockets give up by themselves what a server
            does not take (TCP_USER_TIMEOUT); useless to the caller afterwards.
        name: what the process is for, for the system's log.

    Returns:
        Its number, and a socket for each connection to be given to the kernel.

    Raises:
        TransportError: it cannot be started.
    """
    ours: list[socket.socket] = []
    theirs: list[socket.socket] = []
    try:
        for _ in streams:
            one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            ours.append(one)
            theirs.append(other)
            tune(one)
            tune(other)
        pid = _fork(streams, theirs, name)
    except OSError as error:
        for sock in ours:
            sock.close()
        raise TransportError(f"the TLS relay cannot be started: {reason(error)}") from None
    finally:
        for sock in theirs:
            sock.close()
    for stream in streams:
        stream.abandon()
    return pid, ours


def _fork(streams: Sequence[TLSStream], ends: Sequence[socket.socket], name: str) -> int:
    """Start a process that is nobody's child; give its number."""
    answer, inlet = os.pipe2(os.O_CLOEXEC)
    try:
        child = os.fork()
        if not child:
            _detach(inlet, streams, ends, name)
        os.close(inlet)
        inlet = -1
        waiting = select.poll()  # select takes no descriptor above 1023
        waiting.register(answer, select.POLLIN)
        if not waiting.poll(_BEGINNING * 1000):
            # The fork of a program with threads may have come at the wrong moment.
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise OSError("it does not begin")
        said = b""
        # To the end of the pipe: then it has let go of everything that was only for its beginning.
        while piece := os.read(answer, 32):
            said += piece
        with contextlib.suppress(ChildProcessError):  # who started us ignores SIGCHLD
            os.waitpid(child, 0)
    finally:
        os.close(answer)
        if inlet >= 0:
            os.close(inlet)
    if not said:
        raise OSError("it ended at once")
    return int(said)


def _detach(
    inlet: int, streams: Sequence[TLSStream], ends: Sequence[socket.socket], name: str
) -> NoReturn:
    status = 1
    try:
        os.setsid()
        if os.fork():
            os._exit(0)
        os.chdir("/")
        keep = [inlet, *(s.fileno() for s in streams), *(s.fileno() for s in ends)]
        _close_all_but(keep)
        _prepare()
        os.write(inlet, str(os.getpid()).encode())
        os.close(inlet)
        _run(streams, ends, name)
        status = 0
    except BaseException as error:
        with contextlib.suppress(Exception):
            syslog.syslog(syslog.LOG_ERR, f"nbdlink relay of {name}: {error}")
    finally:
        # Nothing of what the starter meant to do at its end is to be done here.
        os._exit(status)


def _close_all_but(keep: Sequence[int]) -> None:
    """Let go of whatever the starter had open, its terminal among it."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    low = 3
    for fd in sorted(keep):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, os.sysconf("SC_OPEN_MAX"))


def _prepare() -> None:
    """Become what the kernel can rely on; what is not allowed is left out."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("-1000")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NAME, b"nbdlink-relay", 0, 0, 0)
    _be_spared()
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    libc.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0)
    # Only what is touched: the stacks and buffers are larger than what is used of them.
    libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT)
    threading.stack_size(_STACK)
    sys.setswitchinterval(0.001)


def _be_spared() -> None:
    """Have systemd pass this process over when it ends all others at shutdown.

    A file system that is still mounted then needs it. The sign is an argv[0] that begins with @
    (systemd's ROOT_STORAGE_DAEMONS); where that is in memory is told in proc_pid_stat(5), field 48.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        with Path("/proc/self/mem").open("r+b", buffering=0) as memory:
            memory.seek(int(fields[45]))
            memory.write(b"@")


def _run(streams: Sequence[TLSStream], ends: Sequence[socket.socket], name: str) -> None:
    threads = [
        threading.Thread(target=_relay, args=(stream, end, name), name=f"relay-{number}")
        for number, (stream, end) in enumerate(zip(streams, ends, strict=True))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _relay(stream: TLSStream, end: socket.socket, name: str) -> None:
    """Copy both ways until one side ends."""
    stream.release()
    stream.settimeout(None)
    ended = threading.Event()
    up = threading.Thread(target=_copy_up, args=(stream, end, ended), name="up")
    up.start()
    try:
        _copy_down(stream, end)
    except (OSError, NBDError) as error:
        words = reason(error) if isinstance(error, OSError) else str(error)
        if up.is_alive():  # or the kernel has ended it, and how the server ends is no matter
            syslog.syslog(syslog.LOG_WARNING, f"nbdlink relay of {name}: {words}")
    finally:
        ended.set()
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        up.join(_FAREWELL)
        # It may still be sending to a server that takes nothing more.
        with contextlib.suppress(OSError):
            stream.shutdown(socket.SHUT_RDWR)
        up.join()
        with contextlib.suppress(OSError):
            stream.close()
        end.close()


def _copy_down(stream: TLSStream, end: socket.socket) -> None:
    """Copy from the server to the kernel until the server ends."""
    place = memoryview(bytearray(_CHUNK))
    receive, send = stream.recv_into, end.sendall
    while count := receive(place):
        send(place[:count])


def _copy_up(stream: TLSStream, end: socket.socket, ended: threading.Event) -> None:
    """Copy from the kernel to the server until the kernel ends."""
    place = memoryview(bytearray(_CHUNK))
    receive, send = end.recv_into, stream.sendall
    with contextlib.suppress(OSError, NBDError):  # the other direction has a word for it
        while count := receive(place):
            send(place[:count])
    with contextlib.suppress(OSError, NBDError):
        stream.shutdown(socket.SHUT_WR)
        if not ended.wait(_FAREWELL):
            stream.shutdown(socket.SHUT_RDWR)
