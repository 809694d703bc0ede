"""PURE. The source while the guest stands: freeze, the one check for late ACKs, the last pass, the COMMIT (H3, H14)."""

from __future__ import annotations

from dataclasses import replace

from agents.handover.source.back import abort, vmm_gone
from agents.handover.source.outcome import vmm_death_noted
from agents.handover.source.state import SourceStage, SourceState, Step, names, with_requests
from agents.handover.words import (
    Acked,
    Commit,
    Do,
    Drained,
    LoadedReport,
    Note,
    Quiesced,
    Requested,
    RequestsSeen,
)
from orchestrator.core import disks
from orchestrator.core.errors import AbortReason
from orchestrator.core.ids import AckRequest


def freeze(state: SourceState) -> Step:
    """The guest stands: stop the devices, or go to the check at once when there are none outside the VMM."""
    state = replace(state, stage=SourceStage.FREEZING)
    if not state.has_devices:
        return check(state, Quiesced(()))
    return state, (Note("frozen"), Do.QUIESCE)


def check(state: SourceState, event: Quiesced) -> Step:
    """The one check for late ACKs (H3). It passes into the last pass, or turns the source round."""
    state = replace(state, acks=with_requests(state.acks, event.newest).freeze())
    late = late_at_check(state)
    if late:
        return abort(state, AbortReason.LATE_SWITCHOVER_ACK, names(late))
    state = replace(state, acks=state.acks.pass_check(), sent=not state.has_devices)
    if not must_drain(state):
        return replace(state, stage=SourceStage.LAST_PASS), (Note("check_passed"), Do.PROCEED)
    return replace(state, stage=SourceStage.DRAINING), (Note("check_passed"), Do.DRAIN_DISKS)


def must_drain(state: SourceState) -> bool:
    """H15: the engine goes on only when no write to a local disk is on its way any more. It does not ask itself."""
    return bool(state.disks)


def drained(state: SourceState, event: Drained) -> Step:
    """Every local disk is at the destination, to the last write. It lets go of the images beside the last pass."""
    state = replace(state, stage=SourceStage.LAST_PASS, drained=event.points)
    return state, (Note("drained"), Do.RELEASE_DISKS, Do.PROCEED)


def stands_too_long(state: SourceState) -> Step:
    """The guest has stood still for as long as policy allows: it runs on here."""
    if state.stage is SourceStage.DRAINING:
        return abort(state, AbortReason.DISK_DRAIN, state.disks)
    return abort(state, AbortReason.SWITCHOVER_TIMEOUT)


def late_at_check(state: SourceState) -> tuple[AckRequest, ...]:
    """The one look, before anything that cannot be taken back (H3, R17 in our words)."""
    return state.acks.late


def requests_late(state: SourceState, event: RequestsSeen) -> Step:
    """After the freeze it is late (H14), unless the guest was stopped on purpose."""
    if event.version <= state.req_version:
        return state, ()
    state = replace(state, acks=with_requests(state.acks, event.entries))
    return (state, ()) if state.paused else abort(state, AbortReason.LATE_SWITCHOVER_ACK, names(state.acks.pending))


def requested_too_late(state: SourceState, event: Requested) -> Step:
    """A device's request after the check is noted and changes nothing."""
    return state, (Note("request_too_late", f"{event.entry.device}/{event.entry.generation}"),)


def ack_noted(state: SourceState, event: Acked) -> Step:
    """Note an ACK that comes when it can no longer open the gate."""
    return replace(state, acks=state.acks.ack(event.entry)), ()


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


def loaded(state: SourceState, event: LoadedReport) -> Step:
    """The destination has loaded and validated. Unequal data ends the attempt; another process's report is dropped."""
    if event.inc != state.inc:
        return state, ()
    if not event.equal:
        return abort(state, AbortReason.SHIM_FAILED)
    if not disks.has_every_write(state.drained, event.images):
        return abort(state, AbortReason.DISK_DRAIN, state.disks)
    return _advance(replace(state, loaded=True))


def completed(state: SourceState) -> Step:
    """The VMM has sent everything: it is sealed, and cannot run again by itself."""
    return _advance(replace(state, sealed=True))


def sent(state: SourceState) -> Step:
    """The devices have sent everything."""
    return _advance(replace(state, sent=True))


def vmm_died_in_last_pass(state: SourceState) -> Step:
    """Sealed, the guest is all at the destination: it may still be committed."""
    return vmm_death_noted(state) if state.sealed else vmm_gone(state)
