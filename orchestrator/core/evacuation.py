"""An evacuation: empty a host, a few guests at a time, and say when its power may be cut.

Pure and level-triggered: each `step` looks at what the records say now (who is on the host, how the job's migrations
stand) and names what is missing. Nothing depends on having seen a change: a new coordinator goes on from the records.
Migration ids follow from (job, guest, try): creating one twice is the same migration.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from orchestrator.core.errors import FailureReason
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.migration import SOURCE_PATIENCE_MS
from orchestrator.core.placement import HostView, Need, pack
from orchestrator.core.records import (
    EvacuationGuest,
    EvacuationPhase,
    EvacuationSpec,
    EvacuationState,
    MigrationPhase,
    MigrationState,
    WaitingFor,
)
from orchestrator.core.text import handful

MAX_TRIES = 2
"""Migrations per guest and job; each has its own attempts inside."""

SILENT_MS = SOURCE_PATIENCE_MS + 2_000.0
"""A job ends when its host's agent has been silent for this long: a little later than its migrations do."""
STALLED_MS = 60_000.0
"""A job waits no longer than this for a guest that is starting, for one whose destination does not finish what was
committed, or for what is left of guests that have moved, while nothing else in it changes."""
GRACE_MS = 30_000.0
"""Between a job's total timeout and its end: for the attempts that it interrupts."""
MAX_WAITING = 32
"""A job's migrations that wait for room take none of its places, but no more of them are begun than this."""

_WORTH_ANOTHER = frozenset(
    {FailureReason.ATTEMPTS_EXHAUSTED, FailureReason.DESTINATION_NOT_ELIGIBLE, FailureReason.HOST_NOT_LIVE}
)


@dataclass(frozen=True, slots=True)
class GuestOnHost:
    """A guest whose record names the host as owner, source or destination."""

    uuid: str
    name: str
    memory_mib: int
    record: GuestRecord
    need: Need | None = None
    """What it asks of a destination; None: nothing is planned for it."""


@dataclass(frozen=True, slots=True)
class Facts:
    """One fresh look at everything a job depends on."""

    cordoned: bool
    guests: Sequence[GuestOnHost]
    """Every guest that has to do with the host, see `concerns`."""
    migrations: Mapping[str, MigrationState]
    """States of the job's migrations that exist, by id."""
    reserved: bool = False
    """Memory of the host is promised to an arrival."""
    hosts: Sequence[HostView] = ()
    """Where guests could go; empty: nothing is planned, and each migration finds its own place."""
    cordon_version: int = -1
    """Of the node that `cordoned` was read from."""
    source_live: bool = True
    spent_ms: float = 0.0
    """Since the job was created."""
    silent_ms: float = 0.0
    """How long the host's agent has been silent; 0: it is not."""
    stalled_ms: float = 0.0
    """How long nothing has changed in the job."""
    empty: bool | None = None
    """Whether the host's agent says that no copy of any guest is left there in this power cycle, no VMM and no process
    of a device. None: it has not said, or did not know yet; silence is no yes."""
    dead: bool = False
    """This power cycle of the host is certified to be over."""
    crashed: Mapping[str, bool] = field(default_factory=dict[str, bool])
    """Of a dead host: uuids of the guests that died with it, each with whether it is started elsewhere."""


@dataclass(frozen=True, slots=True)
class CordonHost:
    """Make the host ineligible before the first guest leaves it."""


@dataclass(frozen=True, slots=True)
class CreateMigration:
    """Create this migration, or find that it exists."""

    id: str
    guest: str
    name: str
    preferred: str = ""
    """Host where the plan for all that still have to leave has a place for this one."""
    total_timeout_ms: int = 0
    """What is left of the job's own; 0: the job has none, and the guest's policy says it."""


@dataclass(frozen=True, slots=True)
class CancelMigration:
    """Ask for the end of one of the job's migrations, as an operator would; one past its commit arrives all the
    same."""

    id: str


Command = CordonHost | CreateMigration | CancelMigration


@dataclass(frozen=True, slots=True)
class Step:
    """The state to store first, then the commands to carry out. Storing comes first so that a migration that exists is
    always one that the job knows."""

    state: EvacuationState
    commands: tuple[Command, ...] = ()


def migration_id(job: str, guest: str, tries: int) -> str:
    """32 hex digits, the same for the same try."""
    return hashlib.sha256(f"{job}/{guest}/{tries}".encode()).hexdigest()[:32]


def concerns(record: GuestRecord, host: str) -> bool:
    """Whether a guest matters for the host's emptiness."""
    if record.phase in (Ownership.GONE, Ownership.CRASHED):
        return False
    coming = record.phase is Ownership.OPEN and record.destination is not None and record.destination.host == host
    leaving = record.phase is Ownership.COMMITTED and record.source is not None and record.source.host == host
    return record.owner.host == host or coming or leaving


def records_say_empty(host: str, facts: Facts) -> bool:
    """Cordoned, and no guest or promise of memory is there. A crashed guest has nothing to lose."""
    return facts.cordoned and not facts.reserved and not any(concerns(guest.record, host) for guest in facts.guests)


def safe_to_power_off(host: str, facts: Facts, *, was_safe: bool = False) -> bool:
    """The records know of nothing there, and the host itself has said so too, or is dead.

    `was_safe`: it was true while the cordon had the version that it has now. Nothing can have come since, so an agent
    that falls silent afterwards, because the power was cut as it was told, takes nothing back.
    """
    if not records_say_empty(host, facts):
        return False
    return facts.dead or (was_safe if facts.empty is None else facts.empty)


def was_safe(state: EvacuationState, facts: Facts) -> bool:
    """The job said so under the cordon that stands now."""
    return state.safe_to_power_off and state.safe_at == facts.cordon_version


def step(spec: EvacuationSpec, state: EvacuationState, facts: Facts) -> Step:
    """What the job's state becomes, and what to do. Calling it again with the same facts changes nothing."""
    safe = safe_to_power_off(spec.host, facts, was_safe=was_safe(state, facts))
    state = replace(state, safe_to_power_off=safe)
    if state.phase.terminal:
        return Step(_afterwards(spec, state))
    guests = _refresh(spec, state, facts)
    if state.cancel_requested:
        return _cancelling(replace(state, guests=guests), facts)
    if not facts.cordoned and state.phase is EvacuationPhase.PENDING:
        return Step(replace(state, guests=guests), (CordonHost(),))
    if not facts.cordoned:
        said = f"{spec.host} was uncordoned while it was being emptied: waiting for the migrations under way"
        return _finish(spec, replace(state, guests=guests, phase=EvacuationPhase.RUNNING, message=said), facts)
    state = replace(state, guests=guests, phase=EvacuationPhase.RUNNING, message="")
    if facts.silent_ms:
        said = f"waiting for the agent of {spec.host}, which is silent"
        return _finish(spec, replace(state, message=said), facts)
    if _left_ms(spec, facts) > 0:
        guests, commands = _start_more(spec, guests, facts)
        if commands:
            return Step(replace(state, guests=guests), commands)
    return _finish(spec, replace(state, guests=guests), facts)


def total_timeout_ms(spec: EvacuationSpec) -> int:
    """The job's own; 0: none."""
    return int(spec.policy.get("total_timeout_ms", 0))


def _left_ms(spec: EvacuationSpec, facts: Facts) -> float:
    """Of the job's total timeout; infinite when it has none."""
    total = total_timeout_ms(spec)
    return total - facts.spent_ms if total else math.inf


def _stays(guest: GuestOnHost, host: str) -> bool:
    return guest.record.owner.host == host and concerns(guest.record, host)


def _refresh(spec: EvacuationSpec, state: EvacuationState, facts: Facts) -> tuple[EvacuationGuest, ...]:
    """The job's guests with their migrations' present phases, and guests that have come to the host since."""
    known = {guest.guest for guest in state.guests}
    here = [g for g in facts.guests if g.record.owner.host == spec.host and g.uuid not in known]
    here.sort(key=lambda guest: (-guest.memory_mib, guest.name))
    new = tuple(EvacuationGuest(guest=g.uuid, name=g.name, memory_mib=g.memory_mib) for g in here)
    return tuple(_refresh_one(guest, facts) for guest in state.guests + new)


def _refresh_one(guest: EvacuationGuest, facts: Facts) -> EvacuationGuest:
    durable = facts.migrations.get(guest.migration)
    if durable is None:
        return guest
    return replace(
        guest,
        phase=durable.phase,
        destination=durable.destination,
        failure=durable.failure,
        message=durable.message,
        attempts=durable.attempt,
    )


def _active(guest: EvacuationGuest) -> bool:
    return bool(guest.migration) and not guest.phase.terminal


def _wants_another(guest: EvacuationGuest) -> bool:
    """No migration yet, or one that failed in a way that another may not."""
    if not guest.migration:
        return True
    return guest.phase is MigrationPhase.FAILED and guest.tries < MAX_TRIES and guest.failure in _WORTH_ANOTHER


def _start_more(
    spec: EvacuationSpec, guests: tuple[EvacuationGuest, ...], facts: Facts
) -> tuple[tuple[EvacuationGuest, ...], tuple[Command, ...]]:
    """Fill the job's free places: guests with a place to go to first, of those the biggest. Guests in somebody else's
    migration wait for its end."""
    here = {guest.uuid: guest for guest in facts.guests if _stays(guest, spec.host)}
    idle = {name for name, guest in here.items() if guest.record.phase is Ownership.IDLE}
    lost = {g.guest for g in guests if _active(g) and g.migration not in facts.migrations}
    wanting = [g.guest for g in guests if g.guest in idle and _wants_another(g)]
    places = _places(wanting, lost & idle, here, facts)
    wanting.sort(key=lambda name: name not in places)
    begun = frozenset(wanting[: _room(spec, guests, facts)])
    left_ms = max(1, int(_left_ms(spec, facts))) if total_timeout_ms(spec) else 0
    commands: list[Command] = []
    result: list[EvacuationGuest] = []
    for guest in guests:
        if guest.guest in begun:
            tries = guest.tries + 1
            name = migration_id(spec.id, guest.guest, tries)
            pending = MigrationPhase.PENDING
            guest = replace(guest, migration=name, tries=tries, phase=pending, failure=None, message="")
        elif guest.guest in lost and guest.guest not in here:
            # Stored, then we crashed; and somebody else was first to ask for one, which has taken the guest away.
            guest = replace(guest, migration="", tries=guest.tries - 1)
        if guest.guest in begun or guest.guest in lost & idle:
            where = places.get(guest.guest, "")
            commands.append(CreateMigration(guest.migration, guest.guest, guest.name, where, left_ms))
        result.append(guest)
    return tuple(result), tuple(commands)


def _room(spec: EvacuationSpec, guests: tuple[EvacuationGuest, ...], facts: Facts) -> int:
    """How many more may be begun. A guest that was committed takes no place any more: its destination may have died,
    and the others need not wait for it. Nor does one that waits for room, while they are few."""
    committed = _committed(facts)
    active = [guest for guest in guests if _active(guest) and guest.guest not in committed]
    states = [facts.migrations.get(guest.migration) for guest in active]
    waiting = sum(state is not None and state.waiting_for is WaitingFor.ROOM for state in states)
    return max(0, spec.max_concurrent - len(active) + min(waiting, MAX_WAITING))


def _committed(facts: Facts) -> frozenset[str]:
    return frozenset(guest.uuid for guest in facts.guests if guest.record.phase is Ownership.COMMITTED)


def _places(
    wanting: Sequence[str], lost: Iterable[str], here: Mapping[str, GuestOnHost], facts: Facts
) -> dict[str, str]:
    """A host for as many as possible of those that have to leave and are promised no memory yet, all of them together:
    what is begun first must not take the only place of what comes later."""
    needs = [here[name].need for name in (*wanting, *lost)]
    return pack(facts.hosts, [need for need in needs if need is not None]) if facts.hosts and wanting else {}


def _cancelling(state: EvacuationState, facts: Facts) -> Step:
    """Migrations under way are cancelled one by one; those past their commit arrive all the same."""
    active = [guest for guest in state.guests if _active(guest) and guest.migration in facts.migrations]
    committed = _committed(facts)
    arriving = all(guest.guest in committed for guest in active)
    if active and not (arriving and facts.stalled_ms >= STALLED_MS):
        return Step(
            replace(state, phase=EvacuationPhase.CANCELLING),
            tuple(CancelMigration(guest.migration) for guest in active),
        )
    arrived = sum(guest.phase is MigrationPhase.SUCCEEDED for guest in state.guests)
    return Step(
        replace(
            state,
            phase=EvacuationPhase.CANCELLED,
            failure=FailureReason.CANCELLED,
            message=f"cancelled on request; {arrived} of {len(state.guests)} guests had left",
        )
    )


def _finish(spec: EvacuationSpec, state: EvacuationState, facts: Facts) -> Step:
    """The terminal report, once nothing is under way and nothing more can be started. Every wait here has an end."""
    committed = _committed(facts)
    moving = [guest for guest in state.guests if _active(guest) and guest.guest not in committed]
    over = _left_ms(spec, facts) <= 0
    if moving and not (over and _left_ms(spec, facts) <= -GRACE_MS):
        known = [guest.migration for guest in moving if guest.migration in facts.migrations]
        return Step(state, tuple(map(CancelMigration, known)) if over else ())
    staying = {guest.uuid: guest for guest in facts.guests if concerns(guest.record, spec.host)}
    if not staying and not any(map(_active, state.guests)):
        return Step(_died(spec, state, facts) if facts.crashed else _emptied(spec, state, facts, over=over))
    if not over and _may_still_empty(state, staying, facts):
        return Step(state)
    return Step(_left_behind(spec, state, staying, facts, over=over))


def _may_still_empty(state: EvacuationState, staying: Mapping[str, GuestOnHost], facts: Facts) -> bool:
    """Somebody else than this job is at work on what is left, and has not taken too long."""
    if facts.silent_ms:
        return facts.silent_ms < SILENT_MS
    remain = [guest for guest in state.guests if guest.guest in staying]
    waiting = [guest for guest in remain if _wants_another(guest)] if facts.cordoned else []
    if any(staying[guest.guest].record.phase in _ELSEWHERE for guest in waiting):
        return True  # in somebody else's migration, which has a total timeout of its own
    arriving = not remain or any(guest.phase is MigrationPhase.SUCCEEDED or _active(guest) for guest in remain)
    return bool(waiting or arriving) and facts.stalled_ms < STALLED_MS


_ELSEWHERE = frozenset({Ownership.IDLE, Ownership.OPEN, Ownership.ABORTED})


def _left_behind(
    spec: EvacuationSpec, state: EvacuationState, staying: Mapping[str, GuestOnHost], facts: Facts, *, over: bool
) -> EvacuationState:
    """FAILED, with every guest that is left and why."""
    failure = FailureReason.SOME_GUESTS_REMAIN
    because = ""
    if over:
        failure, because = FailureReason.TOTAL_TIMEOUT, f"; its total timeout of {total_timeout_ms(spec)} ms is over"
    if facts.silent_ms >= SILENT_MS:
        failure, because = FailureReason.SOURCE_UNREACHABLE, f"; the agent of {spec.host} is silent"
    known = {guest.guest for guest in state.guests}
    others = [guest for name, guest in staying.items() if name not in known]
    guests = tuple(
        _reason_given(guest, staying[guest.guest].record, failure, because) if guest.guest in staying else guest
        for guest in (*state.guests, *(EvacuationGuest(g.uuid, g.name, g.memory_mib) for g in others))
    )
    remain = [guest for guest in guests if guest.guest in staying]
    named = handful(f"{guest.name} ({_why(guest, staying[guest.guest].record)})" for guest in remain)
    said = f"{len(remain)} of {len(guests)} guests remain on {spec.host}: {named}{because}"
    return replace(state, guests=guests, phase=EvacuationPhase.FAILED, failure=failure, message=said)


def _reason_given(guest: EvacuationGuest, record: GuestRecord, failure: FailureReason, because: str) -> EvacuationGuest:
    """A guest that never had a migration is told why as well."""
    if guest.migration:
        return guest
    given = None if failure is FailureReason.SOME_GUESTS_REMAIN else failure
    why = "still starting" if record.phase is Ownership.STARTING else because.removeprefix("; ") or "not started"
    return replace(guest, failure=given, message=f"no migration was begun: {why}")


def _why(guest: EvacuationGuest, record: GuestRecord) -> str:
    if record.phase is Ownership.STARTING:
        return "still starting"
    if record.phase is Ownership.COMMITTED:
        return f"committed to {record.owner.host}, which has not finished"
    return guest.failure or "not started"


def _emptied(spec: EvacuationSpec, state: EvacuationState, facts: Facts, *, over: bool) -> EvacuationState:
    """No record names the host any more. The job waits for the host's own word that no copy is left, but not for ever,
    and not when nobody is there to give it."""
    left = "copies of them are still being ended" if facts.empty is False else "nobody has said that no copy is left"
    if state.safe_to_power_off or not facts.cordoned:
        return replace(state, phase=EvacuationPhase.SUCCEEDED, failure=None, message=_is_empty(spec))
    speaks = facts.empty is False or facts.source_live
    if speaks and not over and facts.stalled_ms < STALLED_MS:
        return replace(state, message=f"every guest has left; {left}")
    said = f"every guest has left {spec.host}, but {left}"
    return replace(state, phase=EvacuationPhase.SUCCEEDED, failure=None, message=said)


def _is_empty(spec: EvacuationSpec) -> str:
    return f"{spec.host} is empty"


def _afterwards(spec: EvacuationSpec, state: EvacuationState) -> EvacuationState:
    """A job that is over, and whose host has said by now that no copy is left, has nothing to warn of any more."""
    succeeded = state.phase is EvacuationPhase.SUCCEEDED
    return replace(state, message=_is_empty(spec)) if succeeded and state.safe_to_power_off else state


def _died(spec: EvacuationSpec, state: EvacuationState, facts: Facts) -> EvacuationState:
    """The host died before its guests had left it."""
    died = [guest for guest in state.guests if guest.guest in facts.crashed]
    lost = handful(guest.name for guest in died if not facts.crashed[guest.guest])
    again = handful(guest.name for guest in died if facts.crashed[guest.guest])
    said = [f"{len(state.guests) - len(died)} of {len(state.guests)} guests had left {spec.host} when it died"]
    said += [f"crashed with it: {lost}"] if lost else []
    said += [f"to start elsewhere: {again}"] if again else []
    return replace(state, phase=EvacuationPhase.FAILED, failure=FailureReason.HOST_DIED, message="; ".join(said))
