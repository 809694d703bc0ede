"""The job machine: what is missing, given what the records say."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.core.errors import FailureReason
from orchestrator.core.evacuation import (
    CancelMigration,
    CordonHost,
    CreateMigration,
    Facts,
    GuestOnHost,
    Step,
    migration_id,
    safe_to_power_off,
    step,
)
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import HostRef
from orchestrator.core.records import EvacuationPhase, EvacuationSpec, EvacuationState, MigrationPhase, MigrationState

SPEC = EvacuationSpec("job", "h1", max_concurrent=2)
H1, H2 = HostRef("h1", "b"), HostRef("h2", "b")


def on_host(uuid: str, memory: int = 64, phase: Ownership = Ownership.IDLE, owner: HostRef = H1) -> GuestOnHost:
    return GuestOnHost(uuid, uuid, memory, GuestRecord(uuid, phase, owner))


def begun(*guests: GuestOnHost) -> EvacuationState:
    return step(SPEC, EvacuationState(), Facts(True, guests, {})).state


def created(result: Step) -> list[str]:
    return [c.guest for c in result.commands if isinstance(c, CreateMigration)]


def end(
    state: EvacuationState, phase: MigrationPhase, failure: FailureReason | None = None
) -> dict[str, MigrationState]:
    return {g.migration: MigrationState(phase, 1, failure=failure) for g in state.guests if g.migration}


def test_cordon_comes_first() -> None:
    result = step(SPEC, EvacuationState(), Facts(False, [on_host("a")], {}))
    assert result.commands == (CordonHost(),)
    assert result.state.phase is EvacuationPhase.PENDING


def test_biggest_first_within_the_limit() -> None:
    result = step(SPEC, EvacuationState(), Facts(True, [on_host("a", 1), on_host("b", 3), on_host("c", 2)], {}))
    assert created(result) == ["b", "c"]


def test_stored_but_not_created_is_created_again_under_the_same_id() -> None:
    state = begun(on_host("a"))
    result = step(SPEC, state, Facts(True, [on_host("a")], {}))
    assert result.commands == (CreateMigration(migration_id("job", "a", 1), "a", "a"),)
    assert result.state == state


def test_empty_host_is_done_at_once_and_safe() -> None:
    state = step(SPEC, EvacuationState(), Facts(True, [], {})).state
    assert (state.phase, state.safe_to_power_off) == (EvacuationPhase.SUCCEEDED, True)


def test_all_left() -> None:
    state = begun(on_host("a"), on_host("b"))
    state = step(SPEC, state, Facts(True, [], end(state, MigrationPhase.SUCCEEDED))).state
    assert state.phase is EvacuationPhase.SUCCEEDED
    assert state.safe_to_power_off


def test_another_try_only_where_it_may_help() -> None:
    state = begun(on_host("a"))
    again = step(SPEC, state, Facts(True, [on_host("a")], end(state, MigrationPhase.FAILED, FailureReason.NO_CAPACITY)))
    assert again.state.phase is EvacuationPhase.FAILED
    assert again.state.failure is FailureReason.SOME_GUESTS_REMAIN
    exhausted = end(state, MigrationPhase.FAILED, FailureReason.ATTEMPTS_EXHAUSTED)
    second = step(SPEC, state, Facts(True, [on_host("a")], exhausted))
    assert created(second) == ["a"]
    assert second.state.guests[0].tries == 2
    exhausted |= end(second.state, MigrationPhase.FAILED, FailureReason.ATTEMPTS_EXHAUSTED)
    assert step(SPEC, second.state, Facts(True, [on_host("a")], exhausted)).state.phase is EvacuationPhase.FAILED


def test_guest_in_somebody_elses_migration_is_waited_for() -> None:
    result = step(SPEC, EvacuationState(), Facts(True, [on_host("a", phase=Ownership.OPEN)], {}))
    assert result.commands == ()
    assert not result.state.phase.terminal


def test_a_guest_that_somebody_elses_migration_took_away_gets_none_of_the_jobs() -> None:
    """Its migration was stored but refused: another one, asked for before, had not begun yet."""
    state = begun(on_host("a"))
    waiting = step(SPEC, state, Facts(True, [on_host("a", phase=Ownership.OPEN)], {}))
    assert (waiting.commands, waiting.state.guests[0].tries) == ((), 1)
    over = step(SPEC, waiting.state, Facts(True, [], {}))
    assert over.commands == ()
    assert over.state.phase is EvacuationPhase.SUCCEEDED
    assert (over.state.guests[0].migration, over.state.guests[0].tries) == ("", 0)


def test_late_arrival_joins_the_job() -> None:
    state = begun(on_host("a"))
    result = step(SPEC, state, Facts(True, [on_host("b")], end(state, MigrationPhase.SUCCEEDED)))
    assert created(result) == ["b"]


def test_cancel_waits_for_what_is_under_way() -> None:
    state = replace(begun(on_host("a")), cancel_requested=True)
    active = end(state, MigrationPhase.PRECOPY)
    result = step(SPEC, state, Facts(True, [on_host("a")], active))
    assert result.commands == (CancelMigration(migration_id("job", "a", 1)),)
    assert result.state.phase is EvacuationPhase.CANCELLING
    done = end(state, MigrationPhase.CANCELLED, FailureReason.CANCELLED)
    assert step(SPEC, result.state, Facts(True, [on_host("a")], done)).state.phase is EvacuationPhase.CANCELLED


def test_power_is_safe_only_without_guests_copies_promises_and_with_the_cordon() -> None:
    copy = GuestOnHost("a", "a", 1, GuestRecord("a", Ownership.COMMITTED, H2, source=H1))
    coming = GuestOnHost("a", "a", 1, GuestRecord("a", Ownership.OPEN, H2, destination=H1))
    assert safe_to_power_off("h1", Facts(True, [], {}))
    assert safe_to_power_off("h1", Facts(True, [on_host("a", phase=Ownership.CRASHED)], {}))
    assert not safe_to_power_off("h1", Facts(False, [], {}))
    assert not safe_to_power_off("h1", Facts(True, [], {}, reserved=True))
    for guest in (on_host("a"), copy, coming, on_host("a", phase=Ownership.STARTING)):
        assert not safe_to_power_off("h1", Facts(True, [guest], {}))
