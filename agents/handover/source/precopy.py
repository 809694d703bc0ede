"""PURE. The source while the guest runs: its copying begins, the gate opens and closes, wishes are obeyed at once.

A request that is not durable and acknowledged keeps the gate closed. When the engine stops the guest, this ends: with
the freeze, with a bounded wait for an ACK, or with an abort.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from agents.handover.source.back import abort
from agents.handover.source.blackout import ack_noted, freeze, requests_late
from agents.handover.source.state import BEFORE_FREEZE, SourceStage, SourceState, Step, names, with_requests
from agents.handover.words import (
    Acked,
    Do,
    Note,
    Requested,
    RequestsSeen,
    RequestsWritten,
    WantRunSeen,
    WriteRequests,
)
from orchestrator.core.errors import AbortReason


def begin(state: SourceState) -> Step:
    """Have the ledger name the destination's process before anything moves."""
    return replace(state, stage=SourceStage.BINDING), (Do.BIND,)


def bound(state: SourceState) -> Step:
    """The ledger names it: begin to copy, local disks first. Memory is small against them and soon out of date."""
    if state.disks:
        return replace(state, stage=SourceStage.SYNCING), (Note("bound", state.inc), Do.SYNC_DISKS)
    return replace(state, stage=SourceStage.PRECOPY), (Note("bound", state.inc), Do.START_PRECOPY)


def disks_ready(state: SourceState) -> Step:
    """Every local disk is up to date but for what is being written: now the memory."""
    return replace(state, stage=SourceStage.PRECOPY), (Note("disks_ready"), Do.START_PRECOPY)


def disks_take_too_long(state: SourceState) -> Step:
    """They have had their time."""
    return abort(state, AbortReason.DISK_MIRROR_FAILED, state.disks)


def active(state: SourceState) -> Step:
    """Every device has begun and the engine has accepted: the gate may open."""
    return _gate(replace(state, active=True))


def requested(state: SourceState, event: Requested) -> Step:
    """A device asks for an ACK: the gate closes until the request is durable and acknowledged."""
    entry = event.entry
    acks = state.acks.request(entry)
    if acks == state.acks:
        return state, ()
    noted = replace(state, acks=acks, unwritten=(*state.unwritten, entry))
    gated, commands = _gate(noted)
    return gated, (Note("request", f"{entry.device}/{entry.generation}"), WriteRequests((entry,)), *commands)


def acked(state: SourceState, event: Acked) -> Step:
    """The destination has loaded what the request was about: the gate may open."""
    return _gate(ack_noted(state, event)[0])


def requests_written(state: SourceState, event: RequestsWritten) -> Step:
    """The version that we may check from now on covers what others wrote too, so theirs is learnt first."""
    seen = RequestsSeen(event.present, event.version)
    state, learnt = (requests_learnt if state.stage in BEFORE_FREEZE else requests_late)(state, seen)
    if state.stage not in BEFORE_FREEZE:
        return state, learnt
    state, gated = _gate(replace(state, unwritten=tuple(e for e in state.unwritten if e not in event.entries)))
    return state, (*learnt, *gated)


def requests_learnt(state: SourceState, event: RequestsSeen) -> Step:
    """Before the freeze a request through the ledger is one like any other."""
    if event.version <= state.req_version:
        return state, ()
    return _gate(replace(state, acks=with_requests(state.acks, event.entries), req_version=event.version))


def request_not_written(state: SourceState) -> Step:
    """A request cannot be made durable, so the gate would never open again: the attempt ends."""
    return abort(state, AbortReason.LEDGER_UNREACHABLE) if state.unwritten else (state, ())


def gate_may_open(state: SourceState) -> bool:
    """Every request is durable and acknowledged, or the guest is stopped on purpose; peer and quorum are alive.

    Not before every device had its chance to ask: one that begins after another was acknowledged would be late.
    """
    return state.active and _gate_is_open(state) and state.vitals


def _gate(state: SourceState) -> Step:
    """Open or close the gate while the guest is still the engine's to stop."""
    if state.stage is SourceStage.GATE_WAIT and _gate_is_open(state):
        return freeze(state)
    if state.stage is not SourceStage.PRECOPY:
        return state, ()
    if gate_may_open(state):
        if state.released:
            return state, ()
        return replace(state, released=True, opened=True), (Note("gate_open"), Do.RELEASE, Do.WRITE_ACKS)
    if state.released and not state.acks.gate_open:
        pending = ",".join(names(state.acks.pending))
        return replace(state, released=False), (Note("gate_closed", pending), Do.HOLD)
    return state, ()


def _gate_is_open(state: SourceState) -> bool:
    return state.acks.gate_open and (state.paused or not state.unwritten)


def pulse(good: bool) -> Callable[[SourceState], Step]:
    """A handler for vital signs: the gate opens only while peer and quorum answer."""

    def handler(state: SourceState) -> Step:
        return _gate(replace(state, vitals=good))

    return handler


def parked(state: SourceState) -> Step:
    """The engine stopped the guest when it liked: the blackout has begun."""
    if _gate_is_open(state):
        return freeze(state)
    if state.gate_wait:
        waited_for = ",".join(names(state.acks.pending))
        return replace(state, stage=SourceStage.GATE_WAIT), (Note("gate_wait", waited_for),)
    return gate_stayed_closed(replace(state, stage=SourceStage.FREEZING))


def gate_stayed_closed(state: SourceState) -> Step:
    """The engine stopped the guest and an ACK is missing. It is late if the gate had been open before."""
    reason = AbortReason.LATE_SWITCHOVER_ACK if state.opened else AbortReason.GATE_CLOSED_AT_CONVERGENCE
    return abort(state, reason, names(tuple(sorted({*state.acks.pending, *state.unwritten}))))


def want_run(state: SourceState, event: WantRunSeen) -> Step:
    """An operator's wish, while the guest is still ours to stop and start."""
    if event.run == state.want_run:
        return state, ()
    state = replace(state, want_run=event.run)
    if not state.want_run:
        return state, () if state.suspended else (Do.PAUSE,)
    if not state.paused or state.suspended:
        return state, ()
    return (state, (Do.RESUME,)) if may_resume_in_place(state) else abort(state, AbortReason.GUEST_RESUMED)


def may_resume_in_place(state: SourceState) -> bool:
    """A device inside the VMM that was stopped in pre-copy is never in pre-copy again: the migration is cancelled first
    and the guest starts when it is over."""
    return not state.inside or state.stage is not SourceStage.PRECOPY


def paused(state: SourceState) -> Step:
    """The guest is stopped on purpose: what is pending is the baseline, the gate opens and the hold is released."""
    return _gate(replace(state, paused=True, acks=state.acks.stop_by_wish()))


def pause_queued(state: SourceState) -> Step:
    """QEMU had parked already: a stop now would be forgotten by a cancel, so it only counts as a wish."""
    return replace(state, suspended=False), ()


def resumed(state: SourceState) -> Step:
    """The guest runs again within its attempt: requests count as before."""
    return _gate(replace(state, paused=False, acks=state.acks.resume_by_wish()))


def precopy_is_over(state: SourceState) -> Step:
    """Pre-copy has had its time: stop the guest for the migration's sake if policy says so, else end."""
    if state.suspend_on_timeout:
        return replace(state, suspended=True), (Note("suspend"), Do.PAUSE)
    pending = names(state.acks.pending)
    return abort(state, AbortReason.ACK_TIMEOUT if pending else AbortReason.NOT_CONVERGING, pending)


def suspended_in_vain(state: SourceState) -> Step:
    """Policy stopped the guest for the migration's sake, and it does not end for all that."""
    return abort(state, AbortReason.NOT_CONVERGING, names(state.acks.pending))


def ack_is_missing(state: SourceState) -> Step:
    """The gate was closed for too long: the attempt ends and names the devices."""
    return abort(state, AbortReason.ACK_TIMEOUT, names(state.acks.pending))
