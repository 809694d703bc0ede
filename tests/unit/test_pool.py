"""Workers that freeze, hang or never get ready are replaced, and nobody waits for them."""

from __future__ import annotations

import asyncio

import pytest

from orchestrator.coordinator import pool as pools
from orchestrator.coordinator.pool import Pool, WorkerLost
from orchestrator.coordinator.worker import Worker
from orchestrator.core.handover import Ownership
from orchestrator.ledger import paths
from orchestrator.ledger.store import Versioned, WriteResult
from tests.fakes.coordination import MemoryStore, World
from tests.fakes.coordinator import EPOCH, until


class FakeWorker:
    """Drives for ever. `frozen` answers nothing, as a stopped process does; `killed` raises, as a dead one does."""

    def __init__(self) -> None:
        self.ready = True
        self.frozen = False
        self.killed = False
        self.driving: list[str] = []

    async def drive(self, migration: str, epoch: int, shard: int = 0) -> str:
        self.driving.append(migration)
        await asyncio.Event().wait()
        return "SUCCEEDED"

    async def ping(self) -> bool:
        if self.killed:
            raise WorkerLost("dead")
        if self.frozen:
            await asyncio.Event().wait()
        return self.ready

    def kill(self) -> None:
        self.killed = True


class Bench:
    """A pool of one, its workers in the order in which they sat there, and a clock that the test moves."""

    def __init__(self) -> None:
        self.workers: list[FakeWorker] = []
        self.now_s = 0.0
        self.has_ledger = True
        self.born_ready = True
        self.pool = Pool(1, self._start, has_ledger=lambda: self.has_ledger, clock_s=lambda: self.now_s)

    def _start(self, _seat: int, before: int) -> FakeWorker:
        assert before == len(self.workers)
        self.workers.append(FakeWorker())
        self.workers[-1].ready = self.born_ready
        return self.workers[-1]

    async def look(self, after_s: float) -> None:
        self.now_s += after_s
        await self.pool.tend()


@pytest.fixture
async def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(pools, "LOOK_S", 0.0)
    monkeypatch.setattr(pools, "PING_S", 0.02)
    return Bench()


async def test_a_frozen_worker_is_replaced_and_its_migrations_are_handed_out_anew(bench: Bench) -> None:
    call = asyncio.create_task(bench.pool.dispatch("abcdef012345", 3))
    await until(lambda: bench.workers[0].driving == ["abcdef012345"])
    await bench.look(1.0)
    bench.workers[0].frozen = True
    await bench.look(pools.SILENT_S - 0.5)
    assert not call.done()
    assert len(bench.workers) == 1
    await bench.look(1.0)
    with pytest.raises(WorkerLost, match="silent"):
        await call
    assert bench.workers[0].killed
    again = asyncio.create_task(bench.pool.dispatch("abcdef012345", 3))
    await until(lambda: bench.workers[1].driving == ["abcdef012345"])
    again.cancel()
    assert bench.pool.replaced == 1


async def test_the_bounds_add_up_to_less_than_ten_seconds() -> None:
    assert pools.SILENT_S + pools.LOOK_S + pools.PING_S < 10
    assert pools.START_S + pools.LOOK_S < 10


async def test_a_worker_that_never_gets_ready_is_replaced_each_time_with_more_patience(bench: Bench) -> None:
    bench.workers[0].ready = False
    bench.born_ready = False
    for expected in (1, 2, 3):
        await bench.look(pools.START_S * 2 ** (expected - 1) - 1.0)
        assert len(bench.workers) == expected
        await bench.look(2.0)
        assert len(bench.workers) == expected + 1
    bench.workers[-1].ready = True
    await bench.look(1.0)
    await bench.look(1.0)
    assert len(bench.workers) == 4


async def test_a_worker_that_is_too_slow_for_its_load_is_not_replaced_again_and_again(bench: Bench) -> None:
    """Each replacement hands out everything anew, on a machine that is too slow already."""
    for expected in (1, 2, 3):
        await bench.look(0.1)  # the newest answers once, and no more
        bench.workers[-1].frozen = True
        await bench.look(pools.SILENT_S * 2 ** (expected - 1) - 0.5)
        assert len(bench.workers) == expected
        await bench.look(1.0)
        assert len(bench.workers) == expected + 1
    await bench.look(0.1)
    await bench.look(pools.CALM_S + 1.0)
    bench.workers[-1].frozen = True
    await bench.look(pools.SILENT_S + 0.5)
    assert len(bench.workers) == 5, "after a calm time as fast as the first"


async def test_nobody_is_replaced_for_a_ledger_that_is_away_for_all(bench: Bench) -> None:
    await bench.look(0.0)
    bench.workers[0].ready = False
    bench.has_ledger = False
    for _ in range(5):
        await bench.look(100.0)
    assert len(bench.workers) == 1


@pytest.mark.parametrize("writes", range(2))
async def test_a_driver_that_wakes_after_another_finished_its_migration_does_no_harm(writes: int) -> None:
    """Both have the same epoch: what keeps the first from writing is that its compare-and-set finds another version."""
    world = World()
    for host in ("h1", "h2", "h3"):
        world.host(host)
    world.store.tree.nodes[paths.epoch()] = Versioned(b"", EPOCH, 0)
    world.guest("g1", "h1")
    world.migration("m1", "g1")
    frozen = FrozenStore(world.store, after=writes)
    first = Worker(frozen, world)
    call = asyncio.create_task(first.drive("m1", EPOCH))
    await until(lambda: frozen.stopped.is_set() or call.done())
    async with asyncio.timeout(10):
        assert await Worker(world.store, world).drive("m1", EPOCH) == "SUCCEEDED"
    record, reports = world.record("g1"), world.attempts("m1")
    frozen.goes_on.set()
    async with asyncio.timeout(10):
        assert await call == "SUCCEEDED"
    assert (world.record("g1"), world.attempts("m1")) == (record, reports)
    assert record.phase is Ownership.IDLE
    assert all(not world.reserved(host) for host in ("h1", "h2", "h3"))


class FrozenStore(MemoryStore):
    """Stops before the write number `after`, which it carries out when it goes on."""

    def __init__(self, other: MemoryStore, after: int) -> None:
        super().__init__(other.tree)
        self.after = after
        self.stopped = asyncio.Event()
        self.goes_on = asyncio.Event()

    async def multi(self, ops, timeout_s: float = 2.0) -> WriteResult:
        if self.after == 0:
            self.stopped.set()
            await self.goes_on.wait()
        self.after -= 1
        return await super().multi(ops, timeout_s)
