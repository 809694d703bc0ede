"""PURE. The destination's half of one attempt: load, validate, wait for the ledger's word, take over.

The words are in `words.py`, the rules in docs/protocol.md. `destination_step` is the only mutator, and `TABLE`, at the
end, says which stage takes which event.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum

from agents.handover.table import Handler, InvalidTransition, Key, Row, ignored, key_of, table
from agents.handover.timers import Timers
from agents.handover.words import (
    Command,
    Do,
    Event,
    GoSeen,
    Note,
    Rang,
    RecordRead,
    RecordSeen,
    Seen,
    Timer,
    WriteAbort,
)
from orchestrator.core import handover
from orchestrator.core.errors import AbortReason
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import AttemptRef, HostRef


class DestinationStage(StrEnum):
    """How far the destination has come; the ENDED stages are final."""

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
        """Nothing follows any more, and no event is taken."""
        return self.name.startswith("ENDED")


@dataclass(frozen=True, slots=True)
class DestinationState:
    """The destination's half of one attempt."""

    ref: AttemptRef
    here: HostRef
    inc: str
    has_devices: bool = True
    has_disks: bool = False
    """Local disks come with the guest."""
    stage: DestinationStage = DestinationStage.WAITING
    vmm_loaded: bool = False
    shims_loaded: bool = False
    disks_released: bool = False
    vmm_dead: bool = False
    marker: bool = False
    """Written in this power cycle: something here may have had an effect on the guest."""
    committed: bool = False
    claimed: bool = False
    """The ledger has bound the attempt to this VMM: the source conducts it, within bounds of its own."""
    patient: bool = False
    """The source gets time to write down why it ended the attempt, before we do."""
    reason: AbortReason = AbortReason.DESTINATION_LOST
    """What our own ABORT would say."""
    timers: Timers = field(default_factory=Timers)


DestinationStep = tuple[DestinationState, tuple[Command, ...]]


def restarted_destination(
    ref: AttemptRef, here: HostRef, inc: str, *, vmm_alive: bool, marker: bool
) -> DestinationStep:
    """A new agent process: what was loaded is not known any more, so it reads and, if still open, gives up."""
    state = DestinationState(ref, here, inc, vmm_dead=not vmm_alive, marker=marker, stage=DestinationStage.GIVING_UP)
    state = replace(state, reason=AbortReason.DESTINATION_RESTARTED)
    return state, (Note("restarted"), Do.READ)


def destination_step(state: DestinationState, event: Event) -> DestinationStep:
    """The only mutator of a destination session. Raises InvalidTransition for an event that the stage does not take."""
    if isinstance(event, Rang):
        timers = state.timers.rang(event)
        if timers is None:
            return state, ()  # it was cancelled while its ring was on its way
        state = replace(state, timers=timers)
    handler = TABLE.get((state.stage, key_of(event)))
    if handler is None:
        raise InvalidTransition(state.ref, state.stage, event)
    return _timed(*(handler(state) if isinstance(event, Seen | Rang) else handler(state, event)))


def prepared_destination(
    ref: AttemptRef, here: HostRef, inc: str, *, has_devices: bool, has_disks: bool = False
) -> DestinationStep:
    """A VMM that listens for an attempt, and waits only so long for somebody to conduct it."""
    return _timed(DestinationState(ref, here, inc, has_devices=has_devices, has_disks=has_disks), ())


def due_timers(state: DestinationState) -> tuple[Timer, ...]:
    """Nothing runs once LOADED was said: only the ledger ends that wait."""
    if state.stage is DestinationStage.WAITING and not state.claimed:
        return (Timer.UNCLAIMED,)
    if state.stage is DestinationStage.GIVING_UP and state.patient:
        return (Timer.SOURCE_TIME,)
    return ()


def _timed(state: DestinationState, commands: tuple[Command, ...]) -> DestinationStep:
    timers, changes = state.timers.kept(due_timers(state))
    return (replace(state, timers=timers), (*changes, *commands)) if changes else (state, commands)


def _arrived(state: DestinationState) -> DestinationStep:
    """VMM and shims have everything, and nobody else uses the images (H16). Validate before LOADED: after COMMIT a
    refusal would lose the guest."""
    complete = state.vmm_loaded and (state.shims_loaded or not state.has_devices)
    complete = complete and (state.disks_released or not state.has_disks)
    if not complete:
        return state, ()
    return replace(state, stage=DestinationStage.VALIDATING), (Do.VALIDATE,)


def _vmm_loaded(state: DestinationState) -> DestinationStep:
    return _arrived(replace(state, vmm_loaded=True))


def _shims_loaded(state: DestinationState) -> DestinationStep:
    return _arrived(replace(state, shims_loaded=True))


def _disks_released(state: DestinationState) -> DestinationStep:
    return _arrived(replace(state, disks_released=True))


def _validated(state: DestinationState) -> DestinationStep:
    return replace(state, stage=DestinationStage.LOADED), (Note("loaded"), Do.SEND_LOADED)


def may_take_over(state: DestinationState, record: GuestRecord) -> bool:
    """H1, H8."""
    return handover.may_run_at_destination(record, state.here, state.inc)


def _is_over(state: DestinationState, record: GuestRecord) -> bool:
    ref = state.ref
    return handover.is_over_for_destination(record, ref.migration, ref.attempt, state.inc)


def _is_news(state: DestinationState, record: GuestRecord) -> bool:
    """A watch may show what was before our attempt; only what comes from it, or after it, is news."""
    return record.migration == state.ref.migration and record.attempt >= state.ref.attempt


def _news(state: DestinationState, event: RecordSeen) -> DestinationStep:
    """Somebody ended the attempt, or declared the guest dead: this copy is of no use."""
    record = event.record
    return _discard(state) if _is_news(state, record) and _is_over(state, record) else (state, ())


def _is_bound(state: DestinationState, record: GuestRecord) -> bool:
    """Bound once per attempt, so even an old copy of the fact is true."""
    ref = state.ref
    ours = (record.migration, record.attempt, record.inc) == (ref.migration, ref.attempt, state.inc)
    return ours and record.phase is Ownership.OPEN


def _news_while_waiting(state: DestinationState, event: RecordSeen) -> DestinationStep:
    return _news(replace(state, claimed=True) if _is_bound(state, event.record) else state, event)


def _unclaimed(state: DestinationState) -> DestinationStep:
    """Nobody was heard of in time: ask the ledger, and end the attempt only if it is not bound."""
    return replace(state, claimed=True), (Do.READ,)


def _read_unclaimed(state: DestinationState, event: RecordRead) -> DestinationStep:
    record = event.record
    if _is_over(state, record):
        return _discard(state)
    if _is_bound(state, record):
        return state, (Note("claimed late"),)
    state = replace(state, stage=DestinationStage.GIVING_UP, reason=AbortReason.PREPARE_TIMEOUT)
    return state, (Note("unclaimed"), WriteAbort(state.reason))


def _news_when_loaded(state: DestinationState, event: RecordSeen) -> DestinationStep:
    """The ledger's word, which needs no GO."""
    return _take_over(state) if may_take_over(state, event.record) else _news(state, event)


def _news_when_giving_up(state: DestinationState, event: RecordSeen) -> DestinationStep:
    record = event.record
    if handover.owns_for_good(record, state.here, state.inc):
        return _done_recorded(replace(state, committed=True))
    return _news_when_loaded(state, event)


def _news_of_done(state: DestinationState, event: RecordSeen) -> DestinationStep:
    """Our own DONE, faster than its answer."""
    if handover.owns_for_good(event.record, state.here, state.inc):
        return _done_recorded(state)
    return _news(state, event)


def _read(state: DestinationState, event: RecordRead) -> DestinationStep:
    """Behind a barrier: what it shows is so, and while it is still open we end it."""
    record = event.record
    if may_take_over(state, record):
        return _take_over(state)
    if handover.owns_for_good(record, state.here, state.inc):
        return _done_recorded(replace(state, committed=True))
    if _is_over(state, record):
        return _discard(state)
    return state, (WriteAbort(state.reason),)


_WRITING: dict[DestinationStage, Do] = {
    DestinationStage.RECORDING_DONE: Do.WRITE_DONE,
    DestinationStage.ROLLING_BACK: Do.WRITE_ROLLBACK,
    DestinationStage.DECLARING: Do.DECLARE_CRASHED,
}


def _read_after_write(state: DestinationState, event: RecordRead) -> DestinationStep:
    """Still COMMITTED to us: our write did not arrive, so it is repeated. Else it did, or somebody ended it."""
    if may_take_over(state, event.record):
        return state, (_WRITING[state.stage],)
    if state.stage is DestinationStage.RECORDING_DONE:
        return _done_recorded(state)
    if state.stage is DestinationStage.DECLARING:
        return replace(state, stage=DestinationStage.ENDED_CRASHED), ()
    return replace(state, stage=DestinationStage.ENDED_DISCARDED), ()


def _take_over(state: DestinationState, _go: GoSeen | None = None) -> DestinationStep:
    """COMMITTED with our inc. The marker comes before anything that could have an effect on the guest."""
    state = replace(state, committed=True)
    if state.vmm_dead:
        return _dead_owner(state)
    if state.stage is DestinationStage.GIVING_UP and state.marker:
        # Restarted after the marker: the VMM is alive, so it is started in place, never killed.
        return replace(state, stage=DestinationStage.ACTIVATING), (Do.ACTIVATE_SHIMS,)
    return replace(state, stage=DestinationStage.MARKING), (Note("take_over"), Do.WRITE_MARKER)


def _go_seen(state: DestinationState, event: GoSeen) -> DestinationStep:
    return _take_over(state) if event.inc == state.inc else (state, ())


def _marker_written(state: DestinationState) -> DestinationStep:
    state = replace(state, marker=True)
    if state.vmm_dead:
        return _dead_owner(state)
    return replace(state, stage=DestinationStage.ACTIVATING), (Do.ACTIVATE_SHIMS,)


def _marker_failed(state: DestinationState) -> DestinationStep:
    """Nothing may be activated without it: the copy is killed unused, then ownership goes back."""
    return replace(state, stage=DestinationStage.DISCARDING), (Note("marker_failed"), Do.DISCARD_DESTINATION)


def _activated(state: DestinationState) -> DestinationStep:
    return replace(state, stage=DestinationStage.STARTING), (Do.START_GUEST,)


def _activation_failed(state: DestinationState) -> DestinationStep:
    """VMM alive: retry in place, never kill it. VMM dead with a marker: CRASHED."""
    if state.vmm_dead:
        return _dead_owner(state)
    return state, (Note("activation_failed"), Do.RETRY_LATER)


def _started(state: DestinationState) -> DestinationStep:
    return replace(state, stage=DestinationStage.RECORDING_DONE), (Note("running"), Do.ANNOUNCE, Do.WRITE_DONE)


def _arrived_ended(state: DestinationState) -> DestinationStep:
    """It shut down as it was stopped, and came as it was: it is ours, and stays as it is. Nobody has to hear of it."""
    return replace(state, stage=DestinationStage.RECORDING_DONE), (Do.WRITE_DONE,)


def _done_recorded(state: DestinationState) -> DestinationStep:
    return replace(state, stage=DestinationStage.ENDED_DONE), (Note("done"), Do.SEND_DONE)


def _dead_owner(state: DestinationState) -> DestinationStep:
    """Our VMM died. Committed to us without a marker it never ran: give the guest back. With one: CRASHED (H10)."""
    if not state.committed:
        if state.stage is DestinationStage.GIVING_UP:
            return state, ()
        return replace(state, stage=DestinationStage.GIVING_UP, patient=True), (Do.SEND_FAILED,)
    if state.marker:
        return replace(state, stage=DestinationStage.DECLARING), (Note("crashed"), Do.DECLARE_CRASHED)
    return replace(state, stage=DestinationStage.ROLLING_BACK), (Note("give_back"), Do.WRITE_ROLLBACK)


def _vmm_died(state: DestinationState) -> DestinationStep:
    return _dead_owner(replace(state, vmm_dead=True))


def _vmm_death_noted(state: DestinationState) -> DestinationStep:
    return replace(state, vmm_dead=True), ()


def _give_up(state: DestinationState) -> DestinationStep:
    """The stream broke or a device refused: this copy is useless. The source is told, the ledger decides.

    The source most often ended the attempt itself and is about to write why: our ABORT would hide its reason.
    """
    return replace(state, stage=DestinationStage.GIVING_UP, patient=True), (Note("give_up"), Do.SEND_FAILED)


def _source_had_its_time(state: DestinationState) -> DestinationStep:
    return replace(state, patient=False), (Do.READ,)


def _discard(state: DestinationState) -> DestinationStep:
    return replace(state, stage=DestinationStage.DISCARDING), (Do.DISCARD_DESTINATION,)


def _discarded(state: DestinationState) -> DestinationStep:
    state = replace(state, vmm_dead=True)
    if state.committed:  # killed unused because the marker could not be written
        return _dead_owner(state)
    return replace(state, stage=DestinationStage.ENDED_DISCARDED), ()


def _try_later(state: DestinationState) -> DestinationStep:
    return state, (Do.RETRY_LATER,)


def _read_again(state: DestinationState) -> DestinationStep:
    return state, (Do.READ,)


def _activate_again(state: DestinationState) -> DestinationStep:
    return state, (Do.ACTIVATE_SHIMS,)


def _start_again(state: DestinationState) -> DestinationStep:
    return state, (Do.START_GUEST,)


def _given_back(state: DestinationState) -> DestinationStep:
    return replace(state, stage=DestinationStage.ENDED_DISCARDED), ()


def _crash_recorded(state: DestinationState) -> DestinationStep:
    return replace(state, stage=DestinationStage.ENDED_CRASHED), ()


# --- which stage takes which event ------------------------------------------------------------------------------------

_WAITING, _VALIDATING, _LOADED = DestinationStage.WAITING, DestinationStage.VALIDATING, DestinationStage.LOADED
_MARKING, _ACTIVATING, _STARTING = DestinationStage.MARKING, DestinationStage.ACTIVATING, DestinationStage.STARTING
_RECORDING_DONE, _GIVING_UP = DestinationStage.RECORDING_DONE, DestinationStage.GIVING_UP
_ROLLING_BACK, _DECLARING = DestinationStage.ROLLING_BACK, DestinationStage.DECLARING
_DISCARDING = DestinationStage.DISCARDING

_OURS = (_MARKING, _ACTIVATING, _STARTING, _RECORDING_DONE)
"""Committed to us, and on the way to DONE."""

_NOT_WAITING = tuple(stage for stage in DestinationStage if stage is not _WAITING and not stage.ended)

_ROWS: tuple[Row[DestinationStage], ...] = (
    # --- loading
    # Memory and devices come by two ways, in any order; with both here they are validated.
    (Seen.COMPLETED, (_WAITING,), _vmm_loaded),
    (Seen.SHIMS_LOADED, (_WAITING,), _shims_loaded),
    # Given up or ended while the rest was on its way; a status change may come twice.
    (Seen.COMPLETED, (_VALIDATING, _LOADED, _GIVING_UP, _DISCARDING), ignored),
    (Seen.SHIMS_LOADED, (_GIVING_UP, _DISCARDING), ignored),
    # Local disks are complete, and ours alone. The source repeats it until it has heard LOADED.
    (Seen.DISKS_RELEASED, (_WAITING,), _disks_released),
    (Seen.DISKS_RELEASED, _NOT_WAITING, ignored),
    (Seen.DISKS_FAILED, (_WAITING,), _give_up),
    (Seen.DISKS_FAILED, _NOT_WAITING, ignored),
    # Everything is here and fits: only the ledger's word is missing.
    (Seen.VALIDATED, (_VALIDATING,), _validated),
    # Given up or ended while it was validated.
    (Seen.VALIDATED, (_GIVING_UP, _DISCARDING), ignored),
    # The stream broke, or a device refuses what came.
    (Seen.ENGINE_FAILED, (_WAITING, _VALIDATING), _give_up),
    (Seen.SHIM_FAILED, (_WAITING, _VALIDATING), _give_up),
    # Our own end of the attempt breaks streams too, and several devices may refuse.
    (Seen.ENGINE_FAILED, (_GIVING_UP, _ROLLING_BACK, _DISCARDING), ignored),
    (Seen.SHIM_FAILED, (_GIVING_UP, _ROLLING_BACK, _DISCARDING), ignored),
    # --- the ledger's word
    # GO, once everything is loaded; and after a restart, when what was loaded is known from the ledger only.
    (GoSeen, (_LOADED, _GIVING_UP), _go_seen),
    # The source repeats it until DONE is known.
    (GoSeen, (*_OURS, _ROLLING_BACK, _DECLARING, _DISCARDING), ignored),
    # Nothing can be committed to a copy that has not said LOADED: that it is conducted, or over, is news.
    (RecordSeen, (_WAITING,), _news_while_waiting),
    (RecordSeen, (_VALIDATING,), _news),
    # COMMITTED with our inc counts as much as GO, however old the watch (H8).
    (RecordSeen, (_LOADED,), _news_when_loaded),
    (RecordSeen, (_GIVING_UP,), _news_when_giving_up),
    # Under way already. A guest that was declared dead meanwhile must not run.
    (RecordSeen, (_MARKING, _ACTIVATING, _STARTING), _news),
    (RecordSeen, (_RECORDING_DONE,), _news_of_done),
    # What is being written decides; a discard cannot be taken back.
    (RecordSeen, (_ROLLING_BACK, _DECLARING, _DISCARDING), ignored),
    # Behind a barrier, before we end the attempt ourselves.
    (RecordRead, (_GIVING_UP,), _read),
    # Our write had no clear answer.
    (RecordRead, (_RECORDING_DONE, _ROLLING_BACK, _DECLARING), _read_after_write),
    # Nobody had been heard of in time.
    (RecordRead, (_WAITING,), _read_unclaimed),
    # The attempt went on, or a watch or GO told the outcome, while the read was under way.
    (RecordRead, (_VALIDATING, _LOADED, _MARKING, _ACTIVATING, _STARTING, _DISCARDING), ignored),
    # --- taking over
    (Seen.MARKER_WRITTEN, (_MARKING,), _marker_written),
    (Seen.MARKER_FAILED, (_MARKING,), _marker_failed),
    (Seen.ACTIVATED, (_ACTIVATING,), _activated),
    (Seen.STARTED, (_STARTING,), _started),
    # It cannot be set going because it has ended, which no second try changes.
    (Seen.GUEST_ENDED, (_STARTING,), _arrived_ended),
    # The VMM died, or the guest was declared dead, while it was done.
    (Seen.GUEST_ENDED, (_DECLARING, _DISCARDING), ignored),
    (Seen.MARKER_WRITTEN, (_DISCARDING,), ignored),
    (Seen.MARKER_FAILED, (_DISCARDING,), ignored),
    (Seen.ACTIVATED, (_DECLARING, _DISCARDING), ignored),
    (Seen.STARTED, (_DECLARING, _DISCARDING), ignored),
    # Our copy, or a device of it, cannot be set going: tried again in place while its VMM lives.
    (Seen.ACTIVATION_FAILED, (_ACTIVATING, _STARTING), _activation_failed),
    # Most often because the VMM died.
    (Seen.ACTIVATION_FAILED, (_DECLARING, _DISCARDING), ignored),
    (Seen.DONE_RECORDED, (_RECORDING_DONE,), _done_recorded),
    # --- giving up
    # Our ABORT won (H6).
    (Seen.ABORT_RECORDED, (_GIVING_UP,), _discard),
    # A watch showed it first.
    (Seen.ABORT_RECORDED, (_DISCARDING,), ignored),
    (Seen.DISCARDED, (_DISCARDING,), _discarded),
    (Seen.ROLLBACK_RECORDED, (_ROLLING_BACK,), _given_back),
    (Seen.CRASH_RECORDED, (_DECLARING,), _crash_recorded),
    # The write has no clear answer, or somebody was first: read, after a pause.
    (Seen.LEDGER_REFUSED, (_GIVING_UP, _RECORDING_DONE, _ROLLING_BACK, _DECLARING), _try_later),
    (Seen.LEDGER_UNKNOWN, (_GIVING_UP, _RECORDING_DONE, _ROLLING_BACK, _DECLARING), _try_later),
    # An ABORT that lost its race with the COMMIT, or with the ABORT of somebody else: a watch told so first.
    (Seen.LEDGER_REFUSED, (_MARKING, _ACTIVATING, _STARTING, _DISCARDING), ignored),
    (Seen.LEDGER_UNKNOWN, (_MARKING, _ACTIVATING, _STARTING, _DISCARDING), ignored),
    # The pause is over.
    (Seen.RETRY_DUE, (_GIVING_UP, _RECORDING_DONE, _ROLLING_BACK, _DECLARING), _read_again),
    (Seen.RETRY_DUE, (_ACTIVATING,), _activate_again),
    (Seen.RETRY_DUE, (_STARTING,), _start_again),
    # No ledger yet to say whether the attempt is conducted.
    (Seen.RETRY_DUE, (_WAITING,), _read_again),
    # The attempt went on, or its outcome was told, during it.
    (Seen.RETRY_DUE, (_VALIDATING, _LOADED, _MARKING, _DISCARDING), ignored),
    # --- time: a ring that comes after its timer was cancelled is dropped by its number
    # A prepared VMM that nobody conducts ends by itself.
    (Timer.UNCLAIMED, (_WAITING,), _unclaimed),
    # The source has written nothing: we do.
    (Timer.SOURCE_TIME, (_GIVING_UP,), _source_had_its_time),
    # --- the death of our VMM
    (Seen.VMM_DIED, (_WAITING, _VALIDATING, _LOADED, _GIVING_UP, _ACTIVATING, _STARTING), _vmm_died),
    # Whether the marker is there is known in a moment.
    (Seen.VMM_DIED, (_MARKING,), _vmm_death_noted),
    # DONE first: its record then names us, and the guest's keeper declares the dead owner's VMM.
    (Seen.VMM_DIED, (_RECORDING_DONE,), _vmm_death_noted),
    # We killed it, or it is being written down already.
    (Seen.VMM_DIED, (_DISCARDING, _ROLLING_BACK, _DECLARING), _vmm_death_noted),
)

TABLE: dict[tuple[DestinationStage, Key], Handler] = table(_ROWS)
"""(stage, event) -> what becomes of it. What is not in here, a stage does not take."""
