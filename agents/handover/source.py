"""PURE. The source's half of one attempt: hold, freeze, check, seal, submit, and every way back.

The words are in `words.py`, the rules in docs/protocol.md. `source_step` is the only mutator, and `TABLE`, at the end,
says which stage takes which event.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum

from agents.handover.table import Handler, InvalidTransition, Key, Row, ignored, key_of, table
from agents.handover.timers import Timers
from agents.handover.words import (
    Acked,
    Command,
    Commit,
    DevicesLost,
    Do,
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
    WriteAbort,
    WriteRequests,
)
from orchestrator.core import handover
from orchestrator.core.errors import AbortReason
from orchestrator.core.handover import GuestRecord, Ownership, Verdict
from orchestrator.core.ids import AckRequest, AttemptRef, HostRef
from orchestrator.core.switchover import AckLedger


class SourceStage(StrEnum):
    NEW = "NEW"
    BINDING = "BINDING"
    PRECOPY = "PRECOPY"
    GATE_WAIT = "GATE_WAIT"
    """The engine stopped the guest under a closed gate, and policy allows a bounded wait for the ACK."""
    FREEZING = "FREEZING"
    """The engine has stopped the guest; shims are quiesced; the check comes."""
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


def due_timers(state: SourceState) -> tuple[Timer, ...]:
    """Every wait has a bound. A guest that its operator stopped is not held to that of pre-copy: it has its full time
    again when it runs again."""
    if state.stage in _STANDING:
        return (Timer.SWITCHOVER, *((Timer.GATE_WAIT,) if state.stage is SourceStage.GATE_WAIT else ()))
    if state.stage is not SourceStage.PRECOPY:
        return ()
    if state.suspended:
        return (Timer.SUSPENDED,)
    if state.paused:
        return ()
    waits = not state.acks.gate_open and not state.suspend_on_timeout
    return (Timer.PRECOPY, *((Timer.ACK,) if waits else ()))


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


def _begin(state: SourceState) -> Step:
    return replace(state, stage=SourceStage.BINDING), (Do.BIND,)


def _bound(state: SourceState) -> Step:
    return replace(state, stage=SourceStage.PRECOPY), (Note("bound", state.inc), Do.START_PRECOPY)


def _active(state: SourceState) -> Step:
    return _gate(replace(state, active=True))


def _requested(state: SourceState, event: Requested) -> Step:
    entry = event.entry
    acks = state.acks.request(entry)
    if acks == state.acks:
        return state, ()
    noted = replace(state, acks=acks, unwritten=(*state.unwritten, entry))
    gated, commands = _gate(noted)
    return gated, (Note("request", f"{entry.device}/{entry.generation}"), WriteRequests((entry,)), *commands)


def _requested_too_late(state: SourceState, event: Requested) -> Step:
    return state, (Note("request_too_late", f"{event.entry.device}/{event.entry.generation}"),)


def _acked(state: SourceState, event: Acked) -> Step:
    return _gate(_ack_noted(state, event)[0])


def _ack_noted(state: SourceState, event: Acked) -> Step:
    return replace(state, acks=state.acks.ack(event.entry)), ()


def _requests_written(state: SourceState, event: RequestsWritten) -> Step:
    """The version that we may check from now on covers what others wrote too, so theirs is learnt first."""
    seen = RequestsSeen(event.present, event.version)
    state, learnt = (_requests_learnt if state.stage in _BEFORE_FREEZE else _requests_late)(state, seen)
    if state.stage not in _BEFORE_FREEZE:
        return state, learnt
    state, gated = _gate(replace(state, unwritten=tuple(e for e in state.unwritten if e not in event.entries)))
    return state, (*learnt, *gated)


def _requests_learnt(state: SourceState, event: RequestsSeen) -> Step:
    """Before the freeze a request through the ledger is one like any other."""
    if event.version <= state.req_version:
        return state, ()
    return _gate(replace(state, acks=_with_requests(state.acks, event.entries), req_version=event.version))


def _requests_late(state: SourceState, event: RequestsSeen) -> Step:
    """After the freeze it is late (H14), unless the guest was stopped on purpose."""
    if event.version <= state.req_version:
        return state, ()
    state = replace(state, acks=_with_requests(state.acks, event.entries))
    return (state, ()) if state.paused else _abort(state, AbortReason.LATE_SWITCHOVER_ACK, _names(state.acks.pending))


def _requests_noted(state: SourceState, event: RequestsSeen) -> Step:
    """For the report, and for the reason of an abort that the ledger may have decided."""
    if event.version <= state.req_version:
        return state, ()
    return replace(state, acks=_with_requests(state.acks, event.entries)), ()


def _with_requests(acks: AckLedger, entries: tuple[AckRequest, ...]) -> AckLedger:
    for entry in entries:
        acks = acks.request(entry)
    return acks


def gate_may_open(state: SourceState) -> bool:
    """Every request is durable and acknowledged, or the guest is stopped on purpose; peer and quorum are alive.

    Not before every device had its chance to ask: one that begins after another was acknowledged would be late.
    """
    return state.active and _gate_is_open(state) and state.vitals


def _gate(state: SourceState) -> Step:
    """Open or close the gate while the guest is still the engine's to stop."""
    if state.stage is SourceStage.GATE_WAIT and _gate_is_open(state):
        return _freeze(state)
    if state.stage is not SourceStage.PRECOPY:
        return state, ()
    if gate_may_open(state):
        if state.released:
            return state, ()
        return replace(state, released=True, opened=True), (Note("gate_open"), Do.RELEASE, Do.WRITE_ACKS)
    if state.released and not state.acks.gate_open:
        pending = ",".join(_names(state.acks.pending))
        return replace(state, released=False), (Note("gate_closed", pending), Do.HOLD)
    return state, ()


def _names(entries: tuple[AckRequest, ...]) -> tuple[str, ...]:
    return tuple(entry.device for entry in entries)


def _parked(state: SourceState) -> Step:
    """The engine stopped the guest when it liked: the blackout has begun."""
    if _gate_is_open(state):
        return _freeze(state)
    if state.gate_wait:
        waited_for = ",".join(_names(state.acks.pending))
        return replace(state, stage=SourceStage.GATE_WAIT), (Note("gate_wait", waited_for),)
    return _gate_stayed_closed(replace(state, stage=SourceStage.FREEZING))


def _gate_is_open(state: SourceState) -> bool:
    return state.acks.gate_open and (state.paused or not state.unwritten)


def _gate_stayed_closed(state: SourceState) -> Step:
    reason = AbortReason.LATE_SWITCHOVER_ACK if state.opened else AbortReason.GATE_CLOSED_AT_CONVERGENCE
    return _abort(state, reason, _names(tuple(sorted({*state.acks.pending, *state.unwritten}))))


def _freeze(state: SourceState) -> Step:
    state = replace(state, stage=SourceStage.FREEZING)
    if not state.has_devices:
        return _check(state, Quiesced(()))
    return state, (Note("frozen"), Do.QUIESCE)


def late_at_check(state: SourceState) -> tuple[AckRequest, ...]:
    """The one look, before anything that cannot be taken back (H3, R17 in our words)."""
    return state.acks.late


def _check(state: SourceState, event: Quiesced) -> Step:
    state = replace(state, acks=_with_requests(state.acks, event.newest).freeze())
    late = late_at_check(state)
    if late:
        return _abort(state, AbortReason.LATE_SWITCHOVER_ACK, _names(late))
    state = replace(state, stage=SourceStage.LAST_PASS, acks=state.acks.pass_check(), sent=not state.has_devices)
    return state, (Note("check_passed"), Do.PROCEED)


def may_submit(state: SourceState) -> bool:
    """H3: the check passed, the VMM is sealed, and the destination loaded exactly what was sent."""
    return state.stage is SourceStage.LAST_PASS and state.sealed and state.sent and state.loaded


def _advance(state: SourceState) -> Step:
    if not may_submit(state) or state.restarted:
        return state, ()
    return replace(state, stage=SourceStage.SUBMITTED, submitted=True), (Note("submit"), Commit(req_to_check(state)))


def req_to_check(state: SourceState) -> int | None:
    """H14: the transaction that moves ownership also proves that nobody asked since the freeze."""
    return None if state.paused else state.req_version


def _loaded(state: SourceState, event: LoadedReport) -> Step:
    if event.inc != state.inc:
        return state, ()
    if not event.equal:
        return _abort(state, AbortReason.SHIM_FAILED)
    return _advance(replace(state, loaded=True))


def _completed(state: SourceState) -> Step:
    return _advance(replace(state, sealed=True))


def _sent(state: SourceState) -> Step:
    return _advance(replace(state, sent=True))


def _committed(state: SourceState) -> Step:
    return replace(state, stage=SourceStage.COMMITTED), (Note("committed"), Do.GO)


def _done_known(state: SourceState) -> Step:
    """H9: DONE, from the peer or the ledger."""
    return replace(state, stage=SourceStage.DISCARDING), (Note("done"), Do.DISCARD_SOURCE)


def _discarded(state: SourceState) -> Step:
    return replace(state, stage=SourceStage.ENDED_COMMITTED), ()


# --- the source: abort path ---


_BEFORE_FREEZE = frozenset({SourceStage.NEW, SourceStage.BINDING, SourceStage.PRECOPY, SourceStage.GATE_WAIT})

_UNILATERAL = frozenset({SourceStage.PRECOPY, SourceStage.GATE_WAIT, SourceStage.FREEZING, SourceStage.LAST_PASS})
"""The guest is ours and no COMMIT has left: the source ends the attempt alone (H4)."""


def _abort(state: SourceState, reason: AbortReason, devices: tuple[str, ...] = ()) -> Step:
    """H4: before submit the source resumes alone and writes afterwards. Shims first, then the guest."""
    if state.stage in (SourceStage.NEW, SourceStage.BINDING):
        ended = replace(state, stage=SourceStage.RECORDING, reason=reason)
        return (ended, (WriteAbort(reason),)) if not state.refused else _ended(ended)
    state = replace(state, stage=SourceStage.ROLLING_BACK, reason=reason, devices=devices, submitted=False)
    return state, (Note("abort", f"{reason} {','.join(devices)}".strip()), Do.ROLL_BACK_SHIMS)


def _shims_back(state: SourceState) -> Step:
    if state.vmm_dead:
        return _vmm_gone(state)
    return state, (Do.ABORT_ENGINE,)


def _shims_back_reset(state: SourceState) -> Step:
    """A device that lost its state is reported as that, never as a clean abort."""
    return _shims_back(replace(state, reason=AbortReason.DEVICE_RESET))


_SYMPTOMS = frozenset({AbortReason.DESTINATION_LOST, AbortReason.ENGINE_FAILED})
"""What the engine's own verdict looks like from elsewhere: the destination only sees its stream break."""


def _found_late(state: SourceState, event: FoundLate) -> Step:
    return _abort(state, AbortReason.LATE_SWITCHOVER_ACK, event.devices)


def _found_late_after(state: SourceState, event: FoundLate) -> Step:
    """The attempt is being ended for what was the symptom of this verdict: the verdict is what is written down."""
    if state.reason not in _SYMPTOMS or state.refused:
        return state, ()
    return replace(state, reason=AbortReason.LATE_SWITCHOVER_ACK, devices=event.devices), ()


def _devices_lost(state: SourceState, event: DevicesLost) -> Step:
    """The guest runs on with devices that do not know it: that is what the attempt came to, whatever ended it."""
    lost = event.devices
    state = replace(state, lost=lost, devices=lost, reason=AbortReason.DEVICE_RESET)
    return state, (Note("devices_lost", ",".join(lost)),)


def _engine_over(state: SourceState) -> Step:
    """The attempt is over in the VMM. Apply the wish before anything else (5.2)."""
    stopped = state.paused or state.suspended
    if state.restarted or stopped != (not state.want_run):
        return _restore(state)
    return _record_abort(state)


def _engine_sealed(state: SourceState) -> Step:
    """It completed before the abort took effect: not submitted, so the guest is still ours (H4)."""
    if state.restarted and not state.refused:
        return replace(state, stage=SourceStage.SUBMITTED, submitted=True, sealed=True), (Do.READ,)
    return _restore(replace(state, sealed=True))


def _restore(state: SourceState) -> Step:
    """Restore want_run at the source."""
    state = replace(state, stage=SourceStage.RESUMING)
    return state, (Do.RESUME if state.want_run else Do.PAUSE,)


def _record_abort(state: SourceState) -> Step:
    if state.refused:
        return _ended(state)
    reason = state.reason or AbortReason.ENGINE_FAILED
    return replace(state, stage=SourceStage.RECORDING), (WriteAbort(reason, state.devices),)


def _ended(state: SourceState) -> Step:
    return replace(state, stage=SourceStage.ENDED_ABORTED), (Note("ended", str(state.reason or "")),)


def _refused(state: SourceState) -> Step:
    """The ledger says that this attempt can never commit: shims back, then the guest (which is sealed, or dead)."""
    reason = state.reason or AbortReason.LATE_SWITCHOVER_ACK
    state = replace(state, refused=True, submitted=False, reason=reason)
    if state.vmm_dead:
        return _vmm_gone(state)
    return replace(state, stage=SourceStage.ROLLING_BACK), (Note("refused", str(reason)), Do.ROLL_BACK_SHIMS)


def _read_then_decide(state: SourceState) -> Step:
    """A conflict may answer a repeated copy of a write that won (H5), a lost answer says nothing."""
    return state, (Do.READ,)


def _request_not_written(state: SourceState) -> Step:
    return _abort(state, AbortReason.LEDGER_UNREACHABLE) if state.unwritten else (state, ())


def req_has_moved(state: SourceState, version: int) -> bool:
    """Somebody asked after the freeze. A guest that was stopped on purpose is never refused for that."""
    return not state.paused and not state.restarted and version > state.req_version


def _read_after_submit(state: SourceState, event: RecordRead) -> Step:
    moved = req_has_moved(state, event.req_version)
    ref = state.ref
    verdict = handover.verdict(event.record, state.here, ref.migration, ref.attempt, req_moved=moved)
    return _submitted_verdict(state, event.record, verdict, moved)


def _read_while_recording(state: SourceState, event: RecordRead) -> Step:
    record, ref = event.record, state.ref
    ours = (record.migration, record.attempt) == (ref.migration, ref.attempt)
    still_open = record.phase is Ownership.OPEN and ours
    return (state, (Do.RETRY_LATER,)) if still_open else _ended(state)


def _read_while_declaring(state: SourceState, event: RecordRead) -> Step:
    ours = event.record.owner == state.here and event.record.phase is not Ownership.CRASHED
    return (state, (Do.RETRY_LATER,)) if ours else (replace(state, stage=SourceStage.ENDED_CRASHED), ())


def _submitted_verdict(state: SourceState, record: GuestRecord, verdict: Verdict, moved: bool) -> Step:
    match verdict:
        case Verdict.COMMITTED:
            return _owner_moved(state, record)
        case Verdict.REFUSED:
            if record.phase is Ownership.OPEN and record.attempt == state.ref.attempt and moved:
                # The request won; the record is still open, so the abort itself is ours to write.
                late = replace(state, reason=AbortReason.LATE_SWITCHOVER_ACK, devices=_names(state.acks.pending))
                return late, (_abort_command(late),)
            return _refused(replace(state, reason=record.reason or state.reason))
        case Verdict.CRASHED:
            return replace(state, stage=SourceStage.ENDED_CRASHED), ()
        case Verdict.UNDECIDED:
            # Force an outcome: ABORT and COMMIT race on one version and the first writer wins (H6).
            return state, (_abort_command(state),)


def _abort_command(state: SourceState) -> WriteAbort:
    return WriteAbort(state.reason or AbortReason.LEDGER_UNREACHABLE, state.devices)


def _owner_moved(state: SourceState, record: GuestRecord) -> Step:
    """Committed: GO once, which the shell repeats until DONE is known; then, and only then, discard (H9)."""
    if handover.may_discard_source(record, state.here, state.inc):
        return _done_known(state)
    return _committed(state)


def is_final_news(state: SourceState, record: GuestRecord) -> bool:
    """A watch may show an old record; these contents can never be old news about this attempt."""
    if record.migration != state.ref.migration or record.attempt < state.ref.attempt:
        return False
    if record.attempt > state.ref.attempt or record.owner != state.here:
        return True
    return record.phase not in (Ownership.OPEN, Ownership.STARTING)


def _news(state: SourceState, event: RecordSeen) -> Step:
    """Somebody else ended the attempt: nothing needs to be written, and the guest runs on here."""
    record = event.record
    if not is_final_news(state, record) or record.owner != state.here or record.phase is Ownership.CRASHED:
        return state, ()
    return _abort(replace(state, refused=True), record.reason or AbortReason.CANCELLED, record.devices)


def _news_after_submit(state: SourceState, event: RecordSeen | RecordRead) -> Step:
    record = event.record
    if not is_final_news(state, record):
        return state, ()
    if record.owner != state.here:
        return _owner_moved(state, record)
    if record.phase is Ownership.CRASHED:
        return state, ()
    return _refused(replace(state, reason=record.reason or AbortReason.CANCELLED, devices=record.devices))


def _news_at_the_end(state: SourceState, event: RecordSeen | RecordRead) -> Step:
    """Being ended already. If the ledger has its end, no ABORT needs to be written."""
    record = event.record
    if not is_final_news(state, record) or record.owner != state.here or record.phase is Ownership.CRASHED:
        return state, ()
    return replace(state, refused=True), ()


def _abort_again(state: SourceState) -> Step:
    return state, (_abort_command(state),)


def _declare_again(state: SourceState) -> Step:
    return state, (Do.DECLARE_CRASHED,)


# --- the source: pause, policy, faults ---


def _want_run(state: SourceState, event: WantRunSeen) -> Step:
    """An operator's wish, while the guest is still ours to stop and start."""
    if event.run == state.want_run:
        return state, ()
    state = replace(state, want_run=event.run)
    if not state.want_run:
        return state, () if state.suspended else (Do.PAUSE,)
    if not state.paused or state.suspended:
        return state, ()
    return (state, (Do.RESUME,)) if may_resume_in_place(state) else _abort(state, AbortReason.GUEST_RESUMED)


def _wish_noted(state: SourceState, event: WantRunSeen) -> Step:
    """From the freeze on it is queued: applied by whoever ends as owner, before any vCPU runs."""
    return replace(state, want_run=event.run), ()


def _wish_at_the_end(state: SourceState, event: WantRunSeen) -> Step:
    """The guest is up again and the attempt only has to be written down."""
    if event.run == state.want_run:
        return state, ()
    return replace(state, want_run=event.run), (Do.RESUME if event.run else Do.PAUSE,)


def may_resume_in_place(state: SourceState) -> bool:
    """A device inside the VMM that was stopped in pre-copy is never in pre-copy again: the migration is cancelled first
    and the guest starts when it is over."""
    return not state.inside or state.stage is not SourceStage.PRECOPY


def _paused(state: SourceState) -> Step:
    """The guest is stopped on purpose: what is pending is the baseline, the gate opens and the hold is released."""
    return _gate(replace(state, paused=True, acks=state.acks.stop_by_wish()))


def _paused_again(state: SourceState) -> Step:
    return _record_abort(state) if not state.want_run else _restore(state)


def _pause_queued(state: SourceState) -> Step:
    """QEMU had parked already: a stop now would be forgotten by a cancel, so it only counts as a wish."""
    return replace(state, suspended=False), ()


def _resumed(state: SourceState) -> Step:
    return _gate(replace(state, paused=False, acks=state.acks.resume_by_wish()))


def _resumed_again(state: SourceState) -> Step:
    return _record_abort(state) if state.want_run else _restore(state)


def _resume_failed(state: SourceState) -> Step:
    """Block reactivation failed: no copy runs, nothing is started elsewhere, a person is needed."""
    return replace(state, stage=SourceStage.ENDED_NEEDS_OPERATOR), (Note("resume_failed"),)


def _guest_is_gone(state: SourceState) -> Step:
    """Nothing to let run again. A lost device is told for all that."""
    lost = state.reason is AbortReason.DEVICE_RESET
    return _record_abort(state if lost else replace(state, reason=AbortReason.GUEST_ENDED))


def _precopy_is_over(state: SourceState) -> Step:
    if state.suspend_on_timeout:
        return replace(state, suspended=True), (Note("suspend"), Do.PAUSE)
    pending = _names(state.acks.pending)
    return _abort(state, AbortReason.ACK_TIMEOUT if pending else AbortReason.NOT_CONVERGING, pending)


def _suspended_in_vain(state: SourceState) -> Step:
    """Policy stopped the guest for the migration's sake, and it does not end for all that."""
    return _abort(state, AbortReason.NOT_CONVERGING, _names(state.acks.pending))


def _ack_is_missing(state: SourceState) -> Step:
    return _abort(state, AbortReason.ACK_TIMEOUT, _names(state.acks.pending))


def _fails(reason: AbortReason) -> Callable[[SourceState], Step]:
    def handler(state: SourceState) -> Step:
        return _abort(state, reason)

    return handler


def _vmm_gone(state: SourceState) -> Step:
    """A dead VMM cannot run, and it was the owner's: a crash of the guest."""
    state = replace(state, vmm_dead=True, submitted=False)
    return replace(state, stage=SourceStage.DECLARING), (Note("vmm_died"), Do.DECLARE_CRASHED)


def _vmm_died_in_last_pass(state: SourceState) -> Step:
    """Sealed, the guest is all at the destination: it may still be committed."""
    return _vmm_death_noted(state) if state.sealed else _vmm_gone(state)


def _vmm_death_noted(state: SourceState) -> Step:
    """Submitted: the ledger decides as ever."""
    return replace(state, vmm_dead=True), ()


def _crash_recorded(state: SourceState) -> Step:
    return replace(state, stage=SourceStage.ENDED_CRASHED), ()


def _pulse(good: bool) -> Callable[[SourceState], Step]:
    def handler(state: SourceState) -> Step:
        return _gate(replace(state, vitals=good))

    return handler


# --- which stage takes which event ------------------------------------------------------------------------------------

_NEW, _BINDING, _PRECOPY = SourceStage.NEW, SourceStage.BINDING, SourceStage.PRECOPY
_GATE_WAIT, _FREEZING, _LAST_PASS = SourceStage.GATE_WAIT, SourceStage.FREEZING, SourceStage.LAST_PASS
_SUBMITTED, _COMMITTED, _DISCARDING = SourceStage.SUBMITTED, SourceStage.COMMITTED, SourceStage.DISCARDING
_ROLLING_BACK, _RESUMING = SourceStage.ROLLING_BACK, SourceStage.RESUMING
_RECORDING, _DECLARING = SourceStage.RECORDING, SourceStage.DECLARING

_STANDING = (_GATE_WAIT, _FREEZING, _LAST_PASS)
"""The engine has stopped the guest, and no COMMIT has left."""
_GIVEN = (_SUBMITTED, _COMMITTED, _DISCARDING)
_ENDING = (_ROLLING_BACK, _RESUMING, _RECORDING, _DECLARING)

_ROWS: tuple[Row[SourceStage], ...] = (
    # The agent accepted the attempt: the ledger has to name the destination's process before anything moves.
    (Seen.BEGIN, (_NEW,), _begin),
    # It names it: copying may begin.
    (Seen.BOUND, (_BINDING,), _bound),
    # The attempt was ended while the bind was under way; what ends it stands behind it in the queue.
    (Seen.BOUND, (_RECORDING, _DECLARING), ignored),
    # Every device has begun and the engine has accepted: from now on the gate may open.
    (Seen.ACTIVE, (_PRECOPY,), _active),
    # The engine had parked, or the attempt was ended, before its acceptance was taken in. Only the gate asks for it.
    (Seen.ACTIVE, (_GATE_WAIT, _FREEZING, _LAST_PASS, _ROLLING_BACK, _DECLARING), ignored),
    # --- the gate: requests, ACKs, vital signs
    # A device asks for an ACK while it may still be granted, or found late.
    (Requested, (_PRECOPY, _GATE_WAIT, _FREEZING), _requested),
    # After the check a device's own request is served in stop-copy (R30), after the end it is nobody's.
    (Requested, (_LAST_PASS, *_GIVEN, *_ENDING), _requested_too_late),
    # It may open the gate, or end the wait for it.
    (Acked, (_PRECOPY, _GATE_WAIT), _acked),
    # Late: it opens no gate any more, but the check and the report know of it.
    (Acked, (_FREEZING, _LAST_PASS, *_GIVEN, *_ENDING), _ack_noted),
    # Our request is durable, so it no longer keeps the gate closed; what others asked for is learnt with it. After the
    # freeze a version that has moved is a late request.
    (RequestsWritten, (_PRECOPY, _GATE_WAIT, _FREEZING, _LAST_PASS), _requests_written),
    # Requests are written in a lane of their own, whose answers wait for nobody.
    (RequestsWritten, (*_GIVEN, *_ENDING), ignored),
    # Somebody asked through the ledger; a request of the attempt before may be seen before this one is bound.
    (RequestsSeen, (_NEW, _BINDING, _PRECOPY, _GATE_WAIT), _requests_learnt),
    # The guest stands: H14.
    (RequestsSeen, (_FREEZING, _LAST_PASS), _requests_late),
    # The COMMIT's own check decides, or the attempt is ended anyway; the reason may have to name who asked.
    (RequestsSeen, (*_GIVEN, *_ENDING), _requests_noted),
    # The gate opens only while peer and quorum answer.
    (Seen.VITALS_GOOD, (_NEW, _BINDING, _PRECOPY), _pulse(True)),
    (Seen.VITALS_BAD, (_NEW, _BINDING, _PRECOPY), _pulse(False)),
    # The pulse is felt to the session's end; only the gate asks for it.
    (Seen.VITALS_GOOD, (*_STANDING, *_GIVEN, *_ENDING), ignored),
    (Seen.VITALS_BAD, (*_STANDING, *_GIVEN, *_ENDING), ignored),
    # --- the freeze, the check, the last pass
    # The engine stopped the guest when it liked: the blackout begins.
    (Seen.PARKED, (_PRECOPY,), _parked),
    # Status changes are hints and may come twice; or the abort was decided just before.
    (Seen.PARKED, (*_STANDING, _ROLLING_BACK), ignored),
    # Every device stands still: the one check, then the last pass or the way back.
    (Quiesced, (_FREEZING,), _check),
    # The attempt was ended while the devices were being stopped; the roll-back stands behind that in the queue.
    (Quiesced, (_ROLLING_BACK, _DECLARING), ignored),
    # Two of the three things that a COMMIT needs.
    (Seen.COMPLETED, (_LAST_PASS,), _completed),
    (Seen.SHIMS_SENT, (_LAST_PASS,), _sent),
    # Completed before the abort took effect: ABORT_ENGINE says so itself. Or a hint that came twice.
    (Seen.COMPLETED, (_SUBMITTED, _ROLLING_BACK), ignored),
    # The devices' streams run beside everything else, and may end after the attempt.
    (Seen.SHIMS_SENT, _ENDING, ignored),
    # The third: the destination holds, validated, what was sent.
    (LoadedReport, (_LAST_PASS,), _loaded),
    # The destination repeats it until the attempt is over.
    (LoadedReport, (*_GIVEN, *_ENDING), ignored),
    # --- the COMMIT and after it
    # Ours: GO to the destination.
    (Seen.COMMITTED, (_SUBMITTED,), _committed),
    # A watch was faster than the answer to the COMMIT; also with what came after it, to a roll-back by the destination.
    (Seen.COMMITTED, (_COMMITTED, _DISCARDING, _ROLLING_BACK, _DECLARING), ignored),
    # H9: the destination took over; the answer to the COMMIT may be missing still.
    (Seen.DONE_KNOWN, (_SUBMITTED, _COMMITTED), _done_known),
    # The ledger was faster, or the destination said it twice.
    (Seen.DONE_KNOWN, (_DISCARDING,), ignored),
    (Seen.DISCARDED, (_DISCARDING,), _discarded),
    # --- what the record says
    # A conflict or a lost answer of the COMMIT or of an ABORT: the content decides (H5).
    (RecordRead, (_SUBMITTED,), _read_after_submit),
    (RecordRead, (_RECORDING,), _read_while_recording),
    (RecordRead, (_DECLARING,), _read_while_declaring),
    # A watch told the outcome while the read was under way: the read is no older.
    (RecordRead, (_COMMITTED,), _news_after_submit),
    (RecordRead, (_ROLLING_BACK,), _news_at_the_end),
    # Nothing can be newer than DONE.
    (RecordRead, (_DISCARDING,), ignored),
    # Cancelled, or ended by the destination or the coordinator.
    (RecordSeen, (_NEW, _BINDING, _PRECOPY, *_STANDING), _news),
    # The outcome of a COMMIT whose answer is late or lost; DONE; a roll-back by the destination.
    (RecordSeen, (_SUBMITTED, _COMMITTED), _news_after_submit),
    (RecordSeen, (_ROLLING_BACK, _RESUMING, _RECORDING), _news_at_the_end),
    # DONE was the last word; a crash is declared whatever the watch shows.
    (RecordSeen, (_DISCARDING, _DECLARING), ignored),
    # --- answers of the ledger
    # Our ABORT, after the guest came up or in the race with the COMMIT (H6).
    (Seen.ABORT_RECORDED, (_RECORDING,), _ended),
    (Seen.ABORT_RECORDED, (_SUBMITTED,), _refused),
    # A watch showed it before its answer came; or the VMM died while it was written.
    (Seen.ABORT_RECORDED, (_ROLLING_BACK, _DECLARING), ignored),
    # Not bound: nothing was begun.
    (Seen.LEDGER_REFUSED, (_BINDING,), _fails(AbortReason.LEDGER_UNREACHABLE)),
    (Seen.LEDGER_UNKNOWN, (_BINDING,), _fails(AbortReason.LEDGER_UNREACHABLE)),
    # A request that cannot be made durable: the gate would stay closed for good.
    (Seen.LEDGER_REFUSED, (_PRECOPY,), _request_not_written),
    (Seen.LEDGER_UNKNOWN, (_PRECOPY,), _request_not_written),
    # COMMIT, ABORT or CRASHED without a clear answer.
    (Seen.LEDGER_REFUSED, (_SUBMITTED, _RECORDING, _DECLARING), _read_then_decide),
    (Seen.LEDGER_UNKNOWN, (_SUBMITTED, _RECORDING, _DECLARING), _read_then_decide),
    # The lane of requests answers at any time: while the guest stands, the check and GATE_WAIT's own bound decide.
    # After a COMMIT or on the way back: an older write whose outcome a watch has told.
    (Seen.LEDGER_REFUSED, (*_STANDING, _COMMITTED, _DISCARDING, _ROLLING_BACK, _RESUMING), ignored),
    (Seen.LEDGER_UNKNOWN, (*_STANDING, _COMMITTED, _DISCARDING, _ROLLING_BACK, _RESUMING), ignored),
    (Seen.CRASH_RECORDED, (_DECLARING,), _crash_recorded),
    # A bounded pause is over: what was uncertain is tried again.
    (Seen.RETRY_DUE, (_SUBMITTED,), _read_then_decide),
    (Seen.RETRY_DUE, (_RECORDING,), _abort_again),
    (Seen.RETRY_DUE, (_DECLARING,), _declare_again),
    # A watch told the outcome meanwhile.
    (Seen.RETRY_DUE, (_COMMITTED, _DISCARDING, _ROLLING_BACK), ignored),
    # --- the way back
    (Seen.SHIMS_BACK, (_ROLLING_BACK,), _shims_back),
    (Seen.SHIMS_BACK_RESET, (_ROLLING_BACK,), _shims_back_reset),
    (Seen.ENGINE_OVER, (_ROLLING_BACK,), _engine_over),
    (Seen.ENGINE_SEALED, (_ROLLING_BACK,), _engine_sealed),
    (DevicesLost, (_ROLLING_BACK,), _devices_lost),
    # The VMM died on the way: what it was asked for does not matter any more.
    (Seen.SHIMS_BACK, (_DECLARING,), ignored),
    (Seen.SHIMS_BACK_RESET, (_DECLARING,), ignored),
    (Seen.ENGINE_OVER, (_DECLARING,), ignored),
    (Seen.ENGINE_SEALED, (_DECLARING,), ignored),
    (DevicesLost, (_DECLARING,), ignored),
    # The VMM's own verdict on the devices inside it, whenever it comes while the guest is ours.
    (FoundLate, tuple(_UNILATERAL), _found_late),
    # Its names take a moment to find, and its symptoms may be heard first.
    (FoundLate, (_ROLLING_BACK,), _found_late_after),
    # The reason is being written already.
    (FoundLate, (_RESUMING, _RECORDING, _DECLARING), ignored),
    # --- stopped and started on purpose
    (WantRunSeen, (_NEW, _BINDING, _PRECOPY), _want_run),
    (WantRunSeen, (*_STANDING, *_GIVEN, _ROLLING_BACK, _RESUMING, _DECLARING), _wish_noted),
    (WantRunSeen, (_RECORDING,), _wish_at_the_end),
    # The operator's or policy's stop took effect before the freeze.
    (Seen.PAUSED, (_BINDING, _PRECOPY), _paused),
    # As wished, at the end of the attempt.
    (Seen.PAUSED, (_RESUMING,), _paused_again),
    # The engine parked between the stop and its answer: it counts as a wish then. Or the attempt was ended, and what
    # ends it looks at the wish once more.
    (Seen.PAUSED, (*_STANDING, _ROLLING_BACK, _RECORDING, _DECLARING), ignored),
    # The engine was faster, or the VMM refused: the wish is applied at the end.
    (Seen.PAUSE_QUEUED, (_BINDING, _PRECOPY, *_STANDING, _ROLLING_BACK, _RECORDING), _pause_queued),
    # It cannot be stopped now. The attempt is over all the same, and who keeps the guest applies the wish.
    (Seen.PAUSE_QUEUED, (_RESUMING,), _record_abort),
    (Seen.PAUSE_QUEUED, (_DECLARING,), ignored),
    # Within its attempt: the gate is judged anew.
    (Seen.RESUMED, (_BINDING, _PRECOPY), _resumed),
    (Seen.RESUMED, (_RESUMING,), _resumed_again),
    # It ran again for a moment before the engine stopped it: what counted for a stopped guest is no longer true.
    (Seen.RESUMED, _STANDING, _fails(AbortReason.GUEST_RESUMED)),
    # The attempt was ended meanwhile; what ends it looks at the wish once more.
    (Seen.RESUMED, (_ROLLING_BACK, _RECORDING, _DECLARING), ignored),
    (Seen.RESUME_FAILED, (_RESUMING,), _resume_failed),
    # The engine had parked, or refuses for now: the wish is applied by whoever ends as owner.
    (Seen.RESUME_FAILED, (_BINDING, _PRECOPY, *_STANDING, _ROLLING_BACK, _RECORDING, _DECLARING), ignored),
    # --- time: a timer runs only where `due_timers` says so, and a ring that comes later is dropped by its number
    # It does not converge: end the attempt, or stop the guest for its sake.
    (Timer.PRECOPY, (_PRECOPY,), _precopy_is_over),
    (Timer.SUSPENDED, (_PRECOPY,), _suspended_in_vain),
    # A gate that stays closed for one device; each closing has its own full time.
    (Timer.ACK, (_PRECOPY,), _ack_is_missing),
    # As long as policy lets a guest that the engine stopped wait for an ACK.
    (Timer.GATE_WAIT, (_GATE_WAIT,), _gate_stayed_closed),
    # From the moment the engine stopped the guest, whatever is being done since: it runs on here.
    (Timer.SWITCHOVER, _STANDING, _fails(AbortReason.SWITCHOVER_TIMEOUT)),
    # --- faults
    (Seen.ENGINE_FAILED, tuple(_UNILATERAL), _fails(AbortReason.ENGINE_FAILED)),
    (Seen.SHIM_FAILED, tuple(_UNILATERAL), _fails(AbortReason.SHIM_FAILED)),
    (Seen.DEST_FAILED, (_NEW, _BINDING, *_UNILATERAL), _fails(AbortReason.DESTINATION_LOST)),
    # The same failure is told by a call and by an event, or by several devices; our own abort breaks streams too. After
    # the COMMIT has left, the ledger alone decides (H5).
    (Seen.ENGINE_FAILED, (*_GIVEN, *_ENDING), ignored),
    (Seen.SHIM_FAILED, (*_GIVEN, *_ENDING), ignored),
    (Seen.DEST_FAILED, (*_GIVEN, *_ENDING), ignored),
    # It shut down by itself: nothing to move.
    (Seen.GUEST_ENDED, (_NEW, _BINDING, *_UNILATERAL), _fails(AbortReason.GUEST_ENDED)),
    (Seen.GUEST_ENDED, (_RESUMING,), _guest_is_gone),
    # On the way back: RESUME will find it. Given: the destination has a guest that has ended. Else its keeper sees it.
    (Seen.GUEST_ENDED, (*_GIVEN, _ROLLING_BACK, _RECORDING, _DECLARING), ignored),
    # A crash of the owner's VMM.
    (
        Seen.VMM_DIED,
        (_NEW, _BINDING, _PRECOPY, _GATE_WAIT, _FREEZING, _ROLLING_BACK, _RESUMING, _RECORDING),
        _vmm_gone,
    ),
    (Seen.VMM_DIED, (_LAST_PASS,), _vmm_died_in_last_pass),
    # It matters only if the guest turns out to be ours.
    (Seen.VMM_DIED, _GIVEN, _vmm_death_noted),
    # Told by its process and by the call that found it so.
    (Seen.VMM_DIED, (_DECLARING,), ignored),
)

TABLE: dict[tuple[SourceStage, Key], Handler] = table(_ROWS)
"""(stage, event) -> what becomes of it. What is not in here, a stage does not take."""
