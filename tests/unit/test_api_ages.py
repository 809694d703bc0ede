"""How long things take is put together from durations; no wall clock is asked, and none that is wrong changes it."""

from dataclasses import replace

from orchestrator.api import views
from orchestrator.api.ages import MAX_REMEMBERED, Ages
from orchestrator.api.decisions import Standing
from orchestrator.api.reads import MigrationRead
from orchestrator.core.agent import AttemptStatus
from orchestrator.core.ids import AttemptRef
from orchestrator.core.migration import MigrationPhase as P
from orchestrator.core.records import AttemptReport, MigrationSpec, MigrationState

DAY_S = 86_400.0


class Clock:
    def __init__(self) -> None:
        self.now_s = 500.0

    def __call__(self) -> float:
        return self.now_s


class Samples:
    """What the fleet has heard of one attempt."""

    def __init__(self) -> None:
        self.attempt_ms = 0.0

    def attempt(self, host: str, migration: str, attempt: int) -> AttemptStatus | None:
        return AttemptStatus(AttemptRef("u", migration, attempt), P.PRECOPY, elapsed_ms=self.attempt_ms)


def read(phase: P = P.PREPARING, *, created_s: float = 0.0, ended_s: float = 0.0, **values: float) -> MigrationRead:
    spec = MigrationSpec("m", "u", "web", create_time_s=created_s)
    state = replace(MigrationState(phase, 1, "h1", "h2", end_time_s=ended_s), **values)
    return MigrationRead(spec, Standing(None, -1, 0, state, 7, ()))


def test_what_a_state_says_and_the_time_since_it_was_seen() -> None:
    clock = Clock()
    ages = Ages(clock)
    assert ages.elapsed_ms("m", 1, 250.0) == 250
    clock.now_s += 2
    assert ages.elapsed_ms("m", 1, 250.0) == 2_250
    assert ages.elapsed_ms("m", 2, 2_300.0) == 2_300
    clock.now_s += 1
    assert ages.elapsed_ms("m", 2, 2_300.0) == 3_300


def test_an_api_that_began_in_the_middle_of_an_attempt_hears_how_long_that_has_run() -> None:
    clock = Clock()
    ages = Ages(clock)
    assert ages.elapsed_ms("m", 1, 1_000.0, attempt_ms=60_000) == 61_000
    clock.now_s += 3
    assert ages.elapsed_ms("m", 1, 1_000.0, attempt_ms=0) == 64_000, "the agent fell silent"
    assert ages.elapsed_ms("m", 1, 1_000.0, attempt_ms=62_000) == 64_000, "nor does it ever go back"


def test_what_is_remembered_is_bounded() -> None:
    ages = Ages(Clock())
    for number in range(MAX_REMEMBERED + 10):
        ages.elapsed_ms(str(number), 1, 0.0)
    assert len(ages._seen) == MAX_REMEMBERED


def test_an_api_that_is_eight_days_ahead_changes_nothing() -> None:
    clock, samples = Clock(), Samples()
    for created_s in (0.0, 1.7e9, 1.7e9 + 8 * DAY_S):
        ages = Ages(clock)
        running = read(created_s=created_s, spent_ms=500.0)
        assert views.migration_elapsed_ms(running, samples, ages) == 500  # type: ignore[arg-type]
        for ended_s in (1.7e9, 1.7e9 + 8 * DAY_S):
            over = read(P.SUCCEEDED, created_s=created_s, ended_s=ended_s, spent_ms=4_200.0)
            assert views.migration_elapsed_ms(over, samples, ages) == 4_200  # type: ignore[arg-type]


def test_what_an_older_version_left_is_told_from_its_attempts() -> None:
    over = read(P.SUCCEEDED, ended_s=1.0)
    reports = tuple(AttemptReport(number, "ABORTED", duration_ms=1_500.0) for number in (1, 2))
    over = replace(over, standing=replace(over.standing, reports=reports))
    assert views.migration_elapsed_ms(over, Samples(), Ages(Clock())) == 3_000  # type: ignore[arg-type]
