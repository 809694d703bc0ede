"""PURE. The source's half of one attempt as one machine: `source_step`, and `TABLE` that says which stage takes which
event, each edge with its reason.
"""

from __future__ import annotations

from dataclasses import replace

from agents.handover.source import back, blackout, outcome, precopy
from agents.handover.source.state import ENDING, GIVEN, STANDING, UNILATERAL, SourceStage, SourceState, Step, due_timers
from agents.handover.table import Handler, InvalidTransition, Key, Row, ignored, key_of, table
from agents.handover.words import (
    Acked,
    Command,
    DevicesLost,
    DiskFailed,
    Do,
    Drained,
    Event,
    FoundLate,
    LoadedReport,
    Note,
    Quiesced,
    Rang,
    RecordRead,
    RecordSeen,
    Requested,
    RequestsSeen,
    RequestsWritten,
    Seen,
    Timer,
    WantRunSeen,
)
from orchestrator.core.errors import AbortReason
from orchestrator.core.ids import AttemptRef, HostRef


def source_step(state: SourceState, event: Event) -> Step:
    """The only mutator of a source session. Raises InvalidTransition for an event that the stage does not take."""
    if isinstance(event, Rang):
        timers = state.timers.rang(event)
        if timers is None:
            return state, ()  # it was cancelled while its ring was on its way
        state = replace(state, timers=timers)
    handler = TABLE.get((state.stage, key_of(event)))
    if handler is None:
        raise InvalidTransition(state.ref, state.stage, event)
    return _timed(*(handler(state) if isinstance(event, Seen | Rang) else handler(state, event)))


def _timed(state: SourceState, commands: tuple[Command, ...]) -> Step:
    timers, changes = state.timers.kept(due_timers(state))
    return (replace(state, timers=timers), (*changes, *commands)) if changes else (state, commands)


def restarted_source(ref: AttemptRef, here: HostRef, inc: str, *, want_run: bool, parked: bool, sealed: bool) -> Step:
    """H7: a new agent process finds the VMM of an unfinished attempt, whose conductor died with its evidence.

    Sealed: a COMMIT may be in flight, so an outcome is forced first (barrier, ABORT, obey the winner). Everything else
    was never submitted: the guest comes up at once and the ABORT is written afterwards (H4).
    """
    state = SourceState(
        ref, here, inc, want_run=want_run, restarted=True, sealed=sealed, reason=AbortReason.SOURCE_RESTARTED
    )
    if sealed:
        return replace(state, stage=SourceStage.SUBMITTED, submitted=True), (Do.READ,)
    note = Note("restarted", "parked" if parked else "running")
    return replace(state, stage=SourceStage.ROLLING_BACK), (note, Do.ROLL_BACK_SHIMS)


# --- which stage takes which event ------------------------------------------------------------------------------------

_NEW, _BINDING = SourceStage.NEW, SourceStage.BINDING
_SYNCING, _PRECOPY, _DRAINING = SourceStage.SYNCING, SourceStage.PRECOPY, SourceStage.DRAINING
_GATE_WAIT, _FREEZING, _LAST_PASS = SourceStage.GATE_WAIT, SourceStage.FREEZING, SourceStage.LAST_PASS
_SUBMITTED, _COMMITTED, _DISCARDING = SourceStage.SUBMITTED, SourceStage.COMMITTED, SourceStage.DISCARDING
_ROLLING_BACK, _RESUMING = SourceStage.ROLLING_BACK, SourceStage.RESUMING
_RECORDING, _DECLARING = SourceStage.RECORDING, SourceStage.DECLARING

_ROWS: tuple[Row[SourceStage], ...] = (
    # The agent accepted the attempt: the ledger has to name the destination's process before anything moves.
    (Seen.BEGIN, (_NEW,), precopy.begin),
    # It names it: copying may begin.
    (Seen.BOUND, (_BINDING,), precopy.bound),
    # The attempt was ended while the bind was under way; what ends it stands behind it in the queue.
    (Seen.BOUND, (_RECORDING, _DECLARING), ignored),
    # Local disks are up to date: now the memory. Or the attempt was ended just before.
    (Seen.DISKS_READY, (_SYNCING,), precopy.disks_ready),
    (Seen.DISKS_READY, (_ROLLING_BACK, _RESUMING, _RECORDING, _DECLARING), ignored),
    # Every device has begun and the engine has accepted: from now on the gate may open.
    (Seen.ACTIVE, (_PRECOPY,), precopy.active),
    # The engine had parked, or the attempt was ended, before its acceptance was taken in. Only the gate asks for it.
    (Seen.ACTIVE, (*STANDING, _ROLLING_BACK, _DECLARING), ignored),
    # --- the gate: requests, ACKs, vital signs
    # A device asks for an ACK while it may still be granted, or found late.
    (Requested, (_SYNCING, _PRECOPY, _GATE_WAIT, _FREEZING), precopy.requested),
    # After the check a device's own request is served in stop-copy (R30), after the end it is nobody's.
    (Requested, (_DRAINING, _LAST_PASS, *GIVEN, *ENDING), blackout.requested_too_late),
    # It may open the gate, or end the wait for it.
    (Acked, (_SYNCING, _PRECOPY, _GATE_WAIT), precopy.acked),
    # Late: it opens no gate any more, but the check and the report know of it.
    (Acked, (_FREEZING, _DRAINING, _LAST_PASS, *GIVEN, *ENDING), blackout.ack_noted),
    # Our request is durable, so it no longer keeps the gate closed; what others asked for is learnt with it. After the
    # freeze a version that has moved is a late request.
    (RequestsWritten, (_SYNCING, _PRECOPY, *STANDING), precopy.requests_written),
    # Requests are written in a lane of their own, whose answers wait for nobody.
    (RequestsWritten, (*GIVEN, *ENDING), ignored),
    # Somebody asked through the ledger; a request of the attempt before may be seen before this one is bound.
    (RequestsSeen, (_NEW, _BINDING, _SYNCING, _PRECOPY, _GATE_WAIT), precopy.requests_learnt),
    # The guest stands: H14.
    (RequestsSeen, (_FREEZING, _DRAINING, _LAST_PASS), blackout.requests_late),
    # The COMMIT's own check decides, or the attempt is ended anyway; the reason may have to name who asked.
    (RequestsSeen, (*GIVEN, *ENDING), outcome.requests_noted),
    # The gate opens only while peer and quorum answer.
    (Seen.VITALS_GOOD, (_NEW, _BINDING, _SYNCING, _PRECOPY), precopy.pulse(True)),
    (Seen.VITALS_BAD, (_NEW, _BINDING, _SYNCING, _PRECOPY), precopy.pulse(False)),
    # The pulse is felt to the session's end; only the gate asks for it.
    (Seen.VITALS_GOOD, (*STANDING, *GIVEN, *ENDING), ignored),
    (Seen.VITALS_BAD, (*STANDING, *GIVEN, *ENDING), ignored),
    # --- the freeze, the check, the last pass
    # The engine stopped the guest when it liked: the blackout begins.
    (Seen.PARKED, (_PRECOPY,), precopy.parked),
    # Status changes are hints and may come twice; or the abort was decided just before.
    (Seen.PARKED, (*STANDING, _ROLLING_BACK), ignored),
    # Every device stands still: the one check, then the last pass or the way back.
    (Quiesced, (_FREEZING,), blackout.check),
    # The attempt was ended while the devices were being stopped; the roll-back stands behind that in the queue.
    (Quiesced, (_ROLLING_BACK, _DECLARING), ignored),
    # The rest of the local disks has arrived: the last pass.
    (Drained, (_DRAINING,), blackout.drained),
    # The attempt was ended meanwhile. The point is noted all the same, for the next one.
    (Drained, (_ROLLING_BACK, _DECLARING), ignored),
    # Two of the three things that a COMMIT needs.
    (Seen.COMPLETED, (_LAST_PASS,), blackout.completed),
    (Seen.SHIMS_SENT, (_LAST_PASS,), blackout.sent),
    # Completed before the abort took effect: ABORT_ENGINE says so itself. Or a hint that came twice.
    (Seen.COMPLETED, (_SUBMITTED, _ROLLING_BACK), ignored),
    # The devices' streams run beside everything else, and may end after the attempt.
    (Seen.SHIMS_SENT, ENDING, ignored),
    # The third: the destination holds, validated, what was sent.
    (LoadedReport, (_LAST_PASS,), blackout.loaded),
    # The destination repeats it until the attempt is over.
    (LoadedReport, (*GIVEN, *ENDING), ignored),
    # --- the COMMIT and after it
    # Ours: GO to the destination.
    (Seen.COMMITTED, (_SUBMITTED,), outcome.committed),
    # A watch was faster than the answer to the COMMIT; also with what came after it, to a roll-back by the destination.
    (Seen.COMMITTED, (_COMMITTED, _DISCARDING, _ROLLING_BACK, _DECLARING), ignored),
    # H9: the destination took over; the answer to the COMMIT may be missing still.
    (Seen.DONE_KNOWN, (_SUBMITTED, _COMMITTED), outcome.done_known),
    # The ledger was faster, or the destination said it twice.
    (Seen.DONE_KNOWN, (_DISCARDING,), ignored),
    (Seen.DISCARDED, (_DISCARDING,), outcome.discarded),
    # --- what the record says
    # A conflict or a lost answer of the COMMIT or of an ABORT: the content decides (H5).
    (RecordRead, (_SUBMITTED,), outcome.read_after_submit),
    (RecordRead, (_RECORDING,), outcome.read_while_recording),
    (RecordRead, (_DECLARING,), outcome.read_while_declaring),
    # A watch told the outcome while the read was under way: the read is no older.
    (RecordRead, (_COMMITTED,), outcome.news_after_submit),
    (RecordRead, (_ROLLING_BACK,), outcome.news_at_the_end),
    # Nothing can be newer than DONE.
    (RecordRead, (_DISCARDING,), ignored),
    # Cancelled, or ended by the destination or the coordinator.
    (RecordSeen, (_NEW, _BINDING, _SYNCING, _PRECOPY, *STANDING), outcome.news),
    # The outcome of a COMMIT whose answer is late or lost; DONE; a roll-back by the destination.
    (RecordSeen, (_SUBMITTED, _COMMITTED), outcome.news_after_submit),
    (RecordSeen, (_ROLLING_BACK, _RESUMING, _RECORDING), outcome.news_at_the_end),
    # DONE was the last word; a crash is declared whatever the watch shows.
    (RecordSeen, (_DISCARDING, _DECLARING), ignored),
    # --- answers of the ledger
    # Our ABORT, after the guest came up or in the race with the COMMIT (H6).
    (Seen.ABORT_RECORDED, (_RECORDING,), back.ended),
    (Seen.ABORT_RECORDED, (_SUBMITTED,), outcome.refused),
    # A watch showed it before its answer came; or the VMM died while it was written.
    (Seen.ABORT_RECORDED, (_ROLLING_BACK, _DECLARING), ignored),
    # Not bound: nothing was begun.
    (Seen.LEDGER_REFUSED, (_BINDING,), back.fails(AbortReason.LEDGER_UNREACHABLE)),
    (Seen.LEDGER_UNKNOWN, (_BINDING,), back.fails(AbortReason.LEDGER_UNREACHABLE)),
    # A request that cannot be made durable: the gate would stay closed for good.
    (Seen.LEDGER_REFUSED, (_SYNCING, _PRECOPY), precopy.request_not_written),
    (Seen.LEDGER_UNKNOWN, (_SYNCING, _PRECOPY), precopy.request_not_written),
    # COMMIT, ABORT or CRASHED without a clear answer.
    (Seen.LEDGER_REFUSED, (_SUBMITTED, _RECORDING, _DECLARING), outcome.read_then_decide),
    (Seen.LEDGER_UNKNOWN, (_SUBMITTED, _RECORDING, _DECLARING), outcome.read_then_decide),
    # The lane of requests answers at any time: while the guest stands, the check and _GATE_WAIT's own bound decide.
    # After a COMMIT or on the way back: an older write whose outcome a watch has told.
    (Seen.LEDGER_REFUSED, (*STANDING, _COMMITTED, _DISCARDING, _ROLLING_BACK, _RESUMING), ignored),
    (Seen.LEDGER_UNKNOWN, (*STANDING, _COMMITTED, _DISCARDING, _ROLLING_BACK, _RESUMING), ignored),
    (Seen.CRASH_RECORDED, (_DECLARING,), back.crash_recorded),
    # A bounded pause is over: what was uncertain is tried again.
    (Seen.RETRY_DUE, (_SUBMITTED,), outcome.read_then_decide),
    (Seen.RETRY_DUE, (_RECORDING,), outcome.abort_again),
    (Seen.RETRY_DUE, (_DECLARING,), back.declare_again),
    # A watch told the outcome meanwhile.
    (Seen.RETRY_DUE, (_COMMITTED, _DISCARDING, _ROLLING_BACK), ignored),
    # --- the way back
    (Seen.SHIMS_BACK, (_ROLLING_BACK,), back.shims_back),
    (Seen.SHIMS_BACK_RESET, (_ROLLING_BACK,), back.shims_back_reset),
    (Seen.ENGINE_OVER, (_ROLLING_BACK,), back.engine_over),
    (Seen.ENGINE_SEALED, (_ROLLING_BACK,), back.engine_sealed),
    (DevicesLost, (_ROLLING_BACK,), back.devices_lost),
    # The VMM died on the way: what it was asked for does not matter any more.
    (Seen.SHIMS_BACK, (_DECLARING,), ignored),
    (Seen.SHIMS_BACK_RESET, (_DECLARING,), ignored),
    (Seen.ENGINE_OVER, (_DECLARING,), ignored),
    (Seen.ENGINE_SEALED, (_DECLARING,), ignored),
    (DevicesLost, (_DECLARING,), ignored),
    # The VMM's own verdict on the devices inside it, whenever it comes while the guest is ours.
    (FoundLate, tuple(UNILATERAL), back.found_late),
    # Its names take a moment to find, and its symptoms may be heard first.
    (FoundLate, (_ROLLING_BACK,), back.found_late_after),
    # The reason is being written already.
    (FoundLate, (_RESUMING, _RECORDING, _DECLARING), ignored),
    # --- stopped and started on purpose
    (WantRunSeen, (_NEW, _BINDING, _SYNCING, _PRECOPY), precopy.want_run),
    (WantRunSeen, (*STANDING, *GIVEN, _ROLLING_BACK, _RESUMING, _DECLARING), outcome.wish_noted),
    (WantRunSeen, (_RECORDING,), back.wish_at_the_end),
    # The operator's or policy's stop took effect before the freeze.
    (Seen.PAUSED, (_BINDING, _SYNCING, _PRECOPY), precopy.paused),
    # As wished, at the end of the attempt.
    (Seen.PAUSED, (_RESUMING,), back.paused_again),
    # The engine parked between the stop and its answer: it counts as a wish then. Or the attempt was ended, and what
    # ends it looks at the wish once more.
    (Seen.PAUSED, (*STANDING, _ROLLING_BACK, _RECORDING, _DECLARING), ignored),
    # The engine was faster, or the VMM refused: the wish is applied at the end.
    (Seen.PAUSE_QUEUED, (_BINDING, _SYNCING, _PRECOPY, *STANDING, _ROLLING_BACK, _RECORDING), precopy.pause_queued),
    # It cannot be stopped now. The attempt is over all the same, and who keeps the guest applies the wish.
    (Seen.PAUSE_QUEUED, (_RESUMING,), back.record_abort),
    (Seen.PAUSE_QUEUED, (_DECLARING,), ignored),
    # Within its attempt: the gate is judged anew.
    (Seen.RESUMED, (_BINDING, _SYNCING, _PRECOPY), precopy.resumed),
    (Seen.RESUMED, (_RESUMING,), back.resumed_again),
    # It ran again for a moment before the engine stopped it: what counted for a stopped guest is no longer true.
    (Seen.RESUMED, STANDING, back.fails(AbortReason.GUEST_RESUMED)),
    # The attempt was ended meanwhile; what ends it looks at the wish once more.
    (Seen.RESUMED, (_ROLLING_BACK, _RECORDING, _DECLARING), ignored),
    (Seen.RESUME_FAILED, (_RESUMING,), back.resume_failed),
    # The engine had parked, or refuses for now: the wish is applied by whoever ends as owner.
    (Seen.RESUME_FAILED, (_BINDING, _SYNCING, _PRECOPY, *STANDING, _ROLLING_BACK, _RECORDING, _DECLARING), ignored),
    # --- time: a timer runs only where `due_timers` says so, and a ring that comes later is dropped by its number
    # Local disks are copied for as long as their size lets expect.
    (Timer.DISKS, (_SYNCING,), precopy.disks_take_too_long),
    # It does not converge: end the attempt, or stop the guest for its sake.
    (Timer.PRECOPY, (_PRECOPY,), precopy.precopy_is_over),
    (Timer.SUSPENDED, (_PRECOPY,), precopy.suspended_in_vain),
    # A gate that stays closed for one device; each closing has its own full time.
    (Timer.ACK, (_PRECOPY,), precopy.ack_is_missing),
    # As long as policy lets a guest that the engine stopped wait for an ACK.
    (Timer.GATE_WAIT, (_GATE_WAIT,), precopy.gate_stayed_closed),
    # From the moment the engine stopped the guest, whatever is being done since: it runs on here.
    (Timer.SWITCHOVER, STANDING, blackout.stands_too_long),
    # --- faults
    (Seen.ENGINE_FAILED, tuple(UNILATERAL), back.fails(AbortReason.ENGINE_FAILED)),
    (Seen.SHIM_FAILED, tuple(UNILATERAL), back.fails(AbortReason.SHIM_FAILED)),
    # H15: no mirror, no last pass.
    (DiskFailed, tuple(UNILATERAL), back.disk_failed),
    # Our own abort ends mirrors too; after the COMMIT has left, the ledger alone decides (H5).
    (DiskFailed, (*GIVEN, *ENDING), ignored),
    (Seen.DEST_FAILED, (_NEW, _BINDING, *UNILATERAL), back.fails(AbortReason.DESTINATION_LOST)),
    # The same failure is told by a call and by an event, or by several devices; our own abort breaks streams too. After
    # the COMMIT has left, the ledger alone decides (H5).
    (Seen.ENGINE_FAILED, (*GIVEN, *ENDING), ignored),
    (Seen.SHIM_FAILED, (*GIVEN, *ENDING), ignored),
    (Seen.DEST_FAILED, (*GIVEN, *ENDING), ignored),
    # It shut down by itself: nothing to move.
    (Seen.GUEST_ENDED, (_NEW, _BINDING, *UNILATERAL), back.fails(AbortReason.GUEST_ENDED)),
    (Seen.GUEST_ENDED, (_RESUMING,), back.guest_is_gone),
    # On the way back: RESUME will find it. Given: the destination has a guest that has ended. Else its keeper sees it.
    (Seen.GUEST_ENDED, (*GIVEN, _ROLLING_BACK, _RECORDING, _DECLARING), ignored),
    # A crash of the owner's VMM.
    (
        Seen.VMM_DIED,
        (_NEW, _BINDING, *(UNILATERAL - {_LAST_PASS}), _ROLLING_BACK, _RESUMING, _RECORDING),
        back.vmm_gone,
    ),
    (Seen.VMM_DIED, (_LAST_PASS,), blackout.vmm_died_in_last_pass),
    # It matters only if the guest turns out to be ours.
    (Seen.VMM_DIED, GIVEN, outcome.vmm_death_noted),
    # Told by its process and by the call that found it so.
    (Seen.VMM_DIED, (_DECLARING,), ignored),
)

TABLE: dict[tuple[SourceStage, Key], Handler] = table(_ROWS)
"""(stage, event) -> what becomes of it. What is not in here, a stage does not take."""
