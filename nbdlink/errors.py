"""Every error that nbdlink raises on purpose.

::

    NBDError
     ├── ConfigError            the command line, a URI or a file asks for something impossible
     ├── TransportError         no connection, or the connection was lost
     ├── LocalProtocolError     this side was about to break the protocol: a bug of the caller
     ├── RemoteProtocolError    the other side broke the protocol; the connection is dead
     │    └── OldstyleServerError    it speaks only the negotiation that was given up in 2011
     │    └── ForeignExportError     it is not the export that the device was attached to
     ├── OptionError            the server refused one option; the negotiation can go on
     ├── RequestError           the server refused one request; the connection lives
     ├── TLSError               credentials, verification or the TLS stream itself
     ├── StorageError           what was to be served cannot be opened or is not usable
     ├── DaemonError            the server cannot go to the background, or have its pid file
     └── KernelError            the kernel refused: module, rights, device state
          ├── ModuleMissingError    no nbd module in the running kernel
          ├── RightsError           the caller is not allowed to
          ├── DeviceBusyError       somebody else uses the device
          └── DeviceInUseError      mounted, swapped on or held; detaching would lose data

Each carries a one-line message that names the thing, and may carry a `hint`: one line that
says what to do next. Which of them are worth another try is said in `is_retryable`, nowhere
else.
"""

from __future__ import annotations

import errno as _errno
import os


class NBDError(Exception):
    """Anything that nbdlink reports on purpose.

    Attributes:
        hint: one line that says what to do next, or None.
    """

    hint: str | None

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(NBDError):
    """A command line, URI or configuration file asks for something impossible."""


class TransportError(NBDError):
    """A connection could not be made, or was lost."""


class LocalProtocolError(NBDError):
    """This side was about to send something that the protocol forbids."""


class RemoteProtocolError(NBDError):
    """The other side sent something that the protocol forbids; the connection is unusable."""


class OldstyleServerError(RemoteProtocolError):
    """The server speaks only the oldstyle negotiation, which has neither names nor options."""


class ForeignExportError(RemoteProtocolError):
    """A server offers under a device's target what is not what the device was attached to."""


class OptionError(NBDError):
    """The server answered an option with an error reply; negotiation may go on.

    Attributes:
        option: the option's number (specification, "Option types").
        reply: the error reply's number, with bit 31 set ("Option reply types").
        reason: the server's own words, printable, or the empty string.
    """

    def __init__(
        self, message: str, *, option: int, reply: int, reason: str = "", hint: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.option = option
        self.reply = reply
        self.reason = reason


class RequestError(NBDError, OSError):
    """The server answered a request with an error; the connection lives on.

    It is an `OSError` too, so that code written for files can catch it.

    Attributes:
        errno: the error as this system's errno (the protocol's numbers are Linux's).
        offset: where in the export it failed, in bytes, or None if the server did not say.
    """

    def __init__(
        self, message: str, *, errno: int, offset: int | None = None, hint: str | None = None
    ) -> None:
        NBDError.__init__(self, message, hint=hint)
        self.errno = errno
        self.offset = offset
        self.strerror = os.strerror(errno)

    def __str__(self) -> str:
        return str(self.args[0])


class TLSError(NBDError):
    """Credentials, verification or the TLS stream failed."""


class StorageError(NBDError):
    """What was to be served cannot be opened, or is of no use as storage."""


class DaemonError(NBDError):
    """The server cannot go to the background, or its pid file cannot be made."""


class KernelError(NBDError):
    """The kernel refused something about a block device.

    Attributes:
        errno: the errno behind it, or 0 where there is none.
    """

    def __init__(self, message: str, *, errno: int = 0, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.errno = errno


class ModuleMissingError(KernelError):
    """The running kernel has no nbd driver, and it could not be loaded."""


class RightsError(KernelError):
    """The caller lacks the right (CAP_SYS_ADMIN) to do this."""


class DeviceBusyError(KernelError):
    """The device has a configuration already, or something holds it open."""


class DeviceInUseError(KernelError):
    """The device is mounted, swapped on or held by another device."""


_SHORTAGES = frozenset({_errno.EMFILE, _errno.ENFILE, _errno.ENOMEM})


def is_shortage(error: OSError) -> bool:
    """Tell whether this process or system is short of something.

    Such an error tells nothing of what was asked for: above all not that it is not there.
    """
    return error.errno in _SHORTAGES


_TRANSIENT_ERRNOS = frozenset({_errno.EINTR, _errno.EAGAIN, _errno.ENOMEM, _errno.ESHUTDOWN})


def is_retryable(error: BaseException) -> bool:
    """Tell whether the same attempt may succeed later with nothing changed by a person.

    A server that is away, restarts or is shutting down comes back; one that speaks another
    protocol, refuses a name or wants other credentials does not.
    """
    if isinstance(error, OldstyleServerError | ForeignExportError):
        return False
    if isinstance(error, RequestError):
        return error.errno in _TRANSIENT_ERRNOS
    if isinstance(error, OptionError):
        return error.reply == 0x8000_0007  # NBD_REP_ERR_SHUTDOWN
    return isinstance(error, TransportError | RemoteProtocolError | DeviceBusyError)
