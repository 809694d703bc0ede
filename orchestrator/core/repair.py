"""What is wrong with a guest, in plain words, and what can safely be done about it.

Pure: what the ledger and the agents said at one instant in, sentences and actions out. An action is offered only where
the rules of the hand-over allow it whatever else is true: each one is a transition that its record guards, or asks an
agent to look at what it already owes the guest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from orchestrator.core.agent import CopyStatus, RunState
from orchestrator.core.death import standing
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.records import GuestSpec, MigrationState


class Action(StrEnum):
    BURY = "bury"
    """STARTING -> GONE: it never started, and its name is free."""
    ABORT = "abort"
    """End an attempt that nobody conducts for a migration any more; the guest stays at its source."""
    CLOSE = "close"
    """ABORTED -> IDLE: end the migration that the record still names."""
    DISCARD = "discard"
    """Let an agent end a copy that can never be the guest again."""
    RESUME = "resume"
    """Let the owner's agent try again to bring the guest into its wished state."""


@dataclass(frozen=True, slots=True)
class HostSeen:
    """What the agent of one host said of the guest."""

    host: str
    answered: bool
    complete: bool = False
    """It knows everything that is there."""
    copies: tuple[CopyStatus, ...] = ()
    run_state: RunState | None = None
    """Of the guest, if the host owns it."""
    trouble: str = ""
    """Why the agent does nothing about the guest just now; empty: nothing keeps it."""


@dataclass(frozen=True, slots=True)
class Known:
    """Everything that was asked for."""

    record: GuestRecord
    spec: GuestSpec
    want_run: bool
    migration: MigrationState | None
    """Of the migration that the record names; None: it names none, or there is none."""
    hosts: Mapping[str, HostSeen]
    """Owner, source and destination."""
    owner_certified: bool
    """The power cycle of its owner is certified to be over."""


@dataclass(frozen=True, slots=True)
class Offer:
    action: Action
    says: str
    """What it does, as a sentence."""
    host: str = ""
    """Whose agent is asked; empty: the ledger is written."""


@dataclass(frozen=True, slots=True)
class Examination:
    findings: tuple[str, ...]
    offers: tuple[Offer, ...]
    otherwise: str
    """Why nothing safe can be done; empty while there are offers."""


def examine(known: Known) -> Examination:
    offers = tuple(_offers(known))
    return Examination(tuple(_findings(known)), offers, "" if offers else _otherwise(known))


def _findings(known: Known) -> Sequence[str]:
    record = known.record
    said = [f"the ledger says {record.phase}, owner {record.owner.host} in power cycle {record.owner.boot_id}"]
    if record.phase is Ownership.CRASHED:
        said.append(standing(record, known.spec))
    if record.migration and record.phase in (Ownership.OPEN, Ownership.ABORTED, Ownership.COMMITTED):
        of = f"attempt {record.attempt} of migration {record.migration}"
        towards = f" towards {record.destination.host}" if record.destination else ""
        said.append(f"it is in {of}{towards}; {_course(known.migration)}")
    if known.owner_certified:
        said.append(f"that power cycle of {record.owner.host} is certified to be over")
    said += [_of_host(host, record) for host in known.hosts.values()]
    said.append("the operator wants it to run" if known.want_run else "the operator wants it stopped")
    return said


def _course(migration: MigrationState | None) -> str:
    if migration is None:
        return "there is no such migration"
    if migration.phase.terminal:
        return f"that migration is over ({migration.phase})"
    return f"that migration is {migration.phase}"


def _of_host(seen: HostSeen, record: GuestRecord) -> str:
    if not seen.answered:
        return f"{seen.host} is silent: what it has of the guest is not known"
    trouble = f"; its agent does nothing about it: {seen.trouble}" if seen.trouble else ""
    if not seen.copies:
        sure = "nothing of it" if seen.complete else "nothing of it that it knows of, and does not know everything yet"
        return f"{seen.host} has {sure}{trouble}"
    how = ", ".join(_of_copy(copy) for copy in seen.copies)
    state = f", {seen.run_state}" if seen.run_state is not None and seen.host == record.owner.host else ""
    return f"{seen.host} has {how}{state}{trouble}"


def _of_copy(copy: CopyStatus) -> str:
    what = "a copy that waits for an attempt" if copy.incoming else "a copy"
    return f"{what} (VMM {copy.pid})" if copy.pid else f"{what} (its VMM has ended)"


def _offers(known: Known) -> Sequence[Offer]:
    record = known.record
    owner = known.hosts.get(record.owner.host)
    orphan = known.migration is None or known.migration.phase.terminal
    offers: list[Offer] = []
    if record.phase is Ownership.STARTING and _is_nowhere(owner) and not known.owner_certified:
        offers.append(Offer(Action.BURY, f"record that {record.name} never started, and free its name"))
    if record.phase is Ownership.OPEN and orphan:
        offers.append(Offer(Action.ABORT, f"end attempt {record.attempt}, which belongs to no migration under way"))
    if record.phase is Ownership.ABORTED and orphan:
        offers.append(Offer(Action.CLOSE, f"leave the migration: {record.name} stays on {record.owner.host}"))
    for host in known.hosts.values():
        if host.answered and host.copies and _is_over_at(record, host):
            offers.append(
                Offer(Action.DISCARD, f"let {host.host} end what it has: it can never be the guest again", host.host)
            )
    if record.phase is Ownership.IDLE and owner is not None and owner.answered and _stands_still(known, owner):
        offers.append(Offer(Action.RESUME, f"let {owner.host} try again to bring it into its wished state", owner.host))
    return offers


def _is_nowhere(owner: HostSeen | None) -> bool:
    """Its owner's agent has said so and is not at work on it; silence is no answer."""
    if owner is None or not owner.answered or not owner.complete:
        return False
    return not owner.copies and owner.run_state is None


def _is_over_at(record: GuestRecord, host: HostSeen) -> bool:
    """Whatever the host has is a copy of a life that is over, or of a guest that is somebody else's for good."""
    if record.phase in (Ownership.CRASHED, Ownership.GONE):
        return True
    return record.phase is Ownership.IDLE and record.owner.host != host.host


def _stands_still(known: Known, owner: HostSeen) -> bool:
    if owner.run_state is RunState.ENDED:
        return False
    wished = RunState.RUNNING if known.want_run else RunState.PAUSED
    return bool(owner.trouble) or (owner.run_state is not None and owner.run_state is not wished)


def _otherwise(known: Known) -> str:
    record = known.record
    owner = known.hosts.get(record.owner.host)
    where = record.owner.host
    if record.phase is Ownership.GONE:
        return "its life is over; its name is free"
    if record.phase is Ownership.CRASHED:
        return f"it is over already: `drover guest stop {record.name}` frees its name"
    if owner is None or not owner.answered:
        said = (
            f"only {where} knows whether it runs, and {where} is silent: bring its agent back, or, if the host is gone"
        )
        return f"{said} for good, `drover host declare-dead {where}`"
    if record.phase is Ownership.COMMITTED:
        return f"it was committed to {where}, whose agent finishes it or gives it back; nobody else may"
    if record.phase in (Ownership.OPEN, Ownership.ABORTED):
        return f"its migration is under way: `drover explain {record.migration}` tells more, cancelling it is safe"
    if record.phase is Ownership.STARTING:
        return f"{where} is at work on it, or does not know everything yet: it finishes the start or ends it itself"
    if owner.run_state is RunState.ENDED:
        return f"it has shut down by itself: `drover guest stop {record.name}` frees its name"
    return "nothing is wrong with it"
