"""Agents and hosts that come back, and what their keepers make of what they find."""

from __future__ import annotations

from collections.abc import Iterator

from agents.guest import duty as keeping
from agents.handover.destination import (
    restarted_destination,
)
from agents.handover.source import restarted_source
from orchestrator.core import death, handover
from orchestrator.core.handover import GuestRecord
from orchestrator.core.ids import HostRef
from orchestrator.core.liveness import Liveness
from tests.exploration import world as world_module
from tests.exploration.world import (
    D1,
    D2,
    DEAD,
    LOADED,
    MIGRATION,
    NONE,
    OWN,
    PARKED,
    RUN,
    S1,
    S2,
    SEALED,
    STOPPED,
    WAIT,
    Move,
    World,
    attempted,
    ref,
    waiting,
)


def recovery_moves(world: World) -> Iterator[Move]:
    if not world.source_up and world.power != 1:
        yield "S agent restarts", True, world._replace(source_up=True)
    if not world.destination_up and world.power != 2:
        yield "D agent restarts", True, world._replace(destination_up=True)
    if world.power == 1:
        yield "S host returns", True, _certified(world, S1)._replace(power=3, source_up=True, conducting=0)
        yield "fencer", True, _certified(world, S1)
    if world.power == 2:
        yield "D host returns", True, _certified(world, D1)._replace(power=4, destination_up=True)
        yield "fencer", True, _certified(world, D1)
    if world.source_up and world.source is None:
        yield from _source_keeper(world)
    if world.destination_up and world.destination is None:
        yield from _destination_keeper(world)


def _certified(world: World, over: HostRef) -> World:
    """By the fencer, which has seen the power off, or by the host itself when it comes back: a certificate is true."""
    return world._replace(certified=world.certified | {over})


def _declared(world: World, here: HostRef, writer: str) -> GuestRecord:
    """What a keeper writes of a guest of its host that is over: in this power cycle it saw the VMM dead."""
    owner = world.record.owner
    if owner == here:
        return handover.crashed(world.record, writer=writer)
    return handover.host_died(world.record, certificate=owner in world.certified, writer=writer)


Sees = tuple[GuestRecord | None, Liveness | None]
"""What a keeper is told: the record, or that the ledger has none, and a word on its process in place of the truth."""


def sights(world: World) -> tuple[Sees, ...]:
    """The truth; and, as a fault, a process that cannot be asked about, and a ledger that has lost the record."""
    record = world_module.read_record(world)
    return ((record, None), (record, Liveness.UNKNOWN), (None, None)) if world.faults else ((record, None),)


def _blinded(world: World, record: GuestRecord | None, told: Liveness | None) -> World:
    return world._replace(faults=world.faults - 1) if record is None or told is not None else world


def _seen(told: Liveness | None, *, gone: bool) -> Liveness:
    truth = Liveness.GONE if gone else Liveness.ALIVE
    return truth if told is None else told


def _source_keeper(world: World) -> Iterator[Move]:
    """What `agents/guest/duty.py` makes of the source's VMM while no session speaks for it."""
    for sees in sights(world):
        yield from _source_duty(world, *sees)


def _source_duty(world: World, record: GuestRecord | None, told: Liveness | None) -> Iterator[Move]:
    here = S2 if world.power == 3 else S1
    copy = keeping.Copy(
        "s",
        False,
        liveness=_seen(told, gone=world.vmm == DEAD),
        running=world.vmm == RUN,
        sealed=world.vmm == SEALED,
        ended=world.off and world.vmm == STOPPED,
        migrating=world.engine,
    )
    found = keeping.duty(record, here, (copy,), marker=False, want_run=world.want)
    if found.do in (keeping.Do.NOTHING, keeping.Do.ASK_AGAIN):
        return
    world = _blinded(world, record, told)
    match found.do:
        case keeping.Do.DECLARE_CRASHED:
            after = attempted(world, lambda: _declared(world, here, "s"))
            if after is not None:
                yield "S keeper declares", True, after
        case keeping.Do.DISCARD:
            yield "S keeper discards", True, world._replace(vmm=DEAD, engine=False, conducting=0)
        case keeping.Do.RUN | keeping.Do.STOP:
            run = found.do is keeping.Do.RUN
            if run and world.off and world.vmm == STOPPED:
                yield "S keeper tries for ever", True, world._replace(flaw="A GUEST THAT POWERED OFF IS TO RUN")
                return
            after = world._replace(vmm=RUN if run and not world.off else STOPPED, wished_stop=not run)
            yield "S keeper applies the wish", True, after
        case keeping.Do.END_AS_SOURCE:
            assert record is not None
            k = record.attempt
            state, commands = restarted_source(
                ref(k), here, f"i{k}", want_run=world.want, parked=world.vmm == PARKED, sealed=world.vmm == SEALED
            )
            yield "S keeper ends it", True, world._replace(source=state, todo_source=waiting(commands))
        case _:
            pass


def _destination_keeper(world: World) -> Iterator[Move]:
    for sees in sights(world):
        yield from _destination_duty(world, *sees)


def _destination_duty(world: World, record: GuestRecord | None, told: Liveness | None) -> Iterator[Move]:
    here = D2 if world.power == 4 else D1
    inc = f"i{world.copy_inc}"
    own = world.copy == OWN
    gone = world.copy not in (WAIT, LOADED, OWN)
    copy = keeping.Copy(
        inc,
        not own,
        MIGRATION,
        world.copy_inc,
        liveness=_seen(told, gone=gone),
        running=own and world.want and not world.off,
        ended=own and world.off,
    )
    known = () if world.copy == NONE else (copy,)
    yield from _forgotten(world, here, known)
    found = keeping.duty(record, here, known, marker=world.marker, want_run=world.want)
    if found.do in (keeping.Do.NOTHING, keeping.Do.ASK_AGAIN):
        return
    world = _blinded(world, record, told)
    match found.do:
        case keeping.Do.GIVE_BACK:
            back = attempted(
                world,
                lambda: handover.roll_back(world.record, by=here, vmm_seen_dead=True, marker=world.marker, writer="d"),
            )
            if back is not None:
                yield "D keeper gives back", True, back
        case keeping.Do.DECLARE_CRASHED:
            after = attempted(world, lambda: _declared(world, here, "d"))
            if after is not None:
                yield "D keeper declares", True, after
        case keeping.Do.DISCARD:
            yield "D keeper discards", True, world._replace(copy=DEAD)
        case keeping.Do.END_AS_DESTINATION:
            state, commands = restarted_destination(ref(world.copy_inc), here, inc, vmm_alive=True, marker=world.marker)
            yield "D keeper ends it", True, world._replace(destination=state, todo_destination=waiting(commands))
        case _:
            pass


def _forgotten(world: World, here: HostRef, known: tuple[keeping.Copy, ...]) -> Iterator[Move]:
    """Nothing is left of the guest at the destination, and its record leads nowhere there: its files go."""
    record = world_module.record_to_forget_by(world)
    nothing = keeping.duty(record, here, known, marker=world.marker, want_run=world.want).do is keeping.Do.NOTHING
    if nothing and world.marker and world.copy in (NONE, DEAD) and here.host not in death.hosts_of(record):
        yield "D keeper forgets", True, world._replace(marker=False)
