"""Who becomes a member of a running mirror, anew or in the place of another."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from nbdlink.errors import NBDError, StorageError
from nbdlink.storage.base import Storage
from nbdlink.storage.mirror.members import Member, Opener, words
from nbdlink.storage.mirror.places import canonical, copy_path, device_identity, keeps_copy, owner
from nbdlink.storage.mirror.record import Entry, peek

if TYPE_CHECKING:
    from nbdlink.storage.mirror.storage import Mirror

_log = logging.getLogger("nbdlink.mirror")

_PATIENCE: Final = 20.0
"""Seconds that the last requests of a member that was dropped have to come back."""


class Admission:
    """Takes members in, one at a time; the rebuild itself is `Rebuilder`'s."""

    def __init__(self, mirror: Mirror, another: Callable[[str], Storage]) -> None:
        """Prepare; `another` opens a storage by its address."""
        self._mirror = mirror
        self._another = another
        self._one_at_a_time = threading.Lock()

    def rebuild(self, address: str) -> None:
        """Begin to make a stale member good; one that is good, or being rebuilt, is left alone.

        Raises:
            StorageError: it is no member, cannot be opened, or its state cannot be recorded.
        """
        with self._one_at_a_time:
            member = self._member(address)
            with self._mirror.lock:
                if member.entry.state != "stale":
                    return
            if member.opener is None:
                raise StorageError(
                    f"{member.name} was not named when the server was started",
                    hint="start it with all members, or rebuild this one when no server runs",
                )
            self._check_record(address)
            self._close(member)
            self._admit(member, member.entry, member.opener)

    def replace(self, address: str, other: str) -> None:
        """Put another storage in the place of a member, good or not, and begin to rebuild it.

        Raises:
            StorageError: it is no member, the other one is, it is the only good one, or as for
                `rebuild`.
        """
        with self._one_at_a_time:
            mirror, member, other = self._mirror, self._member(address), canonical(other)
            if any(each.name == other for each in mirror.members):
                raise StorageError(f"{other} is a member of the mirror already")
            self._check_record(other)
            storage = self._open(other, lambda: self._another(other))
            storage.close()
            with mirror.lock:
                if not any(each.is_complete for each in mirror.members if each is not member):
                    raise StorageError(
                        f"{member.name} is the only member that has everything",
                        hint="rebuild another one first",
                    )
                if member.entry.state != "stale":
                    mirror.membership.drop(member, f"{other} takes its place")
            self._close(member)
            member.opener = lambda: self._another(other)
            entry = Entry(
                other,
                member.entry.format,
                keeps_copy=keeps_copy(other),
                state="stale",
                reason="it is new",
            )
            self._admit(member, entry, member.opener)

    def _member(self, address: str) -> Member:
        """Give the member of an address.

        Raises:
            StorageError: there is none, or nothing may be changed.
        """
        if self._mirror.is_closing:
            raise StorageError("the mirror's server is ending", hint="start it again first")
        if self._mirror.read_only:
            raise StorageError("the mirror is served read-only", hint="serve it without -r first")
        address = canonical(address)
        for each in self._mirror.members:
            if each.name == address:
                return each
        raise StorageError(
            f"{address} is no member of the mirror",
            hint="`nbdlink mirror status` tells which there are",
        )

    def _check_record(self, address: str) -> None:
        """Refuse a member that belongs to another mirror.

        Raises:
            StorageError: it does, or its record cannot be read.
        """
        address = canonical(address)
        path = copy_path(self._mirror.mirror, address)
        if not keeps_copy(address) or not path.exists():
            return
        state = peek(path)
        if state is None or state.mirror != self._mirror.mirror:
            raise StorageError(
                f"{address} cannot be rebuilt: {path} is the record of another mirror",
                hint="remove the record if that mirror is not needed any more",
            )

    def _open(self, address: str, opener: Opener) -> Storage:
        try:
            storage = opener()
        except NBDError as error:
            raise StorageError(f"{address} cannot be rebuilt: {error}", hint=error.hint) from None
        why = check_member(storage, self._mirror.least)
        if storage.minimum_block > self._mirror.minimum_block:
            # Clients know by now what they may ask for.
            why = f"it takes blocks of {storage.minimum_block} bytes only"
        if why is not None:
            storage.close()
            raise StorageError(f"{address} cannot be rebuilt: {why}")
        return storage

    def _admit(self, member: Member, entry: Entry, opener: Opener) -> None:
        mirror = self._mirror
        storage = self._open(entry.address, opener)
        entry = replace(entry, identity=identity(entry.address, storage))
        with mirror.lock:
            why = check_member(storage, mirror.least)  # it may be growing since
            if why is None:
                member.storage = storage
                member.fall_behind(mirror.all_regions())
                mirror.membership.change(member, entry.become("rebuilding", entry.reason))
        if why is not None:
            storage.close()
            raise StorageError(f"{entry.address} cannot be rebuilt: {why}")
        _log.warning("%s is being rebuilt", entry.address)
        try:
            mirror.membership.settle()
        except OSError as error:
            raise StorageError(f"{entry.address} cannot be rebuilt: {words(error)}") from None
        if owner(entry) in mirror.membership.copies.failed:
            path = copy_path(mirror.mirror, owner(entry))
            with mirror.lock:
                mirror.membership.drop(member, f"its record {path} cannot be written")
            raise StorageError(
                f"{entry.address} cannot be rebuilt: its record {path} cannot be written",
                hint="the server's log says why",
            )

    def _close(self, member: Member) -> None:
        """Close what a stale member was.

        Raises:
            StorageError: a request to it has not come back yet.
        """
        lock = self._mirror.lock
        with lock:
            if not lock.wait_for(lambda: not member.users, _PATIENCE):
                raise StorageError(
                    f"{member.name}: a request that failed here has not come back from it yet",
                    hint="try again when the device or the server answers, or has given up",
                )
            storage, member.storage = member.storage, None
        if storage is not None:
            try:
                storage.close()
            except OSError as error:
                _log.info("%s: closing failed: %s", member.name, words(error))


def check_member(storage: Storage, size: int) -> str | None:
    """Tell why a storage cannot be a member, or None if it can."""
    if storage.size < size:
        return f"it has {storage.size} bytes, and the mirror {size}"
    return None


def identity(address: str, storage: Storage) -> str | None:
    """Give what tells a member from another one under its address, or None."""
    return storage.signature or device_identity(address)


def entry_of(address: str, format: str | None, keeps_copy: bool, storage: Storage) -> Entry:
    """Give what is recorded of a new member."""
    return Entry(address, format, identity(address, storage), keeps_copy).become("good")
