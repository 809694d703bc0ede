"""Hosts that are gone: look at what their death would mean, declare it, forget them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import structlog

from orchestrator import wire
from orchestrator.api.calls import Caller, Tools, tries, write
from orchestrator.api.reads import not_found
from orchestrator.core import death
from orchestrator.core.death import Fate, GuestFate
from orchestrator.core.errors import DroverError, RefusalReason, invalid
from orchestrator.core.guest import name_error
from orchestrator.core.ids import HostRef
from orchestrator.core.records import (
    Cordon,
    DeathPhase,
    FencerTable,
    GuestSpec,
    HostDeath,
    HostRecord,
    host_ref,
)
from orchestrator.ledger import markers, paths
from orchestrator.ledger.ledger import op_create, op_set
from orchestrator.ledger.records import decode
from orchestrator.ledger.store import Create, Delete, Done, Op, Versioned
from protos.drover.v1 import orchestrator_pb2 as pb
from protos.drover.v1 import types_pb2

log = structlog.get_logger(__name__)

CONFIRMATION_S = 600
"""How long a confirmation is good."""
MAX_NAMED = 100
"""Guests of a plan that are named; the others are counted."""
_SOME = 5
_AT_ONCE = 32
_LOOK_AGAIN_S = 0.5


@dataclass(frozen=True, slots=True)
class _Look:
    """A host and its guests as they are now."""

    ref: HostRef
    version: int
    live: bool
    certified: bool
    fencer: str
    fates: tuple[GuestFate, ...]
    guests: tuple[tuple[str, int], ...]
    """Uuid and version of the record of each guest that the death would touch."""

    def token(self, issued_s: int) -> str:
        return death.confirmation(self.ref, self.version, self.guests, issued_s)


class Deaths:
    """The calls about hosts that are gone."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    # --- declare ------------------------------------------------------------------------------------------------------

    async def declare(self, request: pb.DeclareHostDeadRequest, caller: Caller) -> types_pb2.HostDeath:
        """The plan, or, with its token, the declaration as it stands when it ended or the caller's time is over.

        Raises HOST_ALIVE, FENCER_REQUIRED, CONFIRMATION_STALE, and what the leader refused it with.
        """
        look = await self._look(request.name)
        found = await self._tools.ledger.read(HostDeath, paths.death(request.name))
        earlier = found[0] if found is not None and found[0].boot_id == look.ref.boot_id else None
        if look.certified:
            return _view(earlier or _certified(look.ref), look)
        if look.live:
            said = f"the session of the agent of {request.name} lives: cordon and evacuate it instead"
            raise DroverError(RefusalReason.HOST_ALIVE, said)
        if not request.confirmation_token:
            return self._plan(look)
        self._confirm(look, request.confirmation_token)
        if not look.fencer and not request.on_operators_word:
            said = f"no fencer is configured for {request.name}: see that its power is off, then give your word for it"
            raise DroverError(RefusalReason.FENCER_REQUIRED, said)
        await self._request(look, request, caller)
        return await self._outcome(look, caller)

    def _plan(self, look: _Look) -> types_pb2.HostDeath:
        now = int(self._tools.wall_s())
        planned = _view(HostDeath(look.ref.host, look.ref.boot_id, fencer=look.fencer), look)
        planned.phase = types_pb2.HOST_DEATH_PHASE_PLANNED
        planned.confirmation_token = look.token(now)
        planned.expire_time.FromSeconds(now + CONFIRMATION_S)
        return planned

    def _confirm(self, look: _Look, token: str) -> None:
        """The wall clock only makes an old confirmation look old; what it was given for is compared whole."""
        issued = death.issued_at_s(token)
        if issued is None:
            said = "is no token of this call: ask without one first"
            raise DroverError(RefusalReason.INVALID_ARGUMENT, said, field="confirmation_token")
        if abs(self._tools.wall_s() - issued) > CONFIRMATION_S:
            said = f"the confirmation is older than {CONFIRMATION_S // 60} minutes: look again"
            raise DroverError(RefusalReason.CONFIRMATION_STALE, said)
        if look.token(issued) != token:
            said = f"{look.ref.host} or its guests have changed since that look: look again"
            raise DroverError(RefusalReason.CONFIRMATION_STALE, said)

    async def _request(self, look: _Look, request: pb.DeclareHostDeadRequest, caller: Caller) -> None:
        """Write it down for the leader; what is under way for the same power cycle is joined, or, with the operator's
        word, followed."""
        path = paths.death(look.ref.host)
        wanted = HostDeath(
            look.ref.host,
            look.ref.boot_id,
            on_word=request.on_operators_word,
            requested_by=f"{request.requested_by or 'somebody'} at {caller.by}",
            fencer="" if request.on_operators_word else look.fencer,
            request_time_s=self._tools.wall_s(),
        )
        contest = tries(caller)
        while True:
            await contest.another()
            found = await self._tools.ledger.read(HostDeath, path)
            if found is not None and _answers(found[0], wanted):
                return
            op = op_create(path, wanted) if found is None else op_set(path, wanted, found[1])
            if isinstance(await write(self._tools, [op], caller), Done):
                log.warning("host is to be declared dead", host=look.ref.host, on_word=wanted.on_word, by=caller.by)
                return

    async def _outcome(self, look: _Look, caller: Caller) -> types_pb2.HostDeath:
        moved = asyncio.Event()
        unwatch = self._tools.store.watch(paths.death(look.ref.host), lambda _node: moved.set())
        try:
            while True:
                moved.clear()
                found = await self._tools.ledger.read(HostDeath, paths.death(look.ref.host))
                if found is None:
                    raise not_found("declaration of the death of", look.ref.host)
                if found[0].phase is DeathPhase.FAILED:
                    known = found[0].failure in RefusalReason.__members__
                    reason = RefusalReason(found[0].failure) if known else RefusalReason.INTERNAL
                    raise DroverError(reason, found[0].message)
                if found[0].phase.terminal or caller.out_of_time:
                    return _view(found[0], look)
                try:
                    async with asyncio.timeout(caller.remaining_s(_LOOK_AGAIN_S)):
                        await moved.wait()
                except TimeoutError:
                    pass
        finally:
            unwatch()

    # --- look ---------------------------------------------------------------------------------------------------------

    async def get(self, name: str) -> types_pb2.HostDeath:
        """The newest declaration of the host's death. Raises NOT_FOUND when there has been none."""
        _check_name(name)
        found = await self._tools.ledger.read(HostDeath, paths.death(name))
        if found is None:
            raise not_found("declaration of the death of", name)
        return _view(found[0], None)

    async def _look(self, name: str) -> _Look:
        _check_name(name)
        ledger = self._tools.ledger
        host = await ledger.read(HostRecord, paths.host(name))
        if host is None:
            raise not_found("host", name)
        ref = host_ref(host[0])
        table = await ledger.store.read(paths.FENCERS)
        fates, guests = await self._fates(ref)
        return _Look(
            ref,
            host[1],
            live=await ledger.store.read(paths.live(name)) is not None,
            certified=await ledger.store.read(paths.fence(name, ref.boot_id)) is not None,
            fencer=death.fencer_of(decode(FencerTable, table.data) if table and table.data else FencerTable(), name),
            fates=fates,
            guests=guests,
        )

    async def _fates(self, dead: HostRef) -> tuple[tuple[GuestFate, ...], tuple[tuple[str, int], ...]]:
        """In the order of their names."""
        snapshot = await self._tools.index.snapshot()
        touched = [uuid for uuid, guest in snapshot.guests.items() if death.fate(uuid, guest.record, guest.spec, dead)]
        bound = asyncio.Semaphore(_AT_ONCE)

        async def one(uuid: str, spec: GuestSpec) -> tuple[GuestFate, int] | None:
            async with bound:
                found = await self._tools.ledger.read_guest(uuid)
            fate = death.fate(uuid, found[0], spec, dead) if found else None
            return (fate, found[1]) if fate and found else None

        each = await asyncio.gather(*(one(uuid, snapshot.guests[uuid].spec) for uuid in touched))
        known = sorted((one for one in each if one is not None), key=lambda one: (one[0].name, one[0].uuid))
        return tuple(fate for fate, _ in known), tuple((fate.uuid, version) for fate, version in known)

    # --- remove -------------------------------------------------------------------------------------------------------

    async def remove(self, name: str, caller: Caller) -> None:
        """Forget a host: its record, cordon, reservations and declaration, in one transaction.

        Raises NOT_FOUND, HOST_ALIVE, and HOST_NOT_EMPTY with what is in the way. The ends of its power cycles stay.
        """
        _check_name(name)
        contest = tries(caller)
        while True:
            await contest.another()
            found = await self._tools.ledger.read(HostRecord, paths.host(name))
            if found is None:
                raise not_found("host", name)
            await self._must_be_removable(name, host_ref(found[0]))
            ops = await self._removal(name)
            if isinstance(await write(self._tools, ops, caller), Done):
                log.warning("host removed", host=name, by=caller.by)
                return

    async def _must_be_removable(self, name: str, ref: HostRef) -> None:
        store = self._tools.store
        if await store.read(paths.live(name)) is not None:
            said = f"the session of the agent of {name} lives: end its agent first"
            raise DroverError(RefusalReason.HOST_ALIVE, said)
        snapshot = await self._tools.index.snapshot()
        there = sorted(guest.record.name for guest in snapshot.guests.values() if name in death.hosts_of(guest.record))
        if there:
            more = f" and {len(there) - _SOME} more" if len(there) > _SOME else ""
            said = (
                f"{len(there)} guests are recorded on {name}: {', '.join(there[:_SOME])}{more}; end or move them first"
            )
            raise DroverError(RefusalReason.HOST_NOT_EMPTY, said, details={"guests": str(len(there))})
        promised = await store.children(paths.reservations(name))
        if promised:
            said = f"memory of {name} is promised to {len(promised)} migrations: wait for their ends"
            raise DroverError(RefusalReason.HOST_NOT_EMPTY, said)
        cordon = await store.read(paths.cordon(name))
        drained = cordon is not None and bool(cordon.data) and decode(Cordon, cordon.data).on
        if not drained and await store.read(paths.fence(name, ref.boot_id)) is None:
            said = f"{name} is silent, but neither cordoned nor declared dead: something may still run there"
            raise DroverError(RefusalReason.HOST_NOT_EMPTY, said)

    async def _removal(self, name: str) -> list[Op]:
        """Each node in the version that it was seen in; a session that comes back meanwhile makes it fail."""
        store = self._tools.store
        children = [path for path in await self._children(name) if path != paths.host_guests(name)]
        nodes: list[tuple[str, Versioned | None]] = [
            (path, await store.read(path)) for path in (*children, paths.host(name), paths.death(name))
        ]
        silent: list[Op] = [Create(paths.live(name), b""), Delete(paths.live(name), 0)]
        removed = [Delete(path, node.version) for path, node in nodes if node is not None]
        return [*silent, *await markers.unmarked(store, name), *removed]

    async def _children(self, name: str) -> list[str]:
        return [f"{paths.host(name)}/{child}" for child in await self._tools.store.children(paths.host(name))]


def _answers(found: HostDeath, wanted: HostDeath) -> bool:
    """Whether the declaration that stands there is, or will be, what is asked for."""
    if found.boot_id != wanted.boot_id or found.phase is DeathPhase.FAILED:
        return False
    return found.phase in (DeathPhase.CERTIFIED, DeathPhase.DONE) or found.on_word == wanted.on_word


def _certified(ref: HostRef) -> HostDeath:
    said = f"this power cycle of {ref.host} is certified to be over"
    return HostDeath(ref.host, ref.boot_id, phase=DeathPhase.DONE, message=said)


_PHASES = {phase: types_pb2.HostDeathPhase.Value(f"HOST_DEATH_PHASE_{phase.name}") for phase in DeathPhase}


def _view(found: HostDeath, look: _Look | None) -> types_pb2.HostDeath:
    fates = look.fates if look is not None else ()
    count = {fate: sum(each.fate is fate for each in fates) for fate in Fate}
    return types_pb2.HostDeath(
        host=found.host,
        boot_id=found.boot_id,
        phase=_PHASES[found.phase],
        on_operators_word=found.on_word,
        requested_by=found.requested_by,
        fencer=found.fencer,
        failure=found.failure,
        message=found.message,
        guests=[
            types_pb2.GuestFate(guest=each.name, guest_uuid=each.uuid, fate=each.fate, message=each.why)
            for each in fates[:MAX_NAMED]
        ],
        lost=count[Fate.LOST],
        restarted=count[Fate.RESTARTED],
        staying=count[Fate.STAYS],
        request_time=wire.timestamp(found.request_time_s),
        end_time=wire.timestamp(found.end_time_s),
        crashed=found.crashed,
    )


def _check_name(name: str) -> None:
    if wrong := name_error(name):
        raise invalid([("name", wrong)])
