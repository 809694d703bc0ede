"""PURE. What the source's half of an attempt knows: its stage, its state, and which bounds run in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from agents.handover.timers import Timers
from agents.handover.words import (
    Command,
    Timer,
)
from orchestrator.core.disks import SyncPoint
from orchestrator.core.errors import AbortReason
from orchestrator.core.ids import AckRequest, AttemptRef, HostRef
from orchestrator.core.switchover import AckLedger


class SourceStage(StrEnum):
    """How far the source has come; the ENDED stages are final."""

    NEW = "NEW"
    BINDING = "BINDING"
    SYNCING = "SYNCING"
    """Local disks are copied and the guest runs; its memory follows once they are up to date."""
    PRECOPY = "PRECOPY"
    GATE_WAIT = "GATE_WAIT"
    """The engine stopped the guest under a closed gate, and policy allows a bounded wait for the ACK."""
    FREEZING = "FREEZING"
    """The engine has stopped the guest; shims are quiesced; the check comes."""
    DRAINING = "DRAINING"
    """The check has passed; the rest of the local disks is on its way, and no engine has been told to go on."""
    LAST_PASS = "LAST_PASS"
    SUBMITTED = "SUBMITTED"
    """A COMMIT has left and its outcome is not known: nothing resumes here (H5)."""
    COMMITTED = "COMMITTED"
    DISCARDING = "DISCARDING"
    ROLLING_BACK = "ROLLING_BACK"
    RESUMING = "RESUMING"
    RECORDING = "RECORDING"
    """The guest is up again; the ABORT is being written."""
    DECLARING = "DECLARING"
    """Our VMM is dead and it was the owner's: CRASHED is being written."""
    ENDED_COMMITTED = "ENDED_COMMITTED"
    ENDED_ABORTED = "ENDED_ABORTED"
    ENDED_CRASHED = "ENDED_CRASHED"
    ENDED_NEEDS_OPERATOR = "ENDED_NEEDS_OPERATOR"
    """The guest could not be started again: image and VMM are kept, nothing is started elsewhere."""

    @property
    def ended(self) -> bool:
        """Nothing follows any more, and no event is taken."""
        return self.name.startswith("ENDED")


@dataclass(frozen=True, slots=True)
class SourceState:
    """The source's half of one attempt."""

    ref: AttemptRef
    here: HostRef
    inc: str
    suspend_on_timeout: bool = False
    has_devices: bool = True
    """Devices of ours outside the VMM take part."""
    disks: tuple[str, ...] = ()
    """Local disks that move with the guest."""
    inside: bool = False
    """There are devices inside the VMM: it asks for their ACKs itself, and a stopped one cannot go back to pre-copy."""
    gate_wait: bool = False
    """Policy `gate_wait_ms` is not 0."""
    stage: SourceStage = SourceStage.NEW
    acks: AckLedger = field(default_factory=AckLedger)
    unwritten: tuple[AckRequest, ...] = ()
    """Requests that are not durable yet: the gate stays closed while there are any."""
    req_version: int = 0
    released: bool = False
    opened: bool = False
    """The gate was open once: a request pending at the freeze is then late, not a gate that never opened."""
    active: bool = False
    """Every device has begun its session, and so asked for its first ACK; the engine has accepted the migration."""
    vitals: bool = False
    want_run: bool = True
    suspended: bool = False
    """Policy stopped the guest; the wish is still that it runs."""
    paused: bool = False
    """The guest was stopped on purpose before the freeze."""
    drained: tuple[SyncPoint, ...] = ()
    """What the destination's images must have, since the guest stands still."""
    sealed: bool = False
    sent: bool = False
    loaded: bool = False
    submitted: bool = False
    vmm_dead: bool = False
    reason: AbortReason | None = None
    devices: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    """Devices inside the VMM that lost their state in this attempt."""
    refused: bool = False
    """The ledger already says that this attempt never commits: no ABORT needs to be written."""
    timers: Timers = field(default_factory=Timers)
    restarted: bool = False
    """Adopted by a new agent process: conducts nothing, only ends it (H7)."""


Step = tuple[SourceState, tuple[Command, ...]]
"""The state after an event, and what the shell has to carry out, in order."""

BEFORE_FREEZE = frozenset(
    {SourceStage.NEW, SourceStage.BINDING, SourceStage.SYNCING, SourceStage.PRECOPY, SourceStage.GATE_WAIT}
)
"""The engine has not stopped the guest, or a bounded wait for an ACK may still end in its favour."""

STANDING = (SourceStage.GATE_WAIT, SourceStage.FREEZING, SourceStage.DRAINING, SourceStage.LAST_PASS)
"""The engine has stopped the guest, and no COMMIT has left."""

UNILATERAL = frozenset({SourceStage.SYNCING, SourceStage.PRECOPY, *STANDING})
"""The guest is ours and no COMMIT has left: the source ends the attempt alone (H4)."""

GIVEN = (SourceStage.SUBMITTED, SourceStage.COMMITTED, SourceStage.DISCARDING)
"""A COMMIT has left: the guest may be the destination's."""

ENDING = (SourceStage.ROLLING_BACK, SourceStage.RESUMING, SourceStage.RECORDING, SourceStage.DECLARING)
"""On the way back."""


def due_timers(state: SourceState) -> tuple[Timer, ...]:
    """Every wait has a bound. A guest that its operator stopped is not held to that of pre-copy: it has its full time
    again when it runs again."""
    if state.stage in STANDING:
        return (Timer.SWITCHOVER, *((Timer.GATE_WAIT,) if state.stage is SourceStage.GATE_WAIT else ()))
    if state.stage is SourceStage.SYNCING:
        return (Timer.DISKS,)
    if state.stage is not SourceStage.PRECOPY:
        return ()
    if state.suspended:
        return (Timer.SUSPENDED,)
    if state.paused:
        return ()
    waits = not state.acks.gate_open and not state.suspend_on_timeout
    return (Timer.PRECOPY, *((Timer.ACK,) if waits else ()))


def names(entries: tuple[AckRequest, ...]) -> tuple[str, ...]:
    """The devices of these requests, in order."""
    return tuple(entry.device for entry in entries)


def with_requests(acks: AckLedger, entries: tuple[AckRequest, ...]) -> AckLedger:
    """The ACK ledger with these requests noted, whoever asked."""
    for entry in entries:
        acks = acks.request(entry)
    return acks
