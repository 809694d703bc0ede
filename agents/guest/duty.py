"""PURE. What an agent owes a guest of its host that no session speaks for: after a restart, a death, or at rest.

A *copy* is one VMM process of the guest on this host. `duty` looks at the guest record, read behind a barrier, and at
the copies, and names the one thing to do next; the shell does it and asks again. Rules H1-H14: docs/protocol.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from orchestrator.core import handover
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import HostRef
from orchestrator.core.liveness import Liveness


@dataclass(frozen=True, slots=True)
class Copy:
    """One VMM process that is known here. Of one that is gone nothing counts but that."""

    inc: str
    incoming: bool
    """Made to receive the guest and not promoted yet; `migration` and `attempt` then say for which attempt."""
    migration: str = ""
    attempt: int = 0
    liveness: Liveness = Liveness.ALIVE
    """Of the process. While one is UNKNOWN nothing is decided about the guest."""
    running: bool = False
    """The vCPUs run."""
    sealed: bool = False
    """Everything was sent; it cannot start by itself."""
    ended: bool = False
    """The guest shut down by itself: nothing sets it going again."""
    migrating: bool = False
    """A migration is under way in it, parked ones included."""
    in_session: bool = False
    """A session conducts it: hands off, alive or not."""
    adopted: bool = False
    """Somebody else started it."""


class Do(StrEnum):
    """What may be owed to a guest; one thing at a time."""

    NOTHING = "nothing"
    ASK_AGAIN = "ask_again"
    """What would decide is not known: nothing is done, and everything is asked again."""
    FINISH_BIRTH = "finish_birth"
    """The record says STARTING and the VMM runs: write IDLE."""
    BURY = "bury"
    """The record says STARTING and there is no VMM: it never started; GONE, and the name is free."""
    DECLARE_CRASHED = "declare_crashed"
    GIVE_BACK = "give_back"
    """ROLLBACK: committed to us, the process is dead, no marker (H10)."""
    PROMOTE = "promote"
    """DONE names this copy: note down that it is the guest's now."""
    END_AS_SOURCE = "end_as_source"
    """An attempt without its conductor: a restarted source session ends it (H7)."""
    END_AS_DESTINATION = "end_as_destination"
    DISCARD = "discard"
    LET_GO = "let_go"
    """It was given back to whoever had started it: forget it, and leave its process as it is."""
    REFUSE_OWNER = "refuse_owner"
    """The record gives the guest to a host that this one never gave it to: keep the copy, and say so."""
    RUN = "run"
    STOP = "stop"


@dataclass(frozen=True, slots=True)
class Duty:
    """What is owed, and to which copy if it is about one."""

    do: Do = Do.NOTHING
    inc: str = ""
    """Of the copy that it is about."""


def own_copy(record: GuestRecord, copies: Sequence[Copy]) -> Copy | None:
    """Which copy is the guest's, if this host is the owner: the one that DONE named, else the one born here."""
    own = [copy for copy in copies if not copy.incoming or copy.inc == record.inc]
    named = [copy for copy in own if copy.inc == record.inc]
    return (named or sorted(own, key=lambda copy: copy.sealed) or [None])[0]


def decides(copy: Copy) -> bool:
    """Its process is there, or may be: what it is counts."""
    return copy.in_session or copy.liveness is not Liveness.GONE


def is_unknown(copy: Copy) -> bool:
    """Nobody can tell whether its process is there, and no session answers for it."""
    return not copy.in_session and copy.liveness is Liveness.UNKNOWN


def duty(record: GuestRecord | None, here: HostRef, known: Sequence[Copy], *, marker: bool, want_run: bool) -> Duty:
    """The next thing to do; NOTHING when all is well or a session is at it.

    `record` None: the ledger has none. That says nothing about the guest: a record is written before a guest's first
    VMM is executed and is never deleted, so a ledger without it has lost it. `marker`: there is one for record.inc.
    `known`: the copies of this host, in no particular order.
    """
    if record is None or any(map(is_unknown, known)):
        return Duty(Do.ASK_AGAIN)
    copies = [copy for copy in known if decides(copy)]
    if record.owner.host == here.host:
        mine = _owned(record, here, copies, marker=marker, want_run=want_run)
        if mine.do is not Do.NOTHING:
            return mine
    keep = own_copy(record, copies) if record.owner == here else None
    for copy in copies:
        if copy.in_session or copy is keep:
            continue
        found = _not_the_guest(record, here, copy)
        if found.do is not Do.NOTHING:
            return found
    return Duty()


def _owned(record: GuestRecord, here: HostRef, copies: Sequence[Copy], *, marker: bool, want_run: bool) -> Duty:
    own = own_copy(record, copies)
    if record.phase is Ownership.STARTING:
        alive = own is not None and record.owner == here
        return Duty(Do.FINISH_BIRTH, own.inc) if alive and own is not None else Duty(Do.BURY)
    if record.phase in (Ownership.CRASHED, Ownership.GONE):
        return _over(copies, released=record.released or record.never_ran)
    if record.phase is Ownership.COMMITTED:
        return _committed_to_us(record, here, copies, marker=marker)
    if handover.must_declare_crashed(record, here, vmm_alive=own is not None, marker=marker):
        return Duty(Do.DECLARE_CRASHED)
    if own is None or own.in_session:
        return Duty()
    if own.incoming:
        return Duty(Do.PROMOTE, own.inc)
    if own.migrating or own.sealed or (record.phase is Ownership.OPEN and record.inc):
        return _unconducted(record, here, own, want_run=want_run)
    if own.running != want_run and not own.ended:
        return Duty(Do.RUN if want_run else Do.STOP, own.inc)
    return Duty()


def _over(copies: Sequence[Copy], *, released: bool) -> Duty:
    """This life is over. A copy that is alive all the same was cut off while its host was declared dead on somebody's
    word: the guest may run elsewhere by now, so this one ends, whatever it is doing. One that was `released`, or
    whose adoption was given up before it was a guest, never ran elsewhere, and is somebody else's again."""
    left = next((copy for copy in copies if not copy.in_session), None)
    if left is None:
        return Duty()
    return Duty(Do.LET_GO if released and left.adopted and not left.sealed else Do.DISCARD, left.inc)


def _unconducted(record: GuestRecord, here: HostRef, own: Copy, *, want_run: bool) -> Duty:
    """A sealed guest that stays stopped on purpose, with the attempt closed, is at rest; everything else is ended."""
    at_rest = own.sealed and not own.migrating and handover.may_resume_without_session(record, here)
    if at_rest:
        return Duty(Do.RUN, own.inc) if want_run else Duty()
    return Duty(Do.END_AS_SOURCE, own.inc)


def _committed_to_us(record: GuestRecord, here: HostRef, copies: Sequence[Copy], *, marker: bool) -> Duty:
    copy = next((copy for copy in copies if copy.inc == record.inc), None)
    if copy is not None and record.owner == here:
        return Duty() if copy.in_session else Duty(Do.END_AS_DESTINATION, copy.inc)
    if handover.may_roll_back(record, by=here, vmm_seen_dead=copy is None, marker=marker):
        return Duty(Do.GIVE_BACK)
    if handover.must_declare_crashed(record, here, vmm_alive=copy is not None, marker=marker):
        return Duty(Do.DECLARE_CRASHED)
    return Duty()


def _not_the_guest(record: GuestRecord, here: HostRef, copy: Copy) -> Duty:
    if copy.incoming:
        over = handover.is_over_for_destination(record, copy.migration, copy.attempt, copy.inc)
        return Duty(Do.DISCARD if over else Do.END_AS_DESTINATION, copy.inc)
    if record.owner == here:
        # A second copy that once was the guest: it left, came back as another process, and this one was forgotten.
        return Duty(Do.DISCARD, copy.inc) if record.phase is not Ownership.COMMITTED and copy.sealed else Duty()
    if not may_have_been_given_away(copy):
        return Duty(Do.REFUSE_OWNER, copy.inc)
    if record.phase is Ownership.GONE or handover.may_discard_source(record, here, record.inc):
        return Duty(Do.DISCARD, copy.inc)
    return Duty(Do.END_AS_SOURCE, copy.inc) if record.phase is Ownership.COMMITTED else Duty()


def may_have_been_given_away(copy: Copy) -> bool:
    """H2, H3: only the owner's agent gives a guest away, and only once everything was sent. A copy that is not sealed
    was never given, whatever the ledger says, and by whomever it was written; that the copy is sealed is known by its
    VMM, which outlives every agent."""
    return copy.sealed
