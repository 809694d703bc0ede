"""A host that is gone for good: what its guests become, and how a declaration of its death proceeds.

Pure. A certificate, `/fence/<host>/<boot_id>`, says that one power cycle of one host is over (H11); everything here
follows from which certificates there are and what the records say. Nothing depends on having seen a change, so a
coordinator that takes over goes on from the records, and doing a step twice does it once.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from orchestrator.core import handover
from orchestrator.core.errors import AbortReason, RefusalReason
from orchestrator.core.guest import local_state
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import HostRef
from orchestrator.core.records import (
    DeathPhase,
    FencerTable,
    GuestSpec,
    HostDeath,
    OnHostDeath,
)

MAX_RESTARTS = 5
"""Lives that are created to follow one guest until one of them runs."""
KEPT_CERTIFICATES = 8
"""Per host, beside those that still say something about a guest."""

_LIVES = (Ownership.STARTING, Ownership.IDLE, Ownership.OPEN, Ownership.ABORTED, Ownership.COMMITTED)


# --- what a guest becomes ---------------------------------------------------------------------------------------------


def after_certificates(record: GuestRecord, certified: Collection[HostRef], *, writer: str) -> GuestRecord | None:
    """The record to write because of the certificates there are; None: they change nothing about this guest.

    A guest whose owner's power cycle is over is CRASHED, also one that was committed there: it is never given back to
    its source, since it may have run (H10). An attempt towards a dead host is aborted: the guest stays where it is.
    """
    over = is_certified(record.owner, certified)
    if record.phase in _LIVES and handover.may_declare_dead(certificate=over):
        return handover.host_died(record, certificate=over, writer=writer)
    towards = record.destination if record.phase is Ownership.OPEN else None
    if towards is not None and is_certified(towards, certified):
        lost = AbortReason.DESTINATION_LOST
        return handover.abort(record, record.migration, record.attempt, lost, writer=writer)
    return None


def is_certified(ref: HostRef, certified: Collection[HostRef]) -> bool:
    """Exactly that power cycle: an earlier one of the same host says nothing about a later one."""
    return ref in certified


def speaks_for(record: GuestRecord) -> set[HostRef]:
    """The power cycles that a guest's record names: their certificates are still needed."""
    if record.phase is Ownership.GONE:
        return set()
    return {known for known in (record.owner, record.source, record.destination) if known is not None}


def hosts_of(record: GuestRecord) -> set[str]:
    """Hosts that the guest is on, or may come to be on: the owner, where an open attempt leads, and where a committed
    one may give it back to. A host that it has left is none of them, though the record goes on to say where from."""
    match record.phase:
        case Ownership.GONE:
            return set()
        case Ownership.OPEN:
            there = (record.owner, record.destination)
        case Ownership.COMMITTED:
            there = (record.owner, record.source)
        case _:
            there = (record.owner,)
    return {ref.host for ref in there if ref is not None}


class Fate(StrEnum):
    """What becomes of one guest when its host is declared dead."""

    LOST = "LOST"
    """It stays CRASHED."""
    RESTARTED = "RESTARTED"
    """It is started elsewhere, as a new life under the same name."""
    STAYS = "STAYS"
    """It was on its way there and stays where it is."""


@dataclass(frozen=True, slots=True)
class GuestFate:
    """What the declaration would do to one guest, as a plan shows it before anybody confirms."""

    uuid: str
    name: str
    fate: Fate
    why: str = ""
    """A clause."""


def fate(uuid: str, record: GuestRecord, spec: GuestSpec, dead: HostRef) -> GuestFate | None:
    """None: the death of that host is nothing to this guest."""
    if record.phase is Ownership.OPEN and record.destination == dead and record.owner != dead:
        return GuestFate(uuid, record.name, Fate.STAYS, f"it runs on {record.owner.host}")
    if record.phase not in _LIVES or record.owner != dead:
        return None
    if refused := why_left(spec):
        return GuestFate(uuid, record.name, Fate.LOST, refused)
    return GuestFate(uuid, record.name, Fate.RESTARTED, "its policy says restart")


def why_left(spec: GuestSpec) -> str:
    """Why a guest is not started again after its host's death, as a clause; empty: it is."""
    if spec.on_host_death is not OnHostDeath.RESTART:
        return "its policy says leave"
    return local_state(spec)


# --- a new life for a guest whose host died ---------------------------------------------------------------------------


class Restart(StrEnum):
    """What comes next for a guest that is CRASHED."""

    NOTHING = "NOTHING"
    CREATE = "CREATE"
    """Choose a host; create the next life, move the name to it and note it in the record: one transaction."""
    START = "START"
    """Ask the new life's agent to start it; it stays STARTING until that has happened."""
    CLOSE = "CLOSE"
    """The new life has run, or the name is somebody else's: this life is GONE."""


def may_restart(record: GuestRecord) -> bool:
    """H11: only the certified death of its host says that no copy of it runs and none will."""
    return record.phase is Ownership.CRASHED and record.host_died


def restart_step(record: GuestRecord, spec: GuestSpec, successor: GuestRecord | None, *, name_is_ours: bool) -> Restart:
    """`successor`: the record of `record.successor`, None when none was created. `name_is_ours`: the name leads to this
    life or its successor, or to nobody.

    The record stays CRASHED until a successor has run, so that one which its agent refuses is followed by another.
    """
    if not may_restart(record) or why_left(spec):
        return Restart.NOTHING
    if successor is None:
        return Restart.CREATE if name_is_ours else Restart.CLOSE
    if successor.phase is Ownership.STARTING:
        return Restart.START
    if not (successor.phase is Ownership.GONE and successor.never_ran):
        return Restart.CLOSE
    if not name_is_ours:
        return Restart.CLOSE
    return Restart.CREATE if record.restarts < MAX_RESTARTS else Restart.NOTHING


def successor_uuid(uuid: str, number: int) -> str:
    """Of the `number`th life that follows a guest: the same for everybody who creates it."""
    digits = hashlib.sha256(f"{uuid}/{number}".encode()).hexdigest()
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:32]}"


def standing(record: GuestRecord, spec: GuestSpec) -> str:
    """Where a CRASHED guest stands, as a sentence for people."""
    where = record.owner.host
    if record.stopped:
        return f"stopped, and kept on {where}: start it again there"
    if not record.host_died:
        return f"crashed on {where}"
    if refused := why_left(spec):
        return f"its host {where} died; it is not started again: {refused}"
    if not record.successor:
        return f"its host {where} died; it is started elsewhere as soon as a host takes it"
    if record.restarts >= MAX_RESTARTS:
        return f"its host {where} died; {record.restarts} tries to start it elsewhere failed"
    return f"its host {where} died; it is being started elsewhere"


# --- the declaration --------------------------------------------------------------------------------------------------


class Next(StrEnum):
    """What the leader does about a declaration."""

    NOTHING = "NOTHING"
    REFUSE = "REFUSE"
    FENCE = "FENCE"
    CERTIFY = "CERTIFY"
    CONSUME = "CONSUME"
    """Make the records true to the certificate, then call the declaration done."""


@dataclass(frozen=True, slots=True)
class DeathFacts:
    """One fresh look."""

    registered: HostRef | None
    """As the host's record says; None: there is no such host (any more)."""
    live: bool
    """The session of the host's agent lives."""
    certified: bool
    """There is a certificate for the declared power cycle."""
    fencer: str
    """Name of the fencer that serves the host; empty: none."""


@dataclass(frozen=True, slots=True)
class DeathStep:
    """What comes next in a declaration, and the record that says so."""

    next: Next
    death: HostDeath
    """To be written before the step is taken."""


def death_step(death: HostDeath, facts: DeathFacts) -> DeathStep:
    """Whatever else: without a certificate nothing happens to any guest, and a host whose session lives gets none on an
    operator's word."""
    if death.phase.terminal:
        return DeathStep(Next.NOTHING, death)
    if facts.certified:
        return DeathStep(Next.CONSUME, replace(death, phase=DeathPhase.CERTIFIED))
    if facts.registered is None or facts.registered.boot_id != death.boot_id:
        said = f"{death.host} has booted again since it was declared dead"
        return _refused(death, RefusalReason.CONFIRMATION_STALE, said)
    if facts.live:
        return _refused(death, RefusalReason.HOST_ALIVE, f"the agent of {death.host} is back: its session lives")
    if death.on_word:
        return DeathStep(Next.CERTIFY, death)
    if not facts.fencer:
        return _refused(death, RefusalReason.FENCER_REQUIRED, f"no fencer is configured for {death.host}")
    return DeathStep(Next.FENCE, replace(death, phase=DeathPhase.FENCING, fencer=facts.fencer))


def _refused(death: HostDeath, reason: RefusalReason, said: str) -> DeathStep:
    return DeathStep(Next.REFUSE, refused(death, reason, said))


def refused(death: HostDeath, reason: RefusalReason, said: str) -> HostDeath:
    """The declaration failed for good: `said` tells the operator why. Nothing about the host or its guests changes."""
    return replace(death, phase=DeathPhase.FAILED, failure=reason, message=said)


# --- the confirmation -------------------------------------------------------------------------------------------------


def confirmation(dead: HostRef, host_version: int, guests: Iterable[tuple[str, int]], issued_s: int) -> str:
    """What an operator repeats to confirm that they have seen exactly this: the host in this power cycle, these guests
    in these versions of their records, at that time. Not a secret."""
    lines = [dead.host, dead.boot_id, str(host_version), str(issued_s), *(f"{g} {v}" for g, v in sorted(guests))]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return f"{issued_s:x}-{digest[:20]}"


def issued_at_s(token: str) -> int | None:
    """When a confirmation was given out; None: it is none."""
    try:
        return int(token.partition("-")[0], 16)
    except ValueError:
        return None


# --- fencers and certificates -----------------------------------------------------------------------------------------


def fencer_of(table: FencerTable, host: str) -> str:
    """The first fencer whose patterns fit; empty: none."""
    for entry in table.entries:
        if any(fnmatch.fnmatchcase(host, pattern) for pattern in entry.hosts):
            return entry.name
    return ""


def superfluous(certificates: Sequence[tuple[HostRef, int]], needed: Collection[HostRef]) -> list[HostRef]:
    """Certificates of one host, each with the zxid of its writing, that nothing is lost without: not named by any
    record, and older than the newest KEPT_CERTIFICATES."""
    newest_first = [ref for ref, _ in sorted(certificates, key=lambda each: -each[1])]
    return [ref for ref in newest_first[KEPT_CERTIFICATES:] if ref not in needed]
