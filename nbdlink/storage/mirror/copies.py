"""All copies of a mirror's record that a server has open, written as one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final

from nbdlink.errors import StorageError
from nbdlink.storage.mirror.places import copy_path, owner
from nbdlink.storage.mirror.record import RecordFile, State

_log = logging.getLogger("nbdlink.mirror")

_Change = Callable[[RecordFile], None]


class Copies:
    """The copies of one record, by whose they are (`places.owner`).

    Each change is written to all of them. It counts as durable for the members whose copy took
    it; who calls decides whether that is enough. One thread at a time may write.

    Attributes:
        state: what was recorded last, or tried to be: what comes next follows it, so that a
            copy that has it although writing failed does not contradict the others.
        writable: whether anything may be written.
        failed: whose copies could not be written the last time.
    """

    def __init__(self, state: State, files: dict[str, RecordFile], *, writable: bool) -> None:
        """Take over open copies of which `state` is the newest."""
        self.state = state
        self.writable = writable
        self._files: Final = files
        self.failed: set[str] = set()

    @property
    def regions(self) -> set[int]:
        """The regions in which members may differ: those that any up-to-date copy names."""
        found: set[int] = set()
        for file in self._files.values():
            if file.state.token == self.state.token:
                found |= file.regions
        return found

    def write(self, state: State, regions: set[int]) -> set[str]:
        """Record a state; give whose copies did not take it.

        Args:
            state: the next state.
            regions: the bitmap, for copies that have to be made.
        """
        self.state = state
        for each in [each for each, file in self._files.items() if not file.is_in_place]:
            self._files.pop(each).close()
        failed = self._each(lambda file: file.write(state))
        for each in {owner(entry) for entry in state.members} - self._files.keys():
            path = copy_path(state.mirror, each)
            try:
                self._files[each] = _made(path, state, regions)
            except Exception as error:
                self._complain(each, path, error)
                failed.add(each)
            else:
                self.failed.discard(each)
        return failed

    def write_regions(self, regions: set[int], *, durably: bool) -> set[str]:
        """Record the bitmap; give whose copies did not take it."""
        return self._each(lambda file: file.write_regions(regions, durably=durably))

    def _each(self, change: _Change) -> set[str]:
        failed = set()
        for each, file in self._files.items():
            try:
                change(file)
            except Exception as error:
                self._complain(each, file.path, error)
                failed.add(each)
            else:
                self.failed.discard(each)
        return failed

    def _complain(self, owner: str, path: Path, error: Exception) -> None:
        if owner not in self.failed:  # it is tried again with every change
            _log.error("%s: the mirror's record cannot be written: %s", path, error)
        self.failed.add(owner)

    def close(self) -> None:
        """Let go of all."""
        for file in self._files.values():
            file.close()


def _made(path: Path, state: State, regions: set[int]) -> RecordFile:
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    if path.exists():
        file = RecordFile.open(path, writable=True)
        try:
            if file.state.mirror != state.mirror:
                raise StorageError("it is the record of another mirror")
            # Before the state: after a crash in between they are taken for those of the state.
            file.write_regions(regions, durably=True)
            file.write(state)
        except BaseException:
            file.close()  # it is locked, also against the next attempt
            raise
        return file
    RecordFile.create(path, state, regions)
    return RecordFile.open(path, writable=True)
