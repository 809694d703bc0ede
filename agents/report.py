"""PURE. What one attempt came to, drawn from the source session's final state and its time line."""

from __future__ import annotations

from collections.abc import Sequence

from agents.source_session import SourceStage, SourceState
from orchestrator.core.records import AttemptReport, MigrationPhase, TimelineEntry

_PHASES = {
    SourceStage.NEW: MigrationPhase.PREPARING,
    SourceStage.BINDING: MigrationPhase.PREPARING,
    SourceStage.PRECOPY: MigrationPhase.PRECOPY,
    SourceStage.GATE_WAIT: MigrationPhase.SWITCHOVER,
    SourceStage.FREEZING: MigrationPhase.SWITCHOVER,
    SourceStage.LAST_PASS: MigrationPhase.SWITCHOVER,
    SourceStage.SUBMITTED: MigrationPhase.SWITCHOVER,
    SourceStage.COMMITTED: MigrationPhase.COMMITTED,
    SourceStage.DISCARDING: MigrationPhase.FINALIZING,
    SourceStage.ENDED_COMMITTED: MigrationPhase.FINALIZING,
}


def phase_of(stage: SourceStage) -> MigrationPhase:
    """A source session's stage in the words of a migration's users."""
    return _PHASES.get(stage, MigrationPhase.ABORTING)


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
    destination: str,
    zxid: int,
    ledger_writes: int,
    transferred_bytes: int,
    duration_ms: float,
) -> AttemptReport:
    """`arrival` is what the destination noted, on its own clock."""
    committed = state.stage in (SourceStage.ENDED_COMMITTED, SourceStage.COMMITTED, SourceStage.DISCARDING)
    stopped_on_purpose = state.paused or state.suspended
    return AttemptReport(
        attempt=state.ref.attempt,
        outcome="COMMITTED" if committed else "ABORTED",
        reason=None if committed else state.reason,
        devices=() if committed else state.devices,
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
    )
