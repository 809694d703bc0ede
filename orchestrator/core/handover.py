"""Who may run a guest, and how it changes hands: the guest record, its transitions and the decisions H1-H14.

Two kinds of functions stand here. *Transitions* (`open_attempt`, `bind`, `commit`, `abort`, ...) take the record
that was read and return the one to write; the caller writes it with the version that it read, so the first writer
wins. One that the record does not allow raises `Refused`. *Decisions* (`may_run_at_destination`, `verdict`, ...)
say what a party may do with the guest on the strength of what it has read. Each carries the rule of
docs/protocol.md that it states, and each is one that a mutant of the exploration removes (tests/exploration).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from orchestrator.core.errors import AbortReason
from orchestrator.core.ids import HostRef
from orchestrator.core.record import Record


class Ownership(StrEnum):
    """Phase of the guest record, not of a migration."""

    STARTING = "STARTING"
    IDLE = "IDLE"
    OPEN = "OPEN"
    COMMITTED = "COMMITTED"
    ABORTED = "ABORTED"
    CRASHED = "CRASHED"
    GONE = "GONE"


@dataclass(frozen=True, slots=True)
class GuestRecord(Record):
    """`/guests/<uuid>`: the only authority on who may run the guest. One node per life, never created twice."""

    name: str
    phase: Ownership
    owner: HostRef
    migration: str = ""
    attempt: int = 0
    """Counts over the guest's whole life within a migration; 0 before the first."""
    destination: HostRef | None = None
    inc: str = ""
    """Id of the one destination VMM process of this attempt; empty until bound."""
    source: HostRef | None = None
    """Set from COMMITTED on: whose copy is to be discarded, and who resumes after a ROLLBACK."""
    reason: AbortReason | None = None
    devices: tuple[str, ...] = ()
    coord_epoch: int = 0
    writer: str = ""
    """Id of the request that wrote this version: how a writer recognises its own write after a lost answer."""
    host_died: bool = False
    """CRASHED because the owner's power cycle is certified to be over, not because the VMM died."""
    successor: str = ""
    """Uuid of the life that was created to follow this one under the same name; empty: none."""
    restarts: int = 0
    """How many successors were created; all but the last never ran."""
    never_ran: bool = False
    """GONE straight from STARTING: no vCPU of this life ever ran."""
    stopped: bool = False
    """CRASHED, kept on purpose, and its owner's agent has seen that nothing of it is left there: it may be started
    again, by that host. To a version that does not know the word it is a guest that has crashed."""
    starts: int = 0
    """How often it was started again. What has run before is never GONE because a start failed."""
    released: bool = False
    """GONE because its process was given back to whoever had started it: that runs on, and is nobody here."""


class Refused(Exception):
    """The record does not allow this transition; it says why. Nothing is to be written."""


def _need(record: GuestRecord, *phases: Ownership) -> None:
    if record.phase not in phases:
        wanted = " or ".join(phases)
        raise Refused(f"guest {record.name} is {record.phase} (owner {record.owner.host}), needs {wanted}")


def _need_attempt(record: GuestRecord, migration: str, attempt: int) -> None:
    if (record.migration, record.attempt) != (migration, attempt):
        raise Refused(f"guest {record.name} is in attempt {record.attempt} of {record.migration or 'no migration'}")


# --- transitions ------------------------------------------------------------------------------------------------------


def birth(name: str, owner: HostRef, *, writer: str) -> GuestRecord:
    """The record exists before the VMM is executed; a second creator fails on the name."""
    return GuestRecord(name=name, phase=Ownership.STARTING, owner=owner, writer=writer)


def restored(name: str, owner: HostRef, *, writer: str) -> GuestRecord:
    """A record that the ledger has lost, written again by the host where the guest's only VMM is at rest."""
    return GuestRecord(name=name, phase=Ownership.IDLE, owner=owner, writer=writer)


def started(record: GuestRecord, *, writer: str) -> GuestRecord:
    """STARTING -> IDLE: the guest runs for the first time. Raises Refused in any other phase."""
    _need(record, Ownership.STARTING)
    return replace(record, phase=Ownership.IDLE, writer=writer)


def gone(record: GuestRecord, *, writer: str) -> GuestRecord:
    """The guest ended for good, or never started."""
    _need(record, Ownership.STARTING, Ownership.IDLE, Ownership.CRASHED)
    never_ran = record.phase is Ownership.STARTING and not record.starts
    return replace(
        record,
        phase=Ownership.GONE,
        migration="",
        destination=None,
        inc="",
        never_ran=never_ran,
        stopped=False,
        writer=writer,
    )


def stopped(record: GuestRecord, *, by: HostRef, nothing_left: bool, writer: str) -> GuestRecord:
    """A guest that is kept without running. Written by its owner's host alone, once nothing of the guest is left
    there, when it has crashed (also on purpose) or when a start has failed that was not its first."""
    _need(record, Ownership.CRASHED, Ownership.STARTING)
    if record.owner.host != by.host or not nothing_left:
        raise Refused(f"guest {record.name} is owned by {record.owner.host}, or something of it is left on {by.host}")
    if record.phase is Ownership.STARTING and not record.starts:
        raise Refused(f"guest {record.name} has never run")
    if record.successor:
        raise Refused(f"guest {record.name} is followed by another life, which has its name")
    return replace(
        record,
        phase=Ownership.CRASHED,
        owner=by,
        migration="",
        attempt=0,
        destination=None,
        inc="",
        source=None,
        reason=None,
        devices=(),
        host_died=False,
        stopped=True,
        writer=writer,
    )


def start_again(record: GuestRecord, here: HostRef, *, writer: str) -> GuestRecord:
    """STARTING once more, on the host that has seen to it that nothing of the guest is left: the same life, with
    its uuid and its disks. `here`: that host in its present power cycle."""
    _need(record, Ownership.CRASHED)
    if not may_start_again(record, here):
        raise Refused(f"nothing says that no copy of guest {record.name} is left on {record.owner.host}")
    return replace(record, phase=Ownership.STARTING, owner=here, stopped=False, starts=record.starts + 1, writer=writer)


def released(record: GuestRecord, *, writer: str) -> GuestRecord:
    """IDLE -> GONE: its process goes back to whoever had started it, and runs on. Raises Refused in any other phase:
    from CRASHED the guest may run elsewhere already."""
    _need(record, Ownership.IDLE)
    return replace(record, phase=Ownership.GONE, migration="", destination=None, inc="", released=True, writer=writer)


def open_attempt(
    record: GuestRecord, migration: str, attempt: int, destination: HostRef, *, epoch: int, writer: str
) -> GuestRecord:
    """Step 0. From IDLE (attempt 1 of a migration) or from ABORTED (the next attempt of the same one)."""
    _need(record, Ownership.IDLE, Ownership.ABORTED)
    if record.phase is Ownership.ABORTED:
        if record.migration != migration or attempt != record.attempt + 1:
            raise Refused(f"attempt {attempt} of {migration} cannot follow {record.attempt} of {record.migration}")
        if not may_retry(record):
            raise Refused("cancelled: no further attempt (H6)")
    elif attempt != 1:
        raise Refused(f"the first attempt of {migration} is 1, not {attempt}")
    if destination.host == record.owner.host:
        raise Refused(f"guest {record.name} is already on {destination.host}")
    return replace(
        record,
        phase=Ownership.OPEN,
        migration=migration,
        attempt=attempt,
        destination=destination,
        inc="",
        source=None,
        reason=None,
        devices=(),
        coord_epoch=epoch,
        writer=writer,
    )


def bind(record: GuestRecord, migration: str, attempt: int, inc: str, *, writer: str) -> GuestRecord:
    """Step 2: one destination process per attempt, bound once, by whoever conducts it. One that is bound already is
    conducted by somebody else, or was by an agent that died (H7)."""
    _need(record, Ownership.OPEN)
    _need_attempt(record, migration, attempt)
    if record.inc:
        raise Refused(f"attempt {attempt} is bound to destination process {record.inc}")
    return replace(record, inc=inc, writer=writer)


def commit(record: GuestRecord, migration: str, attempt: int, inc: str, *, writer: str) -> GuestRecord:
    """Step 9: the owner gives the guest away. Written only together with `check req`, unless the guest was stopped."""
    _need(record, Ownership.OPEN)
    _need_attempt(record, migration, attempt)
    if record.inc != inc or record.destination is None:
        raise Refused(f"attempt {attempt} is not bound to {inc}")
    return replace(record, phase=Ownership.COMMITTED, owner=record.destination, source=record.owner, writer=writer)


def abort(
    record: GuestRecord,
    migration: str,
    attempt: int,
    reason: AbortReason,
    devices: tuple[str, ...] = (),
    *,
    writer: str,
) -> GuestRecord:
    """H6: ABORT and cancel are one compare-and-set, for source, destination, coordinator and API alike."""
    _need(record, Ownership.OPEN)
    _need_attempt(record, migration, attempt)
    return replace(record, phase=Ownership.ABORTED, reason=reason, devices=devices, writer=writer)


def close(record: GuestRecord, migration: str, *, writer: str) -> GuestRecord:
    """ABORTED -> IDLE(S): the migration is over, the guest stays at the source."""
    _need(record, Ownership.ABORTED)
    if record.migration != migration:
        raise Refused(f"guest {record.name} is in migration {record.migration}")
    return replace(record, phase=Ownership.IDLE, destination=None, inc="", source=None, writer=writer)


def done(record: GuestRecord, migration: str, attempt: int, inc: str, *, writer: str) -> GuestRecord:
    """H9: the guest runs at the destination, or responsibility for a stopped one was taken there."""
    _need(record, Ownership.COMMITTED)
    _need_attempt(record, migration, attempt)
    if record.inc != inc:
        raise Refused(f"attempt {attempt} was committed to {record.inc}, not {inc}")
    return replace(record, phase=Ownership.IDLE, writer=writer)


def roll_back(record: GuestRecord, *, by: HostRef, vmm_seen_dead: bool, marker: bool, writer: str) -> GuestRecord:
    """H10: only with proof that the guest never executed at the destination."""
    _need(record, Ownership.COMMITTED)
    if not may_roll_back(record, by=by, vmm_seen_dead=vmm_seen_dead, marker=marker) or record.source is None:
        raise Refused("no proof that the guest never ran at the destination (H10)")
    return replace(
        record,
        phase=Ownership.ABORTED,
        owner=record.source,
        source=None,
        reason=AbortReason.ROLLED_BACK,
        devices=(),
        writer=writer,
    )


def crashed(record: GuestRecord, *, writer: str) -> GuestRecord:
    """The owner's VMM is dead, or the owner lost power: nothing runs, nothing may be resumed elsewhere."""
    _need(record, Ownership.STARTING, Ownership.IDLE, Ownership.OPEN, Ownership.ABORTED, Ownership.COMMITTED)
    return replace(record, phase=Ownership.CRASHED, writer=writer)


def host_died(record: GuestRecord, *, certificate: bool, writer: str) -> GuestRecord:
    """H11: CRASHED because its owner's power cycle is over. `certificate`: one stands for exactly that power cycle."""
    if not may_declare_dead(certificate=certificate):
        raise Refused(f"no certificate says that power cycle {record.owner.boot_id} of {record.owner.host} is over")
    return replace(crashed(record, writer=writer), host_died=True)


def succeeded_by(record: GuestRecord, successor: str, *, writer: str) -> GuestRecord:
    """Another life takes over the name of one whose host died. Written together with that life and the name."""
    _need(record, Ownership.CRASHED)
    if not record.host_died:
        raise Refused(f"guest {record.name} crashed by itself: only the death of its host starts it again")
    return replace(record, successor=successor, restarts=record.restarts + 1, writer=writer)


# --- decisions --------------------------------------------------------------------------------------------------------


def may_start_again(record: GuestRecord, here: HostRef) -> bool:
    """Only where the owner's own agent has written that nothing of it is left. A crash alone does not say that:
    its word may be a certificate's, while a host that was cut off still runs the guest."""
    return record.phase is Ownership.CRASHED and record.stopped and record.owner.host == here.host


def may_retry(record: GuestRecord) -> bool:
    """H6: whoever answered "cancelled" was told the truth, so no attempt follows a cancel."""
    return record.reason is not AbortReason.CANCELLED


def may_run_at_destination(record: GuestRecord, here: HostRef, inc: str) -> bool:
    """H1, H8: COMMITTED with our own incarnation. The fact is stable, so even a stale copy of it is valid."""
    return record.phase is Ownership.COMMITTED and record.owner == here and record.inc == inc


def owns_for_good(record: GuestRecord, here: HostRef, inc: str) -> bool:
    """DONE was written for this incarnation."""
    return record.phase is Ownership.IDLE and record.owner == here and record.inc == inc


def is_over_for_destination(record: GuestRecord, migration: str, attempt: int, inc: str) -> bool:
    """A loaded or waiting copy can never become the guest any more: discard it."""
    if record.phase in (Ownership.CRASHED, Ownership.GONE):
        return True
    if record.phase is Ownership.COMMITTED or record.phase is Ownership.IDLE:
        return record.inc != inc
    if (record.migration, record.attempt) != (migration, attempt):
        return True
    return record.phase is Ownership.ABORTED or bool(record.inc and record.inc != inc)


class Verdict(StrEnum):
    """What a source that has submitted its COMMIT may conclude from a record that it read behind a barrier."""

    COMMITTED = "COMMITTED"
    """The destination owns the guest."""
    REFUSED = "REFUSED"
    """This attempt can never commit: the guest is the source's."""
    UNDECIDED = "UNDECIDED"
    """Still open: the write may yet arrive. Stay paused and force an outcome by ABORT."""
    CRASHED = "CRASHED"


def verdict(record: GuestRecord, here: HostRef, migration: str, attempt: int, *, req_moved: bool) -> Verdict:
    """H5: after submit nothing but the record's content decides, never a timeout, never a bad version by itself.

    `req_moved`: the `req` node's version, read behind the same barrier, is beyond the one the COMMIT checks.
    """
    if record.phase in (Ownership.CRASHED, Ownership.GONE):
        return Verdict.CRASHED
    if record.owner != here:
        return Verdict.COMMITTED
    if record.phase is Ownership.OPEN and (record.migration, record.attempt) == (migration, attempt):
        return Verdict.REFUSED if req_moved else Verdict.UNDECIDED
    return Verdict.REFUSED


def may_discard_source(record: GuestRecord, here: HostRef, attempt_inc: str) -> bool:
    """H9: the source copy is destroyed only on DONE, never at COMMITTED."""
    if record.phase is Ownership.COMMITTED or record.owner == here:
        return False
    return record.phase is not Ownership.CRASHED or record.inc == attempt_inc


def may_roll_back(record: GuestRecord, *, by: HostRef, vmm_seen_dead: bool, marker: bool) -> bool:
    """H10: the owner under the recorded boot_id, having seen that process dead, with no marker."""
    return record.owner == by and vmm_seen_dead and not marker


def must_declare_crashed(record: GuestRecord, here: HostRef, *, vmm_alive: bool, marker: bool) -> bool:
    """An owner's guest whose VMM is dead and that no proof of H10 can give back.

    Under another boot_id of the same host the VMM is dead by definition and the marker directory is gone: no proof.
    """
    if record.owner.host != here.host or record.phase in (Ownership.CRASHED, Ownership.GONE, Ownership.STARTING):
        return False
    if record.owner.boot_id != here.boot_id:
        return True
    if vmm_alive:
        return False
    return record.phase is not Ownership.COMMITTED or marker


def may_resume_without_session(record: GuestRecord, here: HostRef) -> bool:
    """The owner's agent, with no attempt under way, may start even a sealed VMM: no COMMIT can succeed any more.

    An attempt that is open and not bound has not begun, and what was sealed in the one before is over.
    """
    unbound = record.phase is Ownership.OPEN and not record.inc
    return record.owner == here and (unbound or record.phase in (Ownership.IDLE, Ownership.ABORTED))


def may_declare_dead(*, certificate: bool) -> bool:
    """H11: unreachable is not dead; ownership leaves a silent host only with a fence certificate."""
    return certificate


def epoch_is_current(in_ledger: int, offered: int) -> bool:
    """H12: only the coordinator that the ledger names is obeyed. `in_ledger` was read behind a barrier.

    A lower one was followed by another, a higher one was never given to anybody.
    """
    return offered == in_ledger
