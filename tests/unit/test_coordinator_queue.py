"""What migrations wait for: a place, room, or the agent of their source; and what they hold meanwhile."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from orchestrator.api.decisions import cancelled_state
from orchestrator.coordinator import driver, places
from orchestrator.coordinator.supervisor import Limits
from orchestrator.core import migration as machine
from orchestrator.core.errors import AbortReason, FailureReason
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import HostRef
from orchestrator.core.policy import MigrationPolicy
from orchestrator.core.records import Cordon, MigrationPhase, WaitingFor
from orchestrator.ledger import paths
from tests.fakes.coordination import World
from tests.fakes.coordinator import LATE, leading, make_room, silence, until, world

__all__ = ["world"]


async def test_a_source_that_waits_for_its_own_place_holds_no_other(world: World) -> None:
    for n in range(2, 5):
        world.guest(f"g{n}", "h1")
        world.migration(f"m{n}", f"g{n}")
    world.guest("o", "h2")
    world.migration("mo", "o")
    world.hold = asyncio.Event()
    async with leading(world, limits=Limits(max_concurrent=3, max_per_source=1)) as supervisor:
        await until(lambda: bool(world.record("o").inc))
        assert supervisor.status.driving == 2
        waiting = [name for name in ("m1", "m2", "m3", "m4") if world.state(name).phase is MigrationPhase.PENDING]
        assert len(waiting) == 3
        await until(lambda: all(world.state(name).waiting_for is WaitingFor.PLACE for name in waiting))
        assert "1 of at most 1 migrations are leaving h1 already" in world.state(waiting[0]).message
        assert world.state(waiting[0]).spent_ms > 0
        world.hold.set()
        await until(lambda: all(world.state(name).phase.terminal for name in ("m1", "m2", "m3", "m4", "mo")))
    assert {world.state(name).phase for name in waiting} == {MigrationPhase.SUCCEEDED}
    assert world.state(waiting[0]).waiting_for is None


async def test_a_driver_that_takes_over_in_an_attempt_goes_on_counting(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time since the attempt was opened was lost with each driver: no budget ran out while they were replaced."""
    monkeypatch.setattr(driver, "SPENT_S", 0.1)
    monkeypatch.setattr(driver, "SPENT_PART", 0.0)
    world.hold = asyncio.Event()
    for least_ms in (300, 600):
        async with leading(world):
            await until(lambda: bool(world.record("g1").inc))
            await until(lambda least_ms=least_ms: world.state("m1").spent_ms > least_ms)
        opened = world.state("m1").opened_spent_ms
        assert opened is not None
        assert opened < 300
    assert world.state("m1").attempt == 1, "it is the same attempt"
    async with leading(world):
        world.hold.set()
        await until(lambda: world.state("m1").phase.terminal)
    assert world.state("m1").phase is MigrationPhase.SUCCEEDED


async def test_the_total_timeout_runs_while_a_migration_waits_and_from_one_coordinator_to_the_next(
    world: World,
) -> None:
    world.guest("g2", "h1")
    world.hold = asyncio.Event()
    limits = Limits(max_concurrent=1)
    async with leading(world, limits=limits):
        await until(lambda: bool(world.record("g1").inc))
        world.migration("m2", "g2", policy=MigrationPolicy(total_timeout_ms=2_500))
        world.store.tree.notify(paths.migration("m2"))
        await until(lambda: world.state("m2").waiting_for is WaitingFor.PLACE)
    spent = world.state("m2").spent_ms
    assert spent >= 1_000
    async with leading(world, limits=limits):
        await until(lambda: world.state("m2").phase.terminal)
    assert world.state("m2").failure is FailureReason.TOTAL_TIMEOUT
    assert world.state("m2").spent_ms >= 2_500
    assert world.record("g2").phase is Ownership.IDLE
    assert not world.state("m1").phase.terminal


async def test_a_cancelled_migration_leaves_the_queue(world: World) -> None:
    world.guest("g2", "h1")
    world.hold = asyncio.Event()
    async with leading(world, limits=Limits(max_concurrent=1)) as supervisor:
        await until(lambda: bool(world.record("g1").inc))
        world.migration("m2", "g2")
        world.store.tree.notify(paths.migration("m2"))
        await until(lambda: world.state("m2").waiting_for is WaitingFor.PLACE)
        world.edit_state("m2", lambda s: cancelled_state(s, wall_s=1.0))
        await until(lambda: supervisor.status.finished.get("CANCELLED") == 1)
        assert world.state("m2").message == "cancelled on request"


def fill(world: World, *hosts: str) -> None:
    for host in hosts:
        world.guest(f"filler-{host}", host, memory_mib=1000)


async def test_a_migration_waits_for_room_without_holding_a_place(world: World) -> None:
    fill(world, "h2", "h3")
    world.migration("m1", "g1", policy=MigrationPolicy(wait_for_capacity=True))
    world.guest("small", "h1", memory_mib=8)
    async with leading(world, limits=Limits(max_concurrent=1)):
        await until(lambda: world.state("m1").waiting_for is WaitingFor.ROOM)
        assert "waiting for room" in world.state("m1").message
        world.migration("m2", "small")
        world.store.tree.notify(paths.migration("m2"))
        await until(lambda: world.state("m2").phase is MigrationPhase.SUCCEEDED)
        assert world.state("m1").phase is MigrationPhase.PENDING
        make_room(world, "h3", 2048)
        await until(lambda: world.state("m1").phase is MigrationPhase.SUCCEEDED)
    assert world.record("g1").owner.host == "h3"


async def test_the_wait_for_room_ends_with_the_total_timeout(world: World) -> None:
    fill(world, "h2", "h3")
    world.migration("m1", "g1", policy=MigrationPolicy(wait_for_capacity=True, total_timeout_ms=2_000))
    async with leading(world):
        await until(lambda: world.state("m1").phase.terminal)
    state = world.state("m1")
    assert state.failure in (FailureReason.TOTAL_TIMEOUT, FailureReason.NO_CAPACITY)
    assert state.spent_ms >= 2_000


async def test_a_retry_that_finds_no_room_gives_back_its_promise(world: World) -> None:
    world.ends = [LATE]
    policy = MigrationPolicy(backoff_initial_ms=400, backoff_max_ms=400, wait_for_capacity=True)
    world.migration("m1", "g1", policy=policy)
    async with leading(world):
        await until(lambda: world.state("m1").phase is MigrationPhase.RETRY_WAIT)
        for host in ("h2", "h3"):
            world.put(paths.cordon(host), Cordon(on=True, why="repair"))
        await until(lambda: world.state("m1").waiting_for is WaitingFor.ROOM)
        assert world.reserved("h2") == {}
        assert world.state("m1").phase is MigrationPhase.RETRY_WAIT
        world.put(paths.cordon("h3"), Cordon())
        await until(lambda: world.state("m1").phase is MigrationPhase.SUCCEEDED)
    assert [r.attempt for r in world.attempts("m1")] == [1, 2]


async def test_a_migration_waits_for_its_sources_agent_and_promises_nothing(world: World) -> None:
    silence(world, "h1")
    async with leading(world):
        await until(lambda: world.state("m1").waiting_for is WaitingFor.SOURCE)
        assert "the agent of h1" in world.state("m1").message
        assert world.reserved("h2") == {} == world.reserved("h3")
        assert world.calls == []
        world.put(paths.live("h1"), Cordon())
        world.store.tree.notify(paths.live("h1"))
        await until(lambda: world.state("m1").phase is MigrationPhase.SUCCEEDED)


async def test_an_attempt_whose_source_falls_silent_blames_no_destination(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "SOURCE_PATIENCE_MS", 800.0)
    world.silent = {"h1"}
    async with leading(world):
        await until(lambda: ("conduct", "h1", 1) in world.calls)
        silence(world, "h1")
        await until(lambda: world.state("m1").phase.terminal)
    assert world.state("m1").failure is FailureReason.SOURCE_UNREACHABLE
    assert [r.reason for r in world.attempts("m1")] == [AbortReason.SOURCE_UNREACHABLE]
    assert world.reserved("h2") == {} == world.reserved("h3")
    assert (world.record("g1").phase, world.record("g1").owner.host) == (Ownership.IDLE, "h1")


async def test_a_migration_committed_to_a_dead_host_gives_its_places_back(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "COMMITTED_HOLD_S", 0.3)
    world.guest("g2", "h1")
    lost = GuestRecord(
        "n-g1", Ownership.COMMITTED, HostRef("h2", "b"), "m1", 1, HostRef("h2", "b"), "inc", HostRef("h1", "boot-h1")
    )
    world.put(paths.guest("g1"), lost)
    world.edit_state("m1", lambda s: replace(s, phase=MigrationPhase.PREPARING, attempt=1, source="h1"))
    world.migration("m2", "g2")
    async with leading(world, limits=Limits(max_concurrent=1)):
        await until(lambda: world.state("m2").phase is MigrationPhase.SUCCEEDED)
    assert not world.state("m1").phase.terminal
