"""What a service offers: opened from a plan, and kept up with its configuration.

How it works. Each export is planned (`ExportPlan`) before its storage is open, so that a plan of
now can be compared with one of earlier. When the service is told to read its configuration anew,

 1. who is in no plan any more is withdrawn: newcomers do not find it. Its clients stay, and once
    the last one has left its storage is flushed and closed. Until then its name is taken.
 2. who is new is opened.
 3. who differs in what the server decides by itself (description, clients, ...) is as the new plan
    says for those who come from now on; the storage stays open.
 4. who is made of something else stays as it was, for its clients have what they have: that
    takes a restart, or the export withdrawn and unused in between.

A mistake in the configuration changes nothing, and an export that cannot be opened is no other
export's loss. Who was withdrawn and comes back as it was gets its open storage back.

The further processes (`Processes`) have been forked with what was there at the start. What came
or changed later is served by the first process alone.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from nbdlink.errors import NBDError, StorageError
from nbdlink.protocol.constants import BITMAP_CONTEXT
from nbdlink.server.export import Catalogue, Export
from nbdlink.sizes import format_size
from nbdlink.storage.base import Storage

if TYPE_CHECKING:
    from nbdlink.server.sessions import Sessions

_log = logging.getLogger("nbdlink.server")

_PATIENCE: Final = 5.0
"""Seconds that who comes, changes or goes just now may take when the service ends."""


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """An export that there shall be.

    Attributes:
        name: of the export.
        storage: describes its storage: equal to that of another plan if the same would be opened
            in the same way.
        facts: the other fields of `Export`.
        open: opens the storage. Raises ConfigError, StorageError.
        source: where it is asked for, `file:line`; empty for the command line.
    """

    name: str
    storage: object
    facts: Mapping[str, Any]
    open: Callable[[], Storage] = field(compare=False)
    source: str = field(compare=False, default="")

    @property
    def signature(self) -> str | None:
        """What an administrator says that tells its data from other data, or None."""
        given: str | None = self.facts.get("given_signature")
        return given

    def make(self, storage: Storage) -> Export:
        """Make the export of its open storage.

        Raises:
            ConfigError: the protocol cannot carry what is asked for.
            StorageError: the storage lacks a metadata context that is asked for.
        """
        for context in self.facts.get("further_contexts", ()):
            if context not in storage.contexts:
                raise _no_context(storage, context)
        return Export(self.name, storage, **self.facts)


def open_exports(plans: Iterable[ExportPlan]) -> list[Export]:
    """Open all that is planned, or nothing.

    Raises:
        ConfigError, StorageError: one of them cannot be had.
    """
    with contextlib.ExitStack() as undo:
        exports = []
        for plan in plans:
            storage = plan.open()
            undo.callback(storage.close)
            exports.append(plan.make(storage))
        undo.pop_all()
        return exports


@dataclass(slots=True)
class _Withdrawn:
    """An export that newcomers do not find.

    Attributes:
        plan: what it was opened by.
        export: the export.
        newest: the number of the last client that may have found it.
    """

    plan: ExportPlan
    export: Export
    newest: int


class Offer:
    """The exports of a service, and how they follow their configuration.

    Attributes:
        catalogue: what newcomers find.
    """

    def __init__(
        self,
        plans: Sequence[ExportPlan],
        read: Callable[[], Sequence[ExportPlan]] | None = None,
        beside: Callable[[Export], contextlib.AbstractContextManager[object]] | None = None,
    ) -> None:
        """Open all that is planned.

        Args:
            plans: the exports at the start.
            read: gives those of now, with an error (`NBDError`) if there is a mistake in them;
                None if they never change.
            beside: what an export has besides in the first process, as long as it is served.

        Raises:
            ConfigError, StorageError: one of them cannot be had, and none is open then.
        """
        self._plans = {plan.name: plan for plan in plans}
        self._read = read
        self._beside = beside or contextlib.nullcontext
        self._company: dict[str, contextlib.ExitStack] = {}
        self._withdrawn: dict[str, _Withdrawn] = {}
        # Held by whoever has exports come, change or go, to the end of it: in between, a storage
        # may be in no list, and whoever closes them all would miss it.
        self._lock = threading.RLock()
        self._ended = False
        with contextlib.ExitStack() as undo:
            exports = open_exports(plans)
            for export in exports:
                undo.callback(export.storage.close)
            self.catalogue = Catalogue(exports)
            undo.pop_all()

    @property
    def may_change(self) -> bool:
        """Whether there is a configuration to be read anew."""
        return self._read is not None

    @property
    def is_leaving(self) -> bool:
        """Whether there are exports that were withdrawn and are still open."""
        return bool(self._withdrawn)

    @property
    def storages(self) -> list[Storage]:
        """Every storage that is open, those of withdrawn exports too."""
        with self._lock:
            leaving = [withdrawn.export.storage for withdrawn in self._withdrawn.values()]
            return self.catalogue.storages + leaving

    def end(self) -> list[Storage]:
        """Let nothing come or go any more; give every storage that is open, to be closed."""
        self._ended = True
        if not self._lock.acquire(timeout=_PATIENCE):
            # A dead disk of one is not to keep the others from being flushed.
            _log.error("an export that was withdrawn cannot be closed, and is left behind")
            return self.catalogue.storages
        try:
            return self.storages
        finally:
            self._lock.release()

    def begin(self) -> None:
        """Have what is beside the exports begin, once the service has done its forks.

        Raises:
            NBDError: what `beside` raises.
        """
        for export in self.catalogue:
            self._accompany(export)

    def close(self) -> None:
        """End what is beside the exports. Their storages are the service's to close."""
        while self._company:
            self._company.popitem()[1].close()

    def renew(self, sessions: Sessions, release: Callable[[Export], None]) -> None:
        """Read the configuration anew, and do what it says; what goes wrong is in the log.

        Args:
            sessions: the clients.
            release: called for an export before its storage is closed; see `let_go`.
        """
        if self._read is None:
            return
        try:
            plans = {plan.name: plan for plan in self._read()}
        except NBDError as error:
            _log.error("the exports stay as they are: %s", _sentence(error))
            return
        with self._lock:
            if not self._ended:
                self._follow_all(plans, sessions, release)

    def _follow_all(
        self,
        plans: Mapping[str, ExportPlan],
        sessions: Sessions,
        release: Callable[[Export], None],
    ) -> None:
        """Have the exports that are planned, as far as that can be; the lock is held."""
        self._withdraw(plans.keys(), sessions)
        self.let_go(sessions, release)
        exports = {export.name: export for export in self.catalogue}
        news: list[str] = []
        for plan in plans.values():
            try:
                exports[plan.name] = self._follow(plan, exports.get(plan.name), news)
            except Exception as error:  # one that cannot be opened is no other one's loss
                where = f"{plan.source}: " if plan.source else ""
                words = _sentence(error) if isinstance(error, NBDError) else _words(error)
                _log.error("%sexport %r: %s", where, plan.name, words)
        # In the order of the configuration, which is the one in which they are listed.
        self.catalogue.replace(exports[name] for name in plans if name in exports)
        for words in news:
            _log.warning("%s", words)

    def _withdraw(self, wanted: Iterable[str], sessions: Sessions) -> None:
        gone = self._plans.keys() - wanted
        exports = list(self.catalogue)
        self.catalogue.replace(export for export in exports if export.name not in gone)
        newest = sessions.newest  # whoever comes later looks into the catalogue of now
        for export in exports:
            if export.name in gone:
                plan = self._plans.pop(export.name)
                self._withdrawn[export.name] = _Withdrawn(plan, export, newest)
                _log.warning("export %r is not offered any more", export.name)

    def _follow(self, plan: ExportPlan, export: Export | None, news: list[str]) -> Export:
        """Give the export of a plan, which may be there already.

        Args:
            plan: what there shall be.
            export: the one of that name, if there is one.
            news: what is new, to be told when it is so.

        Raises:
            NBDError: it stays as it is, or is not to be had.
        """
        before = self._plans.get(plan.name)
        if export is not None and before == plan:
            return export
        if before is None:
            export = self._come_back(plan)
            if export is not None:
                news.append(f"export {plan.name!r} is offered again")
                return export
            export = self._add(plan)
            size = format_size(export.size)
            news.append(f"export {plan.name!r} is offered now: {export.storage.name} ({size})")
            return export
        assert export is not None
        if before.storage != plan.storage:
            raise StorageError(
                "it is made of something else now, and stays as it was",
                hint="that takes a restart of the server",
            )
        changed = plan.make(export.storage)
        self._plans[plan.name] = plan
        news.append(f"export {plan.name!r} has changed for those who come from now on")
        return changed

    def _come_back(self, plan: ExportPlan) -> Export | None:
        """Give an export back that was withdrawn and is still open; None if there is none."""
        withdrawn = self._withdrawn.get(plan.name)
        if withdrawn is None:
            return None
        if withdrawn.plan.storage != plan.storage:
            raise StorageError(
                "clients still use what had this name before",
                hint="when they have left, send SIGHUP once more",
            )
        same = withdrawn.plan == plan
        export = withdrawn.export if same else plan.make(withdrawn.export.storage)
        del self._withdrawn[plan.name]
        self._plans[plan.name] = plan
        return export

    def _add(self, plan: ExportPlan) -> Export:
        (export,) = open_exports([plan])
        try:
            self._accompany(export)
        except BaseException:
            export.storage.close()
            raise
        self._plans[plan.name] = plan
        return export

    def _accompany(self, export: Export) -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._beside(export))
            self._company[export.name] = stack.pop_all()

    def let_go(self, sessions: Sessions, release: Callable[[Export], None]) -> None:
        """Close what was withdrawn and is not used any more; in any thread.

        Args:
            sessions: the clients.
            release: called for each such export first; has other processes close it.
        """
        if not self._withdrawn:
            return
        with self._lock:
            if self._ended:
                return
            unused = [
                withdrawn
                for name, withdrawn in self._withdrawn.items()
                if not sessions.may_use(name, withdrawn.newest)
            ]
            for withdrawn in unused:
                self._close(withdrawn.export, release)
                del self._withdrawn[withdrawn.export.name]

    def _close(self, export: Export, release: Callable[[Export], None]) -> None:
        self._company.pop(export.name, contextlib.ExitStack()).close()
        try:
            release(export)
            export.storage.flush()
        except Exception as error:  # a storage's bug is not the next storage's loss
            _log.error("%s: not made durable: %s", export.storage.name, _words(error))
        try:
            export.storage.close()
        except OSError as error:
            _log.error("%s: not closed properly: %s", export.storage.name, _words(error))
        else:
            _log.info("export %r is closed", export.name)


def _sentence(error: NBDError) -> str:
    return f"{error} ({error.hint})" if error.hint else str(error)


def _words(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _no_context(storage: Storage, context: str) -> StorageError:
    """Say that a storage lacks what was asked for by `--bitmap` or `--allocation-depth`."""
    if not context.startswith(BITMAP_CONTEXT):
        return StorageError(f"{storage.name} cannot tell how deep data lies ({context})")
    names = [n.removeprefix(BITMAP_CONTEXT) for n in storage.contexts if BITMAP_CONTEXT in n]
    return StorageError(
        f"{storage.name} has no bitmap {context.removeprefix(BITMAP_CONTEXT)!r} that can be used",
        hint=f"it has {', '.join(names)}" if names else "qemu-img info lists what an image has",
    )
