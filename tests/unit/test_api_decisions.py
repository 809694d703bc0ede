"""What the API decides: the cancel table and what a cancel promises, repeated requests, wishes, phases, cordons."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.api import decisions
from orchestrator.api.decisions import CancelStep, Standing, StopStep
from orchestrator.core import handover, migration
from orchestrator.core.agent import GuestStatus, RunState
from orchestrator.core.errors import AbortReason, DroverError, FailureReason, RefusalReason
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import HostRef
from orchestrator.core.records import (
    AttemptReport,
    Cordon,
    EvacuationState,
    MigrationPhase,
    MigrationSpec,
    MigrationState,
    RequestRecord,
    WantRun,
)

H1, H2 = HostRef("h1", "b1"), HostRef("h2", "b2")
M = "m1"
IDLE = GuestRecord("web", Ownership.IDLE, H1)
OPEN = handover.open_attempt(IDLE, M, 1, H2, epoch=1, writer="c")
BOUND = handover.bind(OPEN, M, 1, "inc1", writer="a")
COMMITTED = handover.commit(BOUND, M, 1, "inc1", writer="a")
ARRIVED = handover.done(COMMITTED, M, 1, "inc1", writer="b")
LATE = handover.abort(BOUND, M, 1, AbortReason.LATE_SWITCHOVER_ACK, ("nic",), writer="a")
CANCELLED = handover.abort(BOUND, M, 1, AbortReason.CANCELLED, writer="x")
STAYED = handover.close(LATE, M, writer="x")
CRASHED = handover.crashed(BOUND, writer="a")
GONE = handover.gone(IDLE, writer="a")
ELSEWHERE = handover.open_attempt(IDLE, "m2", 1, H2, epoch=1, writer="c")

P = MigrationPhase
PENDING = MigrationState()
UNDER_WAY = MigrationState(P.PREPARING, attempt=1, source="h1", destination="h2")
WAITING = replace(UNDER_WAY, phase=P.RETRY_WAIT, retry_wait_ms=50)
COMMIT_REPORT = AttemptReport(1, "COMMITTED", zxid=77)


def standing(
    record: GuestRecord | None, state: MigrationState, reports: tuple[AttemptReport, ...] = (), mzxid: int = 5
) -> Standing:
    return Standing(record, 3, mzxid, state, 2, reports)


@pytest.mark.parametrize(
    ("record", "state", "step"),
    [
        (IDLE, PENDING, CancelStep.SETTLE),
        (ELSEWHERE, PENDING, CancelStep.SETTLE),
        (OPEN, UNDER_WAY, CancelStep.ABORT),
        (BOUND, UNDER_WAY, CancelStep.ABORT),
        (LATE, UNDER_WAY, CancelStep.FORBID),
        (LATE, WAITING, CancelStep.CLOSE),
        (LATE, replace(UNDER_WAY, cancel_requested=True), CancelStep.NOTHING),
        (CANCELLED, UNDER_WAY, CancelStep.NOTHING),
        (STAYED, WAITING, CancelStep.NOTHING),
        (IDLE, replace(UNDER_WAY, phase=P.CANCELLED), CancelStep.NOTHING),
    ],
)
@pytest.mark.rule("H6")
def test_a_cancel_writes_where_the_record_stands(record: GuestRecord, state: MigrationState, step: CancelStep) -> None:
    assert decisions.cancel_step(M, standing(record, state)) is step


@pytest.mark.parametrize(
    ("record", "state", "reports", "reason", "zxid"),
    [
        (COMMITTED, UNDER_WAY, (), RefusalReason.ALREADY_COMMITTED, "5"),
        (ARRIVED, UNDER_WAY, (), RefusalReason.ALREADY_COMMITTED, None),
        (ARRIVED, UNDER_WAY, (COMMIT_REPORT,), RefusalReason.ALREADY_COMMITTED, "77"),
        (ELSEWHERE, UNDER_WAY, (COMMIT_REPORT,), RefusalReason.ALREADY_COMMITTED, "77"),
        (ARRIVED, replace(UNDER_WAY, phase=P.SUCCEEDED), (COMMIT_REPORT,), RefusalReason.ALREADY_COMMITTED, "77"),
        (IDLE, replace(UNDER_WAY, phase=P.FAILED), (), RefusalReason.ALREADY_ENDED, None),
        (CRASHED, UNDER_WAY, (), RefusalReason.ALREADY_ENDED, None),
        (GONE, PENDING, (), RefusalReason.ALREADY_ENDED, None),
        (None, PENDING, (), RefusalReason.ALREADY_ENDED, None),
    ],
)
@pytest.mark.rule("H6")
def test_a_cancel_that_comes_too_late_says_what_came_first(
    record: GuestRecord | None,
    state: MigrationState,
    reports: tuple[AttemptReport, ...],
    reason: RefusalReason,
    zxid: str | None,
) -> None:
    with pytest.raises(DroverError) as caught:
        decisions.cancel_step(M, standing(record, state, reports))
    assert (caught.value.reason, caught.value.details.get("zxid")) == (reason, zxid)


def _written(step: CancelStep, before: Standing) -> Standing:
    """What the ledger holds once the cancel's write was applied."""
    record, state = before.record, before.state
    if step is CancelStep.NOTHING:
        return before
    if step is CancelStep.SETTLE:
        return replace(before, state=decisions.cancelled_state(state, wall_s=1.0))
    assert record is not None
    if step is CancelStep.ABORT:
        return replace(before, record=handover.abort(record, M, record.attempt, AbortReason.CANCELLED, writer="x"))
    if step is CancelStep.CLOSE:
        closed = handover.close(record, M, writer="x")
        return replace(before, record=closed, state=decisions.cancelled_state(state, wall_s=1.0))
    return replace(before, state=decisions.cancel_wished(state))


RECORDS = (IDLE, OPEN, BOUND, COMMITTED, ARRIVED, LATE, CANCELLED, STAYED, CRASHED, GONE, ELSEWHERE, None)
STATES = st.builds(
    MigrationState,
    phase=st.sampled_from(MigrationPhase),
    attempt=st.integers(0, 2),
    source=st.just("h1"),
    destination=st.just("h2"),
    cancel_requested=st.booleans(),
    failure=st.none() | st.just(FailureReason.ATTEMPTS_EXHAUSTED),
)


@given(st.sampled_from(RECORDS), STATES, st.sampled_from([(), (COMMIT_REPORT,), (AttemptReport(1, "ABORTED"),)]))
@pytest.mark.rule("H6")
def test_after_a_cancel_no_coordinator_opens_an_attempt(
    record: GuestRecord | None, state: MigrationState, reports: tuple[AttemptReport, ...]
) -> None:
    """The coordinator's production machine, shown what the cancel left, settles as CANCELLED or is at its end."""
    before = standing(record, state, reports)
    try:
        step = decisions.cancel_step(M, before)
    except DroverError:
        return  # not answered "cancelled"
    after = _written(step, before)
    course = migration.start(MigrationSpec(M, "g", "web"), now_ms=0.0)
    event: migration.Event = migration.Read(after.record, after.state, after.reports)
    for _ in range(5):
        done = migration.step(course, event, now_ms=0.0)
        course = done.course
        if not done.commands:
            return
        (command,) = done.commands
        match command:
            case migration.FetchReport():
                event = migration.ReportAnswer(AttemptReport(command.attempt, command.outcome))
            case migration.Settle():
                assert command.phase is MigrationPhase.CANCELLED
                return
            case migration.End():
                return
            case _:
                pytest.fail(f"{command} after a cancel was answered")
    pytest.fail("the machine does not come to an end")


@pytest.mark.parametrize(
    ("record", "state", "sampled", "phase"),
    [
        (IDLE, PENDING, None, P.PENDING),
        (ELSEWHERE, PENDING, None, P.PENDING),
        (OPEN, UNDER_WAY, None, P.PREPARING),
        (OPEN, UNDER_WAY, P.SWITCHOVER, P.PREPARING),
        (BOUND, UNDER_WAY, None, P.PRECOPY),
        (BOUND, UNDER_WAY, P.SWITCHOVER, P.SWITCHOVER),
        (BOUND, UNDER_WAY, P.COMMITTED, P.PRECOPY),
        (COMMITTED, UNDER_WAY, P.SWITCHOVER, P.COMMITTED),
        (COMMITTED, UNDER_WAY, P.FINALIZING, P.FINALIZING),
        (ARRIVED, UNDER_WAY, P.SWITCHOVER, P.FINALIZING),
        (LATE, UNDER_WAY, P.SWITCHOVER, P.ABORTING),
        (LATE, WAITING, None, P.RETRY_WAIT),
        (STAYED, WAITING, None, P.CANCELLED),
        (CRASHED, UNDER_WAY, None, P.PREPARING),
        (ARRIVED, replace(UNDER_WAY, phase=P.SUCCEEDED), P.PRECOPY, P.SUCCEEDED),
    ],
)
def test_a_sample_refines_the_phase_and_never_contradicts_the_record(
    record: GuestRecord, state: MigrationState, sampled: MigrationPhase | None, phase: MigrationPhase
) -> None:
    assert decisions.migration_phase(M, standing(record, state), sampled) is phase


def test_a_cancel_shows_as_soon_as_it_is_written() -> None:
    assert decisions.cancel_is_wished(M, standing(CANCELLED, UNDER_WAY))
    assert decisions.cancel_is_wished(M, standing(LATE, replace(UNDER_WAY, cancel_requested=True)))
    assert not decisions.cancel_is_wished(M, standing(LATE, UNDER_WAY))
    assert not decisions.cancel_is_wished("m2", standing(CANCELLED, UNDER_WAY))


def test_the_same_request_is_the_same_resource_and_another_one_is_refused() -> None:
    found = RequestRecord("guests/u1", "digest")
    assert decisions.repeated(None, "r", "digest") == ""
    assert decisions.repeated(found, "r", "digest") == "guests/u1"
    with pytest.raises(DroverError) as caught:
        decisions.repeated(found, "r", "other")
    assert caught.value.reason is RefusalReason.REQUEST_ID_REUSED
    assert caught.value.details == {"operation": "guests/u1"}


@pytest.mark.parametrize("good", ["", "a", "3f0c1b9e-0d6b-4f0e-8f5c-0a1b2c3d4e5f", "job_7.2"])
def test_sound_request_ids(good: str) -> None:
    assert decisions.request_id_error(good) == ""


@pytest.mark.parametrize("bad", ["/", "..", ".a", "a/b", "a b", "x" * 65, "ä", "a\n"])
def test_request_ids_that_could_be_no_node_are_refused(bad: str) -> None:
    assert "64" in decisions.request_id_error(bad)
    assert not decisions.is_id(bad) or "." not in bad


def test_a_wish_counts_up_and_is_not_written_twice() -> None:
    paused = decisions.wish(WantRun(True, "x", 4), False, "y")
    assert paused == WantRun(False, "y", 5)
    assert decisions.wish(paused, False, "z") is None
    assert decisions.wish(None, True, "x") == WantRun(True, "x", 1)


@pytest.mark.parametrize(
    ("record", "step"),
    [
        (handover.birth("web", H1, writer="a"), StopStep.FINISH_BIRTH),
        (IDLE, StopStep.END),
        (BOUND, StopStep.CANCEL),
        (LATE, StopStep.CANCEL),
        (COMMITTED, StopStep.WAIT),
        (ARRIVED, StopStep.END),
        (CRASHED, StopStep.BURY),
        (GONE, StopStep.ENDED),
    ],
)
def test_the_way_to_a_guests_end(record: GuestRecord, step: StopStep) -> None:
    assert decisions.stop_step(record) is step


def test_every_phase_of_a_record_has_a_way_to_the_end() -> None:
    assert {decisions.stop_step(replace(IDLE, phase=phase)) for phase in Ownership} == set(StopStep)


def test_the_record_outranks_the_agent_about_a_guests_state() -> None:
    told = GuestStatus("g", "web", "inc", RunState.RUNNING)
    assert decisions.run_state(IDLE, told) is RunState.RUNNING
    assert decisions.run_state(IDLE, None) is RunState.UNKNOWN
    assert decisions.run_state(CRASHED, told) is RunState.ENDED
    assert decisions.run_state(GONE, told) is RunState.ENDED
    assert decisions.run_state(handover.birth("web", H1, writer="a"), told) is RunState.STARTING


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (CRASHED, RefusalReason.GUEST_NOT_RUNNING),
        (GONE, RefusalReason.GUEST_NOT_RUNNING),
        (handover.birth("web", H1, writer="a"), RefusalReason.GUEST_NOT_RUNNING),
        (OPEN, RefusalReason.GUEST_IS_MIGRATING),
        (COMMITTED, RefusalReason.GUEST_IS_MIGRATING),
        (LATE, RefusalReason.GUEST_IS_MIGRATING),
    ],
)
def test_guests_that_cannot_be_moved_now(record: GuestRecord, reason: RefusalReason) -> None:
    with pytest.raises(DroverError) as caught:
        decisions.need_movable(record)
    assert caught.value.reason is reason


def test_guests_that_can_be_moved() -> None:
    for record in (IDLE, ARRIVED, STAYED):
        decisions.need_movable(record)


def test_a_cordon_is_written_once_and_keeps_its_reason() -> None:
    on = decisions.cordon(Cordon(), True, "disk", "me")
    assert on is not None
    assert on == Cordon(True, "disk", "me")
    assert decisions.cordon(on, True, "", "you") is None
    assert decisions.cordon(on, True, "disk", "you") is None
    assert decisions.cordon(on, True, "fan", "you") == Cordon(True, "fan", "you")
    assert decisions.cordon(on, False, "", "you") == Cordon()
    assert decisions.cordon(Cordon(), False, "", "you") is None


def test_safe_to_power_off_ends_with_the_cordon() -> None:
    safe = EvacuationState(safe_to_power_off=True, safe_at=4)
    assert decisions.is_safe_to_power_off(safe, Cordon(on=True), 4)
    assert not decisions.is_safe_to_power_off(safe, Cordon(on=True), 6), "another cordon"
    assert not decisions.is_safe_to_power_off(safe, Cordon(), 4)
    assert not decisions.is_safe_to_power_off(safe, None, -1)
    assert not decisions.is_safe_to_power_off(EvacuationState(safe_to_power_off=True), None, -1)
    assert not decisions.is_safe_to_power_off(EvacuationState(safe_at=4), Cordon(on=True), 4)
