"""PURE. The source's way back: devices first, then the guest, as its operator wishes, and then the ABORT (H4).

Also the end of an attempt whose VMM died: the guest was the owner's, so it crashed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from agents.handover.source.state import SourceStage, SourceState, Step
from agents.handover.words import (
    DevicesLost,
    DiskFailed,
    Do,
    FoundLate,
    Note,
    WantRunSeen,
    WriteAbort,
)
from orchestrator.core.errors import AbortReason

_SYMPTOMS = frozenset({AbortReason.DESTINATION_LOST, AbortReason.ENGINE_FAILED})
"""What the engine's own verdict looks like from elsewhere: the destination only sees its stream break."""


def abort(state: SourceState, reason: AbortReason, devices: tuple[str, ...] = ()) -> Step:
    """H4: before submit the source resumes alone and writes afterwards. Shims first, then the guest."""
    if state.stage in (SourceStage.NEW, SourceStage.BINDING):
        over = replace(state, stage=SourceStage.RECORDING, reason=reason)
        return (over, (WriteAbort(reason),)) if not state.refused else ended(over)
    state = replace(state, stage=SourceStage.ROLLING_BACK, reason=reason, devices=devices, submitted=False)
    return state, (Note("abort", f"{reason} {','.join(devices)}".strip()), Do.ROLL_BACK_SHIMS)


def fails(reason: AbortReason) -> Callable[[SourceState], Step]:
    """A handler that ends the attempt for `reason`."""

    def handler(state: SourceState) -> Step:
        return abort(state, reason)

    return handler


def disk_failed(state: SourceState, event: DiskFailed) -> Step:
    """H15. Before the drain the guest has noticed nothing; in it, it has stood still for nothing."""
    draining = state.stage in (SourceStage.DRAINING, SourceStage.LAST_PASS)
    return abort(state, AbortReason.DISK_DRAIN if draining else AbortReason.DISK_MIRROR_FAILED, (event.disk,))


def found_late(state: SourceState, event: FoundLate) -> Step:
    """The VMM's own verdict: a device inside it asked again after the freeze. The attempt ends for that."""
    return abort(state, AbortReason.LATE_SWITCHOVER_ACK, event.devices)


def found_late_after(state: SourceState, event: FoundLate) -> Step:
    """The attempt is being ended for what was the symptom of this verdict: the verdict is what is written down."""
    if state.reason not in _SYMPTOMS or state.refused:
        return state, ()
    return replace(state, reason=AbortReason.LATE_SWITCHOVER_ACK, devices=event.devices), ()


def shims_back(state: SourceState) -> Step:
    """The devices run here again: now the engine has to end the migration. A dead VMM is a crash instead."""
    if state.vmm_dead:
        return vmm_gone(state)
    return state, (Do.ABORT_ENGINE,)


def shims_back_reset(state: SourceState) -> Step:
    """A device that lost its state is reported as that, never as a clean abort."""
    return shims_back(replace(state, reason=AbortReason.DEVICE_RESET))


def devices_lost(state: SourceState, event: DevicesLost) -> Step:
    """The guest runs on with devices that do not know it: that is what the attempt came to, whatever ended it."""
    lost = event.devices
    state = replace(state, lost=lost, devices=lost, reason=AbortReason.DEVICE_RESET)
    return state, (Note("devices_lost", ",".join(lost)),)


def engine_over(state: SourceState) -> Step:
    """The attempt is over in the VMM. Apply the wish before anything else (5.2)."""
    stopped = state.paused or state.suspended
    if state.restarted or stopped != (not state.want_run):
        return _restore(state)
    return record_abort(state)


def engine_sealed(state: SourceState) -> Step:
    """It completed before the abort took effect: not submitted, so the guest is still ours (H4)."""
    if state.restarted and not state.refused:
        return replace(state, stage=SourceStage.SUBMITTED, submitted=True, sealed=True), (Do.READ,)
    return _restore(replace(state, sealed=True))


def _restore(state: SourceState) -> Step:
    """Restore want_run at the source."""
    state = replace(state, stage=SourceStage.RESUMING)
    return state, (Do.RESUME if state.want_run else Do.PAUSE,)


def paused_again(state: SourceState) -> Step:
    """The guest stands still, as wished; if the wish changed meanwhile, it is restored once more."""
    return record_abort(state) if not state.want_run else _restore(state)


def resumed_again(state: SourceState) -> Step:
    """The guest runs again; if the wish changed meanwhile, it is restored once more."""
    return record_abort(state) if state.want_run else _restore(state)


def resume_failed(state: SourceState) -> Step:
    """Block reactivation failed: no copy runs, nothing is started elsewhere, a person is needed."""
    return replace(state, stage=SourceStage.ENDED_NEEDS_OPERATOR), (Note("resume_failed"),)


def guest_is_gone(state: SourceState) -> Step:
    """Nothing to let run again. A lost device is told for all that."""
    lost = state.reason is AbortReason.DEVICE_RESET
    return record_abort(state if lost else replace(state, reason=AbortReason.GUEST_ENDED))


def wish_at_the_end(state: SourceState, event: WantRunSeen) -> Step:
    """The guest is up again and the attempt only has to be written down."""
    if event.run == state.want_run:
        return state, ()
    return replace(state, want_run=event.run), (Do.RESUME if event.run else Do.PAUSE,)


def record_abort(state: SourceState) -> Step:
    """The guest is as wished: write the ABORT, unless the ledger already says that nothing can be committed."""
    if state.refused:
        return ended(state)
    reason = state.reason or AbortReason.ENGINE_FAILED
    return replace(state, stage=SourceStage.RECORDING), (WriteAbort(reason, state.devices),)


def ended(state: SourceState) -> Step:
    """The attempt is over and the guest stays here."""
    return replace(state, stage=SourceStage.ENDED_ABORTED), (Note("ended", str(state.reason or "")),)


def vmm_gone(state: SourceState) -> Step:
    """A dead VMM cannot run, and it was the owner's: a crash of the guest."""
    state = replace(state, vmm_dead=True, submitted=False)
    return replace(state, stage=SourceStage.DECLARING), (Note("vmm_died"), Do.DECLARE_CRASHED)


def declare_again(state: SourceState) -> Step:
    """A bounded pause is over: try once more to write CRASHED."""
    return state, (Do.DECLARE_CRASHED,)


def crash_recorded(state: SourceState) -> Step:
    """The ledger says CRASHED: the attempt is over."""
    return replace(state, stage=SourceStage.ENDED_CRASHED), ()
