"""Starting a mirror: which members may be used, when some are missing or were changed.

1. The record is looked for beside all members that are named, and in the state directory. Then
   also beside the members that it tells of, whether they are named or not.
2. Of several copies the one with the latest change counts. Each of the others has to be one that
   came before it (`State.has`). If one is not, both halves of the mirror have been changed
   without the other, and a person has to say which is to be thrown away: split brain.
3. Copies are locked for as long as the mirror is served, so a second server is refused.
4. All good members have to be there: be named, have their copy of the record, be what they were,
   and be large enough. What is not there may have a record that tells of later changes. With
   `degraded` one does without: they are dropped as if they had failed.
5. Members that the record calls stale stay so. If no good one is there, the mirror is refused,
   with or without `degraded`.
6. A member that was being rebuilt goes on to be, or is stale if it is not there.
7. Where there is no record the mirror is new. The first member's data counts, and the others are
   rebuilt. One that has other data is refused, so that nothing is overwritten by a mistake: what
   is looked at are the first and the last bytes and places in between.
8. A file that was renamed is known by its identity.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from nbdlink.errors import ConfigError, NBDError, StorageError
from nbdlink.sizes import format_size
from nbdlink.storage.base import Storage
from nbdlink.storage.mirror import places
from nbdlink.storage.mirror.admission import check_member, entry_of, identity
from nbdlink.storage.mirror.copies import Copies
from nbdlink.storage.mirror.members import Member, Opener, words
from nbdlink.storage.mirror.record import Entry, RecordFile, State, peek, region_size
from nbdlink.storage.mirror.storage import IDLE, Mirror
from nbdlink.storage.open import StorageSpec, open_storage
from nbdlink.storage.zeroes import is_zero
from nbdlink.uri import Target, is_uri

_log = logging.getLogger("nbdlink.mirror")

_SAMPLES: Final = 64
_SAMPLE: Final = 4096
_ENDS: Final = 64 << 10
"""Bytes at both ends of a new member that are looked at as a whole."""

Open = Callable[[StorageSpec], Storage]


def open_mirror(
    specs: Sequence[StorageSpec],
    *,
    read_only: bool = False,
    degraded: bool = False,
    region: int | None = None,
    idle: float = IDLE,
    opened: Open = open_storage,
) -> Mirror:
    """Open a mirror, or make a new one.

    Args:
        specs: the members, all of them unless some are stale or lost.
        read_only: whether nothing is to be written, the record included.
        degraded: whether to go on though a good member's copy of the record cannot be read.
        region: bytes of a region in a new mirror, or None to choose.
        idle: see `nbdlink.storage.mirror.storage.IDLE`.
        opened: opens a member.

    Raises:
        ConfigError: a member is named twice, or a new mirror has less than two.
        StorageError: the rules above do not allow it, or no member can be opened.
    """
    named = {places.canonical(spec.path): spec for spec in specs}
    if len(named) < len(specs):
        raise ConfigError("a member of the mirror is named twice", hint="name each once")
    openers: dict[str, Opener] = {
        address: functools.partial(opened, replace(spec, path=address, is_member=True))
        for address, spec in named.items()
    }
    may_grow = not any(spec.parts for spec in specs)
    with contextlib.ExitStack() as undo:
        files = _open_copies(set(named), undo, writable=not read_only)
        if files:
            state = _newest(files)
            _check_named(state, openers)
        elif read_only:
            raise StorageError(
                f"{', '.join(named)}: there is no record of this mirror yet",
                hint="serve it once without -r, so that its members are made equal",
            )
        else:
            state = _first(named, openers, region)
        members, missing = _open_members(state, files, openers, undo)
        if not any(each.is_good for each in members):
            raise _none_good(state, [each for each in missing if each[0] in openers])
        if missing and files and not degraded:
            address, why = missing[0]
            raise StorageError(
                f"{address}, a good member of the mirror, is not there: {why}",
                hint="--degraded goes on without it; it has to be rebuilt then",
            )
        copies = Copies(state, files, writable=not read_only)
        if not read_only:
            _update(copies, members, may_grow=may_grow)
        mirror = Mirror(
            members,
            copies,
            read_only=read_only,
            another=lambda address: opened(described(address, specs[0])),
            may_grow=may_grow,
            idle=idle,
        )
        undo.pop_all()
    for each in members:
        if each.entry.state == "stale":
            _log.warning("%s is stale and stays out: %s", each.name, each.entry.reason)
    return mirror


def described(address: str, like: StorageSpec) -> StorageSpec:
    """Give the description of a member, all of which is used, that is otherwise like another."""
    target = Target.parse(address) if is_uri(address) else None
    return replace(like, path=address, target=target, parts=(), is_member=True)


def _open_copies(
    named: set[str], undo: contextlib.ExitStack, *, writable: bool
) -> dict[str, RecordFile]:
    """Open and lock every copy that can be found; give them by whose they are.

    Raises:
        StorageError: the members are of different mirrors, a copy is in use, or none can be read.
    """
    seen = {path: peek(path) for path in places.copies_that_name(named)}
    mirrors = {state.mirror: path for path, state in seen.items() if state}
    if len(mirrors) > 1:
        raise StorageError(
            f"{' and '.join(map(str, mirrors.values()))} are records of different mirrors",
            hint="name the members of one mirror; `nbdlink mirror status` tells which they are",
        )
    owners = set(named)
    for state in seen.values():
        owners |= {entry.address for entry in state.members} if state else set()
    files: dict[str, RecordFile] = {}
    unread: StorageError | None = None
    for each in sorted(owners) + [places.CENTRAL] * bool(mirrors):
        if is_uri(each):
            continue
        path = places.copy_path(next(iter(mirrors), ""), each)
        state = peek(path)
        if state and state.mirror not in mirrors:
            continue  # of a member that is not named, and belongs to another mirror by now
        try:
            files[each] = RecordFile.open(path, writable=writable)
        except FileNotFoundError:
            continue
        except OSError as error:
            unread = StorageError(f"{path} cannot be opened: {words(error)}")
        except StorageError as error:
            if state:
                raise
            unread = error
        else:
            undo.callback(files[each].close)
            continue
        _log.warning("%s", unread)
    if not files and not all(map(places.keeps_copy, named)):
        for path in places.central_copies():
            if peek(path) is None:
                unread = StorageError(
                    f"{path} cannot be read, and may be the record of this mirror",
                    hint="move it away only if it is not",
                )
    if unread and not files:
        raise unread
    return files


def _newest(files: dict[str, RecordFile]) -> State:
    """Give what counts; see rule 2."""
    newest = max((file.state for file in files.values()), key=lambda each: each.generation)
    for each in files.values():
        if not newest.has(each.state):
            other = next(file for file in files.values() if file.state is newest)
            raise StorageError(
                f"split brain: {each.path} and {other.path} tell of changes without each other",
                hint="choose whose data is to be thrown away and remove that one's .mirror file; "
                "then rebuild it",
            )
    return newest


def _check_named(state: State, openers: dict[str, Opener]) -> None:
    for address in openers:
        if state.entry(address) is None and _renamed(state, address, openers) is None:
            raise StorageError(
                f"{address} is no member of the mirror of "
                f"{', '.join(entry.address for entry in state.members)}",
                hint="`nbdlink mirror rebuild --replace OLD NEW` takes a new member in",
            )


def _renamed(state: State, address: str, openers: dict[str, Opener]) -> Entry | None:
    """Give the member that a file was which has another name by now; None if it is none."""
    with contextlib.suppress(NBDError):
        storage = openers[address]()
        try:
            mark = identity(address, storage)
        finally:
            storage.close()
        for entry in state.members:
            if mark and entry.identity == mark and entry.address not in openers:
                return entry
    return None


def _open_members(
    state: State,
    files: dict[str, RecordFile],
    openers: dict[str, Opener],
    undo: contextlib.ExitStack,
) -> tuple[list[Member], list[tuple[str, str]]]:
    """Open what may be used; give all members, and of each good one that is missing why."""
    renamed = {
        entry.address: address
        for address in openers
        if state.entry(address) is None and (entry := _renamed(state, address, openers))
    }
    members, missing = [], []
    for entry in state.members:
        if entry.address in renamed:
            entry = replace(entry, address=renamed[entry.address])
        member = Member(entry, openers.get(entry.address), None)
        members.append(member)
        if entry.state == "stale":
            continue
        why = _open_member(member, state.size, undo)
        if not why and entry.state == "good" and files and places.owner(entry) not in files:
            why = f"its record {places.copy_path(state.mirror, places.owner(entry))} is missing"
        if why:
            member.entry = entry.become("stale", why)
            if entry.state == "good":
                missing.append((entry.address, why))
    return members, missing


def _open_member(member: Member, size: int, undo: contextlib.ExitStack) -> str:
    """Open a member; give why it cannot be used, or nothing."""
    if member.opener is None:
        return "it was not named when the server was started"
    try:
        storage = member.opener()
    except NBDError as error:
        return f"it cannot be opened: {error}"
    known, found = member.entry.identity, identity(member.name, storage)
    why = check_member(storage, size)
    # A device that told what it is does not cease to; that a file system or a server tells
    # nothing any more says nothing of the data.
    differs = known and known != found and (found or places.is_device_identity(known))
    if differs and member.entry.state == "good":
        why = "it is another file or device than it was"
    if why:
        storage.close()
        return why
    undo.callback(storage.close)
    member.storage = storage
    return ""


def _none_good(state: State, missing: Sequence[tuple[str, str]]) -> StorageError:
    if missing:
        address, why = missing[0]
        return StorageError(f"no good member of the mirror can be used: {address}: {why}")
    good = [entry.address for entry in state.members if entry.state == "good"]
    return StorageError(
        f"only stale members are named; {', '.join(good)} has newer data",
        hint="name all members of the mirror",
    )


def _update(copies: Copies, members: Sequence[Member], *, may_grow: bool) -> None:
    """Bring all copies up to date, and make those that are lacking.

    If the mirror is to grow beyond what the bitmap can tell of, the regions become larger.

    Raises:
        StorageError: no good member's copy can be written.
    """
    entries = tuple(each.entry for each in members)
    state, regions = copies.state, copies.regions
    failed: set[str] = set()
    region = state.region
    if may_grow:
        size = min(each.storage.size for each in members if each.storage)
        region = region_size(size, region)
    if region != state.region:
        larger = {each * state.region // region for each in regions}
        # Right for the regions of both sizes, as one follows the other on the disk.
        failed |= copies.write_regions(regions | larger, durably=True)
        state, regions = replace(state.changed(entries), region=region), larger
    elif entries != state.members:
        state = state.changed(entries)
    failed |= copies.write(state, regions)
    failed |= copies.write_regions(regions, durably=True)
    if all(places.owner(each.entry) in failed for each in members if each.is_good):
        raise StorageError(
            "the record of the mirror cannot be written", hint="the log says where, and why"
        )


# New mirrors.


def _first(named: dict[str, StorageSpec], openers: dict[str, Opener], region: int | None) -> State:
    """Give the state of a new mirror; see rule 7.

    Raises:
        ConfigError: it has one member.
        StorageError: a member cannot be opened, or has other data than the first.
    """
    if len(named) < 2:
        raise ConfigError(
            "a mirror takes two members or more", hint="name an empty file for a new member"
        )
    with contextlib.ExitStack() as stack:
        storages = []
        for opener in openers.values():
            storages.append(opener())
            stack.callback(storages[-1].close)
        block = max(each.minimum_block for each in storages)
        size = min(each.size for each in storages) // block * block
        entries = [
            entry_of(address, spec.format, places.keeps_copy(address), storage)
            for (address, spec), storage in zip(named.items(), storages, strict=True)
        ]
        for storage in storages[1:]:
            _check_alike(storages[0], storage, size)
        if storages[0].size > size:
            _log.warning(
                "%s has %s more than the mirror, which are not served",
                storages[0].name,
                format_size(storages[0].size - size),
            )
    first, *others = entries
    return State.first(
        size,
        region or region_size(size),
        [first, *(each.become("rebuilding", "it is new") for each in others)],
    )


def _check_alike(first: Storage, other: Storage, size: int) -> None:
    """Refuse a member that has data, and other data than the first one.

    Raises:
        StorageError: it does, or cannot be read.
    """
    ends = min(_ENDS, size)
    step = max(size // _SAMPLES, _SAMPLE) // _SAMPLE * _SAMPLE
    ranges = [(0, ends), (size - ends, ends)]
    ranges += [(at, min(_SAMPLE, size - at)) for at in range(0, size, step)]
    block = max(first.minimum_block, other.minimum_block)
    for offset, length in ranges:
        begin = offset // block * block
        end = min(-(-(offset + length) // block) * block, size)
        ours, theirs = bytearray(end - begin), bytearray(end - begin)
        try:
            first.read_into(memoryview(ours), begin)
            other.read_into(memoryview(theirs), begin)
        except OSError as error:
            raise StorageError(f"a new mirror cannot be read: {words(error)}") from None
        if ours != theirs and not is_zero(memoryview(theirs)):
            raise StorageError(
                f"{other.name} has other data than {first.name}, and would be overwritten",
                hint=f"name the one with the right data first, or make them alike: "
                f"nbdlink copy {first.name} {other.name}",
            )
