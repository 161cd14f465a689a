"""A server as a daemon: in the background, known by its pid file, with descriptors enough."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import signal
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from nbdlink.errors import DaemonError

_NO_FILE: Final = frozenset({errno.ELOOP, errno.ENXIO, errno.ENODEV})
"""How opening fails for symbolic links, sockets and devices."""
_RACES: Final = 100
"""How often a pid file may change hands while it is being taken."""


def raise_descriptor_limit() -> None:
    """Allow this process as many descriptors as it may allow itself."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def fork_to_background() -> Callable[[], None]:
    """Go on in a child; the parent exits once the child is ready, or with its exit status.

    To be called before there are threads, locks or anything that a child does not inherit.
    Until it is ready, the child has the parent's terminal, so that it can tell what is wrong.

    Returns:
        In the child: what to call when it is ready. That takes it off the terminal.

    Raises:
        SystemExit: in the parent, with its exit status.
        DaemonError: in the parent: the child was killed, or there was none to be had.
    """
    reader, writer = os.pipe()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()  # or both would write it
    try:
        child = os.fork()
    except OSError as error:
        raise DaemonError(
            f"cannot go to the background: {(error.strerror or '').lower()}"
        ) from None
    if child:
        os.close(writer)
        raise SystemExit(_wait_for(child, reader))
    os.close(reader)

    def ready() -> None:
        leave_terminal()
        # Fails if the parent was killed: then nobody knows that there is a server.
        os.write(writer, b"!")
        os.close(writer)

    return ready


def leave_terminal() -> None:
    """Let go of whatever this process was started from: terminal, pipes and directory."""
    os.setsid()
    os.chdir("/")  # so that it can be unmounted
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    if null > 2:
        os.close(null)


def _wait_for(child: int, reader: int) -> int:
    """Give the parent's exit status, once there is one."""
    try:
        if os.read(reader, 1):
            return 0
        _, status = os.waitpid(child, 0)
    except KeyboardInterrupt:
        # The terminal interrupts both; the child says so.
        os.waitpid(child, 0)
        return 130
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        raise DaemonError(f"the server was killed by {signal.Signals(-code).name} as it started")
    return code


def log_to_syslog(address: str = "/dev/log") -> None:
    """Send the log there from now on, if a syslog daemon or the journal listens."""
    import logging.handlers

    try:
        handler = logging.handlers.SysLogHandler(
            address, facility=logging.handlers.SysLogHandler.LOG_DAEMON
        )
    except OSError:
        return
    handler.ident = f"nbdlink[{os.getpid()}]: "
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)


class PidFile:
    """The file that tells which process serves.

    Its owner keeps it locked (flock), so a file that is not locked is what a dead server left
    behind, whatever number is in it. The file appears as a whole, and locked, when the server
    is ready, and never before.
    """

    def __init__(
        self, path: str | os.PathLike[str], hint: str = "stop it, or choose another path"
    ) -> None:
        """Look whether `path` may become ours.

        Args:
            path: where the file is to be.
            hint: what to do if a live server has it.

        Raises:
            DaemonError: a live server has it, something else lies there, or it cannot be made.
        """
        self.path = Path(path).absolute()  # a daemon changes its directory
        self._hint = hint
        self._descriptor = -1
        stale = self._open_stale()
        if stale is not None:
            os.close(stale)
        folder = self.path.parent
        if not folder.is_dir():
            raise DaemonError(f"{self.path}: there is no directory {folder}", hint="make it")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise DaemonError(f"{self.path}: no file may be made in {folder}", hint="try as root")

    def publish(self) -> None:
        """Write the file, with the number of this process.

        Raises:
            DaemonError: another server was faster, or it cannot be written.
        """
        draft = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            with contextlib.suppress(FileNotFoundError):
                draft.unlink()  # of a process that had our number and was killed here
            descriptor = os.open(draft, flags, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.write(descriptor, b"%d\n" % os.getpid())
                self._put_in_place(draft)
            except BaseException:
                os.close(descriptor)
                raise
            finally:
                with contextlib.suppress(FileNotFoundError):
                    draft.unlink()
        except OSError as error:
            words = (error.strerror or str(error)).lower()
            raise DaemonError(f"{self.path} cannot be written: {words}") from None
        self._descriptor = descriptor

    def remove(self) -> None:
        """Remove the file, if it is there and still ours."""
        if self._descriptor < 0:
            return
        with contextlib.suppress(OSError):
            if self._is_at_path(self._descriptor):
                self.path.unlink()
        os.close(self._descriptor)
        self._descriptor = -1

    def _put_in_place(self, draft: Path) -> None:
        for _ in range(_RACES):
            try:
                self.path.hardlink_to(draft)  # fails if the path exists
            except FileExistsError:
                stale = self._open_stale()
                if stale is not None:
                    # Nobody else replaces it as long as we hold its lock.
                    try:
                        draft.rename(self.path)
                    finally:
                        os.close(stale)
                    return
            else:
                return
        raise DaemonError(f"{self.path} changes hands all the time")

    def _open_stale(self) -> int | None:
        """Open and lock what a dead server left at the path; None if there is nothing.

        Raises:
            DaemonError: it is not to be replaced.
        """
        for _ in range(_RACES):
            try:
                # Not blocking, should it be a pipe.
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                descriptor = os.open(self.path, flags)
            except FileNotFoundError:
                return None
            except OSError as error:
                if error.errno in _NO_FILE:
                    raise self._not_a_pid_file() from None
                words = (error.strerror or str(error)).lower()
                raise DaemonError(f"{self.path} cannot be opened: {words}") from None
            try:
                self._check(descriptor)
                if self._is_at_path(descriptor):
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # its owner has just removed it
        raise DaemonError(f"{self.path} changes hands all the time")

    def _check(self, descriptor: int) -> None:
        """Lock a file that lies at the path already, or tell why it must stay."""
        is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        content = os.pread(descriptor, 32, 0).strip() if is_file else b""
        if not is_file or (content and not content.isdigit()):
            raise self._not_a_pid_file()
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = f"process {content.decode()}" if content else "a server that starts just now"
            raise DaemonError(f"{self.path} belongs to {who}", hint=self._hint) from None

    def _not_a_pid_file(self) -> DaemonError:
        words = f"{self.path} exists and is not a pid file"
        return DaemonError(words, hint="choose another path")

    def _is_at_path(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(self.path.lstat(), os.fstat(descriptor))
        except FileNotFoundError:
            return False
