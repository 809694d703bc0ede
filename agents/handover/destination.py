"""PURE. The destination's half of one attempt: load, validate, wait for the ledger's word, take over.

The words are in `session.py`, the rules in docs/protocol.md. `destination_step` is the only mutator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

from agents.handover.words import (
    Command,
    Do,
    Event,
    GoSeen,
    Note,
    RecordRead,
    RecordSeen,
    Seen,
    WriteAbort,
)
from orchestrator.core import handover
from orchestrator.core.errors import AbortReason
from orchestrator.core.handover import GuestRecord
from orchestrator.core.ids import AttemptRef, HostRef


class DestinationStage(StrEnum):
    WAITING = "WAITING"
    """The VMM listens, paused; the stream and the shims' data arrive."""
    VALIDATING = "VALIDATING"
    LOADED = "LOADED"
    """Everything is here, validated and parked: only the ledger's word is missing."""
    MARKING = "MARKING"
    ACTIVATING = "ACTIVATING"
    STARTING = "STARTING"
    RECORDING_DONE = "RECORDING_DONE"
    GIVING_UP = "GIVING_UP"
    """This copy cannot become the guest any more: ABORT is being forced, then it is discarded."""
    ROLLING_BACK = "ROLLING_BACK"
    """Committed to us, but the VMM is dead and nothing had an effect: ownership goes back (H10)."""
    DECLARING = "DECLARING"
    DISCARDING = "DISCARDING"
    ENDED_DONE = "ENDED_DONE"
    ENDED_DISCARDED = "ENDED_DISCARDED"
    ENDED_CRASHED = "ENDED_CRASHED"

    @property
    def ended(self) -> bool:
        return self.name.startswith("ENDED")


@dataclass(frozen=True, slots=True)
class DestinationState:
    """The destination's half of one attempt."""

    ref: AttemptRef
    here: HostRef
    inc: str
    has_devices: bool = True
    stage: DestinationStage = DestinationStage.WAITING
    vmm_loaded: bool = False
    shims_loaded: bool = False
    vmm_dead: bool = False
    marker: bool = False
    """Written in this power cycle: something here may have had an effect on the guest."""
    committed: bool = False
    restarted: bool = False


DestinationStep = tuple[DestinationState, tuple[Command, ...]]


def restarted_destination(
    ref: AttemptRef, here: HostRef, inc: str, *, vmm_alive: bool, marker: bool
) -> DestinationStep:
    """A new agent process: what was loaded is not known any more, so it reads and, if still open, gives up."""
    state = DestinationState(ref, here, inc, vmm_dead=not vmm_alive, marker=marker, restarted=True)
    state = replace(state, stage=DestinationStage.GIVING_UP)
    return state, (Note("restarted"), Do.READ)


def destination_step(state: DestinationState, event: Event) -> DestinationStep:
    """The only mutator of a destination session."""
    if state.stage.ended:
        return state, ()
    match event:
        case RecordRead(record, _):
            return _arrival_record(state, record, fresh=True)
        case RecordSeen(record):
            return _arrival_record(state, record, fresh=False)
        case GoSeen(inc):
            return _take_over(state) if inc == state.inc else (state, ())
        case Seen():
            handler = _ARRIVAL.get(event)
            return handler(state) if handler else (state, ())
        case _:
            return state, ()


def _arrived(state: DestinationState) -> DestinationStep:
    """VMM and shims have everything. Validate before LOADED: after COMMIT a refusal would lose the guest."""
    complete = state.vmm_loaded and (state.shims_loaded or not state.has_devices)
    if state.stage is not DestinationStage.WAITING or not complete:
        return state, ()
    return replace(state, stage=DestinationStage.VALIDATING), (Do.VALIDATE,)


def _vmm_loaded(state: DestinationState) -> DestinationStep:
    return _arrived(replace(state, vmm_loaded=True))


def _shims_loaded(state: DestinationState) -> DestinationStep:
    return _arrived(replace(state, shims_loaded=True))


def _validated(state: DestinationState) -> DestinationStep:
    if state.stage is not DestinationStage.VALIDATING:
        return state, ()
    loaded = replace(state, stage=DestinationStage.LOADED)
    if state.committed:
        return _take_over(loaded)
    return loaded, (Note("loaded"), Do.SEND_LOADED)


def may_take_over(state: DestinationState, record: GuestRecord) -> bool:
    """H1, H8."""
    return handover.may_run_at_destination(record, state.here, state.inc)


def _arrival_record(state: DestinationState, record: GuestRecord, *, fresh: bool) -> DestinationStep:
    if fresh and state.stage in _WRITING:
        return _after_uncertain_write(state, record)
    if may_take_over(state, record):
        return _take_over(state)
    if handover.owns_for_good(record, state.here, state.inc):
        return _done_recorded(replace(state, committed=True))
    ref = state.ref
    if handover.is_over_for_destination(record, ref.migration, ref.attempt, state.inc) and (
        fresh or _is_newer(state, record)
    ):
        return _discard(state)
    if fresh and state.stage is DestinationStage.GIVING_UP:
        return state, (WriteAbort(_give_up_reason(state)),)
    return state, ()


_WRITING: dict[DestinationStage, Do] = {
    DestinationStage.RECORDING_DONE: Do.WRITE_DONE,
    DestinationStage.ROLLING_BACK: Do.WRITE_ROLLBACK,
    DestinationStage.DECLARING: Do.DECLARE_CRASHED,
}


def _after_uncertain_write(state: DestinationState, record: GuestRecord) -> DestinationStep:
    """Still COMMITTED to us: our write did not arrive, so it is repeated. Else it did, or somebody ended it."""
    if may_take_over(state, record):
        return state, (_WRITING[state.stage],)
    if state.stage is DestinationStage.RECORDING_DONE:
        return _done_recorded(state)
    if state.stage is DestinationStage.DECLARING:
        return replace(state, stage=DestinationStage.ENDED_CRASHED), ()
    return replace(state, stage=DestinationStage.ENDED_DISCARDED), ()


def _is_newer(state: DestinationState, record: GuestRecord) -> bool:
    """A watch may show what was before our attempt; only what comes from it, or after it, is news."""
    return record.migration == state.ref.migration and record.attempt >= state.ref.attempt


def _give_up_reason(state: DestinationState) -> AbortReason:
    return AbortReason.DESTINATION_RESTARTED if state.restarted else AbortReason.DESTINATION_LOST


def _take_over(state: DestinationState) -> DestinationStep:
    """COMMITTED with our inc. The marker comes before anything that could have an effect on the guest."""
    if state.stage not in (DestinationStage.VALIDATING, DestinationStage.LOADED, DestinationStage.GIVING_UP):
        return state, ()  # under way already: a repeated GO or watch is no news
    state = replace(state, committed=True)
    if state.vmm_dead:
        return _dead_owner(state)
    if state.stage is DestinationStage.GIVING_UP and state.marker:
        # Restarted after the marker: the VMM is alive, so it is started in place, never killed.
        return replace(state, stage=DestinationStage.ACTIVATING), (Do.ACTIVATE_SHIMS,)
    if state.stage in (DestinationStage.LOADED, DestinationStage.GIVING_UP):
        return replace(state, stage=DestinationStage.MARKING), (Note("take_over"), Do.WRITE_MARKER)
    return state, ()


def _marker_written(state: DestinationState) -> DestinationStep:
    if state.stage is not DestinationStage.MARKING:
        return state, ()
    state = replace(state, marker=True)
    if state.vmm_dead:
        return _dead_owner(state)
    return replace(state, stage=DestinationStage.ACTIVATING), (Do.ACTIVATE_SHIMS,)


def _marker_failed(state: DestinationState) -> DestinationStep:
    """Nothing may be activated without it: the copy is killed unused, then ownership goes back."""
    if state.stage is not DestinationStage.MARKING:
        return state, ()
    return replace(state, stage=DestinationStage.DISCARDING), (Note("marker_failed"), Do.DISCARD_DESTINATION)


def _activated(state: DestinationState) -> DestinationStep:
    if state.stage is not DestinationStage.ACTIVATING:
        return state, ()
    return replace(state, stage=DestinationStage.STARTING), (Do.START_GUEST,)


def _activation_failed(state: DestinationState) -> DestinationStep:
    """VMM alive: retry in place, never kill it. VMM dead with a marker: CRASHED."""
    if state.stage not in (DestinationStage.ACTIVATING, DestinationStage.STARTING):
        return state, ()
    if state.vmm_dead:
        return _dead_owner(state)
    return state, (Note("activation_failed"), Do.RETRY_LATER)


def _started(state: DestinationState) -> DestinationStep:
    if state.stage is not DestinationStage.STARTING:
        return state, ()
    return replace(state, stage=DestinationStage.RECORDING_DONE), (Note("running"), Do.ANNOUNCE, Do.WRITE_DONE)


def _done_recorded(state: DestinationState) -> DestinationStep:
    if state.stage not in (DestinationStage.RECORDING_DONE, DestinationStage.GIVING_UP):
        return state, ()
    return replace(state, stage=DestinationStage.ENDED_DONE), (Note("done"), Do.SEND_DONE)


def _dead_owner(state: DestinationState) -> DestinationStep:
    """Our VMM died. Committed to us without a marker it never ran: give the guest back. With one: CRASHED (H10)."""
    if not state.committed:
        if state.stage is DestinationStage.GIVING_UP:
            return state, ()
        return replace(state, stage=DestinationStage.GIVING_UP), (Do.SEND_FAILED, Do.GIVE_SOURCE_TIME)
    if state.marker:
        return replace(state, stage=DestinationStage.DECLARING), (Note("crashed"), Do.DECLARE_CRASHED)
    return replace(state, stage=DestinationStage.ROLLING_BACK), (Note("give_back"), Do.WRITE_ROLLBACK)


def _arrival_vmm_died(state: DestinationState) -> DestinationStep:
    state = replace(state, vmm_dead=True)
    if state.stage in (DestinationStage.DISCARDING, DestinationStage.ROLLING_BACK, DestinationStage.DECLARING):
        return state, ()
    if state.stage is DestinationStage.MARKING:
        return state, ()  # whether the marker is there is known in a moment
    if state.stage is DestinationStage.RECORDING_DONE:
        return state, ()  # DONE first; its record then names us, and a dead owner's VMM is declared by the guest keeper
    return _dead_owner(state)


def _give_up(state: DestinationState) -> DestinationStep:
    """The stream broke or a device refused: this copy is useless. The source is told, the ledger decides.

    The source most often ended the attempt itself and is about to write why: our ABORT would hide its reason.
    """
    if state.stage not in (DestinationStage.WAITING, DestinationStage.VALIDATING):
        return state, ()
    return replace(state, stage=DestinationStage.GIVING_UP), (Note("give_up"), Do.SEND_FAILED, Do.GIVE_SOURCE_TIME)


def _discard(state: DestinationState) -> DestinationStep:
    if state.stage is DestinationStage.DISCARDING:
        return state, ()
    return replace(state, stage=DestinationStage.DISCARDING), (Do.DISCARD_DESTINATION,)


def _arrival_discarded(state: DestinationState) -> DestinationStep:
    if state.stage is not DestinationStage.DISCARDING:
        return state, ()
    state = replace(state, vmm_dead=True)
    if state.committed:  # killed unused because the marker could not be written
        return _dead_owner(state)
    return replace(state, stage=DestinationStage.ENDED_DISCARDED), ()


def _arrival_uncertain(state: DestinationState) -> DestinationStep:
    waiting = (
        DestinationStage.GIVING_UP,
        DestinationStage.RECORDING_DONE,
        DestinationStage.ROLLING_BACK,
        DestinationStage.DECLARING,
    )
    return (state, (Do.RETRY_LATER,)) if state.stage in waiting else (state, ())


def _arrival_retry(state: DestinationState) -> DestinationStep:
    again: dict[DestinationStage, Do] = {
        DestinationStage.GIVING_UP: Do.READ,
        DestinationStage.RECORDING_DONE: Do.READ,
        DestinationStage.ROLLING_BACK: Do.READ,
        DestinationStage.DECLARING: Do.READ,
        DestinationStage.ACTIVATING: Do.ACTIVATE_SHIMS,
        DestinationStage.STARTING: Do.START_GUEST,
    }
    command = again.get(state.stage)
    return state, (command,) if command else ()


def _to(stage: DestinationStage, *sources: DestinationStage) -> Callable[[DestinationState], DestinationStep]:
    def handler(state: DestinationState) -> DestinationStep:
        return (replace(state, stage=stage), ()) if state.stage in sources else (state, ())

    return handler


def _abort_won(state: DestinationState) -> DestinationStep:
    return _discard(state) if state.stage is DestinationStage.GIVING_UP else (state, ())


_ARRIVAL = {
    Seen.COMPLETED: _vmm_loaded,
    Seen.SHIMS_LOADED: _shims_loaded,
    Seen.VALIDATED: _validated,
    Seen.MARKER_WRITTEN: _marker_written,
    Seen.MARKER_FAILED: _marker_failed,
    Seen.ACTIVATED: _activated,
    Seen.STARTED: _started,
    Seen.ACTIVATION_FAILED: _activation_failed,
    Seen.DONE_RECORDED: _done_recorded,
    Seen.VMM_DIED: _arrival_vmm_died,
    Seen.ENGINE_FAILED: _give_up,
    Seen.SHIM_FAILED: _give_up,
    Seen.ABORT_RECORDED: _abort_won,
    Seen.LEDGER_REFUSED: _arrival_uncertain,
    Seen.LEDGER_UNKNOWN: _arrival_uncertain,
    Seen.RETRY_DUE: _arrival_retry,
    Seen.DISCARDED: _arrival_discarded,
    Seen.ROLLBACK_RECORDED: _to(DestinationStage.ENDED_DISCARDED, DestinationStage.ROLLING_BACK),
    Seen.CRASH_RECORDED: _to(DestinationStage.ENDED_CRASHED, DestinationStage.DECLARING),
}
