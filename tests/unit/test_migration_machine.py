"""The course of one migration, event by event; the driver's tests cover it with effects."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.core import handover
from orchestrator.core.endpoint import Endpoint
from orchestrator.core.errors import AbortReason, FailureReason, RefusalReason
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import HostRef
from orchestrator.core.migration import (
    Abort,
    CallRefused,
    Conduct,
    ConductAnswer,
    Course,
    End,
    FetchReport,
    Finished,
    NoPlace,
    Open,
    Prepare,
    PrepareAnswer,
    Prepared,
    Read,
    ReportAnswer,
    Settle,
    Situation,
    SourceSilent,
    Stage,
    StandBack,
    Step,
    Tick,
    Told,
    Wait,
    situation,
    start,
    step,
    wake_ms,
)
from orchestrator.core.policy import MigrationPolicy
from orchestrator.core.records import AttemptReport, MigrationPhase, MigrationSpec, MigrationState, WaitingFor

H1, H2 = HostRef("h1", "b1"), HostRef("h2", "b2")
IDLE = GuestRecord("g", Ownership.IDLE, H1)
OPEN1 = handover.open_attempt(IDLE, "m", 1, H2, epoch=1, writer="c")
BOUND1 = handover.bind(OPEN1, "m", 1, "inc", writer="a")
COMMITTED = handover.commit(BOUND1, "m", 1, "inc", writer="a")
ARRIVED = handover.done(COMMITTED, "m", 1, "inc", writer="d")
SPEC = MigrationSpec("m", "g", "web", policy=MigrationPolicy(max_attempts=2, prepare_timeout_ms=1000))
ACTIVE = MigrationState(MigrationPhase.PREPARING, 1, "h1", "h2")
READY = Prepared("inc", Endpoint("192.0.2.2", 1), Endpoint("192.0.2.2", 7702))


def aborted(reason: AbortReason = AbortReason.LATE_SWITCHOVER_ACK) -> GuestRecord:
    return handover.abort(BOUND1, "m", 1, reason, writer="a")


def seen(record: GuestRecord | None, state: MigrationState = ACTIVE, *reports: AttemptReport) -> tuple[Course, list]:
    result = step(start(SPEC, now_ms=0), Read(record, state, reports), now_ms=0)
    return result.course, list(result.commands)


@pytest.mark.parametrize(
    ("record", "state", "expected"),
    [
        (None, ACTIVE, Situation.GONE),
        (IDLE, MigrationState(), Situation.FREE),
        (replace(BOUND1, migration="x"), MigrationState(), Situation.BUSY),
        (OPEN1, ACTIVE, Situation.OPEN),
        (BOUND1, ACTIVE, Situation.BOUND),
        (COMMITTED, ACTIVE, Situation.COMMITTED),
        (aborted(), ACTIVE, Situation.ABORTED),
        (ARRIVED, ACTIVE, Situation.ARRIVED),
        (handover.close(aborted(), "m", writer="api"), ACTIVE, Situation.STAYED),
        (replace(OPEN1, migration="next"), ACTIVE, Situation.ARRIVED),
        (replace(OPEN1, migration="next"), replace(ACTIVE, phase=MigrationPhase.RETRY_WAIT), Situation.STAYED),
        (handover.crashed(BOUND1, writer="a"), ACTIVE, Situation.CRASHED),
    ],
)
def test_situation_follows_from_the_records(record: GuestRecord | None, state: MigrationState, expected: str) -> None:
    assert situation(record, "m", state) == expected


def test_adoption_by_record() -> None:
    assert seen(IDLE, MigrationState())[1] == [Open(1, "", ())]
    assert seen(OPEN1)[1] == [Prepare(1)]
    assert seen(BOUND1) == (seen(BOUND1)[0], [])
    assert seen(BOUND1)[0].stage is Stage.FOLLOW
    assert seen(COMMITTED)[0].stage is Stage.FOLLOW
    assert seen(aborted())[1] == [FetchReport(1, "ABORTED")]
    assert seen(ARRIVED)[1] == [FetchReport(1, "COMMITTED")]
    assert seen(IDLE, replace(ACTIVE, phase=MigrationPhase.FAILED))[1] == [End()]


def test_conduct_is_repeated_until_bound_and_then_left_to_the_agents() -> None:
    course, _ = seen(OPEN1)
    result = step(course, PrepareAnswer(1, READY), now_ms=10)
    assert result.commands == (Conduct(1, READY, ""),)
    course = step(result.course, ConductAnswer(1), now_ms=20).course
    assert step(course, Tick(), now_ms=500).commands == ()
    assert step(course, Read(BOUND1, ACTIVE), now_ms=600).course.stage is Stage.FOLLOW
    again = step(replace(course, deadline_ms=9999.0), Tick(), now_ms=1020)
    assert again.commands == (Conduct(1, READY, ""),)


def test_prepare_timeout_aborts_and_an_answer_too_late_is_ignored() -> None:
    course, _ = seen(OPEN1)
    assert wake_ms(course) == 1000
    result = step(course, Tick(), now_ms=1000)
    assert result.commands == (Abort(1, AbortReason.PREPARE_TIMEOUT),)
    assert step(result.course, PrepareAnswer(1, READY), now_ms=1001).commands == ()


@pytest.mark.rule("H6")
def test_a_cancelled_record_is_never_opened_again() -> None:
    course, _ = seen(aborted(AbortReason.CANCELLED))
    result = step(course, ReportAnswer(AttemptReport(1, "ABORTED")), now_ms=1)
    (settle,) = result.commands
    assert isinstance(settle, Settle)
    assert (settle.phase, settle.close) == (MigrationPhase.CANCELLED, True)


@pytest.mark.rule("H6")
def test_a_wish_to_cancel_in_retry_wait_closes() -> None:
    waiting = replace(ACTIVE, phase=MigrationPhase.RETRY_WAIT, retry_wait_ms=500)
    report = AttemptReport(1, "ABORTED", reason=AbortReason.ACK_TIMEOUT)
    course, commands = seen(aborted(), waiting, report)
    assert (course.stage, commands) == (Stage.RETRY_WAIT, [])
    result = step(course, Read(aborted(), replace(waiting, cancel_requested=True), (report,)), now_ms=1)
    assert result.commands[0] == Settle(
        MigrationPhase.CANCELLED, None, True, FailureReason.CANCELLED, "cancelled on request"
    )
    assert step(course, Tick(), now_ms=500).commands == (Open(2, "", (), prefer="h2"),)


def test_a_committed_guest_is_never_aborted() -> None:
    course, _ = seen(COMMITTED, replace(ACTIVE, cancel_requested=True))
    assert course.stage is Stage.FOLLOW
    assert wake_ms(course) is None
    assert step(course, Tick(), now_ms=1e9).commands == ()


def test_own_write_under_way_is_waited_for() -> None:
    course, _ = seen(IDLE, MigrationState())
    assert step(course, Read(IDLE, MigrationState()), now_ms=1).commands == ()
    course = step(course, Finished(), now_ms=2).course
    assert step(course, Read(IDLE, MigrationState()), now_ms=3).commands == (Open(1, "", ()),)


def test_silent_hosts_are_waited_for_but_not_for_ever() -> None:
    course, _ = seen(IDLE, MigrationState())
    quiet = NoPlace(RefusalReason.HOST_NOT_LIVE, "h2 is silent", transient=True)
    waiting = step(course, quiet, now_ms=0)
    assert waiting.commands == (Wait(WaitingFor.ROOM, "waiting for room: h2 is silent"),)
    retry = step(waiting.course, Tick(), now_ms=400)
    assert retry.commands == (Open(1, "", ()),)
    assert step(retry.course, quiet, now_ms=500).commands == ()
    end = step(retry.course, quiet, now_ms=20_001).commands[0]
    assert isinstance(end, Settle)
    assert end.failure is FailureReason.HOST_NOT_LIVE


def waits_for_room(total_timeout_ms: int = 60_000) -> Course:
    policy = MigrationPolicy(wait_for_capacity=True, total_timeout_ms=total_timeout_ms)
    spec = replace(SPEC, policy=policy)
    return step(start(spec, now_ms=0), Read(IDLE, MigrationState()), now_ms=0).course


def test_a_migration_that_may_wait_for_room_stands_back_until_its_time_is_over() -> None:
    full = NoPlace(RefusalReason.NO_CAPACITY, "h2 has 3 MiB free", passing=True)
    waiting = step(waits_for_room(), full, now_ms=50_000)
    assert waiting.commands == (Wait(WaitingFor.ROOM, "waiting for room: h2 has 3 MiB free", stand_back=True),)
    gone = step(waiting.course, Told(stand_back=True), now_ms=50_001)
    assert gone.commands == (StandBack(),)
    assert step(gone.course, Tick(), now_ms=99_999).commands == ()
    (end,) = step(waits_for_room(), full, now_ms=60_000).commands
    assert isinstance(end, Settle)
    assert end.failure is FailureReason.NO_CAPACITY


def test_nobody_waits_for_room_that_can_never_come() -> None:
    never = NoPlace(RefusalReason.NO_CAPACITY, "h2 has 3 MiB free", passing=False)
    (end,) = step(waits_for_room(), never, now_ms=1).commands
    assert isinstance(end, Settle)
    assert end.failure is FailureReason.NO_CAPACITY


@pytest.mark.parametrize("reason", ["HOST_CORDONED", "HOST_NOT_LIVE", "MACHINE_TYPE_MISMATCH"])
def test_what_stands_against_every_host_is_the_reason(reason: str) -> None:
    course, _ = seen(IDLE, MigrationState())
    (end,) = step(course, NoPlace(RefusalReason(reason), "all of them"), now_ms=1).commands
    assert isinstance(end, Settle)
    assert end.failure is FailureReason(reason)


# --- a source that is silent ------------------------------------------------------------------------------------------

SILENT = "waiting for the agent of h1, which is silent"


def failure(result: Step) -> FailureReason | None:
    (settle,) = result.commands
    assert isinstance(settle, Settle)
    assert settle.phase is MigrationPhase.FAILED
    return settle.failure


def test_no_attempt_is_opened_from_a_silent_source() -> None:
    quiet = step(start(SPEC, now_ms=0), Read(IDLE, MigrationState(), source_live=False), now_ms=0)
    assert quiet.commands == (Wait(WaitingFor.SOURCE, SILENT),)
    again = step(quiet.course, Tick(), now_ms=400)
    assert (again.commands, again.course.stage) == ((), Stage.PLACEMENT_WAIT)
    assert failure(step(again.course, Tick(), now_ms=15_000)) is FailureReason.SOURCE_UNREACHABLE
    back = step(again.course, Read(IDLE, MigrationState()), now_ms=600).course
    assert step(back, Tick(), now_ms=1000).commands == (Open(1, "", ()),)


def test_a_source_that_is_found_silent_when_the_attempt_would_open_is_waited_for_as_well() -> None:
    course, _ = seen(IDLE, MigrationState())
    quiet = step(course, SourceSilent(), now_ms=5)
    assert quiet.commands == (Wait(WaitingFor.SOURCE, SILENT),)
    assert wake_ms(quiet.course) == 305


def test_an_attempt_that_has_not_begun_ends_with_its_source() -> None:
    course, _ = seen(OPEN1)
    result = step(course, Read(OPEN1, ACTIVE, source_live=False), now_ms=10)
    assert result.commands == (Abort(1, AbortReason.SOURCE_UNREACHABLE),)


def test_an_attempt_under_way_outlives_its_agents_restart_and_no_more() -> None:
    course, _ = seen(BOUND1)
    quiet = step(course, Read(BOUND1, ACTIVE, source_live=False), now_ms=100)
    assert quiet.commands == ()
    assert wake_ms(quiet.course) == 15_100
    back = step(quiet.course, Read(BOUND1, ACTIVE), now_ms=8_000).course
    assert step(back, Tick(), now_ms=20_000).commands == ()
    assert step(quiet.course, Tick(), now_ms=15_100).commands == (Abort(1, AbortReason.SOURCE_UNREACHABLE),)


def test_a_committed_guest_does_not_need_its_source() -> None:
    course, _ = seen(COMMITTED)
    result = step(course, Read(COMMITTED, ACTIVE, source_live=False), now_ms=1)
    assert result.commands == ()
    assert step(result.course, Tick(), now_ms=99_999).commands == ()


def test_the_destination_is_not_blamed_for_a_source_that_does_not_answer() -> None:
    course, _ = seen(OPEN1)
    course = step(course, PrepareAnswer(1, READY), now_ms=10).course
    refused = CallRefused(1, RefusalReason.AGENT_UNREACHABLE, "h1 does not answer", unreachable=True)
    course = step(course, refused, now_ms=900).course
    said = "AGENT_UNREACHABLE: h1 does not answer"
    assert step(course, Tick(), now_ms=1000).commands == (Abort(1, AbortReason.SOURCE_UNREACHABLE, said),)
    lost = AttemptReport(1, "ABORTED", AbortReason.SOURCE_UNREACHABLE, destination="h2")
    course, _ = seen(aborted(AbortReason.SOURCE_UNREACHABLE))
    (settle,) = step(course, ReportAnswer(lost), now_ms=0).commands
    assert isinstance(settle, Settle)
    assert (settle.phase, settle.keep_room) == (MigrationPhase.RETRY_WAIT, False)
    waiting = replace(ACTIVE, phase=MigrationPhase.RETRY_WAIT, retry_wait_ms=500)
    course, _ = seen(aborted(AbortReason.SOURCE_UNREACHABLE), waiting, lost)
    assert step(course, Tick(), now_ms=500).commands == (Open(2, "", (), prefer="h2"),)


def test_a_guest_that_is_starting_on_a_silent_host_is_not_waited_for_until_the_total_timeout() -> None:
    starting = replace(IDLE, phase=Ownership.STARTING)
    course = step(start(SPEC, now_ms=0), Read(starting, MigrationState(), source_live=False), now_ms=0).course
    late = step(course, Read(starting, MigrationState(), source_live=False), now_ms=15_000)
    assert failure(late) is FailureReason.SOURCE_UNREACHABLE


def test_fatal_refusal_of_a_call() -> None:
    course, _ = seen(OPEN1)
    refused = CallRefused(1, RefusalReason.DEVICE_NOT_MIGRATABLE, "gpu0 has no shim")
    result = step(course, refused, now_ms=1)
    said = "DEVICE_NOT_MIGRATABLE: gpu0 has no shim"
    assert result.commands == (Abort(1, AbortReason.PREPARE_FAILED, said),)
    course = step(result.course, Finished(), now_ms=2).course
    course = step(course, Read(aborted(AbortReason.PREPARE_FAILED), ACTIVE), now_ms=3).course
    (end,) = step(course, ReportAnswer(AttemptReport(1, "ABORTED")), now_ms=4).commands
    assert isinstance(end, Settle)
    assert (end.failure, end.close) == (FailureReason.DEVICE_NOT_MIGRATABLE, True)
    assert "gpu0 has no shim" in end.message


def test_only_the_last_call_that_failed_is_blamed_for_a_timeout() -> None:
    course, _ = seen(OPEN1)
    refused = CallRefused(1, RefusalReason.AGENT_UNREACHABLE, "h2 does not answer", unreachable=True)
    course = step(course, refused, now_ms=100).course
    said = "AGENT_UNREACHABLE: h2 does not answer"
    assert step(course, Tick(), now_ms=1000).commands == (Abort(1, AbortReason.PREPARE_TIMEOUT, said),)
    course = step(course, PrepareAnswer(1, READY), now_ms=200).course
    assert step(course, Tick(), now_ms=1000).commands == (Abort(1, AbortReason.PREPARE_TIMEOUT),)


def test_a_call_that_nobody_answers_is_repeated_ever_more_slowly_within_its_attempt() -> None:
    """An agent that came back at once is found at once; one that fails at every call was asked five times a second."""
    policy = replace(SPEC.policy, prepare_timeout_ms=15_000, max_attempts=1)
    course = step(start(replace(SPEC, policy=policy), now_ms=0), Read(OPEN1, ACTIVE), now_ms=0).course
    unknown = CallRefused(1, RefusalReason.OUTCOME_UNKNOWN, "h2 answered UNKNOWN", unreachable=True)
    now_ms, pauses = 0.0, list[float]()
    while True:
        course = step(course, unknown, now_ms=now_ms).course
        assert course.again_ms is not None
        due_ms = min(course.again_ms, 15_000)
        pauses.append(due_ms - now_ms)
        now_ms = due_ms
        result = step(course, Tick(), now_ms=now_ms)
        if result.commands != (Prepare(1),):
            break
        course = result.course
    assert result.commands == (Abort(1, AbortReason.PREPARE_TIMEOUT, "OUTCOME_UNKNOWN: h2 answered UNKNOWN"),)
    assert pauses[:5] == [200, 400, 800, 1000, 1000]
    assert len(pauses) < 20


def test_total_budget_survives_a_restart_of_the_coordinator() -> None:
    spent = AttemptReport(1, "ABORTED", duration_ms=599_000)
    assert start(SPEC, now_ms=5000, reports=(spent,)).total_deadline_ms == 6000


def test_backoff_is_scaled_by_the_jitter() -> None:
    course, _ = seen(aborted())
    (settle,) = step(course, ReportAnswer(AttemptReport(1, "ABORTED")), now_ms=0, jitter=0.5).commands
    assert isinstance(settle, Settle)
    assert (settle.phase, settle.retry_wait_ms, settle.close) == (MigrationPhase.RETRY_WAIT, 100, False)


def test_a_guest_that_arrived_with_a_device_that_lost_its_state_is_no_success() -> None:
    report = AttemptReport(1, "COMMITTED", AbortReason.DEVICE_RESET, ("nic",), "nic lost its state")
    course, _ = seen(ARRIVED)
    for commands in (step(course, ReportAnswer(report), now_ms=1).commands, tuple(seen(ARRIVED, ACTIVE, report)[1])):
        (settle,) = commands
        assert isinstance(settle, Settle)
        assert (settle.phase, settle.failure, settle.close) == (
            MigrationPhase.FAILED,
            FailureReason.DEVICE_RESET,
            False,
        )
        assert settle.message == "nic lost its state"


def test_a_guest_that_its_source_could_not_start_again_needs_a_person_and_no_further_attempt() -> None:
    """Another attempt cannot help: nothing runs that could be moved. The agent goes on trying by itself."""
    course, _ = seen(aborted(AbortReason.SOURCE_RESTARTED))
    told = AttemptReport(1, "ABORTED", needs_operator=True)
    (settle,) = step(course, ReportAnswer(told), now_ms=0).commands
    assert isinstance(settle, Settle)
    assert (settle.phase, settle.failure) == (MigrationPhase.FAILED, FailureReason.PAUSED_NEEDS_OPERATOR)
    assert settle.close
    assert "h1, which keeps it" in settle.message


@pytest.mark.parametrize(("opened_ms", "left_ms"), [(None, 1_000), (100.0, 400), (650.0, 950), (0.0, 300)])
def test_whoever_takes_over_a_preparation_has_what_is_left_of_its_time(opened_ms: float | None, left_ms: int) -> None:
    """It had all of it anew; `None`: opened by an older version, which did not say."""
    course = start(SPEC, now_ms=5_000, spent_ms=700)
    seen = Read(OPEN1, replace(ACTIVE, opened_spent_ms=opened_ms))
    preparing = step(course, seen, now_ms=5_000, jitter=1.0)
    assert preparing.course.stage is Stage.PREPARE
    assert preparing.course.deadline_ms == 5_000 + left_ms
