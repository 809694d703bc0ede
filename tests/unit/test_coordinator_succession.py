"""A driver dies, its answers are lost, its epoch or its view of the ledger is old: the migration goes on as one."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

import pytest

from orchestrator.core import handover
from orchestrator.core.errors import AbortReason
from orchestrator.core.ids import HostRef
from orchestrator.core.records import MigrationPhase, MigrationState
from orchestrator.ledger import paths
from orchestrator.ledger.records import encode
from orchestrator.ledger.store import Versioned
from tests.fakes.coordination import MemoryStore, World
from tests.fakes.coordinator import EPOCH, LATE, drive, until, worker, world

__all__ = ["world"]


@pytest.mark.parametrize("applied", [True, False])
@pytest.mark.parametrize("lost", range(3))
async def test_a_lost_answer_changes_nothing(world: World, lost: int, applied: bool) -> None:
    """The coordinator's nth write ends as outcome unknown, applied or not."""
    world.ends = [LATE]
    real, count = world.store.multi, 0

    async def multi(ops, timeout_s: float = 2.0):
        nonlocal count
        count += 1
        if count == lost + 1:
            world.store.fail_next = [applied]
        return await real(ops, timeout_s)

    world.store.multi = multi
    assert await drive(world) == "SUCCEEDED"
    assert [r.attempt for r in world.attempts("m1")] == [1, 2]
    assert world.reserved("h2") == {}


@pytest.mark.parametrize("crash_after", [0.0, 0.001, 0.002, 0.004, 0.008, 0.015])
async def test_driver_crashes_at_any_instant_and_the_next_goes_on(world: World, crash_after: float) -> None:
    world.ends = [LATE, LATE]
    for _ in range(4):
        task = asyncio.create_task(drive(world))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(crash_after):
                await asyncio.shield(task)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert await drive(world) == "SUCCEEDED"
    assert [r.attempt for r in world.attempts("m1")] == [1, 2, 3]
    assert len(world.conducting) == 3


async def test_bound_attempt_is_adopted_and_not_restarted(world: World) -> None:
    world.hold = asyncio.Event()
    first = worker(world)
    task = asyncio.create_task(first.drive("m1", EPOCH))
    await until(lambda: bool(world.record("g1").inc))
    first.stop()
    await task
    calls = list(world.calls)
    second = asyncio.create_task(drive(world))
    await asyncio.sleep(0.02)
    assert world.calls == calls
    world.hold.set()
    assert await second == "SUCCEEDED"


@pytest.mark.rule("H12")
async def test_stale_epoch_can_write_nothing(world: World) -> None:
    world.store.tree.nodes[paths.epoch()] = Versioned(b"", EPOCH + 1, 0)
    assert await drive(world) == "DEPOSED"
    assert world.store.writes == []


@pytest.mark.rule("H12")
async def test_an_agent_that_calls_our_epoch_stale_deposes_nobody(world: World) -> None:
    """The ledger says that it stands: that agent's fault ends the attempt, and the next one goes on."""
    real = world.call

    def call(what: str, host: str, attempt: int, epoch: int, shard: int = 0) -> None:
        world.misread_epoch = EPOCH + 1 if attempt == 1 else None
        real(what, host, attempt, epoch, shard)

    world.call = call
    assert await drive(world) == "SUCCEEDED"
    assert world.attempts("m1")[0].reason is AbortReason.PREPARE_FAILED


@pytest.mark.rule("H12")
async def test_an_agent_that_read_a_newer_epoch_is_right(world: World) -> None:
    """Our call was under way while another coordinator was elected."""
    real = world.call

    def call(what: str, host: str, attempt: int, epoch: int, shard: int = 0) -> None:
        world.store.tree.nodes[paths.epoch()] = Versioned(b"", EPOCH + 1, 0)
        real(what, host, attempt, epoch, shard)

    world.call = call
    assert await drive(world) == "DEPOSED"


@pytest.mark.rule("H12")
async def test_a_worker_follows_a_ledger_that_was_restored(world: World) -> None:
    """Its epochs begin at a lower number again."""
    one = worker(world)
    world.store.tree.nodes[paths.epoch()] = Versioned(b"", EPOCH + 9, 0)
    assert await one.drive("m1", EPOCH + 9) == "SUCCEEDED"
    world.guest("g2", "h1")
    world.migration("m2", "g2")
    assert await one.drive("m2", EPOCH) == "DEPOSED"
    world.store.tree.nodes[paths.epoch()] = Versioned(b"", EPOCH, 0)
    assert await one.drive("m2", EPOCH) == "SUCCEEDED"


@pytest.mark.rule("H13")
async def test_a_record_from_before_open_is_never_taken_for_an_arrival(world: World) -> None:
    """A server that lags by the length of one read shows the guest idle and the migration under way."""
    old = world.store.tree.nodes[paths.guest("g1")]
    opened = handover.open_attempt(world.record("g1"), "m1", 1, HostRef("h2", "boot-h2"), epoch=EPOCH, writer="dead")
    world.put(paths.guest("g1"), opened)
    under_way = MigrationState(MigrationPhase.PREPARING, 1, "h1", "h2", epoch=EPOCH)
    before = world.store.tree.nodes[paths.migration_state("m1")]
    real, lags = world.store.read, True

    async def barrier(timeout_s: float = 2.0) -> None:
        nonlocal lags
        lags = False

    async def read(path: str, timeout_s: float = 2.0) -> Versioned | None:
        return old if lags and path == paths.guest("g1") else await real(path, timeout_s)

    world.store.tree.nodes[paths.migration_state("m1")] = Versioned(encode(under_way), before.version + 1, 1)
    world.store.read, world.store.barrier = read, barrier
    world.store.watch = lambda path, callback: world.store._watch((path, False, callback), lambda: None)
    assert await drive(world) == "SUCCEEDED"
    assert world.record("g1").owner.host == "h2"
    assert [report.outcome for report in world.attempts("m1")] == ["COMMITTED"]


@pytest.mark.rule("H13")
async def test_a_migration_that_nobody_has_begun_costs_no_barrier(world: World) -> None:
    """What its driver does first is a compare-and-set, which proves that nothing had been missed."""
    assert await drive(world) == "SUCCEEDED"
    assert world.store.barriers == 0


@pytest.mark.rule("H13")
async def test_a_driver_that_sees_nothing_of_its_predecessor_goes_on_where_that_one_was(world: World) -> None:
    """Its server lags behind the one through which the first attempt was opened."""
    over = asyncio.Event()
    taken_over = World(MemoryStore(world.store.tree), hold=over)
    predecessor = asyncio.create_task(worker(taken_over).drive("m1", EPOCH))
    world.store.lag()
    await until(lambda: bool(world.record("g1").inc))
    predecessor.cancel()
    successor = asyncio.create_task(drive(world))
    await until(lambda: world.store._old is None)
    over.set()
    assert await successor == "SUCCEEDED"
    assert [(report.attempt, report.outcome) for report in world.attempts("m1")] == [(1, "COMMITTED")]
    assert not world.calls, "the attempt was conducted already"


async def test_who_loses_a_race_for_room_looks_again_without_a_barrier(world: World) -> None:
    """The conflict was an answer of the quorum: what moved was told before it."""
    real, lost = world.store.multi, False

    async def multi(ops, timeout_s: float = 2.0):
        nonlocal lost
        if not lost and any(op.path == paths.reservations("h2") for op in ops):
            lost = True
            node = world.store.tree.nodes[paths.reservations("h2")]
            world.store.tree.nodes[paths.reservations("h2")] = replace(node, version=node.version + 1)
        return await real(ops, timeout_s)

    world.store.multi = multi
    assert await drive(world) == "SUCCEEDED"
    assert lost
    assert world.store.barriers == 0
