"""What the API decides, apart from the reading and writing: values in, values out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from orchestrator.core.agent import GuestStatus, RunState
from orchestrator.core.errors import DroverError, FailureReason, RefusalReason
from orchestrator.core.handover import GuestRecord, Ownership, may_retry
from orchestrator.core.migration import Situation, situation
from orchestrator.core.records import (
    AttemptReport,
    Cordon,
    EvacuationState,
    MigrationPhase,
    MigrationState,
    RequestRecord,
    WantRun,
)

# --- names and request ids --------------------------------------------------------------------------------------------

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{1,127}")
_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def is_id(text: str) -> bool:
    """Could this be the id of a migration, an evacuation or a guest's life? Anything else is not looked up."""
    return _ID.fullmatch(text) is not None


def request_id_error(request_id: str) -> str:
    """Empty when sound; no id at all is sound as well, and not repeat-safe."""
    if not request_id or _REQUEST_ID.fullmatch(request_id):
        return ""
    return "must be 1 to 64 letters, digits, '-', '_' and '.', the first a letter or digit; a UUID is best"


def repeated(found: RequestRecord | None, request_id: str, digest: str) -> str:
    """The resource that an earlier call with this id created; empty: this is the first. REQUEST_ID_REUSED for another
    content under the same id."""
    if found is None:
        return ""
    if found.digest != digest:
        raise DroverError(
            RefusalReason.REQUEST_ID_REUSED,
            f"request_id {request_id} belongs to another request, which created {found.operation}: use a new one",
            field="request_id",
            details={"operation": found.operation},
        )
    return found.operation


# --- migrations -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Standing:
    """Where one migration stands: record and state as they were at the same instant, and the reports."""

    record: GuestRecord | None
    record_version: int
    record_mzxid: int
    state: MigrationState
    state_version: int
    reports: tuple[AttemptReport, ...] = ()


class CancelStep(StrEnum):
    """What a cancel writes; what comes of the write is the answer (H6)."""

    SETTLE = "SETTLE"
    """No attempt was opened: compare-and-set of the state alone, after which none can be."""
    ABORT = "ABORT"
    """OPEN -> ABORTED(CANCELLED), compare-and-set of the record."""
    CLOSE = "CLOSE"
    """In RETRY_WAIT: ABORTED -> IDLE(S) together with the state."""
    FORBID = "FORBID"
    """Aborted, the coordinator has not reported yet: the wish, while the record stays as it is. No attempt follows it,
    and the attempt's report is still taken."""
    NOTHING = "NOTHING"
    """It is cancelled already."""


def cancel_step(migration: str, standing: Standing) -> CancelStep:
    """Raises ALREADY_COMMITTED (with the zxid where it is known) and ALREADY_ENDED."""
    state, record = standing.state, standing.record
    if state.phase is MigrationPhase.CANCELLED:
        return CancelStep.NOTHING
    if state.phase is MigrationPhase.SUCCEEDED:
        raise _committed(migration, state.destination, _commit_zxid(standing.reports))
    if state.phase is MigrationPhase.FAILED:
        raise _ended(migration, f"it has failed: {state.failure}")
    match situation(record, migration, state):
        case Situation.FREE | Situation.BUSY:
            return CancelStep.SETTLE
        case Situation.OPEN | Situation.BOUND:
            return CancelStep.ABORT
        case Situation.ABORTED:
            assert record is not None
            if state.cancel_requested or not may_retry(record):
                return CancelStep.NOTHING
            return CancelStep.CLOSE if state.phase is MigrationPhase.RETRY_WAIT else CancelStep.FORBID
        case Situation.STAYED:
            return CancelStep.NOTHING
        case Situation.COMMITTED:
            raise _committed(migration, state.destination, standing.record_mzxid)
        case Situation.ARRIVED:
            raise _committed(migration, state.destination, _commit_zxid(standing.reports))
        case Situation.CRASHED:
            raise _ended(migration, "its guest has crashed")
        case Situation.GONE:
            raise _ended(migration, "its guest is gone")


def _commit_zxid(reports: Sequence[AttemptReport]) -> int:
    return next((report.zxid for report in reversed(reports) if report.outcome == "COMMITTED"), 0)


def _committed(migration: str, destination: str, zxid: int) -> DroverError:
    when = f" at zxid {zxid}" if zxid else ""
    details = {"destination": destination} | ({"zxid": str(zxid)} if zxid else {})
    return DroverError(
        RefusalReason.ALREADY_COMMITTED,
        f"migration {migration} has committed{when}: its guest belongs to {destination}",
        details=details,
    )


def _ended(migration: str, why: str) -> DroverError:
    return DroverError(RefusalReason.ALREADY_ENDED, f"migration {migration} cannot be cancelled: {why}")


def cancelled_state(state: MigrationState, *, wall_s: float) -> MigrationState:
    """Terminal: nothing follows for the coordinator to do."""
    return replace(
        state,
        phase=MigrationPhase.CANCELLED,
        cancel_requested=True,
        failure=FailureReason.CANCELLED,
        message="cancelled on request",
        end_time_s=wall_s,
        retry_wait_ms=0,
    )


def cancel_wished(state: MigrationState) -> MigrationState:
    """The state that asks the coordinator to cancel the migration; the wish is never taken back."""
    return replace(state, cancel_requested=True)


_FINE_IN = {
    Situation.OPEN: frozenset({MigrationPhase.PREPARING, MigrationPhase.ABORTING}),
    Situation.BOUND: frozenset(
        {MigrationPhase.PREPARING, MigrationPhase.PRECOPY, MigrationPhase.SWITCHOVER, MigrationPhase.ABORTING}
    ),
    Situation.COMMITTED: frozenset({MigrationPhase.COMMITTED, MigrationPhase.FINALIZING}),
}
"""The phases of an agent's sample that the record allows; a sample may be older than the record that was read."""

_COARSE = {
    Situation.FREE: MigrationPhase.PENDING,
    Situation.BUSY: MigrationPhase.PENDING,
    Situation.OPEN: MigrationPhase.PREPARING,
    Situation.BOUND: MigrationPhase.PRECOPY,
    Situation.COMMITTED: MigrationPhase.COMMITTED,
    Situation.ABORTED: MigrationPhase.ABORTING,
    Situation.ARRIVED: MigrationPhase.FINALIZING,
    Situation.STAYED: MigrationPhase.CANCELLED,
}


def migration_phase(migration: str, standing: Standing, sampled: MigrationPhase | None) -> MigrationPhase:
    """The phase that users see: the verdict if there is one, else what the record says, in the agent's finer words."""
    state = standing.state
    if state.phase.terminal:
        return state.phase
    where = situation(standing.record, migration, state)
    if where is Situation.ABORTED and state.phase is MigrationPhase.RETRY_WAIT:
        return MigrationPhase.RETRY_WAIT
    if sampled is not None and sampled in _FINE_IN.get(where, ()):
        return sampled
    return _COARSE.get(where, state.phase)


def cancel_is_wished(migration: str, standing: Standing) -> bool:
    """Somebody asked for the cancel, whether the coordinator has seen it or not."""
    record = standing.record
    if standing.state.cancel_requested or record is None or record.migration != migration:
        return standing.state.cancel_requested
    return record.phase is Ownership.ABORTED and not may_retry(record)


# --- guests -----------------------------------------------------------------------------------------------------------


def run_state(record: GuestRecord, told: GuestStatus | None) -> RunState:
    """What the record settles by itself, else what the owner's agent says, else UNKNOWN."""
    if record.phase is Ownership.STARTING:
        return RunState.STARTING
    if record.phase in (Ownership.CRASHED, Ownership.GONE):
        return RunState.ENDED
    return RunState.UNKNOWN if told is None else told.run_state


def ownership(record: GuestRecord) -> str:
    """As users are told it."""
    return "STOPPED" if record.stopped else record.phase.value


def present_migration(record: GuestRecord) -> str:
    """The migration that the guest is in; empty when it is in none."""
    moving = record.phase in (Ownership.OPEN, Ownership.COMMITTED, Ownership.ABORTED)
    return record.migration if moving else ""


def need_alive(record: GuestRecord) -> None:
    """Raises GUEST_NOT_RUNNING for a guest whose life is over."""
    if record.phase is Ownership.CRASHED:
        what = "is stopped" if record.stopped else "has crashed"
        said = f"guest {record.name} {what} on {record.owner.host}: start it again, or stop it to free its name"
        raise DroverError(RefusalReason.GUEST_NOT_RUNNING, said)
    if record.phase is Ownership.GONE:
        raise DroverError(RefusalReason.GUEST_NOT_RUNNING, f"guest {record.name} has ended")


def need_movable(record: GuestRecord) -> None:
    """Raises GUEST_NOT_RUNNING and GUEST_IS_MIGRATING: may a migration be asked for?"""
    need_alive(record)
    if record.phase is Ownership.STARTING:
        raise DroverError(RefusalReason.GUEST_NOT_RUNNING, f"guest {record.name} is still starting: try again")
    if present := present_migration(record):
        said = f"guest {record.name} is in migration {present} already"
        raise DroverError(RefusalReason.GUEST_IS_MIGRATING, said, details={"migration": present})


def wish(current: WantRun | None, run: bool, by: str) -> WantRun | None:
    """The wish to write; None when it stands there already."""
    known = current or WantRun()
    if current is not None and known.run == run:
        return None
    return replace(known, run=run, by=by, sequence=known.sequence + 1)


class StopStep(StrEnum):
    """What comes next on the way to a guest's end."""

    ENDED = "ENDED"
    END = "END"
    """Ask the owner's agent to end it."""
    BURY = "BURY"
    """As END; nothing runs any more, so the record may be closed without its agent."""
    FINISH_BIRTH = "FINISH_BIRTH"
    """Ask the owner's agent to start it after all: its record leaves STARTING in no other way but by its agent, and
    whoever asked for the start may be gone."""
    CANCEL = "CANCEL"
    WAIT = "WAIT"
    """For the record to change."""


_STOP = {
    Ownership.GONE: StopStep.ENDED,
    Ownership.IDLE: StopStep.END,
    Ownership.CRASHED: StopStep.BURY,
    Ownership.OPEN: StopStep.CANCEL,
    Ownership.ABORTED: StopStep.CANCEL,
    Ownership.COMMITTED: StopStep.WAIT,
    Ownership.STARTING: StopStep.FINISH_BIRTH,
}


def stop_step(record: GuestRecord) -> StopStep:
    """What a call that stops the guest has to do now; it asks again after each step."""
    return _STOP[record.phase]


class StartStep(StrEnum):
    """What comes next on the way to a guest that runs again."""

    RUNS = "RUNS"
    """It is on its way somewhere, so it has not ended."""
    LOOK = "LOOK"
    """Ask its agent whether it has shut down by itself."""
    KEEP = "KEEP"
    """It has crashed: its agent has to see to it that nothing of it is left."""
    PLACE = "PLACE"
    """Nothing of it is left: write that it starts, if its host has room."""
    START = "START"
    """Written: ask its agent to start it."""
    OVER = "OVER"


_START = {
    Ownership.GONE: StartStep.OVER,
    Ownership.IDLE: StartStep.LOOK,
    Ownership.CRASHED: StartStep.KEEP,
    Ownership.OPEN: StartStep.RUNS,
    Ownership.ABORTED: StartStep.RUNS,
    Ownership.COMMITTED: StartStep.RUNS,
    Ownership.STARTING: StartStep.START,
}


def start_step(record: GuestRecord) -> StartStep:
    """What a call that starts the guest again has to do now; it asks again after each step."""
    return StartStep.PLACE if record.stopped else _START[record.phase]


# --- hosts and evacuations --------------------------------------------------------------------------------------------


def cordon(current: Cordon, on: bool, why: str, by: str) -> Cordon | None:
    """The cordon to write; None when it stands there already. A reason that is not given leaves the old one."""
    if not on:
        return replace(current, on=False, why="", by="") if current.on else None
    wanted = replace(current, on=True, why=why or (current.why if current.on else ""), by=by)
    return None if current.on and wanted.why == current.why else wanted


def is_safe_to_power_off(state: EvacuationState, cordon: Cordon | None, cordon_version: int) -> bool:
    """What the coordinator saw holds while the host is under the same cordon: nothing can have come there meanwhile."""
    return state.safe_to_power_off and cordon is not None and cordon.on and state.safe_at == cordon_version
