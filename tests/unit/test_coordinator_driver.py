"""One migration under its driver, over a ledger and agents in memory: its attempts, its promises and its ends."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from orchestrator.coordinator import driver
from orchestrator.core import handover
from orchestrator.core.errors import AbortReason, DroverError, FailureReason, RefusalReason
from orchestrator.core.handover import Ownership
from orchestrator.core.policy import MigrationPolicy
from orchestrator.core.records import Cordon, MigrationPhase, Requests
from orchestrator.ledger import paths
from tests.fakes.coordination import World
from tests.fakes.coordinator import EPOCH, LATE, drive, until, worker, world

__all__ = ["world"]


async def test_clean_migration_arrives_and_leaves_no_reservation(world: World) -> None:
    assert await drive(world) == "SUCCEEDED"
    record = world.record("g1")
    assert record.phase is Ownership.IDLE
    assert record.owner.host == "h2"
    assert world.reserved("h2") == {}
    assert [r.outcome for r in world.attempts("m1")] == ["COMMITTED"]
    assert world.attempts("m1")[0].transferred_bytes == 7


async def test_clean_migration_takes_two_writes_of_the_coordinator(world: World) -> None:
    """OPEN and the verdict; bind, COMMIT and DONE are the agents'."""
    await drive(world)
    assert len(world.store.writes) == 5


async def test_late_acks_are_retried_and_reported(world: World) -> None:
    world.ends = [LATE, LATE, LATE]
    assert await drive(world) == "SUCCEEDED"
    reports = world.attempts("m1")
    assert [r.reason for r in reports] == [LATE, LATE, LATE, None]
    assert reports[0].devices == ("d0",)
    assert reports[0].zxid > 0


async def test_attempts_are_bounded_and_the_guest_stays(world: World) -> None:
    world.ends = [LATE] * 9
    world.migration("m1", "g1", policy=MigrationPolicy(max_attempts=2, backoff_initial_ms=1, backoff_max_ms=1))
    assert await drive(world) == "FAILED"
    assert world.state("m1").failure is FailureReason.ATTEMPTS_EXHAUSTED
    record = world.record("g1")
    assert (record.phase, record.owner.host) == (Ownership.IDLE, "h1")
    assert world.reserved("h2") == {} == world.reserved("h3")


@pytest.mark.parametrize(
    ("reason", "failure"),
    [
        (AbortReason.NOT_CONVERGING, FailureReason.NOT_CONVERGING),
        (AbortReason.DEVICE_RESET, FailureReason.DEVICE_RESET),
        (AbortReason.GUEST_ENDED, FailureReason.GUEST_ENDED),
    ],
)
async def test_ends_that_another_attempt_would_repeat(
    world: World, reason: AbortReason, failure: FailureReason
) -> None:
    world.ends = [reason]
    assert await drive(world) == "FAILED"
    assert world.state("m1").failure is failure
    assert len(world.attempts("m1")) == 1


async def test_no_capacity_says_why_for_each_host(world: World) -> None:
    world.guest("g1", "h1", memory_mib=4096)
    assert await drive(world) == "FAILED"
    state = world.state("m1")
    assert state.failure is FailureReason.NO_CAPACITY
    assert "h2 has 1024 MiB free" in state.message
    assert "h3 has 1024 MiB free" in state.message


async def test_named_destination_is_kept(world: World) -> None:
    world.migration("m1", "g1", destination="h3")
    assert await drive(world) == "SUCCEEDED"
    assert world.record("g1").owner.host == "h3"


async def test_cordoned_destination_is_refused(world: World) -> None:
    world.migration("m1", "g1", destination="h3")
    world.put(paths.cordon("h3"), Cordon(on=True, why="disk"))
    assert await drive(world) == "FAILED"
    assert world.state("m1").failure is FailureReason.DESTINATION_NOT_ELIGIBLE
    assert "cordoned (disk)" in world.state("m1").message


async def test_what_a_destination_refuses_with_reaches_report_and_message(world: World) -> None:
    world.refuse = DroverError(RefusalReason.HOST_DISK_FULL, "h2 has no room left in /var/lib/drover")
    world.migration("m1", "g1", policy=MigrationPolicy(max_attempts=1))
    assert await drive(world) == "FAILED"
    (report,) = world.attempts("m1")
    assert report.reason is AbortReason.PREPARE_FAILED
    assert report.message == "HOST_DISK_FULL: h2 has no room left in /var/lib/drover"
    assert report.message in world.state("m1").message


async def test_what_a_destination_refused_with_outlives_the_driver(world: World) -> None:
    said = "HOST_DISK_FULL: h2 has no room left in /var/lib/drover"
    world.refuse = DroverError(RefusalReason.HOST_DISK_FULL, "h2 has no room left in /var/lib/drover")
    first = asyncio.create_task(worker(world).drive("m1", EPOCH))
    await until(lambda: world.record("g1").phase is Ownership.ABORTED)
    first.cancel()
    world.refuse = None
    assert await drive(world) == "SUCCEEDED"
    assert world.attempts("m1")[0].message == said


async def test_refused_prepare_ends_the_attempt_and_avoids_that_host(world: World) -> None:
    world.refuse = DroverError(RefusalReason.MACHINE_TYPE_MISMATCH, "no such machine")
    task = asyncio.create_task(drive(world))
    await until(lambda: ("prepare", "h3", 2) in world.calls)
    world.refuse = None
    assert await task == "SUCCEEDED"
    assert world.attempts("m1")[0].reason is AbortReason.PREPARE_FAILED


async def test_refusal_that_no_attempt_can_mend(world: World) -> None:
    world.refuse = DroverError(RefusalReason.RETRY_NEEDS_RUN, "paused due to previous migration")
    assert await drive(world) == "FAILED"
    assert world.state("m1").failure is FailureReason.RETRY_NEEDS_RUN


async def test_silent_destination_ends_in_prepare_timeout(world: World) -> None:
    world.silent = {"h2"}
    policy = MigrationPolicy(prepare_timeout_ms=50, backoff_initial_ms=1, backoff_max_ms=1)
    world.migration("m1", "g1", policy=policy)
    assert await drive(world) == "SUCCEEDED"
    assert world.attempts("m1")[0].reason is AbortReason.PREPARE_TIMEOUT
    assert world.record("g1").owner.host == "h3"


async def test_cancel_before_the_first_attempt(world: World) -> None:
    world.edit_state("m1", lambda s: replace(s, cancel_requested=True))
    assert await drive(world) == "CANCELLED"
    assert world.calls == []


async def test_cancel_in_precopy_never_opens_another_attempt(world: World) -> None:
    world.hold = asyncio.Event()
    task = asyncio.create_task(drive(world))
    await until(lambda: bool(world.record("g1").inc))
    world.edit_state("m1", lambda s: replace(s, cancel_requested=True))
    assert await task == "CANCELLED"
    assert (world.record("g1").phase, world.record("g1").attempt) == (Ownership.IDLE, 1)
    world.hold.set()
    await asyncio.sleep(0.01)
    assert world.record("g1").owner.host == "h1"


async def test_abort_written_as_cancelled_by_somebody_else_is_final(world: World) -> None:
    world.hold = asyncio.Event()
    task = asyncio.create_task(drive(world))
    await until(lambda: bool(world.record("g1").inc))
    await world._write("g1", lambda r: handover.abort(r, "m1", 1, AbortReason.CANCELLED, writer="api"))
    assert await task == "CANCELLED"


async def test_total_timeout_aborts_an_attempt_that_hangs(world: World) -> None:
    world.hold = asyncio.Event()
    world.migration("m1", "g1", policy=MigrationPolicy(total_timeout_ms=80))
    assert await drive(world) == "FAILED"
    assert world.state("m1").failure is FailureReason.TOTAL_TIMEOUT
    assert world.record("g1").owner.host == "h1"


async def test_a_retry_keeps_the_memory_that_is_promised_to_it(world: World) -> None:
    world.ends = [LATE]
    world.migration("m1", "g1", policy=MigrationPolicy(backoff_initial_ms=400, backoff_max_ms=400))
    task = asyncio.create_task(drive(world))
    await until(lambda: world.state("m1").phase is MigrationPhase.RETRY_WAIT)
    assert world.reserved("h2") == {"m1": 64}
    assert await task == "SUCCEEDED"
    assert world.record("g1").owner.host == "h2"
    assert world.reserved("h2") == {} == world.reserved("h3")


async def test_the_promise_moves_with_the_destination(world: World) -> None:
    world.ends = [AbortReason.DESTINATION_LOST]
    world.migration("m1", "g1", policy=MigrationPolicy(backoff_initial_ms=400, backoff_max_ms=400))
    task = asyncio.create_task(drive(world))
    await until(lambda: world.state("m1").phase is MigrationPhase.RETRY_WAIT)
    world.hold = asyncio.Event()
    await until(lambda: world.record("g1").attempt == 2 and bool(world.record("g1").inc))
    assert (world.reserved("h2"), world.reserved("h3")) == ({}, {"m1": 64})
    world.hold.set()
    assert await task == "SUCCEEDED"
    assert world.reserved("h2") == {} == world.reserved("h3")


async def test_nodes_that_are_there_already_are_looked_up_after_a_guess_that_failed(world: World) -> None:
    """As in a ledger that somebody mended by hand."""
    world.put(paths.requests("m1"), Requests())
    world.put(paths.acks("m1"), Requests())
    assert await drive(world) == "SUCCEEDED"


def test_what_is_spent_is_written_down_as_often_as_the_budgets_are_short() -> None:
    """Three thousand migrations with an hour each would be three hundred writes per second."""
    assert driver.spent_every_s(MigrationPolicy()) == driver.SPENT_S
    long = MigrationPolicy(total_timeout_ms=3_600_000, precopy_timeout_ms=3_600_000)
    assert driver.spent_every_s(long) == 360
    assert driver.spent_every_s(replace(long, precopy_timeout_ms=200_000)) == 20
