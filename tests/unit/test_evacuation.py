"""The job machine: what is missing, given what the records say."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

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
from orchestrator.core.placement import HostView, Need
from orchestrator.core.records import (
    EvacuationPhase,
    EvacuationSpec,
    EvacuationState,
    MigrationPhase,
    MigrationState,
    WaitingFor,
)

P = MigrationPhase
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
    state = step(SPEC, EvacuationState(), Facts(True, [], {}, empty=True)).state
    assert (state.phase, state.safe_to_power_off) == (EvacuationPhase.SUCCEEDED, True)


def test_all_left() -> None:
    state = begun(on_host("a"), on_host("b"))
    state = step(SPEC, state, Facts(True, [], end(state, MigrationPhase.SUCCEEDED), empty=True)).state
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
    over = step(SPEC, waiting.state, Facts(True, [], {}, empty=True))
    assert over.commands == ()
    assert over.state.phase is EvacuationPhase.SUCCEEDED
    assert (over.state.guests[0].migration, over.state.guests[0].tries) == ("", 0)


def test_late_arrival_joins_the_job() -> None:
    state = begun(on_host("a"))
    result = step(SPEC, state, Facts(True, [on_host("b")], end(state, MigrationPhase.SUCCEEDED)))
    assert created(result) == ["b"]


# --- every wait has an end --------------------------------------------------------------------------------------------

SILENT = Facts(True, [], {}, source_live=False, silent_ms=1.0)


def test_nothing_is_begun_from_a_silent_host_and_the_job_ends_with_what_is_left_and_why() -> None:
    here = [on_host("a"), on_host("new", phase=Ownership.STARTING)]
    quiet = step(SPEC, EvacuationState(), replace(SILENT, guests=here))
    assert quiet.commands == ()
    assert (quiet.state.phase, quiet.state.message) == (
        EvacuationPhase.RUNNING,
        "waiting for the agent of h1, which is silent",
    )
    end = step(SPEC, quiet.state, replace(SILENT, guests=here, silent_ms=17_000.0)).state
    assert (end.phase, end.failure) == (EvacuationPhase.FAILED, FailureReason.SOURCE_UNREACHABLE)
    assert end.message == (
        "2 of 2 guests remain on h1: a (SOURCE_UNREACHABLE), new (still starting); the agent of h1 is silent"
    )
    assert {(g.failure, g.message) for g in end.guests} == {
        (FailureReason.SOURCE_UNREACHABLE, "no migration was begun: the agent of h1 is silent"),
        (FailureReason.SOURCE_UNREACHABLE, "no migration was begun: still starting"),
    }


def test_a_host_whose_agent_restarts_is_emptied_all_the_same() -> None:
    quiet = step(SPEC, EvacuationState(), replace(SILENT, guests=[on_host("a")], silent_ms=9_000.0))
    assert created(step(SPEC, quiet.state, Facts(True, [on_host("a")], {}))) == ["a"]


def test_migrations_under_way_find_their_own_end_on_a_silent_host() -> None:
    state = begun(on_host("a"))
    facts = replace(SILENT, guests=[on_host("a")], silent_ms=60_000.0)
    going = step(SPEC, state, replace(facts, migrations=end(state, MigrationPhase.PREPARING))).state
    assert going.phase is EvacuationPhase.RUNNING
    lost = end(state, MigrationPhase.FAILED, FailureReason.SOURCE_UNREACHABLE)
    over = step(SPEC, state, replace(facts, migrations=lost)).state
    assert (over.failure, over.guests[0].failure) == (FailureReason.SOURCE_UNREACHABLE,) * 2
    assert "a (SOURCE_UNREACHABLE)" in over.message


def test_a_guest_that_does_not_come_out_of_starting_is_not_waited_for_for_ever() -> None:
    facts = Facts(True, [on_host("a", phase=Ownership.STARTING)], {}, stalled_ms=59_000.0)
    state = step(SPEC, EvacuationState(), facts).state
    assert not state.phase.terminal
    over = step(SPEC, state, replace(facts, stalled_ms=60_000.0)).state
    assert (over.phase, over.failure) == (EvacuationPhase.FAILED, FailureReason.SOME_GUESTS_REMAIN)
    assert "a (still starting)" in over.message


def committed_to(host: str, uuid: str = "a") -> GuestOnHost:
    there = HostRef(host, "b")
    record = GuestRecord(uuid, Ownership.COMMITTED, there, "m", 1, there, "inc", source=H1)
    return GuestOnHost(uuid, uuid, 64, record)


def test_a_guest_committed_to_a_dead_host_holds_up_neither_the_others_nor_the_jobs_end() -> None:
    one = replace(SPEC, max_concurrent=1)
    state = step(one, EvacuationState(), Facts(True, [on_host("a", 99), on_host("b")], {})).state
    facts = Facts(True, [committed_to("h2"), on_host("b")], end(state, MigrationPhase.COMMITTED))
    result = step(one, state, facts)
    assert created(result) == ["b"]
    moved = {
        g.migration: MigrationState(MigrationPhase.SUCCEEDED if g.name == "b" else MigrationPhase.COMMITTED)
        for g in result.state.guests
    }
    facts = Facts(True, [committed_to("h2")], moved, stalled_ms=59_000.0)
    assert not step(one, result.state, facts).state.phase.terminal
    over = step(one, result.state, replace(facts, stalled_ms=60_000.0)).state
    assert over.failure is FailureReason.SOME_GUESTS_REMAIN
    assert "a (committed to h2, which has not finished)" in over.message
    wish = replace(result.state, cancel_requested=True)
    assert step(one, wish, replace(facts, stalled_ms=60_000.0)).state.phase is EvacuationPhase.CANCELLED


def test_the_jobs_total_timeout_bounds_the_job() -> None:
    spec = replace(SPEC, policy={"total_timeout_ms": 40_000})
    first = step(spec, EvacuationState(), Facts(True, [on_host("a")], {}, spent_ms=10_000.0))
    (create,) = first.commands
    assert isinstance(create, CreateMigration)
    assert create.total_timeout_ms == 30_000
    late = Facts(True, [on_host("a"), on_host("b", phase=Ownership.OPEN)], end(first.state, P.PRECOPY), spent_ms=4e4)
    ending = step(spec, first.state, late)
    assert ending.commands == (CancelMigration(create.id),)
    assert not ending.state.phase.terminal
    over = step(spec, ending.state, replace(late, migrations=end(first.state, P.FAILED, FailureReason.TOTAL_TIMEOUT)))
    assert (over.state.phase, over.state.failure) == (EvacuationPhase.FAILED, FailureReason.TOTAL_TIMEOUT)
    assert over.state.message == (
        "2 of 2 guests remain on h1: a (TOTAL_TIMEOUT), b (TOTAL_TIMEOUT); its total timeout of 40000 ms is over"
    )
    assert step(spec, ending.state, replace(late, spent_ms=7e4)).state.phase is EvacuationPhase.FAILED


def test_a_job_whose_time_is_over_begins_nothing() -> None:
    spec = replace(SPEC, policy={"total_timeout_ms": 40_000})
    result = step(spec, EvacuationState(), Facts(True, [on_host("a")], {}, spent_ms=4e4))
    assert (result.commands, result.state.failure) == ((), FailureReason.TOTAL_TIMEOUT)


def test_guests_with_a_place_go_first_and_those_that_wait_for_room_keep_nobody_from_going() -> None:
    def need(name: str, memory: int) -> GuestOnHost:
        return replace(on_host(name, memory), need=Need(name, name, "h1", memory))

    one = replace(SPEC, max_concurrent=1)
    hosts = [HostView(HostRef("h2", "b"), 100)]
    facts = Facts(True, [need("big", 200), need("small", 50)], {}, hosts=hosts)
    first = step(one, EvacuationState(), facts)
    assert first.commands == (CreateMigration(migration_id("job", "small", 1), "small", "small", "h2"),)
    moved = end(first.state, MigrationPhase.SUCCEEDED)
    second = step(one, first.state, replace(facts, guests=[need("big", 200)], migrations=moved))
    assert created(second) == ["big"]
    waits = {g.migration: MigrationState(waiting_for=WaitingFor.ROOM) for g in second.state.guests if g.name == "big"}
    late = replace(facts, guests=[need("big", 200), need("late", 10)], migrations=moved | waits)
    assert created(step(one, second.state, late)) == ["late"]


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
    said = Facts(True, [], {}, empty=True)
    assert safe_to_power_off("h1", said)
    assert safe_to_power_off("h1", replace(said, guests=[on_host("a", phase=Ownership.CRASHED)]))
    assert not safe_to_power_off("h1", replace(said, cordoned=False))
    assert not safe_to_power_off("h1", replace(said, reserved=True))
    for guest in (on_host("a"), copy, coming, on_host("a", phase=Ownership.STARTING)):
        assert not safe_to_power_off("h1", replace(said, guests=[guest]))


@pytest.mark.parametrize(
    ("facts", "was_safe", "safe"),
    [
        (Facts(True, [], {}), False, False),
        (Facts(True, [], {}, empty=False), False, False),
        (Facts(True, [], {}, empty=False), True, False),
        (Facts(True, [], {}, source_live=False), False, False),
        (Facts(True, [], {}, source_live=False), True, True),
        (Facts(True, [], {}, dead=True), False, True),
        (Facts(False, [], {}, dead=True), True, False),
    ],
    ids=["not said", "copies", "copies again", "silent", "silent since it was safe", "dead", "dead, not cordoned"],
)
def test_silence_is_no_yes(facts: Facts, was_safe: bool, safe: bool) -> None:
    """Records that name the host no more prove nothing about the processes there."""
    assert safe_to_power_off("h1", facts, was_safe=was_safe) is safe


def test_a_job_ends_when_the_host_has_said_that_no_copy_is_left() -> None:
    state = begun(on_host("a"))
    left = Facts(True, [], end(state, MigrationPhase.SUCCEEDED))
    for facts, said in ((left, "nobody has said"), (replace(left, empty=False), "still being ended")):
        waits = step(SPEC, state, facts).state
        assert (waits.phase, waits.safe_to_power_off) == (EvacuationPhase.RUNNING, False)
        assert said in waits.message
    done = step(SPEC, state, replace(left, empty=True)).state
    assert (done.phase, done.safe_to_power_off, done.message) == (EvacuationPhase.SUCCEEDED, True, "h1 is empty")
    silent = step(SPEC, state, replace(left, source_live=False)).state
    assert (silent.phase, silent.safe_to_power_off) == (EvacuationPhase.SUCCEEDED, False)
    assert silent.message == "every guest has left h1, but nobody has said that no copy is left"
    said_later = step(SPEC, silent, replace(left, empty=True)).state
    assert (said_later.safe_to_power_off, said_later.message) == (True, "h1 is empty"), "nothing to warn of any more"
    for hanging in (replace(left, stalled_ms=math.inf), replace(left, empty=False, stalled_ms=math.inf)):
        late = step(SPEC, state, hanging).state
        assert (late.phase, late.safe_to_power_off) == (EvacuationPhase.SUCCEEDED, False), "no wait is without an end"


def test_a_job_whose_host_died_says_who_was_lost_and_who_starts_again() -> None:
    state = begun(on_host("a"), on_host("b"), on_host("c"))
    ended = {
        guest.migration: MigrationState(
            MigrationPhase.SUCCEEDED if guest.name == "a" else MigrationPhase.FAILED,
            failure=None if guest.name == "a" else FailureReason.GUEST_CRASHED,
        )
        for guest in state.guests
        if guest.migration
    }
    state = replace(state, guests=tuple(replace(g, migration=g.migration or f"m-{g.name}") for g in state.guests))
    failed = MigrationState(MigrationPhase.FAILED, failure=FailureReason.GUEST_CRASHED)
    ended |= {guest.migration: failed for guest in state.guests if guest.migration not in ended}
    result = step(SPEC, state, Facts(True, [], ended, dead=True, crashed={"b": True, "c": False})).state
    assert (result.phase, result.failure) == (EvacuationPhase.FAILED, FailureReason.HOST_DIED)
    assert result.message == "1 of 3 guests had left h1 when it died; crashed with it: c; to start elsewhere: b"
    assert result.safe_to_power_off
