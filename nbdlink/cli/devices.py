"""`serve --attach`: a device of this machine, served by the very command that attaches it."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Self

from nbdlink.errors import ConfigError, NBDError

if TYPE_CHECKING:
    from nbdlink.server import Service

_log = logging.getLogger("nbdlink.server")


class ServedDevice:
    """A device that lives as long as the server does.

    Attributes:
        path: of the device.
        socket: of the Unix socket by which it comes, if no other is asked for.
    """

    def __init__(self, path: str) -> None:
        """Plan to attach a device."""
        self.path = path
        self._folder: str | None = None
        self._is_attached = False
        self._target = ""

    @classmethod
    def planned(cls, arguments: argparse.Namespace) -> Self | None:
        """Look whether a device is wanted, and can be had.

        Raises:
            ConfigError: not with these options.
            KernelError: there is no such device, or it is attached.
        """
        if arguments.attach is None:
            return None
        if len(arguments.storage) > 1:
            raise ConfigError("--attach is for a single storage", hint="name one")
        if arguments.tls not in (None, "off") or arguments.tls_certificates or arguments.tls_psk:
            raise ConfigError(
                "--attach goes without TLS: the device comes by a socket of this machine",
                hint="leave the options for TLS out, or attach it by `nbdlink attach nbds://...`",
            )
        from nbdlink import kernel
        from nbdlink.kernel import device, sysfs

        # Else the socket that is named after the device would be found in use, first.
        index = kernel.index_of(arguments.attach, must_exist=False)
        if sysfs.pid(index) is not None:
            raise device.busy_error(index)
        return cls(arguments.attach)

    @property
    def socket(self) -> str:
        """The path of a socket in a directory of its own, which only this user may enter."""
        if self._folder is None:
            self._folder = tempfile.mkdtemp(prefix="nbdlink-serve-")
        return str(Path(self._folder, "socket"))

    def attach(self, service: Service) -> None:
        """Bind the export of a service that runs to the device.

        Raises:
            KernelError: the kernel refuses.
        """
        from nbdlink.link.attach import attach
        from nbdlink.uri import Target

        (export,) = service.catalogue
        address = service.addresses[0]
        if isinstance(address, str):
            # It may be relative, and whoever renews the device later is elsewhere.
            target = Target(socket=os.path.abspath(address), export=export.name)  # noqa: PTH100
        else:
            target = Target.parse(service.uri(export.name))
        device = attach(target, self.path, read_only=export.is_read_only)
        self._is_attached, self._target = True, str(target)
        _log.info("%s is attached", device.path)

    def detach(self) -> None:
        """Detach the device while it is still served, so that nothing of it is lost."""
        if not self._is_attached:
            return
        self._is_attached = False
        from nbdlink.link.attach import detach

        try:
            detach(self.path)
        except NBDError as error:
            # As with qemu-nbd, who ends the server takes the device away, whoever uses it.
            _log.warning("%s", error)
            with contextlib.suppress(NBDError):
                detach(self.path, force=True)

    def _is_still_ours(self) -> bool:
        """Tell whether the device leads to this server; somebody may have detached it."""
        from nbdlink.link.attach import attached_records

        with contextlib.suppress(NBDError):
            return any(
                state.path == self.path and known.target == self._target
                for known, state in attached_records()
            )
        return False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_attached and self._is_still_ours():
            from nbdlink.link.attach import detach

            with contextlib.suppress(NBDError):
                detach(self.path, force=True)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
