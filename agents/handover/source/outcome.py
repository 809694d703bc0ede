"""PURE. What the ledger says of the attempt: committed and then done, or that it can never commit (H5, H6, H9)."""

from __future__ import annotations

from dataclasses import replace

from agents.handover.source.back import abort, ended, vmm_gone
from agents.handover.source.state import SourceStage, SourceState, Step, names, with_requests
from agents.handover.words import (
    Do,
    Note,
    RecordRead,
    RecordSeen,
    RequestsSeen,
    WantRunSeen,
    WriteAbort,
)
from orchestrator.core import handover
from orchestrator.core.errors import AbortReason
from orchestrator.core.handover import GuestRecord, Ownership, Verdict


def committed(state: SourceState) -> Step:
    """The guest is the destination's (H5): tell it to go."""
    return replace(state, stage=SourceStage.COMMITTED), (Note("committed"), Do.GO)


def done_known(state: SourceState) -> Step:
    """H9: DONE, from the peer or the ledger."""
    retire = (Do.RETIRE_DISKS,) if state.disks else ()
    return replace(state, stage=SourceStage.DISCARDING), (Note("done"), *retire, Do.DISCARD_SOURCE)


def discarded(state: SourceState) -> Step:
    """Nothing of the guest is left here: the attempt is over."""
    return replace(state, stage=SourceStage.ENDED_COMMITTED), ()


def _owner_moved(state: SourceState, record: GuestRecord) -> Step:
    """Committed: GO once, which the shell repeats until DONE is known; then, and only then, discard (H9)."""
    if handover.may_discard_source(record, state.here, state.inc):
        return done_known(state)
    return committed(state)


def read_then_decide(state: SourceState) -> Step:
    """A conflict may answer a repeated copy of a write that won (H5), a lost answer says nothing."""
    return state, (Do.READ,)


def req_has_moved(state: SourceState, version: int) -> bool:
    """Somebody asked after the freeze. A guest that was stopped on purpose is never refused for that."""
    return not state.paused and not state.restarted and version > state.req_version


def read_after_submit(state: SourceState, event: RecordRead) -> Step:
    """The COMMIT's outcome was not clear: what the record says, read behind a barrier, decides (H5)."""
    moved = req_has_moved(state, event.req_version)
    ref = state.ref
    verdict = handover.verdict(event.record, state.here, ref.migration, ref.attempt, req_moved=moved)
    return _submitted_verdict(state, event.record, verdict, moved)


def _submitted_verdict(state: SourceState, record: GuestRecord, verdict: Verdict, moved: bool) -> Step:
    match verdict:
        case Verdict.COMMITTED:
            return _owner_moved(state, record)
        case Verdict.REFUSED:
            if record.phase is Ownership.OPEN and record.attempt == state.ref.attempt and moved:
                # The request won; the record is still open, so the abort itself is ours to write.
                late = replace(state, reason=AbortReason.LATE_SWITCHOVER_ACK, devices=names(state.acks.pending))
                return late, (_abort_command(late),)
            return refused(replace(state, reason=record.reason or state.reason))
        case Verdict.CRASHED:
            return replace(state, stage=SourceStage.ENDED_CRASHED), ()
        case Verdict.UNDECIDED:
            # Force an outcome: ABORT and COMMIT race on one version and the first writer wins (H6).
            return state, (_abort_command(state),)


def _abort_command(state: SourceState) -> WriteAbort:
    return WriteAbort(state.reason or AbortReason.LEDGER_UNREACHABLE, state.devices)


def refused(state: SourceState) -> Step:
    """The ledger says that this attempt can never commit: shims back, then the guest (which is sealed, or dead)."""
    reason = state.reason or AbortReason.LATE_SWITCHOVER_ACK
    state = replace(state, refused=True, submitted=False, reason=reason)
    if state.vmm_dead:
        return vmm_gone(state)
    return replace(state, stage=SourceStage.ROLLING_BACK), (Note("refused", str(reason)), Do.ROLL_BACK_SHIMS)


def read_while_recording(state: SourceState, event: RecordRead) -> Step:
    """An ABORT's outcome was not clear: write again only while the record still says OPEN for this attempt."""
    record, ref = event.record, state.ref
    ours = (record.migration, record.attempt) == (ref.migration, ref.attempt)
    still_open = record.phase is Ownership.OPEN and ours
    return (state, (Do.RETRY_LATER,)) if still_open else ended(state)


def read_while_declaring(state: SourceState, event: RecordRead) -> Step:
    """CRASHED was not clearly written: try again only while the record still names this host."""
    ours = event.record.owner == state.here and event.record.phase is not Ownership.CRASHED
    return (state, (Do.RETRY_LATER,)) if ours else (replace(state, stage=SourceStage.ENDED_CRASHED), ())


def abort_again(state: SourceState) -> Step:
    """A bounded pause is over: try once more to write the ABORT."""
    return state, (_abort_command(state),)


def is_final_news(state: SourceState, record: GuestRecord) -> bool:
    """A watch may show an old record; these contents can never be old news about this attempt."""
    if record.migration != state.ref.migration or record.attempt < state.ref.attempt:
        return False
    if record.attempt > state.ref.attempt or record.owner != state.here:
        return True
    return record.phase not in (Ownership.OPEN, Ownership.STARTING)


def news(state: SourceState, event: RecordSeen) -> Step:
    """Somebody else ended the attempt: nothing needs to be written, and the guest runs on here."""
    record = event.record
    if not is_final_news(state, record) or record.owner != state.here or record.phase is Ownership.CRASHED:
        return state, ()
    return abort(replace(state, refused=True), record.reason or AbortReason.CANCELLED, record.devices)


def news_after_submit(state: SourceState, event: RecordSeen | RecordRead) -> Step:
    """A watch shows the COMMIT's outcome before its answer comes; only contents that are final count."""
    record = event.record
    if not is_final_news(state, record):
        return state, ()
    if record.owner != state.here:
        return _owner_moved(state, record)
    if record.phase is Ownership.CRASHED:
        return state, ()
    return refused(replace(state, reason=record.reason or AbortReason.CANCELLED, devices=record.devices))


def news_at_the_end(state: SourceState, event: RecordSeen | RecordRead) -> Step:
    """Being ended already. If the ledger has its end, no ABORT needs to be written."""
    record = event.record
    if not is_final_news(state, record) or record.owner != state.here or record.phase is Ownership.CRASHED:
        return state, ()
    return replace(state, refused=True), ()


def vmm_death_noted(state: SourceState) -> Step:
    """Submitted: the ledger decides as ever."""
    return replace(state, vmm_dead=True), ()


def wish_noted(state: SourceState, event: WantRunSeen) -> Step:
    """From the freeze on it is queued: applied by whoever ends as owner, before any vCPU runs."""
    return replace(state, want_run=event.run), ()


def requests_noted(state: SourceState, event: RequestsSeen) -> Step:
    """For the report, and for the reason of an abort that the ledger may have decided."""
    if event.version <= state.req_version:
        return state, ()
    return replace(state, acks=with_requests(state.acks, event.entries)), ()
