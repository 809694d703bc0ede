"""PURE. What one attempt came to, drawn from the source session's final state and its time line."""

from __future__ import annotations

from collections.abc import Sequence

from agents.handover.source import SourceStage, SourceState
from agents.shims.inside import InVmmDevice
from orchestrator.core.errors import AbortReason
from orchestrator.core.records import AttemptReport, DeviceProgress, MigrationPhase, TimelineEntry

DEVICES_LOST = "devices_lost"
"""Event of the time line, at either end; its detail has the names."""

_PHASES = {
    SourceStage.NEW: MigrationPhase.PREPARING,
    SourceStage.BINDING: MigrationPhase.PREPARING,
    SourceStage.SYNCING: MigrationPhase.PRECOPY,
    SourceStage.PRECOPY: MigrationPhase.PRECOPY,
    SourceStage.GATE_WAIT: MigrationPhase.SWITCHOVER,
    SourceStage.FREEZING: MigrationPhase.SWITCHOVER,
    SourceStage.DRAINING: MigrationPhase.SWITCHOVER,
    SourceStage.LAST_PASS: MigrationPhase.SWITCHOVER,
    SourceStage.SUBMITTED: MigrationPhase.SWITCHOVER,
    SourceStage.COMMITTED: MigrationPhase.COMMITTED,
    SourceStage.DISCARDING: MigrationPhase.FINALIZING,
    SourceStage.ENDED_COMMITTED: MigrationPhase.FINALIZING,
}


def phase_of(stage: SourceStage) -> MigrationPhase:
    """A source session's stage in the words of a migration's users."""
    return _PHASES.get(stage, MigrationPhase.ABORTING)


def device_entries(inside: Sequence[InVmmDevice], began_s: float, where: str) -> list[TimelineEntry]:
    """What was done to the devices inside the VMM since `began_s`; all clocks of a host are one."""
    return [
        TimelineEntry(round((event.at_s - began_s) * 1000, 2), where, "device", f"{one.device}: {event.what}")
        for one in inside
        for event in one.events
        if event.at_s >= began_s
    ]


def device_progress(one: InVmmDevice) -> DeviceProgress:
    """The last look at a device inside the VMM, as the report keeps it."""
    return DeviceProgress(
        name=one.device,
        initial_bytes=one.initial_bytes,
        stop_copy_bytes=one.stop_copy_bytes,
        precopy_sent_bytes=one.precopy_sent_bytes,
        stop_copy_sent_bytes=one.stop_copy_sent_bytes,
        reinits=one.reinits,
        late=one.late,
        lost=one.lost,
    )


def blackout_ms(timeline: Sequence[TimelineEntry]) -> float:
    """From the last time the vCPUs stopped to when the guest ran again: here (abort), or as DONE told (commit).

    0 when the guest never stopped, or was stopped on purpose and did not start again.
    """
    stopped: float | None = None
    total = 0.0
    for entry in timeline:
        if entry.event == "vcpus stopped":
            stopped = entry.at_ms
        elif entry.event in ("vcpus run", "runs there", "done") and stopped is not None:
            total, stopped = entry.at_ms - stopped, None
    return round(total, 2)


def report_of(
    state: SourceState,
    timeline: Sequence[TimelineEntry],
    arrival: Sequence[TimelineEntry],
    *,
    inside: Sequence[InVmmDevice] = (),
    destination: str,
    zxid: int,
    ledger_writes: int,
    transferred_bytes: int,
    duration_ms: float,
) -> AttemptReport:
    """`arrival` is what the destination noted, on its own clock.

    A device that lost its state is named whatever else the attempt came to, also when the guest moved.
    """
    committed = state.stage in (SourceStage.ENDED_COMMITTED, SourceStage.COMMITTED, SourceStage.DISCARDING)
    stopped_on_purpose = state.paused or state.suspended
    lost = _lost_there(arrival) if committed else state.lost
    return AttemptReport(
        attempt=state.ref.attempt,
        outcome="COMMITTED" if committed else "ABORTED",
        reason=AbortReason.DEVICE_RESET if lost else None if committed else state.reason,
        devices=lost if committed else state.devices,
        message=_said_of(lost, destination if committed else state.here.host) if lost else "",
        source=state.here.host,
        destination=destination,
        inc=state.inc,
        zxid=zxid,
        requests=state.acks.requests,
        acks=state.acks.acks,
        requested_while_stopped=state.acks.while_stopped,
        blackout_ms=0.0 if stopped_on_purpose and not state.suspended else blackout_ms(timeline),
        transferred_bytes=transferred_bytes,
        duration_ms=round(duration_ms, 2),
        ledger_writes=ledger_writes,
        timeline=(*timeline, *arrival),
        device_progress=tuple(map(device_progress, inside)),
        needs_operator=state.stage is SourceStage.ENDED_NEEDS_OPERATOR,
    )


def _lost_there(arrival: Sequence[TimelineEntry]) -> tuple[str, ...]:
    return tuple(name for entry in arrival if entry.event == DEVICES_LOST for name in entry.detail.split(","))


def _said_of(lost: Sequence[str], host: str) -> str:
    return f"{', '.join(lost)} came back by a reset and lost its state; the guest runs on {host} with it"
