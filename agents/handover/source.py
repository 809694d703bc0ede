"""PURE. The source's half of one attempt: hold, freeze, check, seal, submit, and every way back.

The words are in `session.py`, the rules in docs/protocol.md. `source_step` is the only mutator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum

from agents.handover.words import (
    Acked,
    Command,
    Commit,
    DevicesLost,
    Do,
    Event,
    FoundLate,
    GoSeen,
    LoadedReport,
    Note,
    Quiesced,
    RecordRead,
    RecordSeen,
    Requested,
    RequestsSeen,
    RequestsWritten,
    Seen,
    StartTimer,
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
    restarted: bool = False
    """Adopted by a new agent process: conducts nothing, only ends it (H7)."""


Step = tuple[SourceState, tuple[Command, ...]]


def source_step(state: SourceState, event: Event) -> Step:
    """The only mutator of a source session."""
    if state.stage.ended:
        return state, ()
    match event:
        case Requested(entry):
            return _requested(state, entry)
        case Acked(entry):
            return _gate(replace(state, acks=state.acks.ack(entry)))
        case RequestsWritten(entries, present, version):
            return _requests_written(state, entries, present, version)
        case RequestsSeen(entries, version):
            return _requests_seen(state, entries, version)
        case Quiesced(newest):
            return _check(state, newest)
        case FoundLate(devices):
            return _found_late(state, devices)
        case DevicesLost(devices):
            return _devices_lost(state, devices)
        case LoadedReport(inc, equal):
            return _loaded(state, inc, equal)
        case WantRunSeen(run):
            return _want_run(state, run)
        case RecordRead(record, version):
            return _record_read(state, record, version)
        case RecordSeen(record):
            return _record_seen(state, record)
        case GoSeen():
            return state, ()
        case _:
            return _seen(state, event)


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


def _seen(state: SourceState, event: Seen) -> Step:
    handler = _SEEN.get(event)
    return handler(state) if handler else (state, ())


def _begin(state: SourceState) -> Step:
    if state.stage is not SourceStage.NEW:
        return state, ()
    return replace(state, stage=SourceStage.BINDING), (Do.BIND,)


def _bound(state: SourceState) -> Step:
    if state.stage is not SourceStage.BINDING:
        return state, ()
    return replace(state, stage=SourceStage.PRECOPY), (
        Note("bound", state.inc),
        StartTimer(Timer.PRECOPY),
        StartTimer(Timer.ACK),
        Do.START_PRECOPY,
    )


def _active(state: SourceState) -> Step:
    return _gate(replace(state, active=True))


def _requested(state: SourceState, entry: AckRequest) -> Step:
    if state.acks.sealed_check or state.stage not in _TAKES_REQUESTS:
        return state, (Note("request_too_late", f"{entry.device}/{entry.generation}"),)
    acks = state.acks.request(entry)
    if acks == state.acks:
        return state, ()
    noted = replace(state, acks=acks, unwritten=(*state.unwritten, entry))
    gated, commands = _gate(noted)
    return gated, (Note("request", f"{entry.device}/{entry.generation}"), WriteRequests((entry,)), *commands)


def _requests_written(
    state: SourceState, entries: tuple[AckRequest, ...], present: tuple[AckRequest, ...], version: int
) -> Step:
    """The version that we may check from now on covers what others wrote too, so theirs is learnt first."""
    state, learnt = _requests_seen(state, present, version)
    state, gated = _gate(replace(state, unwritten=tuple(e for e in state.unwritten if e not in entries)))
    return state, (*learnt, *gated)


def _requests_seen(state: SourceState, entries: tuple[AckRequest, ...], version: int) -> Step:
    """Through the ledger. Before the freeze it is a request like any other; after it, late (H14)."""
    if version <= state.req_version:
        return state, ()
    acks = state.acks
    for entry in entries:
        acks = acks.request(entry)
    if state.stage in _BEFORE_FREEZE:
        return _gate(replace(state, acks=acks, req_version=version))
    if state.stage in (SourceStage.FREEZING, SourceStage.LAST_PASS) and not state.paused:
        return _abort(replace(state, acks=acks), AbortReason.LATE_SWITCHOVER_ACK, _names(acks.pending))
    return replace(state, acks=acks), ()


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
        return replace(state, released=False), (Note("gate_closed", pending), Do.HOLD, StartTimer(Timer.ACK))
    return state, ()


def _names(entries: tuple[AckRequest, ...]) -> tuple[str, ...]:
    return tuple(entry.device for entry in entries)


def _parked(state: SourceState) -> Step:
    """The engine stopped the guest when it liked: the blackout has begun."""
    if state.stage is not SourceStage.PRECOPY:
        return state, ()
    if _gate_is_open(state):
        return _freeze(state)
    if state.gate_wait:
        waited_for = ",".join(_names(state.acks.pending))
        return replace(state, stage=SourceStage.GATE_WAIT), (Note("gate_wait", waited_for), StartTimer(Timer.GATE_WAIT))
    return _gate_stayed_closed(replace(state, stage=SourceStage.FREEZING))


def _gate_is_open(state: SourceState) -> bool:
    return state.acks.gate_open and (state.paused or not state.unwritten)


def _gate_stayed_closed(state: SourceState) -> Step:
    reason = AbortReason.LATE_SWITCHOVER_ACK if state.opened else AbortReason.GATE_CLOSED_AT_CONVERGENCE
    return _abort(state, reason, _names(tuple(sorted({*state.acks.pending, *state.unwritten}))))


def _timer_gate_wait(state: SourceState) -> Step:
    return _gate_stayed_closed(state) if state.stage is SourceStage.GATE_WAIT else (state, ())


def _freeze(state: SourceState) -> Step:
    state = replace(state, stage=SourceStage.FREEZING)
    if not state.has_devices:
        return _check(state, ())
    return state, (Note("frozen"), Do.QUIESCE)


def late_at_check(state: SourceState) -> tuple[AckRequest, ...]:
    """The one look, before anything that cannot be taken back (H3, R17 in our words)."""
    return state.acks.late


def _check(state: SourceState, newest: tuple[AckRequest, ...]) -> Step:
    if state.stage is not SourceStage.FREEZING:
        return state, ()
    acks = state.acks
    for entry in newest:
        acks = acks.request(entry)
    state = replace(state, acks=acks.freeze())
    late = late_at_check(state)
    if late:
        return _abort(state, AbortReason.LATE_SWITCHOVER_ACK, _names(late))
    state = replace(state, stage=SourceStage.LAST_PASS, acks=state.acks.pass_check(), sent=not state.has_devices)
    return state, (Note("check_passed"), StartTimer(Timer.SWITCHOVER), Do.PROCEED)


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


def _loaded(state: SourceState, inc: str, equal: bool) -> Step:
    if inc != state.inc or state.stage is not SourceStage.LAST_PASS:
        return state, ()
    if not equal:
        return _abort(state, AbortReason.SHIM_FAILED)
    return _advance(replace(state, loaded=True))


def _completed(state: SourceState) -> Step:
    return _advance(replace(state, sealed=True)) if state.stage is SourceStage.LAST_PASS else (state, ())


def _sent(state: SourceState) -> Step:
    return _advance(replace(state, sent=True)) if state.stage is SourceStage.LAST_PASS else (state, ())


def _committed(state: SourceState) -> Step:
    if state.stage is not SourceStage.SUBMITTED:
        return state, ()
    return replace(state, stage=SourceStage.COMMITTED), (Note("committed"), Do.GO)


def _done_known(state: SourceState) -> Step:
    """H9: DONE, from the peer or the ledger."""
    if state.stage not in (SourceStage.SUBMITTED, SourceStage.COMMITTED):
        return state, ()
    return replace(state, stage=SourceStage.DISCARDING), (Note("done"), Do.DISCARD_SOURCE)


def _discarded(state: SourceState) -> Step:
    if state.stage is not SourceStage.DISCARDING:
        return state, ()
    return replace(state, stage=SourceStage.ENDED_COMMITTED), ()


# --- the source: abort path ---


_GUEST_IS_OURS = frozenset({SourceStage.NEW, SourceStage.BINDING, SourceStage.PRECOPY})
"""Before the freeze: a wish is applied at once."""

_BEFORE_FREEZE = _GUEST_IS_OURS | {SourceStage.GATE_WAIT}

_TAKES_REQUESTS = frozenset({SourceStage.PRECOPY, SourceStage.GATE_WAIT, SourceStage.FREEZING})

_UNILATERAL = frozenset({SourceStage.PRECOPY, SourceStage.GATE_WAIT, SourceStage.FREEZING, SourceStage.LAST_PASS})


def _abort(state: SourceState, reason: AbortReason, devices: tuple[str, ...] = ()) -> Step:
    """H4: before submit the source resumes alone and writes afterwards. Shims first, then the guest."""
    if state.stage in (SourceStage.NEW, SourceStage.BINDING):
        ended = replace(state, stage=SourceStage.RECORDING, reason=reason)
        return (ended, (WriteAbort(reason),)) if not state.refused else _ended(ended)
    if state.stage not in _UNILATERAL:
        return state, ()
    state = replace(state, stage=SourceStage.ROLLING_BACK, reason=reason, devices=devices, submitted=False)
    return state, (Note("abort", f"{reason} {','.join(devices)}".strip()), Do.ROLL_BACK_SHIMS)


def _shims_back(state: SourceState) -> Step:
    if state.stage is not SourceStage.ROLLING_BACK:
        return state, ()
    if state.vmm_dead:
        return _vmm_gone(state)
    return state, (Do.ABORT_ENGINE,)


def _shims_back_reset(state: SourceState) -> Step:
    """A device that lost its state is reported as that, never as a clean abort."""
    return _shims_back(replace(state, reason=AbortReason.DEVICE_RESET))


_SYMPTOMS = frozenset({AbortReason.DESTINATION_LOST, AbortReason.ENGINE_FAILED})
"""What the engine's own verdict looks like from elsewhere: the destination only sees its stream break."""


def _found_late(state: SourceState, devices: tuple[str, ...]) -> Step:
    if state.stage is SourceStage.ROLLING_BACK and state.reason in _SYMPTOMS and not state.refused:
        return replace(state, reason=AbortReason.LATE_SWITCHOVER_ACK, devices=devices), ()
    return _abort(state, AbortReason.LATE_SWITCHOVER_ACK, devices)


def _devices_lost(state: SourceState, devices: tuple[str, ...]) -> Step:
    """The guest runs on with devices that do not know it: that is what the attempt came to, whatever ended it."""
    if state.stage is not SourceStage.ROLLING_BACK:
        return state, ()
    state = replace(state, lost=devices, devices=devices, reason=AbortReason.DEVICE_RESET)
    return state, (Note("devices_lost", ",".join(devices)),)


def _engine_over(state: SourceState) -> Step:
    """The attempt is over in the VMM. Apply the wish before anything else (5.2)."""
    if state.stage is not SourceStage.ROLLING_BACK:
        return state, ()
    stopped = state.paused or state.suspended
    if state.restarted or stopped != (not state.want_run):
        return _restore(state)
    return _record_abort(state)


def _engine_sealed(state: SourceState) -> Step:
    """It completed before the abort took effect: not submitted, so the guest is still ours (H4)."""
    if state.stage is not SourceStage.ROLLING_BACK:
        return state, ()
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


def _abort_recorded(state: SourceState) -> Step:
    if state.stage is SourceStage.RECORDING:
        return _ended(state)
    if state.stage is SourceStage.SUBMITTED:
        return _refused(state)
    return state, ()


def _refused(state: SourceState) -> Step:
    """The ledger says that this attempt can never commit: shims back, then the guest (which is sealed, or dead)."""
    reason = state.reason or AbortReason.LATE_SWITCHOVER_ACK
    state = replace(state, refused=True, submitted=False, reason=reason)
    if state.vmm_dead:
        return _vmm_gone(state)
    return replace(state, stage=SourceStage.ROLLING_BACK), (Note("refused", str(reason)), Do.ROLL_BACK_SHIMS)


def _write_uncertain(state: SourceState) -> Step:
    """A conflict may answer a repeated copy of a write that won (H5), a lost answer says nothing: read, then decide."""
    if state.stage is SourceStage.BINDING:
        return _abort(state, AbortReason.LEDGER_UNREACHABLE)
    if state.stage in (SourceStage.SUBMITTED, SourceStage.RECORDING, SourceStage.DECLARING):
        return state, (Do.READ,)
    if state.stage is SourceStage.PRECOPY and state.unwritten:
        return _abort(state, AbortReason.LEDGER_UNREACHABLE)
    return state, ()


def req_has_moved(state: SourceState, version: int) -> bool:
    """Somebody asked after the freeze. A guest that was stopped on purpose is never refused for that."""
    return not state.paused and not state.restarted and version > state.req_version


def _record_read(state: SourceState, record: GuestRecord, version: int) -> Step:
    ref = state.ref
    moved = req_has_moved(state, version)
    verdict = handover.verdict(record, state.here, ref.migration, ref.attempt, req_moved=moved)
    if state.stage is SourceStage.SUBMITTED:
        return _submitted_verdict(state, record, verdict, moved)
    if state.stage is SourceStage.RECORDING:
        still_open = record.phase is Ownership.OPEN and (record.migration, record.attempt) == (
            ref.migration,
            ref.attempt,
        )
        return (state, (Do.RETRY_LATER,)) if still_open else _ended(state)
    if state.stage is SourceStage.DECLARING:
        ours = record.owner == state.here and record.phase is not Ownership.CRASHED
        return (state, (Do.RETRY_LATER,)) if ours else (replace(state, stage=SourceStage.ENDED_CRASHED), ())
    return _record_seen(state, record)


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


def _record_seen(state: SourceState, record: GuestRecord) -> Step:
    if not is_final_news(state, record):
        return state, ()
    if record.owner != state.here:
        if state.stage in (SourceStage.SUBMITTED, SourceStage.COMMITTED):
            return _owner_moved(state, record)
        return state, ()
    if record.phase is Ownership.CRASHED:
        return state, ()
    reason = record.reason or AbortReason.CANCELLED
    if state.stage in (SourceStage.SUBMITTED, SourceStage.COMMITTED):
        return _refused(replace(state, reason=reason, devices=record.devices))
    return _abort(replace(state, refused=True), reason, record.devices)


def _retry_due(state: SourceState) -> Step:
    if state.stage is SourceStage.RECORDING:
        return state, (_abort_command(state),)
    if state.stage is SourceStage.DECLARING:
        return state, (Do.DECLARE_CRASHED,)
    if state.stage is SourceStage.SUBMITTED:
        return state, (Do.READ,)
    return state, ()


# --- the source: pause, policy, faults ---


def _want_run(state: SourceState, run: bool) -> Step:
    """An operator's wish. From the freeze on it is queued: applied by whoever ends as owner, before any vCPU runs."""
    if run == state.want_run:
        return state, ()
    state = replace(state, want_run=run)
    if state.stage is SourceStage.RECORDING:
        return state, (Do.RESUME if run else Do.PAUSE,)
    if state.stage not in _GUEST_IS_OURS:
        return state, ()
    if not run:
        return state, () if state.suspended else (Do.PAUSE,)
    if not state.paused or state.suspended:
        return state, ()
    return (state, (Do.RESUME,)) if may_resume_in_place(state) else _abort(state, AbortReason.GUEST_RESUMED)


def may_resume_in_place(state: SourceState) -> bool:
    """A device inside the VMM that was stopped in pre-copy is never in pre-copy again: the migration is cancelled first
    and the guest starts when it is over."""
    return not state.inside or state.stage is not SourceStage.PRECOPY


def _paused(state: SourceState) -> Step:
    """The guest is stopped on purpose: what is pending is the baseline, the gate opens and the hold is released."""
    if state.stage is SourceStage.RESUMING:
        return _record_abort(state) if not state.want_run else _restore(state)
    if state.stage not in _GUEST_IS_OURS:
        return state, ()
    return _gate(replace(state, paused=True, acks=state.acks.stop_by_wish()))


def _pause_queued(state: SourceState) -> Step:
    """QEMU had parked already: a stop now would be forgotten by a cancel, so it only counts as a wish."""
    return replace(state, suspended=False), ()


def _resumed(state: SourceState) -> Step:
    if state.stage is SourceStage.RESUMING:
        return _record_abort(state) if state.want_run else _restore(state)
    if state.stage not in _GUEST_IS_OURS:
        return state, ()
    resumed = replace(state, paused=False, acks=state.acks.resume_by_wish())
    return _gate(resumed)


def _resume_failed(state: SourceState) -> Step:
    """Block reactivation failed: no copy runs, nothing is started elsewhere, a person is needed."""
    if state.stage is not SourceStage.RESUMING:
        return state, ()
    return replace(state, stage=SourceStage.ENDED_NEEDS_OPERATOR), (Note("resume_failed"),)


def _guest_ended(state: SourceState) -> Step:
    """It shut down by itself: nothing to let run again, and nothing to move. A lost device is told for all that."""
    if state.stage is SourceStage.RESUMING:
        lost = state.reason is AbortReason.DEVICE_RESET
        return _record_abort(state if lost else replace(state, reason=AbortReason.GUEST_ENDED))
    return _abort(state, AbortReason.GUEST_ENDED)


def _timer_precopy(state: SourceState) -> Step:
    """The second time of a guest that policy stopped for the migration's sake: it does not end for all that."""
    if state.stage is not SourceStage.PRECOPY or (state.paused and not state.suspended):
        return state, ()
    pending = _names(state.acks.pending)
    if state.suspended:
        return _abort(state, AbortReason.NOT_CONVERGING, pending)
    if state.suspend_on_timeout:
        return replace(state, suspended=True), (Note("suspend"), StartTimer(Timer.PRECOPY), Do.PAUSE)
    return _abort(state, AbortReason.ACK_TIMEOUT if pending else AbortReason.NOT_CONVERGING, pending)


def _timer_ack(state: SourceState) -> Step:
    pending = state.acks.pending
    if state.stage is not SourceStage.PRECOPY or state.released or state.suspend_on_timeout or not pending:
        return state, ()
    return _abort(state, AbortReason.ACK_TIMEOUT, _names(pending))


def _fails(reason: AbortReason) -> Callable[[SourceState], Step]:
    def handler(state: SourceState) -> Step:
        return _abort(state, reason)

    return handler


def _vmm_died(state: SourceState) -> Step:
    """A dead VMM cannot run: unsealed it is a crash of the owner; submitted, the ledger decides as ever."""
    state = replace(state, vmm_dead=True)
    if state.stage in (SourceStage.COMMITTED, SourceStage.DISCARDING, SourceStage.SUBMITTED):
        return state, ()
    if state.stage is SourceStage.LAST_PASS and state.sealed:
        return state, ()
    return _vmm_gone(state)


def _vmm_gone(state: SourceState) -> Step:
    if state.stage in (SourceStage.DECLARING,):
        return state, ()
    return replace(state, stage=SourceStage.DECLARING, submitted=False), (Note("vmm_died"), Do.DECLARE_CRASHED)


def _crash_recorded(state: SourceState) -> Step:
    if state.stage is not SourceStage.DECLARING:
        return state, ()
    return replace(state, stage=SourceStage.ENDED_CRASHED), ()


def _vitals(good: bool) -> Callable[[SourceState], Step]:
    def handler(state: SourceState) -> Step:
        return _gate(replace(state, vitals=good))

    return handler


_SEEN = {
    Seen.BEGIN: _begin,
    Seen.BOUND: _bound,
    Seen.ACTIVE: _active,
    Seen.PARKED: _parked,
    Seen.COMPLETED: _completed,
    Seen.SHIMS_SENT: _sent,
    Seen.COMMITTED: _committed,
    Seen.DONE_KNOWN: _done_known,
    Seen.DISCARDED: _discarded,
    Seen.SHIMS_BACK: _shims_back,
    Seen.SHIMS_BACK_RESET: _shims_back_reset,
    Seen.ENGINE_OVER: _engine_over,
    Seen.ENGINE_SEALED: _engine_sealed,
    Seen.ABORT_RECORDED: _abort_recorded,
    Seen.LEDGER_REFUSED: _write_uncertain,
    Seen.LEDGER_UNKNOWN: _write_uncertain,
    Seen.RETRY_DUE: _retry_due,
    Seen.PAUSED: _paused,
    Seen.PAUSE_QUEUED: _pause_queued,
    Seen.RESUMED: _resumed,
    Seen.RESUME_FAILED: _resume_failed,
    Seen.TIMER_PRECOPY: _timer_precopy,
    Seen.TIMER_ACK: _timer_ack,
    Seen.TIMER_GATE_WAIT: _timer_gate_wait,
    Seen.TIMER_SWITCHOVER: _fails(AbortReason.SWITCHOVER_TIMEOUT),
    Seen.ENGINE_FAILED: _fails(AbortReason.ENGINE_FAILED),
    Seen.SHIM_FAILED: _fails(AbortReason.SHIM_FAILED),
    Seen.DEST_FAILED: _fails(AbortReason.DESTINATION_LOST),
    Seen.GUEST_ENDED: _guest_ended,
    Seen.VMM_DIED: _vmm_died,
    Seen.CRASH_RECORDED: _crash_recorded,
    Seen.VITALS_GOOD: _vitals(True),
    Seen.VITALS_BAD: _vitals(False),
}
