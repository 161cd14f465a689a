"""Renewing a device's connections while it is in use.

The kernel keeps a device whose connections are dead, and its requests, for the dead timeout. A
renewal gives it new connections in place of the dead ones (RECONFIGURE): they must lead to the
same export, or one disk would turn into another under a file system. So what the server says is
compared with what was recorded when the device was attached.

Which connections are dead is known from their sockets (`nbdlink.kernel.sockets`). The kernel
fills its first dead slot, whichever that was, so a channel's number is ours: its place in the
record. RECONFIGURE reports success even if nothing was dead, and drops the socket then; so
success is that the new socket is still there once our own descriptor of it is closed.

A channel that is alive is moved in three steps: the new connection is negotiated; the old one is
ended, when nothing can fail any more but the kernel; the new one takes its place. Requests on
their way on the old one are sent again by the kernel once their timeout has passed.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from nbdlink import kernel
from nbdlink.client.opening import negotiate
from nbdlink.client.security import Security
from nbdlink.errors import ConfigError, KernelError, NBDError
from nbdlink.kernel import sockets, sysfs
from nbdlink.link import channel, record
from nbdlink.link.attach import secure
from nbdlink.link.ending import end
from nbdlink.link.health import Health, health, strayed
from nbdlink.link.identity import known_of, require_same, verify
from nbdlink.link.record import Channel, Record
from nbdlink.link.spec import LinkSpec, restore
from nbdlink.protocol.claim import NO_TESTIMONY, Claim, Testimony
from nbdlink.transport.stream import Wire
from nbdlink.uri import Target

_GRACE: Final = 30
"""Seconds for which I/O waits while the only connection of a device is moved, at least."""


@dataclass(frozen=True, slots=True)
class Renewal:
    """What a renewal came to.

    Attributes:
        renewed: the numbers of the channels that have a new connection.
        health: the device's channels afterwards.
        grown_to: the export's size in bytes, if it is larger now and yet the same export. The
            device has it, unless some channels are dead.
        strayed: numbers of the channels that do not take the route that is theirs.
        failures: routes that led nowhere, and why.
    """

    renewed: tuple[int, ...] = ()
    health: Health = field(default_factory=lambda: Health((), ()))
    grown_to: int | None = None
    strayed: tuple[int, ...] = ()
    failures: tuple[tuple[Target, NBDError], ...] = ()


def renew(
    index: int,
    *,
    also: Collection[int] = (),
    everything: bool = False,
    target: Target | None = None,
    notice: int | None = None,
    timeout: float | None = None,
    wait: float = 5.0,
) -> Renewal:
    """Give a device new connections in place of those that are dead.

    Args:
        index: N of `/dev/nbdN`.
        also: numbers of channels to renew though they are alive.
        everything: renew all channels.
        target: where the device's channels shall lead from now on; None for where they did.
        notice: UDP port on which this process hears that a server is back, to be told to it.
        timeout: seconds for connecting and negotiating, if less than what was asked for.
        wait: seconds to wait for another process that is renewing the same device.

    Raises:
        ForeignExportError: what is offered there is not the same export.
        TransportError, RemoteProtocolError, OptionError, TLSError, ConfigError: no route leads
            to the export; the reason is the target's.
        KernelError: the device is not attached over netlink, or the kernel refuses.
    """
    with record.held(index, wait):
        known = known_of(index)
        attempt = _Attempt(known, target, notice, timeout)
        state = health(known)
        chosen = sorted({*state.dead, *also, *(state.live if everything else ())})
        return attempt.run(chosen, state)


@dataclass
class _Attempt:
    """One renewal."""

    known: Record
    target: Target | None
    notice: int | None
    timeout: float | None
    spec: LinkSpec = field(init=False)
    securities: dict[Target, Security] = field(init=False)
    session: str = field(init=False)
    failures: dict[Target, NBDError] = field(default_factory=dict)
    grown_to: int | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    testimony: Testimony = NO_TESTIMONY

    def __post_init__(self) -> None:
        known = self.known
        spec = restore(known.spec, known.name, f"/dev/nbd{known.index}")
        if self.target is not None:
            spec = _moved(spec, self.target)
        self.spec, self.securities = secure(spec)
        session = record.read_session(known.index)
        if session is None:
            session = secrets.token_hex(16)
            record.write_session(known.index, session)
        self.session = session
        if self.timeout is not None:
            patience = min(self.timeout, spec.negotiation_timeout)
            self.spec = replace(self.spec, negotiation_timeout=patience)

    def run(self, chosen: Sequence[int], state: Health) -> Renewal:
        """Renew the chosen channels, the dead ones first and together."""
        dead = [number for number in chosen if number in state.dead]
        live = [number for number in chosen if number in state.live]
        renewed: list[int] = []
        failure: NBDError | None = None
        if dead:
            try:
                renewed += self._replace(dead, alive=False)
            except NBDError as error:
                if not live:
                    raise
                failure = error
        for group in self._groups(live):
            renewed += self._replace(group, alive=True)
        if failure is not None:
            raise failure
        after = health(self.known)
        self.grown_to = self._growth()
        if self.grown_to is not None and not after.dead:
            require_same(self.known)
            kernel.resize(self.known.index, self.grown_to)
            self.known = replace(self.known, size=self.grown_to)
            record.write(self.known)
        return Renewal(
            tuple(sorted(renewed)),
            after,
            self.grown_to,
            strayed(self.known),
            tuple(self.failures.items()),
        )

    def _groups(self, numbers: Sequence[int]) -> Iterator[list[int]]:
        """Give channels one by one, but those together that one relay serves: it ends for all."""
        left = list(numbers)
        while left:
            relay = self.known.channels[left[0]].relay
            group = [n for n in left if n == left[0] or (relay and self._relay(n) == relay)]
            left = [n for n in left if n not in group]
            yield group

    def _relay(self, number: int) -> int | None:
        return self.known.channels[number].relay

    def _replace(self, numbers: Sequence[int], *, alive: bool) -> list[int]:
        """Give channels new connections; give the numbers of those for which it was possible."""
        with contextlib.ExitStack() as stack:
            if alive:
                # From the first word on: a server that fences ends the old one by itself.
                stack.enter_context(self._patience())
            self._count(numbers)
            wires: list[Wire] = []
            taken: list[Target] = []
            numbers = list(numbers)
            for number in numbers:
                try:
                    wire, route = self._connect(number, elsewhere=not alive)
                except NBDError:
                    # Some are better than none, and the others are still dead afterwards. But a
                    # server that fences may be busy with what was on its way on this one, which
                    # the kernel will send again on the first one that there is, if there is none.
                    waits = self.known.fences and not health(self.known).live
                    if alive or not wires or waits:
                        raise
                    break
                stack.callback(wire.close)
                wires.append(wire)
                taken.append(route)
                if not alive and len(wires) == len(numbers):
                    # What was on its way on a channel that has died meanwhile will be sent again
                    # on the first one that there is: so the server has to fence that channel, too,
                    # before the kernel gets any.
                    late = [each for each in health(self.known).dead if each not in numbers]
                    if late:
                        self._count(late)
                        numbers += late
            name = self.known.name or f"nbd{self.known.index}"
            ready = channel.prepare(
                wires, self.spec.tls_road, name, stack, timeout=self.known.timeout
            )
            new = {
                number: replace(
                    each,
                    route=str(route),
                    generation=self.known.channels[number].generation,
                    renewals=self.known.channels[number].renewals,
                )
                for each, route, number in zip(ready.known, taken, numbers, strict=False)
            }
            if alive:
                end(self.known, numbers)
            # Noted before it is done: if we are killed in between, a socket that the kernel did
            # not get is gone, and is seen to be; one that it got would never be found.
            if self.target is not None:
                self._note_target()
            self._note(new)
            kernel.reconfigure(
                self.known.index,
                [sock.fileno() for sock in ready.sockets],
                identifier=self.known.identifier,
            )
        there = sockets.connected([each.cookie for each in new.values() if each.cookie])
        kept = [n for n, each in new.items() if there is None or each.cookie in there]
        self._note({n: replace(new[n], renewals=new[n].renewals + 1) for n in kept})
        if not kept and sysfs.settled_links({self.known.index}) == {
            self.known.index: len(self.known.channels)
        }:
            # None of them was dead: they have sockets that nobody took note of.
            self._note({number: replace(each, cookie=None) for number, each in new.items()})
        return kept

    def _count(self, numbers: Sequence[int]) -> None:
        """Take new generations; kept before they are used, so that none is used twice."""
        raised = {
            number: replace(
                self.known.channels[number], generation=self.known.channels[number].generation + 1
            )
            for number in numbers
        }
        self._note(raised)

    def _note(self, changed: dict[int, Channel]) -> None:
        channels = [changed.get(n, each) for n, each in enumerate(self.known.channels)]
        require_same(self.known)
        self.known = replace(self.known, channels=tuple(channels))
        record.write(self.known)

    def _growth(self) -> int | None:
        """Give the size that the export has grown to, as far as every connection knows of it."""
        known = self.known.size
        used = {each.route for each in self.known.channels}
        if known is None or not self.sizes.keys() >= used:
            return None  # `resize.follow` asks the others
        least = min(self.sizes.values())
        return least if least > known else None

    def _note_target(self) -> None:
        # Its signature is what is there from now on: one that its predecessor made up says
        # nothing about it.
        described = {
            **self.known.spec,
            "target": str(self.spec.target),
            "paths": [str(path) for path in self.spec.paths],
        }
        require_same(self.known)
        self.known = replace(
            self.known,
            target=str(self.spec.target),
            spec=described,
            signature=self.testimony.signature,
            fences=self.testimony.fences,
        )
        record.write(self.known)

    def _route(self, number: int) -> Target:
        """Give the route that is a channel's own."""
        if self.target is not None:
            return self.spec.target
        routes = self.spec.routes
        return routes[number % len(routes)]

    def _connect(self, number: int, elsewhere: bool) -> tuple[Wire, Target]:
        """Connect a channel by its own route, or else by another one that is open."""
        own = self._route(number)
        others = [route for route in self.spec.routes if route != own]
        first: NBDError | None = None
        for route in (own, *(others if elsewhere and self.target is None else ())):
            if route in self.failures:
                first = first or self.failures[route]
                continue
            try:
                return self._negotiate(number, route), route
            except ConfigError:
                raise
            except NBDError as error:
                self.failures[route] = error
                first = first or error
        assert first is not None
        raise first

    def _negotiate(self, number: int, route: Target) -> Wire:
        claim = Claim(
            self.session, number, self.known.channels[number].generation, notice=self.notice
        )
        wire, export = negotiate(
            route,
            timeout=self.spec.negotiation_timeout,
            security=self.securities[route],
            claim=claim,
            claim_needed=self.known.fences,
        )
        try:
            verify(self.known, route, export)
        except BaseException:
            wire.close()
            raise
        self.sizes[str(route)] = export.size
        self.testimony = export.testimony
        return wire

    @contextlib.contextmanager
    def _patience(self) -> Iterator[None]:
        """Have I/O wait rather than fail while no connection is left."""
        if self.known.dead_timeout >= _GRACE:
            yield
            return
        index, identifier = self.known.index, self.known.identifier
        kernel.reconfigure(index, dead_timeout=_GRACE, identifier=identifier)
        try:
            yield
        finally:
            with contextlib.suppress(KernelError):  # it has been detached meanwhile
                kernel.reconfigure(
                    index, dead_timeout=self.known.dead_timeout, identifier=identifier
                )


def _moved(spec: LinkSpec, target: Target) -> LinkSpec:
    """Give what a link is once it has moved.

    The same export, unless another is named; no other way to it, as that would lead back; and
    never without TLS if there was TLS.
    """
    before = spec.target
    if not target.export:
        target = replace(target, export=before.export)
    if before.tls and not target.tls:
        target = replace(
            target,
            tls=True,
            username=target.username or before.username,
            tls_type=before.tls_type,
            tls_verify_peer=before.tls_verify_peer,
            tls_certificates=before.tls_certificates,
            tls_psk_file=before.tls_psk_file,
        )
    return replace(spec, target=target, paths=())
