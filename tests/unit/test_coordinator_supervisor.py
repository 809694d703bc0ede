"""The supervisor over a ledger in memory: who leads, and that whatever is found is driven."""

from __future__ import annotations

import asyncio

import pytest

from orchestrator.coordinator.pool import WorkerLost
from orchestrator.coordinator.supervisor import Supervisor, TokenBucket
from orchestrator.coordinator.worker import Worker
from orchestrator.core.records import MigrationPhase
from orchestrator.ledger import paths
from tests.fakes.coordination import MemoryStore, World
from tests.fakes.coordinator import EPOCH, leading, until, worker, world

__all__ = ["world"]


async def test_supervisor_finds_and_finishes_migrations(world: World) -> None:
    world.guest("g2", "h1")
    async with leading(world) as supervisor:
        await until(lambda: world.state("m1").phase.terminal)
        world.migration("m2", "g2")
        world.store.tree.notify(paths.migration("m2"))
        await until(lambda: world.state("m2").phase is MigrationPhase.SUCCEEDED)
        assert supervisor.status.epoch == EPOCH + 1


@pytest.mark.rule("H12")
async def test_one_leader_and_the_next_has_a_higher_epoch(world: World) -> None:
    other = MemoryStore(world.store.tree)
    async with leading(world, name="a") as a, leading(world, other, name="b") as b:
        await until(lambda: a.status.leading)
        await asyncio.sleep(0.3)
        assert not b.status.leading
        world.store.down = True
        world.store.expire()
        await until(lambda: b.status.leading)
        assert b.status.epoch > EPOCH + 1
        await until(lambda: not a.status.leading)


async def test_new_process_on_the_same_seat_need_not_wait_for_the_session(world: World) -> None:
    async with leading(world, name="seat") as a:
        await until(lambda: a.status.leading)
        async with leading(world, MemoryStore(world.store.tree), name="seat") as b:
            await until(lambda: b.status.leading)
            assert b.status.epoch > a.status.epoch


async def test_election_whose_answer_was_lost_is_recognised(world: World) -> None:
    world.store.fail_next = [True]
    supervisor = Supervisor(world.store, worker(world).drive, agents=world)
    assert await supervisor.elect() == EPOCH + 1


async def test_worker_death_hands_the_migration_to_another(world: World) -> None:
    drivers, deaths = Worker(world.store, world), [1, 2]

    async def dispatch(migration: str, epoch: int) -> str:
        if deaths:
            deaths.pop()
            raise WorkerLost("killed")
        return await drivers.drive(migration, epoch)

    task = asyncio.create_task(Supervisor(world.store, dispatch, agents=world).run())
    await until(lambda: world.state("m1").phase is MigrationPhase.SUCCEEDED)
    task.cancel()


async def test_token_bucket_holds_its_rate() -> None:
    bucket = TokenBucket(rate=200.0, burst=2)
    loop = asyncio.get_running_loop()
    begin = loop.time()
    await asyncio.gather(*(bucket.take() for _ in range(22)))
    assert 0.09 <= loop.time() - begin < 1.0
