"""What is wrong with a guest, in plain words, and what can safely be done about it.

Pure: what the ledger and the agents said at one instant in, sentences and actions out. An action is offered only where
the rules of the hand-over allow it whatever else is true: each one is a transition that its record guards, or asks an
agent to look at what it already owes the guest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from orchestrator.core.agent import AgentStatus, CopyStatus, RunState, Trouble
from orchestrator.core.death import standing
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.records import GuestSpec, MigrationState
from orchestrator.core.text import handful


class Action(StrEnum):
    """What may be offered for a guest; the values are what `drover repair --action` takes."""

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
    RESTORE_RECORD = "restore-record"
    """Let the one host that has the guest write the record that the ledger has lost again."""


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
    no_record: bool = False
    """The agent holds the guest and says that the ledger has lost its record."""


def seen(host: str, status: AgentStatus | None, guest: str) -> HostSeen:
    """What an agent's answer says of one guest. None: it did not answer."""
    if status is None:
        return HostSeen(host, answered=False)
    told = next((one for one in status.guests if one.guest == guest), None)
    trouble = next((one for one in status.troubles if one.guest == guest), None)
    return HostSeen(
        host,
        answered=True,
        complete=status.complete,
        copies=tuple(copy for copy in status.copies if copy.guest == guest),
        run_state=told.run_state if told else None,
        trouble=trouble.message if trouble else "",
        no_record=trouble is not None and trouble.trouble is Trouble.NO_RECORD,
    )


def named(name: str, statuses: Iterable[AgentStatus]) -> dict[str, str]:
    """Guests of this name, or of this uuid, that agents hold: their names by uuid. Those whose record is said to be
    lost come alone where there are such."""
    held: dict[str, str] = {}
    lost: dict[str, str] = {}
    for status in statuses:
        for copy in status.copies:
            if name in (copy.name, copy.guest):
                held[copy.guest] = copy.name
        for trouble in status.troubles:
            if name in (trouble.name, trouble.guest):
                (lost if trouble.trouble is Trouble.NO_RECORD else held)[trouble.guest] = trouble.name
    return lost or held


@dataclass(frozen=True, slots=True)
class Known:
    """Everything that was asked for."""

    record: GuestRecord
    spec: GuestSpec | None
    """None: the ledger has lost it, while it has the record."""
    want_run: bool
    migration: MigrationState | None
    """Of the migration that the record names; None: it names none, or there is none."""
    hosts: Mapping[str, HostSeen]
    """Owner, source and destination."""
    owner_certified: bool
    """The power cycle of its owner is certified to be over."""


@dataclass(frozen=True, slots=True)
class Lost:
    """A guest of which the ledger has no record: all that the agents said."""

    guest: str
    """Uuid."""
    name: str
    hosts: tuple[HostSeen, ...]
    """Every host whose power cycle is not certified to be over; one that is not live has not answered."""
    name_taken: bool = False
    """Another guest bears the name by now."""


@dataclass(frozen=True, slots=True)
class Offer:
    """One action that is safe now."""

    action: Action
    says: str
    """What it does, as a sentence."""
    host: str = ""
    """Whose agent is asked; empty: the ledger is written."""


@dataclass(frozen=True, slots=True)
class Examination:
    """What is the case, in sentences, and what can be done about it."""

    findings: tuple[str, ...]
    offers: tuple[Offer, ...]
    otherwise: str
    """Why nothing safe can be done; empty while there are offers."""


def examine(known: Known) -> Examination:
    """Explain a guest and offer what is safe. Something is always said: findings, offers, or why there is nothing to
    offer."""
    offers = tuple(_offers(known))
    return Examination(tuple(_findings(known)), offers, "" if offers else _otherwise(known))


def examine_lost(lost: Lost) -> Examination:
    """The record may be written again only where the guest can run nowhere else: one host has it and says itself that
    the record is lost, and every other host says that it has nothing of it. Silence does not count."""
    holders = [host for host in lost.hosts if host.no_record and _may_be_the_guest(host)]
    others = [host for host in lost.hosts if host not in holders]
    running = [host.host for host in others if any(copy.pid or copy.devices_pid for copy in host.copies)]
    unknown = [host.host for host in others if not (host.answered and host.complete)]
    otherwise = _why_not_restored(lost, [host.host for host in holders], running, unknown)
    findings = [f"the ledger has no record of guest {lost.name} ({lost.guest})"]
    findings += [_of_host(host) for host in lost.hosts if host.copies or host.trouble]
    if silent := [host.host for host in lost.hosts if not host.answered]:
        findings.append(f"silent, so that what they have of it is not known: {handful(silent)}")
    if otherwise:
        return Examination(tuple(findings), (), otherwise)
    where = holders[0].host
    says = f"let {where} write the record of {lost.name} again, as the guest's owner, from what is there"
    return Examination(tuple(findings), (Offer(Action.RESTORE_RECORD, says, where),), "")


def _may_be_the_guest(host: HostSeen) -> bool:
    return any(not copy.incoming for copy in host.copies)


def _why_not_restored(lost: Lost, holders: list[str], running: list[str], unknown: list[str]) -> str:
    """Empty: nothing stands against it."""
    if lost.name_taken:
        return f"another guest is called {lost.name} by now: this one can have its record again once the name is free"
    if len(holders) + len(running) > 1:
        where = handful([*holders, *running])
        return (
            f"{where} have processes of it, and only the lost record says which one is the guest: put the ledger back"
        )
    if unknown:
        where = handful(unknown)
        return (
            f"it may run on {where}, which has not said what is there: bring its agent back, or, if a host is gone for "
            "good, `drover host declare-dead`"
        )
    if not holders:
        return "no agent has it and says that its record is lost: look again in some seconds, or put the ledger back"
    return ""


def _findings(known: Known) -> Sequence[str]:
    record = known.record
    said = [f"the ledger says {record.phase}, owner {record.owner.host} in power cycle {record.owner.boot_id}"]
    if known.spec is None:
        said.append(
            "the ledger has lost its specification: it goes on where it is, but cannot be shown, moved or started "
            "again before that is back (from a backup of the ledger)"
        )
    elif record.phase is Ownership.CRASHED:
        said.append(standing(record, known.spec))
    if record.migration and record.phase in (Ownership.OPEN, Ownership.ABORTED, Ownership.COMMITTED):
        of = f"attempt {record.attempt} of migration {record.migration}"
        towards = f" towards {record.destination.host}" if record.destination else ""
        said.append(f"it is in {of}{towards}; {_course(known.migration)}")
    if known.owner_certified:
        said.append(f"that power cycle of {record.owner.host} is certified to be over")
    said += [_of_host(host, record.owner.host) for host in known.hosts.values()]
    said.append("the operator wants it to run" if known.want_run else "the operator wants it stopped")
    return said


def _course(migration: MigrationState | None) -> str:
    if migration is None:
        return "there is no such migration"
    if migration.phase.terminal:
        return f"that migration is over ({migration.phase})"
    return f"that migration is {migration.phase}"


def _of_host(seen: HostSeen, owner: str = "") -> str:
    if not seen.answered:
        return f"{seen.host} is silent: what it has of the guest is not known"
    trouble = f"; its agent does nothing about it: {seen.trouble}" if seen.trouble else ""
    if not seen.copies:
        sure = "nothing of it" if seen.complete else "nothing of it that it knows of, and does not know everything yet"
        return f"{seen.host} has {sure}{trouble}"
    how = ", ".join(_of_copy(copy) for copy in seen.copies)
    state = f", {seen.run_state}" if seen.run_state is not None and seen.host == owner else ""
    return f"{seen.host} has {how}{state}{trouble}"


def _of_copy(copy: CopyStatus) -> str:
    what = "a copy that waits for an attempt" if copy.incoming else "a copy"
    return f"{what} (VMM {copy.pid})" if copy.pid else f"{what} (its VMM has ended)"


def _offers(known: Known) -> Sequence[Offer]:
    record = known.record
    owner = known.hosts.get(record.owner.host)
    orphan = known.migration is None or known.migration.phase.terminal
    offers: list[Offer] = []
    never_ran = record.phase is Ownership.STARTING and not record.starts  # its agent keeps one that was started again
    if never_ran and _is_nowhere(owner) and not known.owner_certified:
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
